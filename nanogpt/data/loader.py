"""Datasets and batches; the tokens of an iteration are a pure function of (seed, iteration).

A dataset is a folder with `train.bin` and `val.bin` (raw little-endian ids) and `meta.json`, written by
data/prepare.py. Also supported: nanoGPT's files with or without `meta.pkl`, shards, llm.c's `.bin` and `.npy`
arrays (token_files.py).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanogpt import files
from nanogpt.data.samplers import EpochSampler
from nanogpt.data.token_files import FORMAT, MANY_FILES, META, TokenFile, Tokens, split_files, token_file
from nanogpt.errors import UserError
from nanogpt.loss import IGNORE
from nanogpt.tokenizer import vocabulary
from nanogpt.world import World

if TYPE_CHECKING:
    from nanogpt.data.mixture_sampler import MixtureSampler

ALONE = World()  # a single process

# ----------------------------------------------------------------------------- files


@dataclass
class Dataset:
    """A dataset folder: tokens of both splits, and the tokenizer."""

    folder: Path
    train: Tokens
    val: Tokens
    tokenizer: str  # contents of tokenizer.json
    vocab_size: int
    fingerprint: str  # SHA-256 of the tokenizer
    bytes_per_token: float | None  # UTF-8 bytes per token of the validation text, if known
    evaluated: str = ""  # in a run: the sequences of the validation text that it is evaluated on

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the tokens of both splits and, in a run, the sequences that it is evaluated on."""
        sequences = {"sequences": self.evaluated} if self.evaluated else {}
        return {"train": self.train.content, "val": self.val.content, **sequences}


def find(name: str, root: Path) -> Path:
    """Return the folder of dataset `name`: a path, or a folder in ./data or the repository's data/."""
    for folder in (Path(name), Path("data") / name, root / "data" / name):
        if folder.is_dir() and split_files(folder, "train"):
            return folder
    from nanogpt import usage

    raise usage.missing_dataset(name, root)


def load(folder: Path) -> Dataset:
    """Open a dataset folder and check file sizes, token ids and that the tokenizer matches the data. Raise
    UserError naming the file and the fix."""
    meta: dict[str, Any] = {}
    text = vocabulary.GPT2_BY_NAME
    if (folder / "meta.json").is_file():
        meta = files.read_json(folder / "meta.json", META)
        if meta["format"] != FORMAT:
            raise UserError(f"{folder / 'meta.json'} does not have format {FORMAT}; prepare the data again")
        text = _own_tokenizer(folder, meta)
    elif (folder / "meta.pkl").is_file():
        from nanogpt.data.foreign import tokenizer_of

        text = tokenizer_of(folder / "meta.pkl")
    identity = vocabulary.identify(text)
    splits = {}
    for split in ("train", "val"):
        paths = split_files(folder, split)
        if not paths:
            raise UserError(f"{folder} has no {split}.bin; prepare the data again")
        info = meta.get("splits", {}).get(split, {"files": []})
        listed = {file["name"]: file["tokens"] for file in info["files"]}
        default = "uint16" if identity.vocab_size <= 1 << 16 else "uint32"
        dtype = np.dtype(meta.get("dtype", default)).newbyteorder("<")
        if not meta:
            from nanogpt.data.foreign import require_ids

            require_ids([paths[0], paths[-1]], dtype)
        splits[split] = Tokens(open_split(paths, dtype, listed), identity.vocab_size)
        _check_size(splits[split], folder, split, info)
        splits[split].check()
        listing = [*info["files"], info.get("mask", {})]  # none without meta.json
        hashes = "".join(file.get("sha256", "") for file in listing)
        hashes = hashes or splits[split].read(0, min(len(splits[split]), 1 << 16)).tobytes().hex()
        splits[split].content = vocabulary.sha256_of(f"{len(splits[split])} {hashes}")
        if "mask" in info:
            splits[split].scored = _open_mask(folder / info["mask"]["name"], len(splits[split]))
    text_bytes = 0 if splits["val"].scored else info.get("text_bytes", 0)  # includes unscored tokens
    bytes_per_token = text_bytes / len(splits["val"]) if text_bytes else None
    return Dataset(
        folder, splits["train"], splits["val"], text, identity.vocab_size, identity.sha256, bytes_per_token
    )


