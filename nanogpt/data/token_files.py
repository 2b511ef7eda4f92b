"""The files of tokens of a split as one sequence: `train.bin`, shards, llm.c's `.bin` (a header of 256 int32
before uint16 ids), `.npy` arrays.

Files are read with seek and read, not mapped: mapped pages count as this process's memory and grow
with every batch until the whole file is resident. A file is opened when a window of it is read.
"""

import bisect
import io
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from nanogpt.errors import UserError

FORMAT = "nanogpt-data-1"  # of meta.json
CHECKED_AT_START = 1 << 30  # bytes: the ids of a split of this size are all checked before the first step
CHUNK = 1 << 22  # tokens checked at a time
LOOKED_AT = 256  # shards of a split that are opened before the first step; more are checked as they are used
KEPT_OPEN = 128  # files at a time: a process may have 1,024 on most systems
LLMC = (20240520, 1)  # magic number and version of its header


@dataclass(slots=True)
class TokenFile:
    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int
    seen: bool = True  # False: its size and header are not known, but follow from its neighbours


class Tokens:
    """The tokens of a split, in one or more files, as one sequence."""

    name, weight = "", Fraction(1)  # among several texts, and how often a window of this one is drawn

    def __init__(self, parts: list[TokenFile], vocab_size: int, texts: "list[Tokens] | None" = None):
        self.parts = parts
        self.vocab_size = vocab_size
        self.texts = texts or [self]  # that lie one behind another (mixture.py)
        self.ends = list(itertools.accumulate(part.tokens for part in parts))
        self.scored: Tokens | None = None  # 1 where a token is a target; None: everywhere
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()  # the one used last is last

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count, int64 (count,); UserError if one is not in the vocabulary."""
        return self.windows(np.array([start]), count)[0]

    def windows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """`count` tokens from each of `starts`, int64 (len(starts), count); UserError as `read`."""
        raw = np.stack([self._read(int(start), count) for start in starts])
        if raw.size and int(raw.max()) >= self.vocab_size:
            row, column = np.argwhere(raw >= self.vocab_size)[0]
            place = int(starts[row] + column)
            which = bisect.bisect_right(self.ends, place)
            place -= self.ends[which] - self.parts[which].tokens
            raise UserError(
                f"token {place} of {self.parts[which].path} is id {raw[row, column]}, outside the "
                f"vocabulary of {self.vocab_size}; the data and its tokenizer do not belong together"
            )
        return raw.astype(np.int64)

    def _read(self, start: int, count: int) -> np.ndarray:
        pieces = []
        while count > 0:
            which = bisect.bisect_right(self.ends, start)
            part = self.parts[which]
            first = start - (self.ends[which] - part.tokens)
            take = min(count, part.tokens - first)
            pieces.append(self._read_part(which, first, take))
            start, count = start + take, count - take
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read_part(self, which: int, first: int, count: int) -> np.ndarray:
        part = self.parts[which]
        raw = np.empty(count, dtype=part.dtype)
        file = self._file(which)
        file.seek(part.offset + first * part.dtype.itemsize)
        got = file.readinto(raw.data.cast("B"))
        if got != raw.nbytes:
            raise UserError(f"{part.path} became shorter while it was read; prepare it again")
        return raw

    def _file(self, which: int) -> io.FileIO:
        """Part `which`, open; those that were used longest ago are closed again."""
        if which in self._open:
            self._open.move_to_end(which)
            return self._open[which]
        part = self.parts[which]
        if not part.seen:
            found = token_file(part.path, part.dtype)
            if (found.dtype, found.offset, found.tokens) != (part.dtype, part.offset, part.tokens):
                raise UserError(
                    f"{part.path} holds {found.tokens} tokens, {part.tokens} were expected: it is truncated "
                    f"or was replaced; prepare the data again"
                )
            part.seen = True
        while len(self._open) >= KEPT_OPEN:
            self._open.popitem(last=False)[1].close()
        self._open[which] = io.FileIO(part.path)
        return self._open[which]

    def check(self) -> None:
        """Read all ids of a split up to CHECKED_AT_START bytes, of a larger one the first chunk: others are
        checked as they are used."""
        small = len(self) * self.parts[0].dtype.itemsize <= CHECKED_AT_START
        last = len(self) if small else CHUNK
        for start in range(0, last, CHUNK):
            self.read(start, min(CHUNK, last - start))


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: `train.bin`, or numbered shards such as `x_train_000001.bin` or `.npy`."""
    one = folder / f"{split}.bin"
    if one.is_file():
        return [one]
    return sorted(folder.glob(f"*{split}_*.bin")) or sorted(folder.glob(f"*{split}_*.npy"))


def open_split(paths: list[Path], dtype: np.dtype, listed: dict[str, int] | None = None) -> list[TokenFile]:
    """The files of a split, in their order. `listed`: tokens by name, where a meta.json says it.

    Of many files only the first and the last are opened, and the others as they are used: their layout is
    the first one's, their length as listed, or else by their size. UserError for a file that is cut off.
    """
    if len(paths) <= LOOKED_AT:
        return [token_file(path, dtype) for path in paths]
    first, last = (token_file(path, dtype) for path in (paths[0], paths[-1]))
    found, listed = [first], listed or {}
    for path in paths[1:-1]:
        tokens = listed.get(path.name)
        if tokens is None:
            tokens, rest = divmod(path.stat().st_size - first.offset, first.dtype.itemsize)
            if rest or tokens < 0:
                raise _truncated(path)
        found.append(TokenFile(path, first.dtype, first.offset, tokens, seen=False))
    return [*found, last]


def token_file(path: Path, dtype: np.dtype) -> TokenFile:
    """What a file holds, by its header or else as `dtype`; UserError if it is cut off or holds no ids."""
    size = path.stat().st_size
    offset, expected = 0, None
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path} is no array of tokens ({error}); prepare it again") from None
        dtype, offset, expected = array.dtype, array.offset, array.size
        if dtype.kind not in "iu":
            raise UserError(f"{path} holds {dtype}, not token ids; prepare it again")
    else:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
        if (header[0], header[1]) == LLMC:
            offset, dtype, expected = 1024, np.dtype("<u2"), int(header[2])
    tokens, rest = divmod(size - offset, dtype.itemsize)
    if rest or (expected is not None and tokens != expected):
        raise _truncated(path)
    return TokenFile(path, dtype, offset, tokens)


def _truncated(path: Path) -> UserError:
    return UserError(f"{path} is truncated: {path.stat().st_size} bytes are no whole file; prepare it again")
