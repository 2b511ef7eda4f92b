"""One update and one evaluation: what train.py, bench.py and eval.py share."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from nanogpt import flops
from nanogpt.data import Dataset, eval_batches
from nanogpt.distributed.parallel import average_next, in_dtype, in_step
from nanogpt.errors import Diverged, UserError
from nanogpt.loss import IGNORE
from nanogpt.model import GPT
from nanogpt.optim import Optimizer, clip_gradients
from nanogpt.runtime import Machine
from nanogpt.tokenfiles import Mixture
from nanogpt.world import World


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device; reading one waits until the step is done."""

    loss: Tensor  # mean over the micro-batches
    grad_norm: Tensor  # before clipping

    def row(self, grad_clip: float) -> dict[str, Any]:
        """The numbers to log."""
        norm = float(self.grad_norm)
        return {"loss": float(self.loss), "grad_norm": norm, "clipped": 0 < grad_clip < norm}

    def check(self, iter_num: int, lr: float, scaled: bool) -> None:
        """Raise Diverged if this update was made of non-finite numbers. With a scaled loss (float16)
        a non-finite gradient is no harm: the scaler has skipped the update."""
        loss, norm = float(self.loss), float(self.grad_norm)
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            raise Diverged(
                f"loss {loss}, gradient norm {norm} at iteration {iter_num} with learning rate {lr:.3g}; "
                f"go on from the last checkpoint with a smaller --learning_rate (--init_from=resume)"
            )


def train_step(
    model: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    seed: int,
    iter_num: int,
    machine: Machine,
    **options: Any,
) -> StepResult:
    """Update the weights once, as `update` does with these `options`. Random numbers (dropout) are drawn
    anew from (seed, iter_num): nothing that happens between steps changes them, and a resumed run draws the
    same.
    """
    reseed(machine, seed, iter_num)
    return update(model, optimizer, batches, iter_num=iter_num, machine=machine, **options)


def reseed(machine: Machine, seed: int, iter_num: int) -> None:
    """Draw the random numbers of update `iter_num` next."""
    machine.seed(seed * 1_000_003 + iter_num + machine.world.rank * 1_000_000_007)


def update(
    model: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    windows: int,
    targets: int = 0,
    batch_size: int = 0,
    lr: float | Tensor,
    grad_clip: float,
    iter_num: int = 0,
    machine: Machine,
    scaler: torch.amp.GradScaler,
) -> StepResult:
    """Update the weights once, with the mean gradient of micro-batches (idx, targets and perhaps documents)
    that have `windows` rows in all. Where not every target is scored, `targets` are, and weigh the same.

    `model` as parallel.connect gives it, or Machine.in_dtype in one process. Several processes say how many
    rows a micro-batch has (`batch_size`; the last ones fewer). The rate may lie on the device. Nothing in it
    waits for the device, unless the loss is scaled (float16) or not every target is scored.
    """
    world, total = machine.world, torch.zeros((), device=machine.device)
    world.at(iter_num, "reading data")
    for batch, counted, last in passes(batches, windows, batch_size, world):
        world.at(iter_num, "computing")
        average_next(model, wanted=last)
        share, batch = weigh(batch, counted, windows, targets)
        loss = model(*batch)[1]  # the logits are let go at once
        loss = loss * share * world.size  # the mean over processes divides by their number
        scaler.scale(loss).backward()
        total += loss.detach()
        world.at(iter_num, "reading data")
    world.at(iter_num, "updating")
    stepped = cast(torch.optim.Optimizer, optimizer)  # all that the scaler uses of one, ours has
    scaler.unscale_(stepped)
    grad_norm = clip_gradients(optimizer.names, grad_clip, optimizer.layout)
    optimizer.lr = lr
    scaler.step(stepped)
    scaler.update()
    optimizer.zero_grad()
    return StepResult(world.sum(total) / world.size, grad_norm)


def passes(
    batches: Iterable[tuple[Tensor, ...]], windows: int, batch_size: int, world: World
) -> Iterator[tuple[tuple[Tensor, ...], int, bool]]:
    """Each micro-batch of this process's share of `windows`, how many of its rows count, and whether it is
    the last. All processes make the same number of passes, because those of a sharded model need one
    another: who has a micro-batch fewer runs a row again, which counts nothing."""
    left, made = world.share(windows)[1], 0
    largest = -(-windows // world.size)
    wanted = -(-largest // batch_size) if world.size > 1 else 0
    source = iter(batches)
    batch = next(source, None)
    while batch is not None:
        following, made = next(source, None), made + 1
        if following is None and made < wanted:
            following = tuple(part[:1] for part in batch)
        counted = min(left, len(batch[0]))
        left -= counted
        yield batch, counted, following is None
        batch = following


def weigh(
    batch: tuple[Tensor, ...], counted: int, windows: int, targets: int
) -> tuple[float | Tensor, tuple[Tensor, ...]]:
    """The share that a micro-batch, of which so many rows count, has in the step's mean; and what to run. The
    mean over no target is no number: where none is scored all are, and the share is 0."""
    if not targets:
        return counted / windows, batch
    idx, wanted, *documents = batch
    scored = wanted != IGNORE
    return scored[:counted].sum() / targets, (idx, torch.where(scored.any(), wanted, 0), *documents)


def flops_per_token(model: GPT) -> int:
    """What a training step costs (flops.flops_per_token)."""
    shape = model.config
    multiplying = model.n_params(positions=False)
    return flops.flops_per_token(multiplying, shape.n_layer, shape.n_embd, shape.block_size)


def try_out(
    model: Callable[..., tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    shape: tuple[int, int],
    machine: Machine,
) -> None:
    """One forward and backward pass of idx with `shape` (B, T), to compile a model; leaves no trace."""
    zeros = torch.zeros(shape, dtype=torch.long, device=machine.device)
    # Two tensors: one that comes twice is a case of its own for a compiler, and would be all it compiles.
    _, loss = model(zeros, zeros.clone())
    loss.backward()
    optimizer.zero_grad()


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
    was_training, compute = model.training, in_dtype(model, machine)
    model.eval()
    sums, counts = [], []
    for batch in in_step(model, batches, machine.world, stopped):
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
