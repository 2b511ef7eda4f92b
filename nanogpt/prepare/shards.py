"""Write token ids to dataset files: `train.bin` and `val.bin`, or shards that llm.c can also read.

Files grow in a hidden folder inside the dataset's. Their lengths are recorded periodically, with the
state needed to resume; after a crash, data beyond the last record is truncated. At the end the files are
renamed, in an order that never exposes a partial dataset.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanogpt import files
from nanogpt.data.token_files import META
from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary

FORMAT = "nanogpt-unfinished-1"
SPLITS = ("train", "val")
UNFINISHED = ".unfinished"  # folder inside the dataset folder
HEADER = 256  # int32 values at the start of an llm.c shard: magic number, version, number of tokens
MAGIC, VERSION = 20240520, 1
AT_A_TIME = 4_000_000  # document fingerprints compared at once


def header(tokens: int) -> bytes:
    """Return the header of an llm.c shard (uint16)."""
    values = np.zeros(HEADER, "<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


class InUse(UserError):
    """Raised when another process is writing to the folder."""


class Writer:
    """Writer of the files of both splits, `shard_tokens` tokens per file (0: one file per split)."""

    def __init__(self, out: Path, dtype: str, shard_tokens: int):
        self.folder = out / UNFINISHED
        self.folded = self.folder / "folded"
        self.tokens = dict.fromkeys(SPLITS, 0)
        self._size = np.dtype(dtype).itemsize
        self._shard_tokens = shard_tokens
        self._header = HEADER * 4 if shard_tokens and dtype == "uint16" else 0
        self._open: dict[str, BinaryIO] = {}
        self._folded = 0  # bytes
        self._lock: Any = None

    def begin(self, options: dict[str, Any]) -> dict[str, Any]:
        """Lock the folder. Return the progress recorded by an interrupted run with the same `options`, or {}.

        Files of a run with other options, and damaged ones, are deleted. Raise InUse if another process is
        writing there.
        """
        try:
            self._lock = files.lock(self.folder)
        except UserError as error:
            raise InUse(str(error)) from None
        self._record = {"format": FORMAT, "options": options}
        state: dict[str, Any] = {}
        with contextlib.suppress(UserError):
            state = files.read_json(self.folder / "state.json", dict)
        if state.get("options") == options and state.get("sha256") == _digest(state):
            self.tokens = dict(state["tokens"])
            self._folded = state["folded"]
            sizes = self._sizes()
            if all(path.exists() and path.stat().st_size >= size for path, size in sizes.items()):
                for path, size in sizes.items():
                    os.truncate(path, size)
                return state["progress"]
        self.tokens, self._folded = dict.fromkeys(SPLITS, 0), 0
        for path in self.folder.iterdir():
            if path.name != ".lock":
                files.remove(path)
        return {}

    def _sizes(self) -> dict[Path, int]:
        """Return the size in bytes of each file by the counts of this object; remove later shards."""
        sizes = {self.folded: self._folded}
        for split in SPLITS:
            last = self._number(split)
            sizes |= {
                self._path(split, n): self._shard_tokens * self._size + self._header for n in range(last)
            }
            sizes[self._path(split, last)] = self._rest(split) * self._size + self._header
            if (path := self.scored(split)).exists():
                sizes[path] = self.tokens[split]
            for path in set(self.folder.glob(f"{split}-*")) - set(sizes):
                files.remove(path)
        for name in (*SPLITS, "folded"):
            self._file(name).close()  # creates it if the next shard was not started
        return sizes

    def add(self, split: str, ids: bytes) -> None:
        """Append little-endian ids to a split, starting new shards as needed."""
        while ids:
            room = len(ids)
            if self._shard_tokens:
                room = (self._shard_tokens - self._rest(split)) * self._size
            self._append(split, ids[:room])
            self.tokens[split] += min(room, len(ids)) // self._size
            ids = ids[room:]
            if self._shard_tokens and not self._rest(split):
                self._flush(split)
                self._open.pop(split).close()

    def add_scored(self, split: str, data: bytes) -> None:
        """Append one byte per id of `split`: 1 if it is a target, else 0."""
        self._append(self.scored(split).name, data)

    def _append(self, name: str, data: bytes) -> None:
        if name not in self._open:
            self._open[name] = self._file(name)
            self._open[name].seek(0, os.SEEK_END)
        self._open[name].write(data)

    def add_folded(self, data: bytes) -> None:
        """Append fingerprints for `duplicates`: 8 bytes per document."""
        self._append("folded", data)
        self._folded += len(data)

    def _flush(self, split: str) -> None:
        self._open[split].flush()
        os.fsync(self._open[split].fileno())

    def record(self, progress: dict[str, Any]) -> None:
        """Flush all added data to disk, and record it with the caller's `progress`."""
        for split in self._open:
            self._flush(split)
        state = {**self._record, "tokens": self.tokens, "folded": self._folded, "progress": progress}
        files.write_json(self.folder / "state.json", {**state, "sha256": _digest(state)})

    @property
    def recorded(self) -> bool:
        return (self.folder / "state.json").is_file()

    def finish(self) -> dict[str, list[tuple[str, Path, int]]]:
        """Close the files; return (final name, path, tokens) of each, by split."""
        done: dict[str, list[tuple[str, Path, int]]] = {}
        self.close()
        for split in SPLITS:
            done[split] = []
            for number in range(self._number(split) + 1):
                full = self._shard_tokens and number < self._number(split)
                tokens = self._shard_tokens if full else self._rest(split)
                path = self._path(split, number)
                if not tokens and (number or self.tokens[split]):  # the previous shard is full
                    files.remove(path)
                    continue
                if self._header:
                    with path.open("r+b") as file:
                        file.write(header(tokens))
                name = f"tokens_{split}_{number:06}.bin" if self._shard_tokens else f"{split}.bin"
                done[split].append((name, path, tokens))
        return done

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def give_up(self, keep: bool) -> None:
        """Close the files and unlock the folder; keep it for a later run, or remove it."""
        self.close()
        if not keep:
            files.remove(self.folder)
        if self._lock:
            self._lock.release()

    def _number(self, split: str) -> int:
        return self.tokens[split] // self._shard_tokens if self._shard_tokens else 0

    def _rest(self, split: str) -> int:
        return self.tokens[split] % self._shard_tokens if self._shard_tokens else self.tokens[split]

    def _path(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:06}"

    def scored(self, split: str) -> Path:
        return self.folder / f"{split}.mask.bin"

    def _file(self, name: str) -> BinaryIO:
        path = self._path(name, self._number(name)) if name in SPLITS else self.folder / name
        if not path.exists():
            path.write_bytes(bytes(self._header) if name in SPLITS else b"")
        return path.open("r+b", buffering=1 << 20)


