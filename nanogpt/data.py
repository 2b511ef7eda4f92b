"""Token files in, batches out: which tokens a step sees is a pure function of (seed, step).

A dataset is a folder with `train.bin` and `val.bin`, raw little-endian ids, and `meta.json` beside
them (written by data/prepare.py). Also read: nanoGPT's bare files with or without `meta.pkl`, shards,
llm.c's `.bin` (a header of 256 int32 before uint16 ids) and `.npy` arrays.

Files are read with seek and read, not mapped: mapped pages count as this process's memory and grow
with every batch until the whole file is resident.
"""

import bisect
import io
import itertools
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt import files, tokenizer
from nanogpt.errors import UserError
from nanogpt.order import BatchOrder, RowOrder, Share, everything

FORMAT = "nanogpt-data-1"
IGNORE = -1  # a target that is not scored, as in model.py
CHECKED_AT_START = 1 << 30  # bytes of a split whose ids are all checked before the first step


# ----------------------------------------------------------------------------- files


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


@dataclass
class Dataset:
    folder: Path
    train: Tokens
    val: Tokens
    tokenizer: str  # the text of tokenizer.json
    vocab_size: int
    fingerprint: str  # of the tokenizer
    bytes_per_token: float | None  # UTF-8 bytes of the validation text a token, where it is known


def find(name: str, root: Path) -> Path:
    """The folder of the dataset `name`: a path, or a folder in data/ here or in the repository."""
    for folder in (Path(name), Path("data") / name, root / "data" / name):
        if folder.is_dir() and split_files(folder, "train"):
            return folder
    for folder in (Path(name), Path("data") / name, root / "data" / name):
        if (folder / "prepare.py").is_file():
            raise UserError(f"dataset {name!r} is not prepared: python {_short(folder / 'prepare.py', root)}")
    ready = sorted({p.parent.name for p in (root / "data").glob("*/train*") if p.suffix in (".bin", ".npy")})
    known = f"prepared here: {', '.join(ready)}; " if ready else ""
    raise UserError(
        f"no dataset at {name!r}: {known}your own text: python data/prepare.py PATH --out=data/mine; "
        f"without a download: python data/python_stdlib/prepare.py"
    )


