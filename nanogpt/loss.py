"""Logits of a padded vocabulary, and how many of them are computed at once (chunked_loss.py).

Shapes: C channels, V vocabulary, P >= V rows of the padded table.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -1  # a target with this value is not scored
LOGITS_AT_ONCE = {"cuda": 1 << 28, "mps": 1 << 26, "cpu": 1 << 24}  # on a CPU 64 MB, near its caches


def multiplies_padding(device: torch.device) -> bool:
    """Whether logits of the padding are computed and cut off: a GPU's product is fast where its sizes are
    multiples of 8, and slow at GPT-2's 50,257. A CPU's gains nothing by it."""
    return device.type == "cuda"


def compute_logits(x: Tensor, table: Tensor, size: int, whole: bool) -> Tensor:
    """Logits (..., size) of x (..., C) by table (P, C); `whole`: the padding is multiplied, and cut off
    after. It gets no probability and no gradient either way."""
    if whole and len(table) > size:
        return F.linear(x, table)[..., :size]
    return F.linear(x, table[:size])


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Logits within +-cap (Gemma 2); cap 0: as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


def logits_chunk_size(kind: str, vocab_size: int) -> int:
    """Tokens whose float32 logits are computed at once on a `kind` of device, where they need not be kept."""
    return max(1, LOGITS_AT_ONCE.get(kind, 1 << 24) // vocab_size)


def default_loss_chunk_size(device: torch.device, tokens: int, vocab_size: int) -> int:
    """The `rows` of chunked_cross_entropy for micro-batches of `tokens` tokens; 0 = the plain loss.

    On a CPU large logits are slow, since they leave its caches, and the C library cannot reuse their memory
    well: half of what it frees is soon cut up by smaller blocks.
    """
    at_once = logits_chunk_size(device.type, vocab_size)
    return 0 if device.type != "cpu" or 2 * tokens <= at_once else 4 * at_once
