"""Resolve `--init_from`: a run folder, a hub model, a Hugging Face folder or a nanoGPT checkpoint."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from nanogpt import checkpoint, files
from nanogpt.checkpoint import reader
from nanogpt.convert.pretrained import NAMES, Pretrained, stored_tensor
from nanogpt.errors import UserError
from nanogpt.model import GPT2_SIZES, GPTConfig
from nanogpt.tokenizer import vocabulary


def shape(name: str, root: Path, run: Path) -> GPTConfig:
    """Return the shape of the weights `name`, as `open_weights`; those of GPT-2 need not be downloaded."""
    return GPT2_SIZES.get(name) or open_weights(name, root, run).config


def open_weights(name: str, root: Path, run: Path, which: str = "best") -> Pretrained:
    """Return the model that `name` refers to, checked but without reading its weights.

    `name` is "resume" (the checkpoint `which` of `run`), gpt2 to gpt2-xl, "owner/name" on the hub, a Hugging
    Face folder, another run folder or one of its checkpoints, nanoGPT's ckpt.pt or its folder. Datasets of
    nanoGPT checkpoints are searched for in data/ of the working directory and of `root`.

    Raise UserError if there is no such model or it is invalid.
    """
    path = Path(name)
    if name == "resume":
        return _open_run(run, which)
    single = path.is_file() or any((path / file).is_file() for file in ("ckpt.pt", "manifest.json"))
    if name not in NAMES and not single and checkpoint.step_folders(path):
        return _open_run(path, which)
    opened = _open_other(name, path, root)
    ignored = f"note: --which={which} has no effect on {name}"
    return opened if which == "best" else replace(opened, notices=(*opened.notices, ignored))


def _open_other(name: str, path: Path, root: Path) -> Pretrained:
    if name in NAMES:
        return _of_hugging_face(name)
    if path.suffix == ".safetensors" and path.is_file():
        raise UserError(f"--init_from={name} is a single file of a model; give its folder: {path.parent}")
    if path.is_file() or (path / "ckpt.pt").is_file():
        from nanogpt.convert import ckpt

        return ckpt.open_file(path if path.is_file() else path / "ckpt.pt", [Path("data"), root / "data"])
    if (path / "manifest.json").is_file():
        return _open_checkpoint(reader.verify(path), path.parent, [])
    if path.is_dir() or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _of_hugging_face(name)
    raise UserError(
        f"--init_from={name}: no such file or folder; give resume (train.py: also scratch or auto), "
        f"{', '.join(NAMES)}, a folder with a Hugging Face GPT-2, owner/name of one on the hub, "
        f"a run folder, or nanoGPT's ckpt.pt"
    )


def _of_hugging_face(name: str) -> Pretrained:
    """Open a folder in Hugging Face's layout, or a hub model."""
    from nanogpt.convert import hf

    return hf.open_folder(Path(name) if Path(name).is_dir() and name not in NAMES else hf.find(name))


def _open_run(run: Path, which: str) -> Pretrained:
    saved, damage = reader.find(run, which)
    if saved is None:
        from nanogpt.checkpoint import resume

        raise resume.missing(run, "give the --out_dir of a run saved by train.py")
    return _open_checkpoint(saved, run, damage)


def _open_checkpoint(saved: reader.Checkpoint, run: Path, damage: list[str]) -> Pretrained:
    """Open a checkpoint of train.py; raise UserError if the tokenizer of its run is missing or does not
    match.
    """
    path = run / "tokenizer.json"
    text = files.text_of(path)
    if vocabulary.identify(text, str(path)).sha256 != saved.state.get("tokenizer"):
        raise UserError(f"{path} is not the tokenizer that {saved.path} was trained with")
    file = saved.path / "model.safetensors"
    with reader.open_tensors(file) as listing:
        names = list(listing.keys())

    def read() -> Iterable[tuple[str, Tensor]]:
        if saved.state.get("lora"):
            from nanogpt.finetune import lora

            adapters = lora.Adapters(**saved.state["lora"])
            return lora.merged(names, lambda name: stored_tensor(file, name), adapters)
        return ((name, stored_tensor(file, name)) for name in names)

    return Pretrained(
        str(saved.path),
        saved.model_config,
        text,
        saved.state["tokenizer"],
        read,
        notices=tuple(f"skipped a damaged checkpoint: {line}" for line in damage),
        iter_num=saved.iter_num,
        val_loss=saved.progress.val_loss,
        dataset=str(saved.state.get("options", {}).get("dataset", "")),
    )
