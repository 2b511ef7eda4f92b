"""Predict step time, bytes sent and memory on 1 to 1,024 GPUs under DDP, FSDP and HSDP (plan.py --scaling).

Bytes are exact (tests/test_scaling.py compares them with the collectives of real runs). Times come from a
model: docs/scaling-arithmetic.md lists its assumptions and their sources.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from nanogpt.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, UnitInterval
from nanogpt.distributed.layout import TURN, Replicated
from nanogpt.errors import UserError
from nanogpt.gpu import chips
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Matrix, Muon, is_for_muon, newton_schulz_cost
from nanogpt.options import BatchOptions, OptimizerOptions
from nanogpt.planning import estimate
from nanogpt.planning.estimate import FLOAT, HALF
from nanogpt.world import World

Mode = Literal["ddp", "fsdp", "hsdp"]
MODES: tuple[Mode, ...] = ("ddp", "fsdp", "hsdp")
BUCKET = 25 << 20  # bytes of gradients per DDP bucket (torch's bucket_cap_mb)
BACKWARD = 2 / 3  # fraction of a micro-batch's FLOPs in the backward pass
# Achievable fraction of data sheet bandwidth. NVLink: NCCL assumes 235 of 300 GB/s on A100 (its tuning.cc).
# Network: 46 to 48 of 50 GB/s per NDR port, 24 of 25 per HDR (NVIDIA, nccl-tests issue 290, nccl issue 412).
OF_LINK, OF_NETWORK, OF_MEMORY = 0.8, 0.9, 0.8
# Latency in microseconds: per collective, per intra-node hop, per inter-node hop (LL128 in NCCL's tuning.cc).
RING, TREE = (10.0, 1.9, 4.0), (4.4, 1.2, 8.5)


@dataclass(frozen=True)
class ClusterOptions(OptimizerOptions, BatchOptions):
    # memory
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, more FLOPs
    loss_chunk_size: NonNegativeInt = 0  # tokens per chunk of the loss; 0: no chunks on GPUs, auto on CPUs
    # hardware
    gpu: str = ""  # GPU model, such as A100, H100 or RTX4090; empty: this machine
    gpus: PositiveInt = 8  # number of data-parallel GPUs, each with the whole model; ignored without --gpu
    gpu_memory: NonNegativeFloat = 0.0  # memory per GPU in GB (1e9 bytes); 0: as in the data sheet
    mfu: Annotated[float, Range(0.001, 1)] = 0.4  # model FLOPs utilization, fraction of the peak
    dollars_per_gpu_hour: NonNegativeFloat = 0.0  # price in dollars; 0: do not print the cost
    # scaling (docs/scaling-arithmetic.md)
    scaling: bool = False  # print step time, efficiency, bytes sent and memory on 1 to 1,024 GPUs
    gpus_per_node: PositiveInt = 8  # number of GPUs per node
    node_gbytes: NonNegativeFloat = 0.0  # GB/s per GPU within a node; 0: 80 % of the data sheet
    network_gbits: NonNegativeFloat = 400.0  # network Gbit/s per GPU: node bandwidth / gpus_per_node
    overlap: UnitInterval = 0.9  # fraction of a pass that can overlap with transfers
    half_tokens: NonNegativeInt = 1250  # micro-batch tokens per GPU at which half of the peak rate is reached
    shard_optimizer: bool = True  # ddp: shard the optimizer state over GPUs (ZeRO-1)

    @property
    def chip(self) -> str:
        return chips.find(self.gpu) or ""

    @property
    def node_bytes_s(self) -> float:
        """Bytes/s that a GPU sends within its node."""
        return self.node_gbytes * 1e9 or OF_LINK * chips.CHIPS[self.chip].link_bytes_s

    @property
    def network_bytes_s(self) -> float:
        """Bytes/s that a GPU sends to other nodes."""
        return OF_NETWORK * self.network_gbits / 8 * 1e9

    def shards(self, mode: Mode, gpus: int) -> int:
        """Return the number of GPUs that share one copy of the weights."""
        return {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, self.gpus_per_node)}[mode]


# ----------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Call:
    """`count` calls of a collective over `payload` bytes in total, on `members` GPUs spread over `nodes`."""

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    payload: float  # full tensors with padding; all_to_all: bytes sent by the busiest member
    members: int
    nodes: int
    when: Literal["forward", "backward", "last", "update"]  # forward, backward: every micro-batch
    count: int = 1

    @property
    def sent(self) -> float:
        """Bytes sent per member."""
        return bus_factor(self.kind, self.members) * self.payload


def bus_factor(kind: str, members: int) -> float:
    """Return the minimum bytes sent per member and byte of payload: the ratio of bus to algorithm bandwidth
    in nccl-tests (its doc/PERFORMANCE.md)."""
    if kind == "all_to_all":  # its payload is defined as the bytes sent
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (members - 1) / members


@functools.cache
def elements(shape: GPTConfig, parts: int = 1) -> tuple[int, int]:
    """Return the weights outside of blocks and those of one block, including the rows that FSDP adds to split
    each tensor evenly into `parts`."""
    named = estimate.one_block(shape).named_parameters()
    padded = {name: -(-len(p) // parts) * parts * p[0].numel() for name, p in named}
    block = sum(number for name, number in padded.items() if name.startswith("h."))
    return sum(padded.values()) - block, block


@functools.cache
def muon_stacks(shape: GPTConfig, options: ClusterOptions, ranks: int) -> list[list[Matrix]]:
    """Return the matrices of Muon with their owners among `ranks`, by shape of the matrix."""
    if options.optimizer != "muon":
        return []
    with torch.device("meta"):
        model = GPT(shape)
        named = [(name, p) for name, p in model.named_parameters() if is_for_muon(name, p)]
        muon = Muon(options, named, model.part_heights(), layout=Replicated(World(size=ranks)))
    return [stack for stack, _ in muon.stacks]


def owned(stack: list[Matrix]) -> Counter[int]:
    """Return the number of elements of the matrices in `stack` that each rank owns."""
    counts: Counter[int] = Counter()
    for matrix in stack:
        counts[matrix.owner] += matrix.height * matrix.width
    return counts


def collectives(
    shape: GPTConfig, options: ClusterOptions, mode: Mode, gpus: int, number_bytes: int = HALF
) -> list[Call]:
    """Return the collectives of a step; those of "forward" and "backward" repeat for each micro-batch.

    Gradients are reduced in float32, once per step. FSDP gathers block weights at `number_bytes` bytes per
    element, other weights in float32.
    """
    if gpus == 1:
        return []
    nodes, parts, layers = -(-gpus // options.gpus_per_node), options.shards(mode, gpus), shape.n_layer
    root, block = elements(shape, parts)
    total = root + layers * block
    stacks = [owned(stack) for stack in muon_stacks(shape, options, gpus if mode == "ddp" else parts)]
    by_muon = sum(counts.total() for counts in stacks)
    if mode == "ddp":
        buckets = -(-FLOAT * total // BUCKET)
        calls = [Call("all_reduce", FLOAT * total, gpus, nodes, "last", buckets)]
        if options.shard_optimizer:  # ZeRO-1; Muon's updates are padded to the most that one GPU owns
            rest = total - by_muon
            calls.append(Call("all_gather", FLOAT * rest, gpus, nodes, "update", -(-rest // TURN)))
            padded = gpus * sum(max(counts.values()) for counts in stacks)
            calls.append(Call("all_gather", number_bytes * padded, gpus, nodes, "update", len(stacks)))
        return calls
    where = parts, nodes if mode == "fsdp" else 1
    gathered = number_bytes * layers * block
    calls = [
        Call("all_gather", FLOAT * root, *where, "forward"),
        Call("all_gather", gathered, *where, "forward", layers),
        Call("all_gather", gathered, *where, "backward", layers),
        Call("reduce_scatter", FLOAT * total, *where, "last", layers + 1),
    ]
    if stacks:  # gradients in float32 to the owners, updates back
        max_owned = max(sum(stacks, Counter()).values())
        sent = (FLOAT * (by_muon - max_owned) + number_bytes * max_owned * (parts - 1)) / parts
        calls.append(Call("all_to_all", sent, *where, "update", 2 * len(stacks)))
    if mode == "hsdp" and nodes > 1:
        calls.append(Call("all_reduce", FLOAT * total / parts, nodes, nodes, "last", layers + 1))
    return calls


def bytes_sent(calls: list[Call], micro_batches: int) -> float:
    """Return the bytes a GPU sends in a step of `micro_batches`."""
    return sum(call.sent * (micro_batches if call.when in ("forward", "backward") else 1) for call in calls)


# ----------------------------------------------------------------------------- time


def call_s(call: Call, options: ClusterOptions) -> float:
    """Return the seconds of `call`. Between nodes, all participating GPUs of a node share the load; in an
    all-to-all each sends its own data, nearly all of it out of the node."""
    rate = options.node_bytes_s
    if call.nodes > 1:
        ports = 1 if call.kind == "all_to_all" else call.members / call.nodes
        rate = min(rate, options.network_bytes_s * ports)
    return call.sent / rate + call.count * latency_s(call)


def latency_s(call: Call) -> float:
    """Return the latency of one collective: of a ring or, for all-reduce, a tree if faster (the model of
    NCCL's src/graph/tuning.cc)."""
    twice = 2 if call.kind == "all_reduce" else 1
    base, inside, between = RING
    ring = base + twice * ((call.members - call.nodes) * inside + (call.nodes - 1) * between)
    base, inside, between = TREE
    tree = base + 2 * ((call.members / call.nodes - 1) * inside + math.log2(call.nodes) * between)
    return (min(ring, tree) if call.kind == "all_reduce" else ring) * 1e-6


def exposed_s(passes: float, transfers: float, first: float, overlap: float) -> float:
    """Return the seconds of `transfers` not hidden by `passes` seconds of compute: `first`, which overlaps
    with nothing, plus what exceeds the fraction `overlap` of `passes`."""
    return first + max(0.0, transfers - first - overlap * passes)


def compute_s(shape: GPTConfig, options: ClusterOptions, sequences: int) -> float:
    """Return the seconds of forward and backward of one micro-batch. The rate for t tokens is proportional to
    t / (t + half_tokens), and equals `mfu` for a full micro-batch."""
    tokens, full = sequences * shape.block_size, options.micro_batch_size * shape.block_size
    filled = tokens / (tokens + options.half_tokens) * (full + options.half_tokens) / full
    peak = chips.CHIPS[options.chip].peak
    return tokens * estimate.flops_per_token(shape) / (peak * options.mfu * filled)


def update_s(shape: GPTConfig, options: ClusterOptions, mode: Mode, gpus: int) -> float:
    """Return the seconds of clipping and optimizer step. Clipping reads gradients twice and writes them once,
    AdamW reads four and writes three elements per parameter, at memory bandwidth; Muon's matmuls run at half
    of the peak."""
    numbers, shards = estimate.parameters(shape).total, options.shards(mode, gpus)
    parts = gpus if mode == "ddp" and options.shard_optimizer else shards
    moved = FLOAT * numbers * (3 / shards + 7 / parts)
    matrices = [matrix for stack in muon_stacks(shape, options, parts) for matrix in stack]
    flops = sum(2 * options.muon_ns_steps * newton_schulz_cost(m.height, m.width) for m in matrices)
    chip, owners = chips.CHIPS[options.chip], max(1, min(parts, len(matrices)))
    return moved / (OF_MEMORY * chip.memory_bytes_s) + flops / owners / (0.5 * chip.peak)


@dataclass(frozen=True)
class Step:
    """Predicted times, bytes sent and memory of a GPU in one step."""

    tokens: int  # maximum tokens per GPU
    compute_s: float  # forward and backward passes
    exposed_s: float  # transfers not overlapped with compute
    update_s: float  # gradient clipping and optimizer
    sent: float  # bytes
    memory: estimate.Memory

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s + self.update_s


def predict(
    shape: GPTConfig, options: ClusterOptions, mode: Mode, gpus: int, compiled: bool = False
) -> Step | None:
    """Predict a step on `gpus` GPUs; None if there are fewer sequences than GPUs. `compiled`: with the
    memory of kernels of torch.compile."""
    batch = options.batch_tokens // shape.block_size or options.sequences_per_iteration
    if batch < gpus:
        return None
    sequences = -(-batch // gpus)
    whole, rest = divmod(sequences, options.micro_batch_size)
    sizes = [options.micro_batch_size] * whole + [rest] * bool(rest)
    compute = [compute_s(shape, options, size) for size in sizes]
    calls = collectives(shape, options, mode, gpus)
    took = dict.fromkeys(("forward", "backward", "last", "update"), 0.0)
    alone = took.copy()  # no compute overlaps the first gathers and the last bucket
    for call in calls:
        took[call.when] += call_s(call, options)
        alone[call.when] += call_s(call, options) / max(1, call.count)
    exposed = took["update"]
    for passes in compute:
        exposed += exposed_s((1 - BACKWARD) * passes, took["forward"], alone["forward"], options.overlap)
    for passes in compute[:-1]:
        exposed += exposed_s(BACKWARD * passes, took["backward"], alone["backward"], options.overlap)
    last, ends = took["backward"] + took["last"], alone["backward"] + alone["last"]
    exposed += exposed_s(BACKWARD * compute[-1], last, ends, options.overlap)
    return Step(
        sequences * shape.block_size,
        sum(compute),
        exposed,
        update_s(shape, options, mode, gpus),
        bytes_sent(calls, len(sizes)),
        memory(shape, options, mode, gpus, sizes, compiled=compiled),
    )


# ----------------------------------------------------------------------------- memory


def memory(
    shape: GPTConfig,
    options: ClusterOptions,
    mode: Mode,
    gpus: int,
    sizes: list[int],
    number_bytes: int = HALF,
    compiled: bool = False,
) -> estimate.Memory:
    """Return the memory of the GPU with the highest use, for micro-batches of `sizes` sequences at
    `number_bytes` bytes per element.

    FSDP shards tensors by rows; it holds the root parameters and up to three blocks gathered, the gradients
    of one block and, with several micro-batches, all unsharded gradients until the last one reduces them. Its
    LM head and loss are not compiled.
    """
    plain = estimate.memory(
        shape,
        options,
        max(sizes),
        number_bytes,
        options.activation_checkpointing,
        loss_chunk_size=options.loss_chunk_size,
        compiled=compiled and (mode == "ddp" or gpus == 1),
    )
    if mode == "ddp" or gpus == 1:
        return replicated(plain, options, gpus, len(sizes))
    parts = options.shards(mode, gpus)
    root, block = elements(shape, parts)
    padded = root + shape.n_layer * block
    buffers = plain.buffers + FLOAT * root + (4 * number_bytes + FLOAT) * block
    buffers += plain.gradients if len(sizes) > 1 else 0
    return replace(
        plain,
        weights=FLOAT * padded // parts,
        gradients=FLOAT * padded // parts,
        optimizer=math.ceil(plain.optimizer * padded / parts / estimate.parameters(shape).total),
        copies=0 if number_bytes == FLOAT else number_bytes * elements(shape)[0],
        buffers=buffers,
    )


def replicated(need: estimate.Memory, options: ClusterOptions, gpus: int, passes: int) -> estimate.Memory:
    """Return the memory of each of `gpus` GPUs under DDP, given the `need` of one alone and the number of
    micro-batches (`passes`); if there are several, gradients accumulate outside of the buckets that the last
    one sends."""
    state = need.optimizer // (gpus if options.shard_optimizer else 1)
    accumulated = need.gradients * (gpus > 1 and passes > 1)
    return replace(need, optimizer=state, buffers=need.buffers + accumulated)


# ----------------------------------------------------------------------------- table


def table(shape: GPTConfig, options: ClusterOptions, compiled: bool) -> Iterator[str]:
    """Yield the lines of a Markdown table, one row per number of GPUs, with values for DDP / FSDP / HSDP."""
    linked = [name for name, chip in chips.CHIPS.items() if chip.link_bytes_s]
    if options.chip not in linked:
        raise UserError(f"--scaling needs a --gpu with known links: {', '.join(linked)}")
    if shape.ngram_orders:
        raise UserError("--scaling does not model n-gram tables; remove --ngram_orders")
    if not options.network_gbits:
        raise UserError("--network_gbits=0 connects no nodes; give Gbit/s per GPU, such as 400 or 12.5")
    node, network = options.node_bytes_s / 1e9, options.network_bytes_s / 1e9
    sharded = "shards" if options.shard_optimizer else "does not shard"
    yield "\nscaling, each value for DDP / FSDP / HSDP (assumptions: docs/scaling-arithmetic.md), per GPU:"
    yield f"- an MFU of {options.mfu:.0%} for micro-batches of {options.batch_size} sequences"
    yield f"- {node:.0f} GB/s within its node of {options.gpus_per_node} and {network:.1f} GB/s between nodes"
    yield f"- transfers overlap with up to {options.overlap:.0%} of the pass that runs at the same time"
    yield f"- DDP {sharded} the optimizer state (ZeRO-1)\n"
    yield "| GPUs | tokens/GPU | step, ms | efficiency | exposed comm, ms | sent/GPU, GB | memory/GPU, GB |"
    yield "|---|---|---|---|---|---|---|"
    alone = predict(shape, options, "ddp", 1, compiled)
    assert alone
    for gpus in (2**power for power in range(11)):
        steps = [step for mode in MODES if (step := predict(shape, options, mode, gpus, compiled))]
        if not steps:
            yield f"| {gpus:,} | fewer than one sequence per GPU: raise --batch_tokens | | | | | |"
            continue
        cells = [
            [f"{step.seconds * 1e3:,.1f}" for step in steps],
            [f"{alone.seconds / (step.seconds * gpus):.0%}" for step in steps],
            [f"{step.exposed_s * 1e3:,.1f}" for step in steps],
            [f"{step.sent / 1e9:.2f}" for step in steps],
            [f"{step.memory.total / 1e9:.1f}" for step in steps],
        ]
        shown = [row[0] if gpus == 1 else " / ".join(row) for row in cells]
        yield f"| {gpus:,} | {steps[0].tokens:,} | {' | '.join(shown)} |"
