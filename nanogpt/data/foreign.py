"""Files of other programs: nanoGPT's meta.pkl, read without executing code; llm.c's tokens; NumPy arrays."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary
from nanogpt.tokenizer.tokenizer import CharTokenizer, to_text

LLMC = np.array([20240520, 1], "<i4").tobytes()  # as in token_files, which imports this module
MAX_TOKENS = 1 << 24  # size of a vocabulary whose tokens are unknown
OTHERS = {  # by first bytes: files that are not token ids, or not as they are read here
    b"LITPKDS": "TinyLlama's packed tokens",
    b"\x93NUMPY": "a NumPy array, whose name must end in .npy",
    b"PK\3\4": "a zip archive or a file of PyTorch",
    b"version https://git-lfs": "a Git LFS pointer (fetch the file with git lfs pull)",
    LLMC[:4]: "llm.c's tokens in a version that is not known",
    np.array(20240801, "<i4").tobytes(): "llm.c's tokens of Llama 3",
}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for dicts, lists, strings and numbers only; rejects any class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def tokenizer_of(path: Path) -> str:
    """Convert nanoGPT's meta.pkl to tokenizer.json text: a table of characters, of longer tokens, or only the
    size of the vocabulary. Raise UserError if it is none of these."""
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        named = "itos" in meta
        if not named and not 0 < meta["vocab_size"] <= MAX_TOKENS:
            raise ValueError(f"vocab_size = {meta['vocab_size']}")
        itos = meta["itos"] if named else {i: str(i) for i in range(meta["vocab_size"])}
        tokens = [itos[i] for i in range(len(itos))]
        if len(set(tokens)) != len(tokens) or not all(isinstance(token, str) and token for token in tokens):
            raise ValueError("its entries are not distinct texts")
        if named and all(len(token) == 1 for token in tokens):
            return to_text(CharTokenizer(tokens))
        names = [token if not token.isspace() else repr(token) for token in tokens]
        return json.dumps({"format": vocabulary.FORMAT, "type": "ids", "tokens": names}) + "\n"
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        raise UserError(f"{path} is not nanoGPT's table of characters: {error}") from None
    except (AttributeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path} is not nanoGPT's table of characters: {error!r}") from None


def require_ids(paths: list[Path], dtype: np.dtype) -> None:
    """Raise UserError if a file whose data type is not stored with it is none of token ids of `dtype`."""
    for path in paths:
        with path.open("rb") as file:
            head = file.read(1 << 16)
        known = path.suffix == ".npy" or head.startswith(LLMC)
        what = next((what for mark, what in OTHERS.items() if head.startswith(mark)), "")
        if len(head) > 99 and not head.translate(None, bytes([9, 10, 13, *range(32, 127)])):
            what = "text, which prepare.py reads"
        ids = np.frombuffer(head[: len(head) & ~3], "<u2")
        if dtype.itemsize == 2 and len(ids) > 99 and ids[::2].any() != ids[1::2].any():
            what = "every second one is 0, as in integers of 32 or 64 bits; write them as uint16, or as .npy"
        elif not what and dtype.itemsize == 2 and len(ids) > 999 and ids.any():
            low, high = ids & 255, ids >> 8
            if not low.any():
                what = "all are multiples of 256, as in big-endian integers; write them as little-endian"
            elif high.any() and max(low.max(), high.max()) < 128:  # never so in text
                what = "no byte is above 127, as in integers of 8 bits; write them as uint16"
        if what and not known:
            raise UserError(f"{path} does not hold token ids of {8 * dtype.itemsize} bits: {what}")


def header(path: Path) -> tuple[np.dtype, int, int]:
    """Return (dtype, offset in bytes, number of tokens) of a NumPy array or a file of llm.c.

    Raise UserError if an array does not hold integers one after another.
    """
    if path.suffix != ".npy":
        return np.dtype("<u2"), 1024, int(np.fromfile(path, "<i4", 3)[2])
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of NumPy's parser of the header: a dozen types
        raise UserError(f"{path} is not an array of tokens ({error}); prepare it again") from None
    if array.dtype.kind not in "iu" or not array.ndim or not array.flags.c_contiguous:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, not token ids in C order")
    return array.dtype, array.offset, array.size


def require_one_kind_without_gaps(folder: Path, split: str, kinds: list[list[Path]]) -> None:
    """Raise UserError for files of a split in several formats or names (`kinds`), of which only the first
    would be read, and for shards whose numbers have a gap."""
    if len(kinds) > 1:
        names = " and ".join(paths[0].name for paths in kinds)
        raise UserError(f"{folder} has files of several kinds for {split}, {names}; keep one kind")
    if len(kinds[0]) > 1 and (own := [path for path in kinds[0] if path.stem == split]):
        other = next(path.name for path in kinds[0] if path not in own)
        raise UserError(f"{folder} has {own[0].name} and {other}; keep the one to train on")
    numbers = [int(match[1]) for path in kinds[0] if (match := re.search(r"_(\d+)$", path.stem))]
    counted = min(numbers, default=2) < 2 and max(numbers) < 1_000_000  # other numbers may be dates
    if counted and (gaps := set(range(min(numbers), max(numbers))) - set(numbers)):
        raise UserError(f"{folder}: shard {min(gaps)} of {split} is missing; copy it or renumber the others")
