"""Device and dtype selection, mixed precision, seeding and malloc tuning."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nanogpt.errors import UserError
from nanogpt.model import NGRAM_TABLES
from nanogpt.world import World

NATIVE_BFLOAT16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # in torch.cpu, if present
REMEDY = "half the --batch_size and twice the --gradient_accumulation_steps (the same batch), or a smaller "
REMEDY += "--block_size or model"  # if a training step runs out of memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Device, compute dtype and process group of a run."""

    device: torch.device
    dtype: str  # compute dtype; weights and optimizer state are float32
    reason: str  # one line about the choice of device and dtype
    world: World = field(default_factory=World)
    casting: str = "auto"  # mixed-precision mode: "auto", "autocast" or "weights"; see in_dtype

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

    @property
    def casts_weights(self) -> bool:
        """Return whether `in_dtype` casts all weights to `dtype` once per pass instead of using autocast."""
        default = "weights" if self.device.type == "cpu" else "autocast"
        return self.dtype != "float32" and (default if self.casting == "auto" else self.casting) == "weights"

    def in_dtype(self, model: nn.Module) -> Callable[..., Any]:
        """Return the forward function of `model` in `dtype`; weights and their gradients stay float32.

        On a CPU the weights are cast once per pass and everything runs in bfloat16, because there autocast's
        casts of every activation cost more than they gain (docs/results.md). Other devices use autocast,
        unless `casting` is "weights".
        """
        if self.dtype == "float32":
            return model

        def cast(*inputs: Tensor) -> Any:
            named = ((n, p) for n, p in model.named_parameters() if n != NGRAM_TABLES)  # cast by row
            weights = {name: p.to(DTYPES[self.dtype]) for name, p in named}
            return functional_call(model, weights, inputs)

        def autocast(*inputs: Tensor) -> Any:
            with self.autocast():
                return model(*inputs)

        return cast if self.casts_weights else autocast

    def seed(self, seed: int, iter_num: int) -> None:
        """Seed the RNG of this device from (seed, iter_num, rank), so that dropout depends neither on
        evaluations between iterations nor on resuming. torch.manual_seed would seed all device types, which
        takes 0.3 ms: 1 % of a step of a small model."""
        seed = seed * 1_000_003 + iter_num + self.world.rank * 1_000_000_007
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for all queued work on the device, for timing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def half(self) -> torch.dtype:
        """Dtype for individual matmuls: bfloat16 if the device multiplies it natively, else float32."""
        return torch.bfloat16 if has_bfloat16(self.device) else torch.float32

    @contextmanager
    def memory_errors(self, remedy: str = REMEDY) -> Iterator[None]:
        """Convert out-of-memory errors to a UserError that suggests `remedy`, by default for training."""
        try:
            yield
        except RuntimeError as error:
            messages = ("out of memory", "can't allocate memory", "calculation overflowed")
            if not any(message in str(error) for message in messages):
                raise
            raise UserError(f"{self.name()}: out of memory; try {remedy}") from None

    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    def environment(self) -> dict[str, Any]:
        """Return everything but the options on which bitwise reproducibility depends."""
        return {
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "device": self.name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "dtype": self.dtype,
        }


def setup(device: str, dtype: str, width: int, world: World | None = None) -> Machine:
    """Return the Machine for a model of `width` channels; "auto" depends on the hardware.

    Without `world` the program runs in one process. Raise UserError if the device is not available, or if
    torchrun started several processes of such a program.
    """
    if not world:
        require_one_process()
        world = World()
    chosen = find_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        if chosen.index is not None:
            torch.cuda.set_device(chosen)  # seeds, streams and pinned memory use the current device
        torch.set_float32_matmul_precision("high")  # TF32 for float32 matmuls
    if dtype != "auto":
        return Machine(chosen, dtype, f"{_named(chosen, world)}, {dtype} as requested", world)
    best, why = _dtype(chosen, width)
    if device == "auto" and chosen.type == "cpu" and torch.backends.mps.is_available():
        why += "; --device=mps uses the Apple GPU, which is untested"
    return Machine(chosen, best, f"{_named(chosen, world)}, {best}: {why}", world)


def require_one_process() -> None:
    """Raise UserError if torchrun started several processes of a single-process program."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"torchrun started {processes} processes, but this program runs in one; use python")


def find_device(name: str) -> torch.device:
    """Return the device named by --device. Raise UserError if it is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in present or not (index or "0").isdecimal():
        raise UserError(f"--device={name} is not a device; use auto, cpu, cuda, cuda:1 or mps")
    if int(index or 0) >= present[kind]:
        raise UserError(f"--device={name}: PyTorch finds {present[kind]} {kind} devices; use auto or cpu")
    return torch.device(name)


def _dtype(device: torch.device, width: int) -> tuple[str, str]:
    if device.type == "cuda":
        if has_bfloat16(device):
            return "bfloat16", "native on this GPU"
        return "float16", "no native bfloat16 on this GPU; uses loss scaling"
    if device.type == "mps":
        return "float32", "try --dtype=bfloat16 for larger models"
    native = has_bfloat16(device)
    # Step time relative to float32 on two AVX512-BF16 cores (docs/results.md): 0.8 at 128 channels, 0.6 at
    # 256, 0.5 at 384, 0.45 at 768. Without these instructions bfloat16 is emulated, and slow.
    if native and width >= 128:
        return "bfloat16", "native on this CPU"
    return "float32", "model too narrow for bfloat16" if native else "no native bfloat16 on this CPU"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether this device multiplies bfloat16 matrices natively, that is, faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in NATIVE_BFLOAT16)


def _named(device: torch.device, world: World) -> str:
    several = world.size > 1
    name = device.type if several else str(device)  # one process is on one GPU, such as cuda:0
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{threads} CPU thread{'s' * (threads > 1)}"
    return f"{world.size} processes, {name}" if several else name


def keep_freed_memory() -> None:
    """Configure glibc malloc to keep freed memory instead of returning it to the system.

    A training step frees and reallocates the same activations; without this each step causes 600 to 1,200
    page faults (4 layers of 128 channels, 12 x 64 tokens), 3 % of its time. Blocks above 256 MB still use
    mmap: kept in the heap, they would be fragmented by smaller blocks and could not be reused.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 1 << 28)
        mallopt(trim_threshold, (1 << 31) - 1)
