"""--batch_size=auto: the largest micro-batch that fits in a GPU's memory, found by trying."""

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
    """`options` with the windows of a micro-batch for updates of batch_tokens: the most that `trial` can run.
    UserError where that cannot be known, or where no process holds the whole model (`divided` says why)."""
    if divided:
        raise UserError(
            f"--batch_size=auto tries the whole model on one GPU, and it is to be divided ({divided}); "
            f"give a number, such as --batch_size=12"
        )
    windows, rest = divmod(options.batch_tokens, options.block_size)
    if not windows or rest:
        raise UserError(
            f"--batch_size=auto shares out the tokens of an iteration: give --batch_tokens, a multiple of "
            f"block_size={options.block_size}, such as {480 * options.block_size}"
        )
    if machine.device.type != "cuda":
        raise UserError(
            f"--batch_size=auto asks a GPU how much fits, and this is {machine.name()}; give a number, such "
            f"as --batch_size=12"
        )
    world = machine.world
    rows = largest(windows, partial(fits, trial=trial, machine=machine), world.any_rank, world.size)
    if not rows:
        raise UserError(
            f"--batch_size=auto: not one window of {options.block_size} tokens fits in the memory of "
            f"{machine.name()}; give a smaller --block_size or model"
        )
    return replace(options, batch_size=rows)


def largest(
    windows: int, fits: Callable[[int], bool], any_of: Callable[[bool], bool], processes: int = 1
) -> int:
    """The largest micro-batch that `windows`, shared by `processes`, can be made of and that fits, at most
    half of each that did not; 0 if none does. `any_of`: whether something is true in any process: they try
    and decide together."""
    most = -(-windows // processes)
    while most:
        rows = next(n for n in range(most, 0, -1) if windows % n == 0)
        if not any_of(not fits(rows)):
            return rows
        most = rows // 2
    return 0


def fits(rows: int, trial: Callable[[int], None], machine: Machine) -> bool:
    """Whether `trial`, two updates with micro-batches of `rows` windows, has the memory it needs."""
    try:
        trial(rows)
        enough = True
    except torch.OutOfMemoryError:
        enough = False
    if not enough:
        gc.collect()  # what the failure has left: only without it does the next try have all the memory
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return enough
