"""torch.compile and activation checkpointing: loaded where one of them is asked for."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt import files
from nanogpt.errors import UserError
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.runtime import Machine

Function = Callable[..., Any]

# What the choice of --compile=auto rests on; nanoGPT's README says "a minute" and 250 to 135 ms a step.
COMPILING_S = 60.0  # before the first step, with nothing in the cache
SAVED = 0.25  # of the time of a step
EAGER_MFU = 0.3  # share of the chip's peak that a plain step reaches
UNKNOWN_PEAK = 100e12  # FLOP/s of a GPU that gpu/chips.py does not know


def pays(flops: float, peak: float | None) -> bool:
    """Whether compiling saves more time than it takes in a run of so many `flops` on a GPU of `peak` FLOP/s.

    It is worked out, not measured, so that a run and its resumed half choose the same.
    """
    plain_s = flops / (EAGER_MFU * (peak or UNKNOWN_PEAK))
    return SAVED * plain_s > COMPILING_S


def train_function(
    function: Function,
    how: bool | str,
    model: GPT,
    optimizer: Optimizer,
    shape: tuple[int, int],
    machine: Machine,
) -> Function:
    """Compile `function`, which computes the loss of `model` for idx of `shape` (B, T), as `how` says; print
    a line where that does not work."""
    trial = partial(warm_up, optimizer=optimizer, shape=shape, machine=machine)
    head = model if machine.device.type == "cuda" else None
    compiled, notice = wrap(without_logits(function), compile=how, trial=trial, blocks=model.h, head=head)
    if notice:
        print(notice)
    return compiled


def without_logits(function: Function) -> Function:
    """`function`, which gives logits and a loss, with None for the logits: a compiler need not write what
    nobody is given, 13 GB in float32 for 64 x 1,024 tokens of GPT-2's vocabulary."""

    def loss_alone(*inputs: Tensor) -> Any:
        return None, function(*inputs)[1]

    return loss_alone


def warm_up(
    model: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    shape: tuple[int, int],
    machine: Machine,
) -> None:
    """Compile a model by one forward and backward pass of idx with `shape` (B, T); leaves no trace."""
    zeros = torch.zeros(shape, dtype=torch.long, device=machine.device)
    # Two tensors: one that comes twice is a case of its own for a compiler, and would be all it compiles.
    _, loss = model(zeros, zeros.clone())
    loss.backward()
    optimizer.zero_grad()


def wrap(
    function: Function,
    *,
    compile: bool | str,
    trial: Callable[[Function], None],
    blocks: Iterable[nn.Module] = (),
    dynamic: bool = False,
    head: Any = None,
) -> tuple[Function, str]:
    """Compile a model (or one of its methods) if asked: True, in one piece; "blocks", each of `blocks` by
    itself, which are alike, so that one is traced for all (docs/results.md: a quarter of the time for half
    of the gain).

    With "blocks" the head and the loss of the model `head`, if it is given, are one more piece: a GPU writes
    and reads its logits several times otherwise. Those of a sharded model stay as they are.

    Compilation happens at the first call, so `trial` calls it once. `dynamic`: for shapes that change
    from call to call. Returns what to call and a notice ("" if all went as asked). A machine without a
    working compiler gets `function` back and one line that says so; or a UserError where blocks are sharded,
    which the trial has left half gathered. The plain model stays the one to save.
    """
    if not compile:
        return function, ""
    blocks = list(blocks)
    sharded = any(map(is_sharded, blocks))
    # torch's own place for what it compiled is lost with the system's temporary files
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.cache_folder() / "compiled"))
    parts = blocks if compile == "blocks" or sharded else []
    before = [vars(block).get("forward") for block in parts]
    for block in parts:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    if parts and head is not None and not sharded:
        head.compiled_loss = torch.compile(head.loss, dynamic=dynamic)
    compiled = function if parts else torch.compile(function, dynamic=dynamic)
    try:
        trial(compiled)
    except Exception as error:  # the compiler raises whatever its back end does
        for block, forward in zip(parts, before, strict=True):
            del block.forward  # the class's own shows again
            if forward:
                block.forward = forward
        if head is not None:
            head.compiled_loss = None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if sharded:
            raise UserError(
                f"torch.compile does not work here ({lines[0][:120]}); start with --compile=False"
            ) from None
        return function, f"torch.compile does not work here ({lines[0][:120]}); running without it"
    return compiled, ""


def checkpoint_activations(model: GPT, machine: Machine) -> None:
    """Keep of each block's forward pass the input alone, and run it again in the backward pass: a third more
    arithmetic, a fraction of the activations (Chen et al. 2016).

    UserError where Machine.in_dtype lends the model its weights for the forward pass alone.
    """
    if machine.casts_weights and not is_sharded(model):
        on_cpu = machine.device.type == "cpu"
        how, instead = (
            ("on a CPU", "--dtype=float32") if on_cpu else ("by --casting=weights", "--casting=auto")
        )
        raise UserError(
            f"--activation_checkpointing in {machine.dtype} {how} works with --parallel=fsdp only; "
            f"otherwise use {instead}"
        )
    from torch.utils.checkpoint import checkpoint

    for block in model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def is_sharded(model: object) -> bool:
    """Whether no process has all weights of `model`, so that all must run it together."""
    return hasattr(model, "set_requires_gradient_sync")
