"""Benchmark all-reduce and all-gather between the ranks of a run, by message size."""

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

SMALLEST = 1 << 12  # smallest message in bytes; each size is 4 times the previous one
WARM_UP = 3
AIM_S = 0.5  # time limit per size, in seconds
REPEATS = (5, 50)  # minimum and maximum number of samples per size
BURST, BURST_S = 50, 2e-3  # maximum calls per sample, and target duration of a sample in seconds
INFINIBAND = Path("/sys/class/infiniband")  # Linux lists InfiniBand and RoCE adapters here


@dataclass(frozen=True)
class Timing:
    """Timing of a collective over `members` ranks; each sample is the time of the slowest rank."""

    kind: str  # all_reduce or all_gather
    payload: int  # bytes of the full tensor
    members: int
    median_s: float
    low_s: float  # 10th percentile
    high_s: float  # 90th percentile


def sizes(largest: int) -> list[int]:
    """Return the message sizes in bytes, up to `largest`."""
    found = [SMALLEST]
    while found[-1] * 4 <= largest:
        found.append(found[-1] * 4)
    return found


def measure(
    world: Processes, device: torch.device, kind: str, payload: int, group: Any = None, members: int = 0
) -> Timing:
    """Time one message size. Collective: call on all ranks; `group` (of `members` ranks) restricts the timed
    collective to this rank's process group."""
    members = members or world.size
    numbers = max(members, payload // 4 // members * members)
    whole = torch.ones(numbers, device=device)
    part = torch.ones(numbers // members, device=device)
    # renamed in torch 2.13; unlike dist.all_gather it does not copy
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def work() -> None:
        if kind == "all_gather":
            gather(whole, part, group=group)
        else:
            dist.all_reduce(whole, group=group)

    for _ in range(WARM_UP):
        once = timed(work, device, world)
    slowest = float(slowest_of(torch.tensor([once]), world))
    burst = int(min(BURST, max(1, BURST_S / slowest)))  # equal on all ranks, as `slowest` is reduced
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
    """Return the mean seconds of `burst` consecutive calls of `work`, which amortizes start skew of ranks."""
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
    """Return the elementwise maximum of `took` over all ranks. Collective: call on all ranks."""
    took = took.double()
    dist.all_reduce(took, op=dist.ReduceOp.MAX, group=world.control)
    return took


def processes_of_a_node(world: Processes) -> int:
    """Return the number of ranks that torchrun started on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def node_group(world: Processes) -> Any:
    """Return the process group of this node's ranks. Collective: call on all ranks."""
    return dist.new_subgroups(processes_of_a_node(world))[0]


def advice(backend: str, nodes: int) -> list[str]:
    """Return notes about the inter-node network, printed before the measurements."""
    if nodes == 1 or backend != "nccl":
        return []
    adapters = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return ["NCCL_IB_DISABLE=1: NCCL uses plain sockets between nodes"]
    if adapters:
        return [f"InfiniBand or RoCE adapters here: {', '.join(adapters)}"]
    return [
        "no InfiniBand or RoCE adapter found: NCCL uses plain sockets between nodes, which is slow; if it "
        "fails to start, set NCCL_IB_DISABLE=1"
    ]
