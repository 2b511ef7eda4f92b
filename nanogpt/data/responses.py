"""Batches of prompts and responses: only response tokens are targets, and all targets have equal weight."""

from collections.abc import Iterator

from torch import Tensor

from nanogpt.data.loader import TrainBatches, gather
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE


def weighted(batches: TrainBatches, step: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yield (loss weight, micro-batch) of iteration `step`, like TrainBatches.weighted."""
    targets = count_targets(batches, step)
    for batch in batches.step(step):
        yield (batch[1] != IGNORE).sum() / targets, batch


def count_targets(batches: TrainBatches, step: int) -> int:
    """Return the number of scored targets of iteration `step` over all ranks; 0 if every target is scored.

    Collective: call on all ranks. Raise UserError if no target is scored.
    """
    if (scored := batches.tokens.scored) is None:
        return 0
    masks = (gather(scored, starts, batches.block_size)[1] for starts in batches.starts(step))
    if not (count := batches.world.sum_int(sum(int(mask.sum()) for mask in masks))):
        raise UserError(
            f"none of the {batches.sequences(step)} sequences of iteration {step} contains a response token; "
            f"use a larger --block_size or --batch_size"
        )
    return count
