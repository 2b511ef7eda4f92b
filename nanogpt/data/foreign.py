"""Files of other programs: nanoGPT's meta.pkl, read without executing code; llm.c's tokens; NumPy arrays."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary
from nanogpt.tokenizer.tokenizer import CharTokenizer, to_text

MAX_TOKENS = 1 << 24  # size of a vocabulary whose tokens are unknown


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


def header(path: Path) -> tuple[np.dtype, int, int]:
    """Return (dtype, offset in bytes, number of tokens) of a NumPy array or a file of llm.c.

    Raise UserError if an array does not hold integers.
    """
    if path.suffix != ".npy":
        return np.dtype("<u2"), 1024, int(np.fromfile(path, "<i4", 3)[2])
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of NumPy's parser of the header: a dozen types
        raise UserError(f"{path} is not an array of tokens ({error}); prepare it again") from None
    if array.dtype.kind not in "iu":
        raise UserError(f"{path} holds {array.dtype}, not token ids; prepare it again")
    return array.dtype, array.offset, array.size
