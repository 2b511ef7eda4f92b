"""All that is to be measured on a GPU, against nanoGPT, in one call of at most eight minutes without a net.

    python -m benchmarks.gpu path/to/nanoGPT --out=DIR
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=chip,train124          # longer blocks
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=chip,mini_owt --tokens=FILE.bin
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=chip,options,profile   # ours alone
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --device=cpu --tiny=True       # tries the script

Both programs run as they are and take turns on the chip (A B A B); where the loss does not matter the tokens
are random. Each part is a process with a time limit: what fails or is too slow is written down, and the next
one begins. DIR/results.json and DIR/table.md are complete after each part. The part shakespeare needs the
checkout's data/shakespeare_char prepared; mini_owt needs a file of GPT-2 tokens, uint16, of at most 40 MB, or
the checkout's data/mini_owt. Needs torch 2.11 or later.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import table
from nanogpt import files
from nanogpt.config import ROOT, Positive, Rate, read
from nanogpt.errors import UserError, run_program

LARGEST_TOKENS = 40 << 20  # bytes: what may have to be carried to the machine


class Part(NamedTuple):
    seconds: int  # its share of eight minutes
    usual: bool = True  # is among the parts if none are named


PARTS = {
    "chip": Part(25),
    "train124": Part(110),
    "train350": Part(100),
    "compile": Part(60),
    "shakespeare": Part(100),
    "decode": Part(40),
    "checkpoint": Part(25),
    "fp8": Part(20),
    "mini_owt": Part(300, usual=False),
    "options": Part(300, usual=False),
    "profile": Part(120, usual=False),
}


class Goal(NamedTuple):
    public: str  # what is published of nanoGPT
    least: str
    aim: str


GOALS = {
    "124M, tokens/s": Goal(
        "380K on an H100; the best simple script 490K", "1.4 times, 550K", "1.7 times, 650K"
    ),
    "350M, tokens/s": Goal("189K (llm.c, H100)", "1.3 times, 210K", "250K"),
    "shakespeare_char, s to 1.4697": Goal("77 s of loop", "12 s, 7 times", "6.5 s"),
    "shakespeare_char, lowest loss": Goal("1.4697", "1.45", "1.43"),
    "124M compiled, s to the first step, cold": Goal("about 60 s", "15 s", ""),
    "124M compiled, s to the first step, warm": Goal("", "7 s", "5 s"),
    "mini_owt, steps to nanoGPT's loss": Goal("1", "1.5 times fewer", "2.5 times fewer"),
    "decode 124M, batch 1, tokens/s": Goal("about 450", "3,300", "6,000"),
    "decode 124M, batch 64, tokens/s": Goal("", "80K", "120K"),
    "default sample job, s": Goal("serial", "30 times", "80 times"),
    "checkpoint stall 124M, s": Goal("blocking torch.save", "0.1 of it", "0.02 of it"),
}


@dataclass(frozen=True)
class Config:
    out: str = "out-gpu"  # the folder for results.json, table.md and what the parts wrote
    parts: str = ",".join(name for name, part in PARTS.items() if part.usual)  # which, in this order
    minutes: Rate = 8.0  # all parts together, at most
    tokens: str = ""  # a file of GPT-2 tokens for mini_owt; empty: the checkout's data/mini_owt
    their_batch: Positive = 12  # nanoGPT's micro-batch in train124 and train350; 12 is its preset's
    options: str = ""  # more options for our train.py in the parts that train, separated by spaces
    device: str = "cuda"  # cpu: with --tiny=True, to try the script
    tiny: bool = False  # sizes that run anywhere; the figures mean nothing


def main(config: Config, arguments: list[str]) -> None:
    """Run the parts, write and print. Raises UserError for what cannot begin."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "train.py").is_file():
        raise UserError("name one checkout of nanoGPT: python -m benchmarks.gpu path/to/nanoGPT --out=DIR")
    asked = [name for name in config.parts.split(",") if name]
    if unknown := [name for name in asked if name not in PARTS]:
        raise UserError(f"--parts={config.parts}: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if config.tokens and not Path(config.tokens).is_file():
        raise UserError(f"--tokens={config.tokens} is no file; give raw uint16 GPT-2 tokens")
    if config.tokens and Path(config.tokens).stat().st_size > LARGEST_TOKENS:
        raise UserError(
            f"--tokens={config.tokens} is larger than 40 MB; cut it, such as with head -c 40000000"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this torch sees no CUDA GPU; --device=cpu --tiny=True tries the script without one")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks.gpu", *sys.argv[1:]],
        "machine": table.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tiny": config.tiny,
        "parts": {},
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # of compiled code: cold at first
        for number, name in enumerate(asked):
            left = config.minutes * 60 - (time.monotonic() - started)
            seconds = limits(asked[number:], left)[name]
            results["parts"][name] = run_part(name, config, arguments[0], seconds, cache)
            write(out, results)
            print(summary(name, results["parts"][name]), flush=True)
    print(f"\n{report(results)}\nwritten: {out / 'results.json'}, {out / 'table.md'}")


def limits(asked: Sequence[str], total: float) -> dict[str, float]:
    """The seconds of each part: its share of `total`, enough to start torch, and at most six minutes."""
    factor = total / sum(PARTS[name].seconds for name in asked)
    return {name: min(max(20.0, PARTS[name].seconds * factor), 360.0, total) for name in asked}


def run_part(name: str, config: Config, checkout: str, limit: float, cache: str) -> dict[str, Any]:
    """What the part `name` found, or its error. It is a process of its own: what it breaks, on the device
    too, ends with it."""
    if limit < 5:
        return {"error": "left out: no time was left", "seconds": 0.0}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        about = asdict(config) | {
            "checkout": str(Path(checkout).resolve()),
            "scratch": scratch,
            "cache": cache,
            "out": str(Path(config.out).resolve()),
            "tokens": str(Path(config.tokens).resolve()) if config.tokens else "",
            "budget_s": limit * 0.9,
        }
        files.write_json(Path(scratch, "about.json"), about)
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log.txt")
        command = [sys.executable, "-m", "benchmarks.gpu_parts", name, f"{scratch}/about.json", str(answer)]
        error = supervised(command, log, limit)
        # A part writes what it has each time it has more, so that one that fails late has not failed.
        found = files.read_json(answer) if answer.is_file() else {}
        if error:
            found["error"] = error
        found["seconds"] = round(time.monotonic() - started, 1)
    return found


def supervised(command: list[str], log: Path, limit: float) -> str:
    """Run `command` with its output in `log`, for `limit` seconds; returns what went wrong, "" if nothing."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=os.name != "nt"
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"not done after {limit:.0f} s"
        finally:
            end(process)
    if not code:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else f"ended with {code} and said nothing"


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    if os.name == "nt":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
    process.wait()


# ----------------------------------------------------------------------------- what is written


def write(out: Path, results: dict[str, Any]) -> None:
    files.write_json(out / "results.json", results)
    files.write_text(out / "table.md", report(results) + "\n")


def summary(name: str, found: dict[str, Any]) -> str:
    figures = [f"{one['what']}: {shown(one['ours'])}" for one in found.get("figures", ())]
    wrong = [f"FAILED: {found['error']}"] if "error" in found else []
    return f"{name} ({found['seconds']:.0f} s): " + "; ".join([*wrong, *figures])


def report(results: dict[str, Any]) -> str:
    """The goals beside what was measured, then the other figures, then what failed."""
    figures = [one for part in results["parts"].values() for one in part.get("figures", ())]
    measured = {one["what"]: one for one in figures}
    rows = []
    for what, goal in GOALS.items():
        one = measured.get(what, {})
        rows.append([what, goal.public, *cells(one), goal.least, goal.aim, one.get("note", "")])
    header = ["", "nanoGPT, published", "nanoGPT, here", "ours, here", "ratio", "at least", "aim", "note"]
    others = [[one["what"], *cells(one), one["note"]] for one in figures if one["what"] not in GOALS]
    failed = [
        f"- {name}: {error}"
        for name, part in results["parts"].items()
        for error in [*([part["error"]] if "error" in part else []), *part.get("errors", [])]
    ]
    chip = results["parts"].get("chip", {}).get("device", "device not asked")
    lines = [
        f"{chip}; {results['machine']}; CUDA {results['cuda']}",
        "`" + " ".join(results["command"]) + "`",
        *(["", "**Tiny sizes: these figures mean nothing.**"] if results["tiny"] else []),
        "",
        table.markdown(header, rows),
    ]
    if others:
        lines += ["", table.markdown(["also measured", "nanoGPT", "ours", "ratio", "note"], others)]
    if failed:
        lines += ["", "Failed or left out:", "", *failed]
    return "\n".join(lines)


def cells(one: dict[str, Any]) -> list[str]:
    """Theirs, ours, and how many times better ours is."""
    ratio = one.get("ratio")
    ours = shown(one.get("ours")) if one else "not measured"
    return [shown(one.get("theirs")), ours, f"{ratio:.2f}" if ratio else ""]


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def command_line(argv: list[str]) -> tuple[Config, list[str]]:
    options = read(Config, argv, arguments=True)
    return Config(**options.values), options.arguments


if __name__ == "__main__":
    run_program(lambda: main(*command_line(sys.argv[1:])))
