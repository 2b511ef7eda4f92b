"""Refuse a run that cannot fit in memory, before anything is allocated."""

import math

import torch

from nanogpt.checkpoint import writer
from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from nanogpt.options import TrainOptions
from nanogpt.runtime import Machine


def memory_of(machine: Machine) -> float:
    """Return the memory of the device in bytes; of a CPU what is available."""
    if machine.device.type == "cuda":
        return torch.cuda.get_device_properties(machine.device).total_memory
    return writer.free_memory() or math.inf


def require(config: TrainOptions, shape: GPTConfig, machine: Machine) -> None:
    """Raise UserError if even the least that the run needs exceeds the memory of all ranks' devices.

    That is each weight and, if it is trained, its gradient and Muon's momentum, in float32, and the inputs of
    all blocks in bfloat16; plan.py estimates what a run really takes.
    """
    width, tokens = shape.n_embd, config.micro_batch_size * config.block_size
    attention = 2 * width * shape.n_head * shape.head_size  # of queries and projection, at least
    weights = shape.padded_vocab_size * width + shape.n_layer * (attention + 6 * width**2)
    partly = config.eval_only or config.lora_rank or config.freeze or config.train_only
    need = (4 if partly else 12) * weights / machine.world.size + 2 * tokens * width * shape.n_layer
    if need > (room := memory_of(machine)):
        raise UserError(
            f"the run needs more than {need / 1e9:,.1f} GB of memory, and {machine.name()} has "
            f"{room / 1e9:,.1f} GB: {weights:,} weights and more, and micro-batches of {config.batch_size} x "
            f"{config.block_size} tokens; choose smaller numbers (plan.py estimates what fits)"
        )
