"""All GPU benchmarks against nanoGPT in one call, within eight minutes and without network access.

    python -m benchmarks.gpu path/to/nanoGPT --out=DIR
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=mini_owt --tokens=FILE.bin
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=train124               # longer blocks
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=options                # without nanoGPT
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --parts=all --minutes=22
    python -m benchmarks.gpu path/to/nanoGPT --out=DIR --device=cpu --tiny=True       # tests the script

Both programs run unmodified and alternate on the GPU (A B A B); where the loss is irrelevant, tokens are
random. Each part is a process with a time limit; failures and timeouts are recorded and the next part starts.
DIR/results.json and DIR/table.md are updated every few seconds, DIR/logs holds the programs' output, and
later calls add their parts to the results in DIR. The part shakespeare needs the checkout's prepared
data/shakespeare_char; mini_owt needs a file of GPT-2 tokens (uint16, at most 40 MB) or the checkout's
data/mini_owt. Requires torch 2.11 or later.
"""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import shared
from nanogpt import ROOT, files
from nanogpt.config import NonNegativeFloat, PositiveInt, load_with_arguments
from nanogpt.errors import UserError, run_program

LARGEST_TOKENS = 40 << 20  # maximum size of --tokens in bytes, to keep uploads small
LOOKS_S = 5.0  # seconds between writes of a part's intermediate results


class Part(NamedTuple):
    seconds: int  # nominal duration, scaled to --minutes
    usual: bool = True  # run by default


# In run order: time left over by early parts goes to later ones, which use all they get.
PARTS = {
    "chip": Part(35),
    "checkpoint": Part(25),
    "decode": Part(45),
    "train124": Part(105),
    "compile": Part(60),
    "shakespeare": Part(120),
    "train350": Part(90),
    "mini_owt": Part(300, usual=False),
    "options": Part(400, usual=False),
    "profile": Part(120, usual=False),
}


class Row(NamedTuple):
    """A row of the table of targets."""

    figures: tuple[str, ...]  # names of the results it shows, in order
    public: str  # published result of nanoGPT
    least: str  # minimum target
    aim: str  # stretch target


ROWS = {
    "124M GPT-2 preset, tokens/s": Row(
        ("124M, tokens/s",),
        "380K on an H100; the best simple script 490K on an H200",
        "1.4 times nanoGPT, 550K",
        "1.7 times, 650K",
    ),
    "350M, tokens/s": Row(("350M, tokens/s",), "189K (llm.c, H100)", "1.3 times, 210K", "250K"),
    "shakespeare_char, process start to validation loss 1.4697 (exact pass), s": Row(
        ("shakespeare_char, s to 1.4697",), "77 s of loop", "12 s, 7 times", "6.5 s"
    ),
    "lowest validation loss of that preset": Row(
        ("shakespeare_char, lowest loss",), "1.4697 (1.4638 to 1.4655 elsewhere)", "1.45", "1.43"
    ),
    "first optimizer step of the compiled 124M, cold / warm cache, s": Row(
        ("124M compiled, s to the first step, cold", "124M compiled, s to the first step, warm"),
        "about 60 s",
        "15 s / 7 s",
        "5 s warm",
    ),
    "steps to nanoGPT's loss after 30M tokens of mini_owt, 124M, equal batch": Row(
        ("mini_owt, steps to nanoGPT's loss",), "1", "1.5 times fewer", "2.5 times fewer"
    ),
    "decode 124M, batch 1 / 64, tokens/s": Row(
        ("decode 124M, batch 1, tokens/s", "decode 124M, batch 64, tokens/s"),
        "about 450 / -",
        "3,300 / 80K",
        "6,000 / 120K",
    ),
    "default sample job, 10 x 500 tokens, s": Row(
        ("default sample job, s",), "serial", "30 times", "80 times"
    ),
    "checkpoint stall, 124M, s": Row(
        ("checkpoint stall 124M, s",), "blocking torch.save", "0.1 of it", "0.02"
    ),
}
HEADER = ["", "nanoGPT, published", "nanoGPT, here", "ours, here", "times better", "at least", "aim"]


