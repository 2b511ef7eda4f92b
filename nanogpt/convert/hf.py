"""Load weights and tokenizer of a GPT-2 from a Hugging Face folder, without Hugging Face's libraries.

A folder contains config.json, model.safetensors (or shards and model.safetensors.index.json) and the
tokenizer files. All checks but those of values use the headers only, before any weight is read.
huggingface_hub is needed only for models given by name, to find them in its cache or download them.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt import files
from nanogpt.config import FileName
from nanogpt.convert.layout import (
    OWN_TOKENIZER,
    mismatches,
    ours,
    parameter_shapes,
    theirs,
    with_vocabulary,
)
from nanogpt.convert.pretrained import NAMES, Pretrained, stored_tensor
from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from nanogpt.tokenizer import folders, vocabulary

WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
TOKENIZER_FILES = [
    *folders.NAMES,
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    OWN_TOKENIZER,
]
ACTIVATION_OF = dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
ACTIVATION_OF |= {"gelu": "gelu", "relu2": "relu2"}
FLAGS = {  # GPT2Config settings that change the computation, and GPT-2's values
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
KEYS = {  # our sizes, and their two names in config.json
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_embd": ("n_embd", "hidden_size"),
    "block_size": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size", "vocab_size"),
}
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the supported dtypes
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks saved by old versions
CONV1D = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")  # Conv1D weights, stored (in, out) as by OpenAI


# ----------------------------------------------------------------------------- locating a model


def find(name: str) -> Path:
    """Return the folder of a hub model ("gpt2" or "owner/name"); download it if it is not in the cache.

    Raise UserError if that fails; its one-line message lists the files to provide instead.
    """
    repo = f"openai-community/{name}" if name in NAMES else name
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise UserError(
            f"--init_from={name} needs a package: pip install huggingface_hub; or pass the path of a folder "
            f"with {_what_to_put(repo)}"
        ) from None
    problem = Exception()
    wanted = WANTED + TOKENIZER_FILES
    for known, cached in ((repo, True), (name, True), (repo, False)):  # old caches store gpt2 under that name
        try:
            folder = huggingface_hub.snapshot_download(known, allow_patterns=wanted, local_files_only=cached)
            weight_files(Path(folder))
            return Path(folder)
        except Exception as error:  # network, proxy and hub errors share no base class
            problem = error
    raise UserError(
        f"{name} is not complete in the cache ({constants.HF_HUB_CACHE}) and could not be downloaded "
        f"({_reason(problem)}); put {_what_to_put(repo)} in a folder, and pass --init_from=FOLDER"
    )


def _reason(error: BaseException) -> str:
    """Return the root cause of a huggingface_hub error as one short line."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def _what_to_put(repo: str) -> str:
    return f"config.json, model.safetensors and merges.txt of https://huggingface.co/{repo}"


# ----------------------------------------------------------------------------- one folder


def open_folder(folder: Path) -> Pretrained:
    """Open a GPT-2 in Hugging Face's layout.

    Raise UserError for other architectures, for missing, unexpected or misshapen tensors, for missing or
    truncated files, and for pickled weights.
    """
    if (folder / "adapter_config.json").is_file():
        merged = f"peft.AutoPeftModelForCausalLM.from_pretrained('{folder}').merge_and_unload()"
        raise UserError(
            f"{folder} has a PEFT adapter, which is not applied here; merge it into its model: "
            f"python -c \"import peft; {merged}.save_pretrained('{folder}-merged')\""
        )
    settings = files.read_json(folder / "config.json", dict)
    stored = _headers(weight_files(folder))
    stored_config = shape(settings, folder / "config.json", len(stored))
    tied_copy = stored_config.tied and "lm_head.weight" in stored
    expected = _expected(stored_config, folder / "config.json")
    if tied_copy:
        expected["lm_head.weight"] = expected["wte.weight"]
    if problems := mismatches(expected, {name: place[2] for name, place in stored.items()}):
        raise UserError(f"{folder}: the tensors do not match config.json: {problems}")
    extra = settings.get("nanogpt")
    no_bias = isinstance(extra, dict) and extra.get("bias") is False

    def read() -> Iterator[tuple[str, Tensor]]:
        if tied_copy and not _equal(stored["lm_head.weight"], stored["wte.weight"]):
            raise UserError(
                f"{folder}: lm_head.weight differs from wte.weight, but config.json ties them; "
                f"set tie_word_embeddings to false there"
            )
        for name, place in stored.items():
            if name == "lm_head.weight" and tied_copy:
                continue
            tensor = stored_tensor(*place[:2])
            if no_bias and name.endswith(".bias"):
                if tensor.any():
                    raise UserError(f"{folder}: {name} is not zero, but config.json has no bias")
                continue
            yield ours(name), tensor.t() if CONV1D.fullmatch(name) else tensor

    text = find_tokenizer(folder, stored_config.vocab_size)
    config = with_vocabulary(stored_config, text, str(folder))
    config = replace(config, bias=not no_bias)
    has_template = "chat_template" in folders.settings(folder) or any(folder.glob("chat_template.*"))
    notices = (f"note: the chat template of {folder} is neither used nor exported",) if has_template else ()
    sha256 = vocabulary.identify(text).sha256 if text else ""
    return Pretrained(str(folder), config, text, sha256, read, notices)


