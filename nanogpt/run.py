"""A run of train.py: its parts, put together from its options, and its folder.

`config` is the Config of train.py, whose options are not this module's to define.
"""

import os
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from nanogpt import (
    checkpoint,
    data,
    documents,
    estimate,
    files,
    finetune,
    fit,
    graphs,
    kernels,
    lora,
    metrics,
    mixture,
    optim,
    runtime,
    schedule,
    steps,
)
from nanogpt.checkpoint import Checkpoint, Progress
from nanogpt.config import ROOT, inherit, picked
from nanogpt.distributed import parallel
from nanogpt.errors import UserError
from nanogpt.exchange import weights
from nanogpt.exchange.pretrained import Pretrained
from nanogpt.loss import default_rows
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import OptimConfig, Optimizer
from nanogpt.order import RowOrder
from nanogpt.watch import Watch, WatchOptions
from nanogpt.world import World
from nanogpt.writer import Writer

# A resumed run takes these from the command, and all others from the saved run unless they are given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
NOT_INHERITED |= {"meet_timeout_s", "timeout_s", "parallel", "shard_size"}
SHAPE = {f.name for f in fields(GPTConfig)} - {"vocab_size", "dropout", "init"}  # what weights decide


@dataclass
class Run:
    """The parts of a run under way."""

    config: Any
    machine: runtime.Machine
    dataset: data.Dataset
    batches: data.TrainBatches
    model: GPT  # the plain one, which is evaluated and saved
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    watch: Watch
    resumed: Checkpoint | None
    writer: Writer  # of its checkpoints, in the first process
    division: str  # how several processes divide the model, and why; nothing for one
    lock: FileLock | None = None  # on out_dir
    notices: list[str] = field(default_factory=list)  # what the user should know of how it was put together

    @property
    def exhausted(self) -> bool:
        """Whether so many evaluations have brought nothing that the run is to end."""
        return 0 < self.config.patience <= self.progress.stale

    @property
    def watches(self) -> bool:
        """Whether the first process looks on (watch.py): known in all."""
        return bool(self.config.eval_tasks or self.config.sample_prompt)

    def whole_model(self) -> GPT | None:
        """The model with all its weights: itself or, where it is sharded, a copy of it in the first process
        and None in the others, which all must ask for together."""
        layout = self.optimizer.layout
        if not layout.sharded:
            return self.model
        tensors = layout.gather(layout.pieces_of(self.model))
        if not self.machine.world.leads:
            return None
        with torch.device("meta"):
            whole = GPT(self.model.config)
            if adapters := self.config.adapters():
                lora.adapt(whole, adapters)
        whole.load_state_dict(tensors, assign=True)
        return whole.requires_grad_(False).train()

    def describe(self) -> str:
        """What is about to be trained, on what, in a few lines."""
        dataset, batches, iters = self.dataset, self.batches, self.config.max_iters
        batch = f"{batches.full * batches.block_size:,} tokens an iteration"
        if batches.ramp:
            batch += f", from {batches.ramp[0] * batches.block_size:,} at first to all at {len(batches.ramp)}"
        scored = len(dataset.train) - 1
        if self.config.documents == "rows":
            kept = batches.order.n_windows * batches.block_size
            batch += (
                f"; rows that start at a document keep {kept:,} of {scored:,} tokens and leave out "
                f"{1 - kept / scored:.1%}"
            )
        divided = f"parallel: {self.division}\n" if self.division else ""
        return (
            f"machine: {self.machine.reason}\n{divided}"
            f"data: {dataset.folder}, {len(dataset.train):,} training and {len(dataset.val):,} validation "
            f"tokens, vocabulary {dataset.vocab_size:,}\n"
            f"model: {self.model.n_params():,} parameters; {batch}; "
            f"{iters:,} iterations read {self._epochs(iters)}"
        )

    def _epochs(self, iters: int) -> str:
        """What so many iterations read, and how often."""
        read, several = self.batches.epochs(iters), self.dataset.train.mixture
        if not several:
            return f"the text {read[0]:.2f} times"
        texts = zip(several.names, several.weights, read, strict=True)
        return ", ".join(f"{name} ({float(part):.1%}) {times:.2f} times" for name, part, times in texts)

    def open_folder(self, command: list[str]) -> str:
        """Make out_dir ours, with the tokenizer and the options in it, until `close_folder`; returns what
        became of a run that was there ("" if none was)."""
        out = Path(self.config.out_dir)
        self.lock, notice = checkpoint.claim(out, self.resumed, self.config.overwrite)
        if self.resumed:
            metrics.rewind(out, self.resumed.iter_num, evaluated=self.progress.val_loss is not None)
            self.watch.resume()
        files.write_text(out / "tokenizer.json", self.dataset.tokenizer)
        about = {
            "options": asdict(self.config),
            "model": asdict(self.model.config),
            "command": command,
            "commit": runtime.git_commit(ROOT),
            **self.machine.environment(),
        }
        files.write_json(out / "config.json", about)
        return notice

    def close_folder(self) -> None:
        self.writer.close()
        if self.lock:
            self.lock.release()

    def open_log(self) -> metrics.Log:
        config, leads = self.config, self.machine.world.leads
        tracker = None
        if config.wandb_log and leads:
            tracker = metrics.Wandb(config.wandb_project, config.wandb_run_name, asdict(config))
        path = Path(config.out_dir) / metrics.NAME if leads else Path(os.devnull)
        cost, peak = steps.flops_per_token(self.model), self.machine.peak_flops()
        return metrics.Log(path, tracker, cost / peak if peak else None)


