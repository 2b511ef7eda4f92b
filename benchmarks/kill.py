"""Kill a run at random moments, resume it each time, and compare it with a run that nobody touched.

    python -m benchmarks.kill                     # 30 kills
    python -m benchmarks.kill --kills=200 --seed=7
    python -m benchmarks.kill --processes=2 --kills=20 --hangs=10

The run saves at every step, so many kills fall into a save. After each kill (SIGKILL, as a crash or
the kernel's out-of-memory killer would do it) every checkpoint that can be seen must be whole, and
none that was announced may be lost. In the end weights, optimizer state and logged rows must be those
of the unbroken run, bit for bit. A power cut, which also loses what the system had not yet written to
the disk, is not played here. Run it from the repository root, on a system that can fork: each process
is forked from one that has imported train.py already.

With --processes=2 torchrun starts two processes. A random one gets SIGKILL, or SIGSTOP, as a hang. The other
one must name the process that is lost, torchrun must start both again, and `--init_from=auto` must go on to
the same bits. On Linux.
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

CLOCK = {"step_s", "tokens_per_s", "elapsed_s"}  # what a row and state.json hold of it: never twice the same


@dataclass(frozen=True)
class Config:
    kills: NonNegativeInt = 30  # how often SIGKILL is sent
    steps_per_kill: PositiveInt = 4  # steps of the run for each kill or hang; with two processes some 40
    seed: NonNegativeInt = 1337  # of the moments
    # two processes
    processes: Annotated[int, Range(1, 2)] = 1  # processes of the run
    hangs: NonNegativeInt = 0  # how often SIGSTOP is sent
    timeout_s: Seconds = 4.0  # --hang_timeout_s of the run
    patience_s: PositiveInt = 60  # seconds to wait for the next line or checkpoint of a run


@dataclass
class Result:
    steps: int  # of the run
    kills: int = 0
    before_first: int = 0  # kills that found no checkpoint, because none had been written
    during_save: int = 0  # kills that left a half-built or half-deleted checkpoint behind
    newest: int = 0  # the step of the newest checkpoint
    problems: list[str] = field(default_factory=list)  # empty: all is as it should be

    def show(self) -> None:
        row = [self.kills, self.during_save, self.before_first, self.steps, len(self.problems)]
        header = ["kills", "in a save", "before the first checkpoint", "steps of the run", "problems"]
        shared.show("A run killed at random moments, and resumed", header, [[str(cell) for cell in row]])


def main(config: Config) -> None:
    if config.hangs and config.processes == 1:
        raise UserError("--hangs needs --processes=2: one process that hangs is ended by nobody")
    with tempfile.TemporaryDirectory() as folder:
        result = (campaign if config.processes == 1 else campaign_of_two)(Path(folder), config)
    result.show()
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
    about = {"format": loader.FORMAT, "tokenizer": {"sha256": vocabulary.identify(text).sha256}}
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
            steps.append(reader.verify(path).iter_num)
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


# ----------------------------------------------------------------------------- two processes

RUN = (
    "--init_from=auto --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 --dropout=0.1 "
    "--gradient_accumulation_steps=4 --warmup_iters=10 --eval_interval=20 --eval_iters=2 --save_interval=5 "
    "--device=cpu --compile=False"
)


@dataclass
class ResultOfTwo:
    steps: int  # of the run
    killed: int = 0
    stopped: int = 0
    killed_named: int = 0  # the line of the survivor has the number of the killed process
    stopped_named: int = 0
    until_named_s: list[float] = field(default_factory=list)  # from SIGSTOP
    until_step_s: list[float] = field(default_factory=list)  # from SIGKILL to the next new checkpoint
    problems: list[str] = field(default_factory=list)

    def show(self) -> None:
        kills = f"{self.killed_named} of {self.killed}"
        hangs = f"{self.stopped_named} of {self.stopped}"
        row = [kills, hangs, _longest(self.until_step_s), _longest(self.until_named_s), len(self.problems)]
        header = [
            "kills named",
            "hangs named",
            "kill to next checkpoint, s",
            "hang to its line, s",
            "problems",
        ]
        shared.show(f"Two processes, {self.steps} steps", header, [[str(cell) for cell in row]])


def _longest(seconds: list[float]) -> str:
    middle = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
    return f"{middle:.1f}, longest {max(seconds):.1f}" if seconds else "-"


def campaign_of_two(folder: Path, config: Config) -> ResultOfTwo:
    """Train in `folder` once unbroken and once with faults, and compare."""
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
    """Kill or stop process `rank`, and wait for the line that names it."""
    said, began, pid = len(run.said()), time.monotonic(), run.pids()[rank]
    os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    run.wait(lambda: "lost: " in run.said()[said:], "no process said that another is lost")
    took_s = time.monotonic() - began
    named = re.search(r"lost: process (\d+) has not answered", run.said()[said:])
    right = bool(named) and named[1] == str(rank)
    with contextlib.suppress(ProcessLookupError):  # torchrun would wait 30 s for one that does not listen
        os.kill(pid, signal.SIGKILL)
    run.wait(lambda: run.pids().get(rank, pid) != pid, "no new process")
    run.go_on(0)
    if fault == "kill":
        result.killed, result.killed_named = result.killed + 1, result.killed_named + right
        result.until_step_s.append(time.monotonic() - began)
    else:
        result.stopped, result.stopped_named = result.stopped + 1, result.stopped_named + right
        result.until_named_s.append(took_s)


class Launch:
    """torchrun with two processes of train.py, and what they say in a file."""

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
        found = checkpoint.steps(self.out)
        return int(found[0].name[5:]) if found else -1

    def pids(self) -> dict[int, int]:
        """Of the processes that train, by rank."""
        found = {}
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        for pid in (tasks / "children").read_text(encoding="ascii").split():
            with contextlib.suppress(OSError):
                rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                found |= {int(rank[1]): int(pid)} if rank else {}
        return found

    def go_on(self, steps: int) -> None:
        """Let both processes train, and `steps` more be saved."""
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
        assert code == 0, f"torchrun left with {code}:\n{self.said()}"

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


if __name__ == "__main__":
    run_program(lambda: main(load(Config, sys.argv[1:])[0]))
