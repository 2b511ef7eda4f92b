"""Asynchronous checkpointing: a thread writes a copy to disk while training continues.

Training waits for the copy only or, if there is no memory for a copy, for the write. At most one write is in
flight: the next save and the end of the run wait for it and raise its error. Until it completes, the previous
checkpoint remains the latest valid one.
"""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nanogpt import files
from nanogpt.checkpoint import FILES, FORMAT, REPLACED, Progress, best_first, evaluation, step_folders
from nanogpt.errors import Diverged, UserError
from nanogpt.model import GPT, NGRAM_TABLES
from nanogpt.options import TrainOptions

# any of these marks a folder as a run; ckpt.pt is nanoGPT's
RUN_FILES = ("config.json", "metrics.jsonl", "ckpt.pt")
KEPT = 2  # number of newest checkpoints kept, besides the best
SPARE = 1 << 28  # bytes of host memory that a copy leaves free


@dataclass(frozen=True)
class Snapshot:
    """Contents of a checkpoint."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def of(cls, model: GPT, optimizer: Mapping[str, Tensor], state: dict[str, Any]) -> "Snapshot":
        """Return a snapshot that aliases the live tensors. Raise Diverged if a weight is not finite."""
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise Diverged(
                f"{bad[0]} holds non-finite weights at iteration {state['iter_num']}; they were not saved. "
                f"Resume from the last checkpoint with a smaller --learning_rate (--init_from=resume)"
            )
        return cls(weights, optimizer, {**state, "model": asdict(model.config)})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors in (self.weights, self.optimizer) for t in tensors.values())

    def write(self, run_dir: Path) -> Path:
        """Write the checkpoint of step `state["iter_num"]` to the run folder, prune old ones and return its
        path. Raise OSError if writing fails; older checkpoints are then untouched."""
        path = run_dir / f"step-{self.state['iter_num']:06d}"
        with files.staged(path) as draft:
            draft.mkdir(parents=True)
            _save_tensors(self.weights, draft / "model.safetensors")
            _save_tensors(self.optimizer, draft / "optimizer.safetensors")
            files.write_json(draft / "state.json", self.state)
            listing = {
                name: {"bytes": (draft / name).stat().st_size, "sha256": files.sha256(draft / name)}
                for name in FILES
            }
            files.write_json(draft / "manifest.json", {"format": FORMAT, "files": listing})
            files.remove(path)
        prune(run_dir)
        return path


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # safetensors wraps I/O errors
        raise OSError(f"{path} could not be written: {error}") from None


def prune(run_dir: Path) -> None:
    """Delete partial checkpoints of killed runs, all complete checkpoints but the best and the KEPT newest,
    and the folder of the run that --overwrite replaced.

    Called after a new checkpoint is complete, so none is deleted before its successor is on disk.
    """
    for leftover in run_dir.glob(f"step-*{files.TEMPORARY}*"):
        files.remove(leftover)
    complete = [path for path in step_folders(run_dir) if (path / "manifest.json").is_file()]
    kept = complete[:KEPT] + [path for path in best_first(complete)[:1] if math.isfinite(evaluation(path)[0])]
    for path in complete:
        if path not in kept:
            # Rename first, so that a kill during deletion leaves no partial checkpoint.
            temporary = files.temporary(path)
            files.rename(path, temporary)
            files.remove(temporary)
    files.remove(run_dir.with_name(run_dir.name + REPLACED))


def prepare_folder(
    run_dir: Path, lock: FileLock, resumed: Progress | None, options: TrainOptions, data: str = ""
) -> tuple[FileLock, str]:
    """Prepare the run folder `run_dir`, locked by `lock`, for a new run or, if `resumed` is given, for one
    that resumes at this progress. `data`: what it is evaluated on (`evaluated_on`), if known.

    An existing run that is not resumed is renamed: to the first free of run.1, run.2, ... or, with
    --overwrite, to run.replaced, which is deleted after the first checkpoint. Return the lock, to be held
    during the run, and a notice to print.
    """
    if not step_folders(run_dir) and not any((run_dir / name).exists() for name in RUN_FILES):
        return lock, ""
    from nanogpt.checkpoint import resume

    if resumed is None:
        return resume.set_aside(run_dir, lock, options.overwrite)
    resume.rewind(run_dir, resumed, data)
    return lock, f"resuming {run_dir} at iteration {resumed.iter_num}, {resume.left(resumed, options)}"


def require_space(run_dir: Path, model: GPT) -> str:
    """Return a line with the maximum size of the run folder, assuming AdamW's two moments per weight. Raise
    UserError if less space is free."""
    checkpoint_bytes = sum(
        (12 if p.requires_grad and n != NGRAM_TABLES else 4) * p.numel() for n, p in model.named_parameters()
    )
    # 2: the best, and the new one, which is complete before an old one is deleted
    needed = checkpoint_bytes * (KEPT + 2)
    free = shutil.disk_usage(next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())).free
    size = f"{tqdm.format_sizeof(needed)}B"
    if needed > free:
        raise UserError(
            f"checkpoints in {run_dir} take up to {size}, but {tqdm.format_sizeof(free)}B is free there; "
            f"give --out_dir=PATH on another disk"
        )
    return f"run folder: {run_dir} (up to {size})"


class AsyncCheckpointer:
    """Writes checkpoints in a background thread, one at a time."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._completed: list[Path] = []
        self._pinned: Any = None  # gpu.host_copies.HostCopies, reused because it is slow to allocate
        self.took_s = 0.0  # duration of the last write in the background

    @property
    def failed(self) -> bool:
        """Return whether the last write failed, so that `wait` will raise."""
        return self._error is not None

    def save(self, run_dir: Path, model: GPT, optimizer: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Start saving a checkpoint; `pop_completed` returns its path once it is on disk. Without host memory
        for a copy, save it before returning. Raise Diverged for non-finite weights, or the error of the
        previous write."""
        self.wait()
        snapshot = Snapshot.of(model, optimizer, state)
        if not self._fits(snapshot):
            self._completed.append(snapshot.write(run_dir))
            return
        copy = self._copy(snapshot)
        self._thread = Thread(target=self._write, args=(copy, run_dir), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in flight and raise its error, if any, once."""
        self.close()
        error, self._error = self._error, None
        if error:
            raise error

    def close(self) -> None:
        """Join the thread without raising, for use while another exception propagates."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def pop_completed(self) -> list[Path]:
        """Return the paths of the checkpoints completed since the last call."""
        completed, self._completed = self._completed, []
        return completed

    def _write(self, snapshot: Snapshot, run_dir: Path) -> None:
        started = time.perf_counter()
        try:
            path = snapshot.write(run_dir)
            self._completed.append(path)
            self.took_s = time.perf_counter() - started
        except BaseException as error:  # raised in the main thread by `wait`
            self._error = error

    def _fits(self, snapshot: Snapshot) -> bool:
        free = free_memory()
        return free is None or snapshot.nbytes + SPARE < free or bool(self._pinned)

    def _copy(self, snapshot: Snapshot) -> Snapshot:
        tensors = [*snapshot.weights.values(), *snapshot.optimizer.values()]
        if tensors[0].device.type == "cuda":
            from nanogpt.gpu.host_copies import HostCopies

            self._pinned = self._pinned or HostCopies()
            copies = iter(self._pinned.copy(tensors))
        else:
            copies = (t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in tensors)
        weights = dict(zip(snapshot.weights, copies, strict=False))
        return Snapshot(weights, dict(zip(snapshot.optimizer, copies, strict=True)), snapshot.state)


def free_memory() -> int | None:
    """Return the available memory in bytes, limited by the cgroup; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no limit ("max"), or cgroup v1
        limit, used = (int((group / f"memory.{n}").read_text(encoding="ascii")) for n in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # page cache is reclaimable
    return free


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes, allocated on a GPU or else used by this process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def git_commit(folder: Path) -> str | None:
    """Return the commit hash of the git checkout `folder`; None if it is not one or git is not installed."""
    if not (folder / ".git").exists():  # an enclosing repository is another project's
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
