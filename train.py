"""Train or finetune a GPT.

    python train.py config/train_shakespeare_char.py              # a preset
    python train.py config/train_shakespeare_char.py --batch_size=32
    python train.py config/quickstart.py --dataset=novel.txt --out_dir=out-mine --minutes=5    # your own text
    python train.py --out_dir=out-mine --init_from=resume         # continue a stopped run
    python train.py config/finetune_shakespeare.py                # from GPT-2's weights

On Ctrl-C, SIGTERM or after --max_minutes, training finishes the iteration, saves a checkpoint and exits with
code 75; the same command with --init_from=auto resumes. The run folder holds everything needed to sample or
export; to resume, the dataset is needed too.
"""

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

STARTED = time.perf_counter()  # start of the process, for --minutes

from nanogpt import ROOT, command, quoted
from nanogpt.config import NonNegativeFloat, NonNegativeInt, PositiveInt, UnitInterval, load
from nanogpt.errors import Diverged, Stopped, run_program
from nanogpt.options import Origins, TrainOptions

Schedule = Literal["cosine", "linear", "wsd", "constant"]
Trackers = Literal["none", "tensorboard", "wandb", "tensorboard,wandb", "wandb,tensorboard"]


# A field's comment is its help text: --help shows those that start with `#:`, --help=all shows all.
@dataclass(frozen=True)
class Config(TrainOptions):
    """All training options: those of nanogpt/options.py plus evaluation, logging, checkpoints, schedule."""

    # evaluation, logging, checkpoints
    eval_interval: PositiveInt = 2000  #: iterations between evaluations of both splits
    eval_iters: PositiveInt = 200  #: micro-batches per split, or all if it has fewer; always the same ones
    log_interval: PositiveInt = 1  # iterations between log lines
    save_interval: NonNegativeInt = 0  # checkpoint every N iterations and at each new best; 0: at evaluations
    save_minutes: NonNegativeFloat = 10.0  # maximum minutes between checkpoints; 0: no limit
    always_save_checkpoint: bool = True  # False: after an evaluation, save only if the loss improved
    health_interval: NonNegativeInt = 0  # iterations between checks of gradients and activations; 0: none
    verbose: bool = False  # print all options that differ from their defaults
    max_minutes: NonNegativeFloat = 0.0  # save and exit after N minutes, start-up excluded; 0: no limit
    # learning rate schedule
    decay_lr: bool = True  # False: constant, without warmup
    lr_schedule: Schedule = "cosine"  # learning rate decay after warmup; wsd: constant, then linear
    warmup_iters: NonNegativeInt = 2000  #: iterations of linear warmup
    lr_decay_iters: NonNegativeInt = 0  # iteration at which min_lr is reached; 0: max_iters
    min_lr: NonNegativeFloat = 6e-5  #: final learning rate (AdamW), reached at max_iters or lr_decay_iters
    lr_cooldown: UnitInterval = 0.4  # wsd: final fraction of lr_decay_iters in which the rate decays
    # experiment tracking
    track: Trackers = "none"  #: also log to TensorBoard, Weights & Biases or both
    wandb_log: bool = False  # the same as --track=wandb
    wandb_project: str = "owt"  # W&B project
    wandb_run_name: str = "gpt2"  # W&B run name

    def problems(self, origins: Origins) -> list[str]:
        wrong = []
        if self.decay_lr and self.lr_schedule != "constant":
            peak, end, warmup = self.learning_rate, self.lr_decay_iters, self.warmup_iters
            if self.min_lr > peak:
                wrong.append(f"min_lr={self.min_lr} is above learning_rate={peak}; lower --min_lr")
            if 0 < end < warmup:
                wrong.append(f"lr_decay_iters={end} is below warmup_iters={warmup}; raise --lr_decay_iters")
        return wrong


# Parse the command line before importing torch, so that --help and errors in options appear immediately.
PARSED = run_program(lambda: load(Config, sys.argv[1:])) if __name__ == "__main__" else None

# ruff: noqa: E402
gc.disable()  # imports create little garbage, and collections during them take 0.1 s
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from nanogpt import files, metrics, optim, resolve, runtime, validation
from nanogpt.checkpoint import Progress, evaluated_on, writer
from nanogpt.loss import default_loss_chunk_size
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Layout, Optimizer, clip_gradients
from nanogpt.pace import Pace
from nanogpt.pace.stop import StopRequest
from nanogpt.world import World

