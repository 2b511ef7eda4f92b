"""The two train.py in processes of their own, for the parts of benchmarks/gpu.py: timed, ended in time."""

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
LONGEST_BLOCK_S = 15.0  # of iterations of one side, before it is the other's turn


class Failed(RuntimeError):
    """A side ended, or took too long; the message is one line."""


@dataclass
class Setup:
    """What a part is told, and where it writes what it has found."""

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
        """Seconds until the part should be done."""
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
    """A row of the table; the ratio is above 1 where ours is better."""
    numbers = all(isinstance(value, float | int) and value > 0 for value in (ours, theirs))
    ratio = (theirs / ours if lower_is_better else ours / theirs) if numbers else None
    return {"what": what, "ours": ours, "theirs": theirs, "ratio": ratio, "note": note}


def environment(cache: Path) -> dict[str, str]:
    """This process's, with a cache for compiled code of its own: an empty folder makes a cold start."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    return {**os.environ, **caches, "PYTHONUNBUFFERED": "1"}


class Lines:
    """A program's standard output, line by line, with a limit to the wait; standard error goes to `log`."""

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
        self.lines: queue.Queue[tuple[float, str]] = queue.Queue()  # when it came, and what
        self.came = self.started  # the last one
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
            raise Failed(f"{self.log.stem}: nothing after {limit:.0f} s more") from None
        if not line:
            raise Failed(f"{self.log.stem} ended with {self.process.wait()}: {self.last_words()}")
        return line

    def until(self, beginning: str, limit: float) -> float:
        """Seconds from the start of the program to its first line that begins so."""
        deadline = time.monotonic() + limit
        while not self.next(deadline - time.monotonic()).startswith(beginning):
            pass
        return self.came - self.started

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def said(self, *beginnings: str) -> list[str]:
        """The lines of `log` that begin so."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if line.startswith(beginnings)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Side(Lines):
    """A train.py whose iterations run block by block, as watched.py has it."""

    def __init__(self, name: str, program: Path, options: list[str], env: dict[str, str], scratch: str):
        command = [sys.executable, str(HERE / "watched.py"), "iterations", str(program), *options]
        super().__init__(command, program.parent, env | {"ITERATIONS_LOG": "1"}, Path(scratch, f"{name}.txt"))

    def run(self, iterations: int, limit: float) -> list[float]:
        """The seconds of each of the next `iterations`."""
        self.order(iterations)
        return self.answer(limit)

    def order(self, iterations: int) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `next` says how
            print(iterations, file=self.process.stdin, flush=True)

    def answer(self, limit: float) -> list[float]:
        return json.loads(self.next(limit))


def started(sides: dict[str, Side], setup: Setup, settle: int) -> dict[str, tuple[float, float]]:
    """Both start, and compile, at once: the seconds from the start of each to the end of its first iteration,
    and the time of an iteration, roughly."""
    for side in sides.values():
        side.order(settle)
    found = {}
    for name, side in sides.items():
        took = side.answer(setup.left)
        found[name] = (side.came - side.started - sum(took), min(took))
    return found


Blocks = dict[str, list[list[float]]]  # of each side the seconds of each iteration, block by block


def in_turn(
    sides: dict[str, Side], setup: Setup, speed: dict[str, float], write: Callable[[Blocks], None]
) -> Blocks:
    """The seconds of the iterations of each side, in blocks that take turns (A B A B ...) for the time that
    is left; each then has the chip for itself. `speed`: of an iteration, roughly. `write` is shown what there
    is after each round."""
    took: Blocks = {name: [] for name in sides}
    whole = 1.0 if setup.tiny else max(0.0, setup.left)
    each, begun, rounds = min(0.85 * whole / 2 / len(sides), LONGEST_BLOCK_S), time.monotonic(), 0
    while not rounds or setup.left > (time.monotonic() - begun) / rounds:
        if rounds == 2 and setup.tiny:
            break
        for name, side in sides.items():
            count = max(2, int(each / speed[name]) - 1)
            # The first one after a pause is not counted.
            took[name].append(side.run(1 + count, setup.left + setup.budget_s)[1:])
            speed[name] = float(np.median(took[name][-1]))
        rounds += 1
        write(took)
    return took