@dataclass(frozen=True)
class Config:
    out: str = "out-gpu"  # output folder for results.json, table.md and logs
    parts: str = ",".join(name for name, part in PARTS.items() if part.usual)  # parts in run order; or all
    minutes: NonNegativeFloat = 8.0  # time limit in minutes for all parts together
    tokens: str = ""  # file of uint16 GPT-2 tokens for mini_owt; empty: the checkout's data/mini_owt
    their_batch: PositiveInt = 12  # nanoGPT's micro-batch size in train124 and train350; its preset: 12
    options: str = ""  # extra options of our train.py, separated by spaces
    compile: bool = True  # False: no torch.compile on either side, if there is no working compiler
    device: str = "cuda"  # device; cpu only to test the script, with --tiny=True
    tiny: bool = False  # tiny sizes to test the script; the results are meaningless


def main(config: Config, arguments: list[str]) -> None:
    """Run the parts, write and print the results. Raise UserError for invalid options."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "train.py").is_file():
        raise UserError("expected one nanoGPT checkout: python -m benchmarks.gpu path/to/nanoGPT --out=DIR")
    asked = list(PARTS) if config.parts == "all" else [name for name in config.parts.split(",") if name]
    if unknown := [name for name in asked if name not in PARTS]:
        raise UserError(f"unknown part {', '.join(unknown)} in --parts; expected {', '.join(PARTS)}")
    if config.tokens and not Path(config.tokens).is_file():
        raise UserError(f"--tokens={config.tokens} is not a file; give raw uint16 GPT-2 tokens")
    if config.tokens and Path(config.tokens).stat().st_size > LARGEST_TOKENS:
        raise UserError(f"--tokens={config.tokens} is larger than 40 MB; truncate it: head -c 40000000")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA GPU; test the script with --device=cpu --tiny=True")
    out = Path(config.out)
    results = begin(config)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # compile cache, initially cold
        for number, name in enumerate(asked):
            left = config.minutes * 60 - (time.monotonic() - started)
            seconds = limits(asked[number:], left)[name]
            found = run_part(name, config, arguments[0], seconds, cache, partial(note, out, results, name))
            note(out, results, name, found)
            print(summary(name, found), flush=True)
    print(f"\n{report(results)}\n\nwritten: {out / 'results.json'}, {out / 'table.md'}")


def begin(config: Config) -> dict[str, Any]:
    """Return the initial results, including those of earlier calls with the same folder. Raise UserError if
    they were measured on other hardware or software."""
    results: dict[str, Any] = {
        "device": device_name(config.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tiny": config.tiny,
        "machine": shared.machine(),
        "commands": [],
        "parts": {},
    }
    path = Path(config.out, "results.json")
    if path.is_file():
        before = files.read_json(path)
        same = ("device", "torch", "cuda", "tiny")
        if wrong := [f"{key} {before.get(key)}" for key in same if before.get(key) != results[key]]:
            raise UserError(f"{path} was measured with {', '.join(wrong)}; give another --out")
        results["commands"], results["parts"] = before["commands"], before["parts"]
    results["commands"].append(" ".join(["python -m benchmarks.gpu", *sys.argv[1:]]))
    return results


def device_name(device: str) -> str:
    """Return the device name, without creating a CUDA context, which would hold memory for the whole call."""
    if device != "cuda":
        return shared.processor()
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return torch.cuda.get_device_name()
    return told.splitlines()[0] if told else torch.cuda.get_device_name()


def limits(asked: Sequence[str], total: float) -> dict[str, float]:
    """Return the time limit of each part in seconds: its share of `total`, at least 20 to start torch."""
    factor = total / sum(PARTS[name].seconds for name in asked)
    return {name: min(max(20.0, PARTS[name].seconds * factor), total) for name in asked}


def run_part(
    name: str,
    config: Config,
    checkout: str,
    limit: float,
    cache: str,
    look: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run part `name`; return its results or error. It runs in a separate process, so a CUDA error does not
    affect other parts. `look` is called with intermediate results every few seconds."""
    if limit < 5:
        return {"error": "skipped: no time left", "seconds": 0.0}
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
        answer, log = Path(scratch, "answer.json"), Path(scratch, "part.txt")
        command = [sys.executable, "-m", "benchmarks.gpu_parts", name, f"{scratch}/about.json", str(answer)]

        def so_far() -> dict[str, Any]:
            # Parts write intermediate results, so a late failure does not lose the earlier ones.
            found = files.read_json(answer) if answer.is_file() else {}
            return found | {"seconds": round(time.monotonic() - started, 1), "on": str(datetime.date.today())}

        error = supervised(command, log, limit, lambda: look(so_far() | {"error": "not done yet"}))
        found = so_far()
        if error:
            found["error"] = error
        for text in Path(scratch).glob("*.txt"):
            shutil.copy(text, Path(config.out, "logs", f"{name}-{text.name}"))
    return found


