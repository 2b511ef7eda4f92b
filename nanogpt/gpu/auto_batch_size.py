"""--batch_size=auto: the largest micro-batch that fits in GPU memory, found by trial runs."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from nanogpt.errors import UserError
from nanogpt.options import BatchOptions
from nanogpt.runtime import Machine

B = TypeVar("B", bound=BatchOptions)


def choose(options: B, machine: Machine, divided: str, trial: Callable[[int], None]) -> B:
    """Return `options` with batch_size set to the largest micro-batch of batch_tokens that `trial` can run.

    Raise UserError without a CUDA GPU or batch_tokens, or if the model will be sharded (`divided`: why).
    """
    if divided:
        raise UserError(
            f"--batch_size=auto tries the whole model on one GPU, but it will be sharded ({divided}); "
            f"give a number, such as --batch_size=12"
        )
    sequences, rest = divmod(options.batch_tokens, options.block_size)
    if not sequences or rest:
        raise UserError(
            f"--batch_size=auto splits the tokens of an iteration: give --batch_tokens, a multiple of "
            f"block_size={options.block_size}, such as {480 * options.block_size}"
        )
    if machine.device.type != "cuda":
        raise UserError(
            f"--batch_size=auto needs a CUDA GPU, and this is {machine.name()}; give a number, such "
            f"as --batch_size=12"
        )
    world = machine.world
    rows = largest(sequences, partial(fits, trial=trial), world.any_rank, world.size)
    if not rows:
        raise UserError(
            f"--batch_size=auto: not one sequence of {options.block_size} tokens fits in the memory of "
            f"{machine.name()}; give a smaller --block_size or model"
        )
    return replace(options, batch_size=rows)


def largest(
    sequences: int, fits: Callable[[int], bool], any_of: Callable[[bool], bool], processes: int = 1
) -> int:
    """Return the largest divisor of `sequences` that is at most a rank's share (of `processes` ranks) and
    fits; 0 if none does. After a failure, at least halve the size. `any_of`: return whether its argument is
    true on any rank, so that all ranks try the same sizes."""
    limit = -(-sequences // processes)
    while limit:
        rows = next(n for n in range(limit, 0, -1) if sequences % n == 0)
        if not any_of(not fits(rows)):
            return rows
        limit = rows // 2
    return 0


def fits(rows: int, trial: Callable[[int], None]) -> bool:
    """Return whether `trial`, two iterations with micro-batches of `rows` sequences, fits in memory."""
    try:
        trial(rows)
        enough = True
    except torch.OutOfMemoryError:
        enough = False
    gc.collect()  # free what a failed trial left, so that the next one has all the memory
    torch.cuda.empty_cache()
    return enough
