"""Hugging Face tokenizers (tokenizer.json)."""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, isolated, vocabulary
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # in order of preference
LIKE_AN_END = re.compile(r"\beos\b|end.?of.?(text|sentence|document)", re.IGNORECASE)  # other names
MOST_TOKENS = 1 << 24


class HuggingFaceTokenizer:
    """Tokenizer of a Hugging Face tokenizer.json or of `bpe.train`, run by the tokenizers library."""

    kind = "hf"
    words = True

    def __init__(self, text: str, name: str = "tokenizer.json"):
        self.text = text
        value = json.loads(text)
        try:
            self._bytes_of, self._alone = bpe.bytes_of_tokens(value), bpe.without_special_tokens(value)
        except (AttributeError, KeyError, TypeError, ValueError):  # not a tokenizer; the library reports it
            self._bytes_of, self._alone = {}, ""
        self.lossless = bool(self._bytes_of and self._alone)  # like GPT-2's tokenizer and ours
        if not self.lossless:  # needs more of the library
            isolated.call(name, len(text), bpe.attempt, text, name)
        self._plain = bpe.load(text, name)
        self._plain.encode_special_tokens = True  # encode special tokens as ordinary text
        self._special = bpe.load(text, name)
        self.vocab_size = vocabulary.hugging_face_size(value)
        if self.vocab_size > MOST_TOKENS:
            raise UserError(f"{name} has an id above {MOST_TOKENS:,}, which is taken for a mistake")
        added = self._plain.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        ends = [name for name in ENDS_OF_TEXT if name in special] + [*filter(LIKE_AN_END.search, special)]
        self.end_of_text: int | None = self._plain.token_to_id(ends[0]) if ends else None
        unknown = value["model"].get("unk_token")  # Unigram has unk_id
        self._unknown = self._plain.token_to_id(unknown) if unknown else value["model"].get("unk_id")
        self.bytewise = bool(self._bytes_of)  # a token's bytes do not depend on its neighbors
        self._ordinary: bpe.Encode = self._library

    def _library(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def accelerate(self) -> None:
        if self._alone:
            self._ordinary = bpe.accelerated(self._alone, self._library)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._ordinary(text), dtype=np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        """Return ids. Raise UserError for characters that become the token for unknown ones."""
        encoding = self._special.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self._unknown and text[start:end] != self._special.id_to_token(token):
                raise UserError(f"{text[start:end]!r} is not in the vocabulary; remove it")
        return encoding.ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._bytes_of:
            return b"".join(self._bytes_of.get(i, b"") for i in ids)
        return self._plain.decode(list(ids), skip_special_tokens=False).encode("utf-8")

    def to_json(self) -> dict[str, Any]:
        return json.loads(self.text)
