"""Run a train.py as it is, nanoGPT's or ours, and watch what it prints.

    python benchmarks/watched.py iterations path/to/train.py --options...
    python benchmarks/watched.py checkpoints STARTED FOLDER SEED path/to/train.py --options...

The program runs in its own folder. `iterations` times it block by block: a line with a number n on standard
input runs n iterations, each from one line `iter N:` to the next, and prints their seconds as a JSON list; at
the end of the input the program is stopped. With ITERATIONS_LOG=1 in the environment what else the program
prints goes to standard error.

`checkpoints` keeps a copy of each checkpoint: the one that was complete t seconds after STARTED (of
time.time) becomes FOLDER/t, a file or a folder; copying stops the clock. nanoGPT has no option for its seed,
so torch.manual_seed is given SEED whatever the program asks for.

Needs nothing but Python, and torch for SEED, so neither side's memory or threads are disturbed.
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
    """Standard output for the program: counts its iterations, and holds it back between blocks."""

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
    """Standard output for the program: passed on, and read for the news that a checkpoint was saved.

    nanoGPT says `saving checkpoint to FOLDER` before it writes, ours `saved FOLDER` afterwards.
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
    import torch  # each program imports it first, too

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
