"""The parts of benchmarks/gpu.py without nanoGPT's train.py: device speed, decoding, saving, options."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode import theirs as nanogpt_model
from benchmarks.gpu_sides import Failed, Setup, environment, figure
from nanogpt import ROOT, optim
from nanogpt.checkpoint.writer import AsyncCheckpointer
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.graph_decode import GraphEngine
from nanogpt.inference.quantize import cast
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT, GPT2_SIZES, GPTConfig
from nanogpt.options import OptimizerOptions

SAMPLING = SamplingOptions(temperature=0.8, top_k=200)
SMALL = GPTConfig(vocab_size=300, block_size=64, n_layer=1, n_head=2, n_embd=32)


def wait(setup: Setup) -> None:
    if setup.device == "cuda":
        torch.cuda.synchronize()


def timed(setup: Setup, work: Callable[[], object]) -> float:
    wait(setup)
    started = time.perf_counter()
    work()
    wait(setup)
    return time.perf_counter() - started


def median_s(setup: Setup, work: Callable[[], object], seconds: float) -> float:
    """Return the median seconds per call of `work`, timed in batches of about 20 ms over `seconds`."""
    once = min(timed(setup, work) for _ in range(3))
    count = max(1, int(0.02 / once))
    took: list[float] = []
    while len(took) < 3 or sum(took) * count < seconds:
        took.append(timed(setup, lambda: [work() for _ in range(count)]) / count)
    return float(np.median(took))


def chip(setup: Setup) -> dict[str, Any]:
    """Measure bf16 matmul and memory copy speed, the reference of the other results."""
    side, count = (256, 1 << 20) if setup.tiny else (8192, 1 << 30)
    seconds = 0.1 if setup.tiny else min(2.0, setup.left / 8)
    device, dtype = setup.device, torch.bfloat16 if setup.device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rate = 2 * side**3 / median_s(setup, lambda: torch.mm(a, b), seconds)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    speed = 2 * source.nbytes / median_s(setup, lambda: target.copy_(source), seconds)
    return {
        "figures": [
            figure(f"product {side}^3 in {str(dtype)[6:]}, TFLOP/s", rate / 1e12),
            figure("copy, GB/s (read and written)", speed / 1e9),
        ]
    }


# ----------------------------------------------------------------------------- decoding


def decode(setup: Setup) -> dict[str, Any]:
    """Benchmark decoding of GPT-2 (124M, random weights) at batch 1, 10 and 64, and nanoGPT's default job of
    ten samples of 500 tokens, which it generates one by one."""
    shape, tokens = (SMALL, 16) if setup.tiny else (GPT2_SIZES["gpt2"], 400)
    dtype = "bfloat16" if setup.device == "cuda" else "float32"
    torch.manual_seed(0)
    ours = cast(GPT(shape).to(setup.device).eval(), dtype)  # on a CPU it would pack weights for the CPU
    theirs = nanogpt_model(setup.checkout, shape).to(setup.device)
    speed: dict[int, dict[str, float]] = {batch: {} for batch in (1, 10, 64)}
    job: dict[str, float] = {}
    count = tokens // 4 if setup.tiny else 500
    found: dict[str, Any] = {"figures": [], "errors": []}

    def add() -> None:
        best = {batch: max(values, key=lambda name: values[name]) for batch, values in mine(speed).items()}
        found["figures"] = [
            figure(
                f"decode 124M, batch {batch}, tokens/s",
                speed[batch][name],
                speed[batch]["nanoGPT"],
                note=f"{name}; {spoken(speed[batch])}",
            )
            for batch, name in best.items()
        ]
        if job:
            note = f"nanoGPT: one sample, times ten; ours {spoken(job)}"
            times = (min(job.values()), serial)
            found["figures"].append(figure("default sample job, s", *times, note=note, lower_is_better=True))
        setup.write(found)

    for batch, values in speed.items():
        values["nanoGPT"] = batch / their_token_s(setup, theirs, batch, tokens // 4)
    serial = 10 * timed(setup, lambda: their_token_s(setup, theirs, 1, count, warm=False))
    for kind in (Engine, GraphEngine):  # the one that may fail is last
        try:
            for batch, values in speed.items():
                decoder = kind(ours, batch, shape.block_size)
                values[kind.__name__] = batch / our_token_s(setup, decoder, batch, tokens)
                add()
            decoder = kind(ours, 10, min(shape.block_size, count + 1))
            job[kind.__name__] = timed(setup, lambda decoder=decoder: our_job(decoder, count))
        except Exception as error:  # CUDA graph capture may fail; shown in the table
            found["errors"].append(f"{kind.__name__}: {error}"[:300])
        add()
    return found


def mine(speed: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Drop nanoGPT's results, and batches without results."""
    ours = {batch: {n: v for n, v in values.items() if n != "nanoGPT"} for batch, values in speed.items()}
    return {batch: values for batch, values in ours.items() if values}


