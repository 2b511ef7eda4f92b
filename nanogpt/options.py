"""Option groups: name, type, default, help (the comment) and consistency checks (`problems`).

A program's options are a dataclass that inherits from the groups it needs; a function takes the group it
needs. Nothing here imports torch, so that invalid options are rejected immediately.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, cast

from nanogpt.config import (
    Amount,
    FilePath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Seconds,
    Seed,
    UnitInterval,
)

MIN_MINUTES = 0.1
# options that set the same quantity
COUNTERPARTS = {"batch_tokens": ["gradient_accumulation_steps"], "max_tokens": ["max_iters"]}
COUNTERPARTS["minutes"] = ["max_iters", "max_tokens"]
Documents = Literal["stream", "rows", "masked"]
Origins = Mapping[str, str]  # source of each option that is set ("--seed=1", "config/x.py")


@dataclass(frozen=True)
class RunOptions:
    # run folder
    out_dir: FilePath = "out"  #: run folder: checkpoints, options, metrics
    init_from: FilePath = "scratch"  #: scratch, resume, auto (resume if possible), gpt2 to gpt2-xl, or a path
    overwrite: bool = False  # replace the run in out_dir: delete it after the first checkpoint
    eval_only: bool = False  # evaluate once and exit; nothing is written


@dataclass(frozen=True)
class BatchOptions:
    # batches
    gradient_accumulation_steps: PositiveInt = 40  #: micro-batches per iteration, over all ranks
    batch_size: PositiveInt | Literal["auto"] = 12  #: sequences per micro-batch; auto: as many as fit
    block_size: Annotated[int, Range(1, 10**7)] = 1024  #: context length in tokens
    batch_tokens: Amount = 0  # tokens per iteration; 0: use gradient_accumulation_steps
    max_iters: PositiveInt = 600000  #: total iterations
    max_tokens: Amount = 0  # total training tokens; 0: use max_iters
    minutes: NonNegativeFloat = 0.0  #: length of the run in minutes, start-up included; 0: use max_iters
    documents: Documents = "stream"  # rows: sequences begin at a document; masked: no attention across them

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch: batch_size, once "auto" is resolved."""
        return cast(int, self.batch_size)

    @property
    def sequences_per_iteration(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps

    def problems(self, origins: Origins) -> list[str]:
        wrong = [
            f"{origins[name]} and {origins[other]} set the same quantity; give one of them"
            for name, others in COUNTERPARTS.items()
            for other in others
            if getattr(self, name) and all(origins.get(each, "").startswith("--") for each in (name, other))
        ]
        if 0 < self.minutes < MIN_MINUTES:
            wrong.append(f"minutes={self.minutes:g} is too short for start-up; give at least {MIN_MINUTES}")
        if self.batch_size == "auto" or overruled(self, "batch_tokens", origins):
            return wrong
        micro = self.micro_batch_size * self.block_size
        steps, rest = divmod(self.batch_tokens, micro)
        if rest:
            near = " or ".join(f"{n * micro:,}".replace(",", "_") for n in (steps, steps + 1) if n)
            wrong.append(
                f"--batch_tokens={self.batch_tokens} is not a multiple of a micro-batch of "
                f"batch_size * block_size = {self.batch_size} * {self.block_size} = {micro} tokens; "
                f"give {near}, or another --batch_size"
            )
        return wrong


def overruled(options: BatchOptions, name: str, origins: Origins) -> bool:
    """Return whether the token count or time `name` is unset or overridden by a flag for a counterpart, which
    takes precedence over a preset: --max_iters=10 shortens a preset with max_tokens."""
    flags = [origins.get(other, "") for other in COUNTERPARTS[name]]
    return not getattr(options, name) or any(flag.startswith("--") for flag in flags)


@dataclass(frozen=True)
class DataOptions(BatchOptions):
    # data
    dataset: FilePath = "openwebtext"  #: text file, prepared folder, name in data/; mixture: a:0.7,b:0.3
    batch_ramp_tokens: Amount = 0  # linear batch size ramp-up over this many tokens; 0: none
    batch_ramp_start: UnitInterval = 0.1  # initial batch size as a fraction of the full batch

    def ramp(self) -> list[int]:
        """Return the sizes, in sequences, of the batches before the first full one."""
        if not self.batch_ramp_tokens:
            return []
        from nanogpt.data.ramp import batch_ramp

        return batch_ramp(
            self.sequences_per_iteration,
            self.batch_ramp_start,
            self.batch_ramp_tokens // self.block_size,
            unit=self.micro_batch_size if self.gradient_accumulation_steps > 1 else 1,  # whole micro-batches
        )

    def in_iterations(self, origins: dict[str, str]) -> Self:
        """Return these options with batch_tokens and max_tokens converted to accumulation steps and
        iterations. `origins` is updated in place."""
        names = ("minutes", "batch_tokens", "max_tokens")
        unset: dict[str, Any] = {name: 0 for name in names if overruled(self, name, origins)}
        resolved = replace(self, **unset)
        if resolved.batch_tokens:
            steps = resolved.batch_tokens // (self.micro_batch_size * self.block_size)
            resolved = replace(resolved, gradient_accumulation_steps=steps)
            origins["gradient_accumulation_steps"] = f"batch_tokens={self.batch_tokens}"
        if resolved.max_tokens:
            sizes = [size * self.block_size for size in resolved.ramp()]
            full = resolved.sequences_per_iteration * self.block_size
            iters = len(sizes) + max(0, -(-(self.max_tokens - sum(sizes)) // full))
            resolved = replace(resolved, max_iters=iters)
            origins["max_iters"] = f"max_tokens={self.max_tokens}"
        return resolved


@dataclass(frozen=True)
class ModelOptions:
    # model
    n_layer: Annotated[int, Range(1, 4096)] = 12  #: transformer blocks
    n_head: Annotated[int, Range(1, 8192)] = 12  #: attention heads per block
    n_embd: Annotated[int, Range(1, 10**6)] = 768  #: embedding channels
    dropout: UnitInterval = 0.0  #: dropout probability; 0 for pretraining, try 0.1 or more for finetuning
    bias: bool = False  # True: biases in linear layers and LayerNorms (GPT-2)
    n_kv_head: NonNegativeInt = 0  # key/value heads (grouped-query attention); 0: n_head
    head_dim: Annotated[int, Range(0, 8192)] = 0  # channels per head; 0: n_embd / n_head
    position: Literal["learned", "rope", "alibi"] = "learned"  # position encoding
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm, or RMSNorm without gains
    activation: Literal["gelu_tanh", "gelu", "relu2", "swiglu"] = "gelu_tanh"  # MLP activation; nanoGPT: gelu
    qk_norm: bool = False  # normalize queries and keys
    tied: bool = True  # tie the LM head to the token embedding
    softcap: NonNegativeFloat = 0.0  # soft-cap logits: cap * tanh(logits / cap); 0: off
    smear: bool = False  # add the previous token's embedding, with a learned weight per channel
    ngram_orders: str = ""  # add embeddings of n-grams of these lengths, such as 2,3,4; empty: none
    ngram_rows: PositiveInt = 65536  # maximum rows of the table of each length; more n-grams share rows
    init: Literal["gpt2", "zero", "depth"] = "gpt2"  # init scheme; zero: residual projections start at 0
    vocab_multiple: Annotated[int, Range(1, 65536)] = 64  # pad the embedding table to a multiple of this

    def problems(self, origins: Origins) -> list[str]:
        wrong = shape_problems(self.n_embd, self.n_head, self.n_kv_head, self.head_dim, self.position)
        orders = self.ngram_orders.split(",") if self.ngram_orders else []
        if len(set(orders)) < len(orders) or not set(orders) <= set("2345678"):
            wrong.append(f"ngram_orders={self.ngram_orders}: give different lengths from 2 to 8, as in 2,3,4")
        elif len(orders) > self.n_embd:
            wrong.append(f"ngram_orders={self.ngram_orders} need {len(orders)} channels; raise --n_embd")
        return wrong


def shape_problems(n_embd: int, n_head: int, n_kv_head: int, head_dim: int, position: str) -> list[str]:
    """Return an error message for each invalid combination of values; empty if all are valid."""
    wrong, head_size = [], head_dim or n_embd // n_head
    if not head_dim and n_embd % n_head:
        wrong.append(f"n_embd={n_embd} is not divisible by n_head={n_head}")
    if n_kv_head and n_head % n_kv_head:
        wrong.append(f"n_head={n_head} is not divisible by n_kv_head={n_kv_head}")
    if position == "rope" and head_size % 2:
        wrong.append(f"position=rope rotates pairs of channels, but a head has {head_size}")
    return wrong


@dataclass(frozen=True)
class OptimizerOptions:
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  #: muon: Muon for matrices in blocks, AdamW for the rest
    learning_rate: NonNegativeFloat = 6e-4  #: peak learning rate (AdamW)
    muon_lr: NonNegativeFloat = 0.02  # peak learning rate (Muon)
    muon_weight_decay: NonNegativeFloat = 0.0  # weight decay (Muon)
    muon_ns_steps: Annotated[int, Range(1, 5)] = 5  # Newton-Schulz iterations; fewer is cheaper
    weight_decay: NonNegativeFloat = 1e-1  # weight decay of 2-D parameters (AdamW)
    beta1: UnitInterval = 0.9  # decay rate of the first moment (AdamW)
    beta2: UnitInterval = 0.95  # decay rate of the second moment (AdamW)
    grad_clip: NonNegativeFloat = 1.0  # maximum gradient norm; 0: no clipping

    def problems(self, origins: Origins) -> list[str]:
        wrong = []
        if self.beta1 == 1 or self.beta2 == 1:
            wrong.append(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        if self.optimizer == "muon" and not self.learning_rate:
            wrong.append("muon needs learning_rate > 0, whose schedule muon_lr follows; use a small value")
        return wrong


@dataclass(frozen=True)
class FinetuneOptions:
    # finetuning
    patience: NonNegativeInt = 0  # stop after this many evaluations without improvement; 0: never
    freeze: str = ""  # freeze parameters matching these patterns: wte*,h.0.*
    train_only: str = ""  # freeze all parameters but those matching these patterns
    lora_rank: NonNegativeInt = 0  #: rank of LoRA adapters; 0: train the weights themselves
    lora_alpha: NonNegativeFloat = 16.0  # LoRA scale: adapter output times lora_alpha / lora_rank
    lora_targets: str = "c_attn,c_proj"  # linear layers with adapters: c_attn, c_proj, c_fc, h.0.*

    def problems(self, origins: Origins) -> list[str]:
        wrong = []
        if self.lora_rank and (self.freeze or self.train_only):
            wrong.append("--lora_rank freezes all weights; remove --freeze and --train_only")
        if self.lora_rank and not self.lora_alpha:
            wrong.append("lora_alpha=0 disables the adapters; 2 * lora_rank is usual")
        return wrong


@dataclass(frozen=True)
class MachineOptions:
    # device
    device: str = "auto"  #: cpu, cuda, cuda:1, mps; auto: cuda if available, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  #: compute dtype; weights stay float32
    compile: Literal["auto", True, False, "blocks"] = "auto"  #: torch.compile; auto: on CUDA, if it pays off
    activation_checkpointing: bool = False  # recompute blocks in backward: less memory, more FLOPs
    seed: Seed = 1337  #: seed of initial weights, data order and dropout


@dataclass(frozen=True)
class SpeedOptions:
    # performance, mostly for GPUs (experimental: docs/gpu.md)
    casting: Literal["auto", "autocast", "weights"] = "auto"  # autocast, or cast all weights in each pass
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"  # preferred attention kernel
    loss_chunk_size: NonNegativeInt = 0  # tokens per chunk of the loss; 0: no chunks on GPUs, auto on CPUs
    cuda_graph: bool = False  # replay iterations as a CUDA graph; for small models
    deterministic: bool = False  # bitwise reproducible kernels on GPUs


@dataclass(frozen=True)
class ProcessOptions:
    # distributed training, under torchrun
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # data parallelism; auto: ddp if the model fits
    shard_size: NonNegativeInt = 0  # hsdp: ranks per sharding group; 0: the ranks of one node
    backend: Literal["nccl", "gloo"] = "nccl"  # torch.distributed backend on GPUs; CPUs always use gloo
    rdzv_timeout_s: Seconds = 300.0  # seconds to wait for all ranks to join (rendezvous)
    hang_timeout_s: Seconds = 600.0  # watchdog timeout in seconds: abort and report hung ranks


@dataclass(frozen=True)
class InTrainingOptions:
    # tasks and samples at each evaluation (metrics.jsonl, samples/)
    eval_tasks: str = ""  # tasks to score, as eval.py's --tasks: hellaswag, lambada:FILE, quiz.jsonl
    eval_tasks_items: PositiveInt = 500  # maximum items per task, evenly spread over its file
    sample_prompt: str = ""  #: prompt from which four samples are generated at each evaluation; empty: none
    sample_tokens: PositiveInt = 32  # tokens per sample


@dataclass(frozen=True)
class SystemOptions(MachineOptions, SpeedOptions, ProcessOptions, InTrainingOptions):
    """Options of device, performance, distributed training, and tasks during training."""


@dataclass(frozen=True)
class TrainOptions(RunOptions, DataOptions, ModelOptions, OptimizerOptions, FinetuneOptions, SystemOptions):
    """All training options except those of train.py's loop."""
