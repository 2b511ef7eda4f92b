"""Benchmark the training step of train.py, including data loading, clipping and optimizer.

    python bench.py                                               # GPT-2 (124M), 12 x 1024 tokens
    python bench.py config/train_shakespeare_char.py --device=cpu
    python bench.py --profile                                     # also profile by operation
    torchrun --standalone --nproc_per_node=8 bench.py --comm      # is the network fast enough?

Accepts all options and presets of train.py; those that only affect a whole run (intervals, schedule, folders)
are ignored.
"""

import math
import pickle
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import trange

import train
from nanogpt import ROOT, files, runtime
from nanogpt.config import Amount, FilePath, NonNegativeInt, PositiveInt, UnitInterval, load, pick_fields
from nanogpt.convert import weights
from nanogpt.distributed.world import Processes
from nanogpt.errors import UserError, run_program
from nanogpt.gpu import attention_kernels
from nanogpt.gpu.chips import peak_flops
from nanogpt.model import GPTConfig
from nanogpt.planning import comm_bench, estimate, scaling
from nanogpt.world import World


@dataclass(frozen=True)
class Config(train.Config):
    # timing
    steps: PositiveInt = 20  #: number of timed steps; by default fewer on a CPU, in a minute
    warmup_steps: NonNegativeInt = 10  #: number of untimed steps before them
    profile: bool = False  #: afterwards, profile 3 steps with torch.profiler
    trace: FilePath = "bench_trace.json"  #: Chrome trace file of --profile, for chrome://tracing or Perfetto
    # the network, under torchrun
    comm: bool = False  #: benchmark all-reduce and all-gather instead; can they keep up with this model?
    comm_bytes: Amount = 1 << 28  #: size of the largest message in bytes
    mfu: UnitInterval = 0.0  #: MFU assumed for the compute time of --comm; 0: measure a step
    overlap: UnitInterval = 0.9  #: fraction of the backward pass that can overlap with communication
    # data
    real_data: bool = True  #: False: random tokens, also read from a file
    vocab_size: PositiveInt = 50257  #: vocabulary size of random tokens; ignored with a dataset
    gradient_accumulation_steps: PositiveInt = 1  # micro-batches per step


