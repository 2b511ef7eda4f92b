"""Describe this machine and check run and dataset folders, for a bug report.

    python doctor.py                             # versions, processor, threads, compiler, devices
    python doctor.py out-novel data/novel        # also check these folders

Leaves out names of users and hosts, and of paths all but the last part, so that the output can be published.
The exit code is 2 if a folder has a problem.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from nanogpt import ROOT, checkpoint, files, metrics, runtime
from nanogpt.checkpoint import reader, writer
from nanogpt.config import read
from nanogpt.data import loader
from nanogpt.data.token_files import META
from nanogpt.errors import UserError, run_program
from nanogpt.gpu import availability
from nanogpt.inference import cpu_kernels
from nanogpt.tokenizer import vocabulary

PACKAGES = ("numpy", "safetensors", "tokenizers", "tiktoken", "transformers", "matplotlib", "starlette")
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "CUDA_", "NCCL_", "TORCH", "PYTORCH_")


@dataclass(frozen=True)
class Config:
    """No options: folders are given as arguments."""


def main(folders: list[str]) -> None:
    """Print the report. Raise UserError after it if a folder has a problem."""
    print("\n".join(machine()))
    bad = 0
    for folder in map(Path, folders):
        name = folder.absolute().name
        try:
            for line in check(folder):
                print(f"{name}: {line}")
        except (UserError, OSError) as error:
            bad += 1
            print(f"{name}: PROBLEM: {public(str(error), folder)}")
    if bad:
        raise UserError(f"{bad} of {len(folders)} folders have a problem, see above")


def public(text: str, folder: Path) -> str:
    """Return `text` without the path of `folder` and without the home folder."""
    for private in (str(folder.absolute().parent), str(Path.home())):
        text = text.replace(f"{private}{os.sep}", "")
    return text


def machine() -> Iterator[str]:
    """Yield lines about the software and the hardware."""
    commit = writer.git_commit(ROOT)
    yield f"nanogpt {version_of('nanogpt') or 'not installed'}" + f", commit {commit}" * bool(commit)
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield f"Python {platform.python_version()}, {system}"
    packages = ", ".join(f"{name} {version}" for name in PACKAGES if (version := version_of(name)))
    yield f"torch {torch.__version__}, {packages}"
    cpu = torch.device("cpu")
    half = "bfloat16" if runtime.has_bfloat16(cpu) else "no bfloat16"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield (
        f"processor: {processor()}, {torch.backends.cpu.get_cpu_capability()}, {half}; {cores} of "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    free = writer.free_memory()
    disk = shutil.disk_usage(".").free
    memory = f"{free / 1e9:.1f} GB of memory, " if free else ""
    yield f"free: {memory}{disk / 1e9:.1f} GB of disk space here"
    variables = sorted(name for name in os.environ if name.startswith(VARIABLES))
    hidden = {name: "..." for name in variables if {"/", "\\", "@"} & set(os.environ[name])}  # paths, hosts
    yield "environment: " + " ".join(f"{n}={hidden.get(n, os.environ[n])}" for n in variables)
    why = cpu_kernels.why_not()
    yield f"kernels for generation on a CPU: {f'torch, because {public(why, Path())}' if why else 'compiled'}"
    yield from devices()


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def devices() -> Iterator[str]:
    """Yield a line for each GPU, or why there is none."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        supported = "" if availability.supports(index) else ", too old for this build of torch"
        yield (
            f"cuda:{index}: {gpu.name}, {gpu.total_memory / 1e9:.1f} GB, compute capability "
            f"{gpu.major}.{gpu.minor}{supported}"
        )
    if not torch.cuda.is_available():
        yield f"cuda: {availability.why_no_cuda() or 'no NVIDIA GPU'}"
    if torch.backends.mps.is_available():
        yield "mps: available, untested (--device=mps)"


def check(folder: Path) -> Iterator[str]:
    """Yield lines about a run or a dataset folder. Raise UserError if something in it is wrong."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    steps, data = checkpoint.step_folders(folder), loader.split_files(folder, "train")
    if not (steps or data or (folder / metrics.NAME).is_file()):
        raise UserError(f"{folder} holds neither a run nor a dataset")
    if (folder / metrics.NAME).is_file():
        rows = metrics.read(folder)
        yield f"{len(rows):,} rows of metrics; {metrics.gap(rows) or 'not evaluated'}"
    for step in reversed(steps):
        saved = reader.verify(step)
        torch_then = saved.state.get("environment", {}).get("torch", "unknown")
        yield f"{step.name}: intact, {saved.model_config.n_layer} layers, torch {torch_then}"
    if data:
        dataset = loader.load(folder)
        meta = files.read_json(folder / "meta.json", META) if (folder / "meta.json").is_file() else {}
        for entry in [file for split in meta.get("splits", {}).values() for file in split["files"]]:
            if files.sha256(folder / entry["name"]) != entry.get("sha256"):
                raise UserError(f"{folder / entry['name']} is damaged: its SHA-256 differs from meta.json's")
        yield f"{len(dataset.train):,} training and {len(dataset.val):,} validation tokens, intact"
        kind = vocabulary.identify(dataset.tokenizer).kind
        yield f"vocabulary {dataset.vocab_size:,}, tokenizer {kind}"


def program() -> None:
    main(read(Config, sys.argv[1:], arguments=True).arguments)


if __name__ == "__main__":
    run_program(program)
