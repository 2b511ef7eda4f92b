"""Weights laid out for writing text on a CPU, in as few bytes as asked: what a token costs is reading them.

bfloat16 halves the bytes of float32. int8 halves them again: each row of a matrix is rounded to 255 steps of
its own size, the steps of a row being a 127th of its largest weight. Activations are rounded to two such
digits, 15 bits; embeddings are looked up, a row a token, and stay in bfloat16 (docs/generation.md has what it
costs in loss).

torch's own products read a matrix, for one row of activations, at a half to a third of the speed of memory;
packed ones do better (docs/results.md). Matrices that are packed are no parameters any more.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.model import GPT
from nanogpt.runtime import DTYPES, has_bfloat16

# rows up to which torch's fused product is the faster one: at (16, 768) to 3072, half as fast as below
FEW = 8
# oneDNN reads a bfloat16 matrix for one row at 10 GB/s, for four at 16 (one thread, GPT-2's blocks).
FEWEST = {torch.float32: 1, torch.bfloat16: 4}
# A packed product costs 20 us beside its work, a plain one 3: matrices that stay in the cache are not packed.
PACKED_FROM = {"float32": 1 << 19, "bfloat16": 1 << 18}  # weights


class PackedLinear(nn.Module):
    """x W^T + b with W (n, m), float32 or bfloat16, in the blocks in which oneDNN's kernels read it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.fewest = len(weight), FEWEST[weight.dtype]
        # No buffers: what is packed for a CPU goes nowhere else.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
        self.bias = None if bias is None else bias.detach()
        self.product = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        count = len(rows)
        if count < self.fewest:
            rows = F.pad(rows, (0, 0, 0, self.fewest - count))
        y = self.product(rows, self.packed, self.bias, "none", [], "")
        return y[:count].view(*x.shape[:-1], self.out_features)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `weight` (n, m) as int8, and the size of a step of each, float32 (n,)."""
    weight = weight.detach().float()
    step = (weight.abs().amax(dim=1) / 127).clamp_min(1e-30)
    return (weight / step[:, None]).round().clamp(-127, 127).to(torch.int8), step


class Int8Linear(nn.Module):
    """x W^T + b, W (n, m) in int8; float32 in and out, by the CPU's instructions for 8 bits.

    An activation is a 127th of the largest of its row times (high + low / 254), both whole numbers of 8 bits:
    twice the rows, each with exact sums, so that a text is the same in any company.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features = len(weight)
        whole, step = rounded(weight)
        with warnings.catch_warnings():  # torch.ao announces its end each time
            warnings.simplefilter("ignore")
            quantised = torch._make_per_channel_quantized_tensor(
                whole, step.double(), torch.zeros(len(step), dtype=torch.int64), 0
            )
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        self.bias = None if bias is None else bias.detach().float()
        self.tiny, self.base = torch.tensor(1e-30), torch.tensor(254.0)
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        unit = torch.add(self.tiny, rows.abs().amax(dim=1, keepdim=True), alpha=1 / 127)
        digits = rows.new_empty(2, *rows.shape)
        high, low = digits.unbind(0)
        values = rows / unit
        torch.round(values, out=high)
        torch.sub(values, high, out=low)
        low.mul_(self.base)
        y = self.product(digits.flatten(0, 1), 1.0, 128, self.packed)
        high, low = y.chunk(2)
        y = torch.add(high, low, alpha=1 / 254)
        y = y * unit if self.bias is None else torch.addcmul(self.bias, y, unit)
        return y.view(*x.shape[:-1], self.out_features)


class Int8Portable(nn.Module):
    """x W^T + b with W (n, m) in int8, in bfloat16: where there is no `Int8Linear`."""

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
        if len(rows) <= FEW and x.device.type == "cpu" and rows.shape[1] % 32 == 0:
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
    device = model.wte.weight.device
    if dtype == "int8":
        if not has_int8(device):
            _replace(model, Int8Portable)
            return model.to(torch.bfloat16)
        _replace(model, Int8Linear)
        table = model.wte.weight.bfloat16()
        model.float().wte = Table.from_pretrained(table)
        return model
    model.to(DTYPES[dtype])
    fast = dtype == "float32" or (dtype == "bfloat16" and has_bfloat16(device))
    if fast and device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        _replace(model, PackedLinear, PACKED_FROM[dtype])
    return model


def has_int8(device: torch.device) -> bool:
    """Whether this device multiplies int8 by uint8 with exact sums, and torch can pack for it."""
    vnni: Callable[[], bool] = getattr(torch.cpu, "_is_vnni_supported", bool)
    known: Any = torch.ops.quantized
    return (
        device.type == "cpu"
        and vnni()
        and torch.backends.quantized.engine in ("x86", "fbgemm")
        and hasattr(known, "linear_with_input_q_dq_qweight_dq_output_fp32")
    )


def _replace(model: GPT, kind: Callable[[Tensor, Tensor | None], nn.Module], least: int = 0) -> None:
    """Make every product with `least` weights or more one of this kind, the head's too."""
    head = (model.lm_head or model.wte).weight[: model.config.vocab_size]
    if head.numel() >= least:
        model.packed_head = kind(head, None)
        model.lm_head = None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.numel() >= least and name != "lm_head":
                setattr(module, name, kind(child.weight, child.bias))
