"""Which of torch's kernels a run uses: attention's, by preference and by name, and whether bits repeat."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from nanogpt.runtime import DTYPES, Machine

# In the order in which they are taken if nothing is asked: names of torch.nn.attention.SDPBackend.
ATTENTION = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}


@contextmanager
def chosen(attention: str = "auto", deterministic: bool = False) -> Iterator[None]:
    """Inside, torch's attention prefers the kernel `attention`, and takes another only for shapes that it
    cannot do; `deterministic`: every kernel gives the same bits for the same input, or refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
    try:
        if attention == "auto":
            yield
        else:
            others = [] if attention == "math" else [name for name in ATTENTION if name != attention]
            order = [attention, *others]  # the plain formula can do every shape
            with sdpa_kernel([getattr(SDPBackend, ATTENTION[name]) for name in order], set_priority=True):
                yield
    finally:
        torch.use_deterministic_algorithms(before)


def attention_name(shape: GPTConfig, machine: Machine, length: int, biased: bool = False) -> str:
    """The kernel that torch takes for the attention of a training step of `length` tokens, here and now;
    `biased`: with scores added to it, as ALiBi's or a mask of documents."""
    from torch.nn.attention import SDPBackend

    dtype, device = DTYPES[machine.dtype], machine.device
    heads = (shape.n_head, shape.n_kv_head or shape.n_head)
    q, k = (_heads(n, length, shape.head_size, dtype, device) for n in heads)
    bias = torch.zeros(1, 1, length, length, dtype=q.dtype, device=q.device) if biased else None
    found = torch._fused_sdp_choice(
        q, k, k, bias, shape.dropout, bias is None, enable_gqa=len(set(heads)) > 1
    )
    names = {value: name for name, value in ATTENTION.items()}
    return names.get(SDPBackend(found).name, SDPBackend(found).name.lower())


def _heads(count: int, length: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, count, length, size, dtype=dtype, device=device, requires_grad=True)


def require_attention(asked: str, shape: GPTConfig, machine: Machine, biased: bool) -> str:
    """The name of the kernel; UserError if one is asked for that torch does not take for this run."""
    with chosen(asked):
        found = attention_name(shape, machine, shape.block_size, biased)
    if asked not in ("auto", found):
        raise UserError(
            f"--attention={asked}: torch {torch.__version__} on {machine.name()} does not do it for heads of "
            f"{shape.head_size} channels in {machine.dtype} and takes {found}; leave the option out"
        )
    return found
