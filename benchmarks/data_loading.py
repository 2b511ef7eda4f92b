"""Time the data loader on a file of 1 GB, and watch its memory.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --megabytes=4000 --shards=20     # 4 GB in shards as llm.c's
    python -m benchmarks.data_loading --terabytes=10                   # on paper: sparse files of 200 MB

Draws batches of 12 windows of 64 and of 1,024 tokens in the order of training. The file was just
written, so it lies in the system's cache: what is timed is the loader, not the disk. The share of a
training step is that of the preset for the CPU (4 layers, 128 channels). Reads /proc, so Linux only.
"""

import json
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
from nanogpt import data, runtime, tokenizer
from nanogpt.config import Count, Positive, load
from nanogpt.errors import run_program
from nanogpt.prepare import shards

VOCAB_SIZE = 65  # of the model whose step is the measure
CPU_PRESET = bench.Config(
    n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, device="cpu", steps=100
)


@dataclass(frozen=True)
class Config:
    megabytes: Positive = 1000  # of the token files
    shards: Positive = 1  # how many files
    terabytes: Count = 0  # instead: open so many in sparse shards, which hold nothing
    batches: Positive = 10_000  # to draw of each size
    settle: Positive = 100  # batches before memory is watched


def main(config: Config) -> None:
    if config.terabytes:
        with tempfile.TemporaryDirectory() as folder:
            on_paper(Path(folder), config)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_tokens(Path(folder), config.megabytes, config.shards)
        drawn = {block_size: draw(tokens, block_size, config) for block_size in (64, 1024)}
        step_s = training_step(tokens)
    rows = []
    for block_size, (took_s, growth) in drawn.items():
        low, median, high = np.percentile(took_s, [10, 50, 90]) * 1e6
        share = f"{took_s.mean() / step_s:.2%} (goal: below 2 %)" if block_size == 64 else ""
        memory = f"{growth / 1e6:.1f} (goal: below 50)"
        rows.append([f"12 x {block_size}", f"{median:.0f}", f"{low:.0f} to {high:.0f}", memory, share])
    header = ["batch", "median, µs", "10th to 90th percentile, µs", "growth of memory, MB"]
    title = f"{config.batches:,} batches from {config.megabytes:,} MB of tokens in {config.shards} files"
    table.show(title, [*header, f"share of a step of {step_s * 1e3:.1f} ms"], rows)


def write_tokens(folder: Path, megabytes: int, count: int) -> data.Tokens:
    """Random tokens, uint16, in so many shards of llm.c's."""
    random = np.random.default_rng(1337)
    for number, part in enumerate(np.array_split(np.arange(megabytes), count)):
        with (folder / f"tokens_train_{number:06}.bin").open("wb") as file:
            file.write(shards.header(len(part) * 500_000))
            for _ in part:
                ids = random.integers(VOCAB_SIZE, size=500_000, dtype=np.uint16)
                file.write(ids.astype("<u2").tobytes())
    paths = data.split_files(folder, "train")
    return data.Tokens(data.open_split(paths, np.dtype("<u2")), VOCAB_SIZE)


SHARD_TOKENS = 100_000_000  # llm.c's


def on_paper(folder: Path, config: Config) -> None:
    """Open a folder of sparse shards listed in meta.json, draw batches all over them, and print what that
    takes; the text is all zeros, and reading it costs no disk."""
    count = config.terabytes * 10**12 // (2 * SHARD_TOKENS)
    names = [f"tokens_train_{number:06}.bin" for number in range(count)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)
    (folder / "val.bin").write_bytes(bytes(1 << 20))
    text = '{"format": "nanogpt-tokenizer-1", "type": "gpt2"}'
    meta = {
        "format": data.FORMAT,
        "dtype": "uint16",
        "tokenizer": {"sha256": tokenizer.identify(text).sha256},
        "splits": {"train": {"files": [{"name": name, "tokens": SHARD_TOKENS} for name in names]}},
    }
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    before, started = resident(), time.perf_counter()
    tokens = data.load(folder).train
    opened_s, opened = time.perf_counter() - started, resident() - before
    took_s, growth = draw(tokens, 1024, config)
    windows = (len(tokens) - 1) // 1024
    rows = [
        ["shards, tokens, windows of 1,024", f"{count:,}; {len(tokens):,}; {windows:,}"],
        ["to open", f"{opened_s:.2f} s, {opened / 1e6:.0f} MB of memory"],
        [f"{config.batches:,} batches of 12 x 1024", f"median {np.median(took_s) * 1e3:.2f} ms"],
        ["growth of memory meanwhile", f"{growth / 1e6:.1f} MB"],
        ["files open at the end", f"{len(os.listdir('/proc/self/fd'))}"],
    ]
    table.show(f"{config.terabytes} TB on paper", ["what", "measured"], rows)


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
