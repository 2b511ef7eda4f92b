"""Prepare the same text with nanoGPT's data/openwebtext/prepare.py and with ours, in turn.

    python -m benchmarks.prepare path/to/nanoGPT 'texts/*.jsonl.xz' --gpt2_bpe=path/to/gpt2

nanoGPT's program runs as it is but for three lines: it loads these files (JSONL, field `text`) instead of
downloading OpenWebText, uses as many processes as ours, and writes val in no more parts than it has
documents. It needs the package datasets, and both vocab.bpe and encoder.json in `gpt2_bpe`. Each run
starts with an empty cache. Core-seconds are processor time of all processes together, memory is the
largest sum of their resident sets (which counts shared pages more than once). Reads /proc, so Linux only.
"""

import glob
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import table
from nanogpt import files, tokenizer
from nanogpt.config import ROOT, Positive, read
from nanogpt.errors import UserError, run_program

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # by which tiktoken keeps its files
CHANGES = {  # in nanoGPT's program
    "num_proc = 8": "num_proc = {workers}",
    'load_dataset("openwebtext", ': 'load_dataset("json", data_files={files!r}, ',
    "total_batches = 1024": "total_batches = min(1024, len(dset))",
}


@dataclass(frozen=True)
class Config:
    gpt2_bpe: str = "gpt2"  # the folder with vocab.bpe and encoder.json
    workers: Positive = 2  # processes of each program
    rounds: Positive = 2  # runs of each
    only_ours: bool = False  # leave nanoGPT out (memory and speed of ours alone)


@dataclass(frozen=True)
class Run:
    wall_s: float
    cpu_s: float
    memory: int  # bytes
    tokens: int


def main(config: Config, arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise UserError("give the folder of nanoGPT, and the files or patterns of text")
    program = Path(arguments[0]) / "data" / "openwebtext" / "prepare.py"
    texts = sorted(os.path.abspath(name) for given in arguments[1:] for name in glob.glob(given))
    if not texts or not (program.is_file() or config.only_ours):
        raise UserError(f"there must be files like {arguments[1]}, and {program}")
    runs: dict[str, list[Run]] = {"nanoGPT": [], "ours": []}
    for _ in range(config.rounds):
        if not config.only_ours:
            with tempfile.TemporaryDirectory() as folder:
                runs["nanoGPT"].append(theirs(program, texts, config, Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            run, size = ours(texts, config, Path(folder))
            runs["ours"].append(run)
    rows = [
        [
            name,
            *(f"{np.median([getattr(run, value) for run in found]):.1f}" for value in ("wall_s", "cpu_s")),
            f"{size / 1e6 / np.median([run.cpu_s for run in found]):.2f}",
            f"{max(run.memory for run in found) / 1e6:.0f}",
            f"{found[0].tokens:,}",
        ]
        for name, found in runs.items()
        if found
    ]
    header = ["", "seconds", "core-seconds", "MB of text a core-second", "memory at most, MB", "tokens"]
    table.show(f"{size / 1e6:.1f} MB of text, {config.workers} processes", header, rows)
    ratios = [a.cpu_s / b.cpu_s for a, b in zip(runs["nanoGPT"], runs["ours"], strict=False)]
    if ratios:
        print(f"\nRatio of core-seconds, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def theirs(program: Path, texts: list[str], config: Config, folder: Path) -> Run:
    """A run of nanoGPT's program; its tokens are counted in what it wrote."""
    source = program.read_text(encoding="utf-8")
    for old, new in CHANGES.items():
        if source.count(old) != 1:
            raise UserError(f"{program} has no line with {old!r}: it is not the program that is known here")
        source = source.replace(old, new.format(workers=config.workers, files=texts))
    (folder / "prepare.py").write_text(source, encoding="utf-8")
    (folder / "tiktoken").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        key = hashlib.sha1((URL + name).encode()).hexdigest()
        shutil.copyfile(Path(config.gpt2_bpe) / name, folder / "tiktoken" / key)
    variables = {"HF_HOME": str(folder / "hf"), "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken")}
    wall_s, cpu_s, memory = watched([sys.executable, str(folder / "prepare.py")], variables)
    tokens = sum((folder / f"{split}.bin").stat().st_size // 2 for split in ("train", "val"))
    return Run(wall_s, cpu_s, memory, tokens)


def ours(texts: list[str], config: Config, folder: Path) -> tuple[Run, int]:
    """A run of our program with nanoGPT's share for validation, and the bytes of the text."""
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *texts, f"--out={folder / 'out'}"]
    command += ["--tokenizer=gpt2", f"--gpt2_bpe={config.gpt2_bpe}", f"--workers={config.workers}"]
    wall_s, cpu_s, memory = watched([*command, "--val_fraction=0.0005", "--seed=2357"], {})
    splits = files.read_json(folder / "out" / "meta.json")["splits"].values()
    text = (folder / "out" / "tokenizer.json").read_text(encoding="utf-8")
    assert tokenizer.identify(text).kind == "gpt2"
    tokens = sum(split["tokens"] for split in splits)
    return Run(wall_s, cpu_s, memory, tokens), sum(split["text_bytes"] for split in splits)


def watched(command: list[str], variables: dict[str, str]) -> tuple[float, float, int]:
    """Run a command; its seconds, the processor seconds of it and its children, and the most memory."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    quiet = subprocess.DEVNULL
    running = subprocess.Popen(command, env={**os.environ, **variables}, stdout=quiet, stderr=quiet)
    memory = 0
    while running.poll() is None:
        memory = max(memory, sum(resident(process) for process in family(running.pid)))
        time.sleep(0.05)
    if running.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {running.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu_s, memory


def family(process: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    found = [process]
    for one in found:
        for listed in glob.glob(f"/proc/{one}/task/*/children"):
            try:
                found += map(int, Path(listed).read_text(encoding="ascii").split())
            except OSError:  # it has just ended
                continue
    return found


def resident(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def program() -> None:
    options = read(Config, sys.argv[1:], arguments=True)
    main(Config(**options.values), options.arguments)


if __name__ == "__main__":
    run_program(program)