def build(config: Any, origins: dict[str, str], world: World) -> Run:
    """The run that `config` asks for; `origins` says which of its options were given, and where, and gets
    those that weights decide. Nothing is written. UserError says all that is wrong with the options."""
    notices: list[str] = []
    config, resumed, found = choose_start(config, origins, notices)
    check(config)
    machine = runtime.setup(config.device, config.dtype, config.n_embd, world)
    machine = replace(machine, casting=config.casting)
    dataset = open_data(config)
    rules = picked(OptimConfig, config)
    division = choose_division(config, rules, resumed, dataset, machine)
    config = count_tokens(fitted(config, machine, division, dataset, notices), origins)
    if config.cuda_graph:
        graphs.require_recordable(config, machine, dataset.train.scored is not None)
    batches = open_batches(config, dataset, machine)
    if found:
        found.require_tokenizer(dataset.fingerprint, dataset.vocab_size, dataset.folder)
        dataset.tokenizer = max(dataset.tokenizer, found.tokenizer, key=len)  # the one with its merges
    if resumed:
        require_same_tokenizer(resumed, dataset)
    model = make_model(config, resumed, found, dataset, division.home(machine.device))
    micro_batch = config.batch_size * config.block_size
    model.loss_rows = config.loss_rows or default_rows(machine.device, micro_batch, dataset.vocab_size)
    notices += [*attention(config, model, machine), *finetune.choose_trained(model, config)]
    if rules.optimizer == "muon" and not any(
        p.requires_grad and optim.is_for_muon(name, p) for name, p in model.named_parameters()
    ):
        notices.append("no matrix that Muon would train is left: AdamW trains all, at --learning_rate")
    layout = parallel.lay_out(model, machine, division)
    if config.recompute:
        parallel.recompute(model, machine)
    if config.eval_only:  # without the optimizer's state, which takes twice the memory of the weights
        empty = ((n, torch.empty(p.shape, device="meta"), p) for n, p in model.named_parameters())
        shapes = ((n, shape.requires_grad_(p.requires_grad)) for n, shape, p in empty)
        optimizer = optim.build(rules, shapes, model.fused_rows(), machine.half)
    else:
        optimizer = optim.build(rules, model.named_parameters(), model.fused_rows(), machine.half, layout)
    scaler = parallel.make_scaler(machine, layout)
    if resumed:
        resumed.load_optimizer(optimizer.pieces())
        scaler.load_state_dict(resumed.state["scaler"])
        if moved := resumed.moved(machine.environment()):
            notices.append(f"note: {moved}: the run goes on, but not bit for bit as it would have there")
    progress = resumed.progress if resumed else Progress()
    options = config if world.leads else WatchOptions()  # one process looks on
    watch = Watch(options, Path(config.out_dir), dataset.tokenizer, machine)
    flops = batches.tokens_before(config.max_iters) * steps.flops_per_token(model)
    chosen = parallel.choose_compile(config.compile, machine.device, flops, machine.peak_flops())
    config = replace(config, compile=chosen)  # a resumed run inherits what was chosen
    parts = (machine, dataset, batches, model, optimizer, scaler, progress, watch, resumed)
    return Run(config, *parts, Writer(), division.why, notices=notices)


