"""Find, verify and load checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanogpt import files
from nanogpt.checkpoint import FILES, FORMAT, Progress, steps, val_loss
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig

if TYPE_CHECKING:
    from nanogpt.optim import TensorShard


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]  # Progress fields, model config and what train.py adds

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
        """Load the model, including any LoRA adapters, in evaluation mode; `dropout` applies if it is trained
        further. Raise UserError if the tensors do not match the saved config."""
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
            raise UserError(f"{self.path} does not match its own state.json: {pairs}")
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_().eval().to(device)  # weights are on `device`; moves the buffers

    def moved(self, environment: dict[str, Any]) -> str:
        """Describe how `environment` (see Machine.environment) differs from the one saved; "" if equal."""
        before = self.state["environment"]
        return "; ".join(f"{k} {before.get(k)} -> {v}" for k, v in environment.items() if before.get(k) != v)

    def require_tokenizer(self, sha256: str, vocab_size: int, folder: Path) -> None:
        """Raise UserError unless the data in `folder` uses the tokenizer the model was trained with."""
        if self.state["tokenizer"] != sha256:
            raise UserError(
                f"{self.path} was trained with a different tokenizer ({self.model_config.vocab_size} ids) "
                f"from that of {folder} ({vocab_size} ids); use the --dataset it was trained on"
            )

    def load_optimizer(self, tensors: "Mapping[str, Tensor | TensorShard]") -> None:
        """Load the optimizer state into `tensors` (full or this rank's shards) by name, in place."""
        path = self.path / "optimizer.safetensors"
        with safe_open(path, "pt") as saved:
            if set(saved.keys()) != tensors.keys():
                raise UserError(f"{path} belongs to a different optimizer or model")
            for name, tensor in tensors.items():
                tensor.copy_(saved.get_tensor(name))


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. Raise UserError if one is damaged or missing."""
    manifest = files.read_json(path / "manifest.json")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, expected {FORMAT!r}")
        for name in FILES:
            file, listed = path / name, manifest["files"][name]
            if not file.is_file() or file.stat().st_size != listed["bytes"]:
                raise UserError(f"{file} is missing or truncated")
            if files.sha256(file) != listed["sha256"]:
                raise UserError(f"{file} is damaged: its SHA-256 differs from the manifest's")
        state = files.read_json(path / "state.json")
        if unknown := set(state["model"]) - {field.name for field in fields(GPTConfig)}:
            raise UserError(f"{path / 'state.json'} was written by a newer version: unknown {unknown}")
        return Checkpoint(path, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'manifest.json'} is not a valid manifest ({error!r})") from None


def find(run: Path, which: str = "last") -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint `which` ("last", "best" or a step number) and the errors of damaged ones skipped.

    The checkpoint is None if the run has none. Raise UserError if it has some but no valid or matching one.
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
        candidates.sort(key=val_loss)  # stable sort: ties go to the newest
    for path in candidates:
        try:
            return verify(path), damage
        except UserError as error:
            damage.append(str(error))
    raise UserError(f"no checkpoint in {run} is valid: {'; '.join(damage)}")
