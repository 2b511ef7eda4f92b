"""Rank, world size and the collectives of a run.

This class is the single-process case, in which every collective returns its input. distributed/world.py
subclasses it for several ranks, so other code needs no branches on the world size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The process group of a run: rank, size and collectives."""

    rank: int = 0
    size: int = 1
    on_node: int = 1  # number of ranks on this node

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """Return (first, number) of this rank's share of `count` items; shares differ by at most one."""
        share, rest = divmod(count, self.size)
        return self.rank * share + min(self.rank, rest), share + (self.rank < rest)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks, in place. Collective: call on all ranks."""
        return x

    def any_rank(self, flag: bool) -> bool:
        """Return on all ranks whether `flag` is true on any. Collective: call on all ranks."""
        return self.sum_int(int(flag)) > 0

    def sum_int(self, count: int) -> int:
        """Return the sum of an integer over all ranks. Collective: call on all ranks."""
        return count

    def gather(self, value: T) -> list[T]:
        """Return the (pickled) values of all ranks, in order. Collective: call on all ranks."""
        return [value]

    def raise_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it fails, raise the error of the lowest failing rank on all ranks."""
        return work()

    def rank_zero_only(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 while the others wait and return None; an error is raised on all ranks."""
        return work()

    def report_phase(self, step: int, phase: str) -> None:
        """Record the current `phase` (one of heartbeat.PHASES), which is reported if this rank hangs."""

    def report_progress(self) -> None:
        """Record progress within the current phase (resets the watchdog)."""

    def require_visible(self, folder: Path) -> None:
        """Raise UserError on all ranks if any rank cannot see what rank 0 writes to `folder` (its parent if
        `folder` does not exist yet)."""

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the process group; raise Lost in place of an error caused by the loss of another rank."""