def load(folder: Path) -> Dataset:
    """Open a dataset folder and check it: sizes, ids, and that data and tokenizer belong together.

    Raises UserError, which names the file and what to do.
    """
    meta: dict[str, Any] = {}
    text = tokenizer.GPT2_BY_NAME
    if (folder / "meta.json").is_file():
        meta = files.read_json(folder / "meta.json")
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise UserError(f"{folder / 'meta.json'} is not of format {FORMAT}; prepare the data again")
        text = _own_tokenizer(folder, meta)
    elif (folder / "meta.pkl").is_file():
        text = tokenizer.to_text(nanogpt_characters(folder / "meta.pkl"))
    identity = tokenizer.identify(text)
    splits = {}
    for split in ("train", "val"):
        paths = split_files(folder, split)
        if not paths:
            raise UserError(f"{folder} has no {split}.bin; prepare the data again")
        parts = [_token_file(path, meta) for path in paths]
        splits[split] = Tokens(parts, identity.vocab_size)
        _check_size(splits[split], folder, split, meta)
        splits[split].check()
        if mask := meta.get("splits", {}).get(split, {}).get("mask"):
            splits[split].scored = _scored(folder / mask["name"], len(splits[split]))
    about_val = meta.get("splits", {}).get("val", {})
    if splits["val"].scored:  # the bytes are those of the whole text
        about_val = {}
    bytes_per_token = about_val["text_bytes"] / about_val["tokens"] if about_val.get("text_bytes") else None
    return Dataset(
        folder, splits["train"], splits["val"], text, identity.vocab_size, identity.sha256, bytes_per_token
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split: `train.bin`, or numbered shards such as `x_train_000001.bin` or `.npy`."""
    one = folder / f"{split}.bin"
    if one.is_file():
        return [one]
    return sorted(folder.glob(f"*{split}_*.bin")) or sorted(folder.glob(f"*{split}_*.npy"))


def _token_file(path: Path, meta: dict[str, Any]) -> TokenFile:
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


def _scored(path: Path, tokens: int) -> Tokens:
    """The mask beside a token file: a byte a token, 1 where it is a target."""
    if not path.is_file() or path.stat().st_size != tokens:
        raise UserError(f"{path} is missing or not of {tokens} bytes, one a token; prepare the data again")
    return Tokens([TokenFile(path, np.dtype("u1"), 0, tokens)], 2)


def _check_size(tokens: Tokens, folder: Path, split: str, meta: dict[str, Any]) -> None:
    expected = meta.get("splits", {}).get(split, {}).get("tokens", len(tokens))
    if len(tokens) != expected:
        raise UserError(
            f"{folder}: {split} holds {len(tokens)} tokens, meta.json says {expected}: "
            f"a file is truncated or was replaced; prepare the data again"
        )
    if len(tokens) == 0:
        raise UserError(f"{folder}: {split} is empty; prepare the data again with more text")


def _own_tokenizer(folder: Path, meta: dict[str, Any]) -> str:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    text = path.read_text(encoding="utf-8")
    found = tokenizer.identify(text, str(path)).sha256
    if found != meta["tokenizer"]["sha256"]:
        raise UserError(
            f"{path} is not the tokenizer that made this data (its SHA-256 begins with {found[:12]}, "
            f"meta.json says {meta['tokenizer']['sha256'][:12]}); prepare the data again"
        )
    return text


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def nanogpt_characters(path: Path) -> tokenizer.CharTokenizer:
    """The characters of nanoGPT's meta.pkl; UserError if it is anything else."""
    try:
        with path.open("rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        return tokenizer.CharTokenizer([itos[i] for i in range(len(itos))])
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        raise UserError(f"{path} is not nanoGPT's table of characters: {error}") from None


def _short(path: Path, root: Path) -> str:
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(root) else str(path)


# ----------------------------------------------------------------------------- batches


def require_window(tokens: Tokens, block_size: int, split: str) -> None:
    """UserError if the split is shorter than one window and its last target."""
    if len(tokens) <= block_size:
        raise UserError(
            f"the {split} text has {len(tokens)} tokens, fewer than one window of block_size + 1 = "
            f"{block_size + 1}; use more text or a smaller --block_size"
        )


def gather(
    tokens: Tokens, starts: np.ndarray, block_size: int, separator: int | None = None
) -> tuple[Tensor, ...]:
    """The windows at `starts`: idx and targets, int64 (len(starts), block_size), targets one token on and
    IGNORE where they are not scored; with a `separator`, which opens documents, also the number of the
    document of each token of idx."""
    if (held := tokens.resident) is None:
        rows = torch.from_numpy(tokens.windows(starts, block_size + 1))
    else:
        places = to_device((torch.from_numpy(starts),), held.device)[0][:, None]
        rows = held[places + torch.arange(block_size + 1, device=held.device)].long()
    idx, targets = rows[:, :-1], rows[:, 1:]
    if tokens.scored:
        targets = targets.masked_fill(gather(tokens.scored, starts, block_size)[1] == 0, IGNORE)
    if separator is None:
        return idx, targets
    return idx, targets, (idx == separator).cumsum(dim=1)


class TrainBatches:
    """The micro-batches of each step. Which samples a step sees does not depend on the micro-batch.

    `ramp` holds the sizes in windows of the first batches; later ones have batch_size * micro_steps.
    `begins`: windows begin there, and nowhere else. `separator`: micro-batches say which document a token
    belongs to.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        batch_size: int,
        micro_steps: int,
        seed: int,
        device: torch.device,
        ramp: Sequence[int] = (),
        separator: int | None = None,
        begins: np.ndarray | None = None,
        share: Share = everything,
    ):
        self.order = BatchOrder(len(tokens), block_size, seed) if begins is None else RowOrder(begins, seed)
        self.separator = separator
        self.tokens, self.block_size, self.device = tokens, block_size, device
        self.batch_size, self.full, self.ramp = batch_size, batch_size * micro_steps, ramp
        self.share = share  # of the windows of a batch, this process's
        self.read = [0, *itertools.accumulate(ramp)]  # windows before each of the first batches

    def step(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's micro-batches of update number `step`, on the device: idx, targets (B, T), B at
        most batch_size; with a separator, documents (B, T). Those without a scored target are left out."""
        for starts in self._starts(step):
            batch = gather(self.tokens, starts, self.block_size, self.separator)
            if self.tokens.scored is None or bool((batch[1] != IGNORE).any()):
                yield to_device(batch, self.device)

    def targets(self, step: int) -> int:
        """How many targets of update number `step` are scored, 0 for all of them; UserError if none is."""
        if self.tokens.scored is None:
            return 0
        masks = (gather(self.tokens.scored, starts, self.block_size)[1] for starts in self._starts(step))
        if not (count := sum(int(mask.sum()) for mask in masks)):
            raise UserError(
                f"none of the {self.windows(step)} windows of iteration {step} holds a token of a response; "
                f"give a larger --block_size or --batch_size"
            )
        return count

    def _starts(self, step: int) -> Iterator[np.ndarray]:
        start, windows = self.share(self.windows(step))
        first = self.windows_before(step) + start
        for done in range(0, windows, self.batch_size):
            yield self.order.starts(first + done, min(self.batch_size, windows - done))

    def windows(self, step: int) -> int:
        """The size of the batch of update number `step`."""
        return self.ramp[step] if step < len(self.ramp) else self.full

    def windows_before(self, step: int) -> int:
        return self.read[min(step, len(self.ramp))] + max(0, step - len(self.ramp)) * self.full

    def tokens_before(self, step: int) -> int:
        """How many tokens have been read when update number `step` begins."""
        return self.windows_before(step) * self.block_size

    def epochs(self, step: int) -> float:
        """How often the text has been read after `step` updates."""
        return self.windows_before(step) / self.order.n_windows


def eval_batches(
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    max_windows: int,
    ignore: int,
    device: torch.device,
    separator: int | None = None,
    share: Share = everything,
) -> Iterator[tuple[Tensor, ...]]:
    """This process's share of the same windows at every call: all of the split if it has at most
    `max_windows`, each token scored once (the last window looks back, its repeated targets are
    `ignore`); else `max_windows` of them, evenly spread."""
    n_windows, rest = divmod(len(tokens) - 1, block_size)
    if n_windows > max_windows:
        starts, rest = np.linspace(0, n_windows - 1, max_windows).astype(np.int64) * block_size, 0
    else:
        starts = np.arange(n_windows) * block_size
    begin, count = share(len(starts))
    rest = rest if begin + count == len(starts) else 0  # the last process has the odd end
    starts = starts[begin : begin + count]
    for first in range(0, len(starts), batch_size):
        yield to_device(gather(tokens, starts[first : first + batch_size], block_size, separator), device)
    if rest:
        start = np.array([len(tokens) - 1 - block_size])
        idx, targets, *documents = gather(tokens, start, block_size, separator)
        targets = targets.clone()
        targets[:, : block_size - rest] = ignore
        yield to_device((idx, targets, *documents), device)


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Copy a batch; to CUDA from pinned memory, so that the copy runs beside the computation."""
    if device.type == "cuda" and batch[0].device.type == "cpu":
        return tuple(part.contiguous().pin_memory().to(device, non_blocking=True) for part in batch)
    return tuple(part.contiguous().to(device) for part in batch)
