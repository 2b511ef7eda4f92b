"""Logits and their cross-entropy: the padded vocabulary, and a loss whose logits are never there all at once.

For 64 x 1,024 tokens of GPT-2's vocabulary float32 logits take 13 GB, and the plain loss holds them, their
logarithms of probabilities and the gradients. `in_rows` makes them some rows at a time, and once more in the
backward pass: a product more for a fraction of the memory.

Shapes: N tokens, C channels, V vocabulary, P >= V rows of the padded table.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def multiplies_padding(device: torch.device) -> bool:
    """Whether logits of the padding are computed and cut off: a GPU's product is fast where its sizes are
    multiples of 8, and slow at GPT-2's 50,257. A CPU's gains nothing by it."""
    return device.type == "cuda"


def project(x: Tensor, table: Tensor, size: int, whole: bool) -> Tensor:
    """Logits (..., size) of x (..., C) by table (P, C); `whole`: the padding is multiplied, and cut off
    after. It gets no probability and no gradient either way."""
    if whole and len(table) > size:
        return F.linear(x, table)[..., :size]
    return F.linear(x, table[:size])


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Logits within +-cap (Gemma 2); cap 0: as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


def in_rows(
    x: Tensor, table: Tensor, targets: Tensor, rows: int, size: int, cap: float, ignore: int
) -> Tensor:
    """The mean cross-entropy in nats of targets (N,), those equal to `ignore` left out, from hidden states
    x (N, C); the logits of at most `rows` tokens are there at a time."""
    kind = x.device.type
    dtype = x.dtype
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return _InRows.apply(x, table, targets, rows, size, cap, ignore, dtype)


class _InRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        targets: Tensor,
        rows: int,
        size: int,
        cap: float,
        ignore: int,
        dtype: torch.dtype,
    ) -> Tensor:
        count = (targets != ignore).sum()
        ctx.save_for_backward(x, table, targets, count)
        ctx.how = (rows, size, cap, ignore, dtype)
        weight = _multiplied(table, size, dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        for part, wanted in zip(x.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(
                soft_cap(F.linear(part.to(dtype), weight).float(), cap)[:, :size],
                wanted,
                ignore_index=ignore,
                reduction="sum",
            )
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, table, targets, count = ctx.saved_tensors
        rows, size, cap, ignore, dtype = ctx.how
        weight, scale = _multiplied(table, size, dtype), gradient / count
        to_x = torch.empty_like(x)
        # Parts add up in float32: a sum in bfloat16 would lose what a single product keeps.
        to_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        parts = zip(x.split(rows), targets.split(rows), to_x.split(rows), strict=True)
        for part, wanted, to_part in parts:
            part = part.to(dtype)
            error = _error(part, weight, wanted, scale, size, cap, ignore)
            to_part.copy_(error @ weight)
            to_table[: len(weight)] += error.mT @ part
            del error  # else it would be there beside the next one's logits
        return to_x, to_table.to(table.dtype), *[None] * 6


def _error(
    part: Tensor, weight: Tensor, wanted: Tensor, scale: Tensor, size: int, cap: float, ignore: int
) -> Tensor:
    """The gradient of the logits of `part` (N, C), (N, len(weight)), for a loss whose gradient is `scale`."""
    logits = soft_cap(F.linear(part, weight).float(), cap)
    slope = 1 - (logits / cap).square_() if cap else None
    logits[:, size:] = -torch.inf
    error = logits.softmax(dim=-1)  # less the truth
    each = torch.arange(len(part), device=part.device)
    error[each, wanted.clamp(min=0)] -= 1
    error *= (wanted != ignore)[:, None] * scale
    if slope is not None:
        error *= slope
    return error.to(part.dtype)


def _multiplied(table: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return (table if multiplies_padding(table.device) else table[:size]).to(dtype)
