"""Time the data loader on a file of 1 GB, and watch its memory.

    python -m benchmarks.data_loading

Draws batches of 12 windows of 64 and of 1,024 tokens in the order of training. The file was just
written, so it lies in the system's cache: what is timed is the loader, not the disk. The share of a
training step is that of the preset for the CPU (4 layers, 128 channels). Reads /proc, so Linux only.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import bench
from benchmarks import table
from nanogpt import data, runtime
from nanogpt.config import Positive, load
from nanogpt.errors import run_program

VOCAB_SIZE = 65  # of the model whose step is the measure
CPU_PRESET = bench.Config(
    n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, device="cpu", steps=100
)


@dataclass(frozen=True)
class Config:
    megabytes: Positive = 1000  # of the token file
    batches: Positive = 10_000  # to draw of each size
    settle: Positive = 100  # batches before memory is watched


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_tokens(Path(folder) / "train.bin", config.megabytes)
        drawn = {block_size: draw(tokens, block_size, config) for block_size in (64, 1024)}
        step_s = training_step(tokens)
    rows = []
    for block_size, (took_s, growth) in drawn.items():
        low, median, high = np.percentile(took_s, [10, 50, 90]) * 1e6
        share = f"{took_s.mean() / step_s:.2%} (goal: below 2 %)" if block_size == 64 else ""
        memory = f"{growth / 1e6:.1f} (goal: below 50)"
        rows.append([f"12 x {block_size}", f"{median:.0f}", f"{low:.0f} to {high:.0f}", memory, share])
    header = ["batch", "median, µs", "10th to 90th percentile, µs", "growth of memory, MB"]
    title = f"{config.batches:,} batches from {config.megabytes:,} MB of tokens"
    table.show(title, [*header, f"share of a step of {step_s * 1e3:.1f} ms"], rows)


def write_tokens(path: Path, megabytes: int) -> data.Tokens:
    """A file of random tokens, uint16."""
    random = np.random.default_rng(1337)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(random.integers(VOCAB_SIZE, size=500_000, dtype=np.uint16).astype("<u2").tobytes())
    return data.Tokens([data.TokenFile(path, np.dtype("<u2"), 0, megabytes * 500_000)], VOCAB_SIZE)


def draw(tokens: data.Tokens, block_size: int, config: Config) -> tuple[np.ndarray, int]:
    """The seconds of each batch, and by how many bytes resident memory grew after the first ones."""
    batches = data.TrainBatches(tokens, block_size, 12, 1, 1337, torch.device("cpu"))
    took_s, memory = [], []
    for step in range(config.settle + config.batches):
        started = time.perf_counter()
        for _ in batches.step(step):
            pass
        took_s.append(time.perf_counter() - started)
        memory.append(resident())
    return np.array(took_s[config.settle :]), max(memory[config.settle :]) - memory[config.settle]


def resident() -> int:
    """Bytes of this process that are in memory, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def training_step(tokens: data.Tokens) -> float:
    """Seconds of a training step of the CPU preset."""
    trial = bench.Bench(CPU_PRESET, runtime.setup(CPU_PRESET.device, CPU_PRESET.dtype, 32), tokens)
    took_s = [trial.step()[0] for _ in range(CPU_PRESET.warmup_steps + CPU_PRESET.steps)]
    return float(np.median(took_s[CPU_PRESET.warmup_steps :]))


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
