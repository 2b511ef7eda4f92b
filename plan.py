"""Estimate parameters, memory, disk space, time and cost of a run before it starts.

    python plan.py config/train_shakespeare_char.py                       # on this machine
    python plan.py config/train_gpt2.py --gpu=A100 --gpus=8 --dollars_per_gpu_hour=1.3
    python plan.py config/finetune_shakespeare.py --gpu=RTX4090 --gpus=1 --lora_rank=8
    python plan.py config/train_gpt2_xl.py --gpu=H100 --scaling=True      # on 1 to 1,024 GPUs

Accepts presets of train.py. Parameters and optimizer state are exact, activations within a few percent of
torch's. Without --gpu the speed of this machine is measured over a few steps, of a large model with two of
its layers and scaled by FLOPs; with --gpu the hours are as accurate as --mfu, the fraction of data sheet
FLOP/s that a run reaches: measure it with bench.py.
"""

import bisect
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import train
from nanogpt import ROOT, runtime
from nanogpt.checkpoint import memory as device_memory
from nanogpt.checkpoint import writer
from nanogpt.compile import pays
from nanogpt.config import FilePath, NonNegativeInt, PositiveInt, pick_fields, read, require_consistent
from nanogpt.data import loader
from nanogpt.errors import UserError, run_program
from nanogpt.gpu import chips
from nanogpt.loss import default_loss_chunk_size
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import BatchOptions, FinetuneOptions, ModelOptions, OptimizerOptions, overruled
from nanogpt.planning import estimate, scaling
from nanogpt.planning.scaling import ClusterOptions

RECOMPUTED = "; activation checkpointing costs up to 25 % of the speed: --mfu must account for it"
MEASURED = 2e12  # FLOPs of a step on a CPU; a larger model is measured on two layers and fewer sequences