if TYPE_CHECKING:
    from nanogpt.evaluation.in_training import InTrainingEvaluation

gc.freeze()
gc.enable()


@dataclass
class Run(resolve.Setup[Config]):
    """State of a training run: the resolved Setup (config, dataset, ...), model, optimizer and progress."""

    model: GPT  # not its DDP or torch.compile wrapper; FSDP shards it in place (gather_model)
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    tasks_and_samples: "InTrainingEvaluation | None"  # None: neither --eval_tasks nor --sample_prompt
    writer: writer.AsyncCheckpointer  # writes checkpoints, on rank 0
    lock: FileLock | None = None  # lock on out_dir, on rank 0
    started: float = field(default_factory=time.perf_counter)  # perf_counter() when this process started

    def total_clock_s(self) -> float:
        """Return the wall-clock seconds of all sessions of the run so far, start-up included."""
        return self.progress.clock_s + time.perf_counter() - self.started

    @property
    def out_of_patience(self) -> bool:
        """Return whether the loss did not improve in the last --patience evaluations, which ends the run."""
        return 0 < self.config.patience <= self.progress.stale


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Train as specified by `config`. `origins` gives the source ("--seed=1", "config/x.py") of each option
    that was set; None: all that differ from their defaults. Raise UserError, Diverged, OSError or Stopped,
    which errors.run_program maps to exit codes."""
    started = STARTED if PARSED else time.perf_counter()
    if origins is None:
        origins = {f.name: "given" for f in fields(config) if getattr(config, f.name) != f.default}
    with StopRequest() as stop, resolve.join(asdict(config), Path(config.out_dir)) as world:
        if not config.eval_only:
            world.require_visible(Path(config.out_dir))
        run = world.raise_on_all_ranks(lambda: build(config, origins, world))
        config, run.started = run.config, started
        presets = dict.fromkeys(o for o in origins.values() if o.endswith(".py"))
        flags = dict.fromkeys(o for o in origins.values() if o.startswith("--"))
        print(*run.notices, f"options: {' '.join(presets | flags) or 'defaults'}", sep="\n")
        if config.verbose:
            from nanogpt.usage import non_defaults

            print(*non_defaults(config, origins), sep="\n")
        print(run.describe(run.model))
        if config.eval_only:
            evaluate(run, stop)
            return
        if run.resumed and run.progress.position(config) >= config.max_iters:
            length = f"{config.minutes:g} minutes" if config.minutes else f"{config.max_iters} iterations"
            raised = "--minutes" if config.minutes else "--max_iters"
            print(f"{config.out_dir} has completed all {length}; raise {raised}")
            return
        if run.out_of_patience:
            print(f"{config.out_dir} was stopped early by --patience={config.patience}; raise it to resume")
            return
        print(writer.require_space(Path(config.out_dir), run.model))
        run.lock = world.rank_zero_only(lambda: files.lock(Path(config.out_dir)))
        kernels_in_use: AbstractContextManager[None] = nullcontext()
        if config.attention != "auto" or config.deterministic or run.machine.device.type == "cuda":
            from nanogpt.gpu import attention_kernels

            kernels_in_use = attention_kernels.of_a_run(config)
        try:
            with closing(metrics.Log()) as log, run.machine.memory_errors(), kernels_in_use:
                loop(run, log, stop)
        finally:
            run.writer.close()
            if run.lock:
                run.lock.release()
            print_saved(run)


# ----------------------------------------------------------------------------- setup


def build(config: Config, origins: dict[str, str], world: World) -> Run:
    """Build the run specified by `config`, writing nothing to out_dir. Add to `origins` the options set by
    loaded weights, --batch_tokens, --max_tokens or "auto". Raise UserError listing all invalid options."""
    setup = resolve.decide(config, origins, world, try_batch_size)
    config, machine, notices, resumed = setup.config, setup.machine, setup.notices, setup.resumed
    model = make_model(config, machine, setup.model_config, setup)
    if config.freeze or config.train_only or config.lora_rank:
        from nanogpt.finetune import freeze

        notices += freeze.choose_trained(model, config)
    layout = Layout()
    if setup.division:
        from nanogpt.distributed import parallelize

        layout = parallelize.lay_out(model, machine, setup.division)
    if config.activation_checkpointing:
        from nanogpt.compile import checkpoint_activations

        checkpoint_activations(model, machine)
    optimizer = make_optimizer(config, model, machine, layout)
    if config.optimizer == "muon" and not any(optim.is_for_muon(name, p) for name, p in optimizer.named):
        notices.append("no trainable matrices for Muon, which is not used; --learning_rate applies")
    if config.decay_lr and config.max_iters <= config.warmup_iters:
        longer = f"warmup_iters={config.warmup_iters} is not less than max_iters={config.max_iters}"
        notices.append(f"note: {longer}, so the learning rate never reaches learning_rate")
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
    if layout.sharded and scaler.is_enabled():
        scaler = parallelize.sharded_scaler(machine)
    seen = validation.counts(setup.dataset, (config.micro_batch_size, config.block_size), config.eval_iters)
    setup.dataset.evaluated = f"{seen} of {config.block_size}{', masked' * (config.documents == 'masked')}"
    progress = Progress()
    if resumed:
        from nanogpt.checkpoint.resume import load_optimizer, restore_progress

        progress = restore_progress(
            resumed, config, setup.dataset, setup.batches, machine, learning_rate, notices
        )
        load_optimizer(resumed, optimizer.state_shards())
        if resumed.state["scaler"]:  # empty if it was saved without loss scaling
            scaler.load_state_dict(resumed.state["scaler"])
    tasks_and_samples = None
    if config.eval_tasks or config.sample_prompt:
        from nanogpt.evaluation.in_training import InTrainingEvaluation

        out_dir, tokenizer = Path(config.out_dir), setup.dataset.tokenizer
        tasks_and_samples = InTrainingEvaluation(config, out_dir, tokenizer, machine, layout.sharded)
    return Run(
        **vars(setup),
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        progress=progress,
        tasks_and_samples=tasks_and_samples,
        writer=writer.AsyncCheckpointer(),
    )


def make_model(
    config: Config, machine: runtime.Machine, model_config: GPTConfig, setup: resolve.Setup[Any] | None = None
) -> GPT:
    """Build the model from the checkpoint or pretrained weights of `setup`, or initialize it from the seed if
    there are none. Unless resumed, add new LoRA adapters if --lora_rank is set."""
    if setup and setup.resumed:
        model = setup.resumed.load_model(setup.init_device, config.dropout).train()
    else:
        torch.manual_seed(config.seed)
        if setup and setup.pretrained:
            model = setup.pretrained.load(model_config, setup.init_device).train()
        else:
            model = GPT(model_config).to(setup.init_device if setup else machine.device)
        if adapted := lora_config(config):
            from nanogpt.finetune import lora

            lora.adapt(model, lora.Adapters(**adapted))
            lora.initialize(model, config.seed)
    tokens = config.micro_batch_size * config.block_size
    default = default_loss_chunk_size(machine.device, tokens, model_config.vocab_size)
    model.loss_chunk_size = config.loss_chunk_size or default
    return model


def make_optimizer(config: Config, model: GPT, machine: runtime.Machine, layout: Layout) -> Optimizer:
    """Build the optimizer of the trainable parameters; with --eval_only its state is on the meta device."""
    named: Iterable[tuple[str, Tensor]] = model.named_parameters()
    if config.eval_only:
        named = ((n, torch.empty(p.shape, device="meta", requires_grad=p.requires_grad)) for n, p in named)
        layout = Layout()
    return optim.build(config, named, model.part_heights(), machine.half, layout)


def try_batch_size(config: Config, machine: runtime.Machine, model_config: GPTConfig, sequences: int) -> None:
    """Run two iterations (memory is fragmented in the second) of a new model with this many sequences per
    micro-batch, for --batch_size=auto. Raise torch.OutOfMemoryError if they do not fit on a GPU."""
    from nanogpt import compile

    config = replace(config, batch_size=sequences)
    alone = replace(machine, world=World())  # single process: no collectives
    model = make_model(config, alone, model_config)
    if config.activation_checkpointing:
        compile.checkpoint_activations(model, alone)
    function = compile.any_size(alone.in_dtype(model), config.compile, model.h)
    optimizer = make_optimizer(config, model, alone, Layout())
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
    tokens = torch.zeros(2, sequences, config.block_size, dtype=torch.int64, device=machine.device)
    for _ in range(2):
        train_step(function, optimizer, scaler, [(1.0, tuple(tokens))], 0.0, config.grad_clip)
    machine.synchronize()


def prepare_step(run: Run, log: metrics.Log | None = None) -> tuple[Any, Any, Any]:
    """Return (function, micro_batches, take_step) for the training loop.

    function(idx, targets[, documents]) returns (logits or None, loss) in mixed precision, compiled if
    configured; with several ranks its backward pass averages gradients. micro_batches(iter_num) yields
    (loss weight, inputs) pairs. `take_step` is train_step or a wrapper of it.
    """
    config, machine, batches = run.config, run.machine, run.batches
    several = machine.world.size > 1
    function, take_step = machine.in_dtype(run.model), train_step
    micro_batches: Callable[..., Any] = batches.weighted
    if batches.tokens.scored:
        from nanogpt.data import responses

        micro_batches = partial(responses.weighted, batches)
    if several:
        from nanogpt.distributed import parallelize

        function = parallelize.connect(run.model, machine)
    if config.compile:
        from nanogpt import compile

        function = compile.train_function(function, config.compile, run.model, run.optimizer, batches)
    if several:
        micro_batches = partial(parallelize.micro_batches, batches, machine.world, function)
        take_step = parallelize.step_of_all(train_step, run, log)
    elif config.cuda_graph:  # single process only (cuda_graphs.require_recordable)
        from nanogpt.gpu import cuda_graphs

        take_step = cuda_graphs.StepGraph(train_step, batches.full, machine)
    if config.health_interval and log and machine.world.is_main_process:
        from nanogpt.diagnostics import health

        take_step = health.watch(take_step, run, log)
    return function, micro_batches, take_step


# ----------------------------------------------------------------------------- one iteration


def train_step(
    function: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Iterable[tuple[float | Tensor, tuple[Tensor, ...]]],
    lr: float | Tensor,
    grad_clip: float,
) -> tuple[Tensor, Tensor]:
    """Run one optimizer step with the mean gradient of `micro_batches`.

    Each is (loss weight, inputs), where inputs is (idx, targets[, documents]). The loss weights, averaged
    over ranks, sum to 1. Return the loss and the gradient norm before clipping, as 0-d tensors on the device;
    reading their values synchronizes.
    """
    total: Any = 0.0
    for weight, inputs in micro_batches:
        loss = function(*inputs)[1] * weight  # frees the logits before the backward pass
        scaler.scale(loss).backward()  # loss is scaled for float16 only
        total += loss.detach()
    torch_optimizer = cast(torch.optim.Optimizer, optimizer)  # implements all that GradScaler uses
    scaler.unscale_(torch_optimizer)
    grad_norm = clip_gradients(optimizer.parameters, grad_clip, optimizer.layout)
    optimizer.lr = lr
    scaler.step(torch_optimizer)
    scaler.update()
    optimizer.zero_grad()
    return total, grad_norm


def check_finite(loss: Tensor, grad_norm: Tensor, iter_num: int, lr: float, scaled: bool) -> None:
    """Raise Diverged if the loss or the gradient norm is not finite. With loss scaling (float16) a non-finite
    gradient norm is allowed: the scaler has skipped that step."""
    if not math.isfinite(float(loss)) or not (scaled or math.isfinite(float(grad_norm))):
        raise Diverged(
            f"loss {float(loss)}, gradient norm {float(grad_norm)} at iteration {iter_num} with learning "
            f"rate {lr:.3g}; resume from the last checkpoint with a smaller --learning_rate "
            f"(--init_from=resume)"
        )


def learning_rate(config: Config, iter_num: float) -> float:
    """Return the learning rate at iteration `iter_num` (from 0; with --minutes: completed share * max_iters).

    It rises linearly over `warmup_iters` iterations (never 0: the first is peak / (warmup_iters + 1)), then
    falls from `learning_rate` to `min_lr` at iteration `lr_decay_iters` (0: `max_iters`) and stays there.
    Without `decay_lr` it is always `learning_rate`.

    - cosine:   half a cosine, as in GPT-3 (Brown et al. 2020, appendix B) and nanoGPT
    - linear:   a straight line
    - wsd:      constant, then linear over the last `lr_cooldown` * `lr_decay_iters` (Hu et al. 2024)
    - constant: no decay after the warmup
    """
    peak, floor, warmup = config.learning_rate, config.min_lr, config.warmup_iters
    if not config.decay_lr:
        return peak
    if iter_num < warmup:
        return peak * (iter_num + 1) / (warmup + 1)
    if config.lr_schedule == "constant":
        return peak
    start, end = warmup, config.lr_decay_iters or config.max_iters
    if config.lr_schedule == "wsd":
        start = max(warmup, round(end * (1 - config.lr_cooldown)))
    done = min(1.0, max(0.0, (iter_num - start) / max(1, end - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    return floor + (peak - floor) * left


# ----------------------------------------------------------------------------- training loop


def loop(run: Run, log: metrics.Log, stop: StopRequest) -> None:
    """Train until the schedule ends or the run is stopped; evaluate, log and save along the way."""
    config, progress, machine, world = run.config, run.progress, run.machine, run.machine.world
    function, micro_batches, take_step = prepare_step(run, log)
    deadline = time.perf_counter() + config.max_minutes * 60 if config.max_minutes else math.inf
    last_saved_iter, last_saved_time = progress.iter_num or -1, time.perf_counter()
    unlogged_s, unlogged_iters, pending_check = 0.0, 0, None
    pace = open_pace(run)
    hidden = None if world.is_main_process else True  # None: disabled if stderr is not a terminal
    style = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}" if config.minutes else None
    bar = tqdm(total=config.max_iters, initial=pace.position, disable=hidden, unit="it", bar_format=style)
    logged_tokens = run.batches.tokens_before(progress.iter_num)  # tokens seen at the last log line
    while True:
        # between iterations: evaluate, save, check whether to stop
        row: dict[str, Any] = {}
        completed, due = pace.over, pace.evaluation_due(config.eval_interval)
        if due and progress.val_loss is None:
            began = time.perf_counter()
            row = evaluate(run, stop)
            completed = completed or run.out_of_patience
            world.raise_on_all_ranks(partial(pace.count_evaluation, time.perf_counter() - began))
        record(run, log, row)
        write = partial(log.write, "tasks", progress.iter_num, run.batches.tokens_before(progress.iter_num))
        for line in run_tasks(run, due or completed, write, stop):
            tqdm.write(line)
        if not stop.reason and time.perf_counter() >= deadline:
            stop.reason = f"--max_minutes={config.max_minutes:g}"
        leaving = world.any_rank(bool(stop.reason) or run.writer.failed) or completed  # the same on all ranks
        late = 0 < config.save_minutes <= (time.perf_counter() - last_saved_time) / 60
        planned = is_time_to_save(run, pace.passed(config.save_interval))
        save_due = planned or (config.save_minutes > 0 and world.any_rank(late))
        if last_saved_iter != progress.iter_num and (leaving or save_due):
            if pending_check:
                pending_check()
            save(run)
            last_saved_iter, last_saved_time = progress.iter_num, time.perf_counter()
        print_saved(run)
        if leaving:
            bar.close()
            finish(run, stop, completed)
            return

        # one iteration
        started = time.perf_counter()
        pace.begin_iteration()
        # Batch ramp-up: gradients of smaller batches are noisier, so scale lr by the square root of the
        # batch size relative to the full one (Malladi et al. 2022).
        lr_scale = math.sqrt(run.batches.sequences(progress.iter_num) / run.batches.full)
        lr = lr_scale * learning_rate(config, pace.position)
        machine.seed(config.seed, progress.iter_num)
        batches = micro_batches(progress.iter_num)
        loss, grad_norm = take_step(function, run.optimizer, run.scaler, batches, lr, config.grad_clip)
        scaled = run.scaler.is_enabled()
        pending_check = partial(check_finite, loss, grad_norm, progress.iter_num, lr, scaled)
        is_logged = progress.iter_num % config.log_interval == 0
        if is_logged:
            pending_check()  # synchronizes with the device
        took_s = time.perf_counter() - started
        progress.elapsed_s += took_s
        unlogged_s, unlogged_iters = unlogged_s + took_s, unlogged_iters + 1
        if is_logged:
            tokens, step_s = run.batches.tokens_before(progress.iter_num + 1), unlogged_s / unlogged_iters
            log.step(
                progress.iter_num,
                tokens=tokens,
                step_s=step_s,
                speed=(tokens - logged_tokens) / unlogged_s,
                lr=lr,
                elapsed_s=progress.elapsed_s,
                share=progress.share,
                left_s=pace.left_s(step_s, config.eval_interval),
                loss=float(loss),
                grad_norm=float(grad_norm),
                clipped=0 < config.grad_clip < float(grad_norm),
            )
            unlogged_s, unlogged_iters, logged_tokens = 0.0, 0, tokens
        progress.val_loss = None
        pace.end_iteration(took_s, run.writer.took_s)
        bar.update(pace.position - bar.n)
        bar.set_postfix(log.state, refresh=False)


def open_pace(run: Run) -> Pace:
    """Return the Pace of the run, which counts iterations or, with --minutes, time."""
    if run.config.minutes:
        from nanogpt.pace.time_budget import TimeBudget

        return TimeBudget(run.config, run.progress, run.batches, run.total_clock_s, run.machine.world)
    if run.progress.ramp:  # started with --minutes, resumed without
        run.batches.set_ramp(run.progress.ramp)
    return Pace(run.config, run.progress)


def run_tasks(run: Run, evaluating: bool, write: Callable[..., None], stop: StopRequest) -> Iterator[str]:
    """Run tasks and sampling if `evaluating`, and yield the lines to print. Collective: call on all ranks."""
    iter_num = run.progress.iter_num
    if not run.tasks_and_samples or not evaluating:
        return
    if run.machine.world.any_rank(run.tasks_and_samples.due(iter_num)) and (model := gather_model(run)):
        model = model.to(run.machine.device)  # no-op unless gathered to the CPU
        yield from run.tasks_and_samples.maybe_run(model, iter_num, write, stop.asked)


def evaluate(run: Run, stop: StopRequest) -> dict[str, Any]:
    """Evaluate both splits; return the row to log, {} if interrupted. Collective: call on all ranks."""
    config, progress = run.config, run.progress
    run.machine.world.report_phase(progress.iter_num, "evaluating")
    shape, separator = (config.micro_batch_size, config.block_size), run.batches.separator
    evaluations = validation.evaluate_splits(
        run.model, run.dataset, shape, config.eval_iters, run.machine, stop.asked, separator
    )
    if evaluations is None:  # interrupted; a resumed run repeats this evaluation
        return {}
    train, val = evaluations
    details = val.describe(run.dataset.bytes_per_token)
    tqdm.write(f"step {progress.iter_num}: train loss {train.loss:.4f}, val loss {val.loss:.4f} ({details})")
    improved = progress.best_val_loss is None or val.loss < progress.best_val_loss
    progress.val_loss, progress.stale = val.loss, 0 if improved else progress.stale + 1
    if improved:
        progress.best_val_loss = val.loss
    return {
        "train_loss": train.loss,
        "val_loss": val.loss,
        "val_stderr": val.stderr,
        **({"val_losses": val.parts} if val.parts else {}),
        "elapsed_s": progress.elapsed_s,
        "share": progress.share,
        "peak_memory_bytes": writer.peak_memory(run.machine.device),
    }


def finish(run: Run, stop: StopRequest, completed: bool) -> None:
    """Wait for the pending checkpoint and report the outcome. Raise Stopped if the run is incomplete."""
    run.machine.world.rank_zero_only(run.writer.wait)
    print_saved(run)
    if not completed:
        by, place = stop.reason or "another rank", f"iteration {run.progress.iter_num}"
        resume = f"{command('train')} {quoted(f'--out_dir={run.config.out_dir}')} --init_from=resume"
        raise Stopped(f"stopped by {by} at {place}; checkpoint saved, resume with {resume}")
    config = run.config
    longer = f"--minutes={2 * config.minutes:g}" if config.minutes else f"--max_iters={2 * config.max_iters}"
    if run.out_of_patience:
        print(f"early stopping: no improvement in {run.progress.stale} evaluations (--patience)")
        longer = f"--patience={2 * config.patience}"
    if run.machine.world.is_main_process and (run.dataset.folder / "baseline.json").is_file():
        from nanogpt.evaluation import counting

        print(counting.compared(Path(config.out_dir)), end="")
    peak = writer.peak_memory(run.machine.device)
    print(metrics.final_lines(config.out_dir, run.total_clock_s(), run.progress.clock_s, peak, longer))
    if (ROOT / f"benchmarks/reference/{Path(config.dataset).name}-{config.max_iters}.json").is_file():
        from nanogpt.diagnostics import reference  # recorded runs of the same dataset and length

        print(reference.final_line(Path(config.out_dir)), end="")
    if config.minutes and (not run.resumed or run.resumed.state["options"].get("minutes") == config.minutes):
        from nanogpt.pace.time_budget import repeated

        print(f"to repeat this schedule, replace --minutes by: {repeated(config, run.progress.iter_num)}")


def is_time_to_save(run: Run, interval_passed: bool) -> bool:
    """Return whether to save: on a new best, every save_interval or, by default, after evaluations."""
    config, progress = run.config, run.progress
    evaluated = progress.val_loss is not None
    default = interval_passed if config.save_interval else evaluated and config.always_save_checkpoint
    return progress.iter_num > 0 and ((evaluated and progress.stale == 0) or default)


def prepare_out_dir(run: Run, argv: list[str]) -> str:
    """Set a previous run in out_dir aside, write the tokenizer and the options; return a notice, or ""."""
    config, out = run.config, Path(run.config.out_dir)
    resumed, data = run.progress if run.resumed else None, evaluated_on(run.dataset.hashes)
    run.lock, notice = writer.prepare_folder(out, cast(FileLock, run.lock), resumed, config, data)
    if run.resumed and run.tasks_and_samples:
        run.tasks_and_samples.resume()
    files.write_text(out / "tokenizer.json", run.dataset.tokenizer)
    contents = {
        "options": asdict(config),
        "model": asdict(run.model.config),
        "data": run.dataset.hashes,
        "command": argv,
        "commit": writer.git_commit(ROOT),
        **run.machine.environment(),
    }
    files.write_json(out / "config.json", contents)
    return notice


def record(run: Run, log: metrics.Log, row: dict[str, Any]) -> None:
    """Prepare out_dir and open the log in the first call; log an evaluation, unless `row` is empty."""
    if not log.file:  # all checks have passed: now set an earlier run aside
        if notice := run.machine.world.rank_zero_only(lambda: prepare_out_dir(run, sys.argv)):
            tqdm.write(notice)
        open_log(run, log)
    if row:
        log.evaluation(run.progress.iter_num, run.batches.tokens_before(run.progress.iter_num), **row)


def open_log(run: Run, log: metrics.Log) -> None:
    """Open the run's log: on rank 0 metrics.jsonl and the trackers, on other ranks the null device."""
    config, is_main, tracker = run.config, run.machine.world.is_main_process, None
    if is_main and (config.track != "none" or config.wandb_log):
        from nanogpt.diagnostics import trackers

        tracker = trackers.Trackers(asdict(config), run.progress.iter_num)
    path, mfu_at_one_token_per_s = Path(config.out_dir) / metrics.NAME if is_main else Path(os.devnull), None
    if run.machine.device.type == "cuda":
        from nanogpt.gpu.chips import peak_flops

        if peak := peak_flops(run.machine.name()):
            mfu_at_one_token_per_s = run.model.flops_per_token() / (peak * run.machine.world.size)
    log.open(path, tracker, mfu_at_one_token_per_s)


