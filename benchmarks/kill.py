"""Kill a run at random moments, resume it each time, and compare it with a run that nobody touched.

    python -m benchmarks.kill                     # 30 kills
    python -m benchmarks.kill --kills=200 --seed=7

The run saves at every step, so many kills fall into a save. After each kill (SIGKILL, as a crash or
the kernel's out-of-memory killer would do it) every checkpoint that can be seen must be whole, and
none that was announced may be lost. In the end weights, optimizer state and logged rows must be those
of the unbroken run, bit for bit. A power cut, which also loses what the system had not yet written to
the disk, is not played here. Run it from the repository root, on a system that can fork: each process
is forked from one that has imported train.py already.
"""

import contextlib
import multiprocessing
import random
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import train
from benchmarks import table
from nanogpt import checkpoint, data, files, metrics, tokenizer
from nanogpt.config import Count, Positive, load
from nanogpt.errors import UserError, run_program

CLOCK = {"step_s", "tokens_per_s", "elapsed_s"}  # what a row and state.json hold of it: never twice the same


@dataclass(frozen=True)
class Config:
    kills: Positive = 30  # how often
    steps_per_kill: Positive = 4  # steps of the run for each of them
    seed: Count = 1337  # of the moments


@dataclass
class Result:
    steps: int  # of the run
    kills: int = 0
    before_first: int = 0  # kills that found no checkpoint, because none had been written
    during_save: int = 0  # kills that left a half-built or half-deleted checkpoint behind
    newest: int = 0  # the step of the newest checkpoint
    problems: list[str] = field(default_factory=list)  # empty: all is as it should be


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), config)
    row = [result.kills, result.during_save, result.before_first, result.steps, len(result.problems)]
    header = ["kills", "in a save", "before the first checkpoint", "steps of the run", "problems"]
    table.show("A run killed at random moments, and resumed", header, [[str(cell) for cell in row]])
    if result.problems:
        sys.exit("\n".join(["", *result.problems]))
    print("\nequal to the unbroken run, bit for bit")


def campaign(folder: Path, config: Config) -> Result:
    """Train in `folder` once unbroken and once with kills, and compare."""
    write_dataset(folder / "data")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    warm_up = context.Process(target=int)  # the first process waits for the import of train.py
    warm_up.start()
    warm_up.join()
    result = Result(steps=config.kills * config.steps_per_kill)
    startup_s, step_s = unbroken(context, options(folder, "unbroken", result.steps))
    killed = options(folder, "killed", result.steps)
    out = Path(killed.out_dir)
    moments = random.Random(config.seed)
    while result.kills < config.kills:
        process, began = start(context, killed), time.monotonic()
        ahead = moments.randrange(config.steps_per_kill) if result.kills else 0
        if ahead:  # let it save that often, and on to somewhere in the next two steps
            wait_for(out, result.newest + 1, process)
            startup_s = time.monotonic() - began
            wait_for(out, result.newest + ahead, process)
        process.join(moments.uniform(0.0, 2 * step_s if ahead else startup_s))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        result.kills += 1
        inspect(out, process, result)
    finish(start(context, killed), killed)
    result.problems += differences(folder / "unbroken", out)
    return result


def options(folder: Path, name: str, steps: int) -> train.Config:
    """A run of a tiny model whose every part is at work: dropout, accumulation, clipping, evaluation."""
    return train.Config(
        dataset=str(folder / "data"),
        out_dir=str(folder / name),
        init_from="auto",
        max_iters=steps,
        eval_interval=5,
        eval_iters=2,
        save_interval=1,
        gradient_accumulation_steps=4,
        batch_size=2,
        block_size=16,
        n_layer=2,
        n_head=2,
        n_embd=32,
        dropout=0.1,
        warmup_iters=10,
        device="cpu",
    )


def write_dataset(folder: Path) -> None:
    """The bytes of this file as a text to learn."""
    folder.mkdir(parents=True)
    ids = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype("<u2")
    (folder / "train.bin").write_bytes(ids[:-1000].tobytes())
    (folder / "val.bin").write_bytes(ids[-1000:].tobytes())
    text = tokenizer.to_text(tokenizer.ByteTokenizer())
    files.write_text(folder / "tokenizer.json", text)
    about = {"format": data.FORMAT, "tokenizer": {"sha256": tokenizer.identify(text).sha256}}
    files.write_json(folder / "meta.json", about)


def start(context: ForkServerContext, options: train.Config) -> ForkServerProcess:
    process = context.Process(target=run, args=(options,))
    process.start()
    return process


def run(options: train.Config) -> None:
    """In the new process: train.py with its output in a file beside the run folder."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill would leave behind
    with (
        open(f"{options.out_dir}.log", "a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        run_program(lambda: train.main(options))


def finish(process: ForkServerProcess, options: train.Config) -> None:
    process.join()
    said = Path(f"{options.out_dir}.log").read_text(encoding="utf-8")
    assert process.exitcode == 0, f"the run left with {process.exitcode}:\n{said}"


def unbroken(context: ForkServerContext, options: train.Config) -> tuple[float, float]:
    """Run to the end; returns the seconds until the first checkpoint, and those of each step after it."""
    process, began = start(context, options), time.monotonic()
    wait_for(Path(options.out_dir), 1, process)
    first = time.monotonic()
    finish(process, options)
    return first - began, (time.monotonic() - first) / options.max_iters


def wait_for(out: Path, step: int, process: ForkServerProcess) -> None:
    """Wait until there is a checkpoint of this step or a later one, or the process has ended."""
    while process.exitcode is None and not any(int(path.name[5:]) >= step for path in checkpoint.steps(out)):
        time.sleep(0.002)


# ----------------------------------------------------------------------------- judgement


def inspect(out: Path, process: ForkServerProcess, result: Result) -> None:
    """Add to `result` what the killed process has left in the run folder."""
    steps = []
    for path in checkpoint.steps(out):
        try:
            steps.append(checkpoint.verify(path).iter_num)
        except UserError as error:
            result.problems.append(f"kill {result.kills}: {error}")
    said = re.findall(r"saved \S+step-(\d+)", Path(f"{out}.log").read_text(encoding="utf-8"))
    saved = max([result.newest, *map(int, said)])
    if max(steps, default=0) < saved:
        result.problems.append(f"kill {result.kills}: step {saved} was saved, {steps} are there")
    result.newest = max(steps, default=0)
    result.before_first += not steps
    result.during_save += any(out.glob(f"step-*{files.TEMPORARY}{process.pid}"))


def differences(unbroken: Path, killed: Path) -> list[str]:
    """In which ways two finished runs are not the same, the clock's numbers left out."""
    found = []
    if rows(unbroken) != rows(killed):
        found.append("the logged rows differ")
    names = [[path.name for path in checkpoint.steps(run)] for run in (unbroken, killed)]
    if names[0] != names[1]:
        return [*found, f"the checkpoints differ: {names[0]}, {names[1]}"]
    for name in names[0]:
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, other = load_file(unbroken / name / file), load_file(killed / name / file)
            unequal = [key for key in one | other if not torch.equal(one[key], other[key])]
            if unequal:
                found.append(f"{name}/{file}: {len(unequal)} of {len(one)} tensors differ")
        if progress(unbroken / name) != progress(killed / name):
            found.append(f"{name}/state.json differs")
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row.keys() - CLOCK} for row in metrics.read(run)]


def progress(step: Path) -> dict[str, Any]:
    state = files.read_json(step / "state.json")
    return {key: state[key] for key in state.keys() - CLOCK - {"options"}}


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
