"""Identify a tokenizer file (type, vocabulary size, fingerprint) without building the tokenizer."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from nanogpt.errors import UserError

FORMAT = "nanogpt-tokenizer-1"
END_OF_TEXT = "<|endoftext|>"  # document separator
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # vocab.bpe
GPT2_VOCAB_SIZE = 50257
GPT2_BY_NAME = json.dumps({"format": FORMAT, "type": "gpt2"})  # for data without a tokenizer file


@dataclass(frozen=True)
class Identity:
    kind: str
    vocab_size: int
    sha256: str  # fingerprint; data and model must agree on it


def identify(text: str, name: str = "tokenizer.json") -> Identity:
    """Return the Identity of a tokenizer from its JSON text. Raise UserError, as `from_text`, if invalid."""
    try:
        value = json.loads(text)
        if is_hugging_face(value):
            return Identity("hf", hugging_face_size(value), sha256_of(json.dumps(value, sort_keys=True)))
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}")
        kind = value["type"]
        content: Any = None
        if kind == "char":
            content = value["characters"]
            if len(set(content)) != len(content) or not all(len(character) == 1 for character in content):
                raise ValueError("its characters are not distinct single characters")
        elif kind == "gpt2":  # without "merges": loaded by load_gpt2 when needed
            if "merges" in value and sha256_of(value["merges"]) != GPT2_SHA256:
                raise ValueError("its merges are not GPT-2's")
        elif kind == "ids":  # of data prepared elsewhere: a size, or names of several characters
            content = value["tokens"]
            if not all(isinstance(name, str) and name and not name.isspace() for name in content):
                raise ValueError("its tokens are not all texts")
        elif kind != "byte":
            raise ValueError(f"type {kind!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is not a tokenizer of format {FORMAT}: {error!r}") from None
    vocab_size = {"byte": 256, "gpt2": GPT2_VOCAB_SIZE}.get(kind) or len(content)
    return Identity(kind, vocab_size, sha256_of(json.dumps([kind, content])))


def is_hugging_face(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("model"), dict) and "format" not in value


def hugging_face_size(value: dict[str, Any]) -> int:
    """Return the largest id + 1. Raise ValueError or TypeError if the vocabulary is empty or malformed."""
    vocab = value["model"]["vocab"]
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    return max([*ids, *(token["id"] for token in value.get("added_tokens") or [])]) + 1


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def of_characters(characters: list[str]) -> str:
    """Return the tokenizer.json of a character tokenizer."""
    return json.dumps({"format": FORMAT, "type": "char", "characters": characters}) + "\n"
