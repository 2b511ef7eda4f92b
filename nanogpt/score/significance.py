"""How sure a number is: standard errors, and paired tests of two models on the same items.

A paired test looks at the difference item by item, so what makes an item hard for both cancels: two
checkpoints can differ surely by far less than the standard error of either.
"""

import math
from dataclasses import dataclass

import numpy as np

FLIPS = 20_000  # sign patterns drawn where all cannot be tried: a p-value of 0.05 is known to +- 0.0015
TRIED = 14  # with so few non-zero differences all patterns are tried


@dataclass(frozen=True)
class Metric:
    value: float
    stderr: float  # NaN where one item cannot tell


def mean(values: np.ndarray, weights: np.ndarray | None = None) -> Metric:
    """sum(values) / sum(weights), and its standard error from the spread between items.

    values (n,) are totals of items of size weights (n,), without weights sizes of 1: then this is the
    mean and s / sqrt(n). With them it is the ratio estimator (Cochran 1977, "Sampling Techniques", 6.3).
    """
    values = values.astype(np.float64)
    weights = np.ones(len(values)) if weights is None else weights.astype(np.float64)
    n, total = len(values), weights.sum()
    ratio = float(values.sum() / total)
    if n < 2:
        return Metric(ratio, math.nan)
    residuals = values - ratio * weights
    return Metric(ratio, float(np.sqrt((residuals**2).sum() * n / (n - 1)) / total))


@dataclass(frozen=True)
class Difference:
    """What one model scores above another on the same items."""

    value: float
    stderr: float
    p: float  # how often a difference at least so large comes by chance, if the models are equally good
    test: str

    def describe(self) -> str:
        error = f" ± {self.stderr:.4f}" if math.isfinite(self.stderr) else ""
        return f"{self.value:+.4f}{error} (p = {self.p:.2g}, {self.test})"


def difference(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> Difference:
    """a minus b: totals of the same items (n,), as `mean` takes them. Right or wrong (bool) goes to
    McNemar's test, any other number to the sign-flip test."""
    metric = mean(a.astype(np.float64) - b.astype(np.float64), weights)
    if a.dtype == bool:
        p = mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
        return Difference(metric.value, metric.stderr, p, "McNemar's exact test")
    return Difference(metric.value, metric.stderr, sign_flips(a - b), "sign-flip permutation test")


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value that items which only one model gets right fall as `only_a` against `only_b`
    when each is a fair coin (McNemar 1947, exact form)."""
    n, k = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    highest = max(logs)
    tail = math.fsum(math.exp(value - highest) for value in logs)
    return min(1.0, 2 * math.exp(highest + math.log(tail) - n * math.log(2)))


def sign_flips(differences: np.ndarray) -> float:
    """Two-sided p-value of the sum of `differences` (n,), when each could as well have the other sign
    (Fisher 1935). All patterns of signs are tried for few of them, else FLIPS drawn from a fixed seed."""
    moved = differences[differences != 0].astype(np.float64)
    n, observed = len(moved), abs(float(moved.sum()))
    if n == 0:
        return 1.0
    slack = observed * (1 - 1e-12)  # equal sums are equal, however they were added up
    if n <= TRIED:
        signs = 1 - 2 * (np.arange(1 << n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ moved) >= slack).mean())
    draw = np.random.default_rng(0)
    reached, done = 0, 0
    while done < FLIPS:
        count = min(FLIPS - done, max(1, (1 << 22) // n))  # some megabytes at a time
        signs = draw.integers(0, 2, (count, n), dtype=np.int8) * 2 - 1
        reached += int((np.abs(signs @ moved) >= slack).sum())
        done += count
    return (reached + 1) / (FLIPS + 1)
