"""What several processes cost and gain on this machine, for docs/results.md.

    python -m benchmarks.processes memory          # GPT-2 (124M) on two processes under each --parallel
    python -m benchmarks.processes evaluation      # on data/shakespeare_char, or --dataset=PATH

The first says how much memory each process has held at most, the second how long an evaluation takes two
processes against one, in turn, each process with one thread. The second takes two minutes and wants a
core for each process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import table
from nanogpt.config import ROOT, Positive, load
from nanogpt.errors import UserError, run_program

GPT2 = (
    "--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --bias=True --device=cpu --compile=False "
    "--batch_size=1 --gradient_accumulation_steps=2 --eval_iters=1 --max_iters=3 --log_interval=1"
)
SMALL = (
    "--n_layer=6 --n_head=6 --n_embd=192 --block_size=256 --device=cpu --compile=False --batch_size=4 "
    "--eval_only=True --dtype=float32"
)


@dataclass(frozen=True)
class Config:
    dataset: str = "shakespeare_char"  # to evaluate on
    windows: Positive = 80  # of 256 tokens, evaluated of each split: some seconds for one process
    processes: Positive = 2  # how many
    times: Positive = 5  # how often each side is measured
    rules: str = "adamw,muon"  # optimizers whose memory is measured
    modes: str = "ddp,fsdp"  # ways to divide


def memory(config: Config) -> None:
    """Three steps of GPT-2 on random tokens."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "random"
        data.mkdir()
        ids = np.random.default_rng(0).integers(50257, size=20_000).astype("<u2")
        ids[:16_000].tofile(data / "train.bin")
        ids[16_000:].tofile(data / "val.bin")
        for rule in config.rules.split(","):
            for mode in config.modes.split(","):
                options = [f"--dataset={data}", f"--out_dir={scratch}/out", "--overwrite=True"]
                options += [*GPT2.split(), f"--parallel={mode}", f"--optimizer={rule}"]
                started, held, losses = time.perf_counter(), {}, []
                with start(config.processes, options) as process:
                    for line, _ in lines(process):
                        losses += [line.split()[3].rstrip(",")] if line.startswith("iter ") else []
                        held |= peaks(process.pid)
                    if process.wait():
                        raise UserError(f"{mode}, {rule}: exit code {process.returncode}")
                took = f"{time.perf_counter() - started:.0f}"
                each = " + ".join(f"{size / 1e9:.2f}" for size in held.values())
                rows.append([rule, mode, each, took, " ".join(losses)])
    title = f"GPT-2 (124M), {config.processes} processes, 3 steps of 2 x 1024 tokens, start and save included"
    table.show(title, ["optimizer", "--parallel", "memory, GB", "s", "losses"], rows)


def evaluation(config: Config) -> None:
    """One process and several, in turn; from the model's being there to the loss."""
    took: dict[int, list[float]] = {1: [], config.processes: []}
    batches = -(-config.windows // 4)  # of SMALL
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(config.times):
            for processes, times in took.items():
                options = [*SMALL.split(), f"--dataset={config.dataset}", f"--out_dir={scratch}/out"]
                options += [f"--eval_iters={batches}"]
                with start(processes, options) as process:
                    at = {line.split(":")[0]: when for line, when in lines(process)}
                if "model" not in at or "step 0" not in at:
                    raise UserError(f"train.py on {processes} processes has not evaluated")
                times.append(at["step 0"] - at["model"])
    ratios = np.array(took[config.processes]) / np.array(took[1])
    rows = [[str(n), f"{np.median(times):.2f}", f"{min(times):.2f}"] for n, times in took.items()]
    table.show("An evaluation", ["processes", "median, s", "least, s"], rows)
    ratio = np.median(took[config.processes]) / np.median(took[1])
    print(f"ratio of the medians: {ratio:.3f}; pair by pair from {ratios.min():.3f} to {ratios.max():.3f}")


def start(processes: int, options: list[str]) -> subprocess.Popen:
    """train.py under torchrun, a thread each; it may be ended with all its processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*run, "train.py", *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def lines(process: subprocess.Popen) -> Iterator[tuple[str, float]]:
    """The lines that a program prints, each with the time when it came."""
    assert process.stdout
    for line in process.stdout:
        yield line, time.perf_counter()


def peaks(pid: int) -> dict[str, int]:
    """The most bytes that each child of a process has held so far (torch itself is 0.3 GB of them)."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split():
        status = Path(f"/proc/{child}/status").read_text(encoding="utf-8")
        if "VmHWM:" in status:  # it is not ending
            found[child] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return found


def program() -> None:
    subjects = {"memory": memory, "evaluation": evaluation}
    if len(sys.argv) < 2 or sys.argv[1] not in subjects:
        raise UserError(f"say what to measure: {' or '.join(subjects)}")
    subjects[sys.argv[1]](load(Config, sys.argv[2:])[0])


if __name__ == "__main__":
    run_program(program)