def open_split(paths: list[Path], dtype: np.dtype, listed: dict[str, int]) -> list[TokenFile]:
    """Open the files of a split, in order; if they are many, most of them on first use (data/shards.py).

    `listed`: number of tokens by file name, from meta.json. Raise UserError for a truncated file.
    """
    if len(paths) > MANY_FILES:
        from nanogpt.data import shards

        return shards.open_most_later(paths, dtype, listed)
    return [token_file(path, dtype) for path in paths]


def _open_mask(path: Path, tokens: int) -> Tokens:
    """Open the mask of a token file: one byte per token, 1 if the token is a target."""
    if not path.is_file() or path.stat().st_size != tokens:
        raise UserError(f"{path} is missing or not of {tokens} bytes, one per token; prepare the data again")
    return Tokens([TokenFile(path, np.dtype("u1"), 0, tokens)], 2)


def _check_size(tokens: Tokens, folder: Path, split: str, info: dict[str, Any]) -> None:
    expected = info.get("tokens", len(tokens))
    if len(tokens) != expected:
        raise UserError(
            f"{folder}: {split} holds {len(tokens)} tokens, meta.json lists {expected}: "
            f"a file is truncated or was replaced; prepare the data again"
        )
    if len(tokens) == 0:
        raise UserError(f"{folder}: {split} is empty; prepare the data again with more text")


def _own_tokenizer(folder: Path, meta: dict[str, Any]) -> str:
    path = folder / "tokenizer.json"
    text = files.text_of(path)
    sha256 = vocabulary.identify(text, str(path)).sha256
    if sha256 != meta["tokenizer"]["sha256"]:
        raise UserError(
            f"{path} is not the tokenizer that made this data (its SHA-256 starts with {sha256[:12]}, "
            f"in meta.json with {meta['tokenizer']['sha256'][:12]}); prepare the data again"
        )
    return text


# ----------------------------------------------------------------------------- batches


def require_sequence(tokens: Tokens, block_size: int, split: str) -> None:
    """Raise UserError if the split, or any dataset of a mixture, has fewer than block_size + 1 tokens."""
    for text in tokens.texts:
        if len(text) <= block_size:
            name = f" of {text.name}" if text.name else ""
            raise UserError(
                f"the {split} text{name} has {len(text)} tokens, fewer than one sequence of block_size + 1 = "
                f"{block_size + 1}; use more text or a smaller --block_size"
            )


def sampler_of(tokens: Tokens, make: Callable[[Tokens], EpochSampler]) -> "EpochSampler | MixtureSampler":
    """Return make(tokens) or, for a mixture, combine the samplers of its datasets by weight."""
    if len(tokens.texts) == 1:
        return make(tokens)
    from nanogpt.data.mixture_sampler import MixtureSampler

    offsets = [0, *itertools.accumulate(len(text) for text in tokens.texts)][:-1]
    return MixtureSampler([make(text) for text in tokens.texts], [t.weight for t in tokens.texts], offsets)


def gather(
    tokens: Tokens, starts: np.ndarray, block_size: int, separator: int | None = None
) -> tuple[Tensor, ...]:
    """Read the sequences at `starts`; return idx and targets, int64 (len(starts), block_size).

    Targets are idx shifted by one token, IGNORE where not scored. With `separator`, the first token of each
    document, also return the document id of each token of idx, of the same shape.
    """
    rows = torch.from_numpy(tokens.sequences(starts, block_size + 1))
    idx, targets = rows[:, :-1], rows[:, 1:]
    if tokens.scored:
        targets = targets.masked_fill(gather(tokens.scored, starts, block_size)[1] == 0, IGNORE)
    if separator is None:
        return idx, targets
    return idx, targets, (idx == separator).cumsum(dim=1)


