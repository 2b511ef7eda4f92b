"""Reject a run that cannot fit in memory, before anything is allocated."""

import math

import torch

from nanogpt.checkpoint import writer
from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from nanogpt.options import TrainOptions
from nanogpt.runtime import Machine


def memory_of(machine: Machine) -> float:
    """Return the memory of a GPU or, on other devices, the available host memory, in bytes; infinity if
    unknown."""
    if machine.device.type == "cuda":
        return torch.cuda.get_device_properties(machine.device).total_memory
    return writer.free_memory() or math.inf


def require_memory(config: TrainOptions, model_config: GPTConfig, machine: Machine) -> None:
    """Raise UserError if a lower bound of the memory that each rank needs exceeds that of its device.

    The bound is the sum of (1) float32 weights and, if all are trained, their gradients and one moment
    (Muon's; AdamW has two), divided by the number of ranks as in FSDP (DDP needs more), and (2) the bfloat16
    inputs of all blocks, unless --eval_only. plan.py estimates the actual use.
    """
    width, tokens = model_config.n_embd, config.micro_batch_size * config.block_size
    attention = 2 * width * model_config.n_head * model_config.head_size  # at least: q and projection
    # MLP: 8 width², or down to 6 width² where the width of a gated one is rounded down
    weights = model_config.padded_vocab_size * width + model_config.n_layer * (attention + 6 * width**2)
    partly = config.eval_only or config.lora_rank or config.freeze or config.train_only
    inputs = 0 if config.eval_only else 2 * tokens * width * model_config.n_layer
    need = (4 if partly else 12) * weights / machine.world.size + inputs
    if need > (room := memory_of(machine)):
        raise UserError(
            f"each process needs more than {need / 1e9:,.1f} GB of memory, but {room / 1e9:,.1f} GB are "
            f"available ({machine.name()}): at least {weights:,} parameters and micro-batches of "
            f"{config.batch_size} x {config.block_size} tokens; reduce --batch_size, --block_size or the "
            f"model size (plan.py estimates what fits)"
        )
