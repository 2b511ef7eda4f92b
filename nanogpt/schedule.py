"""Learning rates and batch sizes as pure functions of the step, so that a resumed run needs no state."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "wsd", "constant"]


def problems(kind: Schedule, peak: float, floor: float, warmup_iters: int, decay_iters: int) -> list[str]:
    """What makes these numbers impossible, in the names of train.py's options; empty if nothing does."""
    wrong = []
    if kind != "constant" and floor > peak:
        wrong.append(f"min_lr={floor} is above learning_rate={peak}; lower --min_lr")
    if kind != "constant" and 0 < decay_iters < warmup_iters:
        wrong.append(f"lr_decay_iters={decay_iters} ends before warmup_iters={warmup_iters}")
    return wrong


def learning_rate(
    step: int,
    schedule: Schedule,
    *,
    peak: float,
    floor: float,
    warmup_iters: int,
    decay_iters: int,
    cooldown: float = 0.4,
) -> float:
    """The rate for update number `step`, counted from 0.

    It rises linearly over `warmup_iters` updates (never 0: the first is peak / (warmup_iters + 1)),
    then falls from `peak` to `floor`, which it reaches at update `decay_iters` and keeps:

    - cosine:   half a cosine, as in GPT-3 (Brown et al. 2020, appendix B) and nanoGPT
    - linear:   a straight line
    - wsd:      holds `peak`, then a straight line over the last `cooldown` of `decay_iters`
                (warm-up, stable, decay: Hu et al. 2024, "MiniCPM")
    - constant: holds `peak`
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return peak
    start = warmup_iters
    if schedule == "wsd":
        start = max(warmup_iters, round(decay_iters * (1 - cooldown)))
    done = min(1.0, max(0.0, (step - start) / max(1, decay_iters - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return floor + (peak - floor) * left


def batch_ramp(full: int, start: float, windows: int, unit: int) -> list[int]:
    """The batch sizes, in windows, of the first updates: each grows linearly with the windows read before
    it, from the share `start` of `full` to `full` after about `windows` of them (Brown et al. 2020, GPT-3,
    appendix B). Multiples of `unit`, at least one; the list ends before the first full batch.
    """
    sizes: list[int] = []
    read = 0
    while read < windows:
        size = full * (start + (1 - start) * read / windows)
        sizes.append(min(full, max(unit, round(size / unit) * unit)))
        read += sizes[-1]
    return sizes
