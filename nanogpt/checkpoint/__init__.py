"""Checkpoints that survive: a folder a step, complete or absent, verified before it is used.

    out/step-000250/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds size and SHA-256 of the other files and is written last; the folder is built under
a temporary name and renamed when all of it is on the disk. No pointer file decides anything: the
newest is the highest valid step, the best the lowest `val_loss` among the valid. Nothing is pickled.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from nanogpt import files
from nanogpt.errors import UserError

FORMAT = "nanogpt-checkpoint-1"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Progress:
    """How far a run is: with the weights and the optimizer's state, all that a resumed run needs."""

    iter_num: int = 0  # updates done
    elapsed_s: float = 0.0  # in updates, over all processes of the run
    best_val_loss: float | None = None
    val_loss: float | None = None  # of these very weights, once they are evaluated
    stale: int = 0  # evaluations since the best


def steps(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; not verified."""
    found = [p for p in run.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def val_loss(path: Path) -> float:
    """Return the validation loss of a checkpoint; infinity if it was not evaluated, or cannot be read."""
    try:
        loss = files.read_json(path / "state.json")["val_loss"]
    except (UserError, OSError, KeyError, TypeError):
        return math.inf
    return math.inf if loss is None else loss
