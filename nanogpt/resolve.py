"""Resolve a run's configuration before the model is built: initial weights, device and dtype, data and
parallelism.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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

FIXED_BY_WEIGHTS = {f.name for f in fields(GPTConfig)} - {"vocab_size", "dropout", "init"}  # options
C = TypeVar("C", bound=TrainOptions)


@dataclass
class Setup(Generic[C]):
    """A fully resolved run configuration; the model is not built yet."""

    config: C  # with all options resolved
    machine: Machine
    dataset: loader.Dataset
    batches: loader.TrainBatches
    model_config: GPTConfig
    resumed: "Checkpoint | None"
    pretrained: "Pretrained | None"
    division: "Division | None"  # sharding of the model over ranks
    notices: list[str]  # messages to print about the choices made

    @property
    def init_device(self) -> torch.device:
        """Device on which the model is initialized: the CPU if it is then sharded, else that of training."""
        sharded = self.division is not None and not self.division.whole
        return torch.device("cpu") if sharded else self.machine.device

    def describe(self, model: GPT) -> str:
        """Summarize device, data, model and number of iterations in a few lines."""
        dataset, batches, iters = self.dataset, self.batches, self.config.max_iters
        batch = f"{batches.full * batches.block_size:,} tokens per iteration"
        if batches.ramp:
            batch += f", ramped up from {batches.ramp[0] * batches.block_size:,} in {len(batches.ramp)} iters"
        if self.config.documents == "rows":
            dropped = 1 - batches.sampler.n_sequences * batches.block_size / (len(dataset.train) - 1)
            batch += f"; --documents=rows drops {dropped:.1%} of the training tokens"
        texts = zip(dataset.train.texts, batches.epochs(iters), strict=True)
        epochs = [(f"{text.name} ({float(text.weight):.1%}) " if text.name else "", n) for text, n in texts]
        length = f"{iters:,} iterations, {', '.join(f'{name}{n:.2f} epochs' for name, n in epochs)}"
        if self.config.minutes:
            length = f"minutes: {self.config.minutes:g}"
        sharding = f"parallel: {self.division.why}\n" if self.division else ""
        named = dataset.tokenizer != loader.vocabulary.GPT2_BY_NAME
        tables = f" ({model.ngrams.weight.numel():,} of them in n-gram tables)" if model.ngrams else ""
        return (
            f"machine: {self.machine.reason}\n{sharding}"
            f"data: {dataset.folder}, {len(dataset.train):,} training and {len(dataset.val):,} validation "
            f"tokens, vocabulary {dataset.vocab_size:,}{'' if named else ' (of GPT-2, without a meta.pkl)'}\n"
            f"model: {model.n_params():,} parameters{tables}; {batch}; {length}"
        )


def decide(
    config: C, origins: dict[str, str], world: World, try_step: Callable[[C, Machine, GPTConfig, int], None]
) -> Setup[C]:
    """Resolve all options that are "auto" or determined by a checkpoint, and load the data. Writes no files
    but the dataset of a text file.

    `origins` gives the source of each option that was set; those that a checkpoint, --batch_tokens or
    --max_tokens determines are added in place. `try_step(..., n)` runs two iterations with `n` sequences per
    micro-batch, for --batch_size=auto. Raise UserError if the options do not fit the device, the data or the
    checkpoint.
    """
    notices: list[str] = []
    config, resumed, pretrained = resolve_init_from(config, origins, notices)
    require_consistent(config, origins)
    machine = runtime.setup(config.device, config.dtype, config.n_embd, world)
    machine = replace(machine, casting=config.casting)
    if machine.device.type == "cuda" or config.dtype == "bfloat16" or shutil.which("nvidia-smi"):
        from nanogpt.gpu import availability

        notices += availability.prepare(machine, config.device)
    if Path(config.dataset).is_file():
        from nanogpt.prepare import own_text

        text = Path(config.dataset)
        config = replace(config, dataset=str(own_text.folder_of([text])))
        world.rank_zero_only(lambda: own_text.prepare([text]))
    dataset = open_data(config)
    model_config = pick_fields(GPTConfig, config, vocab_size=dataset.vocab_size)
    division = None
    if world.size > 1:
        from nanogpt.distributed import parallelize

        division = parallelize.divide(model_config, config, config.parallel, config.shard_size, machine)
    if model_config.ngram_orders:
        from nanogpt.checkpoint.writer import free_memory
        from nanogpt.ngrams import training

        sharded = division is not None and not division.whole
        training.require_possible(model_config, free_memory(), sharded)
    if config.compile == "auto":  # the choice is saved; a resumed run inherits it
        origins["compile"], worth = "auto", False
        if machine.device.type == "cuda":
            from nanogpt.compile import pays

            worth = pays(config, origins, model_config, machine.name(), world.size)
        config = replace(config, compile=worth)
    if config.batch_size == "auto":
        from nanogpt.gpu.auto_batch_size import choose as choose_batch_size

        why = division.why if division and not division.whole else ""
        config = choose_batch_size(config, machine, why, partial(try_step, config, machine, model_config))
        notices.append(
            f"batch_size = {config.batch_size}: the largest that fits in the memory of {machine.name()}"
        )
    tokens = config.micro_batch_size * config.block_size
    widest = max(model_config.n_head * model_config.head_size, model_config.padded_vocab_size, tokens)
    if widest * config.n_embd * config.n_layer > 1 << 28:  # smaller models fit anywhere
        from nanogpt.checkpoint import memory

        memory.require_memory(config, model_config, machine)
    config = config.in_iterations(origins)
    if config.minutes:
        from nanogpt.pace import time_budget

        notices += time_budget.fractions(config, origins)
    if config.cuda_graph:
        from nanogpt.gpu import cuda_graphs

        cuda_graphs.require_recordable(config, machine, dataset.train.scored is not None)
    batches = open_batches(config, config.seed, dataset, machine)
    if pretrained:
        from nanogpt.convert.start import require_tokenizer

        require_tokenizer(pretrained, dataset)
    if config.attention != "auto" or machine.device.type == "cuda":
        from nanogpt.gpu.attention_kernels import require_attention

        kernel = require_attention(config.attention, model_config, machine, config.documents)
        notices.append(f"attention: {kernel}")
    return Setup(config, machine, dataset, batches, model_config, resumed, pretrained, division, notices)


def join(options: dict[str, Any], run_dir: Path) -> World:
    """Join the process group started by torchrun, if any; reports on hung ranks are written to `run_dir`.

    Raise UserError if the device does not exist, rendezvous fails, or the ranks' options or versions differ.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    from nanogpt.distributed.world import init_processes

    return init_processes(runtime.find_device(options["device"]).type, options, run_dir)


