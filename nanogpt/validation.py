"""Validation loss on a fixed set of sequences, with its standard error."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from nanogpt.data.loader import Dataset, eval_batches
from nanogpt.data.token_files import Tokens
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.model import GPT
from nanogpt.runtime import Machine

MIN_TOKENS_ON_CPU = 2048  # tokens per forward pass: 0.6x the time of 768 with 4 layers of 128 channels


@dataclass(frozen=True)
class Evaluation:
    loss: float  # mean over tokens, in nats/token
    stderr: float  # standard error of `loss`, over sequences; NaN for a single sequence
    tokens: int  # number of scored tokens
    parts: dict[str, float] = field(default_factory=dict)  # loss per dataset of a mixture

    def describe(self, bytes_per_token: float | None) -> str:
        """Return the standard error, perplexity and, if the byte count of the text is known, bits/byte, which
        is comparable across tokenizers."""
        # omitted if it would print as 0.0000, or is NaN (a single sequence)
        line = f"± {self.stderr:.4f}, " if self.stderr >= 0.00005 else ""
        line += f"perplexity {math.exp(min(self.loss, 700)):.4g}"
        if bytes_per_token:
            line += f", {self.loss / math.log(2) / bytes_per_token:.4f} bits/byte"
        return line + "".join(f", {name} {loss:.4f}" for name, loss in self.parts.items())


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, ...]],
    machine: Machine,
    stopped: Callable[[], bool] = lambda: False,
    n_batches: int | None = None,
) -> Evaluation | None:
    """Return the mean loss over all scored tokens of `batches`, or None if `stopped()` becomes true.

    A progress bar of `n_batches` (None: unknown) appears after a second. Collective: call on all ranks.
    """
    was_training, compute = model.training, machine.in_dtype(model)
    running: Iterable[tuple[Tensor, ...] | None] = itertools.takewhile(lambda _: not stopped(), batches)
    if machine.world.size > 1:
        from nanogpt.distributed import parallelize

        compute = parallelize.in_dtype(model, machine)
        running = parallelize.in_step(model, batches, machine.world, stopped)
    model.eval()
    sums = [torch.zeros(0, device=machine.device)]  # a rank may have no sequences
    counts = [torch.zeros(0, dtype=torch.int64, device=machine.device)]
    hidden = None if machine.world.is_main_process else True  # None: disabled if stderr is not a terminal
    for batch in tqdm(running, "evaluating", n_batches, leave=False, disable=hidden, delay=1, unit="batch"):
        machine.world.report_progress()
        if batch is None:
            compute(torch.zeros(1, 1, dtype=torch.long, device=machine.device))
            continue
        idx, targets, *documents = batch
        if model.compiled_token_losses:
            _, losses = model.compiled_token_losses(idx, targets, *documents)
        else:
            _, losses = compute(idx, targets, documents[0] if documents else None, "none")
        sums.append(losses.sum(dim=1))
        counts.append((targets != IGNORE).sum(dim=1))
    model.train(was_training)
    if machine.world.any_rank(stopped()):  # one collective: batch counts may differ between ranks
        return None
    # On the CPU: Apple GPUs have no float64.
    loss_sums, target_counts = torch.cat(sums).cpu().double(), torch.cat(counts).cpu()
    squares = loss_sums.square() / target_counts.clamp(min=1)
    totals = torch.stack(
        [loss_sums.sum(), squares.sum(), target_counts.sum(), loss_sums.new_tensor(len(loss_sums))]
    )
    if machine.world.size > 1:
        totals = machine.world.sum(totals.to(machine.device))
    total, square, tokens, sequences = totals.tolist()
    if not tokens:
        raise UserError("no target is scored: the evaluated sequences hold only prompts; use more text")
    loss = total / tokens
    spread = max(0.0, square / tokens - loss**2)  # variance between sequences, weighted by tokens
    stderr = math.sqrt(spread / (sequences - 1)) if sequences > 1 else math.nan
    return Evaluation(loss, stderr, int(tokens))


def counts(dataset: Dataset, shape: tuple[int, int], max_batches: int) -> list[int]:
    """Return for each dataset of a mixture how many of its validation sequences `evaluate_splits` uses."""
    most = max(1, max_batches * shape[0] // len(dataset.val.texts))
    return [min(most, (len(text) - 1) // shape[1]) for text in dataset.val.texts]


def evaluate_splits(
    model: GPT,
    dataset: Dataset,
    shape: tuple[int, int],
    max_batches: int,
    machine: Machine,
    stopped: Callable[[], bool],
    separator: int | None = None,
) -> tuple[Evaluation, Evaluation] | None:
    """Evaluate the training and the validation split on at most `max_batches` batches of `shape` (B, T) each.

    The sequences are the same at every call; the training split uses at most as many as the validation split
    has. Each dataset of a mixture is evaluated on an equal part of the batches, and the loss is the mean of
    their losses, by weight. Return None if `stopped()` becomes true. Collective: call on all ranks.
    """
    batch_size, block_size = shape
    world = machine.world
    at_once = batch_size  # the size of compiled code, and limited by GPU memory
    if machine.device.type == "cpu" and not model.compiled_token_losses:
        at_once = max(batch_size, MIN_TOKENS_ON_CPU // block_size)
    train: list[Evaluation] = []
    val: list[Evaluation] = []
    every = counts(dataset, shape, max_batches)
    for *texts, count in zip(dataset.train.texts, dataset.val.texts, every, strict=True):
        for tokens, evaluations in zip(texts, (train, val), strict=True):
            batches = eval_batches(tokens, block_size, at_once, count, machine.device, separator, world)
            evaluation = evaluate(model, batches, machine, stopped, -(-world.share(count)[1] // at_once))
            if evaluation is None:
                return None
            evaluations.append(evaluation)
    return mean(dataset.train.texts, train), mean(dataset.val.texts, val)


def mean(texts: list[Tokens], evaluations: list[Evaluation]) -> Evaluation:
    """Return the weighted mean of `evaluations`, one per dataset in `texts`."""
    rows = [(text.name, float(text.weight), one) for text, one in zip(texts, evaluations, strict=True)]
    return Evaluation(
        sum(weight * one.loss for _, weight, one in rows),
        math.hypot(*(weight * one.stderr for _, weight, one in rows)),
        sum(one.tokens for one in evaluations),
        {name: one.loss for name, _, one in rows if name},
    )
