"""torch.compile and activation checkpointing; imported only if one of them is enabled."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt import cache
from nanogpt.data.loader import TrainBatches
from nanogpt.errors import UserError
from nanogpt.gpu.chips import peak_flops
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Optimizer
from nanogpt.options import BatchOptions, Origins, overruled
from nanogpt.runtime import Machine

Function = Callable[..., Any]

# Assumptions of --compile=auto; nanoGPT's README reports "a minute" and 250 to 135 ms/iter.
COMPILING_S = 60.0  # seconds of compilation before the first step, with an empty cache
SAVED = 0.25  # fraction of the step time saved
EAGER_MFU = 0.3  # MFU of an uncompiled step
UNKNOWN_PEAK = 100e12  # FLOP/s assumed for GPUs not in gpu/chips.py


def pays(options: BatchOptions, origins: Origins, model_config: GPTConfig, gpu: str, gpus: int) -> bool:
    """Return whether --compile=auto compiles on `gpus` GPUs named `gpu`: if it saves more time than it takes.

    Computed rather than measured, so that all processes of a run make the same choice. CPUs never compile by
    default: it saves 25 % of a step at 128 channels but only 4 % at 384 (docs/results.md).
    """
    if options.minutes:
        return SAVED * options.minutes * 60 > COMPILING_S
    by_tokens = not overruled(options, "batch_tokens", origins)
    batch = options.batch_tokens if by_tokens else options.sequences_per_iteration * options.block_size
    by_tokens = not overruled(options, "max_tokens", origins)
    tokens = options.max_tokens if by_tokens else batch * options.max_iters
    with torch.device("meta"):
        flops = tokens * GPT(model_config).flops_per_token() / gpus
    return SAVED * flops / (EAGER_MFU * (peak_flops(gpu) or UNKNOWN_PEAK)) > COMPILING_S


def train_function(
    function: Function, mode: bool | str, model: GPT, optimizer: Optimizer, batches: TrainBatches
) -> Function:
    """Compile `function`, which computes the loss of `model`, as specified by `mode` (--compile), and the
    losses of evaluations (`model.compiled_token_losses`), for full micro-batches of `batches`; print a notice
    if that fails.

    A `function` that averages gradients over ranks (parallelize.Connected) is compiled inside, at the first
    call: DDP splits a graph that is compiled in its forward pass, so that gradients are sent while the
    backward pass continues.
    """
    if model.ngrams is not None and model.ngrams.sparse:
        model.ngrams.forward = torch.compiler.disable(model.ngrams.forward)  # type: ignore[method-assign]
    print("compiling the training step; this takes up to a minute")
    inside = getattr(function, "inside", None)
    compute = inside.function if inside else function

    def trial(compiled: Function) -> None:
        if inside:
            inside.function = compiled
        warm_up(function if inside else compiled, model, optimizer, batches)

    def token_losses(*inputs: Tensor) -> Tensor:
        return compute(*inputs, "none")[1]

    rows, head = batches.batch_size, model if batches.device.type == "cuda" else None
    losses = token_losses if is_sharded(model) or mode == "blocks" else at_rows(token_losses, rows)
    model.compiled_token_losses = partial(padded, losses, rows)
    loss_only, blocks = without_logits(compute), list(model.h)
    compiled, notice = wrap(loss_only, compile=mode, trial=trial, blocks=blocks, head=head, rows=rows)
    if notice:
        model.compiled_token_losses = None
        print(notice)
    if inside:
        inside.function = compiled
    return function if inside else compiled


def without_logits(function: Function) -> Function:
    """Wrap `function`, which returns (logits, loss), to return (None, loss): compiled code need not write the
    logits, 13 GB in float32 for 64 x 1,024 tokens of GPT-2's vocabulary."""

    return lambda *inputs: (None, function(*inputs)[1])


def padded(losses: Function, rows: int, idx: Tensor, targets: Tensor, documents: Tensor | None = None) -> Any:
    """Return (None, losses(...)) for a batch of at most `rows` sequences, padded to `rows`, so that the last
    batch of an evaluation needs no compilation of its own."""
    batch = [part for part in (idx, targets, documents) if part is not None]
    inputs = (F.pad(part, (0, 0, 0, rows - len(part))) for part in batch)
    return None, losses(*inputs, *[None] * (3 - len(batch)))[: len(idx)]


