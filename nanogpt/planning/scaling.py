"""A step on many GPUs, on paper: time, memory, efficiency under DDP, FSDP and HSDP.

Bytes are exact (comm_volume.py). Times are a model, as good as what it rests on: `assumptions` says it in
words, docs/scaling-arithmetic.md has the reasons.
"""

import math
from dataclasses import dataclass, replace

from nanogpt.model import GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.planning import estimate
from nanogpt.planning.comm_volume import BUCKET, Call, Mode, World, bus_factor, calls, tensors, wire_bytes
from nanogpt.planning.estimate import FLOAT, HALF

WHEN = ("forward", "backward", "last", "update")  # of each micro-batch, of the last, after them
BACKWARD = 2 / 3  # of the arithmetic of a micro-batch
# What a link gives of its data sheet. NVLink: nccl holds A100 to 235 of 300 GB/s (its tuning.cc). Network:
# 46 to 48 of the 50 GB/s of an NDR port, 24 of 25 of HDR (NVIDIA in issues 290 of nccl-tests, 412 of nccl).
OF_LINK, OF_NETWORK, OF_MEMORY = 0.8, 0.9, 0.8
# Microseconds of a collective, of a hop in a node, of one between nodes (LL128 of nccl's tuning.cc).
RING, TREE = (10.0, 1.9, 4.0), (4.4, 1.2, 8.5)


@dataclass(frozen=True)
class Chip:
    """Of a GPU's data sheet, in bytes a second: its memory, and what it sends to the others of its node."""

    memory: float
    link: float  # NVLink, or PCI Express x16; one direction, where data sheets add up both


CHIPS = {  # names as in gpu/chips.py
    "A100": Chip(2.04e12, 300e9),
    "H100 PCIe": Chip(2.0e12, 64e9),
    "H100 NVL": Chip(3.9e12, 64e9),
    "H100": Chip(3.35e12, 450e9),
    "H200": Chip(4.8e12, 450e9),
    "B200": Chip(8e12, 900e9),
    "RTX 3090": Chip(0.936e12, 32e9),
    "RTX 4090 Laptop": Chip(0.576e12, 32e9),
    "RTX 4090": Chip(1.008e12, 32e9),
}


# ----------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Network:
    """Bytes a second that a GPU sends: to its node, and out of it."""

    node: float
    between: float

    def bandwidth(self, call: Call) -> float:
        """Bus bandwidth: between nodes all GPUs of a node that take part send at once; in an all-to-all each
        sends nearly everything out of its node by itself."""
        if call.nodes == 1:
            return self.node
        if call.kind == "all_to_all":
            return min(self.node, self.between)
        return min(self.node, self.between * call.members / call.nodes)

    def seconds(self, call: Call) -> float:
        return call.wire / self.bandwidth(call) + call.count * latency_s(call)


def latency_s(call: Call) -> float:
    """Of one collective, however small: a ring's hops, or a tree's where that is possible and less (the model
    of nccl's src/graph/tuning.cc)."""
    twice = 2 if call.kind == "all_reduce" else 1
    base, inside, between = RING
    ring = base + twice * ((call.members - call.nodes) * inside + (call.nodes - 1) * between)
    base, inside, between = TREE
    tree = base + 2 * ((call.members / call.nodes - 1) * inside + math.log2(call.nodes) * between)
    return (min(ring, tree) if call.kind == "all_reduce" else ring) * 1e-6


@dataclass(frozen=True)
class Setting:
    """What a prediction rests on, beside model and optimizer."""

    batch: int  # windows an iteration, of all GPUs
    batch_size: int  # windows a micro-batch, at most
    peak: float  # FLOP/s of a GPU by its data sheet
    memory_bandwidth: float  # bytes a second of its memory, by the data sheet
    network: Network
    gpus_per_node: int = 8
    mfu: float = 0.4  # share of the peak that a full micro-batch reaches
    overlap: float = 0.9  # share of the arithmetic behind which a transfer can hide
    half_tokens: int = 1250  # a micro-batch of so many tokens reaches half of the rate of a very long one
    sharded_state: bool = True  # DDP: each GPU has its part of the optimizer's state
    recompute: bool = False  # blocks run again in the backward pass, which is for `mfu` to know
    loss_chunk_size: int = 0  # tokens whose logits are there at once; 0: all

    def compute_s(self, shape: GPTConfig, windows: int) -> float:
        """Forward and backward pass of one micro-batch. Short ones fill the GPU less: the rate goes with
        t / (t + half_tokens) for t tokens, and is `mfu` for a full micro-batch."""
        tokens, full = windows * shape.block_size, self.batch_size * shape.block_size
        filled = tokens / (tokens + self.half_tokens) * (full + self.half_tokens) / full
        return tokens * estimate.flops_per_token(shape) / (self.peak * self.mfu * filled)