def choose_start(
    config: Any, origins: dict[str, str], notices: list[str]
) -> tuple[Any, Checkpoint | None, Pretrained | None]:
    """What --init_from asks to resume, or the weights that it names; and the options of that run or the
    shape of those weights, with what is given now over them."""
    if config.init_from == "scratch":
        return config, None, None
    if config.init_from not in ("resume", "auto"):
        found = weights.open_weights(config.init_from, ROOT, Path(config.out_dir))
        notices += found.notices
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
    notices += [f"skipped a damaged checkpoint: {line}" for line in damage]
    config, differing = inherit(config, origins, resumed.state["options"], NOT_INHERITED)
    fixed = SHAPE | finetune.FIXED
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in fixed]:
        raise UserError(
            f"{out} holds another model: {'; '.join(wrong)}; leave these out, or choose another --out_dir"
        )
    for key, (old, new) in differing.items():
        notices.append(f"{key} = {new!r} from now on; it was {old!r} when the run was saved")
    return config, resumed, None


def check(config: Any) -> None:
    """Refuse combinations that make no sense, all at once."""
    wrong = picked(GPTConfig, config).problems() + picked(OptimConfig, config).problems()
    wrong += finetune.problems(config)
    if config.decay_lr:
        ends = (config.learning_rate, config.min_lr, config.warmup_iters, config.lr_decay_iters)
        wrong += schedule.problems(config.lr_schedule, *ends)
    if wrong:
        raise UserError("\n       ".join(wrong))


def fitted(
    config: Any,
    machine: runtime.Machine,
    division: parallel.Division,
    dataset: data.Dataset,
    notices: list[str],
) -> Any:
    """`config` with a number for --batch_size=auto; UserError where no process is to hold the whole model."""
    if config.batch_size != "auto":
        return config
    if not division.whole:
        raise UserError(
            f"--batch_size=auto tries the whole model on one GPU, and it is to be divided ({division.why}); "
            f"give a number, such as --batch_size=12"
        )
    rows = fit.batch_size(config, machine, dataset.vocab_size)
    notices.append(f"batch_size = {rows}: the most that fits in the memory of {machine.name()}")
    return replace(config, batch_size=rows)


