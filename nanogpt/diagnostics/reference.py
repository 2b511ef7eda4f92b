"""Is a run normal? Reference logs of several seeds, in benchmarks/reference/, and their band.

A file DATASET-ITERATIONS.json holds the options that the runs share and, by iteration, the losses of each
seed; benchmarks/record_reference.py writes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import ROOT, files
from nanogpt.diagnostics import runs
from nanogpt.errors import UserError

FOLDER = ROOT / "benchmarks" / "reference"
WIDTH = 4.0  # of the band on each side, in standard deviations; more for few seeds, whose mean is uncertain
ALLOWED = 0.05  # of the logged losses may be outside
AROUND = 2  # neighbors on each side whose deviations are pooled: three seeds alone say little


@dataclass(frozen=True)
class Band:
    """Mean over seeds and half the width of the band of a loss, by iteration."""

    iters: np.ndarray
    mean: np.ndarray
    half: np.ndarray

    def outside(self, iters: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Return how far each loss is outside, 0 if inside; without those at iterations not in the band."""
        there = np.isin(iters, self.iters)
        places = np.searchsorted(self.iters, iters[there])
        away = losses[there] - self.mean[places]
        return np.sign(away) * np.maximum(0.0, np.abs(away) - self.half[places])


def band(rows: Sequence[Sequence[float]]) -> Band:
    """Return the band of `rows`, each an iteration followed by the losses of the seeds."""
    table = np.array(rows, dtype=float)
    losses, variances = table[:, 1:], table[:, 1:].var(axis=1, ddof=1)
    width = WIDTH * (1 + 1 / losses.shape[1])
    pooled = [variances[max(0, i - AROUND) : i + AROUND + 1].mean() for i in range(len(table))]
    return Band(table[:, 0], losses.mean(axis=1), np.maximum(width * np.sqrt(pooled), 0.005))


def path_of(options: dict[str, Any]) -> Path:
    return FOLDER / f"{Path(str(options.get('dataset'))).name}-{options.get('max_iters')}.json"


def find(run: runs.Run) -> dict[str, Any]:
    """Return the reference of `run`. Raise UserError if there is none, or if it had other options."""
    path = path_of(run.options)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise UserError(f"{run.folder}: no reference {path.stem} (dataset, iterations); there are: {known}")
    reference: dict[str, Any] = files.read_json(path)
    theirs = reference["options"]
    mine = theirs | run.options
    others = [f"{key}={mine[key]}, not {theirs[key]}" for key in theirs if mine[key] != theirs[key]]
    if others:
        raise UserError(f"{run.folder} differs from {reference['preset']}: {'; '.join(others[:4])}")
    return reference


def verdict(run: runs.Run) -> str:
    """Say whether `run`, which may still be going, is inside the band of its reference."""
    reference = find(run)
    found = []
    losses = ("training loss", run.steps, "loss"), ("validation loss", run.evals, "val_loss")
    for what, column, key in losses:
        away = band(reference[key]).outside(column["iter"], column[key])
        away = np.where(np.isnan(away), np.inf, away)
        worst = int(np.argmax(np.abs(away))) if len(away) else 0
        found.append((what, len(away), int((away != 0).sum()), float(away[worst]) if len(away) else 0.0))
    about = f"the band of {reference['preset']} ({len(reference['seeds'])} seeds)"
    seen = sum(count for _, count, _, _ in found)
    if not seen:
        return f"not comparable with {about}: no loss at its iterations ({_first(reference)}) yet"
    wrong = [
        f"{what} {'above' if worst > 0 else 'below'} it at {out} of {count} points, by up to {abs(worst):.3f}"
        for what, count, out, worst in found
        if out
    ]
    if sum(out for _, _, out, _ in found) <= ALLOWED * seen:
        return f"inside {about}: {seen} losses compared"
    return f"outside {about}: {'; '.join(wrong)}"


def closing(folder: Path) -> list[str]:
    """Return the line on a complete run, none if it has other options than its reference."""
    try:
        return [f"this run is {verdict(runs.load(folder))}"]
    except UserError:
        return []


def _first(reference: dict[str, Any]) -> str:
    return ", ".join(str(row[0]) for row in reference["loss"][:3]) + ", ..."
