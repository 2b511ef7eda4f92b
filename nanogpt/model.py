"""GPT: a decoder-only transformer, from GPT-2 to modern variants.

GPTConfig's defaults are exactly GPT-2 (Radford et al. 2019): learned positions, LayerNorm, tanh-approximated
GELU, an LM head tied to the token embedding. Parameter names are those of Hugging Face's GPT2Model,
except `position.wpe` for `wpe`. Modern options (docs/results.md measures most): rotary positions or ALiBi,
RMSNorm, QK-norm, ReLU² or SwiGLU, grouped-query attention, zero-initialized projections, an untied LM head,
logit soft-capping. This file imports torch and loss.py only; n-gram embeddings, the chunked loss and the code
of `from_pretrained` and `generate` are imported on use. Devices, optimizers, files and text are handled by
other modules.

Shapes: B batch, T tokens, C channels (n_embd), nh heads, hs channels per head, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.loss import IGNORE, compute_logits, computes_padding_logits, logits_chunk_size, soft_cap


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a model. The defaults are GPT-2's; those of training are in options.ModelOptions."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    vocab_multiple: int = 1  # pad the embedding table to a multiple of this
    n_kv_head: int = 0  # key/value heads, each shared by n_head / n_kv_head query heads; 0: n_head
    head_dim: int = 0  # channels per head; 0: n_embd / n_head
    position: str = "learned"  # a key of POSITIONS: learned, rope, alibi
    norm: str = "layer"  # a key of NORMS: layer, rms
    activation: str = "gelu_tanh"  # a key of ACTIVATIONS: gelu_tanh, gelu, relu2, swiglu
    qk_norm: bool = False  # normalize queries and keys (Henry et al. 2020)
    tied: bool = True  # tie the LM head to the token embedding
    softcap: float = 0.0  # soft-cap logits: cap * tanh(logits / cap) (Gemma 2); 0: off
    smear: bool = False  # add the previous token's embedding, with a learned weight per channel
    ngram_orders: str = ""  # lengths n of the n-grams with embeddings, such as "2,3,4"; empty: none
    ngram_rows: int = 65536  # maximum number of rows of the table of each n
    init: str = "gpt2"  # a key of INITS: gpt2, zero, depth

    @property
    def head_size(self) -> int:
        """Channels per head: head_dim or, if that is 0, n_embd / n_head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


NGRAM_TABLES = "ngrams.weight"  # name of the parameter that holds all n-gram tables

GPT2_SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) without a gain: the linear layer after it can absorb one."""

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
    """SwiGLU (Shazeer 2020): silu(first half of the channels) * second half, (..., 2n) to (..., n)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # as in GPT-2
    "gelu": F.gelu,  # as in nanoGPT; differs from gelu_tanh by at most 5e-4, faster on CPUs
    "relu2": relu2,
    "swiglu": swiglu,
}


# ----------------------------------------------------------------------------- positions
#
# Three classes with the same hooks, no-ops unless a scheme needs them. `position_ids`: positions of the input
# tokens, int64 (B, T); None: 0 ... T-1.
#
#     embed(x, position_ids)         add position embeddings to the token embeddings x (B, T, C)
#     rotate(x, position_ids)        rotate queries and keys x (B, nh, T, hs)
#     bias(T)                        additive attention bias (nh, T, T), causal mask included; None: no bias
#     bias_at(position_ids, length)  the same for queries at these positions and `length` keys:
#                                    (B, nh, T, length)


