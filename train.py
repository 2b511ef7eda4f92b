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
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from tqdm import tqdm

from nanogpt import checkpoint, data, files, metrics, optim, parallel, runtime, schedule, steps, weights
from nanogpt.checkpoint import Checkpoint, Progress
from nanogpt.config import ROOT, Count, Fraction, Positive, Rate, changed, inherit, load, picked
from nanogpt.errors import Stopped, UserError, run_program
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import OptimConfig, Optimizer
from nanogpt.options import MachineOptions, ModelOptions, OptimizerOptions
from nanogpt.pretrained import Pretrained
from nanogpt.schedule import Schedule


@dataclass(frozen=True)
class Config(ModelOptions, OptimizerOptions, MachineOptions):
    # what goes where
    out_dir: str = "out"  # the run folder: checkpoints, options, metrics
    init_from: str = "scratch"  # resume; auto: if there is a run; or weights: gpt2 .. gpt2-xl, a folder
    overwrite: bool = False  # from scratch: replace the run in out_dir instead of moving it aside
    eval_only: bool = False  # evaluate once and leave; nothing is written
    # how often (in iterations)
    eval_interval: Positive = 2000  # evaluate both splits
    eval_iters: Positive = 200  # evaluate at most this many batches of each split, the same ones each time
    log_interval: Positive = 1  # print a line and write a row
    save_interval: Count = 0  # save a checkpoint; 0: at each evaluation
    always_save_checkpoint: bool = True  # False: after an evaluation save only if it is the best so far
    # trackers beside metrics.jsonl
    wandb_log: bool = False  # send rows to Weights & Biases too
    wandb_project: str = "owt"  # its project
    wandb_run_name: str = "gpt2"  # the name of the run there
    # data
    dataset: str = "openwebtext"  # a folder in data/, or any path that data/prepare.py wrote
    gradient_accumulation_steps: Positive = 40  # micro-batches an iteration
    batch_size: Positive = 12  # windows a micro-batch
    block_size: Positive = 1024  # tokens a window: the context of the model
    batch_ramp_tokens: Count = 0  # the batch grows linearly while these are read; 0: it is full at once
    batch_ramp_start: Fraction = 0.1  # the share of the full batch with which it begins
    # length
    max_iters: Count = 600000  # iterations in all
    max_minutes: Rate = 0.0  # stop, save and leave after this long; 0: no limit
    # learning-rate schedule
    decay_lr: bool = True  # False: learning_rate all the time
    lr_schedule: Schedule = "cosine"  # how it falls after the warm-up; wsd holds first
    warmup_iters: Count = 2000  # iterations of warm-up
    lr_decay_iters: Count = 0  # where it reaches min_lr; 0: at max_iters
    min_lr: Rate = 6e-5  # the lowest
    lr_cooldown: Fraction = 0.4  # wsd: the share of lr_decay_iters in which it falls
    # processes
    backend: Literal["nccl", "gloo"] = "nccl"  # how they talk, for torchrun


# A resumed run takes these from the command, and all others from the saved run unless they are given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
SHAPE = ({f.name for f in fields(GPTConfig)} & {f.name for f in fields(Config)}) - {"dropout", "init"}


@dataclass
class Run:
    """The parts of a run under way."""

    config: Config
    machine: runtime.Machine
    dataset: data.Dataset
    batches: data.TrainBatches
    model: GPT  # the plain one, which is evaluated and saved
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    """Train as `config` says; `origins` names the options that were given, and where.

    Raises UserError, Diverged, OSError or Stopped, which errors.run_program turns into exit codes.
    """
    if origins is None:
        origins = {f.name: "given" for f in fields(config) if getattr(config, f.name) != f.default}
    with runtime.StopRequest() as stop:
        config, resumed, found = choose_start(config, origins)
        check(config)
        run = build(config, resumed, found)
        flops = run.batches.tokens_before(config.max_iters) * steps.flops_per_token(run.model)
        compile = parallel.choose_compile(config.compile, run.machine.device, flops, run.machine.peak_flops())
        run.config = config = replace(config, compile=compile)  # a resumed run inherits what was chosen
        print("\n".join(["options that differ from the defaults:", *changed(config, origins)]))
        print(describe(run))
        if config.eval_only:
            evaluate(run, stop)
            return
        if resumed and run.progress.iter_num >= config.max_iters:
            print(f"all {config.max_iters} iterations of {config.out_dir} are done; raise --max_iters")
            return
        lock = open_folder(run, resumed)
        try:
            with closing(open_log(run)) as log, run.machine.memory_errors():
                loop(run, log, stop)
        finally:
            lock.release()


