"""Preparation of torch for a GPU; messages about hardware that it cannot use or that stays idle."""

import os
import shutil
import timeit

import torch

from nanogpt.errors import UserError
from nanogpt.runtime import Machine, has_bfloat16

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # environment variables that configure it


def why_no_cuda() -> str:
    """Return why torch cannot use the NVIDIA GPU of this machine; "" if it can or if there is none."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    if not torch.version.cuda:
        return "PyTorch is a CPU-only build; install a CUDA build (pytorch.org)"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it"
    return (
        f"its driver is probably too old for CUDA {torch.version.cuda}, of this PyTorch; update the driver, "
        f"or install a build for an older CUDA (pytorch.org)"
    )


def supports(index: int, architectures: list[str] | None = None) -> bool:
    """Return whether this build of torch has kernels for GPU `index`.

    Code for sm_XY runs on X.Z with Z >= Y; PTX for compute_XY on every later GPU.
    """
    major, minor = torch.cuda.get_device_capability(index)
    for architecture in torch.cuda.get_arch_list() if architectures is None else architectures:
        kind, _, digits = architecture.rstrip("af").partition("_")
        built = divmod(int(digits), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def slowdown() -> float:
    """Measure how much longer a matmul takes on the CPU in bfloat16 than in float32."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)  # 25 ms where it is emulated; 512 take a second
        seconds.append(min(timeit.repeat("matrix @ matrix", globals={"matrix": matrix}, number=1, repeat=3)))
    return seconds[1] / seconds[0]


def prepare(machine: Machine, asked: str, several: bool = True) -> list[str]:
    """Configure the allocator of GPU memory; return notes on GPUs that are not used, or on slow emulated
    bfloat16, where --device=`asked`.

    `several`: the program can run on several. Raise UserError for a GPU that this build does not support.
    """
    if machine.device.type == "cuda":
        if not any(name in os.environ for name in ALLOCATOR):
            # Segments of fixed size lose a quarter of the memory to fragments when batches differ in size.
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        index = torch.cuda.current_device()
        if not supports(index):
            major, minor = torch.cuda.get_device_capability(index)
            raise UserError(
                f"{machine.name()} (compute capability {major}.{minor}) is not supported by this build of "
                f"PyTorch ({' '.join(torch.cuda.get_arch_list())}); install one for an older CUDA, such as "
                f"cu126 (pytorch.org), or use --device=cpu"
            )
        count = torch.cuda.device_count()
        if several and asked == "auto" and machine.world.size == 1 and count > 1:
            launch = f"torchrun --standalone --nproc_per_node={count} ..."
            return [f"note: 1 of {count} GPUs is used; for all: {launch}"]
    elif machine.dtype == "bfloat16" and machine.device.type == "cpu" and not has_bfloat16(machine.device):
        return [
            f"note: this CPU emulates bfloat16: a matmul takes {slowdown():.1f} times as long as in float32"
        ]
    elif asked == "auto" and (why := why_no_cuda()):
        return [f"note: the NVIDIA GPU is not used: {why}"]
    return []
