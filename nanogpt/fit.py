"""--batch_size=auto: the largest micro-batch that fits in a GPU's memory, found by trying."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from nanogpt import optim, steps
from nanogpt.config import picked
from nanogpt.distributed import parallel
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import OptimConfig
from nanogpt.runtime import Machine


def batch_size(config: Any, machine: Machine, vocab_size: int) -> int:
    """Windows a micro-batch for updates of batch_tokens, with the most that one step of this run can take in.
    UserError where there is no telling."""
    windows, rest = divmod(config.batch_tokens, config.block_size)
    if not windows or rest:
        raise UserError(
            f"--batch_size=auto shares out the tokens of an iteration: give --batch_tokens, a multiple of "
            f"block_size={config.block_size}, such as {480 * config.block_size}"
        )
    if machine.device.type != "cuda":
        raise UserError(
            f"--batch_size=auto asks a GPU how much fits, and this is {machine.name()}; give a number, such "
            f"as --batch_size=12"
        )
    shape = picked(GPTConfig, config, vocab_size=vocab_size)
    world = machine.world
    found = largest(windows, lambda rows: fits(rows, shape, config, machine), world.any, world.size)
    if not found:
        raise UserError(
            f"--batch_size=auto: not one window of {config.block_size} tokens fits in the memory of "
            f"{machine.name()}; give a smaller --block_size or model"
        )
    return found


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


def fits(rows: int, shape: GPTConfig, config: Any, machine: Machine) -> bool:
    """Whether two updates with micro-batches of `rows` windows can be made, optimizer and all."""
    try:
        _try(rows, shape, config, machine)
        enough = True
    except torch.OutOfMemoryError:
        enough = False
    if not enough:
        gc.collect()  # what the failure has left: only without it does the next try have all the memory
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return enough


def _try(rows: int, shape: GPTConfig, config: Any, machine: Machine) -> None:
    model = GPT(shape).to(machine.device)
    model.loss_rows = config.loss_rows
    if config.recompute:
        parallel.recompute(model, machine)
    rules = picked(OptimConfig, config)
    optimizer = optim.build(rules, model.named_parameters(), model.fused_rows(), machine.half)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
    tokens = torch.zeros(rows, config.block_size, dtype=torch.int64, device=machine.device)
    alone = Machine(machine.device, machine.dtype, machine.reason, casting=machine.casting)  # nobody is asked
    for _ in range(2):  # the second finds the gradients' memory in the pieces that the first has left
        steps.update(
            machine.in_dtype(model),
            optimizer,
            [(tokens, tokens)],
            windows=rows,
            lr=0.0,
            grad_clip=config.grad_clip,
            machine=alone,
            scaler=scaler,
        )
    machine.synchronize()
