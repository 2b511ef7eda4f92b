"""n-gram embeddings (Huang et al. 2025, "Over-Tokenized Transformer"): embeddings of the n-grams that end
with a token are added to that of the token. Each n has its own table, which is looked up, not multiplied.

Each n has its own n_embd / len(orders) channels, which takes less memory than rows of n_embd channels and
loses nothing (docs/ablations.md). A table has a row for every n-gram if `ngram_rows` is large enough; else
n-grams share rows by a multiplicative hash. Tables start at zero. n-grams that would begin before the
sequence or in another document add nothing. The gradient is sparse on a CPU: see training.py.

Shapes: B sequences, T tokens, C channels, N the largest order.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, signed (Knuth, The Art of Computer Programming, 6.4)


class NGramEmbedding(nn.Module):
    """Tables of all orders as one parameter; row 0 stays zero and stands for a missing n-gram."""

    def __init__(self, config: Any):  # a GPTConfig
        super().__init__()
        self.orders = sorted(int(n) for n in config.ngram_orders.split(","))
        self.context = self.orders[-1] - 1  # preceding tokens that the longest n-gram needs
        # High powers of an even base are 0 modulo 2^64, which would drop the oldest tokens from a key: the
        # base is odd if keys can overflow.
        self.base = config.vocab_size
        if self.base ** self.orders[-1] >= 1 << 63:
            self.base |= 1
        self.rows = [min(self.base**n, config.ngram_rows) for n in self.orders]
        self.spare = config.n_embd % len(self.orders)
        # GPT initializes all weights
        self.weight = nn.Parameter(torch.empty(1 + sum(self.rows), config.n_embd // len(self.orders)))

    @property
    def sparse(self) -> bool:
        """Whether the gradient is sparse: not on a GPU, for which each micro-batch would wait, to count the
        rows read. Updating all rows is predicted to take less time."""
        return self.weight.device.type == "cpu"

    def forward(self, x: Tensor, idx: Tensor, documents: Tensor | None = None) -> Tensor:
        """Add the embeddings of all n-grams to x (B, T, C). idx: int64 (B, N - 1 + T), the tokens and those
        before them, -1 before the start of a sequence. documents: int64 (B, T), document ids."""
        rows = self.row_numbers(idx, documents)
        embeddings = F.embedding(rows, self.weight, padding_idx=0, sparse=self.sparse)
        return x + F.pad(embeddings.flatten(-2), (0, self.spare)).to(x.dtype)

    def row_numbers(self, idx: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the row of each n-gram, int64 (B, T, orders)."""
        T = idx.shape[1] - self.context
        if documents is not None:
            starts = F.pad(documents, (self.context, 0), value=-1)
        key, first = idx[:, self.context :], 1
        numbers: list[Tensor] = []
        for back in range(1, self.context + 1):
            before = slice(self.context - back, self.context - back + T)
            key = key * self.base + idx[:, before]
            if back + 1 not in self.orders:
                continue
            rows, number = self.rows[len(numbers)], key
            if rows < self.base ** (back + 1):  # the high bits of a product depend on all bits of the key
                number = ((key * MULTIPLIER >> 33) & 0x7FFFFFFF) * rows >> 31
            missing = idx[:, before] < 0
            if documents is not None:
                missing |= starts[:, before] != documents
            numbers.append((number + first).masked_fill(missing, 0))
            first += rows
        return torch.stack(numbers, dim=-1)
