"""What a run needs before it begins: parameters, memory, arithmetic, hours. Nothing is built.

Parameters and optimizer state are exact, activations within a few per cent of what torch allocates
(tests/test_estimate.py), and hours are as good as the share of the chip's peak (MFU) that is put in.
"""

from dataclasses import dataclass

from nanogpt import model
from nanogpt.loss import logits_chunk_size
from nanogpt.model import GPTConfig
from nanogpt.options import OptimizerOptions

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
        """Those in a product with every token, as model.flops_per_token wants them."""
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


def memory(
    shape: GPTConfig,
    rules: OptimizerOptions,
    batch_size: int,
    number_bytes: int = HALF,
    recompute: bool = False,
    on_cpu: bool = False,
    loss_chunk_size: int = 0,
) -> Memory:
    """Of a GPU that holds the whole model, for micro-batches of `batch_size` windows computed in numbers of
    `number_bytes` (2: bfloat16 by autocast) without compilation, which needs less. `recompute`: blocks run
    again in the backward pass. `on_cpu`: by torch's kernels for CPUs, in float32. `loss_chunk_size`: tokens
    whose logits are there at once; 0: all.

    AdamW keeps two numbers a parameter, Muon one for the matrices of blocks.
    """
    found = parameters(shape)
    by_muon = found.matrices if rules.optimizer == "muon" else 0
    cast = found.multiplying - (found.matrices + found.vectors if recompute else 0)
    tokens = batch_size * shape.block_size
    return Memory(
        weights=FLOAT * found.total,
        gradients=FLOAT * found.total,
        optimizer=FLOAT * (2 * (found.total - by_muon) + by_muon),
        activations=activations(shape, tokens, number_bytes, recompute, on_cpu, loss_chunk_size),
        copies=0 if number_bytes == FLOAT else number_bytes * cast,
    )


def activations(
    shape: GPTConfig,
    tokens: int,
    number_bytes: int,
    recompute: bool = False,
    on_cpu: bool = False,
    loss_chunk_size: int = 0,
) -> int:
    """Bytes that a micro-batch holds when it holds the most: at the loss, or in the last block's backward.

    At the loss there are what the blocks keep (their inputs alone, if they run again), the last norm, and in
    float32 the logarithms of softmax and two gradients of logits, one more with a soft cap. With
    `loss_chunk_size` there are the gradients of the norm's output and of the head, and of that many tokens
    the gradient of the logits, beside the logits of some of them or what they add to the head's gradient.
    In a block there are what it and those before it keep, the gradient of its output, those half-way through
    it (of the activation, or of scores where they were kept), and where the head is the token embeddings its
    gradient.
    """
    C, V, mask = shape.n_embd, shape.vocab_size, FLOAT if on_cpu else 1
    attention, mlp = kept_by_block(shape, number_bytes, on_cpu)
    entry = FLOAT * C if recompute else attention + mlp
    below = shape.n_layer * entry + 2 * 8 + mask * C * bool(shape.dropout)
    loss = tokens * (FLOAT * C + number_bytes * C)
    if loss_chunk_size:
        rows = min(loss_chunk_size, tokens)
        narrow = number_bytes < FLOAT
        part = min(rows, logits_chunk_size("cpu" if on_cpu else "cuda", V)) * V * FLOAT
        loss += tokens * number_bytes * C + FLOAT * V * C + number_bytes * rows * V
        loss += max(2 * part, number_bytes * V * C) if narrow else part
    else:
        loss += tokens * (3 + bool(shape.softcap)) * FLOAT * V
    gradients = 3 if shape.activation == "relu2" else 1  # the square's takes a product of two powers
    half_way = mlp + gradients * number_bytes * _hidden(shape) // 2
    if keeps_scores(shape, on_cpu):  # of those there are four at once with dropout, else three
        half_way = max(half_way, number_bytes * (1 if shape.dropout else 2) * shape.n_head * shape.block_size)
    in_block = tokens * (attention + half_way + FLOAT * C - entry) + FLOAT * V * C * shape.tied
    return tokens * below + max(loss, in_block)


def kept_by_block(shape: GPTConfig, number_bytes: int, on_cpu: bool) -> tuple[int, int]:
    """Bytes a token that the two halves of a block keep for the backward pass: attention, and MLP.

    They are what operations want to see again: the input of each norm (float32), of each linear map and of
    the activation; queries, keys, values and what attention made of them; the masks of dropout. Fused kernels
    make the scores again; where a CPU has none, it copies queries, keys and values, scaled and for all heads,
    and keeps the scores' softmax, with dropout their mask and the product of both, too.
    """
    C, T, hs = shape.n_embd, shape.block_size, shape.head_size
    kv = shape.n_kv_head or shape.n_head
    sums = FLOAT * (C + 2)  # the input of a norm, and what it divided by
    if keeps_scores(shape, on_cpu):
        heads = 3 * shape.n_head * hs + (shape.n_head + 2 * kv) * hs * shape.qk_norm
        heads += shape.n_head * T * (3 if shape.dropout else 1)
    else:
        heads = (shape.n_head + 2 * kv) * hs
        if shape.qk_norm or shape.position == "rope":
            heads += (shape.n_head + kv) * hs  # queries and keys before and after
        sums += FLOAT * shape.n_head
    mask = C * (number_bytes if on_cpu else 1) * bool(shape.dropout)
    attention = number_bytes * (C + heads + shape.n_head * hs) + sums + mask
    return attention, number_bytes * (C + _hidden(shape)) + FLOAT * (C + 2) + mask


def keeps_scores(shape: GPTConfig, on_cpu: bool) -> bool:
    """Whether attention keeps the weight of every token for every other: torch's kernel for CPUs does neither
    a bias for each head nor dropout."""
    return on_cpu and (shape.position == "alibi" or shape.dropout > 0)


def _hidden(shape: GPTConfig) -> int:
    """Numbers a token before and after the activation."""
    return 4 * (8 * round(shape.n_embd / 3)) if shape.activation == "swiglu" else 2 * 4 * shape.n_embd


def flops_per_token(shape: GPTConfig) -> int:
    """Forward and backward, as train.py counts them."""
    return model.flops_per_token(parameters(shape).multiplying, shape)


def hours(tokens: int, flops_a_token: int, gpus: int, peak: float, mfu: float) -> float:
    """Hours of `gpus` that each do the share `mfu` of `peak` FLOP/s."""
    return tokens * flops_a_token / (gpus * peak * mfu) / 3600
