"""Per-token log-likelihoods of given text, in batches of rows of similar length.

A row is a sequence of ids whose last `scored` ids are predicted. Rows are sorted by length and padded on
the right; attention is causal, so padding has no effect and results do not depend on the batch size except
for rounding. The LM head is applied to scored positions only, in chunks: with 50,257 ids it would otherwise
cost more time than the rest of a small model, and more memory than a large one.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.data.token_files import Tokens
from nanogpt.errors import UserError
from nanogpt.loss import logits_chunk_size
from nanogpt.model import GPT
from nanogpt.runtime import DTYPES, Machine
from nanogpt.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 8192  # default tokens per batch
Advance = Callable[[int], object]
Scored = tuple[int, np.ndarray, bool]  # a row's index, losses and whether all ids are the argmax
Pair = tuple[np.ndarray, np.ndarray]  # ids of a context and of its continuation


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, with its tokenizer, device and batch size."""

    model: GPT  # in evaluation mode
    tokenizer: Tokenizer
    machine: Machine
    batch_size: int = 0  # full-length rows per batch (more if shorter); 0: BATCH_TOKENS tokens

    @property
    def block_size(self) -> int:
        return self.model.config.block_size


# ----------------------------------------------------------------------------- rows


class Requests:
    """Rows of context and continuation ids, truncated on the left to `block_size` inputs as in lm-eval;
    `cut` (n,) marks the truncated rows."""

    def __init__(self, pairs: Sequence[Pair], block_size: int):
        self.rows = []
        self.cut = np.zeros(len(pairs), dtype=bool)
        for i, (context, continuation) in enumerate(pairs):
            ids = np.concatenate([context, continuation]).astype(np.int64)
            self.cut[i] = len(ids) > block_size + 1
            ids = ids[-(block_size + 1) :]
            self.rows.append((ids, min(len(continuation), len(ids) - 1)))
        self.lengths = np.array([len(ids) for ids, _ in self.rows], dtype=np.int64)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.rows[i]