def resolve_init_from(
    config: C, origins: dict[str, str], notices: list[str]
) -> "tuple[C, Checkpoint | None, Pretrained | None]":
    """Return the options, and the checkpoint to resume or the pretrained weights that --init_from names.

    Saved options, or the architecture of the weights, override defaults; options given now override both.
    """
    if config.init_from == "scratch":
        return config, None, None
    if config.init_from not in ("resume", "auto"):
        from nanogpt.convert.start import adopt

        config, pretrained = adopt(config, origins, FIXED_BY_WEIGHTS | {"init"}, notices)
        return config, None, pretrained
    from nanogpt.checkpoint.resume import resume

    return *resume(config, origins, FIXED_BY_WEIGHTS, notices), None


def open_data(options: DataOptions) -> loader.Dataset:
    """Open the dataset or mixture. Raise UserError if a split is shorter than one sequence."""
    if Path(options.dataset).is_dir() or not set(options.dataset) & set(",:"):
        dataset = loader.load(loader.find(options.dataset, ROOT))
    else:
        from nanogpt.data import mixture

        dataset = mixture.load(options.dataset, ROOT)
    loader.require_sequence(dataset.train, options.block_size, "training")
    loader.require_sequence(dataset.val, options.block_size, "validation")
    return dataset


def open_batches(
    options: DataOptions, seed: int, dataset: loader.Dataset, machine: Machine
) -> loader.TrainBatches:
    """Build the training batches. Raise UserError if --documents finds no document, or if a batch has fewer
    sequences than there are ranks."""
    separator, sampler = None, None
    if options.documents != "stream":
        from nanogpt.data import documents

        separator = documents.separator(dataset, options.documents)
        if options.documents == "rows":
            sampler = documents.document_sampler(dataset.train, separator, options.block_size, seed)
            separator = None
    world, ramp = machine.world, options.ramp()
    fewest = min([*ramp, options.sequences_per_iteration])
    if fewest < world.size:
        raise UserError(
            f"{world.size} ranks for a batch of {fewest} sequences; start fewer, or raise --batch_size or "
            f"--gradient_accumulation_steps"
        )
    numbers = (options.block_size, options.micro_batch_size, options.gradient_accumulation_steps, seed)
    return loader.TrainBatches(dataset.train, *numbers, machine.device, ramp, separator, sampler, world)
