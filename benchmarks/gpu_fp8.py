"""Whether FP8 would pay: the products of a training step of GPT-2 (124M) in float8 against bfloat16.

Each matrix of the model takes part in three products: the forward pass, the gradient of what goes in, and
that of the weights. torch._scaled_mm takes its first side by rows and its second by columns, so that for the
two gradients transposed copies are made; activations and weights are rounded to e4m3, gradients to e5m2,
with a scale a tensor. Nothing of the trainer uses any of it: it is to be built only if this wins, and then at
equal loss.

Shapes: M tokens, K channels in, N channels out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_sides import Setup, figure

NEEDED = (8, 9)  # the compute capability of the first chips with float8 products
STEP = "FP8, products of a 124M step"


class Matrix(NamedTuple):
    inner: int
    outer: int
    count: int  # in the model


MATRICES = {
    "queries, keys, values": Matrix(768, 2304, 12),
    "attention's projection": Matrix(768, 768, 12),
    "MLP in": Matrix(768, 3072, 12),
    "MLP out": Matrix(3072, 768, 12),
    "head": Matrix(768, 50_304, 1),
}
TINY = {"MLP in": Matrix(32, 64, 2), "head": Matrix(32, 128, 1)}


def why_not(device: str) -> str:
    """Why float8 products are not measured here; "" if they are."""
    if device != "cuda":
        return f"not measured: {device} is no GPU with float8 products"
    found = torch.cuda.get_device_capability()
    if found < NEEDED:
        return f"not measured: compute capability {'.'.join(map(str, found))}, and float8 needs 8.9"
    return ""


@dataclass
class Times:
    """Seconds of the three products of a matrix."""

    bfloat16: float
    alone: float  # float8, from operands that lie ready
    whole: float  # with rounding, scales and transposed copies, each a kernel of its own
    off: float  # of the forward product: the norm of the difference over that of the result


def measure(setup: Setup, found: dict[str, Any], timed: Callable[[Callable[[], object]], float]) -> None:
    """Add the rates to `found`, by `timed`, the seconds of a piece of work; or why they are not measured."""
    if why := why_not(setup.device):
        found["figures"].append(figure(STEP, why))
        return
    matrices, tokens = (TINY, 64) if setup.tiny else (MATRICES, 16_384)
    total = Times(0.0, 0.0, 0.0, 0.0)
    for name, matrix in matrices.items():
        took = times(matrix, tokens, setup.device, timed)
        for kind in ("bfloat16", "alone", "whole"):
            setattr(total, kind, getattr(total, kind) + matrix.count * getattr(took, kind))
        work = 3 * 2 * tokens * matrix.inner * matrix.outer / 1e12
        note = (
            f"first bfloat16; three products of {tokens:,} tokens; with rounding and copies "
            f"{work / took.whole:.4g}; off by {took.off:.1%}"
        )
        what = f"FP8, {name} {matrix.inner} x {matrix.outer}, TFLOP/s"
        found["figures"].append(figure(what, work / took.alone, work / took.bfloat16, note=note))
        setup.write(found)
    note = (
        f"{tokens:,} tokens, first bfloat16; with rounding and copies {total.whole * 1e3:.4g} ms, "
        f"{total.bfloat16 / total.whole:.2f} times; a compiler would put some of these into other kernels"
    )
    both = (total.alone * 1e3, total.bfloat16 * 1e3)
    found["figures"].append(figure(f"{STEP}, ms", *both, note=note, lower_is_better=True))
    setup.write(found)


def times(matrix: Matrix, tokens: int, device: str, timed: Callable[[Callable[[], object]], float]) -> Times:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, weight = draw(tokens, matrix.inner), draw(matrix.outer, matrix.inner) * 0.02
    gradient = draw(tokens, matrix.outer)
    ready = operands(x, weight, gradient)
    exact = (x @ weight.mT).float()
    off = float((products(*ready)[0].float() - exact).norm() / exact.norm())
    del exact
    return Times(
        timed(lambda: (x @ weight.mT, gradient @ weight, gradient.mT @ x)),
        timed(lambda: products(*ready)),
        timed(lambda: products(*operands(x, weight, gradient))),
        off,
    )


class Rounded(NamedTuple):
    rows: Tensor  # float8, as it lies
    columns: Tensor  # the same numbers, by columns
    scale: Tensor  # by which they are to be multiplied


def rounded(x: Tensor, dtype: torch.dtype) -> Rounded:
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    rows = (x / scale).to(dtype)
    return Rounded(rows, rows.mT.contiguous().mT, scale)


def operands(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Rounded, Rounded, Rounded]:
    """Those of x (M, K), weight (N, K) and gradient (M, N)."""
    narrow, wide = torch.float8_e4m3fn, torch.float8_e5m2
    return rounded(x, narrow), rounded(weight, narrow), rounded(gradient, wide)


def products(x: Rounded, weight: Rounded, gradient: Rounded) -> tuple[Tensor, Tensor, Tensor]:
    """The result (M, N), and the gradients of x (M, K) and of the weights (N, K)."""
    return (
        scaled(x.rows, weight.rows.mT, x.scale, weight.scale, fast=True),
        scaled(gradient.rows, weight.columns, gradient.scale, weight.scale),
        scaled(gradient.columns.mT, x.columns, gradient.scale, x.scale),
    )


def scaled(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool = False) -> Tensor:
    """a b, a by rows and b by columns; `fast`: added up with fewer bits, as is usual in the forward pass."""
    return torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )
