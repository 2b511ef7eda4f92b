"""Weights in fewer bytes, for writing text: what a token costs is reading them.

bfloat16 halves the bytes. int8 halves them again: each row of a matrix is rounded to 255 steps of its own
size, the steps of a row being a 127th of its largest weight; activations stay in bfloat16. Embeddings are
looked up, a row a token, and stay as they are (docs/generation.md has what it costs in loss).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.model import GPT
from nanogpt.runtime import DTYPES

FEW = 8  # rows up to which the fused product is the faster one: at (16, 768) to 3072, half as fast as below


class Int8Linear(nn.Module):
    """x W^T + b with W (n, m) in int8 and a bfloat16 step for each of its rows."""

    weight: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        largest = weight.detach().float().abs().amax(dim=1).clamp_min(1e-30)
        step = (largest / 127).bfloat16()
        rounded = (weight.detach().float() / step.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("step", step)
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


@torch.no_grad()
def cast(model: GPT, dtype: str) -> GPT:
    """`model`, whose weights become float32, bfloat16, float16 or int8, for evaluation only."""
    model.requires_grad_(False)
    if dtype != "int8":
        return model.to(DTYPES[dtype])
    head = (model.lm_head or model.wte).weight[: model.config.vocab_size]
    packed = Int8Linear(head)
    model.lm_head = None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
    model.to(torch.bfloat16)
    model.packed_head = packed
    return model
