"""Several processes as one: which this one is, its share of the work, and what all of them agree on.

torchrun starts them and says who is who in the environment. A single process is a world of size 1, in
which everything here gives back what it got: there is no other code for it.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.errors import SHARED, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # the longest wait for the others before they count as lost


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    on_node: int = 1  # processes on this machine
    control: Any = None  # a group on the CPU for flags and objects, so that asking never waits for a GPU

    def share(self, count: int) -> tuple[int, int]:
        """Of `count` things the first of this process's part, and how many: parts differ by one at most."""
        part, rest = divmod(count, self.size)
        return self.rank * part + min(self.rank, rest), part + (self.rank < rest)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process: the same answer in all of them."""
        if self.size == 1:
            return flag
        asked = torch.tensor(int(flag))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.control)
        return bool(asked)

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` in every process; if it fails in one, it fails in all, with the error of the first."""
        if self.size == 1:
            return work()
        result, error = _attempt(work)
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error, group=self.control)
        for rank, error in enumerate(errors):
            if error:
                raise _shared(error, rank)
        assert result
        return result[0]

    def lead(self, work: Callable[[], T]) -> T | None:
        """Do `work` in the first process while the others wait (and get None); it fails in all or in none."""
        if self.size == 1:
            return work()
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        box = [error]
        dist.broadcast_object_list(box, src=0, group=self.control)
        if box[0]:
            raise _shared(box[0], 0)
        return result[0] if result else None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def _attempt(work: Callable[[], T]) -> tuple[tuple[T] | None, Exception | None]:
    try:
        return (work(),), None
    except Exception as error:
        return None, error


def _shared(error: Exception, rank: int) -> Exception:
    """The error of `rank`, marked as known to all, so that only the first process prints it."""
    if rank:
        error = type(error)(f"process {rank}: {error}")
    error.add_note(SHARED)
    return error


def meet(device_type: str, backend: str) -> World:
    """The world that torchrun has started, if it has; a CPU needs gloo whatever `backend` says.

    All processes but the first lose their standard output. UserError if the others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    try:
        dist.init_process_group("gloo" if device_type == "cpu" else backend, timeout=TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the {size} processes did not meet at {where}: {error}") from None
    rank = dist.get_rank()
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), on_node, control)