def save(run: Run) -> None:
    """Gather sharded state and start saving a checkpoint on rank 0. Collective: call on all ranks."""
    config, world = run.config, run.machine.world
    model, optimizer = gather_model(run), run.optimizer.state()
    state = {
        **asdict(run.progress),
        "clock_s": run.total_clock_s(),
        "sequences": run.batches.sequences_before(run.progress.iter_num),
        "options": asdict(config),
        "scaler": run.scaler.state_dict(),
        "lora": lora_config(config),
        "tokenizer": run.dataset.fingerprint,
        "data": run.dataset.hashes,
        "environment": run.machine.environment(),
    }
    world.report_phase(run.progress.iter_num, "saving")
    world.rank_zero_only(lambda: run.writer.save(Path(config.out_dir), cast(GPT, model), optimizer, state))


def gather_model(run: Run) -> GPT | None:
    """Return run.model or, if it is sharded, a full copy on rank 0 and None elsewhere. Collective."""
    if not run.optimizer.layout.sharded:
        return run.model
    from nanogpt.distributed import parallelize

    return parallelize.gather_model(run.model, run.optimizer.layout, lora_config(run.config))


def lora_config(config: Config) -> dict[str, Any] | None:
    """Return the arguments of lora.Adapters, as stored in checkpoints; None without adapters."""
    if not config.lora_rank:
        return None
    return {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": config.lora_targets}


def print_saved(run: Run) -> None:
    for path in run.writer.pop_completed():
        tqdm.write(f"saved {path}")


if PARSED:
    run_program(partial(main, *PARSED))
