"""Experiment trackers (--track), each through its own library and imported only when enabled.

A tracker never stops a run: an error of its library is printed once, and the run goes on without it. Curves
are drawn against the iteration, so a resumed run continues them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of metrics.jsonl by name: "step/loss", "health/grad_norm/3" (block 3)."""
    flat = dict(row)
    for key, value in row.items():
        parts = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(parts, dict):
            flat |= {f"{key}/{part}": number for part, number in parts.items()}
    return {
        f"{row['event']}/{key}": float(value)
        for key, value in flat.items()
        if key != "iter" and isinstance(value, int | float) and math.isfinite(value)
    }


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir=OUT_DIR`."""

    def __init__(self, folder: Path, options: dict[str, Any], resumed_at: int):
        from torch.utils.tensorboard import SummaryWriter

        # Later points are drawn again; the evaluation at `resumed_at` is not.
        purged = resumed_at + 1 if resumed_at else None
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged)
        if not resumed_at:
            lines = (f"    {key} = {value!r}" for key, value in options.items())
            self.writer.add_text("options", "\n".join(lines))

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["iter"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; without a key or a network, files in the run folder for `wandb sync`."""

    def __init__(self, folder: Path, options: dict[str, Any], resumed_at: int):
        import wandb

        note = folder / "wandb_run.txt"  # the id by which a resumed run continues
        known = note.read_text(encoding="utf-8") if resumed_at and note.is_file() else None
        given = {"project": options["wandb_project"], "name": options["wandb_run_name"], "config": options}
        given |= {"dir": str(folder), "id": known, "resume": "allow"}
        try:
            self.run = wandb.init(**given)
        except Exception as error:  # login, network and settings, of several types
            tqdm.write(
                f"wandb: {first_line(error)}; logging to {folder / 'wandb'}, upload it with wandb sync"
            )
            self.run = wandb.init(**given, mode="offline")
        note.write_text(self.run.id, encoding="utf-8")
        self.run.define_metric("*", step_metric="iter")

    def log(self, row: Mapping[str, Any]) -> None:
        self.run.log({"iter": row["iter"]} | scalars(row))

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[..., TensorBoard | Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


class Trackers:
    """The trackers that the `options` of a run enable; `resumed_at`: the iteration it resumes from, or 0."""

    def __init__(self, options: dict[str, Any], resumed_at: int):
        self.open: dict[str, TensorBoard | Wandb] = {}
        names = options["track"].split(",") + ["wandb"] * options["wandb_log"]
        for name in dict.fromkeys(name for name in names if name != "none"):
            with self._attempt(name):
                self.open[name] = KINDS[name](Path(options["out_dir"]), options, resumed_at)

    def log(self, row: Mapping[str, Any]) -> None:
        for name, tracker in list(self.open.items()):
            with self._attempt(name):
                tracker.log(row)

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            with self._attempt(name):
                tracker.close()

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Report an error of tracker `name` and continue without it."""
        try:
            yield
        except ImportError:
            tqdm.write(f"--track={name} needs a package: pip install {name}; the run goes on without it")
        except Exception as error:
            self.open.pop(name, None)
            tqdm.write(f"--track={name}: {first_line(error)}; the run goes on without it")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
