"""Byte-pair encoding: GPT-2's tables, Hugging Face tokenizer.json files, training, and fast encoding.

Byte-level vocabularies represent bytes by printable characters: printable bytes by themselves, the others by
consecutive code points from U+0100 (Radford et al. 2019, `encoder.py` of the GPT-2 release).
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from nanogpt.errors import UserError, imported
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

Encode = Callable[[str], Any]  # -> ids, a list or an array

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
LONGEST = 1000  # characters of a word that a BPE learns from; longer ones are cut
TRIAL = 1 << 18  # characters for which the fast encoder is checked against the slow one

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = _PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE]  # by id
_SHOWN = [chr(byte) for byte in _PRINTABLE] + [chr(256 + i) for i in range(256 - len(_PRINTABLE))]
BYTE_OF = dict(zip(_SHOWN, _BYTES, strict=True))
# pre-tokenizer and decoder of GPT-2 in the tokenizers library
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def ranks(merges: str) -> dict[bytes, int]:
    """Return {token bytes: id} for the text of vocab.bpe: the 256 bytes, then the merges in order."""
    return {bytes(BYTE_OF[shown] for shown in token): i for token, i in vocabulary(merges).items()}


def vocabulary(merges: str) -> dict[str, int]:
    tokens = [*_SHOWN, *(line.replace(" ", "") for line in merge_lines(merges))]
    return {token: i for i, token in enumerate(tokens)}


def merge_lines(merges: str) -> list[str]:
    return [line for line in merges.split("\n")[1:] if line]  # the first line is the version


def as_hugging_face(merges: str) -> str:
    """Return GPT-2's tokenizer, without its special token, as the text of a tokenizer.json."""
    model = {"type": "BPE", "vocab": vocabulary(merges), "merges": merge_lines(merges)}
    parts = {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "model": model}
    return json.dumps({"version": "1.0", "added_tokens": [], **parts})


# ----------------------------------------------------------------------------- fast

# Letters and numbers added in Unicode 17: gigatoken 0.10 supports them, tiktoken 0.14 and tokenizers 0.23 do
# not, so they split words differently. A test compares the character classes of all code points.
_NEW = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7"
    "\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3"
    "\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2"
    "\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5\U0001e6e7-\U0001e6ed"
    "\U0001e6f0-\U0001e6f4\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)
_NEW_BYTES = re.compile(rb"\xe0\xa2\x8f|\xe0[\xb1\xb3]\x9c|\xea\x9f|\xf0")  # their UTF-8 prefixes


def has_new_characters(text: str) -> bool:
    return not text.isascii() and bool(_NEW_BYTES.search(text.encode("utf-8")) and _NEW.search(text))


def accelerated(hugging_face: str, slow: Encode) -> Encode:
    """Return a faster encoder with the same output as `slow` if gigatoken is installed, else `slow`.

    The first 262,144 characters are encoded by both; if the ids ever differ, `slow` is used from then on.
    """
    try:
        import gigatoken

        fast: Encode | None = gigatoken.Tokenizer.from_json(hugging_face).encode
    except (ImportError, ValueError, RuntimeError, NotImplementedError):  # or a type that it does not support
        return slow
    left = TRIAL

    def encode(text: str) -> Any:
        nonlocal fast, left
        if fast is None or has_new_characters(text):
            return slow(text)
        ids = fast(text)
        if left > 0:
            left -= len(text)
            if list(ids) != slow(text):
                fast = None
                return slow(text)
        return ids

    return encode


# ----------------------------------------------------------------------------- tokenizer.json


def load(text: str, name: str) -> Any:
    """Return the tokenizers.Tokenizer of a JSON text. Raise UserError, naming the file, if it is invalid."""
    tokenizers = imported("tokenizers", f"{name} needs a package")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{name} cannot be loaded by the tokenizers library: {error}") from None
    # Discard settings of the program that saved the file, which would silently cut, pad or vary the text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def attempt(text: str, name: str) -> None:
    """Load a tokenizer.json and use it once, to find out whether the library can."""
    loaded = load(text, name)
    printable = "".join(map(chr, range(32, 127)))
    loaded.decode(loaded.encode(f"{printable} été 生存还是毁灭 👍\n" * 20, add_special_tokens=False).ids)


def bytes_of_tokens(value: dict[str, Any]) -> dict[int, bytes]:
    """Return {id: bytes} for a byte-level vocabulary; an empty dict for other types."""
    if (value.get("decoder") or {}).get("type") != "ByteLevel" or not isinstance(
        value["model"]["vocab"], dict
    ):
        return {}
    special = {token["id"]: token["content"].encode("utf-8") for token in value.get("added_tokens") or []}
    ordinary = {i: token for token, i in value["model"]["vocab"].items() if i not in special}
    try:
        return {i: bytes(BYTE_OF[shown] for shown in token) for i, token in ordinary.items()} | special
    except KeyError:
        return {}


def without_special_tokens(value: dict[str, Any]) -> str:
    """Return the tokenizer.json without special tokens if it is byte-level BPE with GPT-2's word splitting,
    which `accelerated` requires, and all bytes are tokens; else ""."""
    level, model = value.get("pre_tokenizer") or {}, value["model"]
    plain = level.get("type") == "ByteLevel" and level.get("use_regex", True)
    plain = plain and not level.get("add_prefix_space") and not value.get("normalizer")
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    plain = plain and model.get("type") == "BPE" and not any(map(model.get, odd))
    plain = plain and set(BYTE_OF) <= set(vocab := model["vocab"]) and len(set(vocab.values())) == len(vocab)
    if not plain or not all(token["special"] for token in value.get("added_tokens") or []):
        return ""
    return json.dumps({**value, "added_tokens": [], "post_processor": None})


def train(texts: Iterable[str], size: int) -> str:
    """Train a byte-level BPE of `size` tokens on `texts`; return its tokenizer.json.

    Id 0 is <|endoftext|>, the next 256 are the bytes; words are split as in GPT-2. Deterministic for any
    number of threads. Raise UserError if the tokenizers package is not installed.
    """
    tokenizers = imported("tokenizers", "--tokenizer=bpe:SIZE needs a package")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Learning takes time quadratic in the length of a word: DNA and the like are cut.
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rf"\S{{{LONGEST}}}"), "isolated")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, words])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(BYTE_OF),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return tokenizer.to_str()
