"""Benchmark training beside other programs: the step time by GOMP_SPINCOUNT and number of busy processes.

    python -m benchmarks.busy --dataset=data/shakespeare_char

Each measurement is a new `python train.py` with 60 updates of the CPU preset, of which the last 40 count. A
busy process is an endless loop in Python. Spin counts and numbers of processes are measured in turn.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import numpy as np

from benchmarks import shared
from nanogpt import ROOT
from nanogpt.config import PositiveInt, load
from nanogpt.errors import UserError, run_program

RUN = "config/train_shakespeare_char_cpu.py --max_iters=60 --eval_interval=1000 --eval_iters=1"
RUN += " --log_interval=10"
BUSY = (0, 1, 4)  # processes


@dataclass(frozen=True)
class Config:
    dataset: str = "shakespeare_char"  # prepared dataset, as in train.py
    spins: str = "1000,10000,300000"  # values of GOMP_SPINCOUNT to compare
    times: PositiveInt = 3  # repetitions of each measurement


def main(config: Config) -> None:
    """Run the benchmark and print it."""
    cases = [(busy, spin) for busy in BUSY for spin in config.spins.split(",")]
    took_ms: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
    for _ in range(config.times):
        for case in cases:
            took_ms[case].append(step_ms(config.dataset, *case))
    quiet = min(float(np.median(took_ms[0, spin])) for spin in config.spins.split(","))
    rows = []
    for case in cases:
        median = float(np.median(took_ms[case]))
        spread = f"{min(took_ms[case]):.0f} to {max(took_ms[case]):.0f}"
        rows.append([str(case[0]), case[1], f"{median:.0f}", spread, f"{median / quiet:.2f}"])
    header = [
        "busy processes",
        "GOMP_SPINCOUNT",
        "ms per step, median",
        "range",
        "relative to the fastest alone",
    ]
    shared.show(f"Step of the CPU preset beside other programs, {config.times} repetitions", header, rows)


def step_ms(dataset: str, busy: int, spin: str) -> float:
    """Return the mean time of a step in ms beside `busy` endless loops."""
    environment = {**os.environ, "GOMP_SPINCOUNT": spin}
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as out:
            arguments = [*RUN.split(), f"--dataset={dataset}", f"--out_dir={out}/run"]
            done = subprocess.run(
                [sys.executable, "train.py", *arguments],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    if done.returncode:
        raise UserError(f"train.py failed: {done.stderr.strip()}")
    return float(np.mean([float(ms) for ms in re.findall(r"time ([\d.]+)ms", done.stdout)][2:]))


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
