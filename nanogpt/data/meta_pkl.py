"""Safe reader of nanoGPT's meta.pkl, the character table of its datasets; executes no code."""

import pickle
from pathlib import Path
from typing import Any

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
