"""Standard errors, and paired significance tests of two models on the same items.

A paired test compares item by item, so item difficulty cancels: two checkpoints can differ significantly
by far less than the standard error of either.
"""

import math
from dataclasses import dataclass

import numpy as np

FLIPS = 20_000  # sampled sign patterns if not exhaustive: standard error 0.0015 at p = 0.05


@dataclass(frozen=True)
class Metric:
    value: float
    stderr: float  # NaN for a single item


def mean(values: np.ndarray, weights: np.ndarray | None = None) -> Metric:
    """Return sum(values) / sum(weights) and its standard error, estimated over items.

    values (n,): total per item; weights (n,): size per item, default 1. Without weights this is the mean
    and s / sqrt(n), with weights the ratio estimator (Cochran 1977, "Sampling Techniques", 6.3).
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
    """Difference between the scores of two models on the same items."""

    value: float
    stderr: float
    p: float  # two-sided p-value of the null hypothesis that the models are equally good
    test: str

    def describe(self) -> str:
        error = f" ± {self.stderr:.4f}" if math.isfinite(self.stderr) else ""
        return f"{self.value:+.4f}{error} (p = {self.p:.2g}, {self.test})"


def difference(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None) -> Difference:
    """Return a minus b for per-item totals (n,), as in `mean`. Boolean values (correct or not) use McNemar's
    test, other values the sign-flip permutation test."""
    metric = mean(a.astype(np.float64) - b.astype(np.float64), weights)
    if a.dtype == bool:
        p = mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
        return Difference(metric.value, metric.stderr, p, "McNemar's exact test")
    return Difference(metric.value, metric.stderr, sign_flips(a - b), "sign-flip permutation test")


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947): of the items that exactly one
    model gets right, `only_a` and `only_b` are a binomial split with probability 0.5."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flips(differences: np.ndarray) -> float:
    """Return the two-sided p-value of the sum of `differences` (n,) under random sign flips (Fisher 1935).
    Exact if there are at most FLIPS sign patterns, else FLIPS random ones from a fixed seed."""
    from scipy.stats import permutation_test

    moved = differences[differences != 0].astype(np.float64)
    if len(moved) < 2:
        return 1.0
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": FLIPS, "rng": 0}
    return float(permutation_test((moved,), np.sum, batch=max(1, (1 << 22) // len(moved)), **options).pvalue)
