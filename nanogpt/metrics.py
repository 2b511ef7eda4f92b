"""Logging of a run: console lines, rows of metrics.jsonl and optional trackers."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanogpt import command, files, quoted
from nanogpt.config import Amount
from nanogpt.errors import UserError

NAME = "metrics.jsonl"
ROW = {"event": str, "iter": Amount, "train_loss?": float | None, "val_loss?": float | None}


@dataclass
class Log:
    """Log metrics to the console, metrics.jsonl (one JSON object per line, flushed) and trackers.

    Each row has "event" ("step", "health", "eval" or "tasks") and "iter": the index of the iteration for
    "step" and "health", the number of iterations completed for the others.
    """

    file: Any = None  # metrics.jsonl; None until `open`
    tracker: Any = None
    mfu_at_one_token_per_s: float | None = None  # model FLOPs utilization; None: unknown
    # for the progress bar: smoothed loss, validation loss, its change
    state: dict[str, float] = field(default_factory=dict)

    def open(self, path: Path, tracker: Any, mfu_at_one_token_per_s: float | None) -> None:
        """Append rows to the file `path` from now on, and send them to `tracker` unless that is None."""
        self.file = path.open("a", encoding="utf-8", newline="\n")
        self.tracker, self.mfu_at_one_token_per_s = tracker, mfu_at_one_token_per_s

    def step(
        self, iter_num: int, tokens: int, step_s: float, speed: float, left_s: float, **values: Any
    ) -> None:
        """Log iteration `iter_num`, which took `step_s` seconds, at `speed` tokens/s. `tokens`: tokens seen
        so far; `left_s`: expected time to the end of the run."""
        loss = values["loss"]
        line = f"iter {iter_num}: loss {loss:.4f}, time {step_s * 1000:.2f}ms, {speed:,.0f} tok/s"
        if self.mfu_at_one_token_per_s:
            line += f", mfu {speed * self.mfu_at_one_token_per_s:.1%}"
        tqdm.write(f"{line}, {tqdm.format_interval(left_s)} left")
        self.state["loss"] = 0.9 * self.state.get("loss", loss) + 0.1 * loss
        self.write("step", iter_num, tokens, step_s=step_s, tokens_per_s=speed, **values)

    def evaluation(self, iter_num: int, tokens: int, **values: Any) -> None:
        """Log an evaluation after `iter_num` iterations and `tokens` tokens; train.py prints it."""
        val_loss = values["val_loss"]
        self.state |= {"val_loss": val_loss, "change": val_loss - self.state.get("val_loss", val_loss)}
        self.write("eval", iter_num, tokens, **values)

    def write(self, event: str, iter_num: int, tokens: int, **values: Any) -> None:
        """Append a row."""
        row = {"event": event, "iter": iter_num, "tokens": tokens, **values}
        self.file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log(row)

    def close(self) -> None:
        for opened in filter(None, (self.file, self.tracker)):
            opened.close()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return all rows of a run in order, skipping damaged lines. Raise UserError if the file is missing."""
    path, rows = run_dir / NAME, []
    if not path.is_file():
        raise UserError(f"{run_dir} has no {NAME}; give the out_dir of a run")
    with path.open("rb") as lines:
        for line in lines:
            with suppress(UserError):
                rows.append(files.parse_json(line, NAME, ROW))
    return rows


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gap(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a summary of training and validation loss at the best evaluation in `rows` and, if different, at
    the last; "" if there is none."""
    evaluations = [row for row in rows if None not in (row.get("train_loss"), row.get("val_loss"))]
    if not evaluations:
        return ""
    best, last = min(evaluations, key=lambda row: row["val_loss"]), evaluations[-1]
    line = f"best validation loss {best['val_loss']:.4f} at iteration {best['iter']}: {_losses(best)}"
    if last is not best:
        line += f"; at the end, iteration {last['iter']}: {_losses(last)}"
        if last["train_loss"] < best["train_loss"] and evaluations.index(best) < len(evaluations) - 3:
            line += " (overfitting)"
    return line


def _losses(row: Mapping[str, Any]) -> str:
    train, val = row["train_loss"], row["val_loss"]
    return f"train {train:.4f}, val {val:.4f}, gap {val - train:+.4f}"


def final_lines(out_dir: str, clock_s: float, before_s: float, peak: int | None, longer: str) -> str:
    """Return the last lines of a complete run: losses, time, memory, and commands to continue. `clock_s`:
    time of all sessions, `before_s` of it in earlier ones; `peak`: peak memory in bytes; `longer`: option for
    more training."""
    total = f" ({tqdm.format_interval(clock_s)} with earlier sessions)" if before_s else ""
    memory = f", {tqdm.format_sizeof(peak)}B of memory" if peak else ""
    shown = quoted(f"--out_dir={out_dir}")
    return (
        f"{gap(read(Path(out_dir)))}\ntook {tqdm.format_interval(clock_s - before_s)}{total}{memory}\n"
        f"sample from it:  {command('sample')} {shown}\n"
        f"train it longer: {command('train')} {shown} --init_from=resume {longer}"
    )
