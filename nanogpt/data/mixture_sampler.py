"""The order in which a run reads several texts at once: a pure function of (seed, sample number)."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from nanogpt.data.samplers import EpochSampler

CYCLE = 1 << 16  # slots, at most, in which weights are honoured exactly


class MixtureSampler:
    """Windows of several texts that lie one behind another, by weight; each text in its own order.

    Slots are dealt to the texts in a cycle that repeats: text k has its share of the slots, and its slot
    number i comes at (i + 1/2) / share of the way. So any run of samples, a batch or a process's part
    of it, holds each text as its weight says, give or take one or two windows, and sample n is known
    without those before it. A text's slots take its own samples 0, 1, 2, ...: it is read to its end
    before a window comes again, and in the order of a run on it alone.
    """

    def __init__(self, orders: Sequence[EpochSampler], weights: Sequence[Fraction], offsets: Sequence[int]):
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
