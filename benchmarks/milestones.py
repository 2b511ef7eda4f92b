"""Run a train.py as it is, nanoGPT's or ours, and keep a copy of each checkpoint with its time.

    python benchmarks/milestones.py STARTED path/to/train.py FOLDER SEED --options...

The copy of a checkpoint that was complete t seconds after STARTED (of time.time) is FOLDER/t, a file or a
folder; copying stops the clock. nanoGPT has no option for its seed, so torch.manual_seed is given SEED
whatever the program asks for. Needs nothing but Python and torch.
"""

import io
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any


class Watcher(io.TextIOBase):
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


def main() -> None:
    started, program, folder = float(sys.argv[1]), Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve()
    seed = int(sys.argv[4])
    sys.argv = [str(program), *sys.argv[5:]]
    sys.path[0] = str(program.parent)
    watcher = Watcher(folder, started)
    sys.stdout = watcher
    import torch  # each program imports it first, too

    seeded = torch.manual_seed

    def manual_seed(asked: Any) -> Any:
        return seeded(seed)

    torch.manual_seed = manual_seed
    runpy.run_path(str(program), run_name="__main__")
    if watcher.being_saved:
        watcher.keep(watcher.being_saved)


if __name__ == "__main__":
    main()
