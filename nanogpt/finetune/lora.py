"""Low-rank adapters (Hu et al. 2021, "LoRA"): a linear map W gets (alpha / rank) B A beside it, and only A
and B are trained.

B begins at 0, so an adapted model computes at first what the plain one does, to the bit. A checkpoint holds
W, A and B, which a run needs to go on exactly; whoever opens it for anything else gets W + (alpha / rank) B A
under W's name (`merged`), a plain model that costs what it did before.
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
    rank: int
    alpha: float  # what they add counts alpha / rank
    targets: str  # patterns of linear maps in blocks: their last name, or all of it

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdaptedLinear(nn.Module):
    """x W^T + bias + scale (x A^T) B^T: (..., in) to (..., out), A (rank, in), B (out, rank)."""

    def __init__(self, plain: nn.Linear, adapters: Adapters):
        super().__init__()
        self.scale = adapters.scale
        self.weight, self.bias = plain.weight, plain.bias
        self.lora_a = nn.Parameter(plain.weight.new_empty(adapters.rank, plain.in_features))
        self.lora_b = nn.Parameter(plain.weight.new_empty(plain.out_features, adapters.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * low


def adapt(model: nn.Module, adapters: Adapters) -> list[str]:
    """Put adapters beside the maps in blocks ("h.0.attn.c_attn") that `adapters.targets` names, as yet
    without values; returns their names. UserError for a pattern that names none."""
    linear = [n for n, m in model.named_modules() if n.startswith("h.") and isinstance(m, nn.Linear)]
    chosen: set[str] = set()
    for pattern in (part.strip() for part in adapters.targets.split(",")):
        found = {name for name in linear if fnmatch(name, pattern) or fnmatch(name.split(".")[-1], pattern)}
        if not found:
            known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear))
            raise UserError(
                f"--lora_targets: {pattern!r} names no linear map of a block; there are {known}, "
                f"with the block in front {linear[0]} and so on"
            )
        chosen |= found
    for name in sorted(chosen):
        parent, _, last = name.rpartition(".")
        plain = model.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        setattr(model.get_submodule(parent), last, AdaptedLinear(plain, adapters))
    return sorted(chosen)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """A as the layers of torch begin (uniform within 1 / sqrt(in)), B = 0."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(A):
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))
        elif name.endswith(B):
            parameter.zero_()


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.endswith((A, B))


def merged(
    names: Iterable[str], read: Callable[[str], Tensor], adapters: Adapters
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `read` gives, each adapter added to its map; the sum is made in float64."""
    known = set(names)
    for name in known:
        if is_adapter(name):
            continue
        tensor, of = read(name), name.removesuffix(".weight")
        if of + A in known:
            low = read(of + B).double() @ read(of + A).double()
            tensor = (tensor.double() + adapters.scale * low).to(tensor.dtype)
        yield name, tensor
