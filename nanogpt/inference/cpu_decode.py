"""Low-overhead decode step on a CPU: equivalent to `GPT.hidden` with a `Step`, in fewer calls.

A decode step costs reading the weights (3.7 ms for GPT-2 124M in int8 on two cores) plus the overhead of
calling modules, creating views and running small ops. Here attributes are looked up once, sequences are rows
(B, C), and a layer takes about a dozen calls. tests/test_generate.py compares it with the plain model.

Shapes: B sequences, C channels (n_embd), nh query heads, n_kv_head key/value heads, hs channels per head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.inference import cpu_kernels
from nanogpt.inference.kv_cache import KVCache, masked_after, one_query
from nanogpt.model import ALiBi, Learned, Rotary, apply_rotary

Map = Callable[[Tensor], Tensor]


class _Block(NamedTuple):
    """Layers of a block as bound functions: calling nn.Module costs about 1 us per call."""

    ln_1: Map
    c_attn: Map
    attn_c_proj: Map
    ln_2: Map
    c_fc: Map
    activation: Map
    mlp_c_proj: Map


class DecodeStep:
    """Process one token in each of the first B slots of `cache`. Neither the model's modules nor the cache's
    tensors may be replaced."""

    def __init__(self, model: Any, cache: KVCache):  # a GPT
        config = model.config
        self.model, self.cache, self.position = model, cache, model.position
        self.heads, self.kv_heads = config.n_head, config.n_kv_head or config.n_head
        self.head_size, self.qk_norm = config.head_size, config.qk_norm
        self.native = cache.keys.dtype == _own(model) and _natively(model)
        blocks = [
            _Block(
                block.ln_1.forward,
                block.attn.c_attn.forward,
                block.attn.c_proj.forward,
                block.ln_2.forward,
                block.mlp.c_fc.forward,
                block.mlp.activation,
                block.mlp.c_proj.forward,
            )
            for block in model.h
        ]
        self.layers = list(zip(blocks, cache.keys.unbind(0), cache.values.unbind(0), strict=True))

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """Return hidden states (B, C) of tokens (B,), int64, where slot i is at position `positions[i]`."""
        B, length = len(positions), max(positions) + 1
        at = torch.tensor(positions)
        x = self._embed(tokens, at)
        turn = None
        if isinstance(self.position, Rotary):
            turn = [table[at][:, None] for table in (self.position.cos, self.position.sin)]
        attend = self._attention(at, length)
        for block, keys, values in self.layers:
            parts = block.c_attn(block.ln_1(x)).view(B, -1, self.head_size)
            q, kv = self._split(parts, turn)
            x = x + block.attn_c_proj(attend(q, kv, keys, values))
            x = x + block.mlp_c_proj(block.activation(block.c_fc(block.ln_2(x))))
        return self.model.ln_f(x)

    def _embed(self, tokens: Tensor, at: Tensor) -> Tensor:
        x = self.model.wte.forward(tokens)
        if self.model.smear is not None:
            last = self.cache.embeddings[: len(x)]
            before = last.to(x.dtype, copy=True)
            last.copy_(x)
            x = x + self.model.smear.weight * before
        if self.model.ngrams is not None:
            ids = self.cache.with_context(tokens[:, None], range(len(x)), at[:, None])
            x = self.model.ngrams(x[:, None], ids)[:, 0]
        return x + F.embedding(at, self.position.wpe.weight) if isinstance(self.position, Learned) else x

    def _split(self, parts: Tensor, turn: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Split (B, nh + 2 n_kv_head, hs) into q (B, nh, hs) and kv (2, B, n_kv_head, hs)."""
        if not self.qk_norm and turn is None:
            q, kv = parts[:, : self.heads], parts[:, self.heads :]
            return q, kv.view(-1, 2, self.kv_heads, self.head_size).transpose(0, 1)
        qk, v = parts[:, : -self.kv_heads], parts[:, -self.kv_heads :]
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_size,))
        if turn is not None:
            qk = apply_rotary(qk, turn[0].to(qk.dtype), turn[1].to(qk.dtype))
        return qk[:, : self.heads], torch.stack([qk[:, self.heads :], v])

    def _attention(self, at: Tensor, length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return the function that caches the new keys and values and attends: y (B, nh hs) from q (B, nh,
        hs), kv (2, B, n_kv_head, hs), and the layer's cached keys and values."""
        if self.native:
            return partial(cpu_kernels.attend, lengths=at + 1)
        B, dtype, bias = len(at), self.cache.keys.dtype, None
        alike = bool((at + 1 == length).all())
        if isinstance(self.position, ALiBi):
            bias = self.position.bias_at(at[:, None], length).to(dtype)
        elif not alike:
            bias = masked_after(at, length, dtype)[:, None, None]
        here = (slice(B), slice(None), length - 1) if alike else (torch.arange(B), slice(None), at)

        def attend(q: Tensor, kv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys[here], values[here] = kv.to(dtype)
            y = one_query(q[:, :, None], keys[:B, :, :length], values[:B, :, :length], bias)
            return y.reshape(B, -1)

        return attend


def kept_in(model: Any) -> torch.dtype:
    """Return the KV cache dtype on a CPU: the activation dtype if cpu_kernels.cpp supports it, else float32.

    torch's attention takes 670 us for one bfloat16 query and 91 us for a float32 one (12 heads, 525 keys).
    """
    return _own(model) if _natively(model) else torch.float32


def _own(model: Any) -> torch.dtype:
    """Return the dtype of the model's activations."""
    return model.wte(torch.zeros(1, dtype=torch.int64)).dtype


def _natively(model: Any) -> bool:
    return not isinstance(model.position, ALiBi) and cpu_kernels.attends(_own(model), model.config.head_size)
