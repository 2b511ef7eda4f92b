"""torch.compile and activation checkpointing; imported only if one of them is enabled."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt import cache
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Optimizer
from nanogpt.runtime import Machine

Function = Callable[..., Any]

# Assumptions of --compile=auto; nanoGPT's README reports "a minute" and 250 to 135 ms/iter.
COMPILING_S = 60.0  # seconds of compilation before the first step, with an empty cache
SAVED = 0.25  # fraction of the step time saved
EAGER_MFU = 0.3  # MFU of an uncompiled step
UNKNOWN_PEAK = 100e12  # FLOP/s assumed for GPUs not in gpu/chips.py


def pays(flops: float, peak: float | None) -> bool:
    """Return whether compiling saves more time than it takes, in a run of `flops` FLOPs on a GPU with `peak`
    FLOP/s (None: unknown).

    Computed rather than measured, so that resuming a run makes the same choice.
    """
    plain_s = flops / (EAGER_MFU * (peak or UNKNOWN_PEAK))
    return SAVED * plain_s > COMPILING_S


def worth_compiling(shape: GPTConfig, tokens: int, peak: float | None, minutes: float) -> bool:
    """Return whether --compile=auto compiles on a GPU with `peak` FLOP/s (None: unknown), for a run of
    `tokens` or, if not 0, of `minutes`."""
    if minutes:
        return SAVED * minutes * 60 > COMPILING_S
    with torch.device("meta"):
        model = GPT(shape)
    return pays(tokens * model.flops_per_token(), peak)


def train_function(
    function: Function,
    how: bool | str,
    model: GPT,
    optimizer: Optimizer,
    shape: tuple[int, int],
    machine: Machine,
) -> Function:
    """Compile `function`, which computes the loss of `model` for idx of `shape` (B, T), as specified by `how`
    (--compile); print a notice if that fails."""
    if model.ngrams is not None:  # sparse gradients
        model.ngrams.forward = torch.compiler.disable(model.ngrams.forward)  # type: ignore[method-assign]
    trial = partial(warm_up, optimizer=optimizer, shape=shape, machine=machine)
    head = model if machine.device.type == "cuda" else None
    compiled, notice = wrap(without_logits(function), compile=how, trial=trial, blocks=model.h, head=head)
    if notice:
        print(notice)
    return compiled


def without_logits(function: Function) -> Function:
    """Wrap `function`, which returns (logits, loss), to return (None, loss): compiled code need not write the
    logits, 13 GB in float32 for 64 x 1,024 tokens of GPT-2's vocabulary."""

    def loss_alone(*inputs: Tensor) -> Any:
        return None, function(*inputs)[1]

    return loss_alone


def warm_up(
    model: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    shape: tuple[int, int],
    machine: Machine,
) -> None:
    """Trigger compilation by one forward and backward pass on idx of `shape` (B, T); clear the gradients."""
    zeros = torch.zeros(shape, dtype=torch.long, device=machine.device)
    # Two tensors: passing one twice would compile a graph specialized to aliased inputs.
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
    """Compile a model (or one of its methods). `compile`: False, not at all; True, as one graph; "blocks",
    each of `blocks` separately: they are alike, so that one is traced for all (docs/results.md: a quarter of
    the compile time for half of the gain).

    With "blocks", the LM head and loss of the model `head`, if given, are one more graph: eager code writes
    and reads the logits several times on a GPU. Those of a sharded model are not compiled.

    Compilation happens at the first call, so `trial` must call the function once. `dynamic`: for shapes that
    change from call to call. Return the function to call and a notice, "" on success. If compilation fails,
    return `function` itself and a one-line notice, or raise UserError if blocks are sharded, because the
    failed trial leaves them partly gathered. Checkpoints save the original model, not the compiled one.
    """
    if not compile:
        return function, ""
    blocks = list(blocks)
    sharded = any(map(is_sharded, blocks))
    # torch's default cache is in the system's temporary folder, which does not persist
    with suppress(OSError, UserError):  # read-only, or others can write it: torch's own default
        kept = cache.private(cache.cache_folder() / "compiled")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    parts = blocks if compile == "blocks" or sharded else []
    before = [vars(block).get("forward") for block in parts]
    for block in parts:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    if parts and head is not None and not sharded:
        head.compiled_loss = torch.compile(head.loss, dynamic=dynamic)
    compiled = function if parts else torch.compile(function, dynamic=dynamic)
    try:
        trial(compiled)
    except Exception as error:  # backends may raise anything
        for block, forward in zip(parts, before, strict=True):
            del block.forward  # uncovers the method of the class
            if forward:
                block.forward = forward
        if head is not None:
            head.compiled_loss = None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if sharded:
            raise UserError(f"torch.compile failed ({lines[0][:120]}); use --compile=False") from None
        return function, f"torch.compile failed ({lines[0][:120]}); running without it"
    return compiled, ""


def checkpoint_activations(model: GPT, machine: Machine) -> None:
    """Recompute each block in the backward pass from its input alone, in place: a third more FLOPs, a
    fraction of the activation memory (Chen et al. 2016).

    Raise UserError if Machine.in_dtype casts the weights for the forward pass only.
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
    """Return whether `model` is sharded by FSDP: no rank holds all weights, and running it is collective."""
    return hasattr(model, "set_requires_gradient_sync")
