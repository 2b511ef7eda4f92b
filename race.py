"""Race presets and options against each other: the same time each, several seeds, a ranked table.

    nanogpt race config/a.py config/b.py --minutes=5 --seeds=2
    nanogpt race config/a.py "config/a.py --activation=swiglu" --max_iters=1000 --out=race-swiglu

An entrant is a preset, in quotes with its options. They run in turn, seed by seed, each in its own process.
race.json and race.md in --out are written after every run. After an interruption the same command continues;
so do more seeds or entrants.
"""

import hashlib
import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt import ROOT, checkpoint, files
from nanogpt.config import FilePath, NonNegativeFloat, NonNegativeInt, PositiveInt, load, load_with_arguments
from nanogpt.errors import Stopped, UserError, run_program

FIRST_SEED = 1337
REACHED = {"bits_per_byte": float | None, "val_loss": float, "iter": int, "tokens": float, "dataset": str}
RUN = {"entrant": str, "seed": int, **{f"{name}?": kind for name, kind in REACHED.items()}, "sequences?": str}


@dataclass(frozen=True)
class Config:
    minutes: NonNegativeFloat = 5.0  # minutes of each run, start-up and evaluations included
    max_iters: NonNegativeInt = 0  # iterations of each run, instead of minutes; 0: use minutes
    seeds: PositiveInt = 2  # runs of each entrant
    out: FilePath = "race"  # folder of the runs and the table


def main(config: Config, entrants: Sequence[str]) -> None:
    """Run what is missing and write the table. Raise UserError for invalid entrants, Stopped on a signal."""
    entrants = list(dict.fromkeys(entrants))
    if not entrants:
        raise UserError("no entrants given; expected presets: nanogpt race config/a.py config/b.py")
    length = f"--max_iters={config.max_iters}" if config.max_iters else f"--minutes={config.minutes:g}"
    check(entrants, length)
    out = Path(config.out)
    results: list[dict[str, Any]] = []
    if (out / "race.json").is_file():
        before = files.read_json(out / "race.json", {"length": str, "runs": [RUN]})
        if before["length"] != length:
            raise UserError(f"{out} holds a race with {before['length']}; give that, or another --out")
        results = [row for row in before["runs"] if "val_loss" not in row or REACHED.keys() <= row.keys()]
    with files.lock(out):
        for number in range(config.seeds):
            for entrant in entrants[:: -1 if number % 2 else 1]:  # no entrant always runs first
                seed = FIRST_SEED + number
                if not any((row["entrant"], row["seed"]) == (entrant, seed) for row in results):
                    results.append(run(entrant, length, seed, out))
                    write(out, length, results)
        print(*write(out, length, results), f"wrote {out / 'race.md'} and race.json", sep="\n")


def check(entrants: Sequence[str], length: str) -> None:
    """Raise UserError if an entrant does not start with a preset or has invalid options."""
    import train

    for entrant in entrants:
        if entrant.startswith("--"):
            raise UserError(f"entrant {entrant!r} must begin with a preset: 'config/a.py {entrant}'")
        load(train.Config, [*shlex.split(entrant), length])
        if given := [word for word in shlex.split(entrant) if re.match("--(seed|out_dir)=", word)]:
            raise UserError(f"entrant {entrant!r}: {given[0]} is chosen by the race; omit it")


def run(entrant: str, length: str, seed: int, out: Path) -> dict[str, Any]:
    """Train `entrant` with `seed`, or resume that; return its row of race.json."""
    digest = hashlib.sha256(entrant.encode()).hexdigest()[:8]  # options are too long for a name
    folder = out / f"{Path(shlex.split(entrant)[0]).stem}-{digest}-{seed}"
    ours = [length, f"--seed={seed}", f"--out_dir={folder}"]
    if checkpoint.step_folders(folder):
        ours.append("--init_from=resume")
    print(f"--- {entrant}, seed {seed}", flush=True)
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *shlex.split(entrant), *ours])
    # Ctrl-C reaches the child too, which saves a checkpoint; a second signal would end it at once.
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: child.terminate()}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    code = child.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if code == 75:
        raise Stopped("the race is stopped; the same command continues it")
    if code not in (0, 70):
        raise UserError(f"{entrant} failed with exit code {code}, see above; the same command continues")
    return {"entrant": entrant, "seed": seed, "folder": str(folder)} | ({} if code else result(folder))