# ----------------------------------------------------------------------------- the loop


def loop(run: Run, log: metrics.Log, stop: runtime.StopRequest) -> None:
    """Update the weights until max_iters; evaluate, log and save on the way."""
    config, progress = run.config, run.progress
    shape = (config.batch_size, config.block_size)
    trial = partial(steps.try_out, optimizer=run.optimizer, shape=shape, machine=run.machine)
    model, notice = parallel.wrap(
        run.machine.in_dtype(run.model), compile=config.compile, trial=trial, blocks=run.model.h
    )
    if notice:
        print(notice)
    bar = tqdm(total=config.max_iters, initial=progress.iter_num, disable=None, unit="it")
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
        if not stop.reason and time.perf_counter() >= deadline:
            stop.reason = f"--max_minutes={config.max_minutes:g}"
        leaving = last or bool(stop.reason)
        if saved_at != progress.iter_num and (leaving or is_time_to_save(run, improved)):
            if verdict:
                verdict()
            save(run)
            saved_at = progress.iter_num
        if leaving:
            bar.close()
            if not last:
                place = f"iteration {progress.iter_num}"
                raise Stopped(f"stopped by {stop.reason} at {place}, saved; go on with --init_from=resume")
            return

        # one update
        started = time.perf_counter()
        lr = learning_rate_of(config, progress.iter_num, run.batches)
        result = steps.train_step(
            model,
            run.optimizer,
            run.batches.step(progress.iter_num),
            windows=run.batches.windows(progress.iter_num),
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
    shape = (config.batch_size, config.block_size)
    both = steps.evaluate_splits(run.model, run.dataset, shape, config.eval_iters, run.machine, stop.asked)
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
            elapsed_s=progress.elapsed_s,
        )
    progress.val_loss = val.loss
    improved = progress.best_val_loss is None or val.loss < progress.best_val_loss
    if improved:
        progress.best_val_loss = val.loss
    return improved


def is_time_to_save(run: Run, improved: bool) -> bool:
    """At each improvement; after other evaluations or every save_interval as the options say."""
    config, progress = run.config, run.progress
    due = config.always_save_checkpoint and progress.val_loss is not None
    if config.save_interval:
        due = progress.iter_num % config.save_interval == 0
    return progress.iter_num > 0 and (improved or due)


def save(run: Run) -> None:
    state = {
        **asdict(run.progress),
        "options": asdict(run.config),
        "scaler": run.scaler.state_dict(),
        "tokenizer": run.dataset.fingerprint,
        "environment": run.machine.environment(),
    }
    path = checkpoint.save(Path(run.config.out_dir), run.model, run.optimizer.state(), state)
    tqdm.write(f"saved {path}")


# ----------------------------------------------------------------------------- set-up


def choose_start(
    config: Config, origins: dict[str, str]
) -> tuple[Config, Checkpoint | None, Pretrained | None]:
    """What --init_from asks to resume, or the weights that it names; and the options of that run or the
    shape of those weights, with what is given now over them."""
    if config.init_from == "scratch":
        return config, None, None
    if config.init_from not in ("resume", "auto"):
        found = weights.open_weights(config.init_from, ROOT, Path(config.out_dir))
        print("".join(f"{line}\n" for line in found.notices), end="")
        taken = SHAPE | {"init"}  # from the weights
        shape = found.adopted(vars(config), taken & set(origins))
        origins |= {name: found.origin for name in taken - set(origins)}
        return replace(config, **{name: getattr(shape, name) for name in taken}), None, found
    out = Path(config.out_dir)
    resumed, damage = checkpoint.find(out)
    if resumed is None:
        if config.init_from == "resume":
            raise UserError(f"no checkpoint in {out}: train first, or say --init_from=auto or scratch")
        return config, None, None
    for line in damage:
        print(f"skipped a damaged checkpoint: {line}")
    config, differing = inherit(config, origins, resumed.state["options"], NOT_INHERITED)
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in SHAPE]:
        raise UserError(
            f"{out} holds another model: {'; '.join(wrong)}; leave these out, or choose another --out_dir"
        )
    for key, (old, new) in differing.items():
        print(f"{key} = {new!r} from now on; it was {old!r} when the run was saved")
    return config, resumed, None


def check(config: Config) -> None:
    """Refuse combinations that make no sense, all at once."""
    wrong = picked(GPTConfig, config).problems() + picked(OptimConfig, config).problems()
    if config.decay_lr:
        ends = (config.learning_rate, config.min_lr, config.warmup_iters, config.lr_decay_iters)
        wrong += schedule.problems(config.lr_schedule, *ends)
    if wrong:
        raise UserError("\n       ".join(wrong))


