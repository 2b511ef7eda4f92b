"""Hugging Face tokenizers (tokenizer.json)."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, isolated, vocabulary
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # in order of preference
LIKE_AN_END = re.compile(r"(?<![a-z])eos(?![a-z])|end.?of.?(text|sentence|document)", re.IGNORECASE)
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
        for token in value.get("added_tokens") or []:  # the library numbers them anew, without a word
            if (number := self._plain.token_to_id(token["content"])) != token["id"]:
                given = f"{token['content']!r} the id {token['id']}"
                raise UserError(f"{name} gives {given}, which the tokenizers library takes for {number}")
        self.end_of_text = end_of_text(value)
        unknown = value["model"].get("unk_token")  # Unigram has unk_id
        self._unknown = self._plain.token_to_id(unknown) if unknown else value["model"].get("unk_id")
        self.bytewise = bool(self._bytes_of)  # a token's bytes do not depend on its neighbors
        # tokens of one byte: a run of them is decoded as a whole
        self.byte_ids = {self._plain.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
        self._ordinary: bpe.Encode = self._library

    def _library(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def accelerate(self) -> None:
        if self._alone:
            self._ordinary = bpe.accelerated(self._alone, self._library)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._ordinary(text), dtype=np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        """Return ids. Raise UserError for characters that become no token, or the one for unknown ones."""
        encoding, left = self._special.encode(text, add_special_tokens=False), list(text)
        if self.lossless:
            return encoding.ids
        unknown: list[str] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == self._unknown and text[start:end] != self._special.id_to_token(token):
                unknown += text[start:end].strip() or text[start:end]
            left[start:end] = " " * (end - start)
        decoded = self._text(encoding.ids)
        partly = [c for c in text if c not in decoded] if "\ufffd" in decoded else []  # some of its bytes
        if unknown := unknown or "".join(left).split() or partly or ([] if encoding.ids else [text]):
            raise UserError(f"{unknown[0]!r} is not in the vocabulary; remove it")
        return encoding.ids

    def lost(self, text: str, ids: np.ndarray) -> Counter[str]:
        """Count the characters of `text` that `ids` do not hold (unknown ones, upper case, line ends), and
        those that they add (spaces)."""
        before, after = text, self._text(ids)
        if after.startswith(" ") or self._omits_first_space:  # some put a space before a text
            before, after = before.removeprefix(" "), after.removeprefix(" ")
        if before == after:
            return Counter()
        old, new = Counter(before), Counter(after)
        moved = (a for a, b in zip(before, after, strict=True) if a != b)  # of equal length if old == new
        return ((old - new) + (new - old)) or Counter(next(moved))

    @cached_property
    def _omits_first_space(self) -> bool:
        """Whether a space at the start of a text may be missing alone, but is there after other text."""
        return self._text([*self.encode("a"), *self.encode(" a")]) == "a a"

    def _text(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(int(i) for i in ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._bytes_of:
            return b"".join(self._bytes_of.get(i, b"") for i in ids)
        return self._plain.decode(list(ids), skip_special_tokens=False).encode("utf-8")

    def to_json(self) -> dict[str, Any]:
        return json.loads(self.text)


def end_of_text(value: dict[str, Any]) -> int | None:
    """Return the id of the special token that ends a text in a tokenizer.json: the one that `folders` marked,
    else the first of those with a known name; None if there is none."""
    special = [token for token in value.get("added_tokens") or [] if token.get("special")]
    marked = [token["content"] for token in special if token.get("end_of_text")]
    ids = {token["content"]: token["id"] for token in special}
    named = [name for name in ids if LIKE_AN_END.search(name) and "pad" not in name.lower()]
    return next((ids[name] for name in [*marked, *ENDS_OF_TEXT, *named] if name in ids), None)
