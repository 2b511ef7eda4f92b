"""Damage files of every kind that the programs read, and give wrong options to every program.

    python -m benchmarks.fuzz                                      # 200 damaged files
    python -m benchmarks.fuzz --files=10000 --options=1000 --log=fuzz.jsonl

Files are damaged as bytes (flipped, cut, doubled, replaced) and as values (a number, text or list in JSON, a
pickle or a safetensors header becomes another of a list of hostile ones; a manifest is then made to fit).
The program that reads the file runs in a process forked from one that has imported everything, so that a
trial takes a fraction of a second; every fiftieth also in a process of its own, with the same result. It must
end with one line and one of the exit codes of nanogpt/errors.py, or succeed. Reported are executions (of code
in a file, of a command, or a file written outside the working folder), tracebacks, hangs (no line of progress
within --limit_s), crashes, and memory beyond that of an intact file by more than 64 MB and 8 times its size.

Trial n depends only on --seed and n. With --log each one is a line of a JSONL file, and the same command
continues it. Linux only.
"""

import contextlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import fuzz_cases as cases
from benchmarks import fuzz_options
from nanogpt import ROOT, checkpoint, files
from nanogpt.config import NonNegativeInt, Seconds, load
from nanogpt.errors import UserError, run_program
from nanogpt.prepare import formats

BAD = ("execution", "traceback", "hang", "crash", "memory", "written", "differs")
TWICE = 50  # one damaged file in TWICE is also read by a process that was not forked
SPARE = 64 << 20  # bytes of memory beyond those of an intact file


@dataclass(frozen=True)
class Config:
    files: NonNegativeInt = 200  # number of damaged files
    options: NonNegativeInt = 0  # number of wrong command lines
    seed: NonNegativeInt = 0  # seed of the damage
    limit_s: Seconds = 20.0  # seconds of CPU time until the first line of progress; ten times that in all
    log: str = ""  # JSONL file of all trials, continued if it exists
    show: bool = False  # print every trial that fails


