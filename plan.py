"""Estimate parameters, memory, FLOPs, hours and cost of a run, without building a model or reading data.

    python plan.py config/train_gpt2.py --gpu=A100 --gpus=8 --dollars_per_gpu_hour=1.3
    python plan.py config/train_gpt2_xl.py --gpu=H100 --batch_size=4
    python plan.py --n_layer=6 --n_embd=384 --n_head=6 --max_tokens=1e9
    python plan.py config/train_gpt2_xl.py --gpu=H100 --scaling=True      # on 1 to 1,024 GPUs

Accepts presets of train.py. Parameters and optimizer state are exact, activations within a few percent of
torch's; hours are as accurate as --mfu, the fraction of data sheet FLOP/s that a run reaches: measure it
with bench.py.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import train
from nanogpt.config import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    UnitInterval,
    pick_fields,
    read,
    require_consistent,
)
from nanogpt.errors import UserError, run_program
from nanogpt.gpu import chips
from nanogpt.model import GPTConfig
from nanogpt.options import BatchOptions, ModelOptions, OptimizerOptions
from nanogpt.planning import comm_volume, estimate, scaling

RECOMPUTED = "; activation checkpointing costs up to 25 % of the speed: --mfu must account for it"


@dataclass(frozen=True)
class Config(ModelOptions, OptimizerOptions, BatchOptions):
    # the run
    vocab_size: PositiveInt = 50257  # vocabulary size in tokens
    batch_size: PositiveInt = 12  # sequences per micro-batch
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, more FLOPs
    loss_chunk_size: NonNegativeInt = 0  # tokens per chunk of the loss; 0: all
    # hardware
    gpu: str = "A100"  # GPU model, a name in gpu/chips.py
    gpus: PositiveInt = 8  # number of data-parallel GPUs, each with the whole model
    gpu_memory: NonNegativeFloat = 0.0  # memory per GPU in GB (1e9 bytes); 0: do not check the fit
    mfu: Annotated[float, Range(0.001, 1)] = 0.4  # model FLOPs utilization, fraction of the peak
    dollars_per_gpu_hour: NonNegativeFloat = 0.0  # price in dollars; 0: do not print the cost
    # scaling (docs/scaling-arithmetic.md)
    scaling: bool = False  # print step time, efficiency, bytes sent and memory on 1 to 1,024 GPUs
    gpus_per_node: PositiveInt = 8  # number of GPUs per node
    node_gbytes: NonNegativeFloat = 0.0  # GB/s per GPU within a node; 0: 80 % of the data sheet
    network_gbits: NonNegativeFloat = 400.0  # network Gbit/s per GPU: node bandwidth / gpus_per_node
    overlap: UnitInterval = 0.9  # fraction of a pass that can overlap with transfers
    half_tokens: NonNegativeInt = 1250  # micro-batch tokens per GPU at which half of the peak rate is reached
    shard_optimizer: bool = True  # ddp: shard the optimizer state over GPUs (ZeRO-1)


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Print the plan. Raise UserError for an invalid model shape or an unknown GPU."""
    origins = origins or {}
    require_consistent(config, origins)
    shape = pick_fields(GPTConfig, config)
    peak = chips.peak_flops(config.gpu)
    if peak is None:
        raise UserError(f"--gpu={config.gpu} is not known; expected one of {', '.join(chips.PEAK_FLOPS)}")
    batch = config.batch_tokens or (
        config.batch_size * config.gradient_accumulation_steps * config.block_size
    )
    tokens = batch * config.max_iters
    if config.max_tokens and not origins.get("max_iters", "").startswith("--"):
        tokens = config.max_tokens
    found = estimate.parameters(shape)
    need = estimate.memory(
        shape,
        config,
        config.batch_size,
        recompute=config.activation_checkpointing,
        loss_chunk_size=config.loss_chunk_size,
    )
    cost = estimate.flops_per_token(shape)
    hours = estimate.hours(tokens, cost, config.gpus, peak, config.mfu)
    lines = [
        f"parameters: {found.total - found.padding:,} ({found.embeddings + found.head:,} in padded token "
        f"embeddings, {found.positions:,} in positions, {found.matrices + found.vectors:,} in blocks)",
        f"memory per GPU: {need.total / 1e9:.2f} GB = weights {need.weights / 1e9:.2f} + gradients "
        f"{need.gradients / 1e9:.2f} + optimizer {need.optimizer / 1e9:.2f} + bfloat16 copies "
        f"{need.copies / 1e9:.2f} + activations of {config.batch_size} x {config.block_size:,} tokens about "
        f"{need.activations / 1e9:.2f}" + RECOMPUTED * config.activation_checkpointing,
        f"tokens: {tokens:,} in {-(-tokens // batch):,} iterations of {batch:,}; "
        f"{tokens / max(1, found.total - found.padding):.1f} per parameter",
        f"compute: {cost / 1e9:.3f} GFLOPs/token, {tokens * cost:.3g} FLOPs in total",
        f"time: {hours:,.1f} hours ({hours / 24:,.1f} days) on {config.gpus} {config.gpu} at "
        f"{config.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s: {tokens / hours / 3600:,.0f} tokens/s",
    ]
    if config.dollars_per_gpu_hour:
        dollars = hours * config.gpus * config.dollars_per_gpu_hour
        lines.append(f"cost: ${dollars:,.0f} at ${config.dollars_per_gpu_hour:g} per GPU-hour")
    if config.gpu_memory and need.total > config.gpu_memory * 1e9:
        helps = need.total - need.activations < config.gpu_memory * 1e9
        advice = "try a smaller --batch_size" if helps else "even with a smaller --batch_size"
        lines.append(f"does not fit in {config.gpu_memory:g} GB: {advice}")
    if config.scaling:
        lines += table(shape, config, setting_of(config, batch // config.block_size, peak))
    print("\n".join(lines))


def setting_of(config: Config, windows: int, peak: float) -> scaling.Setting:
    """Convert the options to a scaling.Setting, for batches of `windows` sequences."""
    chip = next(chip for name, chip in scaling.CHIPS.items() if name in config.gpu)
    if not config.network_gbits:
        raise UserError("--network_gbits=0 connects no nodes; give Gbit/s per GPU, such as 400 or 12.5")
    network = scaling.Network(
        node=config.node_gbytes * 1e9 or scaling.OF_LINK * chip.link,
        between=scaling.OF_NETWORK * config.network_gbits / 8 * 1e9,
    )
    return scaling.Setting(
        batch=windows,
        batch_size=config.batch_size,
        peak=peak,
        memory_bandwidth=chip.memory,
        network=network,
        gpus_per_node=config.gpus_per_node,
        mfu=config.mfu,
        overlap=config.overlap,
        half_tokens=config.half_tokens,
        sharded_state=config.shard_optimizer,
        recompute=config.activation_checkpointing,
        loss_chunk_size=config.loss_chunk_size,
    )


def table(shape: GPTConfig, rules: OptimizerOptions, setting: scaling.Setting) -> list[str]:
    """Return a Markdown table, one row per number of GPUs, with values for DDP / FSDP / HSDP."""
    lines = [
        "",
        "scaling, each value for DDP / FSDP / HSDP; assumptions:",
        *(f"- {line}" for line in scaling.assumptions(setting)),
        "",
        "| GPUs | tokens/GPU | step, ms | efficiency | exposed comm, ms | sent/GPU, GB | memory/GPU, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = scaling.predict(shape, rules, "ddp", 1, setting)
    assert alone
    for gpus in (2**power for power in range(11)):
        found = [scaling.predict(shape, rules, mode, gpus, setting) for mode in comm_volume.MODES]
        steps = [step for step in found if step]
        if not steps:
            lines.append(f"| {gpus:,} | fewer than one sequence per GPU: raise --batch_tokens | | | | | |")
            continue
        cells = [
            [f"{step.seconds * 1e3:,.1f}" for step in steps],
            [f"{scaling.efficiency(step, alone):.0%}" for step in steps],
            [f"{step.exposed_s * 1e3:,.1f}" for step in steps],
            [f"{step.wire / 1e9:.2f}" for step in steps],
            [f"{step.memory.total / 1e9:.1f}" for step in steps],
        ]
        shown = [row[0] if gpus == 1 else " / ".join(row) for row in cells]
        lines.append(f"| {gpus:,} | {steps[0].tokens:,} | {' | '.join(shown)} |")
    return lines


def program() -> None:
    options = read(Config, sys.argv[1:], other_keys=frozenset(train.Config.__dataclass_fields__))
    main(Config(**options.values), options.origins)


if __name__ == "__main__":
    run_program(program)
