"""Kill and stop processes of a run of two under torchrun, and compare it with a run that nobody touched.

    python -m benchmarks.restarts                       # 20 kills and 10 hangs
    python -m benchmarks.restarts --kills=5 --hangs=0 --seed=7

At random moments a random process gets SIGKILL, as from the kernel's out-of-memory killer, or SIGSTOP, as a
hang. The other one must say which process is lost, torchrun must start both again, and `--init_from=auto`
must go on. In the end weights, optimizer state and logged rows must be those of the unbroken run, bit for
bit. Run it from the repository root, on Linux.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import kill, table
from nanogpt import checkpoint
from nanogpt.config import ROOT, Count, Positive, Seconds, load
from nanogpt.errors import run_program

RUN = (
    "--init_from=auto --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2 --dropout=0.1 "
    "--gradient_accumulation_steps=4 --warmup_iters=10 --eval_interval=20 --eval_iters=2 --save_interval=5 "
    "--device=cpu --compile=False"
)


@dataclass(frozen=True)
class Config:
    kills: Count = 20  # how often SIGKILL
    hangs: Count = 10  # how often SIGSTOP
    steps_per_fault: Positive = 40  # steps of the run for each of them
    timeout_s: Seconds = 4.0  # of the run
    patience_s: Positive = 60  # the longest wait for the next line or checkpoint of a run
    seed: Count = 1337  # of the moments


@dataclass
class Result:
    steps: int  # of the run
    killed: int = 0
    stopped: int = 0
    killed_named: int = 0  # the line of the survivor has the number of the killed process
    stopped_named: int = 0
    until_named_s: list[float] = field(default_factory=list)  # from SIGSTOP
    until_step_s: list[float] = field(default_factory=list)  # from SIGKILL to the next new checkpoint
    problems: list[str] = field(default_factory=list)


def main(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), config)
    kills = f"{result.killed_named} of {result.killed}"
    hangs = f"{result.stopped_named} of {result.stopped}"
    row = [kills, hangs, _longest(result.until_step_s), _longest(result.until_named_s), len(result.problems)]
    header = [
        "kills named",
        "hangs named",
        "kill to next checkpoint, s",
        "hang to its line, s",
        "problems",
    ]
    table.show(f"Two processes, {result.steps} steps", header, [[str(cell) for cell in row]])
    if result.problems:
        sys.exit("\n".join(["", *result.problems]))
    print("\nequal to the unbroken run, bit for bit")


def _longest(seconds: list[float]) -> str:
    middle = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
    return f"{middle:.1f}, longest {max(seconds):.1f}" if seconds else "-"


def campaign(folder: Path, config: Config) -> Result:
    """Train in `folder` once unbroken and once with faults, and compare."""
    kill.write_dataset(folder / "data")
    moments = random.Random(config.seed)
    faults = ["kill"] * config.kills + ["hang"] * config.hangs
    moments.shuffle(faults)
    result = Result(steps=max(1, len(faults)) * config.steps_per_fault)
    unbroken = Launch(folder, "unbroken", result.steps, 0, config)
    broken = Launch(folder, "broken", result.steps, len(faults), config)
    try:
        for fault in faults:
            broken.go_on(moments.randrange(config.steps_per_fault // 2))
            time.sleep(moments.uniform(0.0, 0.1))
            strike(broken, fault, moments.randrange(2), result)
        unbroken.finish()
        broken.finish()
    finally:
        unbroken.end()
        broken.end()
    result.problems += kill.differences(unbroken.out, broken.out)
    return result


def strike(run: "Launch", fault: str, rank: int, result: Result) -> None:
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
        options += [*RUN.split(), f"--timeout_s={config.timeout_s}"]
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
