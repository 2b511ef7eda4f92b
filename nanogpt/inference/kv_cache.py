"""KV cache: stores the keys and values of processed tokens, so that each token is computed once.

A cache has a fixed number of slots, each holding one sequence of any length. Three classes run a model with
it; `GPT.hidden` takes an instance as `past`:

    Prefill          processes the first tokens of several sequences in one batch, as in training
    ChunkedPrefill   processes further tokens of one sequence
    Step             processes one token in each of the first B slots (on a CPU, cpu_decode.py does)

Prefill pads sequences on the right: attention is causal, so padding does not affect earlier tokens, and every
sequence starts at position 0.

Shapes: S slots, B sequences, T tokens, C channels, nh query heads, n_kv_head key/value heads, hs channels per
head.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.model import GPT, LayerCache, attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class KVCache:
    """Keys and values of `slots` sequences of `length` tokens: (n_layer, S, n_kv_head, length, hs) each."""

    def __init__(self, model: GPT, slots: int, length: int, dtype: torch.dtype):
        config, device = model.config, model.wte.weight.device
        # One tensor, so that both are copied at once. Zeros: masked entries must not be NaN, and untouched
        # pages of zeros take no physical memory.
        kv_heads = config.n_kv_head or config.n_head
        shape = (config.n_layer, 2, slots, kv_heads, length, config.head_size)
        self.both = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = self.both.unbind(1)
        # of the last token, for smear
        self.embeddings = torch.zeros((slots, config.n_embd), dtype=dtype, device=device)
        # For n-grams: the token at position t is at `context` + t, after `context` times -1.
        self.context = model.ngrams.context if model.ngrams else 0
        self.ids = torch.full((slots, self.context + length), -1, device=device)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slots `targets`."""
        for target in targets:
            self.both[:, :, target, :, :length] = self.both[:, :, source, :, :length]
            self.ids[target, : self.context + length] = self.ids[source, : self.context + length]
            self.embeddings[target] = self.embeddings[source]

    def with_context(self, idx: Tensor, slots: Sequence[int] | Tensor, begin: int | Tensor) -> Tensor:
        """Store idx (B, T) in `slots` from position `begin`, an int or (B, 1), on; return it after the tokens
        before it: (B, context + T)."""
        rows = torch.as_tensor(slots, device=idx.device)[:, None]
        columns = begin + torch.arange(self.context + idx.shape[1], device=idx.device)
        self.ids[rows, columns[..., self.context :]] = idx
        return self.ids[rows, columns]


def masked_after(at: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return the causal attention bias (B, length) of queries at positions (B,): -inf after them, else 0."""
    behind = torch.arange(length, device=at.device) > at[:, None]
    return torch.zeros(behind.shape, dtype=dtype, device=at.device).masked_fill_(behind, -torch.inf)


def one_query(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention with one query per head, (B, nh, 1, hs), over keys and values (B, n_kv_head, T, hs); `bias`
    (B, 1 or nh, 1, T) is added to the scores."""
    B, heads, _, hs = q.shape
    groups = (B, keys.shape[1], heads // keys.shape[1])  # batch the queries that share a key head
    if bias is not None and bias.shape[1] > 1:
        bias = bias.view(*groups, keys.shape[2])
    rows = q.reshape(*groups, hs).to(keys.dtype)
    y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias)
    return y.view(B, heads, 1, hs).to(q.dtype)


class Prefill:
    """Prefill of `slots` from position 0; row i has `lengths[i]` tokens, then padding."""

    position_ids: Tensor | None = None

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int]):
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def previous_embeddings(self, x: Tensor) -> Tensor:
        """Return the previous token's embedding for each token of x (B, T, C), zeros for the first."""
        for row, (slot, length) in enumerate(zip(self.slots, self.lengths, strict=True)):
            self.cache.embeddings[slot] = x[row, length - 1]
        return F.pad(x, (0, 0, 1, 0))[:, :-1]

    def with_context(self, idx: Tensor) -> Tensor:
        return self.cache.with_context(idx, self.slots, 0)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(None, partial(self._attend, number))

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, plain: Attention) -> Tensor:
        for row, (slot, length) in enumerate(zip(self.slots, self.lengths, strict=True)):
            self.cache.keys[number, slot, :, :length] = k[row, :, :length]
            self.cache.values[number, slot, :, :length] = v[row, :, :length]
        return plain(q, k, v)


