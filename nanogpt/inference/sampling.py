"""Sampling: pure functions on logits, one per option of `SamplingOptions`.

They are applied in the order of its fields: repetition penalty, temperature, top-k, top-p, min-p; filters set
removed logits to -inf. The token is then sampled by inverting the CDF at one uniform random number per token,
from the sequence's own generator, so that results depend on its seed and not on the rest of the batch.

Shapes: B sequences, V vocabulary size, k candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from nanogpt.errors import UserError

SHORTLIST = 1024  # top-p sorts this many candidates first, and all if their total probability is below p


class Controls(TypedDict, total=False):
    """Keyword arguments of SamplingOptions, for type checking."""

    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters of a sequence. Raise UserError for values out of range."""

    repetition_penalty: float = 1.0  # above 1: penalizes tokens already in the text
    temperature: float = 1.0  # softmax temperature; 0: greedy decoding
    top_k: int = 0  # sample from the k most likely tokens; 0: all
    top_p: float = 1.0  # nucleus sampling: smallest set of tokens with this total probability
    min_p: float = 0.0  # minimum probability relative to that of the most likely token

    def __post_init__(self) -> None:
        checks = [
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("temperature", "0 or more", self.temperature >= 0),
            ("top_k", "0 (all) or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (all)", 0 < self.top_p <= 1),
            ("min_p", "from 0 (all) to 1", 0 <= self.min_p <= 1),
        ]
        for name, expected, right in checks:  # NaN fails every comparison
            if not right or getattr(self, name) == float("inf"):
                raise UserError(f"{name}={getattr(self, name)} given; it must be {expected}")


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalize the tokens `seen`, bool (B, V): divide positive logits (B, V) by `penalty`, multiply the
    negative ones (Keskar et al. 2019, CTRL)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` highest logits of each row and their ids, both (B, k), sorted by id."""
    ids = logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False).indices.sort(dim=-1).values
    return logits.gather(-1, ids), ids


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens, in descending order, until their total probability reaches `p`,
    including the one that crosses it; set other logits (B, V) to -inf (Holtzman et al. 2020)."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    for count in (min(SHORTLIST, logits.shape[-1]), logits.shape[-1]):
        highest, ids = logits.topk(count, dim=-1)
        probs = (highest - total).exp()
        before = probs.cumsum(dim=-1) - probs
        if count == logits.shape[-1] or bool((before[:, -1] >= p).all()):
            break
    kept = highest.masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(-1, ids, kept)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Set logits (B, V) to -inf where the probability is below `p` times that of the most likely token
    (Nguyen et al. 2024)."""
    threshold = logits.softmax(dim=-1).amax(dim=-1, keepdim=True) * p
    return logits.masked_fill(logits.softmax(dim=-1) < threshold, -torch.inf)


def sample_inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return, for each row of logits (B, V), the index at which its CDF exceeds that row's `uniform`,
    float64 (B,) in [0, 1): int64 (B,)."""
    if logits.device.type == "mps":  # Apple GPUs have no float64
        return sample_inverse_cdf(logits.cpu(), uniform).to(logits.device)
    mass, uniform = logits.double().softmax(dim=-1).cumsum(dim=-1), uniform.to(logits.device)
    index = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
    # Rounding may put the sample past the last token that was not filtered out: clamp to it.
    last = logits.shape[-1] - 1 - (logits > -torch.inf).int().flip(-1).argmax(dim=-1)
    return torch.minimum(index, last)


def draw(logits: Tensor, options: SamplingOptions, uniform: Tensor) -> Tensor:
    """Sample one token for each row of logits (B, V), penalty already applied: int64 (B,)."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if options.top_k:  # before the temperature, which preserves the order: fewer divisions
        logits, ids = top_k(logits, options.top_k)
    # Subtract the maximum, so that no temperature, however low, overflows.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(options.temperature, 1e-30)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0:
        logits = keep_min_p(logits, options.min_p)
    sampled = sample_inverse_cdf(logits, uniform)
    return sampled if ids is None else ids.gather(-1, sampled[:, None])[:, 0]


def draw_each(logits: Tensor, options: Sequence[SamplingOptions], uniform: Tensor) -> Tensor:
    """Sample as `draw`, with separate options per row; rows with equal options are batched."""
    if len(set(options)) == 1:
        return draw(logits, options[0], uniform)
    drawn = torch.empty(len(options), dtype=torch.int64, device=logits.device)
    for kind in set(options):
        rows = [i for i, row in enumerate(options) if row == kind]
        drawn[rows] = draw(logits[rows], kind, uniform[rows])
    return drawn
