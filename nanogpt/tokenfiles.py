"""The files of tokens of a split as one sequence: `train.bin`, shards, llm.c's `.bin` (a header of 256 int32
before uint16 ids), `.npy` arrays.

Files are read with seek and read, not mapped: mapped pages count as this process's memory and grow
with every batch until the whole file is resident.
"""

import bisect
import io
import itertools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.errors import UserError

CHECKED_AT_START = 1 << 30  # bytes of a split whose ids are all checked before the first step


@dataclass
class TokenFile:
    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first token
    tokens: int


class Tokens:
    """The tokens of a split, in one or more files, as one sequence."""

    def __init__(self, parts: list[TokenFile], vocab_size: int):
        self.parts = parts
        self.vocab_size = vocab_size
        self.ends = list(itertools.accumulate(part.tokens for part in parts))
        self.resident: Tensor | None = None  # all of them, if `keep_on` was called
        self.scored: Tokens | None = None  # 1 where a token is a target; None: everywhere
        self._open: dict[int, io.FileIO] = {}
        self._lock = threading.Lock()

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
            raise UserError(
                f"token {starts[row] + column} of {self.parts[0].path} is id {raw[row, column]}, outside the "
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
        with self._lock:
            if which not in self._open:
                self._open[which] = io.FileIO(part.path)
            self._open[which].seek(part.offset + first * part.dtype.itemsize)
            got = self._open[which].readinto(raw.data.cast("B"))
        if got != raw.nbytes:
            raise UserError(f"{part.path} became shorter while it was read; prepare it again")
        return raw

    def keep_on(self, device: torch.device) -> None:
        """Hold all tokens in the memory of `device`, so that batches are put together there."""
        pieces, chunk = [], 1 << 22
        for start in range(0, len(self), chunk):
            piece = torch.from_numpy(self.read(start, min(chunk, len(self) - start)))
            pieces.append(piece.to(device, torch.int32))
        self.resident = torch.cat(pieces)
        if self.scored:
            self.scored.keep_on(device)

    def check(self) -> None:
        """Read the ids of up to CHECKED_AT_START bytes; later ones are checked as they are used."""
        chunk = 1 << 22
        last = min(len(self), CHECKED_AT_START // self.parts[0].dtype.itemsize)
        for start in range(0, last, chunk):
            self.read(start, min(chunk, last - start))


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: `train.bin`, or numbered shards such as `x_train_000001.bin` or `.npy`."""
    one = folder / f"{split}.bin"
    if one.is_file():
        return [one]
    return sorted(folder.glob(f"*{split}_*.bin")) or sorted(folder.glob(f"*{split}_*.npy"))


def token_file(path: Path, meta: dict[str, Any]) -> TokenFile:
    size = path.stat().st_size
    dtype, offset, expected = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<"), 0, None
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
        if header[0] == 20240520 and header[1] == 1:  # llm.c
            offset, dtype, expected = 1024, np.dtype("<u2"), int(header[2])
    tokens, rest = divmod(size - offset, dtype.itemsize)
    if rest or (expected is not None and tokens != expected):
        raise UserError(f"{path} is truncated: {size} bytes are no whole file; prepare it again")
    return TokenFile(path, dtype, offset, tokens)
