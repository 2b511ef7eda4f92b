"""Selection of torch's attention kernels, and of deterministic algorithms."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.model import GPTConfig, repeats_kv
from nanogpt.options import TrainOptions
from nanogpt.runtime import DTYPES, Machine

# Names of torch.nn.attention.SDPBackend, in torch's default order before sm_90, where cuDNN comes first.
ATTENTION = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}


def of_a_run(options: TrainOptions) -> AbstractContextManager[None]:
    """Return the context for training with these options."""
    return chosen(options.attention, options.deterministic, avoids_cudnn(options.documents, options))


def avoids_cudnn(documents: str, shape: GPTConfig | TrainOptions) -> bool:
    """Return whether cuDNN's attention is to be left out of training: with a mask (torch issue 196678: NaN
    gradients) or grouped queries (193893: wrong results)."""
    return documents == "masked" or shape.position == "alibi" or bool(shape.n_kv_head)


@contextmanager
def chosen(
    attention: str = "auto", deterministic: bool = False, without_cudnn: bool = False
) -> Iterator[None]:
    """Context in which torch prefers the attention kernel `attention` and falls back to others for shapes
    that it does not support; `deterministic`: kernels are bitwise reproducible or raise. `without_cudnn`:
    "auto" never selects cuDNN, which takes a fraction of a second to plan for each new shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matmul
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
    try:
        if attention == "auto":
            torch.backends.cuda.enable_cudnn_sdp(cudnn and not without_cudnn)
            yield
        else:
            # math supports every shape
            order = ["math"] if attention == "math" else list(dict.fromkeys([attention, *ATTENTION]))
            with sdpa_kernel([getattr(SDPBackend, ATTENTION[name]) for name in order], set_priority=True):
                yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def attention_name(shape: GPTConfig, machine: Machine, length: int, biased: bool = False) -> str:
    """Return the kernel that torch selects for the attention of a training step, for sequences of `length`
    tokens; `biased`: with an additive bias (ALiBi or document mask)."""
    from torch.nn.attention import SDPBackend

    dtype, device = DTYPES[machine.dtype], machine.device
    heads = [shape.n_head, shape.n_kv_head or shape.n_head]
    bias = torch.zeros(1, 1, length, length, dtype=dtype, device=device) if biased else None
    if repeats_kv(device.type, dtype, bias):
        heads[1] = heads[0]
    q, k = (_heads(n, length, shape.head_size, dtype, device) for n in heads)
    backend = torch._fused_sdp_choice(
        q, k, k, bias, shape.dropout, bias is None, enable_gqa=len(set(heads)) > 1
    )
    names = {value: name for name, value in ATTENTION.items()}
    return names.get(SDPBackend(backend).name, SDPBackend(backend).name.lower())


def _heads(count: int, length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, count, length, size, dtype=dtype, device=device, requires_grad=True)


def require_attention(asked: str, shape: GPTConfig, machine: Machine, documents: str = "stream") -> str:
    """Return the name of the kernel; raise UserError if torch does not select the kernel `asked` for."""
    if machine.device.type == "mps":
        raise UserError(f"--attention={asked} is not available on Apple GPUs; remove the option")
    biased = documents == "masked" or shape.position == "alibi"
    with chosen(asked, without_cudnn=avoids_cudnn(documents, shape)):
        name = attention_name(shape, machine, shape.block_size, biased)
    if asked not in ("auto", name):
        raise UserError(
            f"--attention={asked}: torch {torch.__version__} on {machine.name()} does not support heads of "
            f"{shape.head_size} channels in {machine.dtype} and uses {name}; leave the option out"
        )
    return name
