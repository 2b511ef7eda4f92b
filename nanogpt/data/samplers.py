"""The order in which a run reads its data: a pure function of (seed, sample number)."""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Share = Callable[[int], tuple[int, int]]  # of so many things: the first of this process's, and how many


def everything(count: int) -> tuple[int, int]:
    return 0, count


class BatchOrder:
    """Which window of the data is sample number n: every window once an epoch, in an order drawn anew.

    An epoch cuts the split into windows of `block_size` tokens from a phase drawn for the epoch (so
    borders between windows move) and walks them in a keyed permutation. Nothing is stored: any sample
    is found in constant time and memory, which makes resume exact on any number of processes.
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int):
        self.n_tokens, self.block_size, self.seed = n_tokens, block_size, seed
        fitting = (n_tokens - 1) // block_size  # a window is its tokens and the one after them
        self.n_windows = fitting - 1 if fitting > 1 else fitting  # one is given up to leave a phase room
        assert self.n_windows > 0, "require_window comes first"

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where samples first .. first + count begin in the data, int64 (count,)."""
        samples = np.arange(first, first + count, dtype=np.uint64)
        epochs, places = np.divmod(samples, np.uint64(self.n_windows))
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows = permute(places[here], self.n_windows, _key(self.seed, int(epoch), 1))
            starts[here] = self._begins(int(epoch), windows.astype(np.int64))
        return starts

    def _begins(self, epoch: int, windows: np.ndarray) -> np.ndarray:
        slack = self.n_tokens - 1 - self.n_windows * self.block_size
        phase = int(_mix(_key(self.seed, epoch, 0))) % (min(slack, self.block_size - 1) + 1)
        return windows * self.block_size + phase

    def epochs(self, samples: int) -> list[float]:
        """How often the text has been read after so many samples."""
        return [samples / self.n_windows]


class RowOrder(BatchOrder):
    """As BatchOrder, of windows that begin at given places."""

    def __init__(self, begins: np.ndarray, seed: int):
        self.begins, self.n_windows, self.seed = begins, len(begins), seed

    def _begins(self, epoch: int, windows: np.ndarray) -> np.ndarray:
        return self.begins[windows]


CYCLE = 1 << 16  # slots, at most, in which weights are honoured exactly


class MixedOrder:
    """Windows of several texts that lie one behind another, by weight; each text in its own order.

    Slots are dealt to the texts in a cycle that repeats: text k has its share of the slots, and its slot
    number i comes at (i + 1/2) / share of the way. So any run of samples, a batch or a process's part
    of it, holds each text as its weight says, give or take one or two windows, and sample n is known
    without those before it. A text's slots take its own samples 0, 1, 2, ...: it is read to its end
    before a window comes again, and in the order of a run on it alone.
    """

    def __init__(self, orders: Sequence[BatchOrder], weights: Sequence[Fraction], offsets: Sequence[int]):
        self.orders, self.offsets = orders, offsets
        self.n_windows = sum(order.n_windows for order in orders)
        self.shares = np.array(slots(weights), dtype=np.uint64)
        of = np.repeat(np.arange(len(weights)), self.shares.astype(np.int64))
        number = np.concatenate([np.arange(share, dtype=np.uint64) for share in self.shares])
        when = (number + 0.5) / self.shares[of]
        turn = np.lexsort((of, when))
        self.of, self.number = of[turn], number[turn]  # the text of each slot, and which of its slots

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where samples first .. first + count begin, int64 (count,)."""
        samples = np.arange(first, first + count, dtype=np.uint64)
        cycles, places = np.divmod(samples, np.uint64(len(self.of)))
        starts = np.empty(count, dtype=np.int64)
        for which in np.unique(self.of[places]):
            here = np.flatnonzero(self.of[places] == which)
            own = cycles[here] * self.shares[which] + self.number[places[here]]  # one after another
            low = int(own[0])
            starts[here] = self.orders[which].starts(low, len(own)) + self.offsets[which]
        return starts

    def epochs(self, samples: int) -> list[float]:
        """How often each text has been read after so many samples."""
        cycles, place = divmod(samples, len(self.of))
        own = cycles * self.shares.astype(np.int64) + np.bincount(self.of[:place], minlength=len(self.shares))
        return [int(n) / order.n_windows for n, order in zip(own, self.orders, strict=True)]


def slots(weights: Sequence[Fraction]) -> list[int]:
    """How many slots of a cycle each weight gets, at least one: exactly its share where a cycle of at most
    CYCLE slots can say it, else the nearest whole numbers that add up."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    cycle = math.lcm(*(share.denominator for share in shares))
    if cycle <= CYCLE:
        return [int(share * cycle) for share in shares]
    found = [max(1, int(share * CYCLE)) for share in shares]
    missing = max(0, CYCLE - sum(found))
    rests = sorted(range(len(shares)), key=lambda k: shares[k] * CYCLE - found[k], reverse=True)
    for k in rests[:missing]:
        found[k] += 1
    return found


def permute(places: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """Entries `places` (uint64) of the permutation of 0 .. n - 1 that belongs to `key`.

    A Feistel network of four rounds on the next even power of two, walked until the value falls
    below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, math.ceil(math.log2(n) / 2)) if n > 1 else 1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right + key + np.uint64(turn)) & mask)
        values[outside] = (left << half) | right
        outside = values >= n
    return values


@functools.lru_cache(maxsize=8)
def _key(seed: int, epoch: int, purpose: int) -> np.uint64:
    words = np.random.SeedSequence([seed, epoch, purpose]).generate_state(1, np.uint64)
    return words[0]


def _mix(value: Any) -> Any:
    """A bijection of uint64 that spreads every bit (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
