"""Train or finetune a GPT.

    python train.py config/train_shakespeare_char.py              # a preset
    python train.py config/train_shakespeare_char.py --batch_size=32
    python train.py --dataset=data/mine --out_dir=out-mine        # your own text (data/prepare.py)
    python train.py --out_dir=out-mine --init_from=resume         # go on where it stopped
    python train.py config/finetune_shakespeare.py                # from GPT-2's weights

Ctrl-C, SIGTERM and --max_minutes finish the step, save, and leave with exit code 75: the same command
with --init_from=auto goes on. The run folder holds everything needed to sample, resume or export.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor
from tqdm import tqdm

from nanogpt import data, finetune, graphs, kernels, lora, metrics, runtime, schedule, steps
from nanogpt.config import Count, Fraction, Positive, Rate, changed, load
from nanogpt.distributed import parallel
from nanogpt.errors import Stopped, run_program
from nanogpt.finetune import FinetuneOptions
from nanogpt.options import (
    MachineOptions,
    ModelOptions,
    OptimizerOptions,
    ProcessOptions,
    SpeedOptions,
    TokenOptions,
    WatchOptions,
)
from nanogpt.run import Run, build
from nanogpt.schedule import Schedule


@dataclass(frozen=True)
class Config(
    ModelOptions,
    OptimizerOptions,
    TokenOptions,
    FinetuneOptions,
    MachineOptions,
    SpeedOptions,
    ProcessOptions,
    WatchOptions,
):
    # what goes where
    out_dir: str = "out"  #: the run folder: checkpoints, options, metrics
    init_from: str = "scratch"  #: resume; auto: if there is a run; or weights: gpt2 .. gpt2-xl, a folder
    overwrite: bool = False  # from scratch: replace the run in out_dir instead of moving it aside
    eval_only: bool = False  # evaluate once and leave; nothing is written
    # how often (in iterations)
    eval_interval: Positive = 2000  #: iterations between evaluations of both splits
    eval_iters: Positive = 200  #: evaluate at most this many batches of each split, the same ones each time
    log_interval: Positive = 1  # print a line and write a row
    save_interval: Count = 0  # save a checkpoint; 0: at each evaluation
    always_save_checkpoint: bool = True  # False: after an evaluation save only if it is the best so far
    # trackers beside metrics.jsonl
    wandb_log: bool = False  #: send rows to Weights & Biases too
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # the name of the run there
    # data
    dataset: str = "openwebtext"  #: a folder of data/prepare.py, in data/ or any path; a:0.7,b:0.3 mixes two
    gradient_accumulation_steps: Positive = 40  #: micro-batches an iteration
    batch_size: Positive | Literal["auto"] = 12  #: windows a micro-batch; auto: as many as fit in a GPU
    block_size: Positive = 1024  #: tokens a window: the context of the model
    batch_ramp_tokens: Count = 0  # the batch grows linearly while these are read; 0: it is full at once
    batch_ramp_start: Fraction = 0.1  # the share of the full batch with which it begins
    # length
    max_iters: Count = 600000  #: iterations in all
    max_minutes: Rate = 0.0  #: stop, save and leave after this long; 0: no limit
    # learning-rate schedule
    decay_lr: bool = True  # False: learning_rate all the time
    lr_schedule: Schedule = "cosine"  # how it falls after the warm-up; wsd holds first
    warmup_iters: Count = 2000  #: iterations of warm-up
    lr_decay_iters: Count = 0  # where it reaches min_lr; 0: at max_iters
    min_lr: Rate = 6e-5  #: lowest learning rate
    lr_cooldown: Fraction = 0.4  # wsd: the share of lr_decay_iters in which it falls
    # processes
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"  # what each holds; auto: ddp if the model fits
    shard_size: Count = 0  # hsdp: processes that share one copy of the model; 0: those of a machine


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Train as `config` says; `origins` names the options that were given, and where.

    Raises UserError, Diverged, OSError or Stopped, which errors.run_program turns into exit codes.
    """
    if origins is None:
        origins = {f.name: "given" for f in fields(config) if getattr(config, f.name) != f.default}
    with runtime.StopRequest() as stop, runtime.join(config, Path(config.out_dir)) as world:
        if not config.eval_only:
            world.require_visible(Path(config.out_dir))
        run = world.agree(lambda: build(config, origins, world))
        config = run.config
        print("\n".join([*run.notices, "options that differ from the defaults:", *changed(config, origins)]))
        print(run.describe())
        if config.eval_only:
            evaluate(run, stop)
            return
        if run.resumed and run.progress.iter_num >= config.max_iters:
            print(f"all {config.max_iters} iterations of {config.out_dir} are done; raise --max_iters")
            return
        if run.exhausted:
            print(f"{config.out_dir} has stopped by --patience={config.patience}; raise it to go on")
            return
        if notice := world.lead(lambda: run.open_folder(sys.argv)):
            print(notice)
        try:
            how = kernels.chosen(config.attention, config.deterministic)
            with closing(run.open_log()) as log, run.machine.memory_errors(), how:
                loop(run, log, stop)
        finally:
            run.close_folder()
            tell_saved(run)


