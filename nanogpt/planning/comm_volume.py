"""Communication volume of a training step under DDP, FSDP and HSDP, computed analytically.

tests/test_scaling.py compares it with the collectives of real runs.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nanogpt.distributed.layout import TURN, common, rows_of, share_out
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import is_for_muon, newton_schulz_cost
from nanogpt.options import OptimizerOptions
from nanogpt.planning import estimate
from nanogpt.planning.estimate import FLOAT

Mode = Literal["ddp", "fsdp", "hsdp"]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
MODES: tuple[Mode, ...] = ("ddp", "fsdp", "hsdp")
BUCKET = 25 << 20  # bytes of gradients per DDP bucket (torch's bucket_cap_mb)


@dataclass(frozen=True)
class Call:
    """`count` calls of a collective over `payload` bytes in total, on `members` GPUs spread over `nodes`."""

    kind: Kind
    payload: int  # full tensors with padding; all_to_all: bytes sent by the busiest member
    members: int
    nodes: int
    when: Literal["forward", "backward", "last", "update"]  # forward, backward: every micro-batch
    count: int = 1

    @property
    def wire(self) -> float:
        """Bytes sent per member."""
        return bus_factor(self.kind, self.members) * self.payload


def bus_factor(kind: Kind, members: int) -> float:
    """Return the minimum bytes sent per member and byte of payload: the ratio of bus to algorithm bandwidth
    in nccl-tests (its doc/PERFORMANCE.md)."""
    if kind == "all_to_all":  # its payload is defined as the bytes sent
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (members - 1) / members


@dataclass(frozen=True)
class Tensors:
    """Shapes of the parameters of one FSDP unit: a block, or everything outside of blocks."""

    shapes: tuple[tuple[int, ...], ...]

    def numbers(self, parts: int = 1) -> int:
        """Return the number of elements, including the rows FSDP pads to split evenly into `parts`."""
        return sum(-(-rows // parts) * parts * math.prod(rest) for rows, *rest in self.shapes)


@functools.lru_cache(maxsize=64)
def tensors(shape: GPTConfig) -> tuple[Tensors, Tensors]:
    """Return the tensors outside of blocks, and those of one block."""
    model = _of_one_block(shape)
    block = {name: tuple(p.shape) for name, p in model.h[0].named_parameters(prefix="h.0")}
    root = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in block}
    return Tensors(tuple(root.values())), Tensors(tuple(block.values()))


def _of_one_block(shape: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(replace(shape, n_layer=1))


@dataclass(frozen=True)
class World:
    """A cluster of `gpus` GPUs, `gpus_per_node` per node."""

    gpus: int
    gpus_per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def in_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    def shards(self, mode: Mode) -> int:
        """Return the number of shards of the weights."""
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": self.in_node}[mode]


def calls(
    shape: GPTConfig,
    rules: OptimizerOptions,
    mode: Mode,
    world: World,
    number_bytes: int,
    sharded_state: bool,
) -> list[Call]:
    """Return the collectives of a step; those of "forward" and "backward" repeat for each micro-batch.

    Gradients are reduced in float32, once per step. FSDP gathers block weights at `number_bytes` bytes per
    element, other weights in float32. `sharded_state`: under DDP each GPU updates a shard of the weights,
    followed by an all-gather (ZeRO-1).
    """
    if world.gpus == 1:
        return []
    root, block = tensors(shape)
    layers, parts = shape.n_layer, world.shards(mode)
    if mode == "ddp":
        size = FLOAT * (root.numbers() + layers * block.numbers())
        found = [Call("all_reduce", size, world.gpus, world.nodes, "last", count=-(-size // BUCKET))]
        return found + (_gathered_updates(shape, rules, world, number_bytes) if sharded_state else [])
    padded = root.numbers(parts) + layers * block.numbers(parts)
    blocks = number_bytes * layers * block.numbers(parts)
    where = (parts, world.nodes if mode == "fsdp" else 1)
    found = [
        Call("all_gather", FLOAT * root.numbers(parts), *where, "forward"),
        Call("all_gather", blocks, *where, "forward", count=layers),
        Call("all_gather", blocks, *where, "backward", count=layers),
        Call("reduce_scatter", FLOAT * padded, *where, "last", count=layers + 1),
    ]
    if rules.optimizer == "muon":
        sent = max(sent_by_muon(shape, parts, number_bytes))
        found.append(Call("all_to_all", sent, *where, "update", count=2 * len(_alike(shape, parts))))
    if mode == "hsdp" and world.nodes > 1:
        each = FLOAT * padded // parts
        found.append(Call("all_reduce", each, world.nodes, world.nodes, "last", count=layers + 1))
    return found if parts > 1 else [call for call in found if call.kind == "all_reduce"]


def _gathered_updates(
    shape: GPTConfig, rules: OptimizerOptions, world: World, number_bytes: int
) -> list[Call]:
    """Return the all-gathers of ZeRO-1 under DDP: AdamW's parameters in chunks and, per matrix shape, Muon's
    updates, padded to the largest number of matrices per GPU."""
    by_muon = _alike(shape, world.gpus) if rules.optimizer == "muon" else {}
    matrices = sum(sum(counts) * height * width for (height, width), counts in by_muon.items())
    rest = estimate.parameters(shape).total - matrices
    where = (world.gpus, world.nodes)
    found = [Call("all_gather", FLOAT * rest, *where, "update", count=-(-rest // TURN))]
    updates = sum(world.gpus * max(counts) * h * w for (h, w), counts in by_muon.items())
    if by_muon:
        found.append(Call("all_gather", number_bytes * updates, *where, "update", count=len(by_muon)))
    return found


@functools.lru_cache(maxsize=64)
def sent_by_muon(shape: GPTConfig, parts: int, number_bytes: int) -> list[int]:
    """Return the bytes each of `parts` GPUs sends in Muon's update under FSDP: its gradient shards (float32)
    to the ranks that own the matrices, and the updates of its own matrices to the ranks that hold them."""
    owners, each = _owners(shape, parts), _matrices(shape)
    sent = []
    for rank in range(parts):
        total = 0
        for number, matrix in enumerate(each):
            own = sum(owner == rank for owner in owners[number :: len(each)])
            held = matrix.held(parts, rank)
            total += FLOAT * held * (shape.n_layer - own)
            total += number_bytes * (matrix.height * matrix.width - held) * own
        sent.append(total)
    return sent


@dataclass(frozen=True)
class Rows:
    """A row range of a parameter that Muon treats as one matrix."""

    of: int  # number of rows of the parameter
    first: int
    height: int
    width: int

    def held(self, parts: int, rank: int) -> int:
        """Return the number of elements in the FSDP shard of `rank`."""
        first, last = common(rows_of(self.of, parts, rank), (self.first, self.first + self.height))
        return (last - first) * self.width


@functools.lru_cache(maxsize=64)
def _matrices(shape: GPTConfig) -> list[Rows]:
    """Return the matrices of one block that Muon orthogonalizes."""
    model, found = _of_one_block(shape), []
    for name, p in model.named_parameters():
        if is_for_muon(name, p):
            heights = model.fused_rows().get(name, [p.shape[0]])
            ends = itertools.accumulate(heights)
            found += [
                Rows(len(p), end - height, height, p.shape[1])
                for end, height in zip(ends, heights, strict=True)
            ]
    return found


def _owners(shape: GPTConfig, parts: int) -> list[int]:
    """Return the rank that orthogonalizes each matrix, block by block."""
    return share_out([newton_schulz_cost(m.height, m.width) for m in _matrices(shape)] * shape.n_layer, parts)


def _alike(shape: GPTConfig, parts: int) -> dict[tuple[int, int], list[int]]:
    """Return the number of Muon matrices per GPU, by matrix shape."""
    found: dict[tuple[int, int], list[int]] = {}
    matrices = _matrices(shape) * shape.n_layer
    for matrix, owner in zip(matrices, _owners(shape, parts), strict=True):
        found.setdefault((matrix.height, matrix.width), [0] * parts)[owner] += 1
    return found


def wire_bytes(found: list[Call], micro_batches: int) -> float:
    """Return the bytes a GPU sends in a step of `micro_batches`."""
    each = {"forward": micro_batches, "backward": micro_batches}
    return sum(call.wire * each.get(call.when, 1) for call in found)