class Ids:
    """Ids of a text in memory, with the interface of data.Tokens."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.ids[start : start + count]


class Windows:
    """Rows that score every id of `texts` exactly once, except the first of each text.

    The first window scores all of its ids, each further window the next `stride` ids. A window has
    `block_size` inputs if the text is long enough, so it overlaps ids scored before (lm-eval's rolling
    log-likelihood with context_len = block_size - stride + 1). `limit` > 0 selects that many windows,
    evenly spaced. Raise UserError if no text has two ids.
    """

    def __init__(self, texts: Iterable[Ids | Tokens], block_size: int, stride: int, limit: int = 0):
        self.texts = [text for text in texts if len(text) > 1]
        if not self.texts:
            raise UserError("the text is empty: at least two tokens are needed to score it")
        self.block_size, self.stride = block_size, stride
        sizes = np.array([len(text) for text in self.texts])
        self.counts = 1 - -np.maximum(0, sizes - 1 - block_size) // stride
        self.ends = np.cumsum(self.counts)
        every = int(self.ends[-1])
        self.chosen = np.linspace(0, every - 1, min(limit or every, every)).astype(np.int64)
        indices = np.searchsorted(self.ends, self.chosen, side="right")
        self.lengths = np.minimum(sizes[indices], block_size + 1)

    def __len__(self) -> int:
        return len(self.chosen)

    def place(self, i: int) -> tuple[int, int, int]:
        """Return the text index of window i, and start and end of its scored ids."""
        number = int(self.chosen[i])
        index = int(np.searchsorted(self.ends, number, side="right"))
        turn = number - int(self.ends[index] - self.counts[index])
        end = self.block_size + 1 + turn * self.stride
        begin = end - self.stride if turn else 1
        return index, begin, min(len(self.texts[index]), end)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        index, begin, end = self.place(i)
        start = max(0, end - self.block_size - 1)
        return self.texts[index].read(start, end - start), end - begin


def encode_text(text: str, tokens: Tokenizer) -> Ids:
    """Encode a text, preceded by end-of-text if the vocabulary has it: then every token of the text is
    scored, else all but the first."""
    start = [] if tokens.end_of_text is None else [tokens.end_of_text]
    return Ids(np.concatenate([np.array(start, dtype=np.int64), tokens.encode(text)]))


def beginning(tokens: Tokenizer) -> int:
    """Return the id used as context if there is none: end-of-text, else a newline. Raise UserError if the
    vocabulary has neither."""
    if tokens.end_of_text is not None:
        return tokens.end_of_text
    try:
        return tokens.encode_prompt("\n")[0]
    except UserError:
        raise UserError(f"the {tokens.kind} tokenizer has no end-of-text or newline to start with") from None


# ----------------------------------------------------------------------------- scores


def batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yield the row indices of each batch, longest rows first, at most `budget` tokens including padding
    (but at least one row)."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        count = max(1, budget // int(lengths[order[0]]))
        yield order[:count]
        order = order[count:]


@torch.inference_mode()
def score(
    subject: Subject,
    rows: Requests | Windows,
    *,
    greedy: bool = False,
    advance: Advance = lambda count: None,
) -> Iterator[Scored]:
    """Yield for each row its index, the loss of each scored id in nats, float64 (scored,), and, with
    `greedy`, whether every scored id is the argmax.

    The batches are shared among the ranks of the subject's machine, and every rank yields all rows, with
    equal results for any number of ranks. `advance` is called with the number of rows in each finished batch
    of this rank; an error that it raises is raised on all ranks. Collective.
    """
    world = subject.machine.world
    share = _score_share(subject, rows, greedy, advance)
    if world.size == 1:
        yield from share
    else:
        scored = world.raise_on_all_ranks(lambda: list(share))
        yield from itertools.chain.from_iterable(world.gather(scored))


def _score_share(
    subject: Subject, rows: Requests | Windows, greedy: bool, advance: Advance
) -> Iterator[Scored]:
    """Yield as `score`, for the batches of this rank, in the order of `batches`."""
    subject, world = _lowered(subject), subject.machine.world
    torch.backends.cuda.enable_cudnn_sdp(False)  # it takes 0.4 s to plan for each new length
    budget = subject.batch_size * subject.block_size or BATCH_TOKENS
    for numbers in itertools.islice(batches(rows.lengths, budget), world.rank, None, world.size):
        batch_rows = [rows[int(i)] for i in numbers]
        ids = np.zeros((len(batch_rows), max(len(row) for row, _ in batch_rows)), dtype=np.int64)
        scored = np.zeros(ids.shape, dtype=bool)
        for i, (row, count) in enumerate(batch_rows):
            ids[i, : len(row)] = row
            scored[i, len(row) - count : len(row)] = True
        losses, first = _losses(subject, torch.from_numpy(ids), torch.from_numpy(scored), greedy)
        ends = np.cumsum([count for _, count in batch_rows])[:-1]
        parts = zip(numbers, np.split(losses, ends), np.split(first, ends), strict=True)
        for number, nats, is_first in parts:
            yield int(number), nats, bool(is_first.all())
        advance(len(batch_rows))


def _lowered(subject: Subject) -> Subject:
    """On a CPU with a lower precision, replace the model by a copy cast to it, as Machine.in_dtype does."""
    machine = subject.machine
    if machine.device.type != "cpu" or machine.dtype == "float32":
        return subject
    model = copy.deepcopy(subject.model).to(DTYPES[machine.dtype])
    return replace(subject, model=model, machine=replace(machine, dtype="float32"))


def _losses(subject: Subject, ids: Tensor, scored: Tensor, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss in nats of each `scored` id of ids (B, T), row by row, and whether it is the argmax."""
    model, machine = subject.model, subject.machine
    ids, scored = ids.to(machine.device), scored.to(machine.device)
    with machine.autocast():
        hidden = model.hidden(ids[:, :-1])[scored[:, 1:]]
    targets = ids[scored]
    losses, first = [], []
    at_once = logits_chunk_size(machine.device.type, model.config.vocab_size)
    for part, target in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        with machine.autocast():
            logits = model.head(part)
        logits = logits.float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        if greedy:
            first.append(logits.argmax(dim=-1) == target)
    verdicts = torch.cat(first) if greedy else torch.zeros(len(targets), dtype=torch.bool)
    return torch.cat(losses).cpu().double().numpy(), verdicts.cpu().numpy()
