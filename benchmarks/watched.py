"""Run an unmodified train.py, nanoGPT's or ours, and control it through what it prints.

    python benchmarks/watched.py iterations path/to/train.py --options...
    python benchmarks/watched.py checkpoints STARTED FOLDER SEED path/to/train.py --options...

The program runs in its own folder. `iterations` times it in blocks: each line with a number n on stdin runs n
iterations, delimited by lines `iter N:`, and prints their seconds as a JSON list; at end of input the program
is stopped. With ITERATIONS_LOG=1 in the environment the program's other output goes to stderr.

`checkpoints` copies each checkpoint to FOLDER/t (a file or a folder), where t is its completion time in
seconds after STARTED (a time.time value); time spent copying is excluded. nanoGPT has no seed option, so
torch.manual_seed always uses SEED.

Imports only the standard library, and torch for SEED, so it does not disturb either side's memory or threads.
"""

import io
import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any


class Iterations(io.TextIOBase):
    """Replacement for sys.stdout that counts iterations and blocks the program between blocks."""

    def __init__(self) -> None:
        self.answers, self.orders = sys.stdout, sys.stdin
        self.took_s: list[float] = []
        self.wanted = 0
        self.started = 0.0
        self.rest = sys.stderr if os.environ.get("ITERATIONS_LOG") else None

    def write(self, text: str) -> int:
        if text.startswith("iter "):
            now = time.perf_counter()
            self.took_s.append(now - self.started)
            if len(self.took_s) >= self.wanted:
                self.next_block()
            self.started = time.perf_counter()
        elif self.rest and text.strip():
            print(text.strip(), file=self.rest)
        return len(text)

    def next_block(self) -> None:
        if self.wanted:
            print(json.dumps(self.took_s), file=self.answers, flush=True)
        order = self.orders.readline()
        if not order:
            raise SystemExit
        self.wanted, self.took_s = int(order), []


class Checkpoints(io.TextIOBase):
    """Replacement for sys.stdout that forwards the output and watches for saved checkpoints.

    nanoGPT prints `saving checkpoint to FOLDER` before writing, ours `saved FOLDER` afterwards.
    """

    def __init__(self, folder: Path, started: float) -> None:
        self.out, self.folder, self.started = sys.stdout, folder, started
        self.being_saved: Path | None = None

    def write(self, text: str) -> int:
        if self.being_saved and text.strip():
            self.keep(self.being_saved)
            self.being_saved = None
        if text.startswith("saving checkpoint to "):
            self.being_saved = Path(text.split(" to ", 1)[1].strip()) / "ckpt.pt"
        elif text.startswith("saved "):
            self.keep(Path(text.split(" ", 1)[1].strip()))
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()

    def keep(self, checkpoint: Path) -> None:
        now = time.time()
        copy = self.folder / f"{now - self.started:.3f}"
        (shutil.copytree if checkpoint.is_dir() else shutil.copy)(checkpoint, copy)
        self.started += time.time() - now


def run(program: str, options: list[str], watcher: Any) -> None:
    path = Path(program).resolve()
    sys.argv = [str(path), *options]
    sys.path[0] = str(path.parent)
    sys.stdout = watcher
    runpy.run_path(str(path), run_name="__main__")


def keep_checkpoints(started: str, folder: str, seed: str, program: str, *options: str) -> None:
    watcher = Checkpoints(Path(folder).resolve(), float(started))
    import torch  # both programs import it anyway

    seeded = torch.manual_seed

    def manual_seed(asked: Any) -> Any:
        return seeded(int(seed))

    torch.manual_seed = manual_seed
    run(program, list(options), watcher)
    if watcher.being_saved:
        watcher.keep(watcher.being_saved)


if __name__ == "__main__":
    if sys.argv[1] == "iterations":
        run(sys.argv[2], sys.argv[3:], Iterations())
    else:
        keep_checkpoints(*sys.argv[2:])
