"""How a token is drawn: pure functions on logits, each the definition of one control.

They are applied in the order of `SamplingOptions`: penalty, temperature, top-k, top-p, min-p; what a
filter removes gets minus infinity. A token is then found by inverting the cumulative distribution at one
random number a token, taken from the text's own generator: a text depends on its seed, not on others.

Shapes: B texts, V vocabulary, k candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from nanogpt.errors import UserError

SHORTLIST = 1024  # candidates that are sorted first for top-p; all are when these have not enough mass


class Controls(TypedDict, total=False):
    """SamplingOptions as keywords."""

    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class SamplingOptions:
    """Raises UserError for values that mean nothing."""

    repetition_penalty: float = 1.0  # above 1: tokens that are in the text already become less likely
    temperature: float = 1.0  # 1: as the model says; lower: bolder; 0: the most likely token, always
    top_k: int = 0  # draw among this many likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    min_p: float = 0.0  # draw among those with at least this share of the likeliest's probability

    def __post_init__(self) -> None:
        checks = [
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("temperature", "0 or more", self.temperature >= 0),
            ("top_k", "0 (all) or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (all)", 0 < self.top_p <= 1),
            ("min_p", "from 0 (all) to 1", 0 <= self.min_p <= 1),
        ]
        for name, expected, right in checks:  # not a number is never right
            if not right or getattr(self, name) == float("inf"):
                raise UserError(f"{name}={getattr(self, name)} given; it must be {expected}")


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V) with those of the tokens `seen` (bool, (B, V)) lowered: divided by `penalty` if
    positive, else multiplied (Keskar et al. 2019, CTRL)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest logits of each row and their ids, both (B, k), in the order of the ids."""
    ids = logits.topk(min(k, logits.shape[-1]), dim=-1, sorted=False).indices.sort(dim=-1).values
    return logits.gather(-1, ids), ids


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """logits (B, V) without the tail: what stays are the likeliest tokens, in order, until together they
    have probability `p`; the one that crosses `p` stays too (Holtzman et al. 2020)."""
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
    """logits (B, V) without the tokens whose probability is below `p` times the likeliest's (Nguyen et
    al. 2024)."""
    threshold = logits.softmax(dim=-1).amax(dim=-1, keepdim=True) * p
    return logits.masked_fill(logits.softmax(dim=-1) < threshold, -torch.inf)


def sample_inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """For each row of logits (B, V) the index at which its cumulative distribution passes the row's
    number of `uniform`, float64 (B,), in [0, 1): int64 (B,)."""
    mass = logits.double().softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
    # Rounding may leave a number beyond the end; and the tokens there may be removed ones.
    last = logits.shape[-1] - 1 - (logits > -torch.inf).int().flip(-1).argmax(dim=-1)
    return torch.minimum(found, last)


def draw(logits: Tensor, options: SamplingOptions, uniform: Tensor) -> Tensor:
    """One token for each row of logits (B, V), penalised already: int64 (B,)."""
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if options.top_k:  # before the temperature, which changes no order: fewer numbers to divide
        logits, ids = top_k(logits, options.top_k)
    # Above the highest nothing overflows, however low the temperature.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(options.temperature, 1e-30)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0:
        logits = keep_min_p(logits, options.min_p)
    found = sample_inverse_cdf(logits, uniform)
    return found if ids is None else ids.gather(-1, found[:, None])[:, 0]


def draw_each(logits: Tensor, options: Sequence[SamplingOptions], uniform: Tensor) -> Tensor:
    """As `draw`, each row with its own options; rows with the same ones are drawn together."""
    if len(set(options)) == 1:
        return draw(logits, options[0], uniform)
    drawn = torch.empty(len(options), dtype=torch.int64, device=logits.device)
    for kind in set(options):
        rows = torch.tensor([i for i, row in enumerate(options) if row == kind], device=logits.device)
        drawn[rows] = draw(logits[rows], kind, uniform[rows])
    return drawn
