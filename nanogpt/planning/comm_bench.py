"""What joins the processes of a run: how fast all-reduce and all-gather go, by message size."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.distributed.world import Processes

SMALLEST = 1 << 12  # bytes of a message; each size is 4 times the one before
WARM_UP = 3
AIM_S = 0.5  # seconds spent on a size, at most
REPEATS = (5, 50)  # at least and at most so many samples of each
BURST, BURST_S = 50, 2e-3  # a sample is at most so many in a row, for about so many seconds
INFINIBAND = Path("/sys/class/infiniband")  # where Linux lists adapters; RoCE cards are there too


@dataclass(frozen=True)
class Timing:
    """A collective of all `members`, each time as long as the slowest of them took."""

    kind: str  # all_reduce or all_gather
    payload: int  # bytes, of the whole tensor
    members: int
    median_s: float
    low_s: float  # 10th percentile
    high_s: float  # 90th


def sizes(largest: int) -> list[int]:
    """Bytes of the messages up to `largest`."""
    found = [SMALLEST]
    while found[-1] * 4 <= largest:
        found.append(found[-1] * 4)
    return found


def measure(
    world: Processes, device: torch.device, kind: str, payload: int, group: Any = None, members: int = 0
) -> Timing:
    """Time one size; every process of the world calls this, with a `group` of so many `members` if not all
    take part in one collective."""
    members = members or world.size
    numbers = max(members, payload // 4 // members * members)
    whole = torch.ones(numbers, device=device)
    part = torch.ones(numbers // members, device=device)
    # torch 2.13 has another name for the one without copies
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def work() -> None:
        if kind == "all_gather":
            gather(whole, part, group=group)
        else:
            dist.all_reduce(whole, group=group)

    for _ in range(WARM_UP):
        once = timed(work, device, world)
    slowest = float(slowest_of(torch.tensor([once]), world))
    burst = int(min(BURST, max(1, BURST_S / slowest)))  # the same everywhere: it is the slowest's
    low, high = REPEATS
    repeats = int(min(high, max(low, AIM_S / (slowest * burst))))
    took = torch.empty(repeats, dtype=torch.float64)
    for i in range(repeats):
        whole.fill_(1.0)
        took[i] = timed(work, device, world, burst)
    took = slowest_of(took, world)
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    bottom, median, top = torch.quantile(took, quantiles).tolist()
    return Timing(kind, 4 * numbers, members, median, bottom, top)


def timed(work: Callable[[], Any], device: torch.device, world: Processes, burst: int = 1) -> float:
    """Seconds of `work`, done so often in a row that how far apart processes begin matters little."""
    dist.barrier(group=world.control)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(burst):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / burst


def slowest_of(took: Tensor, world: Processes) -> Tensor:
    """Of each time the longest among all processes."""
    took = took.double()
    dist.all_reduce(took, op=dist.ReduceOp.MAX, group=world.control)
    return took


def processes_of_a_node(world: Processes) -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def node_group(world: Processes) -> Any:
    """The processes of this node; every process of the world calls this."""
    return dist.new_subgroups(processes_of_a_node(world))[0]


def advice(backend: str, nodes: int) -> list[str]:
    """What to know of the network between several nodes, before its figures."""
    if nodes == 1 or backend != "nccl":
        return []
    adapters = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return ["NCCL_IB_DISABLE=1: NCCL uses plain sockets between nodes"]
    if adapters:
        return [f"InfiniBand or RoCE adapters here: {', '.join(adapters)}"]
    return [
        "no InfiniBand or RoCE adapter here: NCCL uses plain sockets between nodes, which is slow; if it "
        "fails at the start, put NCCL_IB_DISABLE=1 before the command"
    ]
