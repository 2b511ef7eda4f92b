"""GPT: a decoder-only transformer, exactly GPT-2 (Radford et al. 2019).

Learned positions, pre-norm blocks, GELU in its tanh form, and a head that shares its weights with the
token embedding. Parameters carry the names of OpenAI's and Hugging Face's release, so weights load by
name. The file needs torch and nothing else: devices, optimizers, files and text are other modules'.

Shapes: B batch, T tokens, C channels (n_embd), nh heads, hs channels a head, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -1  # a target with this value is not scored


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-2's
    "gelu": F.gelu,  # nanoGPT's; differs from GPT-2's by 5e-4 at most, and is faster on CPUs
}


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    vocab_multiple: int = 1  # the embedding table is padded to a multiple of this; ids are not

    def problems(self) -> list[str]:
        """What makes these numbers impossible, each with both values; empty if nothing does."""
        wrong = []
        if self.n_embd % self.n_head:
            wrong.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.activation not in ACTIVATIONS:
            wrong.append(f"activation={self.activation} is none of {', '.join(ACTIVATIONS)}")
        return wrong

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


GPT2_SIZES = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        # from_pretrained: the weights are drawn in init_weights, once
        self.wte = nn.Embedding.from_pretrained(
            torch.empty(config.padded_vocab_size, config.n_embd), freeze=False
        )
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        if (
            not self.wte.weight.is_meta
        ):  # shapes only: weights come from a file (and torch would import sympy)
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), and 1/sqrt(2 n_layer) of that for the projections into
        the residual stream, so that its variance does not grow with depth. Biases 0, gains 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Score each position's next token.

        idx, targets: int64 (B, T), T at most block_size; targets equal to IGNORE are left out.
        Returns logits (B, T, V) and, with targets, their mean cross-entropy in nats.
        """
        logits = self.head(self.hidden(idx))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return logits, loss

    def next_logits(self, idx: Tensor) -> Tensor:
        """Logits (B, V) of the token after idx (B, T)."""
        return self.head(self.hidden(idx)[:, -1])

    def hidden(self, idx: Tensor) -> Tensor:
        """What the last block leaves, normalised: (B, T, C) from idx (B, T)."""
        length = idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens do not fit in block_size={self.config.block_size}")
        x = self.drop(self.wte(idx) + self.wpe.weight[:length])
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C). The padding of the vocabulary is cut off
        before anything sees it: its rows get no probability, no gradient and no sample."""
        return F.linear(x, self.wte.weight[: self.config.vocab_size])

    def n_params(self, positions: bool = True) -> int:
        """Parameters, each counted once (the head is the embedding), the padding left out; without
        `positions`, those that multiply something."""
        unused = self.config.padded_vocab_size - self.config.vocab_size
        unused += 0 if positions else self.config.block_size
        return sum(p.numel() for p in self.parameters()) - unused * self.config.n_embd
