"""Token files of a split as one array: `train.bin`, shards, llm.c's `.bin` (a header of 256 int32 before
uint16 ids) and `.npy` arrays.

Files are read with seek and read rather than memory-mapped: mapped pages count toward this process's memory,
which would grow until the whole file is resident. Files are opened on first use.
"""

import bisect
import io
import itertools
from collections import OrderedDict
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanogpt.config import Amount, FileName
from nanogpt.errors import UserError

FORMAT = "nanogpt-data-1"  # format of meta.json
SPLIT: dict[str, Any] = {"tokens": Amount, "text_bytes?": Amount, "mask?": {"name": FileName}}
SPLIT |= {"files": [{"name": FileName, "tokens": Amount, "sha256?": str}]}
META: dict[str, Any] = {"format": str, "dtype?": Literal["uint16", "uint32"], "tokenizer": {"sha256": str}}
META |= {"splits?": {"train?": SPLIT, "val?": SPLIT}}  # keys of meta.json
CHECKED_AT_START = 1 << 30  # bytes: of splits up to this size, all ids are checked at start
CHUNK = 1 << 22  # number of tokens that are checked at a time
MANY_FILES = 256  # of splits with more files, most are opened and checked on first use
MAX_OPEN_FILES = 128  # the usual limit per process is 1,024
LLMC = np.array([20240520, 1], "<i4").tobytes()  # start of an llm.c file: magic number, version


@dataclass(slots=True)
class TokenFile:
    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int
    opened: bool = True  # False: not opened yet; layout and size are assumed (shards.py)


class Tokens:
    """Tokens of a split, stored in one or more files (`parts`) and read as one array."""

    content = ""  # hash of the tokens, by which a resumed run recognizes its data
    name, weight = "", Fraction(1)  # in a mixture: dataset name and sampling probability

    def __init__(self, parts: list[TokenFile], vocab_size: int, texts: "list[Tokens] | None" = None):
        self.parts = parts
        self.vocab_size = vocab_size
        self.texts = texts or [self]  # datasets of a mixture, concatenated (mixture.py)
        self.ends = list(itertools.accumulate(part.tokens for part in parts))
        self.scored: Tokens | None = None  # 1 where a token is a target; None: all are targets
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Read tokens start .. start + count - 1, int64 (count,). Raise UserError for an id out of range."""
        return self.sequences(np.array([start]), count)[0]

    def sequences(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Read `count` tokens from each of `starts`, int64 (len(starts), count). Errors as in `read`."""
        raw = np.stack([self._read(int(start), count) for start in starts]).astype(np.int64)
        if raw.size and not 0 <= raw.min() <= raw.max() < self.vocab_size:
            row, column = np.argwhere((raw < 0) | (raw >= self.vocab_size))[0]
            place = int(starts[row] + column)
            number = bisect.bisect_right(self.ends, place)
            place -= self.ends[number] - self.parts[number].tokens
            raise UserError(
                f"token {place} of {self.parts[number].path} is id {raw[row, column]}, outside the "
                f"vocabulary of {self.vocab_size}; the tokenizer does not match the data"
            )
        return raw

    def _read(self, start: int, count: int) -> np.ndarray:
        chunks = []
        while count > 0:
            number = bisect.bisect_right(self.ends, start)
            part, file = self.parts[number], self._file(number)
            first = start - (self.ends[number] - part.tokens)
            raw = np.empty(min(count, part.tokens - first), dtype=part.dtype)
            file.seek(part.offset + first * part.dtype.itemsize)
            if file.readinto(raw.data.cast("B")) != raw.nbytes:
                raise UserError(f"{part.path} became shorter while being read; prepare it again")
            chunks.append(raw)
            start, count = start + len(raw), count - len(raw)
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def _file(self, number: int) -> io.FileIO:
        """Return file `number`, opened; close the least recently used beyond MAX_OPEN_FILES."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        part = self.parts[number]
        if not part.opened:
            actual = token_file(part.path, part.dtype)
            if actual != replace(part, opened=True):
                raise UserError(
                    f"{part.path} holds {actual.tokens} tokens, expected {part.tokens}: it is truncated "
                    f"or was replaced; prepare the data again"
                )
            part.opened = True
        while len(self._open) >= MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[number] = io.FileIO(part.path)
        return self._open[number]

    def check(self) -> None:
        """Check all ids of a split of up to CHECKED_AT_START bytes, else only the first chunk; the rest is
        checked when it is read."""
        small = len(self) * self.parts[0].dtype.itemsize <= CHECKED_AT_START
        last = len(self) if small else CHUNK
        for start in range(0, last, CHUNK):
            self.read(start, min(CHUNK, last - start))


def split_files(folder: Path, split: str) -> list[Path]:
    """List the files of a split: `train.bin`, shards (`x_train_000001.bin` or `.npy`), or `x_train.bin`.

    Raise UserError for files of several kinds, and for shards whose numbers have a gap.
    """
    found = (sorted(folder.glob(f"*{split}{end}")) for end in ("_*.bin", "_*.npy", ".bin", ".npy"))
    named = ([path for path in kind if not path.stem.rpartition(split)[0][-1:].isalpha()] for kind in found)
    kinds = list(filter(None, named)) or [[]]  # without pretrain.bin and eval.bin
    if len(kinds) > 1 or len(kinds[0]) > 1:
        from nanogpt.data import foreign

        foreign.require_one_kind_without_gaps(folder, split, kinds)
    return kinds[0]


def token_file(path: Path, dtype: np.dtype) -> TokenFile:
    """Describe a file by its header or, without one, as raw `dtype`. Raise UserError if it is truncated or
    holds no token ids."""
    size, offset, expected = path.stat().st_size, 0, None
    with path.open("rb") as file:
        start = file.read(8)
    if path.suffix == ".npy" or start == LLMC:
        from nanogpt.data import foreign

        dtype, offset, expected = foreign.header(path)
    tokens, rest = divmod(size - offset, dtype.itemsize)
    if rest or (expected is not None and tokens != expected):
        raise truncated(path)
    return TokenFile(path, dtype, offset, tokens)


def truncated(path: Path) -> UserError:
    return UserError(f"{path} is truncated (size {path.stat().st_size} bytes); prepare it again")
