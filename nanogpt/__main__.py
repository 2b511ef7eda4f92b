"""The `nanogpt` command: `nanogpt train ...` runs train.py, `nanogpt prepare NAME` data/NAME/prepare.py,
`nanogpt novel.txt` trains on a text and samples.
"""

import difflib
import runpy
import sys
from functools import partial
from pathlib import Path

from nanogpt import ROOT
from nanogpt.errors import UserError, run_program

PROGRAMS = {
    "prepare": "turn texts into a dataset: PATH --out=data/mine, or a known one (shakespeare_char, ...)",
    "train": "train or finetune a model",
    "sample": "generate text from a model",
    "eval": "score a model",
    "serve": "a web page and an OpenAI-compatible server for a model",
    "export": "write a model for transformers or nanoGPT",
    "plot": "plot the loss curves of runs",
    "race": "train presets or options in turn for the same time, and rank them",
    "bench": "time the training step",
    "plan": "memory, hours and cost of a run before it starts",
    "doctor": "describe this machine and check folders, for a bug report",
}


def main() -> None:
    """Run the program that the first argument names, with the others as its arguments; of a text: prepare it,
    train on it and sample."""
    run_program(partial(run, *(sys.argv[1:] or ["--help"])))


def run(name: str, *arguments: str) -> None:
    """Run what `name` stands for. Raise UserError if that is unknown."""
    if name in ("-h", "--help", "presets"):
        describe(name)
    elif name in PROGRAMS:
        start(name, *arguments)
    elif Path(name).exists():
        from nanogpt.prepare import own_text

        own_text.train_and_sample([name, *arguments], start)
    else:
        known = {program: program for program in [*PROGRAMS, "presets"]}
        known |= {path.stem: f"train {path.stem}" for path in (ROOT / "config").glob("*.py")}
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean nanogpt {known[near[0]]}?" if near else "nanogpt --help lists what there is"
        what = "no file or program" if "." in name or "/" in name else "unknown program"
        raise UserError(f"{what} {name!r}; {hint}")


def describe(name: str) -> None:
    """Print what the command can do or, for "presets", the presets."""
    if name == "presets":
        for path in sorted((ROOT / "config").glob("*.py")):
            print(f"{path.stem:<36} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    else:
        print("nanogpt novel.txt [--minutes=5] [--option=value ...] trains on a text and samples")
        print("nanogpt PROGRAM [PRESET] [--option=value ...]; nanogpt PROGRAM --help lists its options\n")
        print(*(f"  nanogpt {program:<8} {about}" for program, about in PROGRAMS.items()), sep="\n")
        print("  nanogpt presets  list the presets of nanogpt train")


def start(name: str, *arguments: str) -> None:
    """Run a program in this process, as `python train.py ...` does."""
    words = list(arguments)
    path = ROOT / f"{name}.py"
    if name == "prepare":
        path, known = ROOT / "data" / "prepare.py", sorted((ROOT / "data").glob("*/prepare.py"))
        if words and (ROOT / "data" / words[0] / "prepare.py").is_file():
            path = ROOT / "data" / words.pop(0) / "prepare.py"
        elif not any(word.startswith("-") or Path(word).exists() for word in words):
            names = ", ".join(path.parent.name for path in known)
            what = f"no text or dataset {words[0]!r}" if words else "nothing to prepare"
            raise UserError(f"{what}; give PATH --out=data/mine, or one of {names}")
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(ROOT))  # bench.py imports train.py
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
