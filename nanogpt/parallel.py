"""From a plain model to the one that runs: compiled where that was asked, pays, and works here."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanogpt import download
from nanogpt.runtime import Machine

Function = Callable[..., Any]

# What the choice of --compile=auto rests on; nanoGPT's README says "a minute" and 250 to 135 ms a step.
COMPILING_S = 60.0  # before the first step, with nothing in the cache
SAVED = 0.25  # of the time of a step
EAGER_MFU = 0.3  # share of the chip's peak that a plain step reaches
UNKNOWN_PEAK = 100e12  # FLOP/s of a GPU that flops.py does not know


def choose_compile(asked: bool | str, device: torch.device, flops: float, peak: float | None) -> bool | str:
    """--compile, where "auto" asks whether it saves more time than it takes in a run of so many `flops`.

    It is worked out, not measured, so that a run and its resumed half choose the same. On a CPU the
    answer is no: it saves 25 % of a step at 128 channels but 4 % at 384 (docs/results.md).
    """
    if asked != "auto":
        return asked
    plain_s = flops / (EAGER_MFU * (peak or UNKNOWN_PEAK))
    return device.type == "cuda" and SAVED * plain_s > COMPILING_S


def without_logits(function: Function) -> Function:
    """`function`, which gives logits and a loss, with None for the logits: a compiler need not write what
    nobody is given, 13 GB in float32 for 64 x 1,024 tokens of GPT-2's vocabulary."""

    def loss_alone(*inputs: Tensor) -> Any:
        return None, function(*inputs)[1]

    return loss_alone


def replicate(function: Function, model: nn.Module, machine: Machine) -> Function:
    """`function`, which runs `model`, so that its backward pass averages the gradients of all processes."""
    if machine.world.size == 1:
        return function
    on = [machine.device] if machine.device.type == "cuda" else None
    return DistributedDataParallel(_Calls(function, model), device_ids=on)


class _Calls(nn.Module):
    """A function as a module that owns the parameters it uses, as DistributedDataParallel wants it."""

    def __init__(self, function: Function, model: nn.Module):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def average_next(function: Function, wanted: bool) -> None:
    """Whether the next pass of a replicated function averages gradients: only the last micro-batch should.
    The forward pass looks at it, too."""
    if isinstance(function, DistributedDataParallel):
        function.require_backward_grad_sync = wanted


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
    and reads its logits several times otherwise.

    Compilation happens at the first call, so `trial` calls it once. `dynamic`: for shapes that change
    from call to call. Returns what to call and a notice ("" if all went as asked). A machine without a
    working compiler gets `function` back and one line that says so. The plain model stays the one to save.
    """
    if not compile:
        return function, ""
    # torch's own place for what it compiled is lost with the system's temporary files
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(download.cache_folder() / "compiled"))
    parts = list(blocks) if compile == "blocks" else []
    for block in parts:
        block.forward = torch.compile(block.forward, dynamic=dynamic)
    if parts and head is not None:
        head.compiled_loss = torch.compile(head.loss, dynamic=dynamic)
    compiled = function if parts else torch.compile(function, dynamic=dynamic)
    try:
        trial(compiled)
    except Exception as error:  # the compiler raises whatever its back end does
        for block in parts:
            del block.forward  # the class's own shows again
        if parts and head is not None:
            head.compiled_loss = None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return function, f"torch.compile does not work here ({lines[0][:120]}); running without it"
    return compiled, ""
