"""Benchmark start-up latency: time to the first iteration, to --help, and to an unknown-option error.

    python -m benchmarks.startup --dataset=data/shakespeare_char

Each measurement starts a new `python train.py ...`. The run uses nanoGPT's CPU settings (4 layers, 128
channels) and evaluates both splits before its first iteration, as train.py does.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np

from benchmarks import shared
from nanogpt import ROOT
from nanogpt.config import PositiveInt, load
from nanogpt.errors import UserError, run_program

RUN = (
    "config/train_shakespeare_char.py --device=cpu --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)


@dataclass(frozen=True)
class Config:
    dataset: str = "shakespeare_char"  # prepared dataset, as in train.py
    times: PositiveInt = 5  # repetitions of each measurement


def main(config: Config) -> None:
    """Run the benchmark and print it. Raise UserError if train.py does not print an awaited line."""
    with tempfile.TemporaryDirectory() as out:
        run = [*RUN.split(), f"--dataset={config.dataset}", f"--out_dir={out}/run", "--overwrite"]
        waits = {  # name: arguments of Python, and prefix of the awaited line
            "`import torch`": (["-c", "import torch; print('done')"], "done"),
            "the first step": (["train.py", *run], "iter 0:"),
            "`--help`": (["train.py", "--help"], "Options"),
            "an unknown option": (["train.py", "--learning_rat=1"], "error:"),
        }
        took_s: dict[str, list[float]] = {what: [] for what in waits}
        for _ in range(config.times):  # in turn
            for what, (arguments, awaited) in waits.items():
                took_s[what].append(seconds_until(awaited, arguments))
    torch_s = float(np.median(took_s["`import torch`"]))
    rows = [
        [what, f"{np.median(took):.2f}", f"{max(took):.2f}", f"{np.median(took) / torch_s:.2f}"]
        for what, took in took_s.items()
    ]
    title = f"Start-up of `python train.py`, {config.times} repetitions each, interleaved"
    shared.show(title, ["", "median, s", "maximum, s", "relative to import torch"], rows)


def seconds_until(awaited: str, arguments: list[str]) -> float:
    """Return the seconds until Python prints a line starting with `awaited`, on either stream; kill it."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # stdout to a pipe is block-buffered
    said: list[str] = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            took_s = time.perf_counter() - started
            said.append(line)
            if line.startswith(awaited):
                process.kill()
                return took_s
    raise UserError(f"{' '.join(command)} did not print {awaited!r}, but:\n{''.join(said)}")


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
