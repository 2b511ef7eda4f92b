"""Sampling order of a mixture of datasets: a pure function of (seed, sample number)."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from nanogpt.data.samplers import EpochSampler

CYCLE = 1 << 16  # maximum length of the cycle in slots; longer ones are approximated


class MixtureSampler:
    """Sample sequences from concatenated datasets by weight, each dataset in the order of its own sampler.

    Samples are assigned to datasets by a repeating cycle of slots. Dataset k has shares[k] slots, the i-th
    at position (i + 1/2) / shares[k] of the cycle. Any run of consecutive samples (a batch, or a rank's part
    of it) therefore matches the weights within one or two sequences, and sample n is computed without its
    predecessors. The slots of a dataset take its samples 0, 1, 2, ... in order, so each epoch of it is
    completed before a sequence repeats.
    """

    def __init__(self, samplers: Sequence[EpochSampler], weights: Sequence[Fraction], offsets: Sequence[int]):
        self.samplers, self.offsets = samplers, offsets
        self.n_sequences = sum(sampler.n_sequences for sampler in samplers)
        self.shares = np.array(slots(weights), dtype=np.uint64)
        datasets = np.repeat(np.arange(len(weights)), self.shares.astype(np.int64))
        number = np.concatenate([np.arange(share, dtype=np.uint64) for share in self.shares])
        positions = (number + 0.5) / self.shares[datasets]
        order = np.lexsort((datasets, positions))
        self.datasets, self.number = datasets[order], number[order]  # of each slot, and index among its slots

    def starts(self, first: int, count: int) -> np.ndarray:
        """Return the start positions of samples first .. first + count - 1, int64 (count,)."""
        samples = np.arange(first, first + count, dtype=np.uint64)
        cycles, places = np.divmod(samples, np.uint64(len(self.datasets)))
        starts = np.empty(count, dtype=np.int64)
        for k in np.unique(self.datasets[places]):
            selected = np.flatnonzero(self.datasets[places] == k)
            numbers = cycles[selected] * self.shares[k] + self.number[places[selected]]  # consecutive
            starts[selected] = self.samplers[k].starts(int(numbers[0]), len(numbers)) + self.offsets[k]
        return starts

    def epochs(self, samples: int) -> list[float]:
        """Return the epochs of each dataset completed after `samples` samples."""
        cycles, place = divmod(samples, len(self.datasets))
        in_cycle = np.bincount(self.datasets[:place], minlength=len(self.shares))
        counts = cycles * self.shares.astype(np.int64) + in_cycle
        return [int(n) / sampler.n_sequences for n, sampler in zip(counts, self.samplers, strict=True)]


def slots(weights: Sequence[Fraction]) -> list[int]:
    """Return the number of slots per weight, at least 1: exact if a cycle of at most CYCLE slots allows it,
    else rounded to a total of CYCLE by the largest-remainder method."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    cycle = math.lcm(*(share.denominator for share in shares))
    if cycle <= CYCLE:
        return [int(share * cycle) for share in shares]
    counts = [max(1, int(share * CYCLE)) for share in shares]
    missing = max(0, CYCLE - sum(counts))
    rests = sorted(range(len(shares)), key=lambda k: shares[k] * CYCLE - counts[k], reverse=True)
    for k in rests[:missing]:
        counts[k] += 1
    return counts
