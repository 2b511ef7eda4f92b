"""What a run needs before it begins: parameters, memory, arithmetic, hours. Nothing is built.

Parameters and optimizer state are exact, activations within a few per cent of what torch allocates
(tests/test_scaling.py), and hours are as good as the share of the chip's peak (MFU) that is put in.
"""

from dataclasses import dataclass

from nanogpt import flops
from nanogpt.model import GPTConfig
from nanogpt.optim import OptimConfig

FLOAT = 4  # bytes of weights, gradients and optimizer state
HALF = 2  # bytes of a number in bfloat16


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
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of a micro-batch
    copies: int = 0  # of weights in the numbers of products, as autocast keeps them for the backward pass
    buffers: int = 0  # what several GPUs send and receive (scaling.py)

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def memory(shape: GPTConfig, rules: OptimConfig, batch_size: int, number_bytes: int = HALF) -> Memory:
    """Of a GPU that holds the whole model, for micro-batches of `batch_size` windows computed in numbers of
    `number_bytes` (2: bfloat16 by autocast) without compilation, which needs less.

    AdamW keeps two numbers a parameter, Muon one for the matrices of blocks.
    """
    found = parameters(shape)
    by_muon = found.matrices if rules.optimizer == "muon" else 0
    return Memory(
        weights=FLOAT * found.total,
        gradients=FLOAT * found.total,
        optimizer=FLOAT * (2 * (found.total - by_muon) + by_muon),
        activations=batch_size * shape.block_size * activations_per_token(shape, number_bytes),
        copies=0 if number_bytes == FLOAT else number_bytes * found.multiplying,
    )


def activations_per_token(shape: GPTConfig, number_bytes: int) -> int:
    """Bytes that a token holds when the backward pass begins.

    A block keeps what its operations want to see again: the input of each norm (float32), of each linear map
    and of the activation; queries, keys, values and what attention made of them. Scores are recomputed by the
    fused kernels; dropout adds a byte of mask for each of its numbers. (On a CPU they do neither ALiBi nor
    dropout, and scores are kept, which is not counted.) Logits are there in float32 four times: they, their
    logarithm of softmax, and two gradients; once more with a soft cap.
    """
    C, hs = shape.n_embd, shape.head_size
    kv = shape.n_kv_head or shape.n_head
    heads = (shape.n_head + 2 * kv) * hs
    if shape.qk_norm or shape.position == "rope":
        heads += (shape.n_head + kv) * hs  # queries and keys before and after
    gated = shape.activation == "swiglu"
    hidden = 4 * (8 * round(C / 3)) if gated else 2 * 4 * C  # before and after the activation
    kept = 2 * C + heads + shape.n_head * hs + hidden
    block = number_bytes * kept + FLOAT * (2 * C + 4 + shape.n_head) + 2 * C * bool(shape.dropout)
    ends = FLOAT * C + number_bytes * C + 8 * 2
    return shape.n_layer * block + ends + (4 + bool(shape.softcap)) * FLOAT * shape.vocab_size


def flops_per_token(shape: GPTConfig) -> int:
    """Forward and backward, as train.py counts them."""
    return flops.flops_per_token(parameters(shape).multiplying, shape.n_layer, shape.n_embd, shape.block_size)


def hours(tokens: int, flops_a_token: int, gpus: int, peak: float, mfu: float) -> float:
    """Hours of `gpus` that each do the share `mfu` of `peak` FLOP/s."""
    return tokens * flops_a_token / (gpus * peak * mfu) / 3600
