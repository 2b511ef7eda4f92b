"""Kill a run at random times, resume it each time, and compare it with an uninterrupted run.

    python -m benchmarks.kill                     # 30 kills
    python -m benchmarks.kill --kills=200 --seed=7
    python -m benchmarks.kill --processes=2 --kills=20 --hangs=10

The run saves at every iteration, and many kills hit a save. After each SIGKILL (as by a crash or the OOM
killer), every visible checkpoint must be complete, and no checkpoint reported as saved may be missing. At
the end, weights, optimizer state and logged rows must be bitwise identical to the uninterrupted run. Power
loss, which also drops unflushed file system caches, is not simulated. Run it from the repository root on a
system with fork: processes are forked from one that has already imported train.py.

With --processes=2 torchrun starts two ranks. A random one receives SIGKILL, or SIGSTOP to simulate a hang.
The other rank must report which one is lost, torchrun must restart both, and `--init_from=auto` must resume
to bitwise identical results. Linux only.
"""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import train
from benchmarks import shared
from nanogpt import ROOT, checkpoint, files, metrics
from nanogpt.checkpoint import reader
from nanogpt.config import NonNegativeInt, PositiveInt, Range, Seconds, load
from nanogpt.data import loader
from nanogpt.errors import UserError, run_program
from nanogpt.tokenizer import tokenizer, vocabulary

CLOCK = {
    "step_s",
    "tokens_per_s",
    "elapsed_s",
    "clock_s",
    "evaluation_s",
    "peak_memory_bytes",
}  # time-dependent keys of rows and state.json


@dataclass(frozen=True)
class Config:
    kills: NonNegativeInt = 30  # number of SIGKILLs
    steps_per_kill: PositiveInt = 4  # iterations per kill or hang; with two processes use about 40
    seed: NonNegativeInt = 1337  # seed of the kill times
    # two processes
    processes: Annotated[int, Range(1, 2)] = 1  # number of processes
    hangs: NonNegativeInt = 0  # number of SIGSTOPs
    timeout_s: Seconds = 4.0  # --hang_timeout_s of the run, in seconds
    patience_s: PositiveInt = 60  # seconds to wait for the next line or checkpoint


@dataclass
class Result:
    steps: int  # iterations of the run
    kills: int = 0
    before_first: int = 0  # kills before the first checkpoint was written
    during_save: int = 0  # kills that left a partially written or deleted checkpoint
    newest: int = 0  # iteration of the newest checkpoint
    problems: list[str] = field(default_factory=list)  # empty: no errors

    def show(self) -> None:
        row = [self.kills, self.during_save, self.before_first, self.steps, len(self.problems)]
        header = ["kills", "during a save", "before the first checkpoint", "iterations", "problems"]
        shared.show("A run killed at random times and resumed", header, [[str(cell) for cell in row]])


def main(config: Config) -> None:
    if config.hangs and config.processes == 1:
        raise UserError("--hangs requires --processes=2: a hanging single process is not detected")
    with tempfile.TemporaryDirectory() as folder:
        result = (campaign if config.processes == 1 else campaign_of_two)(Path(folder), config)
    result.show()
    if result.problems:
        sys.exit("\n".join(["", *result.problems]))
    print("\nbitwise identical to the uninterrupted run")


def campaign(folder: Path, config: Config) -> Result:
    """Train in `folder` once uninterrupted and once with kills, and compare."""
    write_dataset(folder / "data")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    warm_up = context.Process(target=int)  # waits until the fork server has imported train.py
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
        if ahead:  # let it save `ahead` checkpoints, then kill within the next two iterations
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
    """Return a tiny run that uses dropout, gradient accumulation, clipping and evaluation."""
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
    """Write a byte-level dataset of this source file."""
    folder.mkdir(parents=True)
    ids = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype("<u2")
    (folder / "train.bin").write_bytes(ids[:-1000].tobytes())
    (folder / "val.bin").write_bytes(ids[-1000:].tobytes())
    text = tokenizer.to_text(tokenizer.ByteTokenizer())
    files.write_text(folder / "tokenizer.json", text)
    about = {"format": loader.FORMAT, "tokenizer": {"sha256": vocabulary.identify(text).sha256}}
    files.write_json(folder / "meta.json", about)


