"""What train.py's build() calls: where a run starts, what its options come to, and its data.

`config` is the Config of train.py, whose options are not this module's to define.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt import schedule
from nanogpt.config import ROOT, inherit, picked
from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import OptimConfig
from nanogpt.runtime import Machine

if TYPE_CHECKING:
    from nanogpt.checkpoint.reader import Checkpoint

# A resumed run takes these from the command, and all others from the saved run unless they are given again.
NOT_INHERITED = {"init_from", "out_dir", "overwrite", "eval_only", "max_minutes"}
NOT_INHERITED |= {"meet_timeout_s", "timeout_s", "parallel", "shard_size"}
SHAPE = {f.name for f in fields(GPTConfig)} - {"vocab_size", "dropout", "init"}  # what weights decide
# A resumed run keeps these.
FIXED = SHAPE | {"freeze", "train_only", "lora_rank", "lora_alpha", "lora_targets"}


def choose_start(
    config: Any, origins: dict[str, str], notices: list[str]
) -> "tuple[Any, Checkpoint | None, Any]":
    """What --init_from asks to resume, or the weights that it names; and the options of that run or the
    shape of those weights, with what is given now over them."""
    if config.init_from == "scratch":
        return config, None, None
    if config.init_from not in ("resume", "auto"):
        from nanogpt.convert import weights

        found = weights.open_weights(config.init_from, ROOT, Path(config.out_dir))
        notices += found.notices
        taken = SHAPE | {"init"}  # from the weights
        shape = found.adopted(vars(config), taken & set(origins))
        origins |= {name: found.origin for name in taken - set(origins)}
        return replace(config, **{name: getattr(shape, name) for name in taken}), None, found
    from nanogpt.checkpoint import reader

    out = Path(config.out_dir)
    resumed, damage = reader.find(out)
    if resumed is None:
        if config.init_from == "resume":
            raise UserError(f"no checkpoint in {out}: train first, or say --init_from=auto or scratch")
        return config, None, None
    notices += [f"skipped a damaged checkpoint: {line}" for line in damage]
    config, differing = inherit(config, origins, resumed.state["options"], NOT_INHERITED)
    if wrong := [f"{k}={new} given, {k}={old} saved" for k, (old, new) in differing.items() if k in FIXED]:
        raise UserError(
            f"{out} holds another model: {'; '.join(wrong)}; leave these out, or choose another --out_dir"
        )
    for key, (old, new) in differing.items():
        notices.append(f"{key} = {new!r} from now on; it was {old!r} when the run was saved")
    return config, resumed, None


def check(config: Any) -> None:
    """Refuse combinations that make no sense, all at once."""
    wrong = picked(GPTConfig, config).problems() + picked(OptimConfig, config).problems()
    if config.lora_rank:
        from nanogpt.finetune import freeze

        wrong += freeze.problems(config)
    if config.decay_lr:
        ends = (config.learning_rate, config.min_lr, config.warmup_iters, config.lr_decay_iters)
        wrong += schedule.problems(config.lr_schedule, *ends)
    if wrong:
        raise UserError("\n       ".join(wrong))


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


def open_data(config: Any) -> loader.Dataset:
    """The dataset, or several as one; UserError for a text shorter than a window."""
    if Path(config.dataset).is_dir() or not set(config.dataset) & set(",:"):
        dataset = loader.load(loader.find(config.dataset, ROOT))
    else:
        from nanogpt.data import mixture

        dataset = mixture.load(config.dataset, ROOT)
    loader.require_window(dataset.train, config.block_size, "training")
    loader.require_window(dataset.val, config.block_size, "validation")
    return dataset


def open_batches(config: Any, dataset: loader.Dataset, machine: Machine) -> loader.TrainBatches:
    """The batches of --documents; UserError for data that has no documents, or for too many processes."""
    separator, order = None, None
    if config.documents != "stream":
        from nanogpt.data import documents

        separator = documents.separator(dataset, config.documents)
        if config.documents == "rows":
            order = documents.row_order(dataset.train, separator, config.block_size, config.seed)
            separator = None
    world, ramp = machine.world, ramp_of(config)
    fewest = min([*ramp, config.batch_size * config.gradient_accumulation_steps])
    if fewest < world.size:
        raise UserError(
            f"{world.size} processes for a batch of {fewest} windows; start fewer, or raise --batch_size or "
            f"--gradient_accumulation_steps"
        )
    numbers = (config.block_size, config.batch_size, config.gradient_accumulation_steps, config.seed)
    return loader.TrainBatches(
        dataset.train, *numbers, machine.device, ramp, separator, order, world.share, world.total
    )


def require_tokenizer(resumed: "Checkpoint | None", pretrained: Any, dataset: loader.Dataset) -> None:
    """UserError where the weights that a run starts from know other ids than the data."""
    if pretrained:
        pretrained.require_tokenizer(dataset.fingerprint, dataset.vocab_size, dataset.folder)
        dataset.tokenizer = max(dataset.tokenizer, pretrained.tokenizer, key=len)  # the one with its merges
    if resumed and resumed.state["tokenizer"] != dataset.fingerprint:
        raise UserError(
            f"{resumed.path} was trained with another tokenizer ({resumed.model_config.vocab_size} ids) than "
            f"that of {dataset.folder} ({dataset.vocab_size} ids); give the --dataset it was trained on"
        )


def worth_compiling(config: Any, batches: loader.TrainBatches, model: GPT, machine: Machine) -> bool:
    """--compile=auto: never on a CPU, where it saves 25 % of a step at 128 channels but 4 % at 384
    (docs/results.md)."""
    if machine.device.type != "cuda":
        return False
    from nanogpt.compile import pays

    return pays(batches.tokens_before(config.max_iters) * model.flops_per_token(), machine.peak_flops())


def describe(
    config: Any,
    machine: Machine,
    dataset: loader.Dataset,
    batches: loader.TrainBatches,
    model: GPT,
    division: str,
) -> str:
    """What is about to be trained, on what, in a few lines."""
    batch = f"{batches.full * batches.block_size:,} tokens an iteration"
    if batches.ramp:
        batch += f", from {batches.ramp[0] * batches.block_size:,} at first to all at {len(batches.ramp)}"
    scored = len(dataset.train) - 1
    if config.documents == "rows":
        kept = batches.order.n_windows * batches.block_size
        batch += (
            f"; rows that start at a document keep {kept:,} of {scored:,} tokens and leave out "
            f"{1 - kept / scored:.1%}"
        )
    read, several = batches.epochs(config.max_iters), dataset.train.mixture
    times = f"the text {read[0]:.2f} times"
    if several:
        texts = zip(several.names, several.weights, read, strict=True)
        times = ", ".join(f"{name} ({float(part):.1%}) {often:.2f} times" for name, part, often in texts)
    divided = f"parallel: {division}\n" if division else ""
    return (
        f"machine: {machine.reason}\n{divided}"
        f"data: {dataset.folder}, {len(dataset.train):,} training and {len(dataset.val):,} validation "
        f"tokens, vocabulary {dataset.vocab_size:,}\n"
        f"model: {model.n_params():,} parameters; {batch}; {config.max_iters:,} iterations read {times}"
    )
