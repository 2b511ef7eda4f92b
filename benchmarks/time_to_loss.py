"""Compare the time to a validation loss with nanoGPT's, measured from process start.

    python -m benchmarks.time_to_loss path/to/nanoGPT
    python -m benchmarks.time_to_loss path/to/nanoGPT --target=1.6 --ours="config/x.py --max_iters=500"

The checkout needs a prepared data/shakespeare_char, or another folder of its data/ (--dataset), which both
sides read. Both train.py run unmodified, one after the other, including imports, evaluations and checkpoints.
Each checkpoint is copied with a timestamp and scored afterwards on the whole validation split, in sequences
of the model's block_size, with the same float32 code for both. The programs' own loss estimates are not used.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import shared
from benchmarks.shared import exact_loss
from nanogpt import ROOT
from nanogpt.config import NonNegativeFloat, PositiveInt, load_with_arguments
from nanogpt.data import loader
from nanogpt.errors import UserError, run_program

# Options that nanoGPT's README gives for a laptop. Exact final loss: 1.905 (mean over seeds); it prints 1.89.
THEIRS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)


@dataclass(frozen=True)
class Config:
    dataset: str = "shakespeare_char"  # folder in the checkout's data/
    target: NonNegativeFloat = 1.88  # validation loss to reach, in nats/token
    seeds: PositiveInt = 3  # number of seeds (runs per side)
    ours: str = "config/train_shakespeare_char_cpu.py"  # preset and options of our train.py
    theirs: str = THEIRS  # preset and options of nanoGPT's train.py


@dataclass(frozen=True)
class Run:
    total_s: float  # from process start to exit
    reached_s: float | None  # completion time of the first checkpoint at or below the target
    best: float  # lowest loss over its checkpoints


def main(config: Config, arguments: list[str]) -> None:
    """Run, score and print. Raise UserError if the checkout is invalid or a side fails."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "train.py").is_file():
        raise UserError("expected one nanoGPT checkout: python -m benchmarks.time_to_loss path/to/nanoGPT")
    theirs = Path(arguments[0]).resolve()
    folder = theirs / "data" / config.dataset
    if not (folder / "train.bin").is_file():
        raise UserError(f"{folder} is not prepared: run its prepare.py")
    val = loader.load(folder).val
    found: dict[str, list[Run]] = {"nanoGPT": [], "ours": []}
    for seed in range(1337, 1337 + config.seeds):
        sides = {
            "nanoGPT": (theirs / "train.py", [*config.theirs.split(), f"--dataset={config.dataset}"]),
            "ours": (ROOT / "train.py", [*config.ours.split(), f"--dataset={folder}", f"--seed={seed}"]),
        }
        for name, (program, options) in sides.items():
            found[name].append(run(program, options, seed, val, config.target))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    report(config, found)


def run(program: Path, options: list[str], seed: int, val: loader.Tokens, target: float) -> Run:
    """Run `program` once and score its checkpoints. Raise UserError if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        copies = Path(scratch, "copies")
        copies.mkdir()
        watcher = Path(__file__).with_name("watched.py")
        started = time.time()
        watch = [sys.executable, str(watcher), "checkpoints", str(started), str(copies), str(seed)]
        ended = subprocess.run(
            [*watch, str(program), *options, f"--out_dir={scratch}/out"],
            cwd=program.parent,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        total_s = time.time() - started
        if ended.returncode:
            raise UserError(f"{program} exited with {ended.returncode}; see above")
        losses = {float(copy.name): exact_loss(copy, val) for copy in copies.iterdir()}
    reached = [at for at, loss in losses.items() if loss <= target]
    return Run(total_s, min(reached, default=None), min(losses.values()))


def report(config: Config, found: dict[str, list[Run]]) -> None:
    """Print the table. A run that does not reach the target counts with its total time, a lower bound."""
    rows, times = [], {}
    for name, runs in found.items():
        took = np.array([run.total_s if run.reached_s is None else run.reached_s for run in runs])
        short = sum(run.reached_s is None for run in runs)
        losses = np.array([run.best for run in runs])
        times[name] = took
        rows.append(
            [
                name,
                f"{np.median(took):.1f} s",
                f"{took.min():.1f} to {took.max():.1f} s",
                f"{losses.mean():.4f} ({losses.min():.4f} to {losses.max():.4f})",
                f"{len(runs) - short} of {len(runs)}",
                f"{np.median([run.total_s for run in runs]):.1f} s",
            ]
        )
    title = f"Time from process start to a validation loss of {config.target:g}"
    shared.show(title, ["", "median", "from, to", "lowest loss, mean", "reached", "whole run"], rows)
    ratios = times["nanoGPT"] / times["ours"]
    print(f"\nnanoGPT / ours, per seed: {' '.join(f'{ratio:.1f}' for ratio in ratios)}")
    print("a run that did not reach the target counts with its total time")


if __name__ == "__main__":
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