def start(context: ForkServerContext, options: train.Config) -> ForkServerProcess:
    process = context.Process(target=run, args=(options,))
    process.start()
    return process


def run(options: train.Config) -> None:
    """Run train.py in the new process, with output to a file beside the run folder."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's default is a system semaphore, leaked by a kill
    with (
        open(f"{options.out_dir}.log", "a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        run_program(lambda: train.main(options))


def finish(process: ForkServerProcess, options: train.Config) -> None:
    process.join()
    said = Path(f"{options.out_dir}.log").read_text(encoding="utf-8")
    assert process.exitcode == 0, f"the run exited with {process.exitcode}:\n{said}"


def unbroken(context: ForkServerContext, options: train.Config) -> tuple[float, float]:
    """Run to the end; return the seconds to the first checkpoint, and the seconds per iteration after it."""
    process, began = start(context, options), time.monotonic()
    wait_for(Path(options.out_dir), 1, process)
    first = time.monotonic()
    finish(process, options)
    return first - began, (time.monotonic() - first) / options.max_iters


def wait_for(out: Path, step: int, process: ForkServerProcess) -> None:
    """Wait for a checkpoint of iteration `step` or later, or until the process has exited."""
    while process.exitcode is None and not any(
        int(path.name[5:]) >= step for path in checkpoint.step_folders(out)
    ):
        time.sleep(0.002)


# ----------------------------------------------------------------------------- checks


def inspect(out: Path, process: ForkServerProcess, result: Result) -> None:
    """Check the run folder of the killed process, and update `result` in place."""
    steps = []
    for path in checkpoint.step_folders(out):
        try:
            steps.append(reader.verify(path).iter_num)
        except UserError as error:
            result.problems.append(f"kill {result.kills}: {error}")
    said = re.findall(r"saved \S+step-(\d+)", Path(f"{out}.log").read_text(encoding="utf-8"))
    saved = max([result.newest, *map(int, said)])
    if max(steps, default=0) < saved:
        result.problems.append(f"kill {result.kills}: step {saved} was saved, but only {steps} exist")
    result.newest = max(steps, default=0)
    result.before_first += not steps
    result.during_save += any(out.glob(f"step-*{files.TEMPORARY}{process.pid}"))


def differences(unbroken: Path, killed: Path) -> list[str]:
    """Return the differences between two finished runs, ignoring time-dependent values."""
    found = []
    if rows(unbroken) != rows(killed):
        found.append("the logged rows differ")
    names = [[path.name for path in checkpoint.step_folders(run)] for run in (unbroken, killed)]
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
    """Return the rows of a run without times; rows of event "ranks" hold nothing else."""
    found = (row for row in metrics.read(run) if row["event"] != "ranks")
    return [{key: row[key] for key in row.keys() - CLOCK} for row in found]


def progress(step: Path) -> dict[str, Any]:
    state = files.read_json(step / "state.json")
    return {key: state[key] for key in state.keys() - CLOCK - {"options"}}


# ----------------------------------------------------------------------------- two processes

RUN = (
    "--init_from=auto --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 --dropout=0.1 "
    "--gradient_accumulation_steps=4 --warmup_iters=10 --eval_interval=20 --eval_iters=2 --save_interval=5 "
    "--device=cpu --compile=False"
)


@dataclass
class ResultOfTwo:
    steps: int  # iterations of the run
    killed: int = 0
    stopped: int = 0
    killed_named: int = 0  # kills after which the survivor reported the right rank
    stopped_named: int = 0
    until_named_s: list[float] = field(default_factory=list)  # seconds from SIGSTOP to the report
    until_step_s: list[float] = field(default_factory=list)  # from SIGKILL to the next new checkpoint
    problems: list[str] = field(default_factory=list)

    def show(self) -> None:
        kills = f"{self.killed_named} of {self.killed}"
        hangs = f"{self.stopped_named} of {self.stopped}"
        row = [kills, hangs, _longest(self.until_step_s), _longest(self.until_named_s), len(self.problems)]
        header = [
            "kills reported",
            "hangs reported",
            "kill to next checkpoint, s",
            "hang to report, s",
            "problems",
        ]
        shared.show(f"Two processes, {self.steps} iterations", header, [[str(cell) for cell in row]])


def _longest(seconds: list[float]) -> str:
    middle = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
    return f"{middle:.1f}, longest {max(seconds):.1f}" if seconds else "-"


def campaign_of_two(folder: Path, config: Config) -> ResultOfTwo:
    """Train in `folder` once uninterrupted and once with faults, and compare."""
    write_dataset(folder / "data")
    moments = random.Random(config.seed)
    faults = ["kill"] * config.kills + ["hang"] * config.hangs
    moments.shuffle(faults)
    result = ResultOfTwo(steps=max(1, len(faults)) * config.steps_per_kill)
    unbroken = Launch(folder, "unbroken", result.steps, 0, config)
    broken = Launch(folder, "broken", result.steps, len(faults), config)
    try:
        for fault in faults:
            broken.go_on(moments.randrange(config.steps_per_kill // 2))
            time.sleep(moments.uniform(0.0, 0.1))
            strike(broken, fault, moments.randrange(2), result)
        unbroken.finish()
        broken.finish()
    finally:
        unbroken.end()
        broken.end()
    result.problems += differences(unbroken.out, broken.out)
    return result


def strike(run: "Launch", fault: str, rank: int, result: ResultOfTwo) -> None:
    """Kill or stop process `rank`, and wait for the other rank to report it."""
    said, began, pid = len(run.said()), time.monotonic(), run.pids()[rank]
    os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    run.wait(lambda: "lost: " in run.said()[said:], "no rank reported a lost rank")
    took_s = time.monotonic() - began
    named = re.search(r"lost: rank (\d+) has not responded", run.said()[said:])
    right = bool(named) and named[1] == str(rank)
    with contextlib.suppress(ProcessLookupError):  # torchrun waits 30 s for a stopped process
        os.kill(pid, signal.SIGKILL)
    run.wait(lambda: run.pids().get(rank, pid) != pid, "no restarted process")
    run.go_on(0)
    if fault == "kill":
        result.killed, result.killed_named = result.killed + 1, result.killed_named + right
        result.until_step_s.append(time.monotonic() - began)
    else:
        result.stopped, result.stopped_named = result.stopped + 1, result.stopped_named + right
        result.until_named_s.append(took_s)


class Launch:
    """torchrun with two processes of train.py, with output to a file."""

    def __init__(self, folder: Path, name: str, steps: int, restarts: int, config: Config):
        self.out, self.log, self.patience_s = folder / name, folder / f"{name}.log", config.patience_s
        options = [f"--dataset={folder / 'data'}", f"--out_dir={self.out}", f"--max_iters={steps}"]
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts={restarts}"
        options += [*RUN.split(), f"--hang_timeout_s={config.timeout_s}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, *torchrun.split(), "train.py", *options],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def newest(self) -> int:
        found = checkpoint.step_folders(self.out)
        return int(found[0].name[5:]) if found else -1

    def pids(self) -> dict[int, int]:
        """Return the process ids of the training processes, by rank."""
        found = {}
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        for pid in (tasks / "children").read_text(encoding="ascii").split():
            with contextlib.suppress(OSError):
                rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                found |= {int(rank[1]): int(pid)} if rank else {}
        return found

    def go_on(self, steps: int) -> None:
        """Wait until a new checkpoint is saved, then for `steps` more iterations."""
        began = self.newest()
        self.wait(lambda: self.newest() > began, "no new checkpoint")
        began = self.newest()
        self.wait(lambda: self.newest() >= began + steps, "no new checkpoint")

    def wait(self, happened: Callable[[], bool], complaint: str) -> None:
        deadline = time.monotonic() + self.patience_s
        while not happened():
            assert self.process.poll() is None and time.monotonic() < deadline, f"{complaint}:\n{self.said()}"
            time.sleep(0.005)

    def finish(self) -> None:
        code = self.process.wait(timeout=10 * self.patience_s)
        assert code == 0, f"torchrun exited with {code}:\n{self.said()}"

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
