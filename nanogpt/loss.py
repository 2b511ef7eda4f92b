"""Logits over a padded vocabulary, and chunk sizes of the loss (chunked_loss.py).

Shapes: C channels, V vocabulary, P >= V rows of the padded table.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -1  # targets with this value are excluded from the loss
LOGITS_AT_ONCE = {"cuda": 1 << 28, "mps": 1 << 26, "cpu": 1 << 24}  # logits; CPU: 64 MB, near its caches


def computes_padding_logits(device: torch.device) -> bool:
    """Return whether logits of the vocabulary padding are computed and then cut off: GPU matmuls are fast for
    multiples of 8 and slow for GPT-2's 50,257; CPUs gain nothing."""
    return device.type == "cuda"


def compute_logits(x: Tensor, table: Tensor, size: int, whole: bool) -> Tensor:
    """Return logits (..., size) of x (..., C) and table (P, C). `whole`: compute those of the padding too and
    cut them off. In either case the padding gets neither probability nor gradient."""
    if whole and len(table) > size:
        return F.linear(x, table)[..., :size]
    return F.linear(x, table[:size])


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Soft-cap logits to (-cap, cap) (Gemma 2); cap 0: unchanged."""
    return cap * torch.tanh(logits / cap) if cap else logits


def logits_chunk_size(device_type: str, vocab_size: int) -> int:
    """Return the tokens per chunk of float32 logits that need not be kept, on devices of this type."""
    return max(1, LOGITS_AT_ONCE.get(device_type, 1 << 24) // vocab_size)


def default_loss_chunk_size(device: torch.device, tokens: int, vocab_size: int) -> int:
    """Return the `rows` of chunked_cross_entropy for micro-batches of `tokens` tokens; 0: plain loss.

    On CPUs large logits are slow: they exceed the caches, and malloc reuses their memory poorly, because
    smaller allocations soon fragment half of what was freed.
    """
    at_once = logits_chunk_size(device.type, vocab_size)
    return 0 if device.type != "cpu" or 2 * tokens <= at_once else 4 * at_once
