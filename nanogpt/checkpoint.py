"""Checkpoints that survive: a folder a step, complete or absent, verified before it is used.

    out/step-000250/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds size and SHA-256 of the other files and is written last; the folder is built under
a temporary name and renamed when all of it is on the disk. No pointer file decides anything: the
newest is the highest valid step, the best the lowest `val_loss` among the valid. Nothing is pickled.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt import files
from nanogpt.errors import Diverged, UserError
from nanogpt.model import GPT, GPTConfig

if TYPE_CHECKING:
    from nanogpt.optim import Piece

FORMAT = "nanogpt-checkpoint-1"
KEPT = 2  # the newest ones; the best is kept too


@dataclass
class Progress:
    """How far a run is: with the weights and the optimizer's state, all that a resumed run needs."""

    iter_num: int = 0  # updates done
    elapsed_s: float = 0.0  # in updates, over all processes of the run
    best_val_loss: float | None = None
    val_loss: float | None = None  # of these very weights, once they are evaluated
    stale: int = 0  # evaluations since the best


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]  # the fields of Progress, the model's shape, and what train.py adds

    @property
    def iter_num(self) -> int:
        return self.state["iter_num"]

    @property
    def progress(self) -> Progress:
        known = {field.name for field in fields(Progress)}
        return Progress(**{name: value for name, value in self.state.items() if name in known})

    @property
    def model_config(self) -> GPTConfig:
        return GPTConfig(**self.state["model"])

    def load_model(self, device: torch.device | str = "cpu", dropout: float = 0.0) -> GPT:
        """The model with these weights and its adapters, if it has any, in evaluation mode; training goes
        on with `dropout`."""
        with torch.device("meta"):
            model = GPT(replace(self.model_config, dropout=dropout))
            if self.state.get("lora"):
                from nanogpt.finetune import lora

                lora.adapt(model, lora.Adapters(**self.state["lora"]))
        tensors = load_file(self.path / "model.safetensors", device=str(device))
        expected = {name: list(p.shape) for name, p in model.named_parameters()}
        found = {name: list(t.shape) for name, t in tensors.items()}
        if expected != found:
            wrong = [n for n in expected | found if expected.get(n) != found.get(n)][:3]
            pairs = "; ".join(f"{n}: model {expected.get(n)}, file {found.get(n)}" for n in wrong)
            raise UserError(f"{self.path} does not fit its own state.json: {pairs}")
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_().eval().to(device)  # the weights are there; tables of positions follow

    def moved(self, environment: dict[str, Any]) -> str:
        """What has changed since the checkpoint was saved, of what bits depend on beside the options."""
        before = self.state["environment"]
        return "; ".join(f"{k} {before.get(k)} -> {v}" for k, v in environment.items() if before.get(k) != v)

    def load_optimizer(self, tensors: "Mapping[str, Tensor | Piece]") -> None:
        """Fill the optimizer's state (by name), or what this process has of it, in place."""
        path = self.path / "optimizer.safetensors"
        with safe_open(path, "pt") as saved:
            if set(saved.keys()) != tensors.keys():
                raise UserError(f"{path} belongs to another optimizer or model")
            for name, tensor in tensors.items():
                tensor.copy_(saved.get_tensor(name))


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def of(cls, model: GPT, optimizer: Mapping[str, Tensor], state: dict[str, Any]) -> "Content":
        """Raises Diverged for a weight that is not finite."""
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise Diverged(
                f"{bad[0]} holds non-finite weights at iteration {state['iter_num']}; they were not saved. "
                f"Go on from the last checkpoint with a smaller --learning_rate (--init_from=resume)"
            )
        return cls(weights, optimizer, {**state, "model": asdict(model.config)})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in (self.weights, self.optimizer) for tensor in part.values())

    def write(self, run: Path) -> Path:
        """Write it into the folder `run`, then delete the checkpoints no longer needed; OSError when the disk
        fails, which leaves the older ones untouched."""
        path = run / f"step-{self.state['iter_num']:06d}"
        with files.staged(path) as draft:
            draft.mkdir(parents=True)
            _save_tensors(self.weights, draft / "model.safetensors")
            _save_tensors(self.optimizer, draft / "optimizer.safetensors")
            files.write_json(draft / "state.json", self.state)
            names = ["model.safetensors", "optimizer.safetensors", "state.json"]
            listing = {
                name: {"bytes": (draft / name).stat().st_size, "sha256": files.sha256(draft / name)}
                for name in names
            }
            files.write_json(draft / "manifest.json", {"format": FORMAT, "files": listing})
            files.remove(path)
        prune(run)
        return path


