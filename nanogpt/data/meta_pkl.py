"""nanoGPT's meta.pkl: the table of characters beside its datasets, read without running code."""

import pickle
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def tokenizer_of(path: Path) -> str:
    """The tokenizer.json of nanoGPT's meta.pkl, a table of characters; UserError if it is anything else."""
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
