"""Tokenizers in the files of other programs: those of transformers, GPT-2's vocab.json and merges.txt, and
BERT's vocab.txt."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanogpt import files
from nanogpt.config import Amount
from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, vocabulary
from nanogpt.tokenizer.hugging_face import end_of_text
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

NAMES: tuple[str, ...] = ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt")
NAMES += ("tokenizer.json", "tokenizer_config.json")
ENDINGS = (".model", ".tiktoken")  # of unsupported formats
IDS = {str: Amount}  # vocab.json, added_tokens.json
LIKE_GPT2 = ("GPT2", "Roberta", "Bart", "Longformer", "OPT", "CodeGen", "Whisper", "PreTrained")  # its words
SPECIAL = (
    END_OF_TEXT,
    *["<s>", "</s>", "<pad>", "<unk>", "<mask>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
)


def find(folder: Path) -> str:
    """Return the text of a tokenizer.json for the tokenizer files of `folder`; "" if there are none.

    Raise UserError, which says how to convert them, if their format is not supported.
    """
    if text := read(folder):
        return text
    if others := sorted(path for path in folder.iterdir() if path.suffix in ENDINGS):
        code = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise UserError(
            f"{others[0]} is a SentencePiece or tiktoken file, which is not read; make a tokenizer.json: "
            f'python -c "from transformers import AutoTokenizer; {code}"'
        )
    return ""


def read(folder: Path) -> str:
    """Return as `find`, but "" also for files that are not supported: tokenizer.json with the tokens and the
    end of text that other files of the folder name, or what these files make without it.
    """
    if (folder / "tokenizer.json").is_file():
        text = files.text_of(folder / "tokenizer.json")
        vocabulary.identify(text, str(folder / "tokenizer.json"))
        value = json.loads(text)
        try:
            return _completed(folder, value) if vocabulary.is_hugging_face(value) else text
        except (AttributeError, LookupError, TypeError):  # the library says what is wrong
            return text
    for names, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / names).is_file() and (folder / merges).is_file():
            return _completed(folder, _byte_level(folder, folder / names, files.text_of(folder / merges)))
    if (folder / "vocab.txt").is_file():
        return _completed(folder, _word_piece(folder, folder / "vocab.txt"))
    return ""


def gpt2(lines: Iterable[str]) -> str:
    """Return our tokenizer.json for the lines of a merges.txt, if they are GPT-2's, else ""."""
    merges = "\n".join(["#version: 0.2", *_merges(lines), ""])
    known = vocabulary.sha256_of(merges) == vocabulary.GPT2_SHA256
    return json.dumps({"format": vocabulary.FORMAT, "type": "gpt2", "merges": merges}) + "\n" if known else ""


def _merges(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if line and not line.startswith("#version")]


def _json(path: Path, shape: Any) -> dict[str, Any]:
    """Return the object in a JSON file of `shape`; empty if there is no such file."""
    return files.read_json(path, shape) if path.is_file() else {}


def settings(folder: Path) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json; empty if there is none."""
    return _json(folder / "tokenizer_config.json", {"added_tokens_decoder?": {str: {"content": str}}})


def _completed(folder: Path, value: dict[str, Any]) -> str:
    """Return the text of a tokenizer.json with what transformers takes from the files beside it: added
    tokens, the end of text, and whether a space precedes a text. GPT-2's own is returned in our format.
    """
    known, level = settings(folder), value.get("pre_tokenizer") or {}
    own = False if str(known.get("tokenizer_class")).startswith("GPT2") else None
    prefix = known.get("add_prefix_space", own)
    if isinstance(prefix, bool) and level.get("type") == "ByteLevel":
        level["add_prefix_space"] = prefix
    vocab = value["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
    added = {token["content"]: token for token in value.get("added_tokens") or []}
    named = {token: {"id": number} for token, number in _json(folder / "added_tokens.json", IDS).items()}
    for number, token in known.get("added_tokens_decoder", {}).items():
        place = f"{folder}: id of {token['content']!r}"
        named[token["content"]] = {**token, "id": files.parse_json(number, place, Amount)}
    if (end := _end(folder, known)) in ids:
        named.setdefault(end, {"id": ids[end], "special": True})
    for content, token in named.items():
        added.setdefault(content, _added(**token | {"content": content}))
    value["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    if end in added and added[end]["id"] != end_of_text(value):
        added[end] |= {"special": True, "end_of_text": True}
    return _gpt2s(value) or json.dumps(value) + "\n"


def _added(content: str, id: int, **flags: Any) -> dict[str, Any]:
    """Return an added token of a tokenizer.json, with those of `flags` that it has."""
    token = {name: bool(flags.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return {"id": id, **token, "content": content, "special": bool(flags.get("special", content in SPECIAL))}


def _end(folder: Path, known: dict[str, Any]) -> str:
    """Return the end of a text that transformers reads in `known`, from tokenizer_config.json, or
    in special_tokens_map.json; "" if none."""
    for about in (known, _json(folder / "special_tokens_map.json", dict)):
        token = about.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token and isinstance(token, str):
            return token
    return ""


def _gpt2s(value: dict[str, Any]) -> str:
    """Return our tokenizer.json if a tokenizer.json encodes every text as GPT-2 does, else ""."""
    merges = [m if isinstance(m, str) else " ".join(m) for m in value["model"].get("merges") or []]
    ends = [(token["id"], token["content"]) for token in value["added_tokens"]]
    usual: Any = ([], [(vocabulary.GPT2_VOCAB_SIZE - 1, END_OF_TEXT)])
    if ends not in usual or not bpe.without_special_tokens(value):
        return ""
    known = gpt2(merges)
    expected = bpe.vocabulary(json.loads(known)["merges"]) if known else {}
    return known if value["model"]["vocab"].items() >= expected.items() else ""


def _byte_level(folder: Path, path: Path, merges: str) -> dict[str, Any]:
    vocab, known = _json(path, IDS), settings(folder)
    lines = _merges(merges.splitlines())
    kind, missing = str(known.get("tokenizer_class") or "GPT2"), set(bpe.BYTE_OF) - set(vocab)
    if missing or not kind.startswith(LIKE_GPT2) or any(token.endswith("</w>") for token in vocab):
        why = f"lacks {len(missing)} of the 256 bytes" if missing else f"is of a {kind.removesuffix('Fast')}"
        raise UserError(f"{path} {why}, so it is not a BPE such as GPT-2's; give its tokenizer.json")
    model = {"type": "BPE", "vocab": vocab, "merges": lines}
    return _assembled({"pre_tokenizer": {**bpe.BYTE_LEVEL}, "decoder": bpe.BYTE_LEVEL, "model": model})


def _assembled(parts: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json of `parts`, with those tokens of the vocabulary added that are special."""
    vocab = parts["model"]["vocab"]
    added = [_added(token, vocab[token]) for token in SPECIAL if token in vocab]
    return {"version": "1.0", "added_tokens": added, **parts}


def _word_piece(folder: Path, path: Path) -> dict[str, Any]:
    tokens = files.text_of(path).removesuffix("\n").split("\n")
    vocab = {token.removesuffix("\r"): number for number, token in enumerate(tokens)}
    if "[UNK]" not in vocab or len(vocab) != len(tokens):
        raise UserError(f"{path} is not BERT's vocabulary: it must hold distinct tokens, with [UNK]")
    known = settings(folder)
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": known.get("tokenize_chinese_chars", True),
        "strip_accents": known.get("strip_accents"),
        "lowercase": known.get("do_lower_case", True),
    }
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    parts = {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {**model, "max_input_chars_per_word": 100, "vocab": vocab},
    }
    return _assembled(parts)