def build(config: Config, resumed: Checkpoint | None, found: Pretrained | None) -> Run:
    """Open the data, and make the model: new weights from the seed, or those of the checkpoint or `found`."""
    machine = runtime.setup(config.device, config.dtype, config.n_embd)
    dataset = data.load(data.find(config.dataset, ROOT))
    data.require_window(dataset.train, config.block_size, "training")
    data.require_window(dataset.val, config.block_size, "validation")
    micro_steps = config.gradient_accumulation_steps
    ramp = schedule.batch_ramp(
        config.batch_size * micro_steps,
        config.batch_ramp_start,
        config.batch_ramp_tokens // config.block_size,
        unit=config.batch_size if micro_steps > 1 else 1,  # whole micro-batches, where there are several
    )
    batches = data.TrainBatches(
        dataset.train, config.block_size, config.batch_size, micro_steps, config.seed, machine.device, ramp
    )
    if resumed and resumed.state["tokenizer"] != dataset.fingerprint:
        raise UserError(
            f"{config.out_dir} was trained with another tokenizer ({resumed.model_config.vocab_size} ids) "
            f"than that of {dataset.folder} ({dataset.vocab_size} ids); give the --dataset it was trained on"
        )
    if found:
        found.require_tokenizer(dataset.fingerprint, dataset.vocab_size, dataset.folder)
        dataset.tokenizer = max(dataset.tokenizer, found.tokenizer, key=len)  # the one with its merges
    if resumed:
        model = resumed.load_model(machine.device, config.dropout).train()
    elif found:
        shape = picked(GPTConfig, config, vocab_size=dataset.vocab_size)
        model = found.load(shape, machine.device).train()
    else:
        torch.manual_seed(config.seed)
        model = GPT(picked(GPTConfig, config, vocab_size=dataset.vocab_size)).to(machine.device)
    rules = picked(OptimConfig, config)
    trained = model.named_parameters()
    if config.eval_only:  # without the optimizer's state, which takes twice the memory of the weights
        trained = ((name, parameter.to("meta")) for name, parameter in trained)
    optimizer = optim.build(rules, trained, model.fused_rows(), machine.half)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == "float16")
    progress = resumed.progress if resumed else Progress()
    if resumed:
        resumed.load_optimizer(optimizer.state())
        scaler.load_state_dict(resumed.state["scaler"])
        if moved := resumed.moved(machine.environment()):
            print(f"note: {moved}: the run goes on, but not bit for bit as it would have there")
    return Run(config, machine, dataset, batches, model, optimizer, scaler, progress)


def open_folder(run: Run, resumed: Checkpoint | None) -> FileLock:
    """Make out_dir ours, with the tokenizer and the options in it; returns the lock to hold."""
    out = Path(run.config.out_dir)
    lock, notice = checkpoint.claim(out, resumed, run.config.overwrite)
    if notice:
        print(notice)
    if resumed:
        metrics.rewind(out, resumed.iter_num, evaluated=run.progress.val_loss is not None)
    files.write_text(out / "tokenizer.json", run.dataset.tokenizer)
    about = {
        "options": asdict(run.config),
        "model": asdict(run.model.config),
        "command": sys.argv,
        "commit": runtime.git_commit(ROOT),
        **run.machine.environment(),
    }
    files.write_json(out / "config.json", about)
    return lock


def open_log(run: Run) -> metrics.Log:
    config = run.config
    tracker = metrics.tracker(config.wandb_log, config.wandb_project, config.wandb_run_name, asdict(config))
    cost, peak = steps.flops_per_token(run.model), run.machine.peak_flops()
    return metrics.Log(Path(config.out_dir), tracker, cost / peak if peak else None)


def describe(run: Run) -> str:
    """What is about to be trained, on what, in a few lines."""
    dataset, iters, batches = run.dataset, run.config.max_iters, run.batches
    batch = f"{batches.full * batches.block_size:,} tokens an iteration"
    if batches.ramp:
        batch += f", from {batches.ramp[0] * batches.block_size:,} at first to all at {len(batches.ramp)}"
    return (
        f"machine: {run.machine.reason}\ndata: {dataset.folder}, {len(dataset.train):,} training and "
        f"{len(dataset.val):,} validation tokens, vocabulary {dataset.vocab_size:,}\n"
        f"model: {run.model.n_params():,} parameters; {batch}; "
        f"{iters:,} iterations read the text {run.batches.epochs(iters):.2f} times"
    )


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