def result(folder: Path) -> dict[str, Any]:
    """Return what the run in `folder` reached: bits per byte, or None if the text's bytes are not known."""
    from nanogpt.diagnostics import overlap, runs

    done = runs.load(folder)
    try:
        per_token = overlap.open_dataset(folder).bytes_per_token
    except UserError:  # the dataset has moved
        per_token = None
    bits = done.val_loss / math.log(2) / per_token if per_token else None
    return {
        "bits_per_byte": bits,
        "val_loss": done.val_loss,
        "iter": int(done.evals["iter"][-1]),
        "tokens": done.tokens,
        "seconds": done.seconds,
        "dataset": str(done.options.get("dataset")),
        "sequences": str(done.about.get("data", {}).get("sequences")),
    }


def write(out: Path, length: str, results: Sequence[dict[str, Any]]) -> list[str]:
    """Write race.json and race.md; return the lines of the table."""
    from nanogpt.diagnostics.runs import EVALUATED_UNLIKE, difference, mean_and_error

    finished = [row for row in results if "val_loss" in row]
    key = "bits_per_byte" if all(row["bits_per_byte"] for row in finished) else "val_loss"
    if key == "val_loss" and len({row["dataset"] for row in finished}) > 1:
        raise UserError("the entrants have several datasets of unknown size in bytes; they cannot be ranked")
    names = dict.fromkeys(row["entrant"] for row in finished)
    values = {name: [row[key] for row in finished if row["entrant"] == name] for name in names}
    ranked = sorted(values, key=lambda name: mean_and_error(values[name])[0])
    unit = key.replace("_per_", "/").replace("val_loss", "validation loss")
    lines = [
        f"| | entrant | {unit} | to the first (95 %) | larger than the noise | iterations | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    table = []
    for place, name in enumerate(ranked, start=1):
        rows = [row for row in finished if row["entrant"] == name]
        mean, error = mean_and_error(values[name])
        gap, noise = difference(values[name], values[ranked[0]])
        shown = f"{mean:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        to_first = [f"+{gap:.4f} ± {noise:.4f}", "yes" if gap > noise else "no"]
        if place == 1 or math.isnan(noise):
            to_first = [f"+{gap:.4f}", "one seed"] if place > 1 else ["", ""]
        iters, tokens = (f"{sum(row[key] for row in rows) / len(rows):,.0f}" for key in ("iter", "tokens"))
        lines.append(f"| {place} | {name} | {shown} | {' | '.join(to_first)} | {iters} | {tokens} |")
        table.append({"entrant": name, key: mean, "error": error, "values": values[name], "seeds": len(rows)})
    lines += [f"{row['entrant']}, seed {row['seed']}: diverged" for row in results if row not in finished]
    lines.append(f"\n{length}; ±: standard error over seeds, and half of the 95 % interval of a difference")
    if len(datasets := sorted({row["dataset"] for row in finished})) > 1:
        lines.append(f"each entrant is validated on its own dataset: {', '.join(datasets)}")
    elif len({row.get("sequences") for row in finished}) > 1:
        lines.append(f"note: {EVALUATED_UNLIKE}")
    clean = [{key: value if value == value else None for key, value in row.items()} for row in table]
    files.write_json(out / "race.json", {"length": length, "ranking": clean, "runs": list(results)})
    files.write_text(out / "race.md", "\n".join(lines) + "\n")
    return lines


if __name__ == "__main__":
    run_program(lambda: main(*load_with_arguments(Config, sys.argv[1:])))
