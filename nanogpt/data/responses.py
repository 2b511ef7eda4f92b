"""Batches of prompts and responses, of which only the responses are targets: every target weighs the same."""

from collections.abc import Iterator

from torch import Tensor

from nanogpt.data.loader import TrainBatches, gather
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE


def weighted(batches: TrainBatches, step: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """The micro-batches of update number `step` with their loss weights, as TrainBatches.weighted."""
    targets = count_targets(batches, step)
    for batch in batches.step(step):
        yield (batch[1] != IGNORE).sum() / targets, batch


def count_targets(batches: TrainBatches, step: int) -> int:
    """How many targets of update number `step` are scored in all processes, which must ask together; 0 for
    all of them. UserError if none is."""
    if (scored := batches.tokens.scored) is None:
        return 0
    masks = (gather(scored, starts, batches.block_size)[1] for starts in batches.starts(step))
    if not (count := batches.total(sum(int(mask.sum()) for mask in masks))):
        raise UserError(
            f"none of the {batches.windows(step)} windows of iteration {step} holds a token of a response; "
            f"give a larger --block_size or --batch_size"
        )
    return count
