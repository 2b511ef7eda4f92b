"""Options by subject: name, type, default, help (the comment) and what contradicts it (`problems`).

A program's options are a dataclass at its top, which inherits from the parts that it needs; a function takes
the part that it needs. Nothing here needs torch, so that a program can refuse what cannot be at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, cast

from nanogpt.config import Count, Fraction, Positive, Range, Rate, Seconds

Origins = Mapping[str, str]  # where each option that was given comes from ("--lr=1", "config/x.py")


@dataclass(frozen=True)
class RunOptions:
    # what goes where
    out_dir: str = "out"  #: the run folder: checkpoints, options, metrics
    init_from: str = "scratch"  #: resume; auto: if there is a run; or weights: gpt2 .. gpt2-xl, a folder
    overwrite: bool = False  # from scratch: replace the run in out_dir instead of moving it aside
    eval_only: bool = False  # evaluate once and leave; nothing is written


@dataclass(frozen=True)
class BatchOptions:
    # batches
    gradient_accumulation_steps: Positive = 40  #: micro-batches an iteration
    batch_size: Positive | Literal["auto"] = 12  #: windows a micro-batch; auto: as many as fit in a GPU
    block_size: Positive = 1024  #: tokens a window: the context of the model
    batch_tokens: Count = 0  # tokens an iteration, instead of gradient_accumulation_steps; 0: those
    max_iters: Count = 600000  #: iterations in all
    max_tokens: Count = 0  # tokens in all, instead of max_iters; 0: those
    documents: Literal["stream", "rows", "masked"] = "stream"  # rows start at one; masked: none sees another

    @property
    def windows(self) -> int:
        """The windows of a micro-batch, once "auto" is decided."""
        return cast(int, self.batch_size)

    @property
    def windows_per_update(self) -> int:
        return self.windows * self.gradient_accumulation_steps

    def problems(self, origins: Origins) -> list[str]:
        wrong = [
            f"{origins[tokens]} and {origins[other]} say the same; give one of them"
            for tokens, other in (
                ("batch_tokens", "gradient_accumulation_steps"),
                ("max_tokens", "max_iters"),
            )
            if getattr(self, tokens)
            and all(origins.get(name, "").startswith("--") for name in (tokens, other))
        ]
        if self.batch_size == "auto" or overruled(self, "batch_tokens", origins):
            return wrong
        micro = self.windows * self.block_size
        steps, rest = divmod(self.batch_tokens, micro)
        if rest:
            near = " or ".join(f"{n * micro:,}".replace(",", "_") for n in (steps, steps + 1) if n)
            wrong.append(
                f"--batch_tokens={self.batch_tokens} is no whole number of micro-batches of "
                f"batch_size * block_size = {self.batch_size} * {self.block_size} = {micro} tokens; "
                f"give {near}, or another --batch_size"
            )
        return wrong


def overruled(options: BatchOptions, name: str, origins: Origins) -> bool:
    """Whether a flag says otherwise than the number of tokens `name`, or there is none: a flag beats a file,
    so that --max_iters=10 cuts a preset with max_tokens short."""
    other = {"batch_tokens": "gradient_accumulation_steps", "max_tokens": "max_iters"}[name]
    return not getattr(options, name) or origins.get(other, "").startswith("--")


@dataclass(frozen=True)
class DataOptions(BatchOptions):
    # data
    dataset: str = "openwebtext"  #: a folder of data/prepare.py, in data/ or any path; a:0.7,b:0.3 mixes two
    batch_ramp_tokens: Count = 0  # the batch grows linearly while these are read; 0: it is full at once
    batch_ramp_start: Fraction = 0.1  # the share of the full batch with which it begins

    def ramp(self) -> list[int]:
        """Return the sizes in windows of the batches before the first full one."""
        if not self.batch_ramp_tokens:
            return []
        from nanogpt.data.ramp import batch_ramp

        return batch_ramp(
            self.windows_per_update,
            self.batch_ramp_start,
            self.batch_ramp_tokens // self.block_size,
            unit=self.windows if self.gradient_accumulation_steps > 1 else 1,  # whole micro-batches
        )

    def in_iterations(self, origins: dict[str, str]) -> Self:
        """Return these options with the accumulation and the iterations that their numbers of tokens come to;
        `origins` gets where those come from."""
        counted = self
        if overruled(self, "batch_tokens", origins):
            counted = replace(counted, batch_tokens=0)
        if overruled(self, "max_tokens", origins):
            counted = replace(counted, max_tokens=0)
        if counted.batch_tokens:
            steps = counted.batch_tokens // (self.windows * self.block_size)
            counted = replace(counted, gradient_accumulation_steps=steps)
            origins["gradient_accumulation_steps"] = f"batch_tokens={self.batch_tokens}"
        if counted.max_tokens:
            sizes = [windows * self.block_size for windows in counted.ramp()]
            full = counted.windows_per_update * self.block_size
            iters = len(sizes) + max(0, -(-(self.max_tokens - sum(sizes)) // full))
            counted = replace(counted, max_iters=iters)
            origins["max_iters"] = f"max_tokens={self.max_tokens}"
        return counted


@dataclass(frozen=True)
class ModelOptions:
    # model
    n_layer: Positive = 12  #: blocks
    n_head: Positive = 12  #: attention heads a block
    n_embd: Positive = 768  #: channels
    dropout: Fraction = 0.0  #: 0 is good for pre-training, try 0.1 or more for finetuning
    bias: bool = False  # biases in linear layers and norms, as GPT-2 has
    n_kv_head: Count = 0  # heads of keys and values, shared by queries; 0: n_head
    head_dim: Count = 0  # channels a head; 0: n_embd / n_head
    position: Literal["learned", "rope", "alibi"] = "learned"  # how the order of tokens is known
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm, or RMSNorm without gains
    activation: Literal["gelu_tanh", "gelu", "relu2", "swiglu"] = "gelu_tanh"  # GPT-2's; gelu is nanoGPT's
    qk_norm: bool = False  # normalise queries and keys
    tied: bool = True  # the head is the token embedding
    softcap: Rate = 0.0  # keep logits within +- this; 0: free
    smear: bool = False  # a token's embedding gets some of the one before it
    init: Literal["gpt2", "zero", "depth"] = "gpt2"  # of weights; zero: projections begin at 0
    vocab_multiple: Positive = 64  # pad the embedding table to a multiple of this; the padding is never used

    def problems(self, origins: Origins) -> list[str]:
        return shape_problems(self.n_embd, self.n_head, self.n_kv_head, self.head_dim, self.position)


def shape_problems(n_embd: int, n_head: int, n_kv_head: int, head_dim: int, position: str) -> list[str]:
    """Return what makes these numbers of a model impossible, each with both values; empty if nothing does."""
    wrong, head_size = [], head_dim or n_embd // n_head
    if not head_dim and n_embd % n_head:
        wrong.append(f"n_embd={n_embd} is not divisible by n_head={n_head}")
    if n_kv_head and n_head % n_kv_head:
        wrong.append(f"n_head={n_head} is not divisible by n_kv_head={n_kv_head}")
    if position == "rope" and head_size % 2:
        wrong.append(f"position=rope turns pairs of channels, but a head has {head_size}")
    return wrong


@dataclass(frozen=True)
class OptimizerOptions:
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  #: muon: for the matrices of blocks, AdamW for the rest
    learning_rate: Rate = 6e-4  #: peak learning rate (AdamW)
    muon_lr: Rate = 0.02  # peak learning rate (Muon)
    muon_weight_decay: Rate = 0.0  # of Muon's matrices
    muon_turns: Annotated[int, Range(1, 5)] = 5  # of orthogonalisation; fewer cost less
    weight_decay: Rate = 1e-1  # of AdamW's matrices; vectors have none
    beta1: Fraction = 0.9  # decay of the mean of gradients
    beta2: Fraction = 0.95  # decay of the mean of their squares
    grad_clip: Rate = 1.0  # clip the norm of the gradient; 0: don't

    def problems(self, origins: Origins) -> list[str]:
        wrong = []
        if self.beta1 == 1 or self.beta2 == 1:
            wrong.append(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")
        if self.optimizer == "muon" and not self.learning_rate:
            wrong.append("learning_rate=0 leaves Muon without a schedule; make it small instead")
        return wrong


@dataclass(frozen=True)
class FinetuneOptions:
    # finetuning
    patience: Count = 0  # stop after so many evaluations without a better validation loss; 0: never
    freeze: str = ""  # leave these parameters alone: patterns such as wte*,h.0.*
    train_only: str = ""  # train these parameters alone
    lora_rank: Count = 0  #: train adapters of this rank beside frozen weights; 0: the weights
    lora_alpha: Rate = 16.0  # what adapters add counts lora_alpha / lora_rank
    lora_targets: str = "c_attn,c_proj"  # linear maps that get one: c_attn, c_proj, c_fc, h.0.*

    def problems(self, origins: Origins) -> list[str]:
        wrong = []
        if self.lora_rank and (self.freeze or self.train_only):
            wrong.append("--lora_rank freezes all weights; leave out --freeze and --train_only")
        if self.lora_rank and not self.lora_alpha:
            wrong.append("lora_alpha=0 switches the adapters off; 2 * lora_rank is usual")
        return wrong


@dataclass(frozen=True)
class MachineOptions:
    # machine
    device: str = "auto"  #: cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  #: of products; weights stay float32
    compile: Literal["auto", True, False, "blocks"] = "auto"  #: torch.compile; auto: on CUDA, if it pays
    recompute: bool = False  # run blocks again in the backward pass: less memory, a third more arithmetic
    seed: Count = 1337  #: of initial weights, batch order and dropout


@dataclass(frozen=True)
class SpeedOptions:
    # speed, for GPUs; none of these has run on one yet, so all are off (docs/gpu.md)
    casting: Literal["auto", "autocast", "weights"] = "auto"  # to dtype: each product, or all weights once
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"  # torch's kernel to prefer
    loss_rows: Count = 0  # tokens whose logits are computed at once; 0: all, on a CPU some
    cuda_graph: bool = False  # record an iteration once and replay it: for small models
    deterministic: bool = False  # the same bits again on a GPU too, where the fastest kernels differ


@dataclass(frozen=True)
class ProcessOptions:
    # several processes, under torchrun
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # what each holds; auto: ddp if the model fits
    shard_size: Count = 0  # hsdp: processes that share one copy of the model; 0: those of a machine
    backend: Literal["nccl", "gloo"] = "nccl"  # how they talk; a CPU needs gloo whatever it says
    meet_timeout_s: Seconds = 300.0  # wait so long at the start until all are there
    timeout_s: Seconds = 600.0  # end the run, and say where each is, when one has not moved for so long


@dataclass(frozen=True)
class WatchOptions:
    # at each evaluation: rows in metrics.jsonl, files in samples/; the run stays the same to the bit
    eval_tasks: str = ""  # score these too, as eval.py's --tasks: hellaswag, lambada:FILE, quiz.jsonl
    eval_tasks_items: Positive = 500  # at most this many items of each task, evenly spread over its file
    sample_prompt: str = ""  #: sample four continuations of this text
    sample_tokens: Positive = 32  # tokens in each continuation


@dataclass(frozen=True)
class TrainOptions(
    RunOptions,
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    FinetuneOptions,
    MachineOptions,
    SpeedOptions,
    ProcessOptions,
    WatchOptions,
):
    """What a run is made of. train.py adds when it evaluates, logs and saves, and the schedule."""
