"""Crash-safe checkpoints: one folder per saved step, written atomically and verified before use.

    out/step-000250/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds the size and SHA-256 of the other files and is written last; the folder is written under
a temporary name and renamed once it is on disk. There is no pointer file: the newest checkpoint is the
highest valid step, the best is the valid one with the lowest `val_loss`. Nothing is pickled.
"""

import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt import files
from nanogpt.errors import UserError

if TYPE_CHECKING:
    from nanogpt.options import BatchOptions

FORMAT = "nanogpt-checkpoint-1"
REPLACED = ".replaced"  # suffix of the folder of a run that --overwrite replaces
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Progress:
    """Progress of a run, saved with the weights and the optimizer state."""

    iter_num: int = 0  # iterations completed
    elapsed_s: float = 0.0  # training time, including earlier sessions of the run
    best_val_loss: float | None = None
    val_loss: float | None = None  # of the current weights; None if not evaluated
    stale: int = 0  # evaluations since the best
    share: float = 0.0  # fraction of the schedule completed
    clock_s: float = 0.0  # wall-clock time of earlier sessions, start-up and evaluations included
    ramp: list[int] = field(default_factory=list)  # with --minutes: batch sizes of the ramp so far

    def position(self, options: "BatchOptions") -> float:
        """Return the position in the schedule: iter_num or, with --minutes, the share of max_iters."""
        return self.share * options.max_iters if options.minutes else self.iter_num


def step_folders(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, without verifying them."""
    found = [p for p in run.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def val_loss(path: Path) -> float:
    """Return the validation loss of a checkpoint; infinity if it was not evaluated or is unreadable."""
    with suppress(UserError, OSError):
        return files.read_json(path / "state.json", {"val_loss": float})["val_loss"]
    return math.inf
