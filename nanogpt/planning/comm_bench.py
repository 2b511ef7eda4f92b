"""Benchmark all-reduce and all-gather between the ranks of a run, by message size (bench.py --comm)."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanogpt.distributed.world import Processes
from nanogpt.planning.scaling import BUCKET, bus_factor
from nanogpt.runtime import Machine

SMALLEST = 1 << 12  # smallest message in bytes; each size is 4 times the previous one
WARM_UP = 3
AIM_S = 0.5  # time limit per size, in seconds
REPEATS = (5, 50)  # minimum and maximum number of samples per size
BURST, BURST_S = 50, 2e-3  # maximum calls per sample, and target duration of a sample in seconds
INFINIBAND = Path("/sys/class/infiniband")  # Linux lists InfiniBand and RoCE adapters here


def benchmark(world: Processes, machine: Machine, largest: int) -> float:
    """Print a table of timings, for messages of up to `largest` bytes between all ranks and between those of
    a node. Return the bus bandwidth in bytes/s of the largest all-reduce that DDP sends. Collective."""
    groups = [("all", None, world.size)]
    if 1 < world.on_node < world.size and world.size % world.on_node == 0:
        groups.append(("of a node", dist.new_subgroups(world.on_node)[0], world.on_node))
    print("| ranks | collective | bytes | median | 10th to 90th percentile | GB/s | bus GB/s |")
    print("|---|---|---|---|---|---|---|")
    of_ddp = 0.0
    for name, group, members in groups:
        for kind in ("all_reduce", "all_gather"):
            size = SMALLEST
            while size <= max(largest, SMALLEST):
                numbers = max(members, size // 4 // members * members)
                seconds = measure(world, machine, kind, numbers, group)
                low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9])
                rate = 4 * numbers / median
                bus = bus_factor(kind, members) * rate
                print(
                    f"| {members} {name} | {kind} | {4 * numbers:,} | {median * 1e6:,.0f} µs | "
                    f"{low * 1e6:,.0f} to {high * 1e6:,.0f} µs | {rate / 1e9:.3f} | {bus / 1e9:.3f} |"
                )
                if kind == "all_reduce" and group is None and size <= BUCKET:
                    of_ddp = bus
                size *= 4
    print("bus: bus bandwidth per rank as defined by nccl-tests; compare it with the link bandwidth")
    return of_ddp


def measure(world: Processes, machine: Machine, kind: str, numbers: int, group: Any) -> np.ndarray:
    """Return the seconds of a collective over `numbers` float32 elements in all, several samples of the
    slowest rank. `group`: this rank's process group; None: all ranks. Collective."""
    whole = torch.full((numbers,), 0.0, device=machine.device)
    part = whole[: numbers // dist.get_world_size(group)].clone()
    # renamed in torch 2.13; unlike dist.all_gather it does not copy
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def timed(burst: int) -> float:
        """Return the mean seconds of consecutive calls, which amortize the start skew of ranks."""
        dist.barrier(group=world.control)
        machine.synchronize()
        started = time.perf_counter()
        for _ in range(burst):
            if kind == "all_gather":
                gather(whole, part, group=group)
            else:
                dist.all_reduce(whole, group=group)
        machine.synchronize()
        return (time.perf_counter() - started) / burst

    once = max(world.gather([timed(1) for _ in range(WARM_UP)][-1]))
    burst = int(min(BURST, max(1, BURST_S / once)))  # equal on all ranks, as `once` is
    repeats = int(min(REPEATS[1], max(REPEATS[0], AIM_S / (once * burst))))
    return np.max(world.gather([timed(burst) for _ in range(repeats)]), axis=0)


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
