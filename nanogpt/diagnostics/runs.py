"""Read finished and unfinished runs, group those that differ only in the seed, and compare groups."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import files, metrics
from nanogpt.errors import UserError

# Options that do not change what is learned, beyond rounding.
NAMES = (
    "seed out_dir overwrite track wandb_log wandb_project wandb_run_name verbose log_interval "
    "eval_interval save_interval save_minutes always_save_checkpoint max_minutes health_interval "
    "sample_prompt eval_tasks cuda_graph compile attention loss_chunk_size activation_checkpointing "
    "deterministic device dtype"
)
IGNORED = set(NAMES.split())
ABOUT = {"options?": dict, "model?": dict, "data?": {"val?": str, "sequences?": str}}  # config.json
EVALUATED_UNLIKE = (
    "evaluated on different parts of the validation text (--eval_iters, --batch_size, --block_size)"
)
AFRESH = ("scratch", "auto", "resume")  # values of init_from that name no weights


@dataclass(frozen=True)
class Run:
    """Metrics of a run as columns, float64; NaN where a value is missing or was not finite."""

    name: str
    folder: Path
    steps: dict[str, np.ndarray]  # "x", "iter", "loss", and other keys of rows of event "step"
    evals: dict[str, np.ndarray]  # "x", "iter", "val_loss", "val_stderr"
    about: dict[str, Any]  # config.json, {} if there is none
    tokens: float  # tokens trained on so far
    seconds: float
    health: list[dict[str, Any]] = field(default_factory=list)  # rows of event "health"

    @property
    def options(self) -> dict[str, Any]:
        given: dict[str, Any] = self.about.get("options", {})
        ignored = IGNORED | ({"init_from"} if given.get("init_from") in AFRESH else set())
        return {key: value for key, value in given.items() if key not in ignored}

    def best(self, key: str) -> float:
        """Return `key` of the evaluation with the lowest validation loss; NaN if there is none."""
        losses = self.evals["val_loss"]
        return float(self.evals[key][np.nanargmin(losses)]) if np.isfinite(losses).any() else math.nan

    @property
    def val_loss(self) -> float:
        return self.best("val_loss")

    @property
    def stderr(self) -> float:
        return self.best("val_stderr")


def baseline(folder: Path) -> dict[str, Any]:
    """Return loss and order of n-gram counts on the validation sequences of a run (eval.py --baseline), {} if
    they are not known."""
    with suppress(UserError, OSError):  # missing or damaged
        figures: dict[str, Any] = files.read_json(folder / "baseline.json", {"loss": float, "order": int})
        return figures
    return {}


def load(folder: Path, name: str = "", x: str = "iter", keys: Sequence[str] = ()) -> Run:
    """Read the run in `folder`, with `x` as its x axis; it may be unfinished. Raise UserError if it has no
    rows, or none that this version knows."""
    rows = metrics.read(folder)
    if not rows:
        raise UserError(f"{folder / metrics.NAME} has no rows of train.py; wait for the first iteration")
    path = folder / "config.json"
    config = files.read_json(path, ABOUT) if path.is_file() else {}

    def columns(event: str, *keys: str) -> dict[str, np.ndarray]:
        chosen = [row for row in rows if row.get("event") == event and number(row.get(x)) is not None]
        return {key: np.array([number(row.get(key)) for row in chosen], dtype=float) for key in keys} | {
            "x": np.array([row[x] for row in chosen], dtype=float)
        }

    steps = columns("step", "iter", "loss", *keys)
    evals = columns("eval", "iter", "val_loss", "val_stderr")
    if not (np.isfinite(steps["loss"]).any() or np.isfinite(evals["val_loss"]).any()):
        raise UserError(f"{folder / metrics.NAME} was not written by train.py: no loss against {x!r}")
    # Over rows of all events: the evaluation after the last logged step counts the steps between.
    tokens, seconds = (
        float(np.nan_to_num([number(row.get(key)) or 0.0 for row in rows]).max())
        for key in ("tokens", "elapsed_s")
    )
    health = [row for row in rows if row.get("event") == "health"]
    return Run(name or folder.name, folder, steps, evals, config, tokens, seconds, health)


def number(value: Any) -> float | None:
    """Return `value` if it is a number, else None."""
    return value if isinstance(value, int | float) else None


def grouped(runs: Iterable[Run]) -> list[list[Run]]:
    """Group runs that differ only in the seed, in the order of their first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kind = [sorted(run.options.items()), run.about.get("data", {}).get("val")]
        groups.setdefault(repr(kind if run.options else run.folder), []).append(run)
    return list(groups.values())


def one_per_seed(group: Sequence[Run]) -> list[Run]:
    """Return the runs of `group` without those that repeat a seed, such as copies."""
    return list({run.about.get("options", {}).get("seed", run.folder): run for run in group}.values())


def unlike(runs: Sequence[Run]) -> str:
    """Return why the losses of `runs` cannot be ranked; "" if nothing known is against it."""
    if len(names := sorted({str(run.options["dataset"]) for run in runs if "dataset" in run.options})) > 1:
        return f"the datasets differ ({', '.join(names)})"
    texts = {run.about["data"].get("val") for run in runs if "data" in run.about}
    return f"{names[0]} was prepared anew between the runs" if len(texts) > 1 else ""


def evaluated_unlike(runs: Sequence[Run]) -> str:
    """Return a note for runs that are evaluated on different parts of their validation text, else ""."""
    parts = {run.about["data"].get("sequences") for run in runs if "data" in run.about}
    return EVALUATED_UNLIKE if len(parts) > 1 else ""


def differing(runs: Sequence[Run]) -> list[str]:
    """Return for each run the options that are not the same in all `runs`, as one line."""
    names = sorted({name for run in runs for name in run.options})
    varying = [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]
    return [" ".join(f"{name}={run.options.get(name)}" for name in varying if run.options) for run in runs]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for a single value."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return the difference of the means and half its 95 % confidence interval (Welch's t-test), which is NaN
    unless both have several values."""
    gap = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return gap, math.nan
    if np.ptp(a) == np.ptp(b) == 0:
        return gap, 0.0
    from scipy import stats

    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return gap, float(interval.high - interval.low) / 2


def compare(a: Sequence[Run], b: Sequence[Run]) -> str:
    """Say whether the best validation losses of `a` and `b`, runs of several seeds each, differ by more than
    the noise; for single runs, the noise of the evaluations alone."""
    every, (a, b) = [*a, *b], (one_per_seed(a), one_per_seed(b))
    losses = [[run.val_loss for run in group] for group in (a, b)]
    if not all(math.isfinite(loss) for group in losses for loss in group):
        return "cannot be compared: a run has no evaluation yet"
    if why := unlike(every):
        return f"cannot be compared: {why}"
    gap, noise = difference(*losses)
    basis = f"95 % interval, {len(a)} and {len(b)} seeds"
    if math.isnan(noise):
        noise, basis = 2 * math.hypot(a[0].stderr, b[0].stderr), "twice the standard error of the evaluations"
        basis += "; that of the seeds is not known: train more"
    verdict = "yes" if abs(gap) > noise else "no"
    names = a[0].name, b[0].name
    means = ", ".join(f"{name}: {np.mean(group):.4f}" for name, group in zip(names, losses, strict=True))
    better = f"{names[gap > 0]} is better by {abs(gap):.4f} ± {noise:.4f} ({basis})"
    note = f"\nnote: {part}" if (part := evaluated_unlike(every)) else ""
    return f"{means}; {better}\ndifference larger than the noise: {verdict}{note}"