def spoken(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


@torch.inference_mode()
def their_token_s(setup: Setup, model: Any, batch: int, count: int, warm: bool = True) -> float:
    """Return the seconds per decoding step of nanoGPT's generate, with autocast as in its sample.py."""
    idx = torch.zeros(batch, 1, dtype=torch.int64, device=setup.device)
    with torch.autocast(setup.device, dtype=torch.bfloat16, enabled=setup.device == "cuda"):
        if warm:
            model.generate(idx, 3, temperature=0.8, top_k=200)
        return timed(setup, lambda: model.generate(idx, count, temperature=0.8, top_k=200)) / count


def our_token_s(setup: Setup, decoder: Engine, batch: int, count: int) -> float:
    """Return the seconds per decoding step; with CUDA graphs, without synchronizing between steps."""
    decoder.add([Text([0], SAMPLING, seed=i) for i in range(batch)])
    count = min(count, decoder.length - 16)
    if isinstance(decoder, GraphEngine):
        decoder.run(8)  # captures the graph
        decoder.run(count - 8)  # also captures longer caches
        texts = list(decoder.texts)
        for text in texts:
            decoder.remove(text)
        decoder.add([Text([0], SAMPLING, seed=i) for i in range(batch)])
        return timed(setup, lambda: decoder.run(count)) / count
    for _ in range(3):
        decoder.step()
    return timed(setup, lambda: [decoder.step() for _ in range(count)]) / count


def our_job(decoder: Engine, count: int) -> None:
    decoder.add([Text([0], SAMPLING, seed=i) for i in range(10)])
    for _ in range(count):
        decoder.step()


# ----------------------------------------------------------------------------- saving


def stall(setup: Setup) -> dict[str, Any]:
    """Measure how long a checkpoint of 124M with AdamW state blocks training, alternating between both sides;
    ours writes a copy in the background."""
    shape = SMALL if setup.tiny else GPT2_SIZES["gpt2"]
    ours = GPT(shape).to(setup.device)
    rules = optim.build(OptimizerOptions(), ours.named_parameters())
    theirs = nanogpt_model(setup.checkout, shape).to(setup.device)
    adam = theirs.configure_optimizers(0.1, 6e-4, (0.9, 0.95), setup.device)
    for p in theirs.parameters():
        p.grad = torch.zeros_like(p)
    adam.step()
    folder = Path(setup.scratch, "checkpoints")
    folder.mkdir()
    writer, out = AsyncCheckpointer(), folder / "ours"
    took: dict[str, list[float]] = {"theirs": [], "ours": []}
    complete: list[float] = []
    found: dict[str, Any] = {"figures": [], "seconds_of": took, "seconds_until_complete": complete}
    begun, rounds = time.monotonic(), 0
    while rounds < 2 or (rounds < 6 and setup.left > 1.5 * (time.monotonic() - begun) / rounds):
        rounds += 1
        saved = {"model": theirs.state_dict(), "optimizer": adam.state_dict()}
        took["theirs"].append(timed(setup, lambda saved=saved: torch.save(saved, folder / "ckpt.pt")))
        about, at = {"iter_num": rounds, "val_loss": None}, time.monotonic()
        given = (out, ours, rules.state(), about)
        took["ours"].append(timed(setup, lambda given=given: writer.save(*given)))
        writer.wait()
        complete.append(time.monotonic() - at)
        found["figures"] = stall_figures(took, complete)
        setup.write(found)
    return found


def stall_figures(took: dict[str, list[float]], complete: list[float]) -> list[dict[str, Any]]:
    """Return the medians over all saves except the first, in which ours allocates pinned memory."""
    middle = {name: float(np.median(times[1:] or times)) for name, times in took.items()}
    note = (
        f"time of the copy; first save, allocating pinned memory: {took['ours'][0]:.3g}; on disk, verified "
        f"and synced after {np.median(complete):.3g}; nanoGPT's is not synced"
    )
    return [
        figure("checkpoint stall 124M, s", middle["ours"], middle["theirs"], note=note, lower_is_better=True)
    ]


# ----------------------------------------------------------------------------- our options

TINY = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --batch_size=2 --gradient_accumulation_steps=1 "
    "--vocab_size=300 --steps=3 --warmup_steps=1 --compile=False"
)
TRIED = {
    "as it is": "",
    "--casting=weights": "--casting=weights",
    "--attention=cudnn": "--attention=cudnn",
    "--attention=flash": "--attention=flash",
    "--loss_chunk_size=8192": "--loss_chunk_size=8192",
    "--compile=blocks": "--compile=blocks",
    "--compile=False": "--compile=False",
    "--cuda_graph": "--cuda_graph=True --compile=False",
    "both at once": "--casting=weights --attention=cudnn",
    "as it is, again": "",
}


