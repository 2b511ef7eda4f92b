"""What a run needs before it begins: parameters, memory, arithmetic, hours. Nothing is built.

Parameters and optimizer state are exact; activations are an estimate, and hours are as good as the share of
the chip's peak (MFU) that is put in.
"""

from dataclasses import dataclass

from nanogpt import flops
from nanogpt.model import GPTConfig
from nanogpt.optim import OptimConfig

FLOAT = 4  # bytes of weights, gradients and optimizer state


@dataclass(frozen=True)
class Parameters:
    """Numbers in the tensors of a model, its padded vocabulary included."""

    embeddings: int  # of tokens
    positions: int
    matrices: int  # of blocks
    vectors: int  # biases and gains
    head: int  # 0 if it is the embedding
    padding: int  # rows of the padded vocabulary among them

    @property
    def total(self) -> int:
        return self.embeddings + self.positions + self.matrices + self.vectors + self.head

    @property
    def multiplying(self) -> int:
        """Those in a product with every token, as flops.flops_per_token wants them."""
        last = self.head or self.embeddings
        padding = self.padding // 2 if self.head else self.padding
        return self.matrices + self.vectors + last - padding


def parameters(shape: GPTConfig) -> Parameters:
    C, L = shape.n_embd, shape.n_layer
    queries = shape.n_head * shape.head_size
    attention = queries + 2 * (shape.n_kv_head or shape.n_head) * shape.head_size
    gated = shape.activation == "swiglu"
    hidden = 8 * round(C / 3) if gated else 4 * C
    inner = 2 * hidden if gated else hidden
    matrices = L * C * (attention + queries + inner + hidden)
    vectors = L * (attention + C + inner + C) if shape.bias else 0
    if shape.norm == "layer":
        vectors += (2 * L + 1) * C * (2 if shape.bias else 1)
    vectors += C if shape.smear else 0
    table = shape.padded_vocab_size * C
    padding = (shape.padded_vocab_size - shape.vocab_size) * C
    return Parameters(
        embeddings=table,
        positions=shape.block_size * C if shape.position == "learned" else 0,
        matrices=matrices,
        vectors=vectors,
        head=0 if shape.tied else table,
        padding=padding if shape.tied else 2 * padding,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU that holds the whole model."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of a micro-batch; an estimate

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(shape: GPTConfig, rules: OptimConfig, batch_size: int, number_bytes: int = 2) -> Memory:
    """For micro-batches of `batch_size` windows, computed in numbers of `number_bytes` (2: bfloat16).

    AdamW keeps two numbers a parameter, Muon one for the matrices of blocks. A block keeps 34 bytes a token
    and channel for the backward pass in two-byte numbers (Korthikanti et al. 2022, without the attention
    scores, which the fused kernels recompute); the logits are there in `number_bytes`, in float32, and once
    more as their gradient.
    """
    found = parameters(shape)
    by_muon = found.matrices if rules.optimizer == "muon" else 0
    tokens = batch_size * shape.block_size
    per_token = 34 * number_bytes // 2 * shape.n_embd * shape.n_layer
    per_token += shape.vocab_size * (number_bytes + 2 * FLOAT)
    return Memory(
        weights=FLOAT * found.total,
        gradients=FLOAT * found.total,
        optimizer=FLOAT * (2 * (found.total - by_muon) + by_muon),
        activations=tokens * per_token,
    )


def flops_per_token(shape: GPTConfig) -> int:
    """Forward and backward, as train.py counts them."""
    return flops.flops_per_token(parameters(shape).multiplying, shape.n_layer, shape.n_embd, shape.block_size)


def hours(tokens: int, flops_a_token: int, gpus: int, peak: float, mfu: float) -> float:
    """Hours of `gpus` that each do the share `mfu` of `peak` FLOP/s."""
    return tokens * flops_a_token / (gpus * peak * mfu) / 3600