# ----------------------------------------------------------------------------- trials


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook of a trial: note commands, and files opened for writing outside the working folder."""
    if event in ("os.system", "os.exec", "os.posix_spawn"):
        note(f"{event} {arguments}")
    elif (
        event == "open" and isinstance(arguments[0], str) and arguments[1] and set("wax+") & set(arguments[1])
    ):
        path = os.path.realpath(arguments[0])
        inside = (os.getcwd(), os.path.realpath(tempfile.gettempdir()), "/dev", "/proc", str(Path.home()))
        if not path.startswith(inside):
            note(f"wrote {path}")


def note(what: str) -> None:
    descriptor = os.open("EXECUTED", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, what.encode("utf-8", "replace") + b"\n")
    os.close(descriptor)


def child(command: Sequence[str], folder: Path, watched: bool, alone: bool) -> typing.NoReturn:
    """Run a program in `folder` in this forked process, its output in files there; `alone`: as from the
    shell."""
    code = 1
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        tempfile.tempdir = str(folder)
        sys.modules["__main__"] = types.ModuleType("__main__")  # which new processes would import
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
        if alone:
            path = ROOT / ("data/prepare.py" if command[0] == "prepare" else f"{command[0]}.py")
            os.execv(sys.executable, [sys.executable, str(path), *command[1:]])
        if watched:
            sys.addaudithook(watch)
        cases.program(command[0])(list(command[1:]))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


MEMORY = "/dev/shm"  # a file system without disk
SLOW = ("matplotlib", "nanogpt", "tokenizers", "torch")  # packages; pyarrow starts a thread
MODULES = "modules.txt"
PROGRESS = re.compile(r"^(iter \d|serving at|-{15}|step: |step \d+: train|timing)", re.M)


def run(
    command: Sequence[str], folder: Path, limit_s: float, watched: bool = True, alone: bool = False
) -> tuple[str, int, str]:
    """Run a command in a forked process, or `alone` in one that this process shares nothing with; return the
    outcome, its peak memory in bytes and the last words."""
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        child(command, folder, watched, alone)
    started, status, progress = time.monotonic(), None, False
    end, asked = started + 10 * limit_s, started + 0.5
    while status is None:
        found, code, usage = os.wait4(pid, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(code)
            break
        now = time.monotonic()
        said = output(folder, "stdout") + output(folder, "stderr") if now > asked else ""
        asked = now + 0.5 if now > asked else asked
        progress |= bool(PROGRESS.search(said))
        if (
            now > end
            or cpu_s(pid) > limit_s
            or (progress and (command[0] == "serve" or (not watched and now > started + 3)))
        ):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # worker processes
    said = output(folder, "stderr")
    memory = usage.ru_maxrss * 1024
    if (folder / "EXECUTED").exists():
        return "execution", memory, output(folder, "EXECUTED")
    if status is None:
        return ("running" if progress else "hang"), memory, said[-1500:]
    if status < 0:
        return "crash", memory, f"signal {-status}: {said[-1500:]}"
    if status == 1 or "Traceback (most recent call last)" in said:
        return "traceback", memory, said[-1500:]
    return f"exit {status}", memory, said[-300:]


def cpu_s(pid: int) -> float:
    """Return the seconds of CPU time of a process and of its children that have ended."""
    fields = (
        Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    )
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def output(folder: Path, name: str) -> str:
    path = folder / name
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def unpacked_size(path: Path) -> int:
    size = 0
    with contextlib.suppress(UserError):
        for block in formats.unpacked(path):
            size += len(block)
    return size


def try_file(
    number: int, corpus: Path, scratch: Path, config: Config, usual: dict[str, int]
) -> dict[str, Any]:
    """Damage one file of a copy of the corpus and read it; return a row for the log."""
    chance = random.Random(f"{config.seed} file {number}")
    kind = chance.choice(cases.KINDS)
    pattern, command = chance.choice(kind.names), chance.choice(kind.commands)
    shutil.copytree(corpus, scratch)
    step = checkpoint.step_folders(scratch / "run")[0]
    name = pattern.format(step=step.name)
    words = command.format(name=name).split()
    if words[0] == "train" and not any(word.startswith("--dataset") for word in words):
        words.append("--dataset=data")
    if f"{words}" not in usual:
        outcome, usual[f"{words}"], said = run(words, scratch, 10 * config.limit_s)
        assert outcome == kind.intact, f"{words} fails with intact files: {outcome} {said}"
        shutil.rmtree(scratch)
        shutil.copytree(corpus, scratch)
    path = scratch / kind.folder / name
    signed = "{step}" in pattern and "manifest" not in pattern and chance.random() < 0.7

    def damage() -> None:
        path.write_bytes(cases.damaged(name, path.read_bytes(), chance))
        if signed:
            cases.sign(scratch / kind.folder / step.name)

    inside(damage)
    size = path.stat().st_size
    if twice := number % TWICE == 0 and kind.folder != "references":  # which only a trial replaces
        shutil.copytree(scratch, alone := scratch.with_name("alone"))
    outcome, memory, said = run(words, scratch, config.limit_s)
    extra = memory - usual[f"{words}"]
    if outcome.startswith("exit") and extra > SPARE + 8 * size and extra > SPARE + 8 * unpacked_size(path):
        outcome = "memory"
    if twice:
        other, _, words_alone = run(words, alone, 3 * config.limit_s, alone=True)
        shutil.rmtree(alone)
        if outcome.startswith("exit") and (outcome, said) != (other, words_alone):
            outcome, said = "differs", f"{outcome}: {said}\nalone {other}: {words_alone}"
    return {
        "what": f"{kind.folder}/{pattern}",
        "command": words,
        "outcome": outcome,
        "extra": extra,
        "said": said,
    }


def try_options(number: int, corpus: Path, scratch: Path, config: Config) -> dict[str, Any]:
    """Run one wrong command line in a copy of the corpus; return a row for the log."""
    name, argv = fuzz_options.wrong_options(random.Random(f"{config.seed} options {number}"))
    shutil.copytree(corpus, scratch)
    before = {path.name for path in scratch.iterdir()}
    outcome, memory, said = run([name, *argv], scratch, config.limit_s, watched=False)
    left = {path.name for path in scratch.iterdir()} - before - {"stdout", "stderr"}
    left = {
        name for name in left if not name.startswith("torchinductor")
    }  # of torch, in the temporary folder
    if outcome == "exit 2" and left:
        outcome, said = "written", f"{left}: {said}"
    return {"what": name, "command": argv, "outcome": outcome, "extra": memory, "said": said}


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Run the trials that the log lacks, and print a table of the outcomes."""
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # also of new processes; no network
    log = Path(config.log) if config.log else None
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    if log and log.is_file():
        rows = {
            (row["kind"], row["n"]): row
            for row in map(json.loads, log.read_text(encoding="utf-8").splitlines())
        }
    wanted = [("file", n) for n in range(config.files)] + [("options", n) for n in range(config.options)]
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        corpus, usual = Path(folder) / "corpus", dict[str, int]()
        inside(lambda: prepare(corpus))
        known = set(sys.modules)
        for name in (corpus / MODULES).read_text(encoding="utf-8").split():
            if name not in known and name.startswith(
                SLOW
            ):  # what the programs import while they run; import it before forking
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        (corpus / MODULES).unlink()
        for kind, n in tqdm([key for key in wanted if key not in rows], disable=None):
            scratch = Path(folder) / "scratch"
            shutil.rmtree(scratch, ignore_errors=True)
            started = time.monotonic()
            if kind == "file":
                row = try_file(n, corpus, scratch, config, usual)
            else:
                row = try_options(n, corpus, scratch, config)
            rows[kind, n] = {"kind": kind, "n": n, "s": round(time.monotonic() - started, 3), **row}
            if log:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[kind, n]) + "\n")
            if config.show and row["outcome"] in BAD:
                print(f"--- {kind} {n}: {row['what']}: {row['outcome']}\n{row['command']}\n{row['said']}")
    report([rows[key] for key in wanted])


def prepare(corpus: Path) -> None:
    """Write the corpus, and the names of the modules that this process has imported by then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # of this forked process
    cases.build(corpus)
    for name in {*fuzz_options.BASE, "doctor"}:
        cases.program(name)
    with contextlib.chdir(corpus):
        for command in (
            "plot run --out=plot.png",
            f"{cases.TRAIN} --dataset=bpe --sample_prompt=A --out_dir=x",
        ):
            cases.program(command.split()[0])(command.split()[1:])
    for path in (corpus / "plot.png", corpus / "x"):
        files.remove(path)
    (corpus / MODULES).write_text("\n".join(sys.modules), encoding="utf-8")


def inside(work: Callable[[], object]) -> None:
    """Do `work` in a forked process: threads that it starts would not survive the forks of the trials."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the intact files could not be made")


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print the number of trials and of each outcome, by kind of file and by program."""
    print(f"| | trials | {' | '.join(BAD)} |")
    print("|---" * (len(BAD) + 2) + "|")
    for name in sorted({(row["kind"], row["what"]) for row in rows}):
        found = Counter(row["outcome"] for row in rows if (row["kind"], row["what"]) == name)
        print(f"| {name[1]} | {found.total()} | {' | '.join(str(found[bad]) for bad in BAD)} |")
    found = Counter(row["outcome"] for row in rows)
    print(f"| all | {found.total()} | {' | '.join(str(found[bad]) for bad in BAD)} |")
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(found.items())))


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
