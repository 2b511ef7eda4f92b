"""The machine: which device and number format a run uses, and why; seeds; memory of the C library."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nanogpt.errors import UserError
from nanogpt.world import World

NATIVE_BFLOAT16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu, where it has them
REPEATED_S = 1.0  # signals so close together count as one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: str  # in which matrices are multiplied; weights and optimizer state are float32
    reason: str  # one line: what was chosen, and why
    world: World = field(default_factory=World)
    casting: str = "auto"  # how a model comes to compute in `dtype`: see in_dtype

    def autocast(self) -> AbstractContextManager:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.dtype])

    @property
    def casts_weights(self) -> bool:
        """Whether `in_dtype` brings all weights to `dtype` once a pass, not what each product reads."""
        usual = "weights" if self.device.type == "cpu" else "autocast"
        return self.dtype != "float32" and (usual if self.casting == "auto" else self.casting) == "weights"

    def in_dtype(self, model: nn.Module) -> Callable[..., Any]:
        """`model`, computing in `dtype` from float32 weights, which get float32 gradients.

        On a CPU all of it runs in bfloat16, the weights cast once a pass: autocast's casts of every
        activation cost more than they gain there (docs/results.md). Elsewhere it is autocast, unless
        `casting` is "weights".
        """
        if self.dtype == "float32":
            return model

        def cast(*inputs: Tensor) -> Any:
            weights = {name: p.to(DTYPES[self.dtype]) for name, p in model.named_parameters()}
            return functional_call(model, weights, inputs)

        def autocast(*inputs: Tensor) -> Any:
            with self.autocast():
                return model(*inputs)

        return cast if self.casts_weights else autocast

    def seed(self, seed: int) -> None:
        """Seed this device's random numbers (dropout). torch.manual_seed would seed every kind of
        device there is, for 0.3 ms a call: 1 % of the step of a small model."""
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    @property
    def half(self) -> torch.dtype:
        """bfloat16 where it is faster than float32 for matrices alone, without casts on all sides."""
        return torch.bfloat16 if has_bfloat16(self.device) else torch.float32

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Turn running out of memory into a UserError that says what to change."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise UserError(
                f"{self.name()}: out of memory; try half the --batch_size and twice the "
                f"--gradient_accumulation_steps (the same batch), or a smaller --block_size or model"
            ) from None

    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    def environment(self) -> dict[str, Any]:
        """What the bits of a result depend on beside the options."""
        return {
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "device": self.name(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "dtype": self.dtype,
        }


def setup(device: str, dtype: str, width: int, world: World | None = None) -> Machine:
    """Choose device and number format for a model of `width` channels; "auto" takes what serves both.

    A program that brings no `world` runs in one process. Raises UserError for a device that this machine,
    or this build of torch, does not have.
    """
    if not world:
        require_one_process()
        world = World()
    chosen = find_device(device)
    if chosen.type == "cuda" and chosen.index is None and world.size > 1:
        chosen = find_device(f"cuda:{world.local_rank}")
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        if chosen.index is not None:
            torch.cuda.set_device(chosen)  # seeds, streams and pinned memory are those of the current one
        torch.set_float32_matmul_precision("high")  # TF32 where a matrix is left in float32
    if dtype != "auto":
        return Machine(chosen, dtype, f"{_named(chosen, world)}, {dtype} as asked", world)
    best, why = _dtype(chosen, width)
    return Machine(chosen, best, f"{_named(chosen, world)}, {best}: {why}", world)


def require_one_process() -> None:
    """UserError if torchrun started several of a program that runs in one."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"torchrun started {processes} processes of a program that runs in one; use python")


def find_device(name: str) -> torch.device:
    """Return the device that --device names; UserError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name} is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={name}: this torch sees no CUDA GPU; use --device=auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps: this machine has no Apple GPU; use --device=auto or cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device={name} is not supported; use auto, cpu, cuda or mps")
    return device


def _dtype(device: torch.device, width: int) -> tuple[str, str]:
    if device.type == "cuda":
        if has_bfloat16(device):
            return "bfloat16", "this GPU multiplies it natively"
        return "float16", "this GPU has no bfloat16; the loss is scaled"
    if device.type == "mps":
        return "float32", "try --dtype=bfloat16 for larger models"
    native = has_bfloat16(device)
    # Of the float32 step on two AVX512-BF16 cores (docs/results.md): 0.8 at 128 channels, 0.6 at 256,
    # 0.5 at 384, 0.45 at 768. Without the instructions bfloat16 is emulated, and slow.
    if native and width >= 128:
        return "bfloat16", "this CPU multiplies it natively"
    return "float32", "too narrow for bfloat16 to pay" if native else "this CPU has no bfloat16"


def has_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 matrices faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in NATIVE_BFLOAT16)


def _named(device: torch.device, world: World) -> str:
    several = f"{world.size} processes, " if world.size > 1 else ""
    return several + ("all CPU cores" if device.type == "cpu" else device.type if several else str(device))


def keep_freed_memory() -> None:
    """Tell the GNU C library to keep freed memory instead of returning it to the system.

    A training step frees and asks for the same activations again; without this each step pays for
    some 600 to 1,200 page faults (4 layers of 128 channels, 12 x 64 tokens), 3 % of its time. Blocks above
    256 MB stay mapped one by one: smaller ones would settle in what they leave, and the next of them would
    find no room.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 28)
    mallopt(trim_threshold, (1 << 31) - 1)


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 (Slurm's warning) into `reason`, to be read where it is safe
    to stop.

    A second signal acts as it would have without us; not so one that comes at once to one of several
    processes, because launchers pass on what it has got already.
    """

    def __init__(self) -> None:
        self.reason, self._since = "", 0.0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return bool(self.reason)

    def __enter__(self) -> "StopRequest":
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", None))):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: a notebook's or a test's caller handles signals
                break
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not self.reason:
            self.reason, self._since = signal.Signals(number).name, time.monotonic()
            if not several:  # of several, one says later what became of it
                self._restore()
                told = "finishing this step and saving; once more to leave at once"
                print(f"\n{self.reason}: {told}", file=sys.stderr)
        elif time.monotonic() - self._since > REPEATED_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *unused: object) -> None:
        self._restore()


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in `folder`, if it is a checkout and git is installed."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
