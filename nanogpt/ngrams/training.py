"""Training of n-gram tables: limits, and row-wise Adagrad, with one accumulator for each row, not for each
weight (Duchi et al. 2011; per row as in Naumov et al. 2019, DLRM).

A step reads a few thousand rows. The others have no gradient, and without momentum, moving averages and
weight decay the rule leaves them as they are, so updating only the rows read, as on a CPU, is exactly the
dense update.
"""

from typing import Any

import torch
from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.ngrams.embedding import NGramEmbedding

RATE = 30.0  # learning rate relative to AdamW's; 20 to 80 end within 0.003 nats (docs/ablations.md)


def require_possible(config: Any, free: int | None, sharded: bool) -> None:
    """Raise UserError if a run cannot train the tables of `config`, a GPTConfig: with `free` bytes of memory
    (None: unknown) or weights `sharded` over ranks."""
    with torch.device("meta"):
        tables = NGramEmbedding(config)
    given, size = f"--ngram_orders={config.ngram_orders}", 2 * tables.weight.nbytes
    if tables.context >= config.block_size:
        raise UserError(f"{given}: no {tables.context + 1}-gram fits into --block_size={config.block_size}")
    if size > (free or size):
        raise UserError(
            f"{given} --ngram_rows={config.ngram_rows}: tables and a copy of them take "
            f"{size / 1e9:,.1f} GB, but {(free or 0) / 1e9:,.1f} GB are free; lower --ngram_rows"
        )
    if sharded:
        raise UserError(f"{given}: tables do not work with --parallel=fsdp or hsdp; use --parallel=ddp")


class RowAdagrad:
    def __init__(self, name: str, table: Tensor, layout: Any):  # an optim.Layout
        self.name, self.table, self.layout = name, table, layout
        self.sums = torch.zeros(len(table), device=table.device)  # of the mean square of each row's gradient

    def step(self, lr: float | Tensor) -> None:
        gradient = self.table.grad
        assert gradient is not None
        if not gradient.is_sparse:
            self.sums += gradient.square().mean(dim=1)
            self.table -= gradient * (lr / (self.sums.sqrt() + 1e-10))[:, None]
            return
        assert gradient.is_coalesced(), "clip_gradients coalesces it"
        rows, values = gradient.indices()[0], gradient.values()
        sums = self.sums.index_select(0, rows).add_(values.square().mean(dim=1))
        self.sums.index_copy_(0, rows, sums)
        self.table.index_add_(0, rows, values * (-lr / (sums.sqrt() + 1e-10))[:, None])

    def state_shards(self) -> dict[str, Any]:
        return {f"{self.name}.sums": self.layout.replicated_shard(self.sums)}
