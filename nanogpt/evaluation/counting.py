"""Counting baseline: n-grams with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998), counted
in the training split and scored on the sequences that a run's validation uses, with the context they give.

An n-gram is stored as an integer whose digits in base vocabulary + 1 are its tokens, so that sorting groups
n-grams by their context and division removes the last token. The losses are saved in the dataset folder
(baseline.json), by validation sequences and order.
"""

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from nanogpt import ROOT, files, metrics
from nanogpt.config import PositiveInt
from nanogpt.data import documents, loader, mixture
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE

FIGURES = {"data": dict, "losses": {str: {str: float}}}  # baseline.json of a dataset: by sequences and order
ABOUT: dict[str, Any] = {
    "options?": {"dataset": str, "block_size": PositiveInt, "eval_iters": int, "batch_size": int},
    "data?": dict,
}
NAME = "baseline.json"
MOST = 50_000_000  # training tokens counted
AT_ONCE = 1 << 20  # tokens scored at a time
FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts if some counts of counts are 0, as in KenLM


class Level(NamedTuple):
    """n-grams of one length and their contexts, both sorted."""

    grams: np.ndarray  # uint64
    counts: np.ndarray
    contexts: np.ndarray  # distinct contexts: grams without their last token
    totals: np.ndarray  # sum of the counts of each context
    backoff: np.ndarray  # probability that discounting frees in each context
    discounts: np.ndarray  # by count: 0, 1, 2, 3 or more