class Position(nn.Module):
    """Base class of position encodings, for up to `block_size` positions; all hooks are no-ops."""

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int):
        super().__init__()

    def embed(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return x

    def rotate(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return x

    def bias(self, length: int) -> Tensor | None:
        return None

    def bias_at(self, position_ids: Tensor, length: int) -> Tensor | None:
        return None


class Learned(Position):
    """Learned position embeddings (Radford et al. 2019, GPT-2)."""

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int):
        super().__init__(block_size, n_embd, n_head, head_dim)
        # from_pretrained skips nn.Embedding's own initialization; GPT initializes all weights
        self.wpe = nn.Embedding.from_pretrained(torch.empty(block_size, n_embd), freeze=False)

    def embed(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return x + (self.wpe.weight[: x.shape[1]] if position_ids is None else self.wpe(position_ids))


class Rotary(Position):
    """Rotary position embeddings (Su et al. 2021, RoFormer): rotate each pair of channels (i, i + hs/2) of
    queries and keys by position times its own frequency, so that scores depend on relative positions only."""

    cos: Tensor
    sin: Tensor

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int, base: float = 10000.0):
        super().__init__(block_size, n_embd, n_head, head_dim)
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even number of channels per head, not {head_dim}")
        speed = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
        angle = torch.arange(block_size, dtype=torch.float64, device="cpu")[:, None] * speed
        cos, sin = angle.cos().float(), angle.sin().float()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        # -sin for the left half: apply_rotary computes left cos - right sin, right cos + left sin
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)

    def rotate(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        rows = slice(x.shape[-2]) if position_ids is None else position_ids[:, None]  # the same for all heads
        cos, sin = self.cos[rows].to(x.dtype), self.sin[rows].to(x.dtype)
        return apply_rotary(x, cos, sin)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of x (..., hs); `cos` and `sin` are rows of the tables of `Rotary`."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin)


class ALiBi(Position):
    """Attention with linear biases (Press et al. 2022): scores decrease linearly with distance, with a slope
    per head. ALiBi can extrapolate to longer sequences; here, those above `block_size` are rejected."""

    biases: Tensor

    def __init__(self, block_size: int, n_embd: int, n_head: int, head_dim: int):
        super().__init__(block_size, n_embd, n_head, head_dim)
        slopes = torch.tensor(alibi_slopes(n_head), device="cpu")
        positions = torch.arange(block_size, device="cpu")
        distance = (positions[:, None] - positions).float()
        biases = -slopes[:, None, None] * distance
        biases = biases.masked_fill(distance < 0, -torch.inf)
        self.register_buffer("biases", biases, persistent=False)

    def bias(self, length: int) -> Tensor | None:
        return self.biases[:, :length, :length]

    def bias_at(self, position_ids: Tensor, length: int) -> Tensor:
        return self.biases[:, position_ids, :length].transpose(0, 1)


def alibi_slopes(n_head: int) -> list[float]:
    """Return 2^(-8/n), 2^(-16/n), ... for n heads if n is a power of two; else the slopes of the next lower
    power of two, then every second slope of the next higher one, as in the authors' code."""
    power = 2 ** math.floor(math.log2(n_head))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return slopes + between[: n_head - power]


POSITIONS: dict[str, type[Position]] = {"learned": Learned, "rope": Rotary, "alibi": ALiBi}


# ----------------------------------------------------------------------------- attention


def repeats_kv(device_type: str, dtype: torch.dtype, bias: Tensor | None) -> bool:
    """Return whether keys and values are repeated for all query heads of their group: on CUDA, except in
    bfloat16 without a bias.

    Of the fused kernels only flash attention takes grouped keys and values. It cannot be used with a bias, in
    float32, or on GPUs without bfloat16 (where our default is float16). In these cases torch would fall back
    to a kernel that writes all scores to memory; with repeated keys another fused kernel can be used.
    """
    return device_type == "cuda" and (bias is not None or dtype != torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Return causal attention, (B, nh, T, hs), of q of that shape and k, v (B, n_kv_head, T, hs).

    `bias`, broadcastable to (B, nh, T, T), is added to the scores and masks the future; None: causal mask.
    `dropout`: dropout probability of the attention weights.
    """
    q_per_kv, T = q.shape[1] // k.shape[1], q.shape[2]
    grad_enabled = torch.is_grad_enabled()
    fused = q.dtype != torch.bfloat16 or q.device.type != "cpu" or (T > 512 and grad_enabled)
    if q_per_kv > 1 and (not fused or repeats_kv(q.device.type, q.dtype, bias)):
        k, v, q_per_kv = k.repeat_interleave(q_per_kv, 1), v.repeat_interleave(q_per_kv, 1), 1
    if fused:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=bias is None, enable_gqa=q_per_kv > 1
        )
    # SDPA's bfloat16 backward pass is slow on CPUs. Forward and backward pass in ms, SDPA / this code, for q
    # of shape (B, nh, T, hs): 13.5 / 2.2 at (16, 4, 64, 32); 27 / 15 at (4, 6, 256, 64); 41 / 24 at
    # (2, 6, 512, 64). Forward pass only, where chunks of queries skip most masked keys: 5.6 / 3.1 at
    # (1, 12, 499, 64).
    if bias is None:
        bias = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    q, outputs, chunk_size = q * q.shape[3] ** -0.5, [], T if grad_enabled else 128
    for first in range(0, T, chunk_size):
        last = min(T, first + chunk_size)
        scores = q[:, :, first:last] @ k[:, :, :last].mT + bias[..., first:last, :last]
        outputs.append(F.dropout(torch.softmax(scores, dim=-1), dropout) @ v[:, :, :last])
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


class LayerCache(NamedTuple):
    """View of a `Cache` for the attention of one layer."""

    position_ids: Tensor | None  # positions of the input tokens, int64 (B, T); None: 0 ... T-1
    # attend(q, k, v, uncached): store k and v, and return the attention. `uncached` is a function of q, k and
    # v, the model's own attention, to be used while the cache is empty (prefill).
    attend: Callable[..., Tensor]


class Cache(Protocol):
    """KV cache of the tokens processed so far (inference/kv_cache.py)."""

    position_ids: Tensor | None  # see LayerCache.position_ids

    def previous_embeddings(self, x: Tensor) -> Tensor:
        """Return the embedding of the token before each token of x (B, T, C)."""

    def with_context(self, idx: Tensor) -> Tensor:
        """Store idx (B, T) and return it with the `ngrams.context` tokens before it, -1 before the sequence
        starts: (B, context + T)."""

    def layer(self, number: int) -> LayerCache:
        """Return the view for the attention of layer `number`."""


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the attention bias (B, 1, T, T) that masks the future and all documents but a token's own, from
    document ids (B, T)."""
    visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


class CausalSelfAttention(nn.Module):
    """Causal self-attention with multiple heads and a projection into the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.qk_heads = [config.n_head, config.n_kv_head or config.n_head]  # numbers of query and key heads
        # output channels of q, k and v in c_attn
        self.qkv_widths = [n * self.head_size for n in (*self.qk_heads, self.qk_heads[1])]
        self.c_attn = nn.Linear(config.n_embd, sum(self.qkv_widths), bias=config.bias)
        self.c_proj = nn.Linear(self.qkv_widths[0], config.n_embd, bias=config.bias)
        self.qk_norm = RMSNorm() if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, position: Position, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        # Queries and keys are adjacent and processed alike: one call for both.
        # qk: (B, nh + n_kv_head, T, hs), v: (B, n_kv_head, T, hs)
        parts = self.c_attn(x).split([self.qkv_widths[0] + self.qkv_widths[1], self.qkv_widths[2]], dim=2)
        qk, v = (part.view(B, T, -1, self.head_size).transpose(1, 2) for part in parts)
        ids = cache.position_ids if cache else None
        q, k = position.rotate(self.qk_norm(qk), ids).split(self.qk_heads, dim=1)
        bias = position.bias(T)
        if mask is not None:  # (B, 1, T, T)
            bias = mask if bias is None else mask + bias
        bias = bias if bias is None else bias.to(q.dtype)
        attend = partial(attention, bias=bias, dropout=self.dropout if self.training else 0.0)
        y = attend(q, k, v) if cache is None else cache.attend(q, k, v, attend)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, -1)))


class Smear(nn.Module):
    """Add the previous token's embedding, scaled by a learned weight per channel (initialized to 0), so that
    the first block already sees bigrams (RWKV, Peng et al. 2023, shifts tokens in every block)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1] if cache is None else cache.previous_embeddings(x)
        return x + self.weight * previous


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        # A gated MLP is 2/3 as wide, rounded to a multiple of 8, for the same number of FLOPs.
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
    """Return the mean cross-entropy in nats of targets (B, T), excluding IGNORE, from logits (B, T, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class GPT(nn.Module):
    """GPT language model with the architecture `config`, initialized from torch's global RNG unless on the
    meta device.

    Raise ValueError if n_embd is not divisible by n_head and head_dim is 0, and KeyError for an unknown
    position, norm, activation or init.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if not config.head_dim and config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
        self.config = config
        # Call MKL's vector functions once from one thread: when the first call was multi-threaded, 1 of 30
        # processes got less accurate values, which changed bits of rotary tables and soft-capped logits.
        torch.zeros(1, device="cpu").cos()
        # from_pretrained skips nn.Embedding's own initialization; INITS initializes all weights
        table = torch.empty(config.padded_vocab_size, config.n_embd)
        self.wte = nn.Embedding.from_pretrained(table, freeze=False)
        sizes = (config.block_size, config.n_embd, config.n_head, config.head_size)
        self.position = POSITIONS[config.position](*sizes)
        self.smear = Smear(config) if config.smear else None
        self.ngrams = None
        if config.ngram_orders:
            from nanogpt.ngrams.embedding import NGramEmbedding

            self.ngrams = NGramEmbedding(config)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = NORMS[config.norm](config)
        self.packed_head: nn.Module | None = None  # quantized LM head (quantize.py)
        self.loss_chunk_size = 0  # tokens per chunk of chunked_cross_entropy; 0: not chunked
        self.compiled_loss: Callable[..., Any] | None = None  # compiled `loss`; set by compile.wrap
        # (idx, targets[, documents]) -> losses; set by compile.train_function for validation.py
        self.compiled_token_losses: Callable[..., Any] | None = None
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if not self.wte.weight.is_meta:  # meta weights are loaded later; initializing them imports sympy
            INITS[config.init](self)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, loss) of predicting the next token at each position.

        idx, targets: int64 (B, T), T <= block_size; targets equal to IGNORE (-1) are excluded. documents:
        int64 (B, T), document ids; attention is masked across documents, positions are not reset.
        reduction: "mean" or "none".

        Without targets: logits (B, T, vocab_size), and None. With targets, loss is the mean cross-entropy in
        nats or, with reduction "none", that of each target, (B, T), 0 where excluded; logits are None with
        reduction "none", `loss_chunk_size` or `compiled_loss`. Raise ValueError if T > block_size.
        """
        x = self.hidden(idx, documents=documents)
        if targets is None:
            return self.head(x), None
        if reduction == "none":
            return None, self.token_losses(x, targets)
        if self.loss_chunk_size:
            from nanogpt.chunked_loss import chunked_cross_entropy

            chunk, vocab_size, cap = self.loss_chunk_size, self.config.vocab_size, self.config.softcap
            x, targets = x.flatten(0, 1), targets.flatten()
            return None, chunked_cross_entropy(x, self.head_table, targets, chunk, vocab_size, cap)
        if self.compiled_loss:
            return None, self.compiled_loss(x, targets)
        logits = self.head(x)
        return logits, cross_entropy(logits, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of targets (B, T) from hidden states x (B, T, C)."""
        return cross_entropy(self.head(x), targets)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each target, (B, T), 0 for those equal to IGNORE, from hidden states
        x (B, T, C) and targets (B, T), without holding all logits at once."""
        length = logits_chunk_size(x.device.type, self.config.vocab_size)
        chunks = zip(x.flatten(0, 1).split(length), targets.flatten().split(length), strict=True)
        losses = [
            F.cross_entropy(self.head(hidden), target, ignore_index=IGNORE, reduction="none")
            for hidden, target in chunks
        ]
        return torch.cat(losses).view_as(targets)

    @property
    def head_table(self) -> Tensor:
        """Weight of the LM head, including vocabulary padding: (padded_vocab_size, C)."""
        return (self.lm_head or self.wte).weight

    def hidden(self, idx: Tensor, cache: Cache | None = None, documents: Tensor | None = None) -> Tensor:
        """Return the final hidden states, after ln_f: (B, T, C) from idx (B, T).

        Without `cache`, positions start at 0; with it, idx continues the cached sequences. `documents`
        (B, T): document ids; attention is masked across documents. Raise ValueError if T > block_size.
        """
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens do not fit in block_size={self.config.block_size}")
        x = tokens = self.wte(idx)
        if self.smear is not None:
            x = self.smear(x, cache)
        mask = None
        if documents is not None:
            # first token of each document but the first: smear must not add the token of another document
            first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
            x, mask = torch.where(first[..., None], tokens, x), document_mask(documents, x.dtype)
        if self.ngrams is not None:
            ids = cache.with_context(idx) if cache else F.pad(idx, (self.ngrams.context, 0), value=-1)
            x = self.ngrams(x, ids, documents)
        x = self.drop(self.position.embed(x, cache.position_ids if cache else None))
        for number, block in enumerate(self.h):
            x = block(x, self.position, cache.layer(number) if cache else None, mask)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states x (..., C). Vocabulary padding is cut off, so that it gets
        neither probability nor gradient and is never sampled."""
        if self.packed_head is not None:
            logits = self.packed_head(x)
        else:
            whole = computes_padding_logits(x.device)
            logits = compute_logits(x, self.head_table, self.config.vocab_size, whole)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # for the softmax
        return soft_cap(logits, self.config.softcap)

    def part_heights(self) -> dict[str, list[int]]:
        """Return the numbers of rows of q, k and v in each c_attn.weight, by parameter name."""
        attentions = ((n, m) for n, m in self.named_modules() if isinstance(m, CausalSelfAttention))
        return {f"{name}.c_attn.weight": module.qkv_widths for name, module in attentions}

    def n_params(self, lookup_tables: bool = True) -> int:
        """Return the number of parameters without vocabulary padding; a tied LM head counts once. With
        `lookup_tables=False`, exclude weights that are only looked up: learned positions, n-gram tables and
        an untied token embedding."""
        config = self.config
        excluded = (config.padded_vocab_size - config.vocab_size) * (1 if config.tied else 2)
        if not lookup_tables:
            excluded += config.block_size * (config.position == "learned")
            excluded += 0 if config.tied else config.vocab_size
        named = ((n, p) for n, p in self.named_parameters() if lookup_tables or n != NGRAM_TABLES)
        return sum(p.numel() for _, p in named) - excluded * config.n_embd

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters, by default without position embeddings, an untied token embedding
        and n-gram tables. As in nanoGPT, a tied LM head counts once; unlike there, vocabulary padding does
        not count."""
        return self.n_params(lookup_tables=not non_embedding)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """Return a model in training mode, in float32, with the weights of `name`: gpt2 to gpt2-xl, a Hugging
        Face folder or hub name, a run folder, or nanoGPT's ckpt.pt. Raise UserError if there are none."""
        return import_module("nanogpt.inference.compat").from_pretrained(name)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Append `max_new_tokens` sampled tokens to each sequence of idx (B, T) and return the result; beyond
        block_size the context slides. top_k=0: all tokens. torch.manual_seed seeds the samples."""
        return import_module("nanogpt.inference.compat").generate(
            self, idx, max_new_tokens, temperature, top_k
        )

    def flops_per_token(self) -> int:
        """Return the FLOPs of training per token (see the function of the same name)."""
        return flops_per_token(self.n_params(lookup_tables=False), self.config)


def flops_per_token(n_params: int, config: GPTConfig) -> int:
    """Return the FLOPs of forward and backward pass per token: 6 N + 12 L C T (Chowdhery et al. 2022, PaLM,
    appendix B; exact if nh hs = C).

    `n_params` counts the weights used in matmuls: with the LM head, tied or not, and without embeddings that
    are only looked up. Attention is counted in full, although half of it is masked, for comparison with
    published figures.
    """
    return 6 * n_params + 12 * config.n_layer * config.n_embd * config.block_size


# ----------------------------------------------------------------------------- initialization


@torch.no_grad()
def init_gpt2(model: GPT) -> None:
    """Initialize as GPT-2: N(0, 0.02²), scaled by 1/sqrt(2 n_layer) for the projections into the residual
    stream, so that its variance does not grow with depth. Biases, smear weights and n-gram tables are
    initialized to 0, gains to 1."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "smear.weight")) or name == NGRAM_TABLES:
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            residual = name.endswith("c_proj.weight")
            parameter.normal_(std=0.02 / math.sqrt(2 * model.config.n_layer) if residual else 0.02)


@torch.no_grad()
def init_zero(model: GPT) -> None:
    """Initialize projections into the residual stream and an untied LM head to 0, so that every block is
    initially the identity (Zhang et al. 2019, Fixup; Yang et al. 2022, muP); other matrices of blocks to
    N(0, 1/fan_in), an untied embedding to N(0, 1)."""
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
    """Initialize as GPT-2, but scale the residual projections of block i by 1/sqrt(2 (i + 1)): earlier blocks
    start with larger outputs (compare depth-scaled initialization, Zhang et al. 2019)."""
    init_gpt2(model)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            block = int(name.split(".")[1])
            parameter.normal_(std=0.02 / math.sqrt(2 * (block + 1)))


INITS: dict[str, Callable[[GPT], None]] = {"gpt2": init_gpt2, "zero": init_zero, "depth": init_depth}
