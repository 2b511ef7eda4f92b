"""Weights laid out for writing text on a CPU, in as few bytes as asked: what a token costs is reading them.

bfloat16 halves the bytes of float32. int8 halves them again: each row of a matrix is rounded to 255 steps of
its own size, the steps of a row being a 127th of its largest weight. Activations are rounded to two such
digits, 15 bits; embeddings are looked up, a row a token, and stay in bfloat16 (docs/generation.md has what it
costs in loss).

torch's own products read a matrix, for one row of activations, at a half to a third of the speed of memory;
those of cpu_kernels.cpp do better (docs/results.md). What is packed for them is no parameter any more.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.inference import cpu_kernels
from nanogpt.model import GPT
from nanogpt.runtime import DTYPES

# rows up to which torch's fused product is the faster one: at (16, 768) to 3072, half as fast as below
FEW = 8


class Packed(nn.Module):
    """x W^T + b with W (n, m), float32 or bfloat16, as cpu_kernels.cpp reads it; m is a multiple of 4."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # No buffers: what is packed for a CPU goes nowhere else.
        self.weight, self.bias = cpu_kernels.packed(weight.detach()), None if bias is None else bias.detach()
        self.kind = self.takes = weight.dtype
        self.tensors = [self.weight, self.bias]

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.takes, f"{x.dtype} given to a product of {self.takes}"
        rows = x.reshape(-1, self.in_features)
        y = cpu_kernels.product(self.kind, self.tensors, self.out_features, rows)
        return y.view(*x.shape[:-1], self.out_features)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `weight` (n, m) as int8, and the size of a step of each, float32 (n,)."""
    weight = weight.detach().float()
    step = (weight.abs().amax(dim=1) / 127).clamp_min(1e-30)
    return (weight / step[:, None]).round().clamp(-127, 127).to(torch.int8), step


class PackedInt8(Packed):
    """x W^T + b, W (n, m) in int8; float32 in and out.

    An activation is a 127th of the largest of its row times (high + low / 254), both whole numbers of 8 bits:
    exact sums, so that a text is the same in any company.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        whole, step = rounded(weight)
        super().__init__(whole, None if bias is None else bias.float())
        self.takes = torch.float32
        self.tensors[1:1] = [step, whole.sum(dim=1, dtype=torch.int32)]


class Int8Portable(nn.Module):
    """x W^T + b with W (n, m) in int8, in bfloat16: where there is no `PackedInt8`."""

    weight: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        whole, step = rounded(weight)
        self.register_buffer("weight", whole)
        self.register_buffer("step", step.bfloat16())
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # torch's kernel reads 16 weights at a time, beyond the end of a row that is no multiple of that.
        if len(rows) <= FEW and rows.shape[1] % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.step)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.step
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], len(self.step))


class Table(nn.Embedding):
    """An embedding in bfloat16 whose rows are looked up in float32."""

    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx).float()


@torch.no_grad()
def cast(model: GPT, dtype: str) -> GPT:
    """`model`, whose weights become float32, bfloat16, float16 or int8, on its device, to be read only."""
    model.requires_grad_(False)
    fast = packable(model)
    if dtype == "int8" and fast:
        _replace(model, PackedInt8)
        table = model.wte.weight.bfloat16()
        model.float().wte = Table.from_pretrained(table)
    elif dtype == "int8":
        _replace(model, Int8Portable)
        model.to(torch.bfloat16)
    else:
        model.to(DTYPES[dtype])
        if fast and dtype != "float16":
            _replace(model, Packed)
    return model


def packable(model: GPT) -> bool:
    """Whether `cast` packs the model's matrices."""
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    narrow = model.wte.weight.device.type != "cpu" or any(width % 4 for width in widths)
    return not narrow and cpu_kernels.library() is not None


def _replace(model: GPT, kind: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Make every product one of this kind, the head's too."""
    model.packed_head = kind((model.lm_head or model.wte).weight[: model.config.vocab_size], None)
    model.lm_head = None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child.weight, child.bias))