# ----------------------------------------------------------------------------- the loop


def loop(run: Run, log: metrics.Log, stop: runtime.StopRequest) -> None:
    """Update the weights until max_iters; evaluate, log and save on the way."""
    config, progress, world = run.config, run.progress, run.machine.world
    model = ready(run)
    take_step = steps.train_step
    if config.cuda_graph:
        take_step = graphs.StepGraph(run.batches.full, run.machine)
    hidden = None if world.leads else True  # None: where no terminal shows it
    bar = tqdm(total=config.max_iters, initial=progress.iter_num, disable=hidden, unit="it")
    deadline = time.perf_counter() + config.max_minutes * 60 if config.max_minutes else math.inf
    saved_at = progress.iter_num if progress.iter_num else -1
    unlogged_s, unlogged, verdict = 0.0, 0, None
    logged_at = run.batches.tokens_before(progress.iter_num)  # in tokens
    while True:
        # between two updates: evaluate, save, see whether to stop
        improved = False
        last = progress.iter_num >= config.max_iters
        if (progress.iter_num % config.eval_interval == 0 or last) and progress.val_loss is None:
            improved = evaluate(run, stop, log)
            last = last or run.exhausted
        write = partial(log.tasks, progress.iter_num, run.batches.tokens_before(progress.iter_num))
        for line in look(run, last, write, stop):
            tqdm.write(line)
        if not stop.reason and time.perf_counter() >= deadline:
            stop.reason = f"--max_minutes={config.max_minutes:g}"
        leaving = world.any(bool(stop.reason) or run.writer.failed) or last  # all leave at the same step
        if saved_at != progress.iter_num and (leaving or is_time_to_save(run, improved)):
            if verdict:
                verdict()
            save(run)
            saved_at = progress.iter_num
        tell_saved(run)
        if leaving:
            bar.close()
            finish(run, stop, last)
            return

        # one update
        started = time.perf_counter()
        lr = learning_rate_of(config, progress.iter_num, run.batches)
        result = take_step(
            model,
            run.optimizer,
            run.batches.step(progress.iter_num),
            windows=run.batches.windows(progress.iter_num),
            targets=run.batches.targets(progress.iter_num),
            batch_size=config.batch_size,
            lr=lr,
            grad_clip=config.grad_clip,
            seed=config.seed,
            iter_num=progress.iter_num,
            machine=run.machine,
            scaler=run.scaler,
        )
        verdict = partial(result.check, progress.iter_num, lr, scaled=run.scaler.is_enabled())
        is_logged = progress.iter_num % config.log_interval == 0
        if is_logged:
            verdict()  # waits for the device
        took_s = time.perf_counter() - started
        progress.elapsed_s += took_s
        unlogged_s, unlogged = unlogged_s + took_s, unlogged + 1
        if is_logged:
            read = run.batches.tokens_before(progress.iter_num + 1)
            log.step(
                progress.iter_num,
                step_s=unlogged_s / unlogged,
                step_tokens=(read - logged_at) / unlogged,
                tokens=read,
                lr=lr,
                elapsed_s=progress.elapsed_s,
                **result.row(config.grad_clip),
            )
            unlogged_s, unlogged, logged_at = 0.0, 0, read
        progress.iter_num += 1
        progress.val_loss = None
        bar.update()


def ready(run: Run) -> Callable[..., tuple[Tensor, Tensor]]:
    """The model as it is trained: in its number format, compiled if that was chosen, one of the copies."""
    shape = (run.config.batch_size, run.config.block_size)
    trial = partial(steps.try_out, optimizer=run.optimizer, shape=shape, machine=run.machine)
    function = parallel.without_logits(parallel.in_dtype(run.model, run.machine))
    parts = {"blocks": run.model.h, "head": run.model if run.machine.device.type == "cuda" else None}
    model, notice = parallel.wrap(function, compile=run.config.compile, trial=trial, **parts)
    if notice:
        print(notice)
    return parallel.connect(model, run.model, run.machine)


