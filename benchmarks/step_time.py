"""Compare the time per iteration with nanoGPT's, on the CPU.

    python -m benchmarks.step_time path/to/nanoGPT

The checkout needs a prepared data/shakespeare_char. Both train.py run unmodified, each in its own process,
with the options that nanoGPT's README gives for a laptop: 4 layers, 4 heads, 128 channels, 12 sequences of
64 characters, no dropout, nanoGPT's GELU. They alternate in blocks of iterations, so that other load on the
machine affects both equally; each ratio compares two adjacent blocks.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import shared
from nanogpt import ROOT
from nanogpt.config import PositiveInt, load_with_arguments
from nanogpt.errors import UserError, run_program

SHAPE = (
    "--device=cpu --dtype=float32 --compile=False --dropout=0.0 --gradient_accumulation_steps=1 "
    "--batch_size=12 --block_size=64 --n_layer=4 --n_head=4 --n_embd=128 --learning_rate=1e-3 "
    "--min_lr=1e-4 --beta2=0.99 --warmup_iters=100 --eval_iters=1 --eval_interval=1000000 --log_interval=1"
)


@dataclass(frozen=True)
class Config:
    blocks: PositiveInt = 10  # blocks per side
    iterations: PositiveInt = 100  # timed iterations per block
    settle: PositiveInt = 10  # untimed iterations before each block


class Side:
    """A train.py running in its own process; see watched.py."""

    def __init__(self, program: Path, *options: str):
        self.program = program
        watcher = Path(__file__).with_name("watched.py")
        command = [sys.executable, str(watcher), "iterations", str(program), *SHAPE.split(), *options]
        self.process = subprocess.Popen(
            command, cwd=program.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, iterations: int) -> list[float]:
        """Run the next `iterations`; return the seconds of each."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # the process has exited; readline returns ""
            print(iterations, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(f"{self.program} exited with {self.process.wait()}; see above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def main(config: Config, arguments: list[str]) -> None:
    """Run the benchmark and print it. Raise UserError if the checkout is invalid or a side fails."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "train.py").is_file():
        raise UserError("expected one nanoGPT checkout: python -m benchmarks.step_time path/to/nanoGPT")
    theirs = Path(arguments[0]).resolve()
    dataset = theirs / "data" / "shakespeare_char"
    if not (dataset / "train.bin").is_file():
        raise UserError(f"{dataset} is not prepared: run its prepare.py")
    with tempfile.TemporaryDirectory() as out:
        sides = {
            "nanoGPT": Side(theirs / "train.py", "--dataset=shakespeare_char", f"--out_dir={out}/theirs"),
            "ours": Side(
                ROOT / "train.py", f"--dataset={dataset}", "--activation=gelu", f"--out_dir={out}/ours"
            ),
        }
        blocks: dict[str, list[list[float]]] = {name: [] for name in sides}
        for number in range(config.blocks):
            for name in sorted(sides, reverse=bool(number % 2)):  # ABBA order: neither side is always first
                took = sides[name].run(config.settle + config.iterations)[config.settle :]
                blocks[name].append(took)
        for side in sides.values():
            side.close()
    report(config, {name: np.array(took) * 1e3 for name, took in blocks.items()})


def report(config: Config, took_ms: dict[str, np.ndarray]) -> None:
    """Print the table; `took_ms`: array (blocks, iterations) per side."""
    medians = {name: np.median(took, axis=1) for name, took in took_ms.items()}
    ratios = medians["ours"] / medians["nanoGPT"]
    rows = []
    for name, took in took_ms.items():
        low, median, high = np.percentile(took, [10, 50, 90])
        rows.append([name, f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{12 * 64 / median * 1e3:,.0f}"])
    title = f"Time per training iteration, {config.blocks} x {config.iterations} per side, alternating"
    shared.show(title, ["", "median, ms", "10th to 90th percentile, ms", "tokens/s"], rows)
    print(f"\nours / nanoGPT, per pair of blocks: {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"median {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")


if __name__ == "__main__":
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
