"""How a model knows the order of tokens: learned vectors, rotation, or a bias on distance.

Three classes with the same hooks, each doing nothing unless a scheme needs it:

    embed(x, at)     what is added to the token embeddings x (B, T, C)
    rotate(x, at)    what is done to queries and keys x (B, nh, T, hs)
    bias(T)          what is added to the attention scores, (nh, T, T), causal mask included; None: none
    bias_at(at, T)   the same for single queries at positions `at` (B, 1): (B, nh, 1, T)

`at`, int64 (B, T), says where the tokens stand; None: at 0 ... T-1.
"""

import math

import torch
from torch import Tensor, nn


class Position(nn.Module):
    """`block_size` positions of a model with `n_embd` channels in `n_head` heads of `head_dim`."""

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int):
        super().__init__()

    def embed(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        return x

    def rotate(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        return x

    def bias(self, length: int) -> Tensor | None:
        return None

    def bias_at(self, at: Tensor, length: int) -> Tensor | None:
        return None


class Learned(Position):
    """A vector for each position (Radford et al. 2019, GPT-2)."""

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int):
        super().__init__(block_size, n_embd, n_head, head_dim)
        # from_pretrained: drawn by the model's initialisation, not here too
        self.wpe = nn.Embedding.from_pretrained(torch.empty(block_size, n_embd), freeze=False)

    def embed(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        return x + (self.wpe.weight[: x.shape[1]] if at is None else self.wpe(at))


class Rotary(Position):
    """Each pair of channels (i, i + hs/2) of queries and keys turns with the position, at its own speed,
    so that their product depends on the distance alone (Su et al. 2021, RoFormer)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int, base: float = 10000.0):
        super().__init__(block_size, n_embd, n_head, head_dim)
        if head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels, and a head has {head_dim}")
        speed = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        angle = torch.arange(block_size, dtype=torch.float64, device="cpu")[:, None] * speed
        cos, sin = angle.cos().float(), angle.sin().float()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)

    def rotate(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        length = x.shape[-2]
        where = slice(length) if at is None else at[:, None]  # the same for all heads
        cos, sin = self.cos[where].to(x.dtype), self.sin[where].to(x.dtype)
        return turned(x, cos, sin)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., hs) turned by the angles of `Rotary`'s tables."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin)


class ALiBi(Position):
    """Scores fall with the distance, in each head at its own slope (Press et al. 2022), so that a
    model works at lengths it was not trained on."""

    scores: Tensor

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int):
        super().__init__(block_size, n_embd, n_head, head_dim)
        slopes = torch.tensor(alibi_slopes(n_head), device="cpu")
        back = torch.arange(block_size, device="cpu")
        distance = (back[:, None] - back).float()
        scores = -slopes[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, -torch.inf)
        self.register_buffer("scores", scores, persistent=False)

    def bias(self, length: int) -> Tensor | None:
        return self.scores[:, :length, :length]

    def bias_at(self, at: Tensor, length: int) -> Tensor:
        return self.scores[:, at, :length].transpose(0, 1)


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for n heads, n a power of two; else those of the next lower power, and
    every second one of the next higher (as the authors' code does)."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + between[: n_head - power]


POSITIONS: dict[str, type[Position]] = {"learned": Learned, "rope": Rotary, "alibi": ALiBi}