def warm_up(function: Function, model: GPT, optimizer: Optimizer, batches: TrainBatches) -> None:
    """Trigger compilation by one forward and backward pass of `function` and one evaluation of `model`, on
    inputs like those of `batches`; clear the gradients."""
    count = 2 if batches.separator is None else 3  # with document ids
    # Separate tensors: passing one twice would compile a graph specialized to aliased inputs.
    shape = (batches.batch_size, batches.block_size)
    inputs = [torch.zeros(shape, dtype=torch.long, device=batches.device) for _ in range(count)]
    assert model.compiled_token_losses
    try:
        function(*inputs)[1].backward()
        model.eval()
        with torch.no_grad():
            model.compiled_token_losses(*inputs)
    finally:
        model.train()
        optimizer.zero_grad()


def at_rows(function: Function, rows: int) -> Function:
    """Compile `function` once for inputs of `rows` rows, and once for all other sizes (--batch_ramp_tokens,
    shares of several ranks): one graph per size would soon reach torch's limit, and one graph for all sizes
    would be slower for most batches. A single row would need a third graph, so it is not compiled."""
    usual, other = torch.compile(function, dynamic=False), torch.compile(function, dynamic=True)
    return lambda x, *rest: (usual if len(x) == rows else other if len(x) > 1 else function)(x, *rest)


def any_size(function: Function, mode: bool | str, blocks: Iterable[nn.Module]) -> Function:
    """Compile `function` as specified by `mode` (--compile), once for all batch sizes, because its memory is
    measured for several."""
    if mode == "blocks":
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
    return torch.compile(without_logits(function), dynamic=True) if mode is True else function


def wrap(
    function: Function,
    *,
    compile: bool | str,
    trial: Callable[[Function], None],
    blocks: Sequence[nn.Module] = (),
    head: Any = None,
    rows: int = 0,
) -> tuple[Function, str]:
    """Compile a model (or one of its methods) for batches of `rows` sequences (see `at_rows`). `compile`:
    True, as one graph; "blocks", each of `blocks` separately: they have the same code, so only one is traced
    (docs/results.md: a quarter of the compile time for half of the gain).

    With "blocks", the LM head and loss of the model `head`, if given, are one more graph: eager code writes
    and reads the logits several times on a GPU. Those of a sharded model are not compiled.

    Compilation happens at the first call, so `trial` must call the function once. Return the function to call
    and a notice, "" on success. If compilation fails, return `function` itself and a one-line notice, or
    raise UserError if blocks are sharded, because the failed trial leaves them partly gathered. Checkpoints
    save the original model, not the compiled one.
    """
    sharded = any(map(is_sharded, blocks))
    # torch's default cache is in the system's temporary folder, which does not persist
    with suppress(OSError, UserError):  # read-only, or others can write it: torch's own default
        folder = cache.private(cache.cache_folder() / "compiled")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    parts = blocks if compile == "blocks" or sharded else []
    forwards = [vars(block).get("forward") for block in parts]
    for block in parts:
        block.forward = at_rows(block.forward, rows)
    if parts and head is not None and not sharded:
        head.compiled_loss = at_rows(head.loss, rows)
    compiled = function if parts else at_rows(function, rows)
    try:
        trial(compiled)
    except Exception as error:  # backends may raise anything
        for block, forward in zip(parts, forwards, strict=True):
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
    """Make each block keep only its input and recompute all else in the backward pass, in place: a third more
    FLOPs, a fraction of the activation memory (Chen et al. 2016).

    Raise UserError if Machine.in_dtype casts the weights for the forward pass only.
    """
    if machine.casts_weights and not is_sharded(model):
        cause, remedy = "by --casting=weights", "--casting=auto"
        if machine.device.type == "cpu":
            cause, remedy = "on a CPU", "--dtype=float32"
        raise UserError(
            f"--activation_checkpointing in {machine.dtype} {cause} works with --parallel=fsdp only; "
            f"otherwise use {remedy}"
        )
    from torch.utils.checkpoint import checkpoint

    for block in model.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def is_sharded(model: object) -> bool:
    """Return whether `model` is sharded by FSDP: no rank holds all weights, and a pass is collective."""
    return hasattr(model, "set_requires_gradient_sync")
