"""Chunked cross-entropy, which never holds all logits at once.

For 64 x 1,024 tokens of GPT-2's vocabulary float32 logits take 13 GB, and the plain loss holds them, their
log-probabilities and the gradients of both. `chunked_cross_entropy` computes logits, loss and gradient one
chunk of tokens at a time, and keeps only the gradients of the hidden states and of the LM head: as many FLOPs
as the plain loss, for a fraction of its memory.

Shapes: N tokens, C channels, V vocabulary, P >= V rows of the padded table.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.loss import IGNORE, computes_padding_logits, logits_chunk_size


def chunked_cross_entropy(
    x: Tensor, table: Tensor, targets: Tensor, rows: int, size: int, cap: float
) -> Tensor:
    """Return the mean cross-entropy in nats of targets (N,), excluding those equal to IGNORE, from hidden
    states x (N, C) and the LM head's weight `table` (P, C), `rows` tokens at a time.

    `size`: vocabulary size without padding; `cap`: soft cap of logits, 0: off.
    """
    device_type = x.device.type
    dtype = x.dtype
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    apply = _ChunkedCrossEntropy.apply
    if torch.compiler.is_compiling():  # unrolled into one graph, all chunks would be live at once
        apply = torch.compiler.disable(apply)
    return apply(x, table, targets, rows, size, cap, dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute the gradients for a loss of 1 in the forward pass, and scale them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        targets: Tensor,
        rows: int,
        size: int,
        cap: float,
        dtype: torch.dtype,
    ) -> Tensor:
        weight = (table if computes_padding_logits(table.device) else table[:size]).to(dtype)
        counted = (targets != IGNORE)[:, None]
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Accumulate chunks in float32: bfloat16 sums would lose precision that a single matmul keeps.
        grad_table = None
        if ctx.needs_input_grad[1]:
            grad_table = torch.zeros(table.shape, dtype=torch.float32, device=x.device)
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            part, mask = x[chunk].to(dtype), counted[chunk]
            error = _losses_and_error(part, weight, targets[chunk].clamp(min=0), losses[chunk], size, cap)
            # An ignored target has no gradient: its row of `error` is multiplied by 0 in both matmuls.
            if grad_x is not None:
                grad_x[chunk] = (error @ weight) * mask
            if grad_table is not None and dtype == torch.float32:
                grad_table[: len(weight)].addmm_(error.mT, part * mask)
            elif grad_table is not None:
                grad_table[: len(weight)] += error.mT @ (part * mask)
            del error  # before the next one is allocated
        count = counted.sum()
        ctx.save_for_backward(grad_x, grad_table, count)
        ctx.dtype = table.dtype
        return (losses * counted[:, 0]).sum() / count

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_table, count = ctx.saved_tensors
        scale = grad_output / count
        grad_x = None if grad_x is None else grad_x * scale
        grad_table = None if grad_table is None else grad_table.mul_(scale).to(ctx.dtype)
        return grad_x, grad_table, *[None] * 5


def _losses_and_error(
    x: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, size: int, cap: float
) -> Tensor:
    """Write the cross-entropy of each of targets (n,) to `losses` (n,), in place; return its gradient with
    respect to the logits, (n, len(weight)), in the dtype of x (n, C)."""
    error = x.new_empty(len(x), len(weight))
    rows = logits_chunk_size(x.device.type, len(weight))
    parts = zip(x.split(rows), targets.split(rows), losses.split(rows), error.split(rows), strict=True)
    for part, target, loss, out in parts:
        logits = F.linear(part, weight).float()
        if cap:
            logits.div_(cap).tanh_().mul_(cap)
        logits[:, size:] = -torch.inf
        probabilities = torch.softmax(logits, -1, out=out if out.dtype == logits.dtype else None)
        # logsumexp(logits), as max(logits) - log(max(probabilities))
        log_sum = logits.amax(dim=-1) - probabilities.amax(dim=-1).log()
        row = torch.arange(len(part), device=x.device)
        torch.sub(log_sum, logits[row, target], out=loss)
        probabilities[row, target] -= 1
        if cap:
            probabilities *= logits.div_(cap).square_().neg_().add_(1)  # derivative of the soft cap
            probabilities[:, size:] = 0  # padding: 0 * -inf is NaN
        out.copy_(probabilities)
        del logits, probabilities  # before the next ones are allocated
    return error
