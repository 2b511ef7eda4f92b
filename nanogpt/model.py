"""GPT: a decoder-only transformer; one block from GPT-2 to the fast recipe.

`gpt2` is exactly GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU in its tanh form, a head
that shares its weights with the token embedding. Parameters carry the names of OpenAI's and Hugging
Face's release. The modern switches (docs/results.md says what each is worth): rotary positions or ALiBi,
RMSNorm, QK-norm, ReLU² or SwiGLU, grouped queries, projections that begin at zero, a head of its own, a soft
cap on the logits. The file needs torch and the loss, nothing else: devices, optimizers, files and
text are other modules'.

Shapes: B batch, T tokens, C channels (n_embd), nh heads, hs channels a head, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.loss import (
    IGNORE,
    compute_logits,
    logits_chunk_size,
    multiplies_padding,
    soft_cap,
)


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    vocab_multiple: int = 1  # the embedding table is padded to a multiple of this; ids are not
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head queries; 0: n_head
    head_dim: int = 0  # channels a head; 0: n_embd / n_head
    position: str = "learned"
    norm: str = "layer"
    activation: str = "gelu_tanh"
    qk_norm: bool = False  # normalise queries and keys (Henry et al. 2020)
    tied: bool = True  # the head is the token embedding
    softcap: float = 0.0  # logits stay within +- this: cap * tanh(logits / cap) (Gemma 2); 0: they are free
    smear: bool = False  # a token's embedding gets some of the one before it
    init: str = "gpt2"

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


GPT2_SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class RMSNorm(nn.Module):
    """x over its root mean square (Zhang and Sennrich 2019); no gain: the next matrix has one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))


NORMS: dict[str, Callable[[GPTConfig], nn.Module]] = {
    "layer": lambda config: nn.LayerNorm(config.n_embd, bias=config.bias),
    "rms": lambda config: RMSNorm(),
}


def relu2(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021, Primer)."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """One half of the channels gates the other (Shazeer 2020): (..., 2n) to (..., n)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "gelu": F.gelu,  # nanoGPT's; differs from GPT-2's by 5e-4 at most, and is faster on CPUs
    "relu2": relu2,
    "swiglu": swiglu,
}


# ----------------------------------------------------------------------------- positions
#
# Three classes with the same hooks, each doing nothing unless a scheme needs it. `at`, int64 (B, T): where
# the tokens stand; None: at 0 ... T-1.
#
#     embed(x, at)     what is added to the token embeddings x (B, T, C)
#     rotate(x, at)    what is done to queries and keys x (B, nh, T, hs)
#     bias(T)          what is added to the attention scores, (nh, T, T), causal mask included; None: none
#     bias_at(at, T)   the same for single queries at positions `at` (B, 1): (B, nh, 1, T)


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
        return apply_rotary(x, cos, sin)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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


# ----------------------------------------------------------------------------- attention


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """What each query gets of the values: (B, nh, T, hs) from q of that shape, k and v (B, n_kv_head, T, hs).

    `bias` ((B,) nh or 1, T, T) is added to the scores, with the causal mask in it; None: the mask alone.
    """
    grouped, T = k.shape[1] != q.shape[1], q.shape[2]
    learning = torch.is_grad_enabled()
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or (T > 512 and learning):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=bias is None, enable_gqa=grouped
        )
    # In bfloat16 on a CPU the backward pass of torch's own is slow: forward and backward take 13.5 ms
    # at (16, 4, 64, 32), this 2.2; 27 and 15 at (4, 6, 256, 64); 41 and 24 at (2, 6, 512, 64). Forward alone
    # some queries at a time leave out most of what is masked: 3.1 ms at (1, 12, 499, 64), torch's own 5.6.
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if bias is None:
        bias = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    q, found, step = q * q.shape[3] ** -0.5, [], T if learning else 128
    for first in range(0, T, step):
        last = min(T, first + step)
        scores = q[:, :, first:last] @ k[:, :, :last].mT + bias[..., first:last, :last]
        found.append(F.dropout(torch.softmax(scores, dim=-1), dropout) @ v[:, :, :last])
    return torch.cat(found, dim=2) if len(found) > 1 else found[0]


class LayerCache(NamedTuple):
    """What a layer's attention needs of a `Cache`."""

    at: Tensor | None  # positions of the tokens that are read, int64 (B, 1); None: 0 ... T-1
    attend: Callable[..., Tensor]  # of q, k, v, and the function that attends without a cache