def look(run: Run, last: bool, write: Callable[..., None], stop: runtime.StopRequest) -> Iterator[str]:
    """What the first process sees in the model, if it is time (watch.py); the others help to gather it."""
    iter_num = run.progress.iter_num
    if not run.watches or not (last or iter_num % run.config.eval_interval == 0):
        return
    if run.machine.world.any(run.watch.due(iter_num)) and (model := run.whole_model()):
        model = model.to(run.machine.device)  # where it is, unless it was gathered
        yield from run.watch.look(model, iter_num, write, stop.asked)


def learning_rate_of(config: Config, iter_num: int, batches: data.TrainBatches) -> float:
    """The scheduled rate, times the square root of the batch's share of a full one: the noise of the
    gradient grows as the batch gets smaller (Malladi et al. 2022)."""
    smaller = math.sqrt(batches.windows(iter_num) / batches.full)
    return smaller * schedule.learning_rate(
        iter_num,
        config.lr_schedule if config.decay_lr else "constant",
        peak=config.learning_rate,
        floor=config.min_lr,
        warmup_iters=config.warmup_iters if config.decay_lr else 0,
        decay_iters=config.lr_decay_iters or config.max_iters,
        cooldown=config.lr_cooldown,
    )


def evaluate(run: Run, stop: runtime.StopRequest, log: metrics.Log | None = None) -> bool:
    """Evaluate both splits, print and log; returns whether the validation loss is the best so far."""
    config, progress = run.config, run.progress
    run.machine.world.at(progress.iter_num, "evaluating")
    shape = (config.batch_size, config.block_size)
    how = (config.eval_iters, run.machine, stop.asked, run.batches.separator)
    both = steps.evaluate_splits(run.model, run.dataset, shape, *how)
    if both is None:  # stopped meanwhile; a resumed run evaluates here again
        return False
    train, val = both
    about = f"± {val.stderr:.4f}, {val.describe(run.dataset.bytes_per_token)}"
    tqdm.write(f"step {progress.iter_num}: train loss {train.loss:.4f}, val loss {val.loss:.4f} ({about})")
    if log:
        log.evaluation(
            progress.iter_num,
            run.batches.tokens_before(progress.iter_num),
            train_loss=train.loss,
            val_loss=val.loss,
            val_stderr=val.stderr,
            **({"val_losses": val.parts} if val.parts else {}),
            elapsed_s=progress.elapsed_s,
        )
    progress.val_loss = val.loss
    improved = progress.best_val_loss is None or val.loss < progress.best_val_loss
    progress.stale = 0 if improved else progress.stale + 1
    if improved:
        progress.best_val_loss = val.loss
    return improved


def finish(run: Run, stop: runtime.StopRequest, last: bool) -> None:
    """Wait for what is being written, and say how it ended; raises Stopped before the last iteration."""
    run.machine.world.lead(run.writer.wait)
    tell_saved(run)
    if not last:
        by = stop.reason or "another process"
        place = f"iteration {run.progress.iter_num}"
        raise Stopped(f"stopped by {by} at {place}, saved; go on with --init_from=resume")
    if run.exhausted:
        print(f"stopped: no better validation loss in {run.progress.stale} evaluations (--patience)")
    print(finetune.gap(metrics.read(Path(run.config.out_dir))))


def is_time_to_save(run: Run, improved: bool) -> bool:
    """At each improvement; after other evaluations or every save_interval as the options say."""
    config, progress = run.config, run.progress
    due = config.always_save_checkpoint and progress.val_loss is not None
    if config.save_interval:
        due = progress.iter_num % config.save_interval == 0
    return progress.iter_num > 0 and (improved or due)


def save(run: Run) -> None:
    """Gather what several processes hold, and let the first one write it; the others wait."""
    model, optimizer = run.whole_model(), run.optimizer.state()
    state = {
        **asdict(run.progress),
        "options": asdict(run.config),
        "scaler": run.scaler.state_dict(),
        "lora": lora.to_state(run.config.adapters()),
        "tokenizer": run.dataset.fingerprint,
        "environment": run.machine.environment(),
    }
    world = run.machine.world
    world.at(run.progress.iter_num, "saving")
    world.lead(lambda: run.writer.save(Path(run.config.out_dir), model, optimizer, state))


def tell_saved(run: Run) -> None:
    for path in run.writer.complete():
        tqdm.write(f"saved {path}")


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