class ChunkedPrefill:
    """Prefill of the next `count` tokens of the sequence in `slot`, which has `begin` tokens cached.

    `bias` (1, nh, count, begin + count) is added to the scores and includes the causal mask; None: causal
    mask only. `last` (C,) is the embedding of the preceding token.
    """

    def __init__(
        self, cache: KVCache, slot: int, begin: int, count: int, last: Tensor, bias: Tensor | None = None
    ):
        self.cache, self.slot, self.begin, self.end, self.last = cache, slot, begin, begin + count, last
        device = cache.keys.device
        dtype = torch.float32 if device.type == "cpu" else cache.keys.dtype  # the fastest dtype for SDPA
        at = torch.arange(begin, self.end, device=device)
        self.position_ids: Tensor | None = at[None]
        self.bias = masked_after(at, self.end, dtype) if bias is None else bias.to(dtype)

    def previous_embeddings(self, x: Tensor) -> Tensor:
        """Return the previous token's embedding for each token of x (1, T, C)."""
        self.cache.embeddings[self.slot] = x[0, -1]
        return torch.cat([self.last.expand(1, 1, -1).to(x.dtype), x[:, :-1]], dim=1)

    def with_context(self, idx: Tensor) -> Tensor:
        return self.cache.with_context(idx, [self.slot], self.begin)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self.position_ids, partial(self._attend, number))

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, plain: Attention) -> Tensor:
        keys, values = (
            kept[number, self.slot : self.slot + 1] for kept in (self.cache.keys, self.cache.values)
        )
        keys[:, :, self.begin : self.end], values[:, :, self.begin : self.end] = k, v
        keys, values = keys[:, :, : self.end], values[:, :, : self.end]
        rows, keys, values = (part.to(self.bias.dtype) for part in (q, keys, values))
        return attention(rows, keys, values, self.bias, 0.0).to(q.dtype)


class Step:
    """Decode step of one token in each of the first B slots; the token of slot i has position `positions[i]`.

    `bias` (B, nh, 1, T) is added to the scores and includes the causal mask; T is the highest position + 1.
    None: causal mask only.
    """

    def __init__(self, cache: KVCache, positions: Sequence[int], bias: Tensor | None = None):
        self.cache, self.count, self.length = cache, len(positions), max(positions) + 1
        device = cache.keys.device
        positions_, rows = torch.tensor([positions, range(len(positions))], device=device)
        self.position_ids: Tensor | None = positions_[:, None]
        self.alike = min(positions) + 1 == self.length
        if bias is None and not self.alike:
            bias = masked_after(positions_, self.length, cache.keys.dtype)[:, None, None]
        self.bias = bias if bias is None else bias.to(cache.keys.dtype)
        self.index = (rows, slice(None), positions_)

    def previous_embeddings(self, x: Tensor) -> Tensor:
        """Return the previous tokens' embeddings (B, 1, C), and store x in their place."""
        last = self.cache.embeddings[: self.count]
        before = last.clone()
        last.copy_(x[:, 0])
        return before[:, None].to(x.dtype)

    def with_context(self, idx: Tensor) -> Tensor:
        assert self.position_ids is not None
        return self.cache.with_context(idx, torch.arange(self.count, device=idx.device), self.position_ids)

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self.position_ids, partial(self._attend, number))

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, plain: Attention) -> Tensor:
        keys, values = self.cache.keys[number], self.cache.values[number]
        if self.alike:
            last = self.length - 1
            keys[: self.count, :, last : self.length], values[: self.count, :, last : self.length] = k, v
        else:
            keys[self.index], values[self.index] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(keys.dtype)
        keys, values = keys[: self.count, :, : self.length], values[: self.count, :, : self.length]
        return one_query(q, keys, values, self.bias)
