"""Bytes that a step sends over the wire, on paper: the collectives of DDP, FSDP and HSDP.

tests/test_scaling.py counts those of real runs.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from nanogpt.estimate import FLOAT
from nanogpt.model import GPT, GPTConfig

Mode = Literal["ddp", "fsdp", "hsdp"]
Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
MODES: tuple[Mode, ...] = ("ddp", "fsdp", "hsdp")
BUCKET = 25 << 20  # bytes of gradients that DDP sends at once (torch's bucket_cap_mb)


@dataclass(frozen=True)
class Call:
    """A collective: `count` times, over `payload` bytes in all, by `members` GPUs that lie on `nodes`."""

    kind: Kind
    payload: int  # of the whole tensors, padding included
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
    with torch.device("meta"):
        model = GPT(replace(shape, n_layer=1))
    block = {name: tuple(p.shape) for name, p in model.h[0].named_parameters(prefix="h.0")}
    root = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in block}
    return Tensors(tuple(root.values())), Tensors(tuple(block.values()))


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


def calls(shape: GPTConfig, mode: Mode, world: World, gather_bytes: int, sharded_state: bool) -> list[Call]:
    """The collectives of a step, those of "forward" and "backward" once for each micro-batch.

    Gradients are reduced in float32, once a step. The weights of blocks are gathered in numbers of
    `gather_bytes`, what is outside of blocks in float32.
    `sharded_state`: under DDP each GPU updates its part of the weights and the parts are gathered (ZeRO-1).
    """
    if world.gpus == 1:
        return []
    root, block = tensors(shape)
    layers, parts = shape.n_layer, world.shards(mode)
    if mode == "ddp":
        size = FLOAT * (root.numbers() + layers * block.numbers())
        where = (world.gpus, world.nodes)
        found = [Call("all_reduce", size, *where, "last", count=-(-size // BUCKET))]
        return found + [Call("all_gather", size, *where, "update")] * sharded_state
    padded = root.numbers(parts) + layers * block.numbers(parts)
    blocks = gather_bytes * layers * block.numbers(parts)
    where = (parts, world.nodes if mode == "fsdp" else 1)
    found = [
        Call("all_gather", FLOAT * root.numbers(parts), *where, "forward"),
        Call("all_gather", blocks, *where, "forward", count=layers),
        Call("all_gather", blocks, *where, "backward", count=layers),
        Call("reduce_scatter", FLOAT * padded, *where, "last", count=layers + 1),
    ]
    if mode == "hsdp" and world.nodes > 1:
        each = FLOAT * padded // parts
        found.append(Call("all_reduce", each, world.nodes, world.nodes, "last", count=layers + 1))
    return found if parts > 1 else [call for call in found if call.kind == "all_reduce"]


def wire_bytes(found: list[Call], micro_batches: int) -> float:
    """Bytes that a GPU sends in a step of so many micro-batches."""
    each = {"forward": micro_batches, "backward": micro_batches}
    return sum(call.wire * each.get(call.when, 1) for call in found)
