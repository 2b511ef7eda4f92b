"""The learning rate schedule: positive, continuous, and exact at its endpoints."""

import math
from itertools import pairwise

import pytest

import train
from nanogpt.data.ramp import batch_ramp

KINDS = ["cosine", "linear", "wsd", "constant"]


def rates(kind: str, n: int = 300, warmup: int = 20, decay: int = 200, floor: float = 1e-4) -> list[float]:
    rules = {"lr_schedule": kind, "learning_rate": 1e-3, "min_lr": floor, "warmup_iters": warmup}
    config = train.Config(**rules, lr_decay_iters=decay, max_iters=1)
    return [train.learning_rate(config, i) for i in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_schedule_is_positive_continuous_and_has_exact_endpoints(kind):
    values = rates(kind)
    assert all(0 < value <= 1e-3 for value in values)
    assert values[0] == pytest.approx(1e-3 / 21)
    assert values[20] == pytest.approx(1e-3)
    assert all(b >= a for a, b in pairwise(values[:21]))
    assert all(b <= a for a, b in pairwise(values[20:]))
    jumps = [abs(b - a) for a, b in pairwise(values)]
    assert max(jumps) < 1e-3 / 15
    end = 1e-3 if kind == "constant" else 1e-4
    assert values[200:] == [pytest.approx(end)] * 100


def test_cosine_schedule_equals_nanogpts():
    def theirs(i):  # the formula of Brown et al. as implemented in nanoGPT
        share = (i - 20) / (200 - 20)
        return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * share)) * (1e-3 - 1e-4)

    assert rates("cosine")[20:200] == [pytest.approx(theirs(i)) for i in range(20, 200)]


def test_wsd_is_constant_then_decays():
    values = rates("wsd")
    assert values[20:121] == [pytest.approx(1e-3)] * 101
    assert values[160] == pytest.approx((1e-3 + 1e-4) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_schedule_lengths(kind):
    assert rates(kind, n=3, warmup=0, decay=0)[0] > 0
    assert all(math.isfinite(value) for value in rates(kind, n=50, warmup=30, decay=10))


def test_batch_size_ramps_linearly_with_tokens_read():
    sizes = batch_ramp(full=100, start=0.1, length=10_000, unit=1)
    read = 0
    for size in sizes:
        assert abs(size - (10 + 90 * read / 10_000)) <= 0.5
        read += size
    assert read - sizes[-1] < 10_000 <= read
    assert sizes[0] == 10 and sizes[-1] in (99, 100)


def test_batch_ramp_up_uses_full_micro_batches():
    sizes = batch_ramp(full=40, start=0.0, length=1000, unit=8)
    assert set(sizes) == {8, 16, 24, 32, 40} and sizes == sorted(sizes)
    assert batch_ramp(full=40, start=0.5, length=0, unit=8) == []