PROFILED_STEPS = 3
CPU_S = 45.0  # seconds after which a CPU takes no more steps, unless --steps is given
MEASURED_STEPS = 3  # timed steps of --comm
WELL_FED = 0.9  # efficiency at which the network keeps up


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Run the benchmark and print the results. Raise UserError for invalid options."""
    if config.profile and not Path(config.trace).absolute().parent.is_dir():
        raise UserError(f"--trace={config.trace}: its folder does not exist; create it first")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        if config.comm:
            with train.resolve.join(asdict(config), Path(scratch)) as world:
                communicate(config, world, Path(scratch))
            return
        runtime.require_one_process()
        on_cpu = runtime.find_device(config.device).type == "cpu"
        if on_cpu and origins is not None and "batch_size" not in origins:
            print("on a CPU: --batch_size=1")
            config = replace(config, batch_size=1)
        bench = Bench(config, Path(scratch), origins)
        kernels = attention_kernels.of_a_run(config)
        with bench.run.machine.memory_errors(), kernels:
            print(bench.describe())
            timings, began = [], time.perf_counter()
            for _ in trange(config.warmup_steps + config.steps, disable=None, leave=False):
                timings.append(bench.step())
                late = on_cpu and "steps" not in (origins or {}) and time.perf_counter() - began > CPU_S
                if late and len(timings) > 1:
                    break
            untimed = min(config.warmup_steps, len(timings) // 3) if late else config.warmup_steps
            report(bench, *np.array(timings[untimed:]).T)
            if config.profile:
                profile(bench, Path(config.trace))


def with_data(config: Config, scratch: Path) -> Config:
    """Return `config` with a dataset that exists or, after printing why, random tokens in `scratch`."""
    why = " (--real_data=False)"
    if config.real_data:
        try:
            if config.dataset == Config.dataset:  # another one must exist
                train.resolve.open_data(config)
            return config
        except UserError as error:
            why = f", because {error}"
    print(f"data: random tokens, --vocab_size={config.vocab_size}{why}")
    ids = np.random.default_rng(config.seed).integers(config.vocab_size, size=(1 << 20) + config.block_size)
    dtype = "uint16" if config.vocab_size <= 1 << 16 else "uint32"
    for split in ("train", "val"):
        np.save(scratch / f"{split}_0.npy", ids.astype(dtype))
    (scratch / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": config.vocab_size}))
    return replace(config, dataset=str(scratch))


def with_shape(config: Config, origins: dict[str, str]) -> Config:
    """Return `config` with the shape of the weights that --init_from names, except for options given."""
    shape = asdict(weights.shape(config.init_from, ROOT, Path(config.out_dir)))
    taken = set(vars(config)) - {*origins, "dropout", "vocab_multiple"}
    return replace(config, **{name: value for name, value in shape.items() if name in taken})


class Bench:
    """A training run built by train.py, stepped one iteration at a time."""

    def __init__(self, config: Config, scratch: Path, origins: dict[str, str] | None = None):
        """`scratch`: folder for random tokens; `origins`: source of each given option."""
        if config.init_from not in ("scratch", "auto"):
            config = with_shape(config, origins or {})
        config = replace(config, init_from="scratch", eval_only=False, eval_tasks="", sample_prompt="")
        ready = with_data(config, scratch)
        self.run = train.build(ready, origins or {}, World())
        self.config, self.random = config, ready != config
        self.model, self.micro_batches, self.take_step = train.prepare_step(self.run)
        self.iter_num = 0

    @property
    def tokens_per_step(self) -> int:
        return self.run.batches.full * self.config.block_size

    def describe(self) -> str:
        chosen, data = self.run.config, self.run.dataset
        return "\n".join(
            [
                f"machine: {self.run.machine.reason}",
                *[f"data: {data.folder}, vocabulary {data.vocab_size:,}"] * (not self.random),
                f"model: {self.run.model.n_params():,} parameters",
                *self.run.notices,
                f"step: {chosen.gradient_accumulation_steps} x {chosen.batch_size} x {chosen.block_size} "
                f"= {self.tokens_per_step:,} tokens",
            ]
        )

    def step(self) -> tuple[float, float]:
        """Run one iteration; return its seconds, and the part of them spent waiting for data."""
        run, config = self.run, self.run.config
        waits: list[float] = []
        run.machine.synchronize()
        started = time.perf_counter()
        run.machine.seed(config.seed, self.iter_num)
        batches = watched(self.micro_batches(self.iter_num), waits)
        lr, clip = config.learning_rate, config.grad_clip
        loss, _ = self.take_step(self.model, run.optimizer, run.scaler, batches, lr, clip)
        float(loss)  # as train.py does when logging
        run.machine.synchronize()
        self.iter_num += 1
        return time.perf_counter() - started, sum(waits)


def watched(batches: Iterable[Any], waits: list[float]) -> Iterator[Any]:
    """Yield from `batches`, and append to `waits` the seconds spent waiting for each."""
    source = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(source, None)
        waits.append(time.perf_counter() - started)
        if batch is None:
            return
        yield batch


# ----------------------------------------------------------------------------- the network


def communicate(config: Config, world: World, scratch: Path) -> None:
    """Print timings of each collective, and whether the network can keep up with the model.

    Collective: call on all ranks. Raise UserError for a single process.
    """
    if not isinstance(world, Processes):
        raise UserError(
            "--comm measures communication between ranks, but there is only one: start it as for training, "
            "torchrun --standalone --nproc_per_node=2 bench.py --comm"
        )
    if config.batch_size == "auto":
        raise UserError("--comm needs the compute time of a micro-batch: give --batch_size a number")
    machine = world.raise_on_all_ranks(
        lambda: runtime.setup(config.device, config.dtype, config.n_embd, world)
    )
    nodes = -(-world.size // world.on_node)
    backend = config.backend if machine.device.type == "cuda" else "gloo"
    print(f"network: {world.size} ranks on {nodes} nodes, {backend}, {machine.name()}")
    for line in comm_bench.advice(backend, nodes):
        print(line)
    pass_s, source = pass_time(config, machine, scratch)
    bus = comm_bench.benchmark(world, machine, config.comm_bytes)
    judge(config, world.size, max(world.gather(pass_s)), source, bus)


def pass_time(config: Config, machine: runtime.Machine, scratch: Path) -> tuple[float, str]:
    """Return the seconds of a micro-batch on this rank, and a description of their source."""
    if config.mfu:
        peak = peak_flops(machine.name())
        if not peak:
            raise UserError(
                f"--mfu={config.mfu:g}: the peak FLOP/s of {machine.name()} is unknown; omit --mfu"
            )
        tokens = config.micro_batch_size * config.block_size
        flops = tokens * estimate.flops_per_token(pick_fields(GPTConfig, config))
        return flops / (peak * config.mfu), f"an MFU of {config.mfu:.0%}, as given"
    small = replace(config, real_data=False, batch_tokens=0, gradient_accumulation_steps=1)
    small = replace(small, device=str(machine.device), max_tokens=0)
    with machine.memory_errors(), attention_kernels.of_a_run(config):
        bench = Bench(small, scratch)
        took = [bench.step()[0] for _ in range(MEASURED_STEPS + 1)]
    return float(np.median(took[1:])), "measured on all ranks at once"


def judge(config: Config, ranks: int, pass_s: float, source: str, bus: float) -> None:
    """Print whether a bus bandwidth of `bus` bytes/s suffices for DDP, and the accumulation it needs."""
    size = estimate.FLOAT * estimate.parameters(pick_fields(GPTConfig, config)).total
    sent = scaling.bus_factor("all_reduce", ranks) * size
    transfer_s = sent / bus
    bucket_s = transfer_s / -(-size // scaling.BUCKET)
    waited = scaling.exposed_s(scaling.BACKWARD * pass_s, transfer_s, bucket_s, config.overlap)
    turns, tokens = config.gradient_accumulation_steps, config.micro_batch_size * config.block_size
    efficiency = turns * pass_s / (turns * pass_s + waited)
    enough = math.ceil(waited * WELL_FED / (1 - WELL_FED) / pass_s)
    print(
        f"gradients: {sent / 1e9:.3f} GB sent per rank and step (float32, DDP) at {bus / 1e9:.3f} "
        f"GB/s bus bandwidth (DDP's bucket size): {transfer_s * 1e3:,.1f} ms\n"
        f"compute: {pass_s * 1e3:,.1f} ms for {config.batch_size} x {config.block_size} = {tokens:,} "
        f"tokens ({source}); {config.overlap:.0%} of the last backward pass ({scaling.BACKWARD:.0%} of that) "
        f"can overlap with transfers, the last bucket cannot\n"
        f"this network {'can' if efficiency >= WELL_FED else 'cannot'} keep up with this model at {turns} x "
        f"{tokens:,} tokens per rank and step: {waited * 1e3:,.1f} ms of exposed communication, efficiency "
        f"{efficiency:.0%}"
    )
    if enough > turns:
        print(
            f"for {WELL_FED:.0%} use {enough} micro-batches per rank and step: "
            f"train.py --gradient_accumulation_steps={enough * ranks} (total over ranks)"
        )


# ----------------------------------------------------------------------------- figures


def report(bench: Bench, step_s: np.ndarray, wait_s: np.ndarray) -> None:
    """Print step time, throughput, and the achieved fraction of matmul speed and of peak FLOP/s."""
    low, median, high = np.percentile(step_s, [10, 50, 90])
    machine = bench.run.machine
    cost = bench.run.model.flops_per_token()
    achieved = cost * bench.tokens_per_step / median
    side, possible = matmul_speed(machine)
    spread = f"10th to 90th percentile: {low * 1e3:.2f} to {high * 1e3:.2f}"
    print(f"time: {median * 1e3:.2f} ms/step ({len(step_s)} steps, {spread})")
    print(f"speed: {bench.tokens_per_step / median:,.0f} tokens/s")
    print(f"waiting for data: {wait_s.sum() / step_s.sum():.2%} of the time")
    print(
        f"compute: {achieved / 1e12:.3g} TFLOP/s, {achieved / possible:.1%} of a {side} x {side} matmul "
        f"in {machine.dtype} here ({possible / 1e12:.3g} TFLOP/s)"
    )
    if peak := peak_flops(machine.name()):
        print(f"MFU: {achieved / peak:.1%} of the {peak / 1e12:.0f} TFLOP/s of {machine.name()}")


def matmul_speed(machine: runtime.Machine) -> tuple[int, float]:
    """Return the side of a large square matrix, and the FLOP/s of its product with itself: the median over
    about half a second."""
    from torch.utils.benchmark import Timer

    side = 2048 if machine.device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=machine.device).to(runtime.DTYPES[machine.dtype])
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return side, 2 * side**3 / timer.blocked_autorange(min_run_time=0.5).median


def profile(bench: Bench, trace: Path) -> None:
    """Write a Chrome trace of PROFILED_STEPS steps, and print the ten most expensive operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    on_cuda = bench.run.machine.device.type == "cuda"
    with recording(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]) as recorded:
        for _ in range(PROFILED_STEPS):
            bench.step()
    with files.staged(trace) as draft:
        recorded.export_chrome_trace(str(draft))
    print(f"profile of {PROFILED_STEPS} steps in {trace}:")
    cost = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=cost, row_limit=10, max_name_column_width=60))


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
