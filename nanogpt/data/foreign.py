"""Files of other programs: nanoGPT's meta.pkl, read without executing code; llm.c's tokens; NumPy arrays."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for dicts, lists, strings and numbers only; rejects any class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def tokenizer_of(path: Path) -> str:
    """Convert nanoGPT's meta.pkl to tokenizer.json text. Raise UserError if it is not a character table."""
    try:
        with path.open("rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if len(set(characters)) != len(itos) or any(
            not isinstance(c, str) or len(c) != 1 for c in characters
        ):
            raise ValueError("its entries are not distinct single characters")
        return vocabulary.of_characters(characters)
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, EOFError, IndexError) as error:
        raise UserError(f"{path} is not nanoGPT's table of characters: {error}") from None


def header(path: Path) -> tuple[np.dtype, int, int]:
    """Return (dtype, offset in bytes, number of tokens) of a NumPy array or a file of llm.c.

    Raise UserError if an array does not hold integers.
    """
    if path.suffix != ".npy":
        return np.dtype("<u2"), 1024, int(np.fromfile(path, "<i4", 3)[2])
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is not an array of tokens ({error}); prepare it again") from None
    if array.dtype.kind not in "iu":
        raise UserError(f"{path} holds {array.dtype}, not token ids; prepare it again")
    return array.dtype, array.offset, array.size
