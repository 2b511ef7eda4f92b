"""Text to token ids and back: characters, bytes, GPT-2's byte pairs, or any tokenizer.json.

A tokenizer saves itself as one JSON file that lies beside the data and in every run folder; nothing
else is needed to decode a model's output, wherever the folder is moved. That of a tokenizer of Hugging
Face is its own tokenizer.json.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import vocabulary


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    end_of_text: int | None  # the id between documents, where the vocabulary has one
    words: bool  # tokens depend on their surroundings: a text is cut between words only
    bytewise: bool  # each token is some bytes, whatever stands beside it

    def accelerate(self) -> None: ...  # prepare for much text: the same ids, faster
    def encode(self, text: str) -> np.ndarray: ...  # -> int64 (n,); special tokens are ordinary text
    def encode_prompt(self, text: str) -> list[int]: ...  # as `encode`, with <|endoftext|> recognised
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...  # UTF-8, perhaps cut inside a character
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One id a character, in the order of their code points (as nanoGPT numbers them)."""

    kind = "char"
    words = False
    bytewise = True
    end_of_text: int | None = None

    def __init__(self, characters: Sequence[str]):
        self.characters = list(characters)
        self.vocab_size = len(self.characters)
        points = np.array([ord(character) for character in self.characters], dtype=np.uint32)
        self._id_of = np.full(int(points.max(initial=0)) + 2, -1, dtype=np.int64)
        self._id_of[points] = np.arange(self.vocab_size)

    def accelerate(self) -> None:
        pass  # as fast as it gets

    def encode(self, text: str) -> np.ndarray:
        """UserError shows the characters that are not in the vocabulary."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = self._id_of[np.minimum(points, len(self._id_of) - 1)]
        if ids.size and ids.min() < 0:
            unknown = list(dict.fromkeys(chr(point) for point in points[ids < 0]))
            shown = " ".join(repr(character) for character in unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UserError(
                f"not in the vocabulary of {self.vocab_size} characters: {shown}{more}; "
                f"it has {''.join(self.characters[:100])!r}"
            )
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"characters": self.characters}


class ByteTokenizer:
    """One id a byte of the UTF-8 text: any text, no vocabulary to learn."""

    kind = "byte"
    words = False
    bytewise = True
    vocab_size = 256
    end_of_text: int | None = None

    def accelerate(self) -> None:
        pass

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(list(ids))  # of an array, bytes() would take the buffer

    def to_json(self) -> dict[str, Any]:
        return {}


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of `ids`; bytes that are no character (a cut one, say) become U+FFFD."""
    if isinstance(tokenizer, CharTokenizer):  # exact for every code point, lone surrogates too
        return "".join(tokenizer.characters[i] for i in ids)
    return tokenizer.decode_bytes(ids).decode("utf-8", "replace")


# ----------------------------------------------------------------------------- files


def to_text(tokenizer: Tokenizer) -> str:
    """The JSON text that `from_text` reads."""
    own = {} if tokenizer.kind == "hf" else {"format": vocabulary.FORMAT, "type": tokenizer.kind}
    value = {**own, **tokenizer.to_json()}
    return json.dumps(value, ensure_ascii=True) + "\n"


def from_text(text: str, name: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer of a JSON text; UserError names the file if it is not one of ours."""
    vocabulary.identify(text, name)
    value = json.loads(text)
    if vocabulary.is_hugging_face(value):
        from nanogpt.tokenizer.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(text, name)
    if value["type"] == "char":
        return CharTokenizer(value["characters"])
    if value["type"] == "byte":
        return ByteTokenizer()
    from nanogpt.tokenizer.gpt2 import GPT2Tokenizer, load_gpt2

    return GPT2Tokenizer(value["merges"]) if "merges" in value else load_gpt2()


def fingerprint(tokenizer: Tokenizer) -> str:
    return vocabulary.identify(to_text(tokenizer)).sha256


def from_file(path: Path) -> Tokenizer:
    """The tokenizer of a file: one of ours, or any tokenizer.json of Hugging Face (or its folder)."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; give a tokenizer.json or the folder that holds it")
    try:
        return from_text(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a tokenizer: it is no UTF-8 text") from None