def _digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of a record: damage to it must not cut or stretch the files."""
    return vocabulary.sha256_of(json.dumps({**state, "sha256": ""}, sort_keys=True))


def publish(out: Path, drafts: dict[str, Path]) -> None:
    """Rename `drafts` (final name -> path) into `out`, in order, replacing the old files.

    A reader finds the old dataset, none, or the new one.
    """
    for draft in drafts.values():  # a full disk fails here at the latest, with the old data intact
        files.sync(draft)
    for path in token_files(out):  # old tokens must not be read with the new tokenizer
        files.remove(path)
    files.sync(out)
    for name, draft in drafts.items():
        files.rename(draft, out / name)


def token_files(out: Path) -> list[Path]:
    """Return the token files in `out` that an earlier run published."""
    names = [f"{split}{kind}.bin" for split in SPLITS for kind in ("", ".mask")]
    with contextlib.suppress(UserError):
        splits = files.read_json(out / "meta.json", META).get("splits", {})
        names += [file["name"] for split in splits.values() for file in split["files"]]
    return [out / name for name in dict.fromkeys(names) if (out / name).is_file()]


def duplicates(folded: Path, one_split: bool = False) -> int:
    """Return the number of val documents that are also in train, ignoring case, blanks and punctuation; with
    `one_split`, the number of documents that have a duplicate.

    `folded` is a file of uint64: fingerprint << 1 | (in val). Memory is bounded: large files are read
    several times, comparing a subset of the fingerprints each time.
    """
    size = folded.stat().st_size if folded.is_file() else 0
    if one_split:
        counts = np.unique(np.fromfile(folded, "<u8") >> 1, return_counts=True)[1]
        return int(counts[counts > 1].sum())
    turns = -(-size // (8 * AT_A_TIME)) or 1
    return sum(_duplicates(folded, turn, turns) for turn in range(turns) if size)


def _duplicates(folded: Path, turn: int, turns: int) -> int:
    val, counts = np.unique(
        np.concatenate([some[some & 1 == 1] >> 1 for some in _fingerprints(folded, turn, turns)]),
        return_counts=True,
    )
    met = np.zeros(len(val), dtype=bool)
    for some in _fingerprints(folded, turn, turns):
        train = some[some & 1 == 0] >> 1
        if len(val):
            places = np.minimum(np.searchsorted(val, train), len(val) - 1)
            met[places[val[places] == train]] = True
    return int(counts[met].sum())


def _fingerprints(folded: Path, turn: int, turns: int) -> Iterator[np.ndarray]:
    with folded.open("rb") as file:
        while block := file.read(8 << 20):
            some = np.frombuffer(block, "<u8")
            yield some[(some >> 1) % turns == turn]
