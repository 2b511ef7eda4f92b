"""Estimate parameters, memory and FLOPs of a run without building the whole model.

Parameters and optimizer state are exact, activations within a few percent of torch's allocations
(tests/test_estimate.py).
"""

import functools
from dataclasses import dataclass, replace

import torch

from nanogpt import model
from nanogpt.loss import logits_chunk_size
from nanogpt.model import GPT, NGRAM_TABLES, GPTConfig
from nanogpt.options import OptimizerOptions

FLOAT = 4  # bytes of weights, gradients and optimizer state
HALF = 2  # bytes of a bfloat16 element
WORKSPACE = 1 << 25  # bytes that torch gives cuBLAS on an H100 or later; a quarter of them before


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model, including the vocabulary padding."""

    embeddings: int  # token embedding
    positions: int
    matrices: int  # 2-D weights of blocks
    vectors: int  # biases and norm gains
    head: int  # LM head; 0 if tied
    padding: int  # elements of the above in vocabulary padding rows
    tables: int  # n-gram tables
    table_rows: int

    @property
    def total(self) -> int:
        counted = self.embeddings + self.positions + self.matrices + self.vectors + self.head
        return counted + self.tables

    @property
    def multiplying(self) -> int:
        """Parameters used in matmuls with every token, as expected by model.flops_per_token."""
        last = self.head or self.embeddings
        padding = self.padding // 2 if self.head else self.padding
        return self.matrices + self.vectors + last - padding


def one_block(shape: GPTConfig) -> GPT:
    """Return a model of `shape` but with one block, without storage."""
    with torch.device("meta"):
        return GPT(replace(shape, n_layer=1))


@functools.cache
def parameters(shape: GPTConfig) -> Parameters:
    named = dict(one_block(shape).named_parameters())
    sizes = {name: p.numel() for name, p in named.items()}
    embeddings, positions, head, tables = (
        sizes.get(name, 0) for name in ("wte.weight", "position.wpe.weight", "lm_head.weight", NGRAM_TABLES)
    )
    block = sum(size for name, size in sizes.items() if name.startswith("h."))
    matrices = sum(sizes[name] for name, p in named.items() if name.startswith("h.") and p.dim() == 2)
    others = sum(sizes.values()) - embeddings - positions - head - tables - block  # the final norm, smear
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.n_embd
    return Parameters(
        embeddings=embeddings,
        positions=positions,
        matrices=shape.n_layer * matrices,
        vectors=shape.n_layer * (block - matrices) + others,
        head=head,
        padding=padding if shape.tied else 2 * padding,
        tables=tables,
        table_rows=len(named[NGRAM_TABLES]) if tables else 0,
    )


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # activations of one micro-batch
    copies: int = 0  # weights in the compute dtype, kept by autocast for the backward pass
    buffers: int = 0  # of cuBLAS, and of communication among several GPUs (scaling.py)

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
    compiled: bool = False,
) -> Memory:
    """Estimate the memory of a GPU that holds the whole model, for micro-batches of `batch_size` sequences.

    `number_bytes`: bytes per element of the compute dtype (2: bfloat16 autocast). `recompute`: activation
    checkpointing. `on_cpu`: torch's CPU kernels, in float32. `loss_chunk_size`: tokens per chunk of the
    loss; 0: one chunk. `compiled`: by torch.compile.

    AdamW keeps two state elements per parameter, Muon one per element of the blocks' matrices, row-wise
    Adagrad one per row of the n-gram tables, whose gradients are sparse on a CPU and not counted there.
    """
    counts = parameters(shape)
    by_muon = counts.matrices if rules.optimizer == "muon" else 0
    cast = counts.multiplying - (counts.matrices + counts.vectors if recompute else 0)
    tokens = batch_size * shape.block_size
    return Memory(
        weights=FLOAT * counts.total,
        gradients=FLOAT * (counts.total - counts.tables * on_cpu),
        optimizer=FLOAT * (2 * (counts.total - counts.tables - by_muon) + by_muon + counts.table_rows),
        activations=activations(shape, tokens, number_bytes, recompute, on_cpu, loss_chunk_size, compiled),
        copies=0 if number_bytes == FLOAT else number_bytes * cast,
        buffers=0 if on_cpu else WORKSPACE,
    )


def activations(
    shape: GPTConfig,
    tokens: int,
    number_bytes: int,
    recompute: bool = False,
    on_cpu: bool = False,
    loss_chunk_size: int = 0,
    compiled: bool = False,
) -> int:
    """Return the peak activation bytes of a micro-batch: at the loss, or in the last block's backward pass.

    At the loss: the saved tensors of all blocks (only their inputs with `recompute`), the final norm, and in
    float32 the log-softmax and two logit gradients, three with soft-capping. With `loss_chunk_size`: the
    gradients of the norm's output and of the LM head and, for one chunk, the logit gradient plus either part
    of the logits or the chunk's contribution to the LM head's gradient.
    `compiled`: the logits once in the compute dtype and, with soft-capping, once in float32, and the gradient
    of tied embeddings in the compute dtype.
    In the last block: the saved tensors of all blocks, the gradient of its output, the gradients at its
    midpoint (of the activation, or of the attention scores if saved) and, with tied embeddings, the
    embedding's gradient.
    """
    C, V, mask = shape.n_embd, shape.vocab_size, FLOAT if on_cpu else 1
    attention, mlp = kept_by_block(shape, number_bytes, on_cpu)
    entry = FLOAT * C if recompute else attention + mlp
    if compiled and shape.position == "rope":  # kept by Inductor, measured
        entry += 3 * C
    below = shape.n_layer * entry + 2 * 8 + mask * C * bool(shape.dropout)
    loss = tokens * (FLOAT * C + number_bytes * C)
    if loss_chunk_size:
        rows = min(loss_chunk_size, tokens)
        narrow = number_bytes < FLOAT
        part = min(rows, logits_chunk_size("cpu" if on_cpu else "cuda", V)) * V * FLOAT
        loss += tokens * number_bytes * C + FLOAT * V * C + number_bytes * rows * V
        loss += max(2 * part, number_bytes * V * C) if narrow else part
    elif compiled:
        loss += tokens * (number_bytes + FLOAT * bool(shape.softcap)) * shape.padded_vocab_size
        loss += number_bytes * V * C * shape.tied * 3 // 2
    else:
        loss += tokens * (3 + bool(shape.softcap)) * FLOAT * V
    # eager, the square's backward pass has two temporaries
    gradients = 3 if shape.activation == "relu2" and not compiled else 1
    half_way = mlp + gradients * number_bytes * _hidden(shape) // 2
    if keeps_scores(shape, on_cpu):  # up to four score tensors with dropout, else three
        half_way = max(half_way, number_bytes * (1 if shape.dropout else 2) * shape.n_head * shape.block_size)
    in_block = tokens * (attention + half_way + FLOAT * C - entry) + FLOAT * V * C * shape.tied
    return tokens * below + max(loss, in_block)


def kept_by_block(shape: GPTConfig, number_bytes: int, on_cpu: bool) -> tuple[int, int]:
    """Return the bytes per token saved for the backward pass by attention and by the MLP of a block.

    Saved are the inputs of each norm (float32), each linear layer and the activation; q, k, v and the
    attention output; dropout masks. Fused attention kernels recompute the scores; without one (CPU), torch
    copies q, k and v, scaled and expanded to all heads, and saves the softmax and, with dropout, the mask and
    their product.
    """
    C, T, hs = shape.n_embd, shape.block_size, shape.head_size
    kv = shape.n_kv_head or shape.n_head
    sums = FLOAT * (C + 2)  # input of a norm and its statistics
    if keeps_scores(shape, on_cpu):
        heads = 3 * shape.n_head * hs + (shape.n_head + 2 * kv) * hs * shape.qk_norm
        heads += shape.n_head * T * (3 if shape.dropout else 1)
    else:
        heads = (shape.n_head + 2 * kv) * hs
        if shape.qk_norm or shape.position == "rope":
            heads += (shape.n_head + kv) * hs  # q and k before and after
        sums += FLOAT * shape.n_head
    mask = C * (number_bytes if on_cpu else 1) * bool(shape.dropout)
    attention = number_bytes * (C + heads + shape.n_head * hs) + sums + mask
    return attention, number_bytes * (C + _hidden(shape)) + FLOAT * (C + 2) + mask


def keeps_scores(shape: GPTConfig, on_cpu: bool) -> bool:
    """Return whether attention saves the full score matrix: torch's fused CPU kernel supports neither
    per-head biases nor dropout."""
    return on_cpu and (shape.position == "alibi" or shape.dropout > 0)


def _hidden(shape: GPTConfig) -> int:
    """Return the MLP's hidden elements per token, before plus after the activation."""
    return 4 * (8 * round(shape.n_embd / 3)) if shape.activation == "swiglu" else 2 * 4 * shape.n_embd


def flops_per_token(shape: GPTConfig) -> int:
    """Return forward plus backward FLOPs per token, as counted by train.py."""
    return model.flops_per_token(parameters(shape).multiplying, shape)
