"""Tests of the sample order."""

from itertools import pairwise

import numpy as np
import pytest

from nanogpt.data.samplers import EpochSampler, permute


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 100, 1023, 1025])
def test_permutation_is_a_bijection(n):
    for key in (0, 1, 2**63 + 11):
        got = permute(np.arange(n, dtype=np.uint64), n, np.uint64(key))
        assert sorted(got.tolist()) == list(range(n))


def test_permutations_differ_and_shuffle():
    n = 1000
    drawn = [permute(np.arange(n, dtype=np.uint64), n, np.uint64(key)).astype(int) for key in range(20)]
    for a, b in pairwise(drawn):
        assert np.mean(a == b) < 0.02
    for order in drawn:  # correlation with the identity as for random orders: 0 +- 0.03
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.15
    firsts = np.array([permute(np.zeros(1, np.uint64), n, np.uint64(k))[0] for k in range(2000)])
    counts, _ = np.histogram(firsts.astype(int), bins=10, range=(0, n))
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("n_tokens", "block_size"), [(1000, 16), (33, 16), (17, 16), (5000, 7), (64, 31)])
def test_each_token_is_read_once_per_epoch(n_tokens, block_size):
    order = EpochSampler(n_tokens, block_size, seed=5)
    phases = set()
    for epoch in range(8):
        starts = order.starts(epoch * order.n_sequences, order.n_sequences)
        assert (starts >= 0).all() and (starts + block_size < n_tokens).all()
        covered = np.zeros(n_tokens, dtype=int)
        for start in starts:
            covered[start : start + block_size] += 1
        assert covered.max() == 1
        assert n_tokens - covered.sum() <= 2 * block_size
        phases.add(int(starts.min()))
    assert len(phases) > 1 or n_tokens == block_size + 1


def test_samples_are_independent_of_request_size():
    order = EpochSampler(3000, 16, seed=1)
    whole = order.starts(0, 1000)
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, count = int(rng.integers(0, 900)), int(rng.integers(1, 100))
        assert (order.starts(first, count) == whole[first : first + count]).all()
    assert (EpochSampler(3000, 16, seed=2).starts(0, 1000) != whole).any()
    far = order.starts(10**12, 3)  # random access in constant time
    assert (far == EpochSampler(3000, 16, seed=1).starts(10**12 - 1, 5)[1:4]).all()
