"""How sure a number is: standard errors, and paired tests of two models on the same items.

A paired test looks at the difference item by item, so what makes an item hard for both cancels: two
checkpoints can differ surely by far less than the standard error of either.
"""

import math
from dataclasses import dataclass

import numpy as np

FLIPS = 20_000  # sign patterns drawn where all cannot be tried: a p-value of 0.05 is known to +- 0.0015


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
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(differences: np.ndarray) -> float:
    """Two-sided p-value of the sum of `differences` (n,), when each could as well have the other sign
    (Fisher 1935). All patterns of signs are tried for few of them, else FLIPS drawn from a fixed seed."""
    from scipy.stats import permutation_test

    moved = differences[differences != 0].astype(np.float64)
    if not len(moved):
        return 1.0
    how = {"permutation_type": "samples", "vectorized": True, "n_resamples": FLIPS, "rng": 0}
    return float(permutation_test((moved,), np.sum, batch=max(1, (1 << 22) // len(moved)), **how).pvalue)