class TrainBatches:
    """Micro-batches of each iteration. The samples of an iteration do not depend on the micro-batch size.

    `ramp`: sizes, in sequences, of the first batches; later ones have batch_size * micro_steps. `separator`:
    if given, micro-batches include document ids. `sampler`: by default that of `sampler_of`. `world`: the
    ranks that share each batch.
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
        sampler: "EpochSampler | MixtureSampler | None" = None,
        world: World = ALONE,
    ):
        self.sampler = sampler or sampler_of(tokens, lambda text: EpochSampler(len(text), block_size, seed))
        self.separator = separator
        self.tokens, self.block_size, self.device = tokens, block_size, device
        self.batch_size, self.full = batch_size, batch_size * micro_steps
        self.set_ramp(list(ramp))  # self.read: sequences before each batch of the ramp
        self.continue_at(0, 0)
        self.world = world

    def step(self, step: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's micro-batches of iteration `step`, on the device.

        Each is (idx, targets[, documents]), all (B, T) with B <= batch_size. A single process skips
        micro-batches without a scored target; several ranks run the same number of passes.
        """
        keep_all = self.tokens.scored is None or self.world.size > 1
        for starts in self.starts(step):
            batch = gather(self.tokens, starts, self.block_size, self.separator)
            if keep_all or bool((batch[1] != IGNORE).any()):
                yield to_device(batch, self.device)

    def weighted(self, step: int) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """Yield (loss weight, micro-batch) of iteration `step`; all sequences have equal weight."""
        for batch in self.step(step):
            yield len(batch[0]) / self.sequences(step), batch

    def starts(self, step: int) -> Iterator[np.ndarray]:
        """Yield the start positions of the sequences of each of this rank's micro-batches in `step`."""
        offset, count = self.world.share(self.sequences(step))
        first = self.sequences_before(step) + offset
        for done in range(0, count, self.batch_size):
            yield self.sampler.starts(first + done, min(self.batch_size, count - done))

    def sequences(self, step: int) -> int:
        """Return the batch size of iteration `step`, in sequences over all ranks."""
        return self.ramp[step] if step < len(self.ramp) else self.full

    def set_ramp(self, ramp: list[int]) -> None:
        """Replace the sizes of the first batches, in sequences."""
        self.ramp, self.read = ramp, [0, *itertools.accumulate(ramp)]

    def continue_at(self, step: int, sequences: int) -> None:
        """Let iteration `step` follow the first `sequences` sequences, read in batches of any size."""
        self.resumed_at = step, sequences

    def sequences_before(self, step: int) -> int:
        (start, sequences), ramp = self.resumed_at, len(self.ramp)
        at_step, at_start = (self.read[min(n, ramp)] + max(0, n - ramp) * self.full for n in (step, start))
        return sequences + at_step - at_start

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens in all iterations before `step`."""
        return self.sequences_before(step) * self.block_size

    def epochs(self, step: int) -> list[float]:
        """Return the epochs completed after `step` iterations, one value per dataset."""
        return self.sampler.epochs(self.sequences_before(step))


def eval_batches(
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    max_sequences: int,
    device: torch.device,
    separator: int | None = None,
    world: World = ALONE,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield this rank's share of a fixed set of sequences, in batches on `device`.

    If the split has at most `max_sequences` sequences, every token is scored once (the last sequence overlaps
    the one before; its repeated targets are IGNORE). Otherwise use `max_sequences` evenly spaced sequences.
    """
    n_sequences, rest = divmod(len(tokens) - 1, block_size)
    chosen = np.linspace(0, n_sequences - 1, min(n_sequences, max_sequences)).astype(np.int64)
    begin, count = world.share(len(chosen))
    if len(chosen) < n_sequences or begin + count < len(chosen):
        rest = 0  # the last rank scores the remainder
    starts = chosen[begin : begin + count] * block_size
    for first in range(0, len(starts), batch_size):
        yield to_device(gather(tokens, starts[first : first + batch_size], block_size, separator), device)
    if rest:
        start = np.array([len(tokens) - 1 - block_size])
        idx, targets, *documents = gather(tokens, start, block_size, separator)
        targets = targets.clone()
        targets[:, : block_size - rest] = IGNORE
        yield to_device((idx, targets, *documents), device)


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Copy a batch to `device`; for CUDA from pinned memory, asynchronously."""
    if device.type == "cuda" and batch[0].device.type == "cpu":
        return tuple(part.contiguous().pin_memory().to(device, non_blocking=True) for part in batch)
    return tuple(part.contiguous().to(device) for part in batch)