def shape(settings: Any, path: Path, tensors: int) -> GPTConfig:
    """Return the model shape described by Hugging Face's config.json, for a file of `tensors` tensors; raise
    UserError unless it is GPT-2. Files of 2019 have neither model_type nor architectures.
    """
    is_old = "n_head" in settings and "GPT2" in str(settings.get("architectures", "GPT2"))
    kind = settings.get("model_type", "gpt2" if is_old else None)
    if kind != "gpt2":
        raise UserError(f"{path}: model_type is {kind!r}; only 'gpt2' is supported")
    unlike = [key for key, value in FLAGS.items() if settings.get(key, value) != value]
    wrong = [f"{key}={repr(settings[key])[:80]} (GPT-2: {FLAGS[key]!r})" for key in unlike]
    activation = str(settings.get("activation_function", "gelu_new"))
    if activation not in ACTIVATION_OF:
        wrong.append(f"activation_function={activation!r} (known: {', '.join(ACTIVATION_OF)})")
    tied = settings.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        wrong.append(f"tie_word_embeddings={tied!r} (true or false)")
    sizes = {}
    for name, (key, alias) in KEYS.items():
        other = settings.get(
            alias, settings.get("n_ctx", 1024) if key == "n_positions" else getattr(GPTConfig, name)
        )
        sizes[name] = value = settings.get(key, other)
        limit = tensors if name == "n_layer" else 1 << 24
        if type(value) is not int or not 0 < value <= limit:
            wrong.append(f"{key}={value!r} (a positive integer, here at most {limit})")
        elif alias in settings and other != value:
            wrong.append(f"{key}={value} and {alias}={other!r} (the same)")
    if not wrong and settings.get("n_inner") not in (None, 4 * sizes["n_embd"]):
        wrong.append(f"n_inner={settings['n_inner']!r} (GPT-2: four times n_embd)")
    if wrong:
        raise UserError(f"{path}: unsupported settings: {'; '.join(wrong)}")
    return GPTConfig(**sizes, activation=ACTIVATION_OF[activation], tied=tied)


def weight_files(folder: Path) -> list[Path]:
    """Return model.safetensors or the shards of its index; raise UserError if any is missing or all are
    pickled.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(files.read_json(index, {"weight_map": {str: FileName}})["weight_map"].values()))
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{folder} has {len(names) - len(absent)} of {len(names)} shards: {absent[0]} is missing; "
                f"download the rest"
            )
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise UserError(
            f"{folder} has only pickled weights ({pickled[0]}), and unpickling can run arbitrary code; "
            f"convert them once: {conversion(folder)}"
        )
    if list(folder.glob("*.ckpt.index")):
        raise UserError(
            f"{folder} has OpenAI's TensorFlow checkpoint, which is not supported; the same weights are at "
            f"https://huggingface.co/openai-community"
        )
    raise UserError(f"{folder} has no model.safetensors")


def conversion(folder: Path) -> str:
    """Return a command that converts pickled weights in `folder` to safetensors; it loads tensors only."""
    code = (
        "import glob, torch, safetensors.torch as s; w = {}; "
        "[w.update(torch.load(p, weights_only=True)) for p in glob.glob('pytorch_model*.bin')]; "
        "s.save_file({k: v.clone() for k, v in w.items()}, 'model.safetensors')"
    )
    return f'cd "{folder}" && python -c "{code}"'


# ----------------------------------------------------------------------------- tensors

Place = tuple[Path, str, list[int]]  # file, tensor name in the file, shape


def _headers(parts: list[Path]) -> dict[str, Place]:
    """Return the place of each tensor by its name without prefix; only headers are read."""
    places: dict[str, Place] = {}
    for part in parts:
        try:
            with safe_open(part, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    plain, tensor = name.removeprefix("transformer."), file.get_slice(name)
                    if BUFFERS.fullmatch(plain):
                        continue
                    if plain in places or tensor.get_dtype() not in FLOATS:
                        problem = "twice" if plain in places else f"as {tensor.get_dtype()}"
                        raise UserError(f"{part} has {name} {problem}; expected once, in a dtype of {FLOATS}")
                    places[plain] = (part, name, tensor.get_shape())
        except SafetensorError as error:
            raise UserError(f"{part} is damaged or partially downloaded ({error}){_pointer(part)}") from None
    return places


def _equal(one: Place, other: Place) -> bool:
    return torch.equal(stored_tensor(*one[:2]), stored_tensor(*other[:2]))


def _pointer(path: Path) -> str:
    with path.open("rb") as file:
        is_pointer = file.read(20).startswith(b"version https://git-")
    return (
        ": it is a Git LFS pointer; fetch the file with git lfs pull" if is_pointer else "; download it again"
    )


def _expected(config: GPTConfig, path: Path) -> dict[str, list[int]]:
    shapes = {theirs(n).removeprefix("transformer."): s for n, s in parameter_shapes(config, path).items()}
    return {name: size[::-1] if CONV1D.fullmatch(name) else size for name, size in shapes.items()}


# ----------------------------------------------------------------------------- tokenizer


def find_tokenizer(folder: Path, vocab_size: int) -> str:
    """Return the text of a tokenizer.json for the tokenizer of `folder`: the one that export.py wrote, else
    the one that transformers reads; "" if it is unknown. Raise UserError for files that are not supported.
    """
    if (folder / OWN_TOKENIZER).is_file():
        text = files.text_of(folder / OWN_TOKENIZER)
        vocabulary.identify(text, str(folder / OWN_TOKENIZER))
        return text
    if text := folders.read(folder):
        return text
    if (merges := folder / "merges.txt").is_file():
        if text := folders.gpt2(files.text_of(merges).splitlines()):
            return text
        raise UserError(f"{merges}: unsupported tokenizer (not GPT-2's)")
    is_other = any(path.suffix in folders.ENDINGS or path.name == "vocab.json" for path in folder.iterdir())
    return vocabulary.GPT2_BY_NAME if vocab_size in (50257, 50304) and not is_other else ""
