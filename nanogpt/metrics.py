"""What a run says about itself: lines on the console, rows in metrics.jsonl, and trackers if asked."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanogpt import files
from nanogpt.errors import UserError

if TYPE_CHECKING:
    from nanogpt.trackers import Wandb

NAME = "metrics.jsonl"


class Log:
    """Where a run's numbers go: the console, metrics.jsonl (a JSON object a line, flushed), a tracker.

    A row has "event" ("step", "eval" or "tasks") and "iter": the number of the update it describes for a
    step, the number of updates done for the others.
    """

    def __init__(self, path: Path, tracker: "Wandb | None", peak_share: float | None):
        """`path`: the file; `peak_share`: the share of the chip's peak FLOP/s that one token a second
        takes, if known."""
        self._file = path.open("a", encoding="utf-8", newline="\n")
        self._tracker = tracker
        self._peak_share = peak_share

    def step(
        self, iter_num: int, *, step_s: float, step_tokens: float, tokens: int, loss: float, **values: Any
    ) -> None:
        """Update number `iter_num`: `step_tokens` in `step_s` seconds, `tokens` since the run began."""
        speed = step_tokens / step_s
        line = f"iter {iter_num}: loss {loss:.4f}, time {step_s * 1000:.2f}ms, {speed:,.0f} tok/s"
        if self._peak_share:
            line += f", mfu {speed * self._peak_share:.1%}"
        tqdm.write(line)
        row = {"loss": loss, "step_s": step_s, "tokens_per_s": speed} | values
        self._write("step", iter_num, tokens, row)

    def evaluation(self, iter_num: int, tokens: int, **values: Any) -> None:
        """The weights after `iter_num` updates and `tokens`; train.py has printed it."""
        self._write("eval", iter_num, tokens, values)

    def tasks(self, iter_num: int, tokens: int, **values: Any) -> None:
        """Scores of the weights after `iter_num` updates and `tokens`."""
        self._write("tasks", iter_num, tokens, values)

    def _write(self, event: str, iter_num: int, tokens: int, values: dict[str, Any]) -> None:
        row = {"event": event, "iter": iter_num, "tokens": tokens, **values}
        self._file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self._file.flush()
        if self._tracker:
            self._tracker.log(row)

    def close(self) -> None:
        self._file.close()
        if self._tracker:
            self._tracker.close()


def read(run: Path) -> list[dict[str, Any]]:
    """All complete rows of a run, in order; a line that a kill has cut is left out."""
    path = run / NAME
    if not path.is_file():
        raise UserError(f"{run} has no {NAME}; give the out_dir of a run")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rewind(run: Path, iter_num: int, evaluated: bool) -> None:
    """Forget the rows that a resumed run will write again: those after update `iter_num`, and the
    evaluation there unless the checkpoint was `evaluated`. Scores of tasks there are of its weights."""
    if not (run / NAME).is_file():
        return
    last = {"eval": iter_num if evaluated else iter_num - 1, "tasks": iter_num}
    kept = [row for row in read(run) if row["iter"] <= last.get(row["event"], iter_num - 1)]
    files.write_text(run / NAME, "".join(json.dumps(row) + "\n" for row in kept))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; readers get null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gap(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line on training and validation loss of the `rows` of metrics.jsonl: at the best evaluation, and
    at the last if that is another; empty where nothing was evaluated."""
    evaluations = [row for row in rows if row["event"] == "eval"]
    if not evaluations:
        return ""
    best, last = min(evaluations, key=lambda row: row["val_loss"]), evaluations[-1]
    line = f"best validation loss {best['val_loss']:.4f} at iteration {best['iter']}: {_losses(best)}"
    if last is not best:
        line += f"; at the end, iteration {last['iter']}: {_losses(last)}"
        if last["train_loss"] < best["train_loss"]:
            line += " (it learns the training text by heart)"
    return line


def _losses(row: Mapping[str, Any]) -> str:
    train, val = row["train_loss"], row["val_loss"]
    return f"train {train:.4f}, val {val:.4f}, gap {val - train:+.4f}"
