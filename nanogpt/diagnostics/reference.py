"""Comparison of a run with the band of reference runs of several seeds, in benchmarks/reference/.

A file DATASET-ITERATIONS.json holds the options that the runs share and, by iteration, the losses of each
seed; benchmarks/record_reference.py writes it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import ROOT, files
from nanogpt.diagnostics import runs
from nanogpt.errors import UserError

LOSSES = ("loss", "val_loss")
SHAPE = {"preset": str, "seeds": list, "options": dict, "loss": [[float]], "val_loss": [[float]]}
FOLDER = ROOT / "benchmarks" / "reference"
WIDTH = 4.0  # of the band on each side, in standard deviations; wider for few seeds, as their mean varies
ALLOWED = 0.05  # fraction of the logged losses that may be outside the band
AROUND = 2  # neighbors on each side whose deviations are pooled: three seeds alone say little


def band(rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return iterations, the center and half of the width of the band there, each (n,).

    A row is an iteration followed by the losses of the seeds.
    """
    table = np.array(rows, dtype=float)
    seeds = table[:, 1:]
    variances = seeds.var(axis=1, ddof=1)
    pooled = [variances[max(0, i - AROUND) : i + AROUND + 1].mean() for i in range(len(table))]
    half = np.maximum(WIDTH * (1 + 1 / seeds.shape[1]) * np.sqrt(pooled), 0.005)
    return table[:, 0], seeds.mean(axis=1), half


def outside(rows: Sequence[Sequence[float]], iters: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return how far each of `losses`, at `iters`, is outside the band of `rows`; 0 if inside. Losses at
    iterations without a row are left out."""
    known, center, half = band(rows)
    there = np.isin(iters, known)
    places = np.searchsorted(known, iters[there])
    away = np.nan_to_num(losses[there] - center[places], nan=np.inf, posinf=np.inf)
    return np.sign(away) * np.maximum(0.0, np.abs(away) - half[places])


def path_of(options: dict[str, Any]) -> Path:
    return FOLDER / f"{Path(str(options.get('dataset'))).name}-{options.get('max_iters')}.json"


def find(run: runs.Run) -> dict[str, Any]:
    """Return the reference of `run`. Raise UserError if there is none, or if its options differ."""
    path, minutes = path_of(run.options), run.options.get("minutes")
    if minutes or not path.is_file():
        kind = path.stem if run.options else "a run without config.json"
        kind = "runs by --minutes, whose iterations depend on the machine" if minutes else kind
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise UserError(f"{run.folder}: no reference for {kind}; there are (dataset-iterations): {known}")
    reference: dict[str, Any] = files.read_json(path, SHAPE)
    if any({len(row) for row in reference[key]} != {1 + len(reference["seeds"])} for key in LOSSES):
        raise UserError(f"{path} is damaged: not each row of losses has an iteration and a loss per seed")
    theirs = reference["options"]
    mine = theirs | run.options
    others = [f"{key}={mine[key]}, not {theirs[key]}" for key in theirs if mine[key] != theirs[key]]
    if others:
        raise UserError(f"{run.folder} differs from {reference['preset']}: {'; '.join(others[:4])}")
    return reference


def verdict(run: runs.Run) -> str:
    """Say whether `run`, which may be unfinished, is inside the band of its reference."""
    reference = find(run)
    compared = {
        "training loss": outside(reference["loss"], run.steps["iter"], run.steps["loss"]),
        "validation loss": outside(reference["val_loss"], run.evals["iter"], run.evals["val_loss"]),
    }
    band = f"the band of {reference['preset']} ({len(reference['seeds'])} seeds)"
    seen = sum(len(away) for away in compared.values())
    out = sum(np.count_nonzero(away) for away in compared.values())
    if not seen:
        first = ", ".join(str(row[0]) for row in reference["loss"][:3])
        return f"not comparable with {band}: no loss at its iterations ({first}, ...) yet"
    if out <= ALLOWED * seen:
        return f"inside {band}: {seen} losses compared"
    wrong = []
    for label, away in compared.items():
        if count := np.count_nonzero(away):
            worst = away[np.argmax(np.abs(away))]
            side = "above" if worst > 0 else "below"
            wrong.append(f"{label} {side} it at {count} of {len(away)} points, by up to {abs(worst):.3f}")
    return f"outside {band}: {'; '.join(wrong)}"


def final_line(folder: Path) -> str:
    """Return the line to print at the end of a run; "" if it has no reference with the same options."""
    run = runs.load(folder)
    try:
        return f"this run is {verdict(run)}\n"
    except UserError as error:
        return f"{error}\n" * bool(run.options.get("minutes"))
