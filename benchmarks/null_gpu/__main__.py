"""Run train.py with every option on the null GPU, and check counts that need no GPU.

    python -m benchmarks.null_gpu --python=cuda-venv/bin/python --include=/usr/local/cuda/include --out=DIR

--python has torch's CUDA build (pip install torch==2.13.0 from PyPI, several GB), the requirements of this
project and no GPU; --include has the CUDA headers. nullcuda.cpp and cuda.c, compiled here, replace the CUDA
runtime, the driver, cuBLAS and NCCL: launches, waits, memory, order of collectives and errors are real,
values and times are not. Each line of the table is a run of a few iterations; it fails if it ends with an
error, waits for the GPU in a step, or exceeds a ceiling. docs/gpu.md records the last result.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train
from benchmarks import shared
from nanogpt import ROOT, files
from nanogpt.config import FilePath, load, pick_fields, read
from nanogpt.data import loader
from nanogpt.errors import UserError, run_program
from nanogpt.model import GPTConfig
from nanogpt.planning import estimate, scaling
from tests.conftest import words, write_dataset

HERE = Path(__file__).parent
SMALL = "--max_iters=8 --eval_interval=4 --eval_iters=2 --n_layer=2 --n_head=4 --n_embd=128 --block_size=64 "
SMALL += "--batch_size=4 --gradient_accumulation_steps=2 --warmup_iters=2 --overwrite=True --compile=False"
FAST = (
    "--position=rope --activation=relu2 --tied=False --softcap=15 --smear=True --init=zero --optimizer=muon "
)
FAST += "--qk_norm=True --norm=rms --dropout=0.1"
TABLES = "--ngram_orders=2,3,4 --ngram_rows=5000 --save_interval=2"
ONE = {
    "default": "",
    "dropout": "--dropout=0.1",
    "fast": FAST,
    "CUDA graph": "--cuda_graph=True --dropout=0.1",
    "CUDA graph, fast": f"--cuda_graph=True {FAST} --muon_weight_decay=0.1",
    "chunked loss": "--loss_chunk_size=50",
    "chunked loss, CUDA graph": "--loss_chunk_size=50 --cuda_graph=True",
    "casting weights": "--casting=weights",
    "casting weights to float16": "--casting=weights --dtype=float16",
    "float16": "--dtype=float16",
    "float16, Muon": "--dtype=float16 --optimizer=muon --dropout=0.1",
    "float32": "--dtype=float32",
    "deterministic": "--deterministic=True --dropout=0.1",
    "deterministic, CUDA graph": "--deterministic=True --cuda_graph=True --dropout=0.1",
    "activation checkpointing": "--activation_checkpointing=True --dropout=0.1",
    "ALiBi": "--position=alibi",
    "grouped queries": "--n_kv_head=2 --position=rope",
    "grouped queries, ALiBi": "--n_kv_head=2 --position=alibi",
    "automatic batch size": "--batch_size=auto --batch_tokens=4096",
    "batch ramp": "--batch_ramp_tokens=1024",
    "save in the background": "--save_interval=2",
    "no clipping": "--grad_clip=0",
    "efficient attention": "--attention=efficient",
    "math attention": "--attention=math",
    "compiled": "--compile=True",
    "compiled blocks": "--compile=blocks",
    "compiled, chunked loss": "--compile=True --loss_chunk_size=50",
    "n-gram tables": TABLES,
    "n-gram tables, CUDA graph": f"--cuda_graph=True {TABLES}",
    "n-gram tables, compiled": f"--compile=True {TABLES}",
    "n-gram tables, float16": f"--dtype=float16 {TABLES}",
    "n-gram tables, casting weights": f"--casting=weights {TABLES}",
}
TWO = {
    f"{mode}, {name}": f"--parallel={mode} --max_iters=14 {options}"
    for mode in ("ddp", "fsdp")
    for name, options in {
        "default": "",
        "fast": FAST,
        "float16": "--dtype=float16",
        "activation checkpointing": "--activation_checkpointing=True",
        "compiled": "--compile=True",
        "n-gram tables": TABLES,
        "n-gram tables, compiled": f"--compile=True {TABLES}",
    }.items()
    if mode == "ddp" or TABLES not in options
}
# Presets as they are, compiled: launches and Triton kernels of a step of two micro-batches, on one and on two
# GPUs. Peak memory must be within 5 % of plan.py's estimate.
LARGEST = 360e6  # parameters
WIDE = "--device=cuda --compile=True --eval_iters=1 --overwrite=True --max_tokens=0 --batch_tokens=0 "
WIDE += "--eval_tasks= --sample_prompt= --warmup_iters=2 --health_interval=0"
CEILINGS = {
    "quickstart": ((243, 216), (258, 220)),
    "train_fineweb_edu_10b": ((537, 434), (619, 482)),
    "train_gpt2": ((537, 434), (619, 482)),
    "train_gpt2_fast": ((792, 510), (819, 560)),
    "train_gpt2_medium": ((1048, 840), (1213, 936)),
    "train_gpt3_medium": ((1291, 1414), (1602, 1514)),
    "train_gpt3_small": ((660, 718), (816, 770)),
    "train_shakespeare_char": ((434, 308), (463, 316)),
    "train_shakespeare_char_cpu": ((252, 212), (267, 216)),
    "train_shakespeare_char_cpu_nanogpt": ((182, 176), (214, 176)),
    "train_shakespeare_char_medium": ((330, 308), (355, 316)),
    "train_shakespeare_char_nanogpt": ((286, 204), (334, 204)),
}


@dataclass(frozen=True)
class Config:
    python: FilePath = ""  # Python with torch's CUDA build
    include: FilePath = "/usr/local/cuda/include"  # CUDA headers
    out: FilePath = "out-null-gpu"  # folder for results.json, table.md and the output of failed runs
    only: str = ""  # run only lines whose name matches this regular expression
    timeout_s: int = 600  # seconds per run


def main(config: Config) -> None:
    if not Path(config.python).is_file():
        raise UserError(f"--python={config.python} is not a file; give a Python with torch's CUDA build")
    out = Path(config.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    if (out / "results.json").is_file():  # of earlier calls
        rows = {row["name"]: row for row in files.read_json(out / "results.json")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        environment = build(config, Path(scratch))
        data = write_dataset(Path(scratch, "words"), words(30_000))
        runs = [(f"1 GPU: {name}", 1, f"{SMALL} {options}", {}) for name, options in ONE.items()]
        runs += [(f"2 GPUs: {name}", 2, f"{SMALL} {options}", {}) for name, options in TWO.items()]
        folders = {"shakespeare_char": data, "openwebtext": gpt2_tokens(Path(scratch))}
        runs += [run for path in presets() for run in of_preset(path, folders)]
        for name, gpus, options, most in (run for run in runs if re.search(config.only, run[0])):
            given = options.split()
            if any(option.startswith("--batch_tokens=4096") for option in given):
                given.remove("--gradient_accumulation_steps=2")
            if not any(option.startswith("--dataset=") for option in given):
                given.append(f"--dataset={data}")
            row = one(config, name, gpus, [*given, f"--out_dir={scratch}/run"], environment, most, out)
            rows[name] = row
            print(f"{name}: {row['result']}", flush=True)
            files.write_json(out / "results.json", list(rows.values()))
            files.write_text(out / "table.md", table(list(rows.values())) + "\n")
    failed = sum(row["result"] != "ok" for row in rows.values())
    print(f"{len(rows) - failed} of {len(rows)} runs passed; {out / 'table.md'}")
    sys.exit(bool(failed))


def build(config: Config, scratch: Path) -> dict[str, str]:
    """Compile the stand-in; return the environment that puts it in place of the CUDA libraries."""
    asked = [config.python, "-c", "import nvidia; print(list(nvidia.__path__)[0])"]
    nvidia = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    runtime, driver = scratch / "libnullcuda.so", scratch / "libcuda.so.1"
    includes = [f"-I{nvidia}/cu13/include", f"-I{nvidia}/nccl/include", f"-I{config.include}"]
    flags = ["-std=c++17", "-shared", "-fPIC", "-O1", "-w", *includes, "-o", str(runtime)]
    subprocess.run(["g++", *flags, str(HERE / "nullcuda.cpp"), "-lpthread", "-ldl"], check=True)
    flags = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
    subprocess.run(["gcc", *flags, str(HERE / "cuda.c")], check=True)
    return os.environ | {
        "LD_LIBRARY_PATH": str(scratch),
        "LD_PRELOAD": str(runtime),
        "NULLGPU_RUNTIME": str(runtime),
        "NULLGPU_DRIVER": str(driver),
        "NULLCUDA_NCCL_LOG": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",  # the stand-in has no virtual memory
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # nor cuDNN
    }


def presets() -> list[Path]:
    """Return the presets of models with up to LARGEST parameters that differ in what they compute."""
    found: dict[Any, Path] = {}
    for path in sorted((ROOT / "config").glob("[!e]*.py")):
        config, _ = load(train.Config, [str(path)])
        shape = pick_fields(GPTConfig, config, vocab_size=GPTConfig.vocab_size)
        if config.init_from == "scratch" and estimate.parameters(shape).total <= LARGEST:
            found.setdefault((shape, config.batch_size, config.optimizer), path)
    return list(found.values())


def of_preset(path: Path, folders: dict[str, Path]) -> Iterator[tuple[str, int, str, dict[str, float]]]:
    """Yield the runs of a preset on one and on two GPUs: name, GPUs, options, ceilings."""
    config, _ = load(train.Config, [str(path)])
    folder = folders.get(config.dataset, folders["openwebtext"])
    shape = pick_fields(GPTConfig, config, vocab_size=loader.load(folder).vocab_size)
    for gpus in (1, 2):
        options, sizes = pick_fields(scaling.ClusterOptions, config), [config.batch_size] * 2
        need = scaling.memory(shape, options, "ddp", gpus, sizes, compiled=True)
        most = {"estimate": need.total / 1e9}
        if path.stem in CEILINGS:
            most |= dict(zip(("launches", "triton"), CEILINGS[path.stem][gpus - 1], strict=True))
        steps = f"--max_iters={4 if gpus == 1 else 14} --eval_interval={4 if gpus == 1 else 14} "
        steps += f"--gradient_accumulation_steps={2 * gpus} --parallel=ddp --dataset={folder}"
        yield f"{gpus} GPU{'s' * (gpus > 1)}: {path.stem}", gpus, f"{path} {WIDE} {steps}", most


def gpt2_tokens(scratch: Path) -> Path:
    """Return a dataset of GPT-2 tokens, bare files as nanoGPT writes them."""
    folder = scratch / "tokens"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(bytes(2 * 40_000))
    return folder


def one(
    config: Config,
    name: str,
    gpus: int,
    options: Sequence[str],
    environment: dict[str, str],
    most: dict[str, float],
    out: Path,
) -> dict[str, Any]:
    """Run one line of the table; return its counts and result."""
    launch = [config.python, "-m", "benchmarks.null_gpu.worker"]
    if gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "-m"]
        launch = [config.python, *launcher, "benchmarks.null_gpu.worker"]
    step = "3" if gpus == 1 else "13"  # in its first ten steps DDP waits for timers
    there = environment | {"NULLCUDA_DEVICES": str(gpus), "NULLGPU_STEP": step}
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*launch, *options], cwd=ROOT, env=there, capture_output=True, text=True, timeout=config.timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "result": f"not done after {config.timeout_s} s"}
    said = done.stdout + done.stderr
    lines = [line for line in said.splitlines() if line.startswith('{"steps"')]
    counts = json.loads(lines[-1]) if lines else {}
    expected = most.pop("estimate", None)
    wrong = [f"{key} {counts.get(key)} > {top}" for key, top in most.items() if counts.get(key, 1e9) > top]
    if expected:
        counts["estimate"] = round(expected, 4)
        if abs(counts.get("gigabytes", 0) / expected - 1) > 0.05:
            wrong.append(f"{counts.get('gigabytes')} GB, not {expected:.4g}")
    if done.returncode or not lines:
        wrong.append((said.strip().splitlines() or [""])[-1][:100])
    elif counts["waits"] and "float16" not in name:  # the gradient scaler reads one value
        wrong.append(f"{counts['waits']} waits in a step")
    if "torch.compile failed" in said:
        wrong.append("torch.compile failed")
    if gpus > 1:
        counts["communicators"] = said.count("communicator of")
        counts["nccl"] = collections.Counter(re.findall(r"nullcuda\[0\]: (\w+) \d+ type", said))
        if counts["communicators"] > gpus:
            wrong.append(f"{counts['communicators']} communicators")
    if wrong:
        (out / f"{name.replace(' ', '-').replace(':', '').replace(',', '')}.txt").write_text(said)
    return {"name": name, **counts, "seconds": time.monotonic() - started, "result": "; ".join(wrong) or "ok"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    keys = ("launches", "triton", "waits", "gigabytes", "estimate", "result")
    cells = [[row["name"], *(str(row.get(key, "")) for key in keys)] for row in rows]
    return shared.markdown(["run", "launches", "Triton", "waits", "GB", "estimate", "result"], cells)


if __name__ == "__main__":
    run_program(lambda: main(Config(**read(Config, sys.argv[1:]).values)))
