"""Cast, quantize and pack weights for CPU inference, where decoding is bound by memory bandwidth.

bfloat16 halves the size of float32 weights, int8 halves it again: symmetric quantization with one scale per
output row, max |w| / 127. Each activation becomes two 7-bit digits, with one scale per row; the
embedding table stays in bfloat16, as a token reads only one row of it (loss measurements: docs/results.md).

For one row of activations, torch's matrix products reach a third to a half of the memory bandwidth; those of
cpu_kernels.cpp reach more (docs/results.md). Weights packed for them are no longer parameters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.inference import cpu_kernels
from nanogpt.model import GPT
from nanogpt.runtime import DTYPES

# maximum rows for which torch's fused int8 product is faster; at 16 rows (768 x 3072) it is half as fast
FEW = 8


class Packed(nn.Module):
    """Linear layer x W^T + b, W (n, m) float32 or bfloat16 packed for cpu_kernels.cpp; m % 4 == 0."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # plain attributes, not buffers: packed weights are never moved or saved
        self.weight, self.bias = cpu_kernels.packed(weight.detach()), None if bias is None else bias.detach()
        self.kind = self.takes = weight.dtype
        self.tensors = [self.weight, self.bias]

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_cpu and x.dtype == self.takes, (
            f"expected {self.takes} on a CPU, got {x.dtype}, {x.device}"
        )
        rows = x.reshape(-1, self.in_features)
        y = cpu_kernels.product(self.kind, self.tensors, self.out_features, rows)
        return y.view(*x.shape[:-1], self.out_features)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `weight` (n, m) per row; return int8 values and float32 scales (n,)."""
    weight = weight.detach().float()
    step = (weight.abs().amax(dim=1) / 127).clamp_min(1e-30)
    return (weight / step[:, None]).round().clamp(-127, 127).to(torch.int8), step


class PackedInt8(Packed):
    """Linear layer x W^T + b with packed int8 W (n, m); float32 input and output.

    Activations are quantized per row as max |x| / 63 * (high + low / 126), high and low in 7 bits.
    Integer sums are exact, so results do not depend on the rest of the batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        whole, step = rounded(weight)
        super().__init__(whole, None if bias is None else bias.float())
        self.takes = torch.float32
        self.tensors[1:1] = [step, whole.sum(dim=1, dtype=torch.int32)]


class Int8Portable(nn.Module):
    """Linear layer x W^T + b with int8 W (n, m), bfloat16 activations; fallback for `PackedInt8`."""

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
        # torch's kernel reads 16 weights at a time, past the end of rows that are not a multiple of 16.
        if len(rows) <= FEW and rows.shape[1] % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.step)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.step
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], len(self.step))


class Table(nn.Embedding):
    """Embedding with a bfloat16 table and float32 output."""

    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx).float()


@torch.no_grad()
def cast(model: GPT, dtype: str) -> GPT:
    """Cast `model` in place for inference, to float32, bfloat16, float16 or int8, and return it."""
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
    """Return whether `cast` packs the model's weight matrices: CPU, widths divisible by 4, kernels built."""
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    fits = model.wte.weight.device.type == "cpu" and not any(width % 4 for width in widths)
    return fits and cpu_kernels.library() is not None


def _replace(model: GPT, kind: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Replace every nn.Linear, including the LM head, by a layer of type `kind`, in place."""
    model.packed_head = kind((model.lm_head or model.wte).weight[: model.config.vocab_size], None)
    model.lm_head = None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child.weight, child.bias))
