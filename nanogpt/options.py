"""Options that several programs share: the model, its optimizer, the machine.

A program's own options are a dataclass at its top, which inherits from these; the comments are their help.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanogpt.config import Count, Fraction, Positive, Range, Rate, Seconds


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


@dataclass(frozen=True)
class TokenOptions:
    # tokens
    documents: Literal["stream", "rows", "masked"] = "stream"  # rows start at one; masked: none sees another
    batch_tokens: Count = 0  # tokens an iteration, instead of gradient_accumulation_steps; 0: those
    max_tokens: Count = 0  # tokens in all, instead of max_iters; 0: those


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


@dataclass(frozen=True)
class FinetuneOptions:
    # finetuning
    patience: Count = 0  # stop after so many evaluations without a better validation loss; 0: never
    freeze: str = ""  # leave these parameters alone: patterns such as wte*,h.0.*
    train_only: str = ""  # train these parameters alone
    lora_rank: Count = 0  #: train adapters of this rank beside frozen weights; 0: the weights
    lora_alpha: Rate = 16.0  # what adapters add counts lora_alpha / lora_rank
    lora_targets: str = "c_attn,c_proj"  # linear maps that get one: c_attn, c_proj, c_fc, h.0.*


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
