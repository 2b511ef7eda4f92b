"""Copies of GPU tensors in pinned host memory, for checkpoints that are written while training continues."""

import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

ALIGNED = 512  # bytes; every copy starts at a multiple


class HostCopies:
    """A buffer in host memory, reused for all copies of tensors of the same total size.

    torch's allocator of pinned memory rounds up to powers of two (18.7 to 28.2 GB for GPT-2 XL), so the
    buffer is ordinary memory that is pinned afterwards. If that fails, because locked memory is limited,
    copies are slower, but equal.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._unpin: weakref.finalize | None = None

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of `tensors`, which the next call overwrites."""
        sizes = [-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors]
        if len(self.buffer) != sum(sizes):
            self._allocate(sum(sizes))
        copies = []
        for place, tensor in zip(self.buffer.split(sizes), tensors, strict=True):
            copies.append(place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor.detach(), non_blocking=True)
        torch.cuda.synchronize()
        return copies

    def _allocate(self, size: int) -> None:
        if self._unpin:
            self._unpin()
        self.buffer, runtime = torch.empty(size, dtype=torch.uint8, device="cpu"), torch.cuda.cudart()
        if runtime.cudaHostRegister(self.buffer.data_ptr(), size, 0) == 0:
            self._unpin = weakref.finalize(self, runtime.cudaHostUnregister, self.buffer.data_ptr())
        else:
            with suppress(RuntimeError):  # the error would be raised by the next kernel
                torch.zeros(1, device="cuda")
