"""Tokenizers: characters, bytes, GPT-2's BPE, or any Hugging Face tokenizer.json.

A tokenizer is saved as one JSON file next to the data and in every run folder, so that both can be moved and
the output of a model decoded without other files. For a Hugging Face tokenizer it is the original
tokenizer.json.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanogpt import files
from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    end_of_text: int | None = None  # id of the document separator, if any
    words: bool = False  # tokens depend on context: split texts between words only
    bytewise: bool = True  # a token's bytes do not depend on its neighbors

    def accelerate(self) -> None:
        """Set up a faster encoder with the same ids, if there is one."""
        return  # not abstract: by default there is none

    def encode_prompt(self, text: str) -> list[int]:
        """Return ids as `encode` does, but recognize <|endoftext|>."""
        return self.encode(text).tolist()

    def encode(self, text: str) -> np.ndarray: ...  # int64 (n,); special tokens are encoded as text
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...  # UTF-8, may end within a character
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer(Tokenizer):
    """Character tokenizer: one id per character, ordered by code point (as in nanoGPT)."""

    kind = "char"

    def __init__(self, characters: Sequence[str]):
        self.characters = list(characters)
        self.vocab_size = len(self.characters)
        points = np.array([ord(character) for character in self.characters], dtype=np.uint32)
        self._id_of = np.full(int(points.max(initial=0)) + 2, -1, dtype=np.int64)
        self._id_of[points] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Return ids, int64 (n,). Raise UserError listing the characters that are not in the vocabulary."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._id_of[np.minimum(points, len(self._id_of) - 1)]
        if ids.size and ids.min() < 0:
            unknown = list(dict.fromkeys(chr(point) for point in points[ids < 0]))
            shown = " ".join(repr(character) for character in unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UserError(
                f"not in the vocabulary of {self.vocab_size} characters: {shown}{more}; "
                f"it begins with {''.join(self.characters[:100])!r}"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"characters": self.characters}


class ByteTokenizer(Tokenizer):
    """Byte tokenizer: one id per UTF-8 byte; encodes any text and needs no training."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(list(ids))  # bytes(array) would copy the raw buffer

    def to_json(self) -> dict[str, Any]:
        return {}


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Decode `ids` to text; invalid or incomplete UTF-8 becomes U+FFFD."""
    if isinstance(tokenizer, CharTokenizer):  # exact for all code points, including lone surrogates
        return "".join(tokenizer.characters[i] for i in ids)
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


# ----------------------------------------------------------------------------- files


def to_text(tokenizer: Tokenizer) -> str:
    """Serialize to JSON text, to be read by `from_text`."""
    header = {} if tokenizer.kind == "hf" else {"format": vocabulary.FORMAT, "type": tokenizer.kind}
    value = {**header, **tokenizer.to_json()}
    return json.dumps(value, ensure_ascii=True) + "\n"


def from_text(text: str, name: str = "tokenizer.json") -> Tokenizer:
    """Build a tokenizer from JSON text. Raise UserError, naming the file, if the format is unknown."""
    vocabulary.identify(text, name)
    value = json.loads(text)
    if vocabulary.is_hugging_face(value):
        from nanogpt.tokenizer.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(text, name)
    if value["type"] == "char":
        return CharTokenizer(value["characters"])
    if value["type"] == "byte":
        return ByteTokenizer()
    if value["type"] == "ids":
        from nanogpt.tokenizer.ids import IdTokenizer

        return IdTokenizer(value["tokens"])
    from nanogpt.tokenizer.gpt2 import GPT2Tokenizer, load_gpt2

    return GPT2Tokenizer(value["merges"]) if "merges" in value else load_gpt2()


def fingerprint(tokenizer: Tokenizer) -> str:
    return vocabulary.identify(to_text(tokenizer)).sha256


def from_file(path: Path) -> Tokenizer:
    """Load a tokenizer file of this project or a Hugging Face tokenizer.json, or the folder that has one or
    other files that `folders` reads.

    Raise UserError if it is missing or invalid.
    """
    from nanogpt.tokenizer import folders

    part = path.name in folders.NAMES or path.suffix in folders.ENDINGS
    folder = path.parent if path.is_file() and part else path
    file = path / "tokenizer.json" if path.is_dir() else path
    if folder.is_dir() and (text := folders.find(folder)):
        return from_text(text, str(file if file.is_file() else path))
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; give a tokenizer.json or the folder that contains it")
    return from_text(files.text_of(file), str(file))
