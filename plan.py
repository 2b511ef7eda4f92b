"""Before a run: parameters, memory, arithmetic, hours and cost. Nothing is built or read.

    python plan.py config/train_gpt2.py --gpu=A100 --gpus=8 --dollars_per_gpu_hour=1.3
    python plan.py config/train_gpt2_xl.py --gpu=H100 --batch_size=4
    python plan.py --n_layer=6 --n_embd=384 --n_head=6 --max_tokens=1e9

Presets of train.py are read. Parameters and optimizer state are exact, activations are estimated, and hours
are as good as --mfu, the share of the data sheet's FLOP/s that a run reaches: measure it with bench.py.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from nanogpt import estimate, flops
from nanogpt.config import Count, Positive, Range, Rate, options_of, picked, read
from nanogpt.errors import UserError, run_program
from nanogpt.model import GPTConfig
from nanogpt.optim import OptimConfig
from nanogpt.options import ModelOptions, OptimizerOptions, TokenOptions


@dataclass(frozen=True)
class Config(ModelOptions, OptimizerOptions, TokenOptions):
    # the run
    vocab_size: Positive = 50257  # tokens of the vocabulary
    block_size: Positive = 1024  # tokens a window
    batch_size: Positive = 12  # windows a micro-batch
    gradient_accumulation_steps: Positive = 40  # micro-batches an iteration
    max_iters: Count = 600000  # iterations in all
    # the machine
    gpu: str = "A100"  # as flops.py lists it
    gpus: Positive = 8  # how many share the batch, each with the whole model
    gpu_memory: Rate = 0.0  # gigabytes (1e9 bytes) of each; 0: not compared
    mfu: Annotated[float, Range(0.001, 1)] = 0.4  # share of the peak FLOP/s that is reached
    dollars_per_gpu_hour: Rate = 0.0  # 0: no cost


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Print the plan. Raises UserError for a shape that cannot be, and a GPU that is not known."""
    origins = origins or {}
    shape = picked(GPTConfig, config)
    rules = picked(OptimConfig, config)
    if wrong := shape.problems() + rules.problems():
        raise UserError("\n       ".join(wrong))
    peak = flops.peak_flops(config.gpu)
    if peak is None:
        raise UserError(f"--gpu={config.gpu} is not known; there are {', '.join(flops.PEAK_FLOPS)}")
    batch = config.batch_tokens or (
        config.batch_size * config.gradient_accumulation_steps * config.block_size
    )
    tokens = batch * config.max_iters
    if config.max_tokens and not origins.get("max_iters", "").startswith("--"):
        tokens = config.max_tokens
    found = estimate.parameters(shape)
    need = estimate.memory(shape, rules, config.batch_size)
    cost = estimate.flops_per_token(shape)
    hours = estimate.hours(tokens, cost, config.gpus, peak, config.mfu)
    lines = [
        f"parameters: {found.total - found.padding:,} ({found.embeddings + found.head:,} for tokens with "
        f"padding, {found.positions:,} for positions, {found.matrices + found.vectors:,} in blocks)",
        f"memory a GPU: {need.total / 1e9:.2f} GB = weights {need.weights / 1e9:.2f} + gradients "
        f"{need.gradients / 1e9:.2f} + optimizer {need.optimizer / 1e9:.2f} + activations of "
        f"{config.batch_size} x {config.block_size:,} tokens about {need.activations / 1e9:.2f}",
        f"tokens: {tokens:,} in {-(-tokens // batch):,} iterations of {batch:,}; "
        f"{tokens / max(1, found.total - found.padding):.1f} a parameter",
        f"arithmetic: {cost / 1e9:.3f} GFLOPs a token, {tokens * cost:.3g} in all",
        f"time: {hours:,.1f} hours ({hours / 24:,.1f} days) on {config.gpus} {config.gpu} at "
        f"{config.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s: {tokens / hours / 3600:,.0f} tokens/s",
    ]
    if config.dollars_per_gpu_hour:
        dollars = hours * config.gpus * config.dollars_per_gpu_hour
        lines.append(f"cost: ${dollars:,.0f} at ${config.dollars_per_gpu_hour:g} a GPU and hour")
    if config.gpu_memory and need.total > config.gpu_memory * 1e9:
        helps = need.total - need.activations < config.gpu_memory * 1e9
        advice = "try a smaller --batch_size" if helps else "whatever the --batch_size"
        lines.append(f"does not fit in {config.gpu_memory:g} GB: {advice}")
    print("\n".join(lines))


def program() -> None:
    options = read(Config, sys.argv[1:], other_keys=options_of("train.py"))
    main(Config(**options.values), options.origins)


if __name__ == "__main__":
    run_program(program)
