"""What is decided before a model is made: where a run starts, and what its options come to on this machine
and with this data.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from nanogpt import ROOT, runtime
from nanogpt.config import pick_fields, require_consistent
from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import DataOptions, TrainOptions
from nanogpt.runtime import Machine
from nanogpt.world import World

if TYPE_CHECKING:
    from nanogpt.checkpoint.reader import Checkpoint
    from nanogpt.convert.pretrained import Pretrained
    from nanogpt.distributed.parallelize import Division

SHAPE = {f.name for f in fields(GPTConfig)} - {"vocab_size", "dropout", "init"}  # what weights decide
C = TypeVar("C", bound=TrainOptions)


@dataclass
class Setup(Generic[C]):
    """A run that is decided, and not yet made."""

    config: C  # final
    machine: Machine
    dataset: loader.Dataset
    batches: loader.TrainBatches
    shape: GPTConfig
    resumed: "Checkpoint | None"
    pretrained: "Pretrained | None"
    division: "Division | None"  # of the model between several processes
    notices: list[str]  # what the user should know of how it was decided

    @property
    def init_device(self) -> torch.device:
        """Where the model is made; what is divided comes to the devices in parts."""
        return self.division.init_device(self.machine.device) if self.division else self.machine.device

    def describe(self, n_params: int) -> str:
        """What is about to be trained, on what, in a few lines."""
        dataset, batches, iters = self.dataset, self.batches, self.config.max_iters
        batch = f"{batches.full * batches.block_size:,} tokens an iteration"
        if batches.ramp:
            batch += f", from {batches.ramp[0] * batches.block_size:,} at first to all at {len(batches.ramp)}"
        scored = len(dataset.train) - 1
        if self.config.documents == "rows":
            kept = batches.sampler.n_windows * batches.block_size
            batch += (
                f"; rows that start at a document keep {kept:,} of {scored:,} tokens and leave out "
                f"{1 - kept / scored:.1%}"
            )
        read, texts = batches.epochs(iters), dataset.train.texts
        times = f"the text {read[0]:.2f} times"
        if len(texts) > 1:
            each = zip(texts, read, strict=True)
            times = ", ".join(
                f"{one.name} ({float(one.weight):.1%}) {often:.2f} times" for one, often in each
            )
        divided = f"parallel: {self.division.why}\n" if self.division else ""
        return (
            f"machine: {self.machine.reason}\n{divided}"
            f"data: {dataset.folder}, {len(dataset.train):,} training and {len(dataset.val):,} validation "
            f"tokens, vocabulary {dataset.vocab_size:,}\n"
            f"model: {n_params:,} parameters; {batch}; {iters:,} iterations read {times}"
        )


def decide(
    config: C, origins: dict[str, str], world: World, try_step: Callable[[C, Machine, GPTConfig, int], None]
) -> Setup[C]:
    """Decide all that `config` leaves open. Nothing is written. UserError says what is wrong.

    `origins` says which options were given, and where, and gets what weights or numbers of tokens decide.

    `try_step` makes some updates with micro-batches of so many windows, for --batch_size=auto.
    """
    notices: list[str] = []
    config, resumed, pretrained = resolve_init_from(config, origins, notices)
    require_consistent(config, origins)
    machine = runtime.setup(config.device, config.dtype, config.n_embd, world)
    machine = replace(machine, casting=config.casting)
    dataset = open_data(config)
    shape = pick_fields(GPTConfig, config, vocab_size=dataset.vocab_size)
    division = None
    if world.size > 1:
        from nanogpt.distributed import parallelize

        division = parallelize.divide(shape, config, config.parallel, config.shard_size, machine)
    if config.batch_size == "auto":
        from nanogpt.gpu import auto_batch_size

        divided = division.why if division and not division.whole else ""
        config = auto_batch_size.choose(config, machine, divided, partial(try_step, config, machine, shape))
        notices.append(
            f"batch_size = {config.batch_size}: the most that fits in the memory of {machine.name()}"
        )
    config = config.in_iterations(origins)
    if config.cuda_graph:
        from nanogpt.gpu import cuda_graphs

        cuda_graphs.require_recordable(config, machine, dataset.train.scored is not None)
    batches = open_batches(config, config.seed, dataset, machine)
    if resumed:
        resumed.require_tokenizer(dataset.fingerprint, dataset.vocab_size, dataset.folder)
    if pretrained:
        from nanogpt.convert.start import require_tokenizer

        require_tokenizer(pretrained, dataset)
    if config.attention != "auto" or machine.device.type == "cuda":
        from nanogpt.gpu import attention_kernels

        biased = config.documents == "masked" or shape.position == "alibi"
        found = attention_kernels.require_attention(config.attention, shape, machine, biased)
        notices.append(f"attention: {found}")
    if config.compile == "auto":  # a resumed run inherits what is chosen
        tokens = batches.tokens_before(config.max_iters)
        config = replace(config, compile=worth_compiling(shape, tokens, machine))
        origins["compile"] = "auto"
    return Setup(config, machine, dataset, batches, shape, resumed, pretrained, division, notices)


def join(options: TrainOptions, run: Path) -> World:
    """The processes that torchrun started, if it did. UserError for a device that is not there, or if the
    processes do not meet, or are not the same. What is left of one that hangs is written into `run`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    from nanogpt.distributed.world import init_processes

    return init_processes(runtime.find_device(options.device).type, asdict(options), run)