class KneserNey:
    """Model of n-grams up to `order`, counted in `tokens`, int64 (n,), with ids below `vocab_size`."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int):
        if len(tokens) < order:
            raise UserError(f"{len(tokens)} tokens hold no {order}-gram; use more text")
        self.vocab_size, self.order, self.base = vocab_size, order, vocab_size + 1
        assert self.base**order < 1 << 64, f"{order}-grams of {vocab_size} ids exceed 64 bits"
        padded = np.append(tokens, [vocab_size] * (order - 1)).astype(np.uint64)  # all tokens start n-grams
        keys = np.zeros(len(tokens), dtype=np.uint64)
        for first in range(order):
            keys *= np.uint64(self.base)
            keys += padded[first : first + len(tokens)]
        keys.sort()
        starts = _starts(keys)
        grams, counts = keys[starts], np.diff(starts, append=len(keys))
        del keys, padded
        # By length. `whole` counts all occurrences, for the longest n-gram that known tokens form; `lower`
        # counts the distinct tokens before each n-gram, for those that back off from a longer one.
        self.whole: dict[int, Level] = {}
        self.lower: dict[int, Level] = {}
        for n in range(order, 0, -1):
            real = grams % self.base != vocab_size
            self.whole[n] = self._level(grams[real], counts[real])
            if n > 1:
                ends = np.sort(grams[real] % self.base ** (n - 1))
                begin = _starts(ends)
                self.lower[n - 1] = self._level(ends[begin], np.diff(begin, append=len(ends)))
                shorter = grams // self.base
                begin = _starts(shorter)
                grams, counts = shorter[begin], np.add.reduceat(counts, begin)

    def _level(self, grams: np.ndarray, counts: np.ndarray) -> Level:
        contexts = grams // self.base
        starts = _starts(contexts)
        discounts = _discounts(counts)
        totals = np.add.reduceat(counts, starts)
        freed = np.add.reduceat(discounts[np.minimum(counts, 3)], starts)
        return Level(grams, counts, contexts[starts], totals, freed / totals, discounts)

    def probabilities(self, tokens: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Return the probability of the last of each row of tokens (n, order), given the `known` (n,) tokens
        before it, at most order - 1."""
        result = np.full(len(tokens), 1 / self.vocab_size)
        keys, power = np.zeros(len(tokens), dtype=np.uint64), 1
        for n in range(1, self.order + 1):
            keys += tokens[:, self.order - n].astype(np.uint64) * np.uint64(power)
            power *= self.base
            for level, here in ((self.whole, known == n - 1), (self.lower, known >= n)):
                if here.any():
                    result[here] = self._interpolated(level[n], keys[here], result[here])
        return result

    def _interpolated(self, level: Level, keys: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Return the probabilities of n-grams from those of the (n-1)-grams that end them."""
        keys, inverse = np.unique(keys, return_inverse=True)  # searching sorted keys is fast
        context, in_context = _find(level.contexts, keys // self.base)
        gram, there = _find(level.grams, keys)
        counts = np.where(there, level.counts[gram], 0)
        seen = (counts - level.discounts[np.minimum(counts, 3)]) / level.totals[context]
        weight = np.where(in_context, level.backoff[context], 1.0)
        return np.where(in_context, seen, 0.0)[inverse] + weight[inverse] * shorter


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Return the index of the first of each run of equal values."""
    return np.flatnonzero(np.concatenate([[len(ordered) > 0], ordered[1:] != ordered[:-1]]))


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each of `wanted` in `ordered`, and whether it occurs there."""
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return at, ordered[at] == wanted


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts of counts 0 to 3 and above: D_i = i - (i + 1) Y n_(i+1) / n_i, Y = n_1 / (n_1 +
    2 n_2), where n_i n-grams have count i."""
    times = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if not times[:3].all():
        return FALLBACK
    i = np.arange(1, 4)
    discounts = i - (i + 1) * times[0] / (times[0] + 2 * times[1]) * times[1:] / times[:3]
    return np.concatenate([[0.0], discounts]) if ((discounts > 0) & (discounts <= i)).all() else FALLBACK


# ----------------------------------------------------------------------------- figures of a run


@dataclass(frozen=True)
class Sequences:
    """The validation sequences of a run."""

    dataset: loader.Dataset
    block_size: int
    count: int
    separator: int | None = None  # first token of each document, if documents are isolated

    @property
    def name(self) -> str:
        apart = "" if self.separator is None else ", documents apart"
        return f"{self.count:,} sequences of {self.block_size}{apart}"

    def figures(self) -> dict[str, Any]:
        """Return the contents of baseline.json: the hashes of the data, and losses by sequences and order."""
        with suppress(UserError, OSError):  # missing or damaged: measure again
            figures: dict[str, Any] = files.read_json(self.dataset.folder / NAME, FIGURES)
            if figures["data"] == self.dataset.hashes:
                return figures
        return {"data": self.dataset.hashes, "losses": {}}

    def best(self) -> tuple[float, str] | None:
        """Return the lowest loss known for these sequences and the order of its n-grams."""
        known = self.figures()["losses"].get(self.name, {})
        return min(((loss, order) for order, loss in known.items() if order.isdecimal()), default=None)


def sequences_of(
    run: Path, dataset: str = "", block_size: int = 0, data: loader.Dataset | None = None
) -> Sequences:
    """Return the validation sequences of the run in folder `run`, from `dataset` if that is given; if `run`
    is not a run folder, the whole split in sequences of `block_size`. `data`: the dataset, if it is already
    open. Raise UserError for mixtures."""
    place = run if (run / "config.json").is_file() else run.parent  # `run` may be one of its checkpoints
    config = files.read_json(place / "config.json", ABOUT) if (place / "config.json").is_file() else {}
    options = config.get("options", {})
    name = dataset or options.get("dataset", "")
    parts = mixture.parse(name) if name else []
    if len(parts) != 1:
        raise UserError(f"the counting baseline needs one dataset, not {name!r}; give --dataset=FOLDER")
    data = data or loader.load(loader.find(parts[0][0], ROOT))
    block_size = options.get("block_size", block_size)
    loader.require_sequence(data.val, block_size, "validation")
    count, separator = (len(data.val) - 1) // block_size, None
    if options:
        count = min(count, max(1, options["eval_iters"] * options["batch_size"]))
    if options.get("documents") == "masked":
        separator = documents.separator(data, "masked")
    return Sequences(data, block_size, count, separator)


def measure(sequences: Sequences, order: int = 0) -> tuple[dict[str, Any], str]:
    """Score n-grams up to `order` (0: 7 for at most 512 ids, else 3) on `sequences` and keep the loss in the
    dataset folder; return loss, order and sequences, and a line about them."""
    started, dataset = time.perf_counter(), sequences.dataset
    order = order or (7 if dataset.vocab_size <= 512 else 3)
    counted = min(len(dataset.train), MOST)
    model = KneserNey(dataset.train.read(0, counted), dataset.vocab_size, order)
    nats, scored = 0.0, 0
    length, device = sequences.block_size, torch.device("cpu")
    batches = loader.eval_batches(
        dataset.val, length, max(1, AT_ONCE // length), sequences.count, device, sequences.separator
    )
    for batch in batches:
        idx, targets, *documents_of = (part.numpy() for part in batch)
        text = np.pad(np.concatenate([idx, targets[:, -1:]], axis=1), ((0, 0), (order - 1, 0)))
        begun = np.zeros_like(idx)  # index of the first token of each document
        if documents_of:
            first = np.diff(documents_of[0], axis=1, prepend=documents_of[0][:, :1]) > 0
            begun = np.maximum.accumulate(np.where(first, np.arange(length), 0), axis=1)
        known = np.minimum(np.arange(length) + 1 - begun, order - 1)
        rows = sliding_window_view(text, order, axis=1)[:, 1:]
        wanted = targets != IGNORE
        nats -= float(np.log(model.probabilities(rows[wanted], known[wanted])).sum())
        scored += int(wanted.sum())
    loss = nats / scored
    figures = sequences.figures()
    figures["losses"].setdefault(sequences.name, {})[str(order)] = loss
    kept = f"kept in {dataset.folder / NAME}"
    try:
        files.write_json(dataset.folder / NAME, figures)
    except OSError as error:
        kept = f"not kept: {error.strerror or error}"
    bits = loss / math.log(2) / dataset.bytes_per_token if dataset.bytes_per_token else math.nan
    line = (
        f"counting, {order}-grams of {counted:,} tokens: loss {loss:.4f}"
        + f", {bits:.4f} bits/byte" * math.isfinite(bits)
        + f"; {scored:,} tokens in {sequences.name}, {time.perf_counter() - started:.1f} s ({kept})"
    )
    return {"loss": loss, "order": order, "sequences": sequences.name}, line


def compared(run: Path) -> str:
    """Compare the best validation loss of a run with the counting baseline, if that is known for its
    sequences: write the baseline to the run folder, for plot.py and the page, and return a line; else ""."""
    losses = [row["val_loss"] for row in metrics.read(run) if row["event"] == "eval" and row.get("val_loss")]
    sequences, about = sequences_of(run), files.read_json(run / "config.json", ABOUT)
    best, hashes = sequences.best(), sequences.dataset.hashes
    if not best or not losses or not about.get("data", hashes).items() >= hashes.items():
        return ""
    loss, order = best
    files.write_json(run / NAME, {"loss": loss, "order": int(order)})
    than = "better" if min(losses) <= loss else "worse"
    apart = f"{abs(loss - min(losses)):.2f} nats/token {than} than counting ({order}-grams: {loss:.4f})"
    return f"best evaluation of the run: {min(losses):.4f}, {apart} on the same sequences\n"
