"""Find, verify and load checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open

from nanogpt import files
from nanogpt.checkpoint import FILES, FORMAT, Progress, best_first, step_folders
from nanogpt.config import Amount, fitted
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig

# Schemas for config.fitted; a name that ends in "?" is that of a key that may be absent.
MANIFEST_SCHEMA = {"format": str, "files": {name: {"bytes": Amount, "sha256": str} for name in FILES}}
STATE_SCHEMA = {f"{name}?": kind for name, kind in get_type_hints(Progress).items()} | {"tokenizer?": str}
STATE_SCHEMA |= {"ramp?": [Amount], "options?": dict, "scaler?": dict, "environment?": dict}
STATE_SCHEMA |= {"iter_num": Amount, "sequences?": Amount}
STATE_SCHEMA |= {"model": {f"{n}?": t for n, t in get_type_hints(GPTConfig).items()}}
LORA_SCHEMA = {"rank": Amount, "alpha": float, "targets": str}
MAX_LAYERS = 4096  # a file with more layers is rejected before the model is built


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    state: dict[str, Any]  # contents of state.json (docs/design.md lists the keys)

    @property
    def iter_num(self) -> int:
        return self.state["iter_num"]

    @property
    def progress(self) -> Progress:
        names = {field.name for field in fields(Progress)}
        return Progress(**{name: value for name, value in self.state.items() if name in names})

    @property
    def model_config(self) -> GPTConfig:
        return GPTConfig(**self.state["model"])

    def load_model(self, device: torch.device | str = "cpu", dropout: float = 0.0) -> GPT:
        """Return the model, with its LoRA adapters if any, in evaluation mode; `dropout` is its dropout
        probability in training. Raise UserError if the tensors do not match the saved config."""
        model = empty_model(replace(self.model_config, dropout=dropout), self.path)
        if self.state.get("lora"):
            from nanogpt.finetune import lora

            with torch.device("meta"):
                lora.adapt(model, lora.Adapters(**self.state["lora"]))
        with open_tensors(self.path / "model.safetensors", str(device)) as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (not a dict)
        expected = {name: list(p.shape) for name, p in model.named_parameters()}
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        if expected != shapes:
            wrong = [n for n in expected | shapes if expected.get(n) != shapes.get(n)][:3]
            pairs = "; ".join(f"{n}: model {expected.get(n)}, file {shapes.get(n)}" for n in wrong)
            raise UserError(f"{self.path} does not match its own state.json: {pairs}")
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_().eval().to(device)  # moves the buffers; weights are on `device`


def empty_model(config: GPTConfig, origin: object) -> GPT:
    """Return a model on the meta device. Raise UserError naming `origin` if `config` is not valid."""
    try:
        if config.n_layer > MAX_LAYERS or min(config.vocab_size, config.block_size) < 1:
            raise ValueError(f"{config.n_layer} layers, {config.vocab_size} ids, {config.block_size} tokens")
        with torch.device("meta"):
            return GPT(config)
    except (KeyError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{origin} does not describe a valid model ({error!r:.200})") from None


@contextmanager
def open_tensors(path: Path, device: str = "cpu") -> Iterator[Any]:
    """Open a safetensors file. Raise UserError if it is damaged."""
    try:
        with safe_open(path, "pt", device=device) as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error!s:.200})") from None


def verify(path: Path) -> Checkpoint:
    """Check every file of the checkpoint `path` against its manifest and return it. Raise UserError if a file
    is damaged or missing."""
    manifest = files.read_json(path / "manifest.json", MANIFEST_SCHEMA)
    if manifest["format"] != FORMAT:
        raise UserError(f"{path} has format {manifest['format']!r}, expected {FORMAT!r}")
    for name in FILES:
        file, listed = path / name, manifest["files"][name]
        if not file.is_file() or file.stat().st_size != listed["bytes"]:
            raise UserError(f"{file} is missing or truncated")
        if files.sha256(file) != listed["sha256"]:
            raise UserError(f"{file} is damaged: its SHA-256 differs from the manifest's")
    state = files.read_json(path / "state.json", STATE_SCHEMA)
    if state.get("lora"):
        fitted(LORA_SCHEMA, state["lora"], f"{path / 'state.json'}: lora")
    if unknown := sorted(set(state["model"]) - {field.name for field in fields(GPTConfig)}):
        raise UserError(f"{path / 'state.json'}: model options of a newer version: {', '.join(unknown)}")
    return Checkpoint(path, state)


def find(run_dir: Path, which: str = "last") -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint `which` ("last", "best" or a step number) of a run, None if the run has none, and
    the errors of the damaged checkpoints that were skipped.

    Raise UserError if the run has checkpoints, but not this one or no valid one.
    """
    candidates = step_folders(run_dir)
    if not candidates:
        return None, []
    if which not in ("last", "best"):
        if not which.isdigit() or int(which) not in {int(path.name[5:]) for path in candidates}:
            steps = ", ".join(path.name[5:].lstrip("0") or "0" for path in reversed(candidates))
            raise UserError(f"{run_dir} has no checkpoint {which!r}; use last, best or one of {steps}")
        return verify(next(path for path in candidates if int(path.name[5:]) == int(which))), []
    errors: list[str] = []
    if which == "best":
        candidates = best_first(candidates)
    for path in candidates:
        try:
            return verify(path), errors
        except UserError as error:
            errors.append(str(error))
    raise UserError(f"no checkpoint in {run_dir} is valid: {'; '.join(errors)}")