def resolve_init_from(
    config: C, origins: dict[str, str], notices: list[str]
) -> "tuple[C, Checkpoint | None, Pretrained | None]":
    """What --init_from asks to resume, or the weights that it names; and the options of that run or the
    shape of those weights, with what is given now over them."""
    if config.init_from == "scratch":
        return config, None, None
    if config.init_from not in ("resume", "auto"):
        from nanogpt.convert.start import adopt

        config, pretrained = adopt(config, origins, SHAPE | {"init"}, notices)
        return config, None, pretrained
    from nanogpt.checkpoint.resume import resume

    return *resume(config, origins, SHAPE, notices), None


def open_data(options: DataOptions) -> loader.Dataset:
    """The dataset, or several as one; UserError for a text shorter than a window."""
    if Path(options.dataset).is_dir() or not set(options.dataset) & set(",:"):
        dataset = loader.load(loader.find(options.dataset, ROOT))
    else:
        from nanogpt.data import mixture

        dataset = mixture.load(options.dataset, ROOT)
    loader.require_window(dataset.train, options.block_size, "training")
    loader.require_window(dataset.val, options.block_size, "validation")
    return dataset


def open_batches(
    options: DataOptions, seed: int, dataset: loader.Dataset, machine: Machine
) -> loader.TrainBatches:
    """The batches of --documents; UserError for data that has no documents, or for too many processes."""
    separator, sampler = None, None
    if options.documents != "stream":
        from nanogpt.data import documents

        separator = documents.separator(dataset, options.documents)
        if options.documents == "rows":
            sampler = documents.document_sampler(dataset.train, separator, options.block_size, seed)
            separator = None
    world, ramp = machine.world, options.ramp()
    fewest = min([*ramp, options.windows_per_update])
    if fewest < world.size:
        raise UserError(
            f"{world.size} processes for a batch of {fewest} windows; start fewer, or raise --batch_size or "
            f"--gradient_accumulation_steps"
        )
    numbers = (options.block_size, options.windows, options.gradient_accumulation_steps, seed)
    return loader.TrainBatches(
        dataset.train, *numbers, machine.device, ramp, separator, sampler, world.share, world.sum_int
    )


def worth_compiling(shape: GPTConfig, tokens: int, machine: Machine) -> bool:
    """--compile=auto, for a run that reads so many `tokens`: never on a CPU, where it saves 25 % of a step
    at 128 channels but 4 % at 384 (docs/results.md)."""
    if machine.device.type != "cuda":
        return False
    from nanogpt.compile import pays
    from nanogpt.gpu.chips import peak_flops

    with torch.device("meta"):
        model = GPT(shape)
    return pays(tokens * model.flops_per_token(), peak_flops(machine.name()))
