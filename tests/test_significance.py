"""Compare standard errors and paired tests with their definitions."""

import itertools
import math

import numpy as np
import pytest

from nanogpt.evaluation import significance
from nanogpt.evaluation.significance import difference, mcnemar, mean, sign_flips


def test_mean_and_standard_error():
    values = np.random.default_rng(0).normal(2, 3, 500)
    found = mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(500))
    assert math.isnan(mean(values[:1]).stderr)


def test_ratio_of_items_of_different_size():
    """The standard error of the ratio equals its standard deviation over random samples."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        sizes = draw.integers(1, 20, 100)
        found.append(mean(sizes * 0.5 + draw.normal(0, 1, 100) * np.sqrt(sizes), sizes))
    assert np.mean([one.value for one in found]) == pytest.approx(0.5, abs=0.01)
    scatter = np.std([one.value for one in found])
    assert np.mean([one.stderr for one in found]) == pytest.approx(scatter, rel=0.05)


@pytest.mark.parametrize("counts", [(0, 0), (0, 5), (3, 9), (9, 3), (10, 10), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    a, b = counts
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1, 2 * tail) if a != b else 1)
    assert mcnemar(30_000, 31_000) == pytest.approx(
        math.erfc(999 / math.sqrt(61_000) / math.sqrt(2)), rel=0.02
    )


def test_sign_flips_of_few_items_are_exhaustive():
    moved = np.array([3.0, -1.0, 2.0, 0.5, 4.0, 0.0])
    signs = list(itertools.product((1, -1), repeat=5))
    sums = [abs(float(np.dot(pattern, moved[:5]))) for pattern in signs]
    assert sign_flips(moved) == pytest.approx(np.mean([total >= 8.5 for total in sums]))
    assert sign_flips(np.zeros(4)) == 1 and sign_flips(np.ones(5)) == pytest.approx(2 / 32)


def test_sign_flips_of_many_items_match_the_normal_distribution():
    draw = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.2):
        moved = draw.normal(shift, 1, 400)
        z = abs(moved.sum()) / math.sqrt((moved**2).sum())
        assert sign_flips(moved) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert sign_flips(moved) == sign_flips(moved)


def test_power_and_false_positive_rate():
    draw = np.random.default_rng(2)
    hard = draw.normal(0, 5, 300)  # item difficulty shared by both models
    a, b = hard + draw.normal(0.2, 0.5, 300), hard + draw.normal(0, 0.5, 300)
    found = difference(a, b)
    assert found.p < 0.05 and found.value == pytest.approx((a - b).mean())
    assert found.stderr < 0.2 * mean(a).stderr
    by_chance = [
        difference(draw.random(200) < 0.5, draw.random(200) < 0.5).p for _ in range(300)
    ]  # exact tests are conservative
    assert 0.01 < np.mean(np.array(by_chance) < 0.05) < 0.06


def test_binary_scores_use_mcnemar():
    a = np.array([True] * 30 + [False] * 20)
    b = np.array([True] * 18 + [False] * 32)
    found = difference(a, b)
    assert found.p == mcnemar(12, 0) and found.value == pytest.approx(0.24)
    assert "McNemar" in found.describe() and found.describe().startswith("+0.2400 ± ")
    assert significance.difference(a, a).p == 1