@dataclass(frozen=True)
class Config(ClusterOptions, ModelOptions, OptimizerOptions, FinetuneOptions, BatchOptions):
    # the run
    init_from: FilePath = "scratch"  # gpt2 .. gpt2-xl or a path: the model has the shape of these weights
    dataset: FilePath = "openwebtext"  # dataset whose vocabulary the model has, if it is prepared
    out_dir: FilePath = "out"  # run folder: free disk space is checked there
    vocab_size: NonNegativeInt = 0  # vocabulary size in tokens; 0: from the weights or the dataset
    batch_size: PositiveInt = 12  # sequences per micro-batch


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Print the plan. Raise UserError for an invalid model shape or an unknown GPU."""
    origins = origins or {}
    require_consistent(config, origins)
    shape, notices = shape_of(config, origins)
    counts, model = estimate.parameters(shape), meta_model(config, shape)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cost = estimate.flops_per_token(shape) * (2 / 3 if config.lora_rank else 1)  # no gradients of weights
    machine, used = None if config.gpu else runtime.setup("auto", "auto", shape.n_embd), None
    if machine:
        rate, used = measure(shape, config)
        gigabytes = device_memory.memory_of(machine) / 1e9
        where = f"here ({machine.reason})"
    else:
        if not config.chip:
            raise UserError(f"--gpu={config.gpu} is not known; expected one of {', '.join(chips.CHIPS)}")
        peak, gigabytes = chips.CHIPS[config.chip][:2]
        rate = config.gpus * peak * config.mfu / cost
        where = f"on {config.gpus} {config.gpu} at {config.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s"
    gpu, gpus = (machine.name(), 1) if machine else (config.gpu, config.gpus)
    on_gpu = not machine or machine.device.type == "cuda"
    compiled = on_gpu and pays(config, origins, shape, gpu, gpus)
    memory_for = partial(memory, config, shape, trained, machine, compiled)
    need = memory_for(config.batch_size)
    if used:
        need = replace(need, buffers=max(0, used + need.weights + need.optimizer - need.total + need.buffers))
    buffers = "buffers" if on_gpu else "program and checkpoint"
    try:
        room = writer.require_space(Path(config.out_dir), model)
    except UserError as error:  # the run may be meant for another machine
        room = f"note: {error}"
    batch = config.batch_tokens or config.sequences_per_iteration * shape.block_size
    tokens = -(-length(config, origins, batch, rate) // batch) * batch  # in whole iterations
    hours, total = tokens / rate / 3600, counts.total - counts.padding
    long = f"{hours / 24:,.1f} days" if hours >= 1 else f"{hours * 60:,.1f} minutes"
    lines = [
        *notices,
        f"parameters: {total:,} ({counts.embeddings + counts.head:,} in padded token "
        f"embeddings, {counts.positions:,} in positions, {counts.matrices + counts.vectors:,} in blocks"
        + f", {counts.tables:,} in n-gram tables" * bool(counts.tables)
        + ")"
        + f"; {trained:,} trained" * (trained != counts.total),
        f"memory{' per GPU' * bool(config.gpu)}: {need.total / 1e9:.2f} GB = weights "
        f"{need.weights / 1e9:.2f} + gradients {need.gradients / 1e9:.2f} + optimizer "
        f"{need.optimizer / 1e9:.2f} + bfloat16 copies {need.copies / 1e9:.2f} + activations of "
        f"{config.batch_size} x {shape.block_size:,} tokens about {need.activations / 1e9:.2f}"
        + f" + {buffers} {need.buffers / 1e9:.2f}" * bool(need.buffers)
        + RECOMPUTED * config.activation_checkpointing,
        fit(config, shape.block_size, memory_for, config.gpu_memory or gigabytes),
        room,
        f"tokens: {tokens:,} in {tokens // batch:,} iterations of {batch:,}; "
        f"{tokens / max(1, total):.1f} per parameter",
        f"compute: {cost / 1e9:.3f} GFLOPs/token, {tokens * cost:.3g} FLOPs in total",
        f"time: {hours:,.1f} hours ({long}) {where}: {rate:,.0f} tokens/s",
    ]
    if config.dollars_per_gpu_hour:
        dollars = hours * (config.gpus if config.gpu else 1) * config.dollars_per_gpu_hour
        lines.append(f"cost: ${dollars:,.0f} at ${config.dollars_per_gpu_hour:g} per GPU-hour")
    if config.scaling:
        lines += scaling.table(shape, config, compiled)
    print("\n".join(lines))


def shape_of(config: Config, origins: dict[str, str]) -> tuple[GPTConfig, list[str]]:
    """Return the shape of the model, from pretrained weights or from the options, and notes to print."""
    if config.init_from not in ("scratch", "auto"):
        from nanogpt.convert import weights

        shape = weights.shape(config.init_from, ROOT, Path(config.out_dir))
        block_size = config.block_size if "block_size" in origins else shape.block_size
        return replace(shape, block_size=block_size, vocab_multiple=config.vocab_multiple), []
    vocab_size, notices = config.vocab_size, []
    if not vocab_size:
        if Path(config.dataset).is_file():  # prepared as by train.py
            from nanogpt.prepare import own_text

            config = replace(config, dataset=str(own_text.prepare([Path(config.dataset)])))
        try:
            folder = loader.find(config.dataset.partition(":")[0].partition(",")[0], ROOT)
            vocab_size = loader.load(folder).vocab_size
        except UserError as error:
            vocab_size = 65 if config.dataset == "shakespeare_char" else GPTConfig.vocab_size
            if config.dataset not in (Config.dataset, "shakespeare_char"):
                notices.append(f"note: GPT-2's vocabulary of {vocab_size:,} assumed, because {error}")
    return pick_fields(GPTConfig, config, vocab_size=vocab_size), notices


def meta_model(config: Config, shape: GPTConfig) -> GPT:
    """Return the model without storage, with LoRA adapters and frozen parameters."""
    from nanogpt.finetune import freeze, lora

    with torch.device("meta"):
        model = GPT(shape)
        if config.lora_rank:
            lora.adapt(model, lora.Adapters(config.lora_rank, config.lora_alpha, config.lora_targets))
    freeze.choose_trained(model, config)
    return model


def memory(
    config: Config, shape: GPTConfig, trained: int, machine: runtime.Machine | None, compiled: bool, rows: int
) -> estimate.Memory:
    """Estimate the memory on a GPU, or on this `machine`, with micro-batches of `rows` sequences."""
    chunk, gpus = config.loss_chunk_size, 1 if machine else config.gpus
    cpu = machine is not None and machine.device.type == "cpu"
    if machine:
        chunk = chunk or default_loss_chunk_size(machine.device, rows * shape.block_size, shape.vocab_size)
    need = estimate.memory(
        shape,
        config,
        rows,
        number_bytes=4 if machine and machine.dtype == "float32" else 2,
        recompute=config.activation_checkpointing,
        on_cpu=cpu,
        loss_chunk_size=chunk,
        compiled=compiled,
    )
    total = estimate.parameters(shape).total
    if trained != total:
        adapters = trained if config.lora_rank else 0
        need = replace(need, weights=4 * (total + adapters), gradients=4 * trained, optimizer=8 * trained)
    sequences = config.batch_tokens // shape.block_size or config.sequences_per_iteration
    need = scaling.replicated(need, config, gpus, -(-sequences // (gpus * rows)))
    if machine and cpu:  # this program, which has loaded what train.py loads, and the copy that is saved
        base = writer.peak_memory(machine.device) or 0
        need = replace(need, buffers=base + need.weights + need.optimizer)
    return need


def fit(
    config: Config, block_size: int, memory_for: Callable[[int], estimate.Memory], gigabytes: float
) -> str:
    """Return a line that says whether the run fits in memory and, if not, or if larger micro-batches of the
    same batch fit on a GPU, the largest --batch_size that does."""
    limit, given = gigabytes * 1e9, config.batch_size
    batch = config.batch_tokens // block_size or config.sequences_per_iteration
    share = min(max(given, batch // config.gpus), 1 << 16) if config.gpu else given
    for rows in range(share, given, -1):
        if batch % rows == 0 and memory_for(rows).total <= limit:
            return f"fits in {gigabytes:.4g} GB: yes, and with --batch_size={rows}, the largest"
    rows = bisect.bisect(range(1, given + 1), limit, key=lambda rows: memory_for(rows).total)
    advice = f"with --batch_size={rows}, not {given}" if rows else "no, not even with --batch_size=1"
    return f"fits in {gigabytes:.4g} GB: {'yes' if rows == given else advice}"


def length(config: Config, origins: dict[str, str], batch: int, rate: float) -> int:
    """Return the tokens of the run; with --minutes, those that `rate` tokens per second allow."""
    if not overruled(config, "minutes", origins):
        return int(rate * config.minutes * 60)
    return batch * config.max_iters if overruled(config, "max_tokens", origins) else config.max_tokens


def measure(shape: GPTConfig, options: Config) -> tuple[float, int | None]:
    """Return the tokens per second of train.py's step on this machine, and the peak memory in bytes.

    A model of more than MEASURED FLOPs per step is measured with two layers, the rate is scaled by its FLOPs,
    and the memory is None.
    """
    import bench

    known = bench.Config.__dataclass_fields__
    changed = {name: value for name, value in vars(shape).items() if name in known and name != "dropout"}
    changed |= {"init_from": "scratch", "gradient_accumulation_steps": 1, "batch_tokens": 0}
    config = pick_fields(bench.Config, options, **changed, real_data=False, compile=False)
    flops, small = estimate.flops_per_token(shape), shape
    if not torch.cuda.is_available() and flops * config.micro_batch_size * config.block_size > MEASURED:
        small = replace(shape, n_layer=min(2, shape.n_layer))
        fitting = MEASURED / estimate.flops_per_token(small) / config.block_size
        if fitting < 0.2:
            raise UserError(
                f"a sequence of {config.block_size:,} tokens takes too long to time here; give --gpu"
            )
        rows = max(1, min(config.micro_batch_size, int(fitting)))
        config = replace(config, n_layer=small.n_layer, batch_size=rows)
    print("timing a few steps on this machine (not with --gpu=NAME)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        timed = bench.Bench(config, Path(scratch))
        timed.step()
        seconds = statistics.median(timed.step()[0] for _ in range(3))
    peak = writer.peak_memory(timed.run.machine.device) if small is shape else None
    return timed.tokens_per_step / seconds * estimate.flops_per_token(small) / flops, peak


def program() -> None:
    options = read(Config, sys.argv[1:], other_keys=frozenset(train.Config.__dataclass_fields__))
    main(Config(**options.values), options.origins)


if __name__ == "__main__":
    run_program(program)
