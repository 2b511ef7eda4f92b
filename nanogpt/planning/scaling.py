"""Predict step time, memory and efficiency on many GPUs under DDP, FSDP and HSDP.

Byte counts are exact (comm_volume.py). Times come from a model: `assumptions` lists its assumptions,
docs/scaling-arithmetic.md their sources.
"""

import math
from dataclasses import dataclass, replace

from nanogpt.model import GPTConfig
from nanogpt.options import OptimizerOptions
from nanogpt.planning import estimate
from nanogpt.planning.comm_volume import BUCKET, Call, Mode, World, bus_factor, calls, tensors, wire_bytes
from nanogpt.planning.estimate import FLOAT, HALF

WHEN = ("forward", "backward", "last", "update")  # phases; forward, backward: every micro-batch
BACKWARD = 2 / 3  # fraction of a micro-batch's FLOPs in the backward pass
# Achievable fraction of data sheet bandwidth. NVLink: NCCL assumes 235 of 300 GB/s on A100 (its tuning.cc).
# Network: 46 to 48 of 50 GB/s per NDR port, 24 of 25 per HDR (NVIDIA, nccl-tests issue 290, nccl issue 412).
OF_LINK, OF_NETWORK, OF_MEMORY = 0.8, 0.9, 0.8
# Latency in microseconds: per collective, per intra-node hop, per inter-node hop (LL128 in NCCL's tuning.cc).
RING, TREE = (10.0, 1.9, 4.0), (4.4, 1.2, 8.5)


@dataclass(frozen=True)
class Chip:
    """Data sheet bandwidths of a GPU in bytes/s: memory, and link to the other GPUs of its node."""

    memory: float
    link: float  # NVLink or PCIe x16, one direction (data sheets give the sum of both)


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
    """Bandwidth per GPU in bytes/s, within a node and between nodes."""

    node: float
    between: float

    def bandwidth(self, call: Call) -> float:
        """Return the bus bandwidth of `call`. Between nodes, all participating GPUs of a node share the load;
        in an all-to-all each sends its own data, nearly all of it out of the node."""
        if call.nodes == 1:
            return self.node
        if call.kind == "all_to_all":
            return min(self.node, self.between)
        return min(self.node, self.between * call.members / call.nodes)

    def seconds(self, call: Call) -> float:
        return call.wire / self.bandwidth(call) + call.count * latency_s(call)


def latency_s(call: Call) -> float:
    """Return the latency of one collective: of a ring or, for all-reduce, a tree if faster (the model of
    NCCL's src/graph/tuning.cc)."""
    twice = 2 if call.kind == "all_reduce" else 1
    base, inside, between = RING
    ring = base + twice * ((call.members - call.nodes) * inside + (call.nodes - 1) * between)
    base, inside, between = TREE
    tree = base + 2 * ((call.members / call.nodes - 1) * inside + math.log2(call.nodes) * between)
    return (min(ring, tree) if call.kind == "all_reduce" else ring) * 1e-6


@dataclass(frozen=True)
class Setting:
    """Inputs of a prediction besides model and optimizer."""

    batch: int  # sequences per iteration, over all GPUs
    batch_size: int  # maximum sequences per micro-batch
    peak: float  # FLOP/s per GPU, data sheet
    memory_bandwidth: float  # bytes/s per GPU, data sheet
    network: Network
    gpus_per_node: int = 8
    mfu: float = 0.4  # fraction of the peak reached by a full micro-batch
    overlap: float = 0.9  # fraction of the compute time that can overlap with transfers
    half_tokens: int = 1250  # micro-batch size in tokens that reaches half of the asymptotic rate
    sharded_state: bool = True  # DDP: optimizer state sharded over GPUs (ZeRO-1)
    recompute: bool = False  # activation checkpointing; its cost must be included in `mfu`
    loss_chunk_size: int = 0  # tokens per chunk of the loss; 0: all
    compiled: bool = False  # memory of torch.compile's kernels

    def compute_s(self, shape: GPTConfig, sequences: int) -> float:
        """Return the seconds of forward and backward of one micro-batch. The rate for t tokens is
        proportional to t / (t + half_tokens), and equals `mfu` for a full micro-batch."""
        tokens, full = sequences * shape.block_size, self.batch_size * shape.block_size
        filled = tokens / (tokens + self.half_tokens) * (full + self.half_tokens) / full
        return tokens * estimate.flops_per_token(shape) / (self.peak * self.mfu * filled)


@dataclass(frozen=True)
class Step:
    """Predicted times, bytes sent and memory of a GPU in one step."""

    world: World
    mode: Mode
    tokens: int  # maximum tokens per GPU
    compute_s: float  # forward and backward passes
    transfer_s: float  # all transfers, overlapped or not
    exposed_s: float  # transfers not overlapped with compute
    update_s: float  # gradient clipping and optimizer
    wire: float  # bytes sent
    memory: estimate.Memory

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s + self.update_s


def exposed_s(passes: float, transfers: float, first: float, overlap: float) -> float:
    """Return the seconds of `transfers` not hidden by `passes` seconds of compute: `first`, which overlaps
    with nothing, plus what exceeds the fraction `overlap` of `passes`."""
    return first + max(0.0, transfers - first - overlap * passes)