def bench(setup: Setup, preset: str, options: str, log: Path) -> str:
    """Run bench.py; return its stdout. Raise Failed if it exits with an error."""
    command = [
        sys.executable,
        "bench.py",
        preset,
        "--real_data=False",
        f"--device={setup.device}",
        *options.split(),
    ]
    if setup.tiny:
        command += TINY.split()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(Path(setup.scratch, "bench-cache")),
        capture_output=True,
        text=True,
        timeout=max(1.0, setup.left),
        check=False,
    )
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no output"])[-1][:300])
    return done.stdout


def options(setup: Setup) -> dict[str, Any]:
    """Benchmark each performance option separately, on GPT-2 (124M) and the character model; the baseline is
    measured first and last."""
    presets = {  # the faster one first
        "shakespeare_char": (
            "config/train_shakespeare_char.py",
            "--vocab_size=65 --steps=200 --compile=False",
        ),
        "124M": ("config/train_gpt2.py", "--batch_size=48 --gradient_accumulation_steps=1 --steps=30"),
    }
    found: dict[str, Any] = {"figures": [], "errors": []}
    for size, (preset, sizes) in presets.items():
        first = None
        for name, given in TRIED.items():
            if setup.left < 10:
                found["errors"].append(f"{size}, {name}: skipped, no time left")
                continue
            try:
                said = bench(setup, preset, f"{sizes} {given}", Path(setup.scratch, "bench.txt"))
                line = next(line for line in said.splitlines() if line.startswith("speed: "))
                speed = float(line.split()[1].replace(",", ""))
            except (Failed, subprocess.TimeoutExpired) as error:
                found["errors"].append(f"{size}, {name}: {error}"[:300])
                setup.write(found)
                continue
            first = first or speed
            note = "first column: ours without the option"
            found["figures"].append(figure(f"{size}, {name}, tokens/s", speed, first, note=note))
            setup.write(found)
        gc.collect()
    return found


def profile(setup: Setup) -> dict[str, Any]:
    """Profile our training step by kernel; writes text files to the output folder."""
    found: dict[str, Any] = {"figures": [], "files": []}
    sizes = "--batch_size=48 --gradient_accumulation_steps=1 --steps=10 --profile=True"
    for name in ("as it is", "--casting=weights", "--compile=False"):
        log = Path(setup.out, f"profile-{name.replace(' ', '-').strip('-')}.txt")
        trace = f"--trace={setup.scratch}/trace.json"
        bench(setup, "config/train_gpt2.py", f"{sizes} {trace} {TRIED[name]}", log)
        found["files"].append(log.name)
        setup.write(found)
    return found
