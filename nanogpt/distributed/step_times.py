"""Compute time of each rank per step, to find a slow one: step times are equal, as all wait for it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from nanogpt.world import World

EVERY = 20  # steps between exchanges
SLOW = 1.5  # times the median of the other ranks


class StepTimes:
    """Measures forward passes, which under ddp wait for no other rank, and exchanges their times.

    `write(**values)`, on rank 0, logs a row with the mean seconds per step of each rank.
    """

    def __init__(self, world: World, device: torch.device, write: Callable[..., None] | None):
        self.world, self.device, self.write = world, device, write
        self.spans: list[tuple[Any, Any]] = []  # (start, end) of the forward passes since the last exchange
        self.steps, self.named = 0, -1

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            start = self._now()
            result = function(*inputs)
            self.spans.append((start, self._now()))
            return result

        return run

    def end_step(self) -> None:
        """Count a step; after every EVERY steps, exchange the times and name a slow rank. Collective."""
        self.steps += 1
        if self.steps % EVERY:
            return
        took_s = sum(self._between(*span) for span in self.spans) / EVERY
        self.spans.clear()
        times = torch.zeros(self.world.size, device=self.device)
        times[self.world.rank] = took_s
        seconds = self.world.sum(times).tolist()
        if self.write:
            self.write(forward_s=seconds)
            if text := self.slowest(seconds):
                tqdm.write(text)

    def slowest(self, times: list[float]) -> str:
        """Return a sentence that names the slowest rank, if it is slow and was not the last one named."""
        rank = max(range(len(times)), key=times.__getitem__)
        usual = statistics.median(t for i, t in enumerate(times) if i != rank)
        if times[rank] <= SLOW * usual:
            self.named = -1
        elif rank != self.named:
            self.named = rank
            both = f"{times[rank] * 1000:.0f} ms per step in forward passes, the others {usual * 1000:.0f} ms"
            return f"rank {rank} is slow, and all others wait for it: {both}"
        return ""

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
