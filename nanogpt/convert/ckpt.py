"""Read nanoGPT's ckpt.pt without executing pickled code, and write a ckpt.pt that nanoGPT can load.

nanoGPT computes exact (erf) GELU, and its only architecture option is `bias`. Its GPT-2 vocabulary is
padded to 50,304 rows; rows beyond the tokenizer's ids are vocabulary padding here too.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanogpt import files
from nanogpt.config import PositiveInt, fitted
from nanogpt.convert.layout import mismatches, ours, parameter_shapes, theirs, unlike, with_vocabulary
from nanogpt.convert.pretrained import Pretrained
from nanogpt.data import foreign
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import vocabulary

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
SIZES = [name for name in MODEL_ARGS if name not in ("bias", "dropout")]
SAVED = {"model_args": {"bias?": bool, **dict.fromkeys(SIZES, PositiveInt)}, "model": {str: Tensor}}
SAVED |= {"config?": {"activation?": Literal["gelu", "gelu_tanh"]}}
NEVER = 1e9  # nanoGPT's best_val_loss before the first evaluation
WRAPPED = re.compile(r"^(_orig_mod\.|module\.)+")  # name prefixes added by torch.compile and DDP
GPT2_ROWS = (50257, 50304)  # vocabulary sizes of models with GPT-2's tokenizer: plain and padded


def open_file(path: Path, data_folders: list[Path]) -> Pretrained:
    """Open a nanoGPT checkpoint.

    Its character vocabulary is searched for beside the file, then in the folder of its dataset in each of
    `data_folders`. Without one, a vocabulary of GPT-2's size implies GPT-2's tokenizer.

    Raise UserError if the file is truncated, contains anything but tensors and plain values, or if its
    tensors do not match its model_args.
    """
    saved = fitted(SAVED, _load(path), f"{path} is not a nanoGPT checkpoint")
    args, options = saved["model_args"], saved.get("config", {})
    if foreign := [f"{name}={value}" for name, value in args.items() if name not in MODEL_ARGS and value]:
        raise UserError(f"{path}: model_args that nanoGPT does not have: {', '.join(foreign)[:200]}")
    config = GPTConfig(
        **{name: args[name] for name in SIZES},
        bias=args.get("bias", True),
        activation=options.get("activation", "gelu"),
    )
    stored = {ours(WRAPPED.sub("", name)): tensor for name, tensor in saved["model"].items()}
    try:
        iter_num, loss = int(saved.get("iter_num") or 0), saved.get("best_val_loss")
        val_loss = None if loss is None else float(loss)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} is not a nanoGPT checkpoint ({error!r})") from None
    dataset = Path(str(options.get("dataset", ""))).name
    head = stored.pop("lm_head.weight", None)  # copy of the tied embedding
    # Causal masks saved by versions without flash attention.
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(".attn.bias")}
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    if wrong := mismatches(parameter_shapes(config, path), shapes):
        raise UserError(f"{path}: the tensors do not match model_args: {wrong}")
    if head is not None and not torch.equal(head, stored["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but nanoGPT ties the two")

    text = _characters([path.parent, *(folder / dataset for folder in data_folders if dataset)])
    if not text and config.vocab_size in GPT2_ROWS:
        text = vocabulary.GPT2_BY_NAME
    return Pretrained(
        str(path),
        with_vocabulary(config, text, str(path)),
        text,
        vocabulary.identify(text).sha256 if text else "",
        stored.items,
        iter_num=iter_num,
        val_loss=val_loss,
        dataset=dataset,
    )


def _load(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # the zip directory is at the end: truncated files have none
        raise UserError(f"{path} is not a nanoGPT checkpoint, or is truncated")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.findall(r"GLOBAL (\S+)", str(error)) or ["unknown code"]
        raise UserError(
            f"{path} contains more than tensors, numbers and strings; refusing to unpickle it, as that "
            f"could run arbitrary code (it names {named[0]})"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise UserError(f"{path} is not a nanoGPT checkpoint, or is damaged ({reason})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not a nanoGPT checkpoint: it contains a {type(saved).__name__}")
    return saved


def _characters(folders: list[Path]) -> str:
    """Return the tokenizer of the first folder with nanoGPT's meta.pkl or our tokenizer.json, else ""."""
    for folder in folders:
        if (folder / "meta.pkl").is_file():
            return foreign.tokenizer_of(folder / "meta.pkl")
        if (folder / "tokenizer.json").is_file():
            text = files.text_of(folder / "tokenizer.json")
            vocabulary.identify(text, str(folder / "tokenizer.json"))
            return text
    return ""


# ----------------------------------------------------------------------------- writing


def require(config: GPTConfig, text: str) -> None:
    """Raise UserError if nanoGPT cannot compute this model or read its tokenizer `text`."""
    known: dict[str, Any] = {"activation": ("gelu", "gelu_tanh"), "bias": (True, False)}
    known |= {"n_kv_head": (0, config.n_head), "head_dim": (0, config.n_embd // config.n_head)}
    if wrong := unlike(config, known):
        raise UserError(f"nanoGPT does not support {', '.join(wrong)}; try --format=hf")
    kind = vocabulary.identify(text).kind if text else "gpt2"
    if kind not in ("char", "gpt2"):
        raise UserError(f"nanoGPT supports char and gpt2 tokenizers, not {kind}; try --format=hf")


def write_folder(folder: Path, model: GPT, source: Pretrained) -> list[str]:
    """Write ckpt.pt into the existing `folder`, and meta.pkl if the tokenizer of `source` is char.

    Vocabulary padding is dropped, since nanoGPT would sample it. Return notes to print. Raise UserError as
    `require` does.
    """
    config, text = model.config, source.tokenizer
    require(config, text)
    weights = {theirs(name): parameter.detach() for name, parameter in model.named_parameters()}
    table = weights["transformer.wte.weight"][: config.vocab_size].clone()
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = table  # tied: one tensor, two names
    dataset = Path(source.dataset).name
    saved = {
        "model": {name: tensor.cpu() for name, tensor in weights.items()},
        "model_args": {name: getattr(config, name) for name in MODEL_ARGS},
        "iter_num": source.iter_num,
        "best_val_loss": NEVER if source.val_loss is None else source.val_loss,
        # nanoGPT's sample.py reads only `dataset`, to find data/<dataset>/meta.pkl.
        "config": {"dataset": dataset, "init_from": "resume", "activation": config.activation},
    }
    torch.save(saved, folder / "ckpt.pt")
    notes = ["no optimizer state: nanoGPT can sample from it but not resume training"]
    if config.activation == "gelu_tanh":
        notes.append("nanoGPT uses exact GELU, this model the tanh form: they differ by up to 5e-4")
    if text and vocabulary.identify(text).kind == "char":
        characters = json.loads(text)["characters"]
        meta = {
            "vocab_size": len(characters),
            "itos": dict(enumerate(characters)),
            "stoi": {character: i for i, character in enumerate(characters)},
        }
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        notes.append(f"copy meta.pkl to data/{dataset} of nanoGPT, where its sample.py looks for it")
    return notes
