"""Score a model on tasks (multiple choice, cloze) and texts (perplexity), with standard errors.

Follows lm-eval's conventions and reproduces its numbers (compared in tests/test_evals.py): joining and
truncation of contexts, scoring windows over texts longer than the context, normalization of acc_norm.
"""

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.evaluation import significance
from nanogpt.evaluation.log_likelihood import Advance, Pair, Requests, Subject, Windows, beginning, score
from nanogpt.evaluation.significance import Difference, Metric
from nanogpt.evaluation.tasks import Item, Task
from nanogpt.tokenizer.tokenizer import Tokenizer

Totals = dict[str, tuple[np.ndarray, np.ndarray | None]]  # metric -> totals (n,), weights (None: 1)
LONGEST_WORD = 100  # nats; with more, blanks do not separate words, as in Chinese
LOST = "characters lost or added by the tokenizer"  # a count
STRETCH = 2048  # maximum bytes of text per item for standard errors; less for short texts
STRETCHES = 100  # minimum number of stretches to aim for


@dataclass(frozen=True)
class Report:
    """Results of one task or text: metrics, and per-item data for paired comparisons and --items."""

    name: str
    kind: str  # "choice", "cloze" or "text"
    metrics: dict[str, Metric]
    counts: dict[str, int]
    seconds: float
    totals: Totals  # per-item totals of each metric that supports paired comparison
    rows: list[dict[str, Any]]  # one per item

    def describe(self) -> str:
        """Return a one-line summary: acc 0.2533 ± 0.0043, ...; 10,042 items in 80 s."""
        parts = [f"{name} {_shown(metric)}" for name, metric in self.metrics.items()]
        counts = [f"{count:,} {unit}" for unit, count in self.counts.items() if count]
        return f"{self.name}: {', '.join(parts)}; {', '.join(counts)} in {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        """Return metrics and standard errors by name (null if not finite), and the counts."""
        values: dict[str, Any] = {"kind": self.kind}
        for name, metric in self.metrics.items():
            for key, value in ((name, metric.value), (f"{name}_stderr", metric.stderr)):
                values[key] = value if math.isfinite(value) else None
        return values | self.counts | {"seconds": round(self.seconds, 3)}


def _shown(metric: Metric) -> str:
    digits = 4 if abs(metric.value) < 100 else 2
    error = f" ± {metric.stderr:.{digits}f}" if 0 < metric.stderr < math.inf else ""  # 0: all items are equal
    return f"{metric.value:.{digits}f}{error}"


# ----------------------------------------------------------------------------- tasks


def run_task(task: Task, subject: Subject, advance: Advance = lambda count: None) -> Report:
    """Score every item of `task`; `advance` is called with the number of endings scored since the last call.

    Multiple choice: `acc` picks the ending with the highest log-likelihood, `acc_norm` divides it by the
    ending's length in characters (lm-eval), `acc_norm_tokens` by its length in tokens (build-nanogpt).
    Cloze: `acc` requires every token of the ending to be the argmax; `perplexity` is per ending, not per
    token. Raise UserError for an item that the tokenizer cannot encode.
    """
    started = time.perf_counter()
    pairs: list[Pair] = []
    for number, item in enumerate(task.items, 1):
        try:
            pairs += encode_item(item, subject.tokenizer)
        except UserError as error:  # character not in the vocabulary
            raise UserError(f"{task.name}, item {number}: {error}") from None
    requests = Requests(pairs, subject.block_size)
    likelihoods, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    for i, nats, first in score(subject, requests, greedy=task.kind == "cloze", advance=advance):
        likelihoods[i], greedy[i] = -nats.sum(), first
    summarise = _choices if task.kind == "choice" else _clozes
    metrics, totals, rows = summarise(task.items, pairs, likelihoods, greedy)
    counts = {"items": len(task.items), "endings cut to fit the context": int(requests.cut.sum())}
    counts[LOST] = sum(lost(part, subject.tokenizer) for i in task.items for part in (i.context, *i.endings))
    return Report(task.name, task.kind, metrics, counts, time.perf_counter() - started, totals, rows)


def encode_item(item: Item, tokens: Tokenizer) -> list[Pair]:
    """Return (context ids, continuation ids) for each ending.

    As in lm-eval, trailing whitespace of the context is moved to the continuation, and the boundary is the
    length of the context encoded alone. An empty context is replaced by end-of-text or a newline.
    """
    stripped = item.context.rstrip()
    blanks = item.context[len(stripped) :] + item.joint
    if not stripped:
        start = np.array([beginning(tokens)])
        return [(start, tokens.encode(ending)) for ending in item.endings]
    border = len(tokens.encode(stripped))
    pairs = []
    for ending in item.endings:
        whole = tokens.encode(stripped + blanks + ending)
        cut = min(border, len(whole) - 1)
        # If all is one token, such as that for unknown words, none is left to be the context.
        pairs.append((whole[:cut], whole[cut:]) if cut else (np.array([beginning(tokens)]), whole))
    return pairs


Summary = tuple[dict[str, Metric], Totals, list[dict[str, Any]]]


def _choices(items: list[Item], pairs: list[Pair], likelihoods: np.ndarray, greedy: np.ndarray) -> Summary:
    names = ("acc", "acc_norm", "acc_norm_tokens")
    right = {name: np.zeros(len(items), dtype=bool) for name in names}
    rows, start = [], 0
    for number, item in enumerate(items):
        span = slice(start, start := start + len(item.endings))
        sums = likelihoods[span]
        sizes = (
            np.ones(len(sums)),
            np.array([len(ending) for ending in item.endings]),
            np.array([len(continuation) for _, continuation in pairs[span]]),
        )
        chosen = {name: int(np.argmax(sums / size)) for name, size in zip(names, sizes, strict=True)}
        for name in names:
            right[name][number] = chosen[name] == item.label
        rows.append(
            {
                "item": number,
                "label": item.label,
                **{name.replace("acc", "prediction"): choice for name, choice in chosen.items()},
                "loglikelihoods": [float(value) for value in sums],
            }
        )
    metrics = {name: significance.mean(right[name]) for name in names}
    return metrics, {name: (right[name], None) for name in names}, rows


def _clozes(items: list[Item], pairs: list[Pair], likelihoods: np.ndarray, greedy: np.ndarray) -> Summary:
    loss = significance.mean(-likelihoods)
    metrics = {"acc": significance.mean(greedy), "perplexity": _exp(loss)}
    rows = [
        {"item": i, "target": item.endings[0], "correct": bool(right), "loglikelihood": float(value)}
        for i, (item, right, value) in enumerate(zip(items, greedy, likelihoods, strict=True))
    ]
    return metrics, {"acc": (greedy, None), "loss": (-likelihoods, None)}, rows


def _exp(loss: Metric) -> Metric:
    """Return the perplexity of a loss, its standard error by the delta method."""
    value = math.exp(min(loss.value, 700))
    return Metric(value, value * loss.stderr)


# ----------------------------------------------------------------------------- texts


def run_text(
    name: str,
    windows: Windows,
    subject: Subject,
    words: int = 0,
    lost_characters: int = 0,
    advance: Advance = lambda count: None,
    bytes_per_token: float | None = None,
) -> Report:
    """Return loss (nats/token), perplexity, bits/byte and, with `words`, perplexity per word. For data with
    response masks, response_loss is the loss that training minimizes, the others are over all tokens.

    Bytes are the UTF-8 bytes of the scored tokens, special tokens counting 0, or of the original text
    (`bytes_per_token`, where known) for a tokenizer that may lose or add characters. Standard errors are
    computed over stretches of up to STRETCH bytes, because neighboring tokens are not independent. `advance`
    is called with the number of windows scored since the last call.
    """
    started = time.perf_counter()
    sizes = token_bytes(subject.tokenizer)
    losses: list[np.ndarray] = [np.zeros(0)] * len(windows)
    lengths, masks = losses.copy(), losses.copy()
    for i, nats, _ in score(subject, windows, advance=advance):
        losses[i] = nats.astype(np.float32)
        lengths[i] = lengths_of(*windows[i], subject.tokenizer, sizes).astype(np.int32)
        index, begin, end = windows.place(i)
        if mask := getattr(windows.texts[index], "scored", None):
            masks[i] = mask.read(begin, end - begin)
    nats, text_bytes, responses = np.concatenate(losses), np.concatenate(lengths), np.concatenate(masks) > 0
    if bytes_per_token and not getattr(subject.tokenizer, "lossless", True):
        text_bytes = np.diff(np.rint(bytes_per_token * np.arange(len(nats) + 1)))
    totals, rows = _stretches(nats, text_bytes)
    loss = significance.mean(*totals["loss"])
    metrics = {"loss": loss, "perplexity": _exp(loss)}
    if responses.any():
        totals["response_loss"] = _stretches(nats[responses], text_bytes[responses])[0]["loss"]
        metrics["response_loss"] = significance.mean(*totals["response_loss"])
    if text_bytes.any():
        metrics["bits_per_byte"] = significance.mean(*totals["bits_per_byte"])
    else:
        del totals["bits_per_byte"]
    total = float(nats.sum(dtype=np.float64))
    if words and total / words < LONGEST_WORD:
        error = loss.stderr * len(nats) / words
        metrics["word_perplexity"] = _exp(Metric(total / words, error))
    counts = {"tokens": len(nats), "response tokens": int(responses.sum())}
    counts |= {"bytes": int(text_bytes.sum()), "windows": len(windows), LOST: lost_characters}
    return Report(name, "text", metrics, counts, time.perf_counter() - started, totals, rows)


def _stretches(nats: np.ndarray, text_bytes: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sum losses over consecutive stretches of at most STRETCH bytes, so that an item is many tokens (if
    byte counts are unknown, a token counts as 4 bytes)."""
    sizes = text_bytes.astype(np.int64) if text_bytes.any() else np.full(len(nats), 4)
    wanted = max(1, int(sizes.sum()) // STRETCHES)
    stretch = min(STRETCH, max(32, 1 << wanted.bit_length() - 1))  # a power of two, so all models split alike
    number = np.maximum(np.cumsum(sizes) - 1, 0) // stretch
    _, starts = np.unique(number, return_index=True)
    sums = np.add.reduceat(nats.astype(np.float64), starts)
    tokens = np.diff(np.append(starts, len(nats)))
    byte_counts = np.add.reduceat(text_bytes.astype(np.int64), starts)
    totals = {"loss": (sums, tokens), "bits_per_byte": (sums / math.log(2), byte_counts)}
    rows = [
        {"item": i, "tokens": int(t), "bytes": int(b), "nats": float(n)}
        for i, (n, t, b) in enumerate(zip(sums, tokens, byte_counts, strict=True))
    ]
    return totals, rows


def token_bytes(tokens: Tokenizer) -> np.ndarray:
    """Return the UTF-8 byte length of each token id decoded alone, int64 (V,); 0 if it is not text."""
    if tokens.kind == "ids":
        return np.zeros(tokens.vocab_size, dtype=np.int64)
    return np.array([len(tokens.decode_bytes([i])) for i in range(tokens.vocab_size)], dtype=np.int64)


def lengths_of(ids: np.ndarray, scored: int, tokens: Tokenizer, sizes: np.ndarray) -> np.ndarray:
    """Return the UTF-8 byte lengths of the last `scored` of `ids`, int64; 0 for end-of-text. `sizes`: see
    token_bytes. Some tokenizers drop the space of a token that is decoded alone."""
    before, last = ids[-scored - 1 : -1], ids[-scored:]
    lengths = sizes[last]
    if not tokens.bytewise:
        pairs = zip(before.tolist(), last.tolist(), strict=True)
        lengths = np.array([len(tokens.decode_bytes(pair)) for pair in pairs]) - sizes[before]
        of_byte = np.isin(last, list(getattr(tokens, "byte_ids", ())))
        lengths[of_byte & (sizes[last] <= len("\ufffd".encode()))] = 1  # decoded alone to U+FFFD
    return np.where(last == tokens.end_of_text, 0, lengths)


def lost(text: str, tokens: Tokenizer) -> int:
    """Return how many characters of `text` its ids do not hold, or add; see HuggingFaceTokenizer.lost."""
    return 0 if getattr(tokens, "lossless", True) else tokens.lost(text, tokens.encode(text)).total()  # type: ignore[attr-defined]


def count_words(text: str) -> int:
    """Count words as lm-eval does for word_perplexity."""
    return len(re.split(r"\s+", text))


# ----------------------------------------------------------------------------- two models


def compare(a: Report, b: Report) -> dict[str, Difference]:
    """Return a minus b for each common metric. Raise UserError if the numbers of items differ."""
    differences = {}
    for name in [name for name in a.totals if name in b.totals]:
        (values, sizes), (others, other_sizes) = a.totals[name], b.totals[name]
        if len(values) != len(others):
            counts = f"{len(values)} and {len(others)}"
            raise UserError(f"{a.name}: the models were not scored on the same items ({counts} items)")
        equal = sizes is None or other_sizes is None or np.array_equal(sizes, other_sizes)
        if not equal:  # different tokenizers
            if name != "bits_per_byte":
                continue  # per-token metrics are not comparable
            values, others, sizes = values / sizes, others / other_sizes, None
        differences[name] = significance.difference(values, others, sizes)
    return differences