def count_tokens(config: Any, origins: dict[str, str]) -> Any:
    """`config` with the accumulation and the iterations that its numbers of tokens come to.

    A flag beats a file: --max_iters=10 cuts a preset with max_tokens short. UserError if a batch is no
    whole number of micro-batches, and for two flags that say the same thing.
    """
    for tokens, steps_ in (("batch_tokens", "gradient_accumulation_steps"), ("max_tokens", "max_iters")):
        if getattr(config, tokens) and origins.get(steps_, "").startswith("--"):
            if origins.get(tokens, "").startswith("--"):
                raise UserError(f"{origins[tokens]} and {origins[steps_]} say the same; give one of them")
            config = replace(config, **{tokens: 0})
    if config.batch_tokens:
        micro = config.batch_size * config.block_size
        turns, rest = divmod(config.batch_tokens, micro)
        if rest or not turns:
            near = " or ".join(f"{n * micro:,}".replace(",", "_") for n in (turns, turns + 1) if n)
            raise UserError(
                f"--batch_tokens={config.batch_tokens} is no whole number of micro-batches of "
                f"batch_size * block_size = {config.batch_size} * {config.block_size} = {micro} tokens; "
                f"give {near}, or another --batch_size"
            )
        config = replace(config, gradient_accumulation_steps=turns)
        origins["gradient_accumulation_steps"] = f"batch_tokens={config.batch_tokens}"
    if config.max_tokens:
        full = config.batch_size * config.gradient_accumulation_steps * config.block_size
        sizes = [windows * config.block_size for windows in ramp_of(config)]
        iters = len(sizes) + max(0, -(-(config.max_tokens - sum(sizes)) // full))
        config = replace(config, max_iters=iters)
        origins["max_iters"] = f"max_tokens={config.max_tokens}"
    return config


def ramp_of(config: Any) -> list[int]:
    """The sizes in windows of the batches before the first full one."""
    micro_steps = config.gradient_accumulation_steps
    return schedule.batch_ramp(
        config.batch_size * micro_steps,
        config.batch_ramp_start,
        config.batch_ramp_tokens // config.block_size,
        unit=config.batch_size if micro_steps > 1 else 1,  # whole micro-batches, where there are several
    )


def open_data(config: Any) -> data.Dataset:
    dataset = mixture.load(config.dataset, ROOT)
    data.require_window(dataset.train, config.block_size, "training")
    data.require_window(dataset.val, config.block_size, "validation")
    return dataset


def open_batches(config: Any, dataset: data.Dataset, machine: runtime.Machine) -> data.TrainBatches:
    """The batches of --documents; UserError for data that has no documents, or for too many processes."""
    separator, order = None, None
    if config.documents != "stream":
        separator = documents.separator(dataset, config.documents)
    if separator is not None and config.documents == "rows":
        rows = partial(documents.rows, separator=separator, block_size=config.block_size)
        order = data.order_of(dataset.train, lambda text: RowOrder(rows(text), config.seed))
        separator = None
    world, ramp = machine.world, ramp_of(config)
    fewest = min([*ramp, config.batch_size * config.gradient_accumulation_steps])
    if fewest < world.size:
        raise UserError(
            f"{world.size} processes for a batch of {fewest} windows; start fewer, or raise --batch_size or "
            f"--gradient_accumulation_steps"
        )
    numbers = (config.block_size, config.batch_size, config.gradient_accumulation_steps, config.seed)
    return data.TrainBatches(
        dataset.train, *numbers, machine.device, ramp, separator, order, world.share, world.total
    )


def attention(config: Any, model: GPT, machine: runtime.Machine) -> list[str]:
    """A line on the kernel of attention, where there is a choice; UserError for one that does not do it."""
    biased = config.documents == "masked" or model.config.position == "alibi"
    found = kernels.require_attention(config.attention, model.config, machine, config.block_size, biased)
    return [f"attention: {found}"] * (config.attention != "auto" or machine.device.type == "cuda")


def require_same_tokenizer(resumed: Checkpoint, dataset: data.Dataset) -> None:
    if resumed.state["tokenizer"] != dataset.fingerprint:
        raise UserError(
            f"{resumed.path} was trained with another tokenizer ({resumed.model_config.vocab_size} ids) than "
            f"that of {dataset.folder} ({dataset.vocab_size} ids); give the --dataset it was trained on"
        )


def choose_division(
    config: Any,
    rules: OptimConfig,
    resumed: Checkpoint | None,
    dataset: data.Dataset,
    machine: runtime.Machine,
) -> parallel.Division:
    """What each process holds (parallel.choose)."""
    shape = resumed.model_config if resumed else picked(GPTConfig, config, vocab_size=dataset.vocab_size)
    need = estimate.memory(shape, rules, batch_size=1)  # activations do not count here
    sizes = (need.weights, need.optimizer, parallel.device_memory(machine))
    return parallel.choose(config.parallel, config.shard_size, machine.world, *sizes)


def make_model(
    config: Any,
    resumed: Checkpoint | None,
    found: Pretrained | None,
    dataset: data.Dataset,
    device: torch.device,
) -> GPT:
    """With the weights of the checkpoint, or those that were found, or new ones from the seed; with new
    adapters, if the options ask for them."""
    if resumed:
        return resumed.load_model(device, config.dropout).train()
    shape = picked(GPTConfig, config, vocab_size=dataset.vocab_size)
    torch.manual_seed(config.seed)
    model = found.load(shape, device).train() if found else GPT(shape).to(device)
    if adapters := config.adapters():
        lora.adapt(model, adapters)
        lora.initialise(model, config.seed)
    return model
