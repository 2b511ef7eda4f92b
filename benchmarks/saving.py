"""How long training waits for a checkpoint: written at once, and in the background.

    python -m benchmarks.saving                    # GPT-2's 124 million parameters with AdamW's state
    python -m benchmarks.saving --n_layer=24 --n_embd=1024 --n_head=16

Both sides take turns on the same model. A wait in the background is the copy; the write follows while the
program sleeps, as long as the write at once takes or a little longer.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import table
from nanogpt.config import Count, Positive, load
from nanogpt.errors import run_program
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import OptimConfig, build
from nanogpt.writer import Writer


@dataclass(frozen=True)
class Config:
    n_layer: Positive = 12
    n_head: Positive = 12
    n_embd: Positive = 768
    vocab_size: Positive = 50304
    rounds: Positive = 3
    device: str = "cpu"
    seed: Count = 1337
    folder: str = ""  # where to write; "": the system's place for temporary files


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = GPT(GPTConfig(vocab_size=config.vocab_size, **shape)).to(config.device)
    state = build(OptimConfig(), model.named_parameters()).state()
    for tensor in state.values():
        tensor.normal_()
    sizes = [t.nbytes for t in [*model.parameters(), *state.values()]]
    waits: dict[bool, list[float]] = {False: [], True: []}  # in the background or not
    writes = []
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        writers = {background: Writer(background) for background in waits}
        for step in range(1, config.rounds + 1):
            for background, writer in writers.items():
                out = Path(folder) / str(background)
                began = time.perf_counter()
                writer.save(out, model, state, {"iter_num": step, "val_loss": None})
                waits[background].append(time.perf_counter() - began)
                writer.wait()
                if background:
                    writes.append(time.perf_counter() - began)
    blocking, copying = statistics.median(waits[False]), statistics.median(waits[True])
    row = [f"{sum(sizes) / 1e9:.2f}", f"{blocking:.2f}", f"{copying:.2f}", f"{copying / blocking:.2f}"]
    row += [f"{statistics.median(writes):.2f}"]
    header = ["GB", "at once, s", "background: training waits, s", "ratio", "background: until complete, s"]
    table.show(f"Saving {model.n_params():,} parameters, median of {config.rounds}", header, [row])


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
