"""Bytes that a step sends over the wire, on paper: the collectives of DDP, FSDP and HSDP.

tests/test_scaling.py counts those of real runs.
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
BUCKET = 25 << 20  # bytes of gradients that DDP sends at once (torch's bucket_cap_mb)


@dataclass(frozen=True)
class Call:
    """A collective: `count` times, over `payload` bytes in all, by `members` GPUs that lie on `nodes`."""

    kind: Kind
    payload: int  # of the whole tensors, padding included; of an all_to_all what the busiest member sends
    members: int
    nodes: int
    when: Literal["forward", "backward", "last", "update"]  # of each micro-batch, of the last, afterwards
    count: int = 1

    @property
    def wire(self) -> float:
        """Bytes that each member sends."""
        return bus_factor(self.kind, self.members) * self.payload


def bus_factor(kind: Kind, members: int) -> float:
    """Bytes that each of `members` sends a byte of payload, at best: nccl-tests' bus over algorithm bandwidth
    (its doc/PERFORMANCE.md)."""
    if kind == "all_to_all":  # whose payload is what is sent
        return 1.0
    return (2 if kind == "all_reduce" else 1) * (members - 1) / members


@dataclass(frozen=True)
class Tensors:
    """Shapes of the parameters that are gathered together: those of a block, or of all that is outside."""

    shapes: tuple[tuple[int, ...], ...]

    def numbers(self, parts: int = 1) -> int:
        """How many numbers, with the rows that FSDP adds so that each of `parts` has the same."""
        return sum(-(-rows // parts) * parts * math.prod(rest) for rows, *rest in self.shapes)


@functools.lru_cache(maxsize=64)
def tensors(shape: GPTConfig) -> tuple[Tensors, Tensors]:
    """What lies outside of blocks, and one block."""
    model = _of_one_block(shape)
    block = {name: tuple(p.shape) for name, p in model.h[0].named_parameters(prefix="h.0")}
    root = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in block}
    return Tensors(tuple(root.values())), Tensors(tuple(block.values()))


def _of_one_block(shape: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(replace(shape, n_layer=1))


@dataclass(frozen=True)
class World:
    """`gpus` in nodes of `gpus_per_node`."""

    gpus: int
    gpus_per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def in_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    def shards(self, mode: Mode) -> int:
        """Into how many parts the weights are cut."""
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": self.in_node}[mode]


def calls(
    shape: GPTConfig,
    rules: OptimizerOptions,
    mode: Mode,
    world: World,
    number_bytes: int,
    sharded_state: bool,
) -> list[Call]:
    """The collectives of a step, those of "forward" and "backward" once for each micro-batch.

    Gradients are reduced in float32, once a step. FSDP gathers the weights of blocks in numbers of
    `number_bytes`, what is outside of blocks in float32.
    `sharded_state`: under DDP each GPU updates its part of the weights and the parts are gathered (ZeRO-1).
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
    """Under DDP: AdamW's parameters, some at a time, and for each size of Muon's matrices their updates, as
    many from each GPU as the one sends that has the most."""
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
    """Bytes that each of `parts` GPUs sends in an update under FSDP: its rows of the gradients, in float32,
    to the owners of the matrices, and of the updates of its own matrices the rows that others hold."""
    assign_ranks, each = _owners(shape, parts), _matrices(shape)
    sent = []
    for rank in range(parts):
        total = 0
        for number, matrix in enumerate(each):
            own = sum(owner == rank for owner in assign_ranks[number :: len(each)])
            held = matrix.held(parts, rank)
            total += FLOAT * held * (shape.n_layer - own)
            total += number_bytes * (matrix.height * matrix.width - held) * own
        sent.append(total)
    return sent


@dataclass(frozen=True)
class Rows:
    """Some rows of a parameter, a matrix for Muon."""

    of: int  # all rows of the parameter
    first: int
    height: int
    width: int

    def held(self, parts: int, rank: int) -> int:
        """How many of its numbers a GPU has under FSDP."""
        first, last = common(rows_of(self.of, parts, rank), (self.first, self.first + self.height))
        return (last - first) * self.width


@functools.lru_cache(maxsize=64)
def _matrices(shape: GPTConfig) -> list[Rows]:
    """Of one block, those that Muon orthogonalises."""
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
    """Who orthogonalises each matrix, block after block."""
    return share_out([newton_schulz_cost(m.height, m.width) for m in _matrices(shape)] * shape.n_layer, parts)


def _alike(shape: GPTConfig, parts: int) -> dict[tuple[int, int], list[int]]:
    """The sizes of Muon's matrices, and how many of each size each GPU has."""
    found: dict[tuple[int, int], list[int]] = {}
    matrices = _matrices(shape) * shape.n_layer
    for matrix, owner in zip(matrices, _owners(shape, parts), strict=True):
        found.setdefault((matrix.height, matrix.width), [0] * parts)[owner] += 1
    return found


def wire_bytes(found: list[Call], micro_batches: int) -> float:
    """Bytes that a GPU sends in a step of so many micro-batches."""
    each = {"forward": micro_batches, "backward": micro_batches}
    return sum(call.wire * each.get(call.when, 1) for call in found)
