"""GPT-2's BPE tokenizer, built from the merges published by OpenAI."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt import cache
from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, download, vocabulary
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # encoder.json
BLANKS = 1 << 18  # tiktoken's regex overflows the stack (panic) on a run of a million whitespace characters


class GPT2Tokenizer:
    """GPT-2's BPE with 50,257 tokens, built from its merges and encoded by tiktoken."""

    kind = "gpt2"
    words = True
    bytewise = True

    def __init__(self, merges: str):
        import tiktoken

        self.merges = merges
        ranks = bpe.ranks(merges)
        self.end_of_text: int | None = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=bpe.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )
        self._ordinary: bpe.Encode = self._encoding.encode_ordinary

    def accelerate(self) -> None:
        self._ordinary = bpe.accelerated(bpe.as_hugging_face(self.merges), self._encoding.encode_ordinary)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._ordinary(_few_blanks(text)), dtype=np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        return self._encoding.encode(_few_blanks(text), allowed_special={END_OF_TEXT})

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(list(ids))

    def to_json(self) -> dict[str, Any]:
        return {"merges": self.merges}


def _few_blanks(text: str) -> str:
    """Return `text`. Raise UserError if a run of whitespace is long enough to make tiktoken panic."""
    for start in range(0, len(text) - BLANKS + 1, BLANKS):
        if text[start : start + BLANKS].isspace():
            raise UserError(f"gpt2 cannot encode {BLANKS:,} whitespace characters in a row; use char or byte")
    return text


def load_gpt2(path: str = "") -> GPT2Tokenizer:
    """Load GPT-2's tokenizer from `path` (vocab.bpe or its folder), the cache, or by download.

    The SHA-256 is always verified; also that of encoder.json if it is in the same folder (it is not needed:
    ids follow from the merges). Raise UserError if the file is missing or differs; it says where to put it.
    """
    file = Path(path) / "vocab.bpe" if path and Path(path).is_dir() else Path(path)
    if path and not file.is_file():
        raise UserError(f"no GPT-2 merges at {file}; expected vocab.bpe of OpenAI's release")
    if not path:
        file = cache.cache_folder() / "gpt2" / "vocab.bpe"
        instead = f"put that file at {file}; to prepare a text without a download: --tokenizer=char or byte"
        download.fetch(GPT2_URL, vocabulary.GPT2_SHA256, file, instead)
    content = _known(file, vocabulary.GPT2_SHA256)
    if (file.parent / "encoder.json").is_file():
        _known(file.parent / "encoder.json", GPT2_ENCODER_SHA256)
    return GPT2Tokenizer(content.decode("utf-8"))


def _known(file: Path, sha256: str) -> bytes:
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file} is not GPT-2's {file.name}: its SHA-256 is not {sha256}")
    return content
