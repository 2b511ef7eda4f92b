"""nanoGPT's ckpt.pt: read without running code, and written so that nanoGPT's own programs take it.

nanoGPT computes GELU in its exact form, and has no other switch than `bias`. Its table of GPT-2 tokens
is padded to 50,304 rows; what its tokenizer does not know is padding here too.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.convert.layout import (
    mismatches,
    ours,
    parameter_shapes,
    require_possible,
    theirs,
    unlike,
    with_vocabulary,
)
from nanogpt.convert.pretrained import Pretrained
from nanogpt.data import meta_pkl
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import vocabulary

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
NEVER = 1e9  # nanoGPT's loss of what was not evaluated
COMPILED = "_orig_mod."  # torch.compile puts this before the names
GPT2_ROWS = (50257, 50304)  # of a model of GPT-2's tokens, plain and padded


def open_file(path: Path, data_folders: list[Path]) -> Pretrained:
    """A checkpoint of nanoGPT. Its characters are looked for beside it and then in the folder of its
    dataset in one of `data_folders`; a vocabulary of GPT-2's size without any is GPT-2's.

    Raises UserError for a file that is cut short, that holds more than tensors and plain values, or
    whose tensors are not those of its model_args.
    """
    saved = _load(path)
    try:
        args, weights, options = saved["model_args"], saved["model"], saved.get("config", {})
        config = GPTConfig(
            **{name: args[name] for name in MODEL_ARGS if name not in ("bias", "dropout")},
            bias=args.get("bias", True),
            activation=options.get("activation", "gelu"),
        )
        stored = {ours(name.removeprefix(COMPILED)): tensor for name, tensor in weights.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT ({error!r})") from None
    require_possible(config, path)
    head = stored.pop("lm_head.weight", None)  # the embedding once more
    # Causal masks that versions without flash attention saved.
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(".attn.bias")}
    found = {name: list(tensor.shape) for name, tensor in stored.items()}
    if wrong := mismatches(parameter_shapes(config), found):
        raise UserError(f"{path} is not the model that its model_args describe: {wrong}")
    if head is not None and not torch.equal(head, stored["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight; nanoGPT's models have them as one")

    def read() -> Iterator[tuple[str, Tensor]]:
        yield from stored.items()

    dataset = Path(str(options.get("dataset", ""))).name
    text = _characters([path.parent, *(folder / dataset for folder in data_folders if dataset)])
    if not text and config.vocab_size in GPT2_ROWS:
        text = vocabulary.GPT2_BY_NAME
    loss = saved.get("best_val_loss")
    return Pretrained(
        str(path),
        with_vocabulary(config, text, str(path)),
        text,
        vocabulary.identify(text).sha256 if text else "",
        read,
        iter_num=int(saved.get("iter_num", 0)),
        val_loss=None if loss is None else float(loss),
        dataset=dataset,
    )


def _load(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # its table is at the end
        raise UserError(f"{path} is no checkpoint of nanoGPT, or is cut short")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = str(error).split("\n")[0][:160]
        raise UserError(
            f"{path} holds more than tensors, numbers and text, and is refused: reading it could run "
            f"any code ({what})"
        ) from None
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        what = (str(error).splitlines() or [""])[0][:160]
        raise UserError(f"{path} is no checkpoint of nanoGPT, or is damaged ({what})") from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is no checkpoint of nanoGPT: it holds a {type(saved).__name__}")
    return saved


def _characters(folders: list[Path]) -> str:
    """The tokenizer of the first folder that holds nanoGPT's meta.pkl or our tokenizer.json; or ""."""
    for folder in folders:
        if (folder / "meta.pkl").is_file():
            return meta_pkl.tokenizer_of(folder / "meta.pkl")
        if (folder / "tokenizer.json").is_file():
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            vocabulary.identify(text, str(folder / "tokenizer.json"))
            return text
    return ""


# ----------------------------------------------------------------------------- writing


def require(config: GPTConfig, text: str) -> None:
    """UserError if nanoGPT's classes cannot compute this model, or not read its tokenizer `text`."""
    known: dict[str, tuple[Any, ...] | None]
    known = {"activation": ("gelu", "gelu_tanh"), "bias": (True, False)}
    known |= {"n_kv_head": (0, config.n_head), "head_dim": (0, config.n_embd // config.n_head)}
    if wrong := unlike(config, known):
        switches = ", ".join(f"{name}={getattr(config, name)}" for name in wrong)
        raise UserError(f"nanoGPT's model does not know {switches}; try --format=hf")
    kind = vocabulary.identify(text).kind if text else "gpt2"
    if kind not in ("char", "gpt2"):
        raise UserError(f"nanoGPT knows characters and GPT-2's tokens, this model {kind}; try --format=hf")


def write_folder(folder: Path, model: GPT, source: Pretrained) -> list[str]:
    """Write ckpt.pt into `folder`, which exists, and meta.pkl if the tokenizer of `source` has characters.

    The rows of a padded vocabulary are left out: nanoGPT would sample them. Returns what is to be said.
    Raises UserError as `require`.
    """
    config, text = model.config, source.tokenizer
    require(config, text)
    weights = {theirs(name): parameter.detach() for name, parameter in model.named_parameters()}
    table = weights["transformer.wte.weight"][: config.vocab_size].clone()
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = table  # one tensor, two names
    dataset = Path(source.dataset).name
    saved = {
        "model": {name: tensor.cpu() for name, tensor in weights.items()},
        "model_args": {name: getattr(config, name) for name in MODEL_ARGS},
        "iter_num": source.iter_num,
        "best_val_loss": NEVER if source.val_loss is None else source.val_loss,
        # nanoGPT's sample.py looks for data/<dataset>/meta.pkl, and for nothing else in here.
        "config": {"dataset": dataset, "init_from": "resume", "activation": config.activation},
    }
    torch.save(saved, folder / "ckpt.pt")
    said = ["it has no optimizer state: nanoGPT can sample it, but not resume training from it"]
    if config.activation == "gelu_tanh":
        said.append("nanoGPT computes GELU exactly, this model its tanh form: units differ by up to 5e-4")
    if text and vocabulary.identify(text).kind == "char":
        characters = json.loads(text)["characters"]
        meta = {
            "vocab_size": len(characters),
            "itos": dict(enumerate(characters)),
            "stoi": {character: i for i, character in enumerate(characters)},
        }
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
        said.append(f"put meta.pkl into data/{dataset} of nanoGPT, where its sample.py looks for it")
    return said
