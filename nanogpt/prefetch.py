"""Batches read ahead: while the device computes one update, a thread reads the windows of the next.

What a step sees is a pure function of its number, so nothing is to be kept in step but that number.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nanogpt.data import TrainBatches

Batches = list[tuple[Tensor, ...]]


class Prefetched(TrainBatches):
    """TrainBatches whose `step` has been read, and copied to pinned memory for a GPU, when it is asked for
    after the one before it."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.host = copy.copy(self)
        self.host.device = torch.device("cpu")
        self.thread = ThreadPoolExecutor(1, "batches", initializer=self._start)
        self.ahead: tuple[int, Future[Batches]] | None = None  # the number of a step, and its batches

    def step(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        if self.tokens.resident is not None:  # there is nothing to read
            return super().step(step)
        now = self.ahead[1] if self.ahead and self.ahead[0] == step else self.thread.submit(self._read, step)
        self.ahead = step + 1, self.thread.submit(self._read, step + 1)
        return self._copied(now.result())

    def _start(self) -> None:
        # Pinned memory is the current GPU's, and a thread begins with the first.
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    def _read(self, step: int) -> Batches:
        found = list(TrainBatches.step(self.host, step))
        if self.device.type == "cuda":
            return [tuple(part.pin_memory() for part in batch) for batch in found]
        return found

    def _copied(self, batches: Batches) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)
