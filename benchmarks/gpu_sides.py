"""Run both train.py in subprocesses with time limits, for the parts of benchmarks/gpu.py."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import ROOT

HERE = Path(__file__).parent
LONGEST_BLOCK_S = 15.0  # maximum duration of a block of one side


class Failed(RuntimeError):
    """A side exited or timed out; the message is one line."""


@dataclass
class Setup:
    """Settings of a part, and the file for its results."""

    about: dict[str, Any]
    answer: Path
    started: float

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["about"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def left(self) -> float:
        """Seconds left in the part's time budget."""
        return self.about["budget_s"] - (time.monotonic() - self.started)

    def theirs(self) -> Path:
        return Path(self.about["checkout"]) / "train.py"

    def ours(self) -> Path:
        return ROOT / "train.py"

    def write(self, found: dict[str, Any]) -> None:
        draft = self.answer.with_suffix(".draft")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(self.answer)


def figure(
    what: str, ours: Any, theirs: Any = None, *, note: str = "", lower_is_better: bool = False
) -> dict[str, Any]:
    """Return a row of the table; the ratio is above 1 if ours is better."""
    numbers = all(isinstance(value, float | int) and value > 0 for value in (ours, theirs))
    ratio = (theirs / ours if lower_is_better else ours / theirs) if numbers else None
    return {"what": what, "ours": ours, "theirs": theirs, "ratio": ratio, "note": note}


def environment(cache: Path) -> dict[str, str]:
    """Return this process's environment with its own compile cache; an empty folder gives a cold start."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    return {**os.environ, **caches, "PYTHONUNBUFFERED": "1"}


class Lines:
    """A subprocess whose stdout is read line by line with a timeout; stderr goes to `log`."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str], log: Path):
        self.log = log
        self.started = time.monotonic()
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.lines: queue.Queue[tuple[float, str]] = queue.Queue()  # (arrival time, line)
        self.came = self.started  # arrival time of the last line
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put((time.monotonic(), line))
        self.lines.put((time.monotonic(), ""))

    def next(self, limit: float) -> str:
        try:
            self.came, line = self.lines.get(timeout=max(0.1, limit))
        except queue.Empty:
            raise Failed(f"{self.log.stem}: no output for {limit:.0f} s") from None
        if not line:
            raise Failed(f"{self.log.stem} exited with {self.process.wait()}: {self.last_words()}")
        return line

    def until(self, beginning: str, limit: float) -> float:
        """Return the seconds from program start to its first line with this prefix."""
        deadline = time.monotonic() + limit
        while not self.next(deadline - time.monotonic()).startswith(beginning):
            pass
        return self.came - self.started

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no output"

    def said(self, *beginnings: str) -> list[str]:
        """Return the lines of `log` with any of these prefixes."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.startswith(beginnings)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Side(Lines):
    """A train.py whose iterations run in blocks, controlled by watched.py."""

    def __init__(self, name: str, program: Path, options: list[str], env: dict[str, str], scratch: str):
        command = [sys.executable, str(HERE / "watched.py"), "iterations", str(program), *options]
        super().__init__(command, program.parent, env | {"ITERATIONS_LOG": "1"}, Path(scratch, f"{name}.txt"))

    def run(self, iterations: int, limit: float) -> list[float]:
        """Run the next `iterations`; return the seconds of each."""
        self.order(iterations)
        return self.answer(limit)

    def order(self, iterations: int) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the process has exited; `next` reports it
            print(iterations, file=self.process.stdin, flush=True)

    def answer(self, limit: float) -> list[float]:
        return json.loads(self.next(limit))


def started(sides: dict[str, Side], setup: Setup, settle: int) -> dict[str, tuple[float, float]]:
    """Start (and compile) both sides concurrently. Return per side the seconds from process start to the end
    of the first iteration, and the approximate time per iteration."""
    for side in sides.values():
        side.order(settle)
    found = {}
    for name, side in sides.items():
        took = side.answer(setup.left)
        found[name] = (side.came - side.started - sum(took), min(took))
    return found


Blocks = dict[str, list[list[float]]]  # side -> blocks -> seconds of each iteration


def in_turn(
    sides: dict[str, Side], setup: Setup, speed: dict[str, float], write: Callable[[Blocks], None]
) -> Blocks:
    """Run blocks of iterations alternately (A B A B ...) in the remaining time, so that each side has the GPU
    to itself; return the seconds of each iteration. `speed`: approximate seconds per iteration, updated in
    place. `write` is called with the results after each round."""
    took: Blocks = {name: [] for name in sides}
    whole = 1.0 if setup.tiny else max(0.0, setup.left)
    each, begun, rounds = min(0.85 * whole / 2 / len(sides), LONGEST_BLOCK_S), time.monotonic(), 0
    while not rounds or setup.left > (time.monotonic() - begun) / rounds:
        if rounds == 2 and setup.tiny:
            break
        for name, side in sides.items():
            count = max(2, int(each / speed[name]) - 1)
            # The first iteration after a pause is discarded.
            took[name].append(side.run(1 + count, setup.left + setup.budget_s)[1:])
            speed[name] = float(np.median(took[name][-1]))
        rounds += 1
        write(took)
    return took
