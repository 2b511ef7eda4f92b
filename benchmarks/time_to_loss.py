"""How long until a validation loss: nanoGPT and ours, from the start of the process, in turn.

    python -m benchmarks.time_to_loss path/to/nanoGPT
    python -m benchmarks.time_to_loss path/to/nanoGPT --target=1.6 --ours="config/x.py --max_iters=500"

The checkout needs its data/shakespeare_char prepared, or another folder of its data/ (--dataset), which both
sides read. Both train.py run as they are, one after the
other, with everything that they do: imports, evaluations, checkpoints. A copy of each checkpoint is
kept with its time, and scored afterwards on the whole validation split, in windows of the model's own
block_size, both by the same code in float32. Neither program's own estimate of its loss is used.
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
from nanogpt.config import NonNegativeFloat, PositiveInt, read
from nanogpt.data import loader
from nanogpt.errors import UserError, run_program

# What nanoGPT's README gives for a laptop. It ends at 1.905 (mean of seeds), which it prints as 1.89.
THEIRS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)


@dataclass(frozen=True)
class Config:
    dataset: str = "shakespeare_char"  # a folder of the checkout's data/
    target: NonNegativeFloat = 1.88  # the validation loss to reach
    seeds: PositiveInt = 3  # runs of each side
    ours: str = "config/train_shakespeare_char_cpu.py"  # preset and options of our train.py
    theirs: str = THEIRS  # and of nanoGPT's


@dataclass(frozen=True)
class Run:
    total_s: float  # from start to end
    reached_s: float | None  # when the first checkpoint at or below the target was complete
    best: float  # the lowest loss of its checkpoints


def main(config: Config, arguments: list[str]) -> None:
    """Run, score and print. Raises UserError if the checkout is not one, or a side fails."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "train.py").is_file():
        raise UserError("name one checkout of nanoGPT: python -m benchmarks.time_to_loss path/to/nanoGPT")
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
    """One run of `program`; UserError if it fails."""
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
            raise UserError(f"{program} ended with {ended.returncode}; see above")
        losses = {float(copy.name): exact_loss(copy, val) for copy in copies.iterdir()}
    reached = [at for at, loss in losses.items() if loss <= target]
    return Run(total_s, min(reached, default=None), min(losses.values()))


def report(config: Config, found: dict[str, list[Run]]) -> None:
    """Print the table. A run that never came down to the target counts with its whole time, as a bound."""
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
    title = f"From the start of the process to a validation loss of {config.target:g}"
    shared.show(title, ["", "median", "from, to", "lowest loss, mean", "reached it", "whole run"], rows)
    ratios = times["nanoGPT"] / times["ours"]
    print(f"\nnanoGPT / ours, seed by seed: {' '.join(f'{ratio:.1f}' for ratio in ratios)}")
    print("a run that did not reach it counts with all of its time")


def command_line(argv: list[str]) -> tuple[Config, list[str]]:
    options = read(Config, argv, arguments=True)
    return Config(**options.values), options.arguments


if __name__ == "__main__":
    run_program(lambda: main(*command_line(sys.argv[1:])))
