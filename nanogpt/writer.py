"""Checkpoints written while training goes on: from a copy in the computer's memory, by a thread.

Training waits for the copy only. One write is under way at most: the next save waits for it, and so does
the end of the run. What the thread fails with is raised where the run asks for it (`wait`, `save`), and
until a write is complete the checkpoints before it are whole and the newest.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint, runtime
from nanogpt.model import GPT

SPARE = 1 << 28  # bytes that a copy must leave free


class Writer:
    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._complete: list[Path] = []
        self._pinned: dict[str, Tensor] = {}  # for copies from a GPU; kept, because they are slow to get

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once."""
        return self._error is not None

    def save(self, run: Path, model: GPT, optimizer: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """As checkpoint.save, complete when `complete` names it. Raises Diverged for these weights, and
        whatever the write before this one has failed with."""
        self.wait()
        content = checkpoint.Content.of(model, optimizer, state)
        if not self._fits(content):
            self._complete.append(content.write(run))
            return
        copy = self._copy(content)
        self._thread = threading.Thread(target=self._write, args=(copy, run), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what the thread has failed with, once."""
        self.close()
        error, self._error = self._error, None
        if error:
            raise error

    def close(self) -> None:
        """As `wait`, for one who has an error already."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def complete(self) -> list[Path]:
        """The checkpoints that have become complete since this was asked last."""
        found, self._complete = self._complete, []
        return found

    def _write(self, content: checkpoint.Content, run: Path) -> None:
        try:
            path = content.write(run)
            self._complete.append(path)
        except BaseException as error:  # for the main thread
            self._error = error

    def _fits(self, content: checkpoint.Content) -> bool:
        free = runtime.free_memory()
        return free is None or content.nbytes + SPARE < free or bool(self._pinned)

    def _copy(self, content: checkpoint.Content) -> checkpoint.Content:
        weights = {name: self._host(f"w {name}", tensor) for name, tensor in content.weights.items()}
        state = {name: self._host(f"o {name}", tensor) for name, tensor in content.optimizer.items()}
        if self._pinned:
            torch.cuda.synchronize()
        return checkpoint.Content(weights, state, content.state)

    def _host(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if name not in self._pinned:
            place = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._pinned[name] = place
        return self._pinned[name].copy_(tensor.detach(), non_blocking=True)
