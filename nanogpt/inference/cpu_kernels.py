"""Bindings of cpu_kernels.cpp, compiled for the local processor on first use (cpu_compile.py).

The library is kept in the user's cache folder and trusted only if no other user can write there. Its name has
a hash of the source, the processor, CXX and torch, and one of its content. Without it, torch's matrix
products are used, at half the speed.
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import cache
from nanogpt.errors import UserError

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
GROUP = 32  # rows packed together, as in cpu_kernels.cpp
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_PRODUCT = [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT]
_ATTEND = [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER]
_ATTEND += [_INT, _INT, _INT, _INT, _POINTER, _INT]
_ARGUMENTS = {
    "product_float32": _PRODUCT,
    "product_bfloat16": _PRODUCT,
    "product_int8": [_POINTER, _POINTER, *_PRODUCT],
    "attend_float32": _ATTEND,
    "attend_bfloat16": _ATTEND,
}
PRODUCT = {
    torch.float32: "product_float32",
    torch.bfloat16: "product_bfloat16",
    torch.int8: "product_int8",
}
ATTEND = {torch.float32: ("attend_float32", 16), torch.bfloat16: ("attend_bfloat16", 32)}  # channel multiple


def product(kind: torch.dtype, weights: Sequence[Tensor | None], n: int, rows: Tensor) -> Tensor:
    """Return `rows` (count, m) times the transpose of a packed matrix (n, m), (count, n), by PRODUCT[kind].

    `weights`: the tensor arguments before n; None passes a null pointer."""
    rows = rows.contiguous()
    count, m = rows.shape
    y = torch.empty((count, n), dtype=rows.dtype)
    begin = [None if tensor is None else tensor.data_ptr() for tensor in weights]
    function = getattr(library(), PRODUCT[kind])
    function(*begin, n, m, rows.data_ptr(), count, y.data_ptr(), torch.get_num_threads())
    return y


def attends(dtype: torch.dtype, head_size: int) -> bool:
    """Return whether `attend` supports this dtype and head size."""
    fits = dtype in ATTEND and head_size % ATTEND[dtype][1] == 0 and head_size <= 256
    return fits and library() is not None


def attend(q: Tensor, kv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token per sequence over the first lengths[i] tokens of slot i, itself included.

    q (B, nh, hs); kv (2, B, n_kv_head, hs): its key and value, stored in place in `keys` and `values`
    (at least B, n_kv_head, T, hs) at lengths[i] - 1; lengths int64 (B,). All others of one dtype; returns
    (B, nh * hs).
    """
    B, heads, size = q.shape
    assert q.dtype == kv.dtype == keys.dtype == values.dtype and lengths.dtype == torch.int64
    assert q.stride()[1:] == kv.stride()[2:] == (size, 1) and keys.stride() == values.stride()
    slot, head, *inner = keys.stride()
    assert inner == [size, 1]
    y = torch.empty((B, heads * size), dtype=q.dtype)
    kv_heads = kv.shape[2]
    k = kv.data_ptr()
    v = k + kv.stride(0) * kv.element_size()
    pointers = [keys.data_ptr(), values.data_ptr(), slot, head, lengths.data_ptr()]
    shape = [B, kv_heads, heads // kv_heads, size]
    function = getattr(library(), ATTEND[q.dtype][0])
    begin = [q.data_ptr(), q.stride(0), k, v, kv.stride(1)]
    function(*begin, *pointers, *shape, y.data_ptr(), torch.get_num_threads())
    return y


def packed(weight: Tensor) -> Tensor:
    """Pack a matrix (n, m) into the layout of cpu_kernels.cpp, zero-padded to a multiple of GROUP rows.

    m times the element size in bytes must be a multiple of 4."""
    n, m = weight.shape
    unit = 4 // weight.element_size()
    groups = -(-n // GROUP)
    whole = torch.zeros(groups * GROUP, m, dtype=weight.dtype)
    whole[:n] = weight
    return whole.view(groups, GROUP, m // unit, unit).permute(0, 2, 1, 3).contiguous()


def library() -> Any | None:
    """Return the compiled library, or None if it is unavailable (see `why_not`)."""
    return _tried()[0]


def why_not() -> str:
    """Return why `library` is None and how to fix it; "" if it is loaded or the platform is unsupported."""
    return _tried()[1]


@functools.cache
def _tried() -> tuple[Any | None, str]:
    if sys.platform != "linux":
        return None, ""
    try:
        return _library(), ""
    except (UserError, OSError) as error:
        return None, str(error)


def _library() -> Any:
    parts = [SOURCE.read_text(encoding="utf-8"), os.environ.get("CXX", ""), torch.__file__, torch.__version__]
    with open("/proc/cpuinfo", encoding="utf-8") as lines:  # model and features of the processor
        parts += sorted({n for n in lines if n.startswith(("flags", "Features", "model name", "CPU part"))})
    name = f"products-{hashlib.sha256(platform.machine().join(parts).encode()).hexdigest()[:16]}"
    folder = cache.cache_folder() / "kernels"
    with suppress(OSError):
        for file in cache.private(folder).glob(f"{name}-*.so"):
            if opened := _opened(file):
                return opened
    from nanogpt.inference import cpu_compile

    with cpu_compile.compiled(SOURCE, folder, name) as file:
        return _opened(file)


def _opened(file: Path) -> Any | None:
    """Load a library whose name ends in its SHA-256; None if it is damaged or not this user's.

    It is verified and loaded by one descriptor, so it cannot be replaced in between."""
    with file.open("rb") as library:
        digest = hashlib.file_digest(library, "sha256").hexdigest()
        if not cache.is_private(os.fstat(library.fileno())) or not file.stem.endswith(f"-{digest}"):
            return None
        loaded = ctypes.CDLL(f"/proc/self/fd/{library.fileno()}")
    for function, arguments in _ARGUMENTS.items():
        getattr(loaded, function).argtypes, getattr(loaded, function).restype = arguments, None
    return loaded


def release_threads() -> None:
    """Release the calling thread's OpenMP pool; call it before another thread starts to compute.

    OpenMP keeps a pool per calling thread for the thread's lifetime. If two pools exceed the number of cores,
    libgomp threads sleep after each product: decoding takes 1.5 times as long (85M) or twice (0.8M).
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # not GNU OpenMP
        soft = 1  # omp_pause_soft of omp.h
        ctypes.CDLL(None).omp_pause_resource_all(soft)
