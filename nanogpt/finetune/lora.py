"""LoRA adapters (Hu et al. 2021): a linear layer computes W + (alpha / rank) B A; only A and B are trained.

B is initialized to 0, so the adapted model initially equals the base model bitwise. Checkpoints hold W, A and
B, for exact resume. Everything else loads the merged weight W + (alpha / rank) B A under W's name (`merged`),
a plain model without extra inference cost.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.errors import UserError

A, B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class Adapters:
    """Configuration of the adapters of a model."""

    rank: int
    alpha: float  # adapter outputs are scaled by alpha / rank
    targets: str  # comma-separated patterns for the full names of linear layers, or for their last components

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdaptedLinear(nn.Module):
    """Linear layer with LoRA: x W^T + bias + scale (x A^T) B^T; A is (rank, in), B (out, rank)."""

    def __init__(self, plain: nn.Linear, adapters: Adapters):
        super().__init__()
        self.scale = adapters.scale
        self.weight, self.bias = plain.weight, plain.bias
        self.lora_a = nn.Parameter(plain.weight.new_empty(adapters.rank, plain.in_features))
        self.lora_b = nn.Parameter(plain.weight.new_empty(plain.out_features, adapters.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * low


def adapt(model: nn.Module, adapters: Adapters) -> None:
    """Add uninitialized adapters, in place, to the linear layers of blocks that match `adapters.targets`.
    Raise UserError if a pattern matches none."""
    linear = [n for n, m in model.named_modules() if n.startswith("h.") and isinstance(m, nn.Linear)]
    chosen: set[str] = set()
    for pattern in (part.strip() for part in adapters.targets.split(",")):
        matches = {name for name in linear if fnmatch(name, pattern) or fnmatch(name.split(".")[-1], pattern)}
        if not matches:
            known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear))
            raise UserError(
                f"--lora_targets: {pattern!r} matches no linear layer of a block; there are {known}, "
                f"or with the block prefix, as in {linear[0]}"
            )
        chosen |= matches
    for name in sorted(chosen):
        parent, _, last = name.rpartition(".")
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        setattr(model.get_submodule(parent), last, AdaptedLinear(plain, adapters))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Initialize A uniformly in +-1 / sqrt(in), as nn.Linear does, and B to 0, in place."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(A):
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))
        elif name.endswith(B):
            parameter.zero_()


def is_adapter(name: str) -> bool:
    """Return whether `name` is a parameter of an adapter."""
    return name.endswith((A, B))


def merged(
    names: Iterable[str], read: Callable[[str], Tensor], adapters: Adapters
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) from `read` with each adapter merged into its weight, summed in float64."""
    known = set(names)
    for name in known:
        if is_adapter(name):
            continue
        tensor, layer = read(name), name.removesuffix(".weight")
        if layer + A in known:
            update = read(layer + B).double() @ read(layer + A).double()
            tensor = (tensor.double() + adapters.scale * update).to(tensor.dtype)
        yield name, tensor
