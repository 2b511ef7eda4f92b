"""Crash-safe checkpoints: one folder per saved step, written atomically and verified before use.

    out/step-000250/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest holds the size and SHA-256 of the other files and is written last; the folder is written under
a temporary name and renamed once it is on disk. There is no pointer file: the newest checkpoint is the valid
one with the highest step, the best the valid one with the lowest `val_loss`. Nothing is pickled.
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
    elapsed_s: float = 0.0  # seconds spent in iterations, in all sessions; without evaluations and saving
    best_val_loss: float | None = None
    val_loss: float | None = None  # loss of the current weights; None if not evaluated
    stale: int = 0  # number of evaluations since the best one
    share: float = 0.0  # completed fraction of the schedule
    clock_s: float = 0.0  # wall-clock seconds of earlier sessions, including evaluations and saving
    evaluation_s: float = 0.0  # time of the longest evaluation
    ramp: list[int] = field(default_factory=list)  # with --minutes: batch sizes of the ramp so far

    def position(self, options: "BatchOptions") -> float:
        """Return the position in the schedule: iter_num or, with --minutes, share * max_iters."""
        return self.share * options.max_iters if options.minutes else self.iter_num


def step_folders(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first, without verifying them."""
    folders = [p for p in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def evaluation(path: Path) -> tuple[float, str]:
    """Return the validation loss of the checkpoint `path`, infinity if it has none or is unreadable, and the
    data that it was evaluated on, as `evaluated_on`."""
    with suppress(UserError, OSError):
        parts = {"val?": str, "sequences?": str}
        state = files.read_json(path / "state.json", {"val_loss": float | None, "data?": parts})
        loss, data = state["val_loss"], evaluated_on(state.get("data", {}))
        return math.inf if loss is None else loss, data
    return math.inf, ""


def evaluated_on(hashes: dict[str, str]) -> str:
    """Return the hash of the validation tokens and which sequences of them are evaluated, as far as known."""
    return f"{hashes.get('val', '')} {hashes.get('sequences', '')}".strip()


def comparable(one: str, other: str) -> bool:
    """Return whether losses were measured on the same data, as far as is known."""
    return one.startswith(other) or other.startswith(one)


def best_first(folders: list[Path]) -> list[Path]:
    """Sort checkpoints, given newest first, by validation loss. Those known to have been evaluated on other
    data than the newest come last, before those without a loss."""
    found = [evaluation(path) for path in folders]
    ranks = [(math.isinf(loss), not comparable(data, found[0][1]), loss) for loss, data in found]
    return [folders[i] for i in sorted(range(len(folders)), key=ranks.__getitem__)]  # ties go to the newest