def predict(
    shape: GPTConfig, rules: OptimizerOptions, mode: Mode, gpus: int, setting: Setting
) -> Step | None:
    """Predict a step on `gpus` GPUs. Return None if there are fewer sequences than GPUs."""
    sequences = -(-setting.batch // gpus)
    if setting.batch < gpus:
        return None
    world, network = World(gpus, setting.gpus_per_node), setting.network
    whole, rest = divmod(sequences, setting.batch_size)
    sizes = [setting.batch_size] * whole + [rest] * bool(rest)
    found = calls(shape, rules, mode, world, HALF, setting.sharded_state)
    compute = [setting.compute_s(shape, size) for size in sizes]
    during = {when: [call for call in found if call.when == when] for when in WHEN}
    took = {when: sum(map(network.seconds, some)) for when, some in during.items()}
    # No compute overlaps the first gathers (root parameters, first block) and the last bucket.
    alone = {when: sum(network.seconds(call) / call.count for call in some) for when, some in during.items()}
    exposed = took["update"]
    for number, passes in enumerate(compute):
        exposed += exposed_s((1 - BACKWARD) * passes, took["forward"], alone["forward"], setting.overlap)
        behind, ends = took["backward"], alone["backward"]
        if number == len(compute) - 1:
            behind, ends = behind + took["last"], ends + alone["last"]
        exposed += exposed_s(BACKWARD * passes, behind, ends, setting.overlap)
    how = (setting.sharded_state, HALF, setting.recompute, setting.loss_chunk_size, setting.compiled)
    transfer = (took["forward"] + took["backward"]) * len(sizes) + took["last"] + took["update"]
    return Step(
        world,
        mode,
        sequences * shape.block_size,
        sum(compute),
        transfer,
        exposed,
        update_s(shape, rules, mode, world, setting),
        wire_bytes(found, len(sizes)),
        memory(shape, rules, mode, world, sizes, *how),
    )


def efficiency(step: Step, alone: Step) -> float:
    """Return tokens/s per GPU relative to a single GPU running the whole batch."""
    return alone.seconds / (step.seconds * step.world.gpus)


def update_s(shape: GPTConfig, rules: OptimizerOptions, mode: Mode, world: World, setting: Setting) -> float:
    """Return the seconds of clipping and optimizer step. Clipping reads gradients twice and writes them once,
    AdamW reads four and writes three elements per parameter, at memory bandwidth; Muon's matmuls run at half
    of the peak."""
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
    """Return the FLOPs of `turns` Newton-Schulz iterations of Muon (Jordan et al. 2024): 3 matmuls each."""
    low, high = sorted((rows, columns))
    return turns * (4 * low * low * high + 2 * low**3)


@dataclass(frozen=True)
class Fed:
    """Communication cost of a DDP step on a measured network."""

    wire: float  # bytes sent per rank
    transfer_s: float
    exposed_s: float
    efficiency: float  # fraction of the step spent in compute
    enough: int  # micro-batches per iteration needed for an efficiency of WELL_FED


WELL_FED = 0.9


def feeds(
    shape: GPTConfig, members: int, bandwidth: float, pass_s: float, micro_batches: int, overlap: float
) -> Fed:
    """Estimate how far a gradient all-reduce over `members` ranks at bus bandwidth `bandwidth` (bytes/s)
    overlaps with the last of `micro_batches` passes of `pass_s` seconds each."""
    size = FLOAT * estimate.parameters(shape).total
    wire = bus_factor("all_reduce", members) * size
    transfer = wire / bandwidth
    last = transfer / -(-size // BUCKET)  # time of one bucket
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
    compiled: bool = False,
) -> estimate.Memory:
    """Return the memory of the GPU with the highest use, for micro-batches of `sizes` sequences at
    `number_bytes` bytes per element.

    With several micro-batches DDP accumulates gradients outside of the buckets that the last one sends. FSDP
    shards tensors by rows; it holds the root parameters and up to three blocks gathered, the gradients of one
    block and, with several micro-batches, all unsharded gradients until the last one reduces them. Its LM
    head and loss are not compiled.
    """
    how = (recompute, False, loss_chunk_size, compiled and (mode == "ddp" or world.gpus == 1))
    plain = estimate.memory(shape, rules, max(sizes), number_bytes, *how)
    if world.gpus == 1:
        return plain
    if mode == "ddp":
        state = plain.optimizer // world.gpus if sharded_state else plain.optimizer
        buffers = plain.buffers + plain.gradients * (len(sizes) > 1)
        return replace(plain, optimizer=state, buffers=buffers)
    parts = world.shards(mode)
    root, block = tensors(shape)
    padded = root.numbers(parts) + shape.n_layer * block.numbers(parts)
    share = padded / parts / estimate.parameters(shape).total
    buffers = plain.buffers + FLOAT * root.numbers(parts)
    buffers += (4 * number_bytes + FLOAT) * block.numbers(parts)
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
    """Describe the assumptions behind the predicted times."""
    network = setting.network
    return [
        f"MFU is {setting.mfu:.0%} for a full micro-batch of {setting.batch_size} sequences; for t tokens "
        f"the rate is proportional to t / (t + {setting.half_tokens:,})",
        f"each GPU sends {network.node / 1e9:.0f} GB/s within its node of {setting.gpus_per_node} and "
        f"{network.between / 1e9:.1f} GB/s between nodes; latencies follow NCCL's tuning model",
        f"transfers overlap with up to {setting.overlap:.0%} of the concurrent pass; the first gathers and "
        f"the last bucket do not overlap",
        "gradients are reduced in float32 once per iteration; FSDP gathers blocks in bfloat16 for each pass "
        "of each micro-batch, the rest in float32; HSDP does so within a node and reduces between nodes",
        "DDP shards the optimizer state (ZeRO-1) and all-gathers the weights after the update"
        if setting.sharded_state
        else "DDP: every GPU holds the full optimizer state",
        f"clipping and optimizer run at {OF_MEMORY:.0%} of the memory bandwidth of "
        f"{setting.memory_bandwidth / 1e12:.2f} TB/s; data loading, logging and saving take no time",
    ]
