"""Tokenizer of ids that do not encode text: MIDI events, chess moves, words of a fixed list."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from nanogpt.errors import UserError


class IdTokenizer:
    """Names of token ids, separated by blanks: `60 64 67`, or words of a fixed list. For data prepared
    elsewhere."""

    kind = "ids"
    words = False
    bytewise = True
    end_of_text: int | None = None

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.vocab_size = len(tokens)
        self.id_of = {name: number for number, name in enumerate(tokens)}

    def accelerate(self) -> None:
        pass

    def encode(self, text: str) -> np.ndarray:
        unknown = [name for name in text.split() if name not in self.id_of]
        if unknown:
            shown = ", ".join(self.tokens[:10])
            raise UserError(f"{unknown[0]!r} is not a token; there are {self.vocab_size:,}: {shown}, ...")
        return np.array([self.id_of[name] for name in text.split()], dtype=np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text).tolist() or [0]  # for a blank prompt, such as sample.py's default

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(f"{self.tokens[i]} " for i in ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens}
