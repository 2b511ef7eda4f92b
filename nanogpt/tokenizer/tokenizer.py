"""Text to token ids and back: characters, bytes, GPT-2's byte pairs, or any tokenizer.json.

A tokenizer saves itself as one JSON file that lies beside the data and in every run folder; nothing
else is needed to decode a model's output, wherever the folder is moved. That of a tokenizer of Hugging
Face is its own tokenizer.json.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, download, vocabulary

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # of encoder.json
END_OF_TEXT = bpe.END_OF_TEXT
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # under which names it is found
BLANKS = 1 << 18  # tiktoken's pattern overflows its stack, and panics, at a million blanks on end


class Tokenizer(Protocol):
    kind: str
    vocab_size: int
    end_of_text: int | None  # the id between documents, where the vocabulary has one
    words: bool  # tokens depend on their surroundings: a text is cut between words only

    def accelerate(self) -> None: ...  # prepare for much text: the same ids, faster
    def encode(self, text: str) -> np.ndarray: ...  # -> int64 (n,); special tokens are ordinary text
    def encode_prompt(self, text: str) -> list[int]: ...  # as `encode`, with <|endoftext|> recognised
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...  # UTF-8, perhaps cut inside a character
    def to_json(self) -> dict[str, Any]: ...


class CharTokenizer:
    """One id a character, in the order of their code points (as nanoGPT numbers them)."""

    kind = "char"
    words = False
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


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding of 50,257 tokens, by tiktoken, built from the list of its merges."""

    kind = "gpt2"
    words = True

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


class HuggingFaceTokenizer:
    """Any tokenizer.json of Hugging Face, by the tokenizers library; also what `bpe.train` makes."""

    kind = "hf"
    words = True

    def __init__(self, text: str, name: str = "tokenizer.json"):
        self.text = text
        self._plain = bpe.load(text, name)
        self._plain.encode_special_tokens = True  # special tokens are ordinary text
        self._special = bpe.load(text, name)
        self.vocab_size = vocabulary.hugging_face_size(json.loads(text))
        self.end_of_text: int | None = next(
            (self._plain.token_to_id(name) for name in ENDS_OF_TEXT if self._is_special(name)), None
        )
        self._bytes_of = bpe.bytes_of_tokens(json.loads(text))
        self.bytewise = bool(self._bytes_of)  # each token is some bytes, whatever stands beside it
        self._ordinary: bpe.Encode = self._library

    def _is_special(self, name: str) -> bool:
        added = self._plain.get_added_tokens_decoder().values()
        return any(token.content == name and token.special for token in added)

    def _library(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def accelerate(self) -> None:
        if alone := bpe.without_special_tokens(json.loads(self.text)):
            self._ordinary = bpe.accelerated(alone, self._library)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._ordinary(text), dtype=np.int64)

    def encode_prompt(self, text: str) -> list[int]:
        return self._special.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self._bytes_of:
            return b"".join(self._bytes_of.get(i, b"") for i in ids)
        return self._plain.decode(list(ids), skip_special_tokens=False).encode("utf-8")

    def to_json(self) -> dict[str, Any]:
        return json.loads(self.text)


def _few_blanks(text: str) -> str:
    """`text`; UserError if it has so long a run of blanks that tiktoken would panic."""
    for start in range(0, len(text) - BLANKS + 1, BLANKS):
        if text[start : start + BLANKS].isspace():
            raise UserError(f"gpt2 cannot encode {BLANKS:,} blanks on end; shorten them, or use char or byte")
    return text


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
        return HuggingFaceTokenizer(text, name)
    if value["type"] == "char":
        return CharTokenizer(value["characters"])
    if value["type"] == "byte":
        return ByteTokenizer()
    return GPT2Tokenizer(value["merges"]) if "merges" in value else gpt2()


def fingerprint(tokenizer: Tokenizer) -> str:
    return vocabulary.identify(to_text(tokenizer)).sha256


# ----------------------------------------------------------------------------- GPT-2's files


def gpt2(path: str = "") -> GPT2Tokenizer:
    """GPT-2's tokenizer from `path` (vocab.bpe or its folder), the cache, or the net.

    UserError says where the file can be put when it is nowhere. The SHA-256 is checked always, that of
    encoder.json too where it lies beside (its ids follow from the merges, so it is not needed).
    """
    file = Path(path) / "vocab.bpe" if path and Path(path).is_dir() else Path(path)
    if path and not file.is_file():
        raise UserError(f"no GPT-2 merges at {file}; it is the file vocab.bpe of OpenAI's release")
    if not path:
        file = download.cache_folder() / "gpt2" / "vocab.bpe"
        instead = f"put that file at {file}, or use --tokenizer=char or byte, which need no download"
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


def from_file(path: Path) -> Tokenizer:
    """The tokenizer of a file: one of ours, or any tokenizer.json of Hugging Face (or its folder)."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; give a tokenizer.json or the folder that holds it")
    try:
        return from_text(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a tokenizer: it is no UTF-8 text") from None