@dataclass(frozen=True)
class Step:
    """What is foretold of a GPU in a step."""

    world: World
    mode: Mode
    tokens: int  # of the GPU that has the most
    compute_s: float  # forward and backward passes
    transfer_s: float  # all transfers, hidden or not
    exposed_s: float  # those that are waited for
    update_s: float  # clipping and optimizer
    wire: float  # bytes it sends
    memory: estimate.Memory

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s + self.update_s


def exposed_s(passes: float, transfers: float, first: float, overlap: float) -> float:
    """Of `transfers` seconds beside `passes` of arithmetic, those that are waited for: `first`, which nothing
    runs beside, and what does not fit behind the share `overlap`."""
    return first + max(0.0, transfers - first - overlap * passes)


def predict(
    shape: GPTConfig, rules: OptimizerOptions, mode: Mode, gpus: int, setting: Setting
) -> Step | None:
    """A step on `gpus` GPUs; None where there is not a window for each."""
    windows = -(-setting.batch // gpus)
    if setting.batch < gpus:
        return None
    world, network = World(gpus, setting.gpus_per_node), setting.network
    whole, rest = divmod(windows, setting.batch_size)
    sizes = [setting.batch_size] * whole + [rest] * bool(rest)
    found = calls(shape, rules, mode, world, HALF, setting.sharded_state)
    compute = [setting.compute_s(shape, size) for size in sizes]
    during = {when: [call for call in found if call.when == when] for when in WHEN}
    took = {when: sum(map(network.seconds, some)) for when, some in during.items()}
    # Nothing runs beside the first gathers (of what is outside of blocks, of a block) and the last bucket.
    alone = {when: sum(network.seconds(call) / call.count for call in some) for when, some in during.items()}
    exposed = took["update"]
    for number, passes in enumerate(compute):
        exposed += exposed_s((1 - BACKWARD) * passes, took["forward"], alone["forward"], setting.overlap)
        behind, ends = took["backward"], alone["backward"]
        if number == len(compute) - 1:
            behind, ends = behind + took["last"], ends + alone["last"]
        exposed += exposed_s(BACKWARD * passes, behind, ends, setting.overlap)
    transfer = (took["forward"] + took["backward"]) * len(sizes) + took["last"] + took["update"]
    return Step(
        world,
        mode,
        windows * shape.block_size,
        sum(compute),
        transfer,
        exposed,
        update_s(shape, rules, mode, world, setting),
        wire_bytes(found, len(sizes)),
        memory(
            shape,
            rules,
            mode,
            world,
            sizes,
            setting.sharded_state,
            recompute=setting.recompute,
            loss_chunk_size=setting.loss_chunk_size,
        ),
    )


def efficiency(step: Step, alone: Step) -> float:
    """Tokens a second and GPU, against one GPU that does the batch by itself."""
    return alone.seconds / (step.seconds * step.world.gpus)


def update_s(shape: GPTConfig, rules: OptimizerOptions, mode: Mode, world: World, setting: Setting) -> float:
    """Clipping reads every gradient twice and writes it, AdamW reads four numbers a parameter and writes
    three, at the memory's speed; Muon's products run at half of the peak."""
    numbers = estimate.parameters(shape).total
    parts = world.gpus if mode == "ddp" and setting.sharded_state else world.shards(mode)
    clipped = numbers / world.shards(mode)
    moved = FLOAT * (3 * clipped + 7 * numbers / parts)
    seconds = moved / (OF_MEMORY * setting.memory_bandwidth)
    if rules.optimizer == "muon":
        matrices = [s for s in tensors(shape)[1].shapes if len(s) == 2] * shape.n_layer
        each = sum(newton_schulz_flops(s[0], s[1], rules.muon_ns_steps) for s in matrices)
        seconds += each / min(parts, len(matrices)) / (0.5 * setting.peak)
    return seconds


def newton_schulz_flops(rows: int, columns: int, turns: int) -> int:
    """Of Muon's Newton-Schulz iteration (Jordan et al. 2024): three products a turn."""
    low, high = sorted((rows, columns))
    return turns * (4 * low * low * high + 2 * low**3)


@dataclass(frozen=True)
class Fed:
    """How a DDP step and a measured network get on."""

    wire: float  # bytes a process sends
    transfer_s: float
    exposed_s: float
    efficiency: float  # share of the time that is arithmetic
    enough: int  # micro-batches an iteration with which it is WELL_FED


WELL_FED = 0.9


def feeds(
    shape: GPTConfig, members: int, bandwidth: float, pass_s: float, micro_batches: int, overlap: float
) -> Fed:
    """Whether a bus of `bandwidth` bytes a second can reduce the gradients of `members` behind the last of so
    many micro-batches of `pass_s` seconds each."""
    size = FLOAT * estimate.parameters(shape).total
    wire = bus_factor("all_reduce", members) * size
    transfer = wire / bandwidth
    last = transfer / -(-size // BUCKET)  # of the buckets
    waited = exposed_s(BACKWARD * pass_s, transfer, last, overlap)
    busy = micro_batches * pass_s
    enough = math.ceil(waited * WELL_FED / (1 - WELL_FED) / pass_s)
    return Fed(wire, transfer, waited, busy / (busy + waited), max(1, enough))


# ----------------------------------------------------------------------------- memory


def memory(
    shape: GPTConfig,
    rules: OptimizerOptions,
    mode: Mode,
    world: World,
    sizes: list[int],
    sharded_state: bool = True,
    number_bytes: int = HALF,
    recompute: bool = False,
    loss_chunk_size: int = 0,
) -> estimate.Memory:
    """Bytes on the GPU that has the most, which computes micro-batches of `sizes` windows in numbers of
    `number_bytes`.

    DDP sends gradients from where they are. FSDP cuts tensors by rows; it holds what is outside of blocks and
    up to three blocks gathered, the gradients of one, and with several micro-batches all gradients whole
    until the last one reduces them.
    """
    plain = estimate.memory(
        shape, rules, max(sizes), number_bytes, recompute, loss_chunk_size=loss_chunk_size
    )
    if world.gpus == 1:
        return plain
    if mode == "ddp":
        state = plain.optimizer // world.gpus if sharded_state else plain.optimizer
        return replace(plain, optimizer=state)
    parts = world.shards(mode)
    root, block = tensors(shape)
    padded = root.numbers(parts) + shape.n_layer * block.numbers(parts)
    share = padded / parts / estimate.parameters(shape).total
    buffers = FLOAT * root.numbers(parts) + (4 * number_bytes + FLOAT) * block.numbers(parts)
    buffers += plain.gradients if len(sizes) > 1 else 0
    return replace(
        plain,
        weights=FLOAT * padded // parts,
        gradients=FLOAT * padded // parts,
        optimizer=math.ceil(plain.optimizer * share),
        copies=0 if number_bytes == FLOAT else number_bytes * root.numbers(),
        buffers=buffers,
    )


def assumptions(setting: Setting) -> list[str]:
    """What the times rest on, in words."""
    network = setting.network
    return [
        f"an MFU of {setting.mfu:.0%} is reached by a full micro-batch of {setting.batch_size} windows; the "
        f"rate of a shorter one of t tokens goes with t / (t + {setting.half_tokens:,})",
        f"a GPU sends {network.node / 1e9:.0f} GB/s to the {setting.gpus_per_node} of its node and "
        f"{network.between / 1e9:.1f} GB/s out of it; latencies are those of nccl's own model",
        f"transfers hide behind {setting.overlap:.0%} of the passes beside which they run; the first gathers "
        f"and the last bucket hide behind nothing",
        "gradients are reduced in float32 once an iteration; FSDP gathers blocks in bfloat16 for each pass "
        "of each micro-batch, and the rest in float32; HSDP does so in a node and reduces between nodes",
        "DDP shares the optimizer's state (ZeRO-1) and gathers the weights after the update"
        if setting.sharded_state
        else "DDP: every GPU has the optimizer's whole state",
        f"clipping and optimizer run at {OF_MEMORY:.0%} of the memory's "
        f"{setting.memory_bandwidth / 1e12:.2f} TB/s; reading data, logging and saving cost nothing",
    ]
