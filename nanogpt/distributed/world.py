"""Process group of a multi-process run: rank, share of the work, collectives and shared errors.

torchrun starts the processes and sets their ranks in the environment.
"""

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt import ROOT, files
from nanogpt.distributed import rendezvous
from nanogpt.distributed.watchdog import GO_ON, Watchdog
from nanogpt.errors import SHARED, TOLD, Diverged, Lost, Stopped, UserError
from nanogpt.world import T, World

STORE_S = 10.0  # store timeout once all ranks have joined
VISIBLE_S = 5.0  # a new file must be visible in a shared folder within this time


@dataclass(frozen=True)
class Processes(World):
    """World of more than one rank; each rank holds an instance."""

    control: Any = None  # CPU (gloo) group for flags and objects, so that it never waits for a GPU
    heart: Watchdog | None = None  # reports this rank's progress to the others

    def sum(self, x: Tensor) -> Tensor:
        with self._waiting():
            dist.all_reduce(x)
        return x

    def sum_int(self, count: int) -> int:
        counted = torch.tensor(count)
        with self._waiting():
            dist.all_reduce(counted, group=self.control)
        return int(counted)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def raise_on_all_ranks(self, work: Callable[[], T]) -> T:
        result, failure = _attempt(work)
        for rank, error in enumerate(self.gather(failure)):
            if error:
                raise _shared(error, rank)
        assert result
        return result[0]

    def rank_zero_only(self, work: Callable[[], T]) -> T | None:
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        box = [error]
        with self._waiting():
            dist.broadcast_object_list(box, src=0, group=self.control)
        if box[0]:
            raise _shared(box[0], 0)
        return result[0] if result else None

    def report_phase(self, step: int, phase: str) -> None:
        if self.heart:
            self.heart.at(step, phase)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Report the phase "waiting" during a collective."""
        step, phase = self.heart.place if self.heart else (0, "")
        self.report_phase(step, "waiting")
        yield
        self.report_phase(step, phase)

    def report_progress(self) -> None:
        if self.heart:
            self.heart.moved()

    def require_visible(self, folder: Path) -> None:
        above = [folder.absolute(), *folder.absolute().parents]
        level = next(number for number, home in enumerate(above) if home.is_dir())
        box: list[Any] = [level, f".nanogpt-{secrets.token_hex(8)}", socket.gethostname()]
        dist.broadcast_object_list(box, src=0, group=self.control)
        home = above[min(box[0], len(above) - 1)]
        token = home / box[1]
        self.rank_zero_only(token.touch)

        def look() -> None:
            deadline = time.monotonic() + VISIBLE_S
            while not token.exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{home} on {socket.gethostname()} is not the folder of rank 0 on {box[2]}; set "
                        f"--out_dir to a folder shared by all nodes"
                    )
                time.sleep(0.05)

        try:
            self.raise_on_all_ranks(look)
        finally:
            if self.is_main_process:
                token.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.heart:
            return
        if isinstance(error, Stopped):  # agreed on by all ranks
            error.add_note(SHARED)
        if error is None or SHARED in getattr(error, "__notes__", ()):
            self.heart.close()
            dist.destroy_process_group()
            return
        if isinstance(error, RuntimeError) and not isinstance(error, Diverged):
            if why := self.heart.explain():
                error = Lost(f"{why}; {GO_ON}")
                if self.heart.told("end"):
                    error.add_note(TOLD)
        elif self.heart.told(str(error)):
            error.add_note(TOLD)
        self.heart.leave(f"{type(error).__name__}: {error}".splitlines()[0])
        self.heart.close()
        if isinstance(error, Lost):
            raise error from None


def _attempt(work: Callable[[], T]) -> tuple[tuple[T] | None, Exception | None]:
    try:
        return (work(),), None
    except Exception as error:
        return None, error


def _shared(error: Exception, rank: int) -> Exception:
    """Return the error of `rank`, marked as shared, so that only rank 0 prints it."""
    if rank:
        error = type(error)(f"rank {rank}: {error}")
    error.add_note(SHARED)
    return error


def init_processes(device_type: str, options: dict[str, Any], run: Path) -> Processes:
    """Join the process group started by torchrun. Collective.

    CPU devices always use gloo, regardless of --backend. `options`, code and versions must be equal on all
    ranks. `run`: folder for diagnostics of a rank that hangs. Discards standard output of all ranks but 0.
    Raise UserError if the other ranks do not join within --rdzv_timeout_s seconds, or differ.
    """
    facts = {
        "machine": {"device": device_type, "torch": torch.__version__},
        "code": code_digests(ROOT),
        "options": options,
    }
    rdzv_timeout_s, hang_timeout_s = options["rdzv_timeout_s"], options["hang_timeout_s"]
    size = int(os.environ["WORLD_SIZE"])
    rank = int(os.environ.get("RANK", "0"))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    gpu = None
    if device_type == "cuda":
        gpu = use_own_gpu(torch.device(options["device"] if options["device"] != "auto" else "cuda"))
        _set_up_recorder(run)
    wait = timedelta(seconds=rdzv_timeout_s)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        word = rendezvous.gather(store, rank, size, rdzv_timeout_s, address)
        store = dist.PrefixStore(word, store)
        rendezvous.compare(store, rank, size, facts)
        # PyTorch's timeouts are a fallback: longer than ours, which report more.
        late = timedelta(seconds=3 * hang_timeout_s)
        name = "gloo" if device_type == "cpu" else options["backend"]
        # With a device NCCL connects all ranks now, not at the first collective.
        device = None if name == "gloo" else gpu
        dist.init_process_group(name, store=store, rank=rank, world_size=size, timeout=late, device_id=device)
        control = dist.new_group(backend="gloo", timeout=late)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {rank} of {size} did not meet the other ranks at {address} within {rdzv_timeout_s:g} s "
            f"(--rdzv_timeout_s): {reason}"
        ) from None
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process exits
    heart = Watchdog(_own_client(word), rank, size, hang_timeout_s, address, run / "stuck")
    heart.record = lambda: _dump_recorder(run, rank)
    heart.start()
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Processes(rank, size, on_node, control, heart)


def use_own_gpu(asked: torch.device) -> torch.device:
    """Make the GPU of this rank, or the one `asked` for, the current device, which the name "cuda" means, and
    return it. Raise UserError on the ranks of this node that have none; one of them prints it."""
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:  # Slurm can show each rank only its own GPU
        local = 0
    index = local if asked.index is None else asked.index
    if index >= count:
        error = UserError(
            f"{os.environ.get('LOCAL_WORLD_SIZE', index + 1)} processes on {socket.gethostname()}, which has "
            f"{count} GPUs; start one per GPU"
        )
        if index > count:
            error.add_note(TOLD)
        raise error
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _own_client(word: str) -> dist.Store:
    """Return a separate store client, so that the main thread's blocking calls do not delay the heartbeat."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=STORE_S)
    client = dist.TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)
    return dist.PrefixStore(f"{word}/heartbeat", client)


def _set_up_recorder(run: Path) -> None:
    """Enable NCCL's flight recorder: dumps the last collectives of each GPU when one times out."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run / "nccl-process-"))


def _dump_recorder(run: Path, rank: int) -> None:
    """Dump the flight recorder now, in the format of torch's tools (torchfrtrace)."""
    with suppress(AttributeError, RuntimeError, OSError):  # a build without NCCL; a missing folder
        trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
        (run / f"nccl-process-{rank}").write_bytes(trace)


def code_digests(root: Path) -> dict[str, str]:
    """Return SHA-256 digests of the sources of the library and the programs, by path."""
    paths = [*root.glob("*.py"), *(root / "nanogpt").rglob("*.py")]
    return {path.relative_to(root).as_posix(): files.sha256(path) for path in paths}
