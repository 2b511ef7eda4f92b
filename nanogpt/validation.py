"""The validation loss: the same windows each time, with its standard error."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from nanogpt.data.loader import Dataset, eval_batches
from nanogpt.data.token_files import Mixture
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.model import GPT
from nanogpt.runtime import Machine


@dataclass(frozen=True)
class Evaluation:
    loss: float  # mean over tokens, in nats
    stderr: float  # standard error of `loss`, from the spread between windows
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)  # the loss on each of several datasets

    def describe(self, bytes_per_token: float | None) -> str:
        """Perplexity and, where the text's bytes are known, bits a byte: the figure that compares
        models with different tokenizers."""
        words = f"perplexity {math.exp(min(self.loss, 700)):.4g}"
        if bytes_per_token:
            words += f", {self.loss / math.log(2) / bytes_per_token:.4f} bits a byte"
        return words + "".join(f", {name} {loss:.4f}" for name, loss in self.parts.items())


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, ...]],
    machine: Machine,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean loss over all scored tokens of `batches`; None if `stopped` became true meanwhile."""
    was_training, compute = model.training, machine.in_dtype(model)
    running: Iterable[tuple[Tensor, ...] | None] = itertools.takewhile(lambda _: not stopped(), batches)
    if machine.world.size > 1:
        from nanogpt.distributed import parallelize

        compute = parallelize.in_dtype(model, machine)
        running = parallelize.in_step(model, batches, machine.world, stopped)
    model.eval()
    sums, counts = [], []
    for batch in running:
        machine.world.moved()
        if batch is None:
            compute(torch.zeros(1, 1, dtype=torch.long, device=machine.device))
            continue
        idx, targets, *documents = batch
        _, losses = compute(idx, targets, documents[0] if documents else None, "none")
        sums.append(losses.sum(dim=1).double())
        counts.append((targets != IGNORE).sum(dim=1))
    model.train(was_training)
    if machine.world.any(stopped()):  # asked once, by all: they may have different numbers of batches
        return None
    sums.append(torch.zeros(0, dtype=torch.float64, device=machine.device))  # for a process without a window
    counts.append(torch.zeros(0, dtype=torch.int64, device=machine.device))
    window_sums, window_counts = torch.cat(sums), torch.cat(counts)
    squares = window_sums.square() / window_counts.clamp(min=1)
    totals = torch.stack(
        [window_sums.sum(), squares.sum(), window_counts.sum(), window_sums.new_tensor(len(window_sums))]
    )
    total, square, tokens, windows = machine.world.sum(totals.double()).tolist()
    if not tokens:
        raise UserError("no target of the text is scored: its windows hold prompts only; give more text")
    loss = total / tokens
    spread = max(0.0, square / tokens - loss**2)  # between windows, weighted by their tokens
    return Evaluation(loss, math.sqrt(spread / max(1, windows - 1)), int(tokens))


def evaluate_splits(
    model: GPT,
    dataset: Dataset,
    shape: tuple[int, int],
    max_batches: int,
    machine: Machine,
    stopped: Callable[[], bool],
    separator: int | None = None,
) -> tuple[Evaluation, Evaluation] | None:
    """The training and the validation split, on at most `max_batches` of `shape` (B, T) each, the same
    ones at every call. The training split is scored on no more windows than the validation split has.

    Of several datasets each is scored, on its part of the batches; their mean by weight is the loss."""
    batch_size, block_size = shape
    train, val = dataset.train, dataset.val
    of_train, of_val = train.mixture, val.mixture
    texts, most = [(train, val)], max_batches * batch_size
    if of_train and of_val:
        texts = list(zip(of_train.members, of_val.members, strict=True))
        most = max(1, most // len(texts))
    found = []
    for text in texts:
        windows = min(most, (len(text[1]) - 1) // block_size)
        for tokens in text:
            batches = eval_batches(
                tokens,
                block_size,
                batch_size,
                windows,
                machine.device,
                separator,
                machine.world.share,
            )
            found.append(evaluate(model, batches, machine, stopped))
            if found[-1] is None:
                return None
    scores = cast(list[Evaluation], found)
    if of_train and of_val:
        return weighted(of_train, scores[::2]), weighted(of_val, scores[1::2])
    return scores[0], scores[1]


def weighted(mixture: Mixture, found: list[Evaluation]) -> Evaluation:
    """The mean by weight of what was `found` on each dataset."""
    weights = [float(weight) for weight in mixture.weights]
    return Evaluation(
        sum(weight * one.loss for weight, one in zip(weights, found, strict=True)),
        math.hypot(*(weight * one.stderr for weight, one in zip(weights, found, strict=True))),
        sum(one.tokens for one in found),
        {name: one.loss for name, one in zip(mixture.names, found, strict=True)},
    )
