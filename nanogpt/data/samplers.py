"""Sampling order of a dataset: a pure function of (seed, sample number)."""

import functools
import math
from typing import Any

import numpy as np


class EpochSampler:
    """Map sample numbers to sequences: each sequence once per epoch, in a new random order every epoch.

    Each epoch splits the data into sequences of `block_size` tokens, starting at a random offset (so that
    sequence boundaries move), and visits them in a keyed permutation. Nothing is stored: any sample is
    computed in constant time and memory, so resume is exact for any number of ranks.
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int):
        self.n_tokens, self.block_size, self.seed = n_tokens, block_size, seed
        fitting = (n_tokens - 1) // block_size  # a sequence also needs the token after it
        self.n_sequences = fitting - 1 if fitting > 1 else fitting  # one fewer, to leave room for the offset
        assert self.n_sequences > 0, "call require_sequence first"

    def starts(self, first: int, count: int) -> np.ndarray:
        """Return the start positions of samples first .. first + count - 1, int64 (count,)."""
        samples = np.arange(first, first + count, dtype=np.uint64)
        epochs, places = np.divmod(samples, np.uint64(self.n_sequences))
        starts = np.empty(count, dtype=np.int64)
        # np.unique would import numpy.ma, which takes 70 ms.
        for epoch in range(first // self.n_sequences, (first + count - 1) // self.n_sequences + 1):
            in_epoch = epochs == epoch
            numbers = permute(places[in_epoch], self.n_sequences, _key(self.seed, epoch, 1))
            starts[in_epoch] = self._begins(epoch, numbers.astype(np.int64))
        return starts

    def _begins(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        slack = self.n_tokens - 1 - self.n_sequences * self.block_size
        phase = int(_mix(_key(self.seed, epoch, 0))) % (min(slack, self.block_size - 1) + 1)
        return numbers * self.block_size + phase

    def epochs(self, samples: int) -> list[float]:
        """Return the epochs completed after `samples` samples."""
        return [samples / self.n_sequences]


class DocumentSampler(EpochSampler):
    """EpochSampler over sequences at given start positions."""

    def __init__(self, begins: np.ndarray, seed: int):
        self.begins, self.n_sequences, self.seed = begins, len(begins), seed

    def _begins(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        return self.begins[numbers]


def permute(places: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """Return the entries at `places` (uint64) of a pseudorandom permutation of 0 .. n - 1 given by `key`.

    Four-round Feistel network on the next power of 4 with cycle walking until the value is below n
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, math.ceil(math.log2(n) / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right + key + np.uint64(round_number)) & mask)
        values[outside] = (left << half) | right
        outside = values >= n
    return values


@functools.lru_cache(maxsize=8)
def _key(seed: int, epoch: int, purpose: int) -> np.uint64:
    words = np.random.SeedSequence([seed, epoch, purpose]).generate_state(1, np.uint64)
    return words[0]


def _mix(value: Any) -> Any:
    """Mix the bits of uint64 values bijectively (splitmix64 finalizer, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