def supervised(command: list[str], log: Path, limit: float, look: Callable[[], None] = lambda: None) -> str:
    """Run `command` for at most `limit` seconds with output to `log`; return an error message, "" if none."""
    deadline = time.monotonic() + limit
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=os.name != "nt"
        )
        try:
            code = None
            while code is None:
                if (left := deadline - time.monotonic()) <= 0:
                    return f"not done after {limit:.0f} s"
                try:
                    code = process.wait(timeout=min(LOOKS_S, left))
                except subprocess.TimeoutExpired:
                    look()
        finally:
            end(process)
    if not code:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else f"exited with {code} and no output"


def end(process: subprocess.Popen) -> None:
    """Kill a process and its process group."""
    if os.name == "nt":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
    process.wait()


# ----------------------------------------------------------------------------- output


def note(out: Path, results: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Store the results `found` of part `name`, and write both files."""
    results["parts"][name] = found
    files.write_json(out / "results.json", results)
    files.write_text(out / "table.md", report(results) + "\n")


def summary(name: str, found: dict[str, Any]) -> str:
    figures = [f"{one['what']}: {shown(one['ours'])}" for one in found.get("figures", ())]
    wrong = [f"FAILED: {error}" for error in errors(found)]
    return f"{name} ({found['seconds']:.0f} s): " + "; ".join([*wrong, *figures])


def errors(found: dict[str, Any]) -> list[str]:
    """Return the errors of a part, fatal and non-fatal."""
    return [*([found["error"]] if "error" in found else []), *found.get("errors", [])]


def report(results: dict[str, Any]) -> str:
    """Return the report: targets and results, then other results, then failures."""
    parts = results["parts"]
    figures = {one["what"]: one for part in parts.values() for one in part.get("figures", ())}
    rows = []
    for what, row in ROWS.items():
        shares = [cells(figures.get(name, {})) for name in row.figures]
        rows.append([what, row.public, *map(joined, zip(*shares, strict=True)), row.least, row.aim])
    notes = [
        f"- {name}: {figures[name]['note']}"
        for row in ROWS.values()
        for name in row.figures
        if figures.get(name, {}).get("note")
    ]
    in_rows = {name for row in ROWS.values() for name in row.figures}
    others = [[what, *cells(one), one["note"]] for what, one in figures.items() if what not in in_rows]
    failed = [f"- {name}: {error}" for name, part in parts.items() for error in errors(part)]
    lines = [
        f"{results['device']}; {results['machine']}; CUDA {results['cuda']}",
        *[f"`{command}`" for command in results["commands"]],
        *(["", "**Tiny sizes: these figures mean nothing.**"] if results["tiny"] else []),
        "",
        shared.markdown(HEADER, rows),
        *(["", *notes] if notes else []),
    ]
    if others:
        lines += ["", shared.markdown(["also measured", "nanoGPT", "ours", "times better", "note"], others)]
    if failed:
        lines += ["", "Failed or skipped:", "", *failed]
    return "\n".join(lines)


def cells(one: dict[str, Any]) -> list[str]:
    """Return the cells: theirs, ours, and the ratio."""
    ratio = one.get("ratio")
    both = [shown(one.get(side)) if one else "not measured" for side in ("theirs", "ours")]
    return [*both, f"{ratio:.2f}" if ratio else ""]


def joined(values: Sequence[str]) -> str:
    """Join the values of a row's results into one cell."""
    return values[0] if len(set(values)) == 1 else " / ".join(value or "-" for value in values)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))  # also ends the running part
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
