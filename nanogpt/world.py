"""The processes of a run: which one this is, its share of the work, and what all of them agree on.

One process needs nobody: everything here gives back what it got. distributed/world.py extends it to several,
so that no other code asks how many there are.
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
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    on_node: int = 1  # processes on this machine

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """Of `count` things the first of this process's part, and how many: parts differ by one at most."""
        part, rest = divmod(count, self.size)
        return self.rank * part + min(self.rank, rest), part + (self.rank < rest)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        return x

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true in any process: the same answer in all of them."""
        return flag

    def sum_int(self, count: int) -> int:
        """The sum of a whole number over all processes."""
        return count

    def raise_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Do `work` in every process; if it fails in one, it fails in all, with the error of the first."""
        return work()

    def rank_zero_only(self, work: Callable[[], T]) -> T | None:
        """Do `work` in the first process while the others wait (and get None); it fails in all or in none."""
        return work()

    def report_phase(self, step: int, phase: str) -> None:
        """This process is there now (one of heartbeat.PHASES): what the others say of it if it hangs."""

    def report_progress(self) -> None:
        """This process has got on within its phase."""

    def require_visible(self, folder: Path) -> None:
        """UserError, in all processes, if one of them does not see what the first writes into `folder` (or,
        as long as that is not there, into the folder above it)."""

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part from the others; Lost instead of what the loss of another process has made fail here."""