class Cache(Protocol):
    """Tokens read before, whose keys and values are kept (inference/kv_cache.py)."""

    at: Tensor | None  # as Layer.at

    def before(self, x: Tensor) -> Tensor: ...

    def layer(self, number: int) -> LayerCache: ...


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias (B, 1, T, T) by which a token sees those before it of its own document: documents (B, T)."""
    seen = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size
        self.dropout = config.dropout
        kv_heads = config.n_kv_head or config.n_head
        self.heads = [config.n_head, kv_heads]
        self.widths = [n * self.head_size for n in (config.n_head, kv_heads, kv_heads)]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(self.widths[0], config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, position: Position, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        # Queries and keys lie side by side and are treated alike: one call for both.
        parts = self.c_attn(x).split([self.widths[0] + self.widths[1], self.widths[2]], dim=2)
        qk, v = (part.view(B, T, -1, self.head_size).transpose(1, 2) for part in parts)  # (B, nh, T, hs)
        q, k = position.rotate(self.qk_norm(qk), cache.at if cache else None).split(self.heads, dim=1)
        bias = position.bias(T)
        if mask is not None:  # (B, 1, T, T)
            bias = mask if bias is None else mask + bias
        bias = bias if bias is None else bias.to(q.dtype)
        attend = partial(attention, bias=bias, dropout=self.dropout if self.training else 0.0)
        y = attend(q, k, v) if cache is None else cache.attend(q, k, v, attend)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


class Smear(nn.Module):
    """Adds to each embedding its predecessor's, times a learned weight a channel that begins at 0: what
    two neighbours mean together is seen from the first block on (as the token shift of Peng et al. 2023,
    RWKV, does in every block)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1] if cache is None else cache.before(x)
        return x + self.weight * before


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        # A gate has two thirds of the width, rounded to 8, so that it costs what the others cost.
        hidden = 8 * round(config.n_embd / 3) if config.activation == "swiglu" else 4 * config.n_embd
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(
            config.n_embd, 2 * hidden if self.activation is swiglu else hidden, bias=config.bias
        )
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, position: Position, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), position, cache, mask)
        return x + self.mlp(self.ln_2(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if not config.head_dim and config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
        self.config = config
        # The first call of MKL's vector functions must not be shared by threads: in one process of thirty a
        # part of it is then less accurate, so that rotary tables or a soft cap have other bits the next time.
        torch.zeros(1, device="cpu").cos()
        # from_pretrained: the weights are drawn in init_weights, once
        table = torch.empty(config.padded_vocab_size, config.n_embd)
        self.wte = nn.Embedding.from_pretrained(table, freeze=False)
        shape = (config.block_size, config.n_embd, config.n_head, config.head_size)
        self.position = POSITIONS[config.position](*shape)
        self.smear = Smear(config) if config.smear else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = NORMS[config.norm](config)
        self.packed_head: nn.Module | None = None  # the head's matrix in another form (quantize.py)
        self.loss_chunk_size = 0  # tokens whose logits are there at once while a loss is made; 0: all
        self.compiled_loss: Callable[[Tensor, Tensor], Tensor] | None = (
            None  # `loss`, if compile.wrap made it
        )
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if (
            not self.wte.weight.is_meta
        ):  # shapes only: weights come from a file (and torch would import sympy)
            INITS[config.init](self)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Score each position's next token.

        idx, targets: int64 (B, T), T at most block_size; targets equal to IGNORE are left out. documents:
        int64 (B, T), the number of each token's document; none sees another one. Positions go on.
        Returns (logits, loss): logits (B, T, V) and, with targets, their mean cross-entropy in nats. logits
        is None if `loss_chunk_size` or `compiled_loss` computes the loss without them, and with `reduction`
        "none", which gives the cross-entropy of each target (B, T).
        """
        x = self.hidden(idx, documents=documents)
        if targets is None:
            return self.head(x), None
        if reduction == "none":
            return None, self.token_losses(x, targets)
        if self.loss_chunk_size:
            from nanogpt.chunked_loss import chunked_cross_entropy

            how = (self.loss_chunk_size, self.config.vocab_size, self.config.softcap)
            return None, chunked_cross_entropy(x.flatten(0, 1), self.head_table, targets.flatten(), *how)
        if self.compiled_loss:
            return None, self.compiled_loss(x, targets)
        logits = self.head(x)
        return logits, cross_entropy(logits, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of targets (B, T) from hidden states x (B, T, C)."""
        return cross_entropy(self.head(x), targets)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each of targets (B, T), 0 for those equal to IGNORE, from hidden states
        x (B, T, C), without holding all logits at once."""
        rows = logits_chunk_size(x.device.type, self.config.vocab_size)
        parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        losses = [
            F.cross_entropy(self.head(part), wanted, ignore_index=IGNORE, reduction="none")
            for part, wanted in parts
        ]
        return torch.cat(losses).view_as(targets)

    @property
    def head_table(self) -> Tensor:
        """The rows by which logits are made, the padding of the vocabulary among them: (P, C)."""
        return (self.lm_head or self.wte).weight

    def hidden(self, idx: Tensor, cache: Cache | None = None, documents: Tensor | None = None) -> Tensor:
        """What the last block leaves, normalised: (B, T, C) from idx (B, T), the first tokens of each
        text; or from what `cache` says they are, and with what it remembers. `documents` (B, T) numbers
        each token's document, to keep them apart."""
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens do not fit in block_size={self.config.block_size}")
        x = tokens = self.wte(idx)
        if self.smear is not None:
            x = self.smear(x, cache)
        mask = None
        if documents is not None:
            first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            x, mask = torch.where(first[..., None], tokens, x), document_mask(documents, x.dtype)
        x = self.drop(self.position.embed(x, cache.at if cache else None))
        for number, block in enumerate(self.h):
            x = block(x, self.position, cache.layer(number) if cache else None, mask)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C). The padding of the vocabulary is cut off
        before anything sees it: its rows get no probability, no gradient and no sample."""
        if self.packed_head is not None:
            logits = self.packed_head(x)
        else:
            whole = multiplies_padding(x.device)
            logits = compute_logits(x, self.head_table, self.config.vocab_size, whole)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # their softmax sums many
        return soft_cap(logits, self.config.softcap)

    def fused_rows(self) -> dict[str, list[int]]:
        """Parameters that hold several maps one above the other: the rows of each."""
        attentions = ((n, m) for n, m in self.named_modules() if isinstance(m, CausalSelfAttention))
        return {f"{name}.c_attn.weight": module.widths for name, module in attentions}

    def n_params(self, positions: bool = True) -> int:
        """Parameters, each counted once (a tied head is the embedding), the padding left out; without
        `positions`, those that multiply something."""
        config = self.config
        unused = (config.padded_vocab_size - config.vocab_size) * (1 if config.tied else 2)
        if not positions:
            unused += config.block_size * (config.position == "learned")
            unused += 0 if config.tied else config.vocab_size  # an embedding is looked up
        return sum(p.numel() for p in self.parameters()) - unused * config.n_embd

    def flops_per_token(self) -> int:
        """Return the FLOPs that training spends on a token."""
        return flops_per_token(self.n_params(positions=False), self.config)


def flops_per_token(n_params: int, config: GPTConfig) -> int:
    """Return the FLOPs of forward and backward pass per token: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM,
    appendix B).

    `n_params` counts the weights that multiply something, the (tied) head included and position
    embeddings left out; attention is counted in full although half of it is masked, so figures compare
    with those published elsewhere.
    """
    return 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size


# ----------------------------------------------------------------------------- initialisation


@torch.no_grad()
def init_gpt2(model: GPT) -> None:
    """GPT-2's: N(0, 0.02²), and 1/sqrt(2 n_layer) of that for the projections into the residual stream,
    so that its variance does not grow with depth. Biases 0, gains 1."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "smear.weight")):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            residual = name.endswith("c_proj.weight")
            parameter.normal_(std=0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02)


@torch.no_grad()
def init_zero(model: GPT) -> None:
    """Projections into the residual stream and an untied head begin at 0, so that at first the model
    is its embedding, and every block learns from a clean gradient (Zhang et al. 2019, Fixup; Yang et
    al. 2022, muP); other matrices N(0, 1/C), an untied embedding N(0, 1)."""
    init_gpt2(model)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":
            parameter.zero_()
        elif name == "wte.weight" and not model.config.tied:
            parameter.normal_(std=1.0)
        elif parameter.dim() >= 2 and name.startswith("h."):
            parameter.normal_(std=parameter.shape[1] ** -0.5)


@torch.no_grad()
def init_depth(model: GPT) -> None:
    """GPT-2's, with the projections of block i scaled by 1/sqrt(2 (i + 1)): earlier blocks begin
    louder (as T-Fixup and Megatron's scaled initialisation do by depth)."""
    init_gpt2(model)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            block = int(name.split(".")[1])
            parameter.normal_(std=0.02 / math.sqrt(2 * (block + 1)))


INITS: dict[str, Callable[[GPT], None]] = {"gpt2": init_gpt2, "zero": init_zero, "depth": init_depth}
