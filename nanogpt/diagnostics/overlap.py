"""Detection of copying: the longest passage of each sample that occurs in the training text, verbatim."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt import ROOT, files
from nanogpt.data import loader, mixture
from nanogpt.data.token_files import Tokens
from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary

CHUNK = 1 << 20  # tokens of the text searched at a time
MOST = 1 << 28  # maximum number of tokens searched, which takes less than half a minute
LEVELS = (32, 8, 3, 1)  # minimum match lengths, tried in this order until one is found
BITS = 20  # bits of the filter's index; its 1 MB fits into a core's cache
BASE = 0x9E3779B97F4A7C15  # base of the polynomial hash mod 2^64; odd, so it has an inverse


class Windows:
    """Hashes of the windows of `ids`, of any length, from one cumulative sum."""

    def __init__(self, ids: np.ndarray, powers: np.ndarray, inverse: np.ndarray):
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
        mixed ^= mixed >> np.uint64(32)
        self.sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers[: len(ids)])])
        self.inverse = inverse

    def __call__(self, length: int, starts: np.ndarray | None = None) -> np.ndarray:
        """Return the hashes of the windows of `length` that begin at `starts`, by default everywhere."""
        if starts is None:
            last = max(0, len(self.sums) - length)
            return (self.sums[length:] - self.sums[:last]) * self.inverse[:last]
        return (self.sums[starts + length] - self.sums[starts]) * self.inverse[starts]


@dataclass
class Match:
    windows: Windows  # of the sample
    size: int  # of the sample, in tokens
    length: int = 0  # of the longest match, in tokens
    start: int = 0  # of the match in the sample
    place: int = 0  # of the match in the text

    def extend(self, text: Windows, starts: np.ndarray, begin: int, level: int, below: int) -> None:
        """Search for a longer match, of `level` to `below` - 1 tokens, at the positions `starts` in `text`,
        where a match of `level` tokens may begin."""
        low, high = max(level, self.length + 1), min(self.size, below - 1)
        middle = low  # first: is there a longer one at all?
        while low <= high:
            known, fitting = self.windows(middle), starts[starts + middle < len(text.sums)]
            there = fitting[np.isin(text(middle, fitting), known)]
            if there.size:
                starts, low = there, middle + 1
                self.length, self.place = middle, begin + int(there[0])
                self.start = int(np.argmax(known == text(middle, there[:1])))
            else:
                high = middle - 1
            middle = (low + high + 1) // 2


def search(text: Tokens, samples: Sequence[np.ndarray]) -> list[Match]:
    """Return the longest match of each of `samples` (token ids) in the first MOST tokens of `text`."""
    longest = max(map(len, samples))
    powers, inverse = (
        np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(CHUNK + longest, base, np.uint64)]))
        for base in (BASE, pow(BASE, -1, 1 << 64))
    )
    matches = [Match(Windows(ids, powers, inverse), len(ids)) for ids in samples]
    for begin in range(0, min(len(text), MOST), CHUNK):
        ids = text.read(begin, min(CHUNK + longest, len(text) - begin))
        chunk, below = Windows(ids, powers, inverse), longest + 1
        for level in LEVELS:
            wanted = [match for match in matches if match.length < below and match.size >= level]
            if wanted:
                hashes, filtered = chunk(level), np.zeros(1 << BITS, bool)
                for match in wanted:
                    filtered[match.windows(level) >> np.uint64(64 - BITS)] = True
                places = np.flatnonzero(filtered[hashes >> np.uint64(64 - BITS)])
                for match in wanted:
                    starts = places[np.isin(hashes[places], match.windows(level))]
                    match.extend(chunk, starts, begin, level, below)
            below = level
    return matches


def report(run: Path, texts: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Return a line per text (token ids) of the model in `run`, and one on passages of the validation text,
    for comparison. If the dataset is not available, return one line that says so."""
    try:
        dataset = open_dataset(run)
    except (UserError, OSError) as error:
        return [f"overlap: the training text is not at hand: {error}"]
    samples = [np.array(ids, dtype=np.int64) for ids in texts]
    longest = min(max(1, *map(len, samples)), len(dataset.val))
    starts = np.linspace(0, len(dataset.val) - longest, max(8, len(samples))).astype(int)
    passages = [dataset.val.read(int(start), longest) for start in starts]
    matches = search(dataset.train, samples + passages)
    lines = []
    for number, (ids, match) in enumerate(zip(samples, matches, strict=False), start=1):
        copied = decode(ids[match.start : match.start + match.length].tolist())
        longest_copy = f"longest passage in the training text: {match.length} of {len(ids)} tokens"
        lines.append(f"overlap: sample {number}: {longest_copy}: {copied!r}")
    usual = sorted(match.length for match in matches[len(samples) :])
    part = f"; searched: the first {MOST:,} tokens" if len(dataset.train) > MOST else ""
    lines.append(f"overlap: passages of the validation text: {usual[0]} to {usual[-1]} tokens{part}")
    return lines


def open_dataset(run: Path) -> loader.Dataset:
    """Return the dataset on which the model in `run` was trained. Raise UserError if it is missing or has
    changed since."""
    about = files.read_json(run / "config.json", {"options": {"dataset": str}, "data?": dict})
    dataset = mixture.load(about["options"]["dataset"], ROOT)
    tokenizer = (run / "tokenizer.json").read_text(encoding="utf-8")
    if dataset.fingerprint != vocabulary.identify(tokenizer).sha256:
        raise UserError(f"{dataset.folder} has another tokenizer than {run}")
    if not about.get("data", dataset.hashes).items() >= dataset.hashes.items():
        raise UserError(f"{dataset.folder} has changed since {run} was trained")
    return dataset