def save(run: Path, model: GPT, optimizer: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `state["iter_num"]`, then delete those no longer needed.

    Raises Diverged instead of saving a weight that is not finite, OSError when the disk fails; the
    older checkpoints are untouched by either.
    """
    return Content.of(model, optimizer, state).write(run)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # its words for whatever the file system said
        raise OSError(f"{path} could not be written: {error}") from None


def steps(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; not verified."""
    found = [p for p in run.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it; UserError says what is wrong."""
    manifest = files.read_json(path / "manifest.json")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, this program reads {FORMAT!r}")
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            file, listed = path / name, manifest["files"][name]
            if not file.is_file() or file.stat().st_size != listed["bytes"]:
                raise UserError(f"{file} is missing or cut short")
            if files.sha256(file) != listed["sha256"]:
                raise UserError(f"{file} is damaged: its SHA-256 is not the manifest's")
        state = files.read_json(path / "state.json")
        if unknown := set(state["model"]) - {field.name for field in fields(GPTConfig)}:
            raise UserError(f"{path / 'state.json'} describes a model of a newer program: {unknown}")
        return Checkpoint(path, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'manifest.json'} is not a manifest ({error!r})") from None


def find(run: Path, which: str = "last") -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint `which` ("last", "best", or a step number), and the damage of each passed over.

    None if the run has no checkpoint at all. UserError if it has some and none fits.
    """
    candidates = steps(run)
    if not candidates:
        return None, []
    if which not in ("last", "best"):
        if not which.isdigit() or int(which) not in {int(path.name[5:]) for path in candidates}:
            there = ", ".join(path.name[5:].lstrip("0") or "0" for path in reversed(candidates))
            raise UserError(f"{run} has no checkpoint {which!r}; there are best, last, and steps {there}")
        return verify(next(path for path in candidates if int(path.name[5:]) == int(which))), []
    damage: list[str] = []
    if which == "best":
        candidates.sort(key=_val_loss)  # stable: of equals the newest
    for path in candidates:
        try:
            return verify(path), damage
        except UserError as error:
            damage.append(str(error))
    raise UserError(f"no checkpoint in {run} is whole: {'; '.join(damage)}")


def prune(run: Path) -> None:
    """Delete what a kill has left half-built, and checkpoints that are neither best nor newest.

    Called after a new one is complete, so nothing is deleted before its successor is on the disk.
    """
    for leftover in run.glob(f"step-*{files.TEMPORARY}*"):
        files.remove(leftover)
    whole = [path for path in steps(run) if (path / "manifest.json").is_file()]
    kept = whole[:KEPT]
    evaluated = [path for path in whole if math.isfinite(_val_loss(path))]
    kept += [min(evaluated, key=_val_loss)] if evaluated else []
    for path in whole:
        if path not in kept:
            # Renamed first: a kill in the middle of a deletion must not leave half a checkpoint.
            doomed = files.temporary(path)
            files.rename(path, doomed)
            files.remove(doomed)


def set_aside_newer(run: Path, iter_num: int) -> None:
    """Rename checkpoints after `iter_num`, which a resumed run has found damaged, so that they are
    never again taken for the newest."""
    for path in steps(run):
        if int(path.name[5:]) > iter_num:
            target = path.with_name(f"{path.name}.damaged")
            files.remove(target)
            files.rename(path, target)


def _val_loss(path: Path) -> float:
    try:
        loss = files.read_json(path / "state.json")["val_loss"]
    except (UserError, OSError, KeyError, TypeError):
        return math.inf
    return math.inf if loss is None else loss


# ----------------------------------------------------------------------------- the run folder


def holds_run(folder: Path) -> bool:
    """Whether something was trained into `folder`: by this program or by nanoGPT (ckpt.pt)."""
    return bool(steps(folder)) or any(
        (folder / name).exists() for name in ("config.json", "metrics.jsonl", "ckpt.pt")
    )


def claim(run: Path, resumed: Checkpoint | None, overwrite: bool) -> tuple[FileLock, str]:
    """Make the folder `run` ours to write, for a run that starts or is `resumed`.

    A run that it holds and that is not resumed moves aside to the first free of run.1, run.2, ...; with
    `overwrite` it is deleted. Returns the lock to hold, and a notice. UserError if another process
    holds the folder.
    """
    lock = files.lock(run)
    if resumed:
        set_aside_newer(run, resumed.iter_num)
        return lock, f"resuming {run} at iteration {resumed.iter_num}"
    if not holds_run(run):
        return lock, ""
    number = 1
    while (aside := run.with_name(f"{run.name}.{number}")).exists():
        number += 1
    if os.name == "nt":  # Windows renames no folder with an open file in it
        lock.release()
    files.rename(run, aside)
    fresh = files.lock(run)
    lock.release()
    if overwrite:
        files.remove(aside)
        return fresh, f"replaced the run in {run}"
    return fresh, f"{run} held a run; it is now {aside}"
