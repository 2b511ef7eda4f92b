"""Time what a user waits for: the first step of a run, --help, and the answer to a wrong option.

    python -m benchmarks.startup --dataset=data/shakespeare_char

Each is a fresh `python train.py ...`. The run is that of the preset for the CPU (4 layers, 128
channels) and evaluates both splits before its first step, as train.py does.
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
    dataset: str = "shakespeare_char"  # a prepared one, as train.py takes it
    times: PositiveInt = 5  # how often each is measured


def main(config: Config) -> None:
    """Measure and print. Raises UserError if train.py does not say what is waited for."""
    with tempfile.TemporaryDirectory() as out:
        run = [*RUN.split(), f"--dataset={config.dataset}", f"--out_dir={out}/run", "--overwrite"]
        waits = {  # what: arguments of Python, and how the awaited line begins
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
    title = f"From typing `python train.py` to the answer, {config.times} times each, in turn"
    shared.show(title, ["", "median, s", "maximum, s", "in multiples of import torch"], rows)


def seconds_until(awaited: str, arguments: list[str]) -> float:
    """Start Python and wait for a line that begins so, on either output; then kill it."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # a pipe would hold lines back
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
    raise UserError(f"{' '.join(command)} never said {awaited!r} but:\n{''.join(said)}")


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
