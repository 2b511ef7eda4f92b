"""Sampling: a prompt in, tokens out, one position at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanogpt.runtime import Machine


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits (B, V) with all but the `k` highest of each row at minus infinity; ties at the border stay."""
    lowest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def draw(logits: Tensor, temperature: float, top_k: int, generators: list[torch.Generator]) -> Tensor:
    """One token for each row of logits (B, V): int64 (B,). Temperature 0 takes the most likely.

    Row i draws its noise from generators[i] alone, so its text does not depend on its neighbours.
    The argmax of logits plus Gumbel noise is a sample of their softmax (Gumbel 1954; Maddison 2014).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    noise = torch.stack([torch.rand(logits.shape[-1], generator=g) for g in generators])
    return (logits - noise.to(logits.device).clamp_min(1e-20).log().neg().log()).argmax(dim=-1)


@torch.inference_mode()
def generate(
    next_logits: Callable[[Tensor], Tensor],
    prompt: list[int],
    *,
    block_size: int,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    machine: Machine,
) -> Iterator[Tensor]:
    """Continue `prompt` (not empty) `num_samples` times, all at once.

    `next_logits`: the model's, or its compiled form: idx (B, T) to logits (B, V).
    Yields the next token of each sample, int64 (num_samples,), `max_new_tokens` times. A context
    longer than block_size is cut from the left. Sample i is the same whatever `num_samples`.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_samples)]
    idx = torch.tensor(prompt, device=machine.device).repeat(num_samples, 1)
    for _ in range(max_new_tokens):
        idx = idx[:, -block_size:]
        with machine.autocast():
            logits = next_logits(idx)
        token = draw(logits, temperature, top_k, generators)
        idx = torch.cat([idx, token[:, None]], dim=1)
        yield token
