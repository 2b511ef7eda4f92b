"""Tokenizers in the files of other programs: GPT-2's vocab.json and merges.txt, BERT's vocab.txt."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanogpt import files
from nanogpt.config import Amount
from nanogpt.errors import UserError
from nanogpt.tokenizer import bpe, vocabulary
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

NAMES = ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt", "tokenizer_config.json")
ENDINGS = (".model", ".tiktoken")  # of unsupported formats
IDS = {str: Amount}  # vocab.json, added_tokens.json
LIKE_GPT2 = ("GPT2", "Roberta", "Bart", "Longformer", "OPT", "CodeGen", "Whisper", "PreTrained")  # its words
SPECIAL = (
    END_OF_TEXT,
    *["<s>", "</s>", "<pad>", "<unk>", "<mask>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
)


def find(folder: Path) -> str:
    """Return a tokenizer.json for the other tokenizer files of `folder`; "" if there are none.

    Raise UserError, which says how to convert them, if their format is not supported.
    """
    for names, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / names).is_file() and (folder / merges).is_file():
            return _byte_level(folder, folder / names, files.text_of(folder / merges))
    if (folder / "vocab.txt").is_file():
        return _word_piece(folder, folder / "vocab.txt")
    if others := sorted(path for path in folder.iterdir() if path.suffix in ENDINGS):
        code = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise UserError(
            f"{others[0]} is a SentencePiece or tiktoken file, which is not read; make a tokenizer.json: "
            f'python -c "from transformers import AutoTokenizer; {code}"'
        )
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


def _settings(folder: Path) -> dict[str, Any]:
    return _json(folder / "tokenizer_config.json", {"added_tokens_decoder?": {str: {"content": str}}})


def _assembled(folder: Path, vocab: dict[str, Any], parts: dict[str, Any]) -> str:
    """Return the tokenizer.json with `parts` and the added tokens of `folder`."""
    added = dict(_json(folder / "added_tokens.json", IDS))
    special = set(SPECIAL)
    for number, token in _settings(folder).get("added_tokens_decoder", {}).items():
        added[token["content"]] = files.parse_json(number, f"{folder}: id of {token['content']!r}", Amount)
        special |= {token["content"]} if token.get("special") else set()
    added |= {token: vocab[token] for token in SPECIAL if token in vocab}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [
        {"id": number, "content": token, **plain, "special": token in special}
        for token, number in sorted(added.items(), key=lambda item: item[1])
    ]
    return json.dumps({"version": "1.0", "added_tokens": tokens, **parts}) + "\n"


def _byte_level(folder: Path, path: Path, merges: str) -> str:
    vocab, settings = _json(path, IDS), _settings(folder)
    lines = _merges(merges.splitlines())
    kind, missing = str(settings.get("tokenizer_class") or "GPT2"), set(bpe.BYTE_OF) - set(vocab)
    if missing or not kind.startswith(LIKE_GPT2) or any(token.endswith("</w>") for token in vocab):
        why = f"lacks {len(missing)} of the 256 bytes" if missing else f"is of a {kind.removesuffix('Fast')}"
        raise UserError(f"{path} {why}, so it is not a BPE such as GPT-2's; give its tokenizer.json")
    known = gpt2(lines) if len(vocab) == vocabulary.GPT2_VOCAB_SIZE else ""
    if known and not _json(folder / "added_tokens.json", IDS):
        return known
    level = {**bpe.BYTE_LEVEL, "add_prefix_space": bool(settings.get("add_prefix_space"))}
    model = {"type": "BPE", "vocab": vocab, "merges": lines}
    parts = {"pre_tokenizer": level, "decoder": bpe.BYTE_LEVEL, "model": model}
    return _assembled(folder, vocab, parts)


def _word_piece(folder: Path, path: Path) -> str:
    tokens = files.text_of(path).removesuffix("\n").split("\n")
    vocab = {token.removesuffix("\r"): number for number, token in enumerate(tokens)}
    if "[UNK]" not in vocab or len(vocab) != len(tokens):
        raise UserError(f"{path} is not BERT's vocabulary: it must hold distinct tokens, with [UNK]")
    settings = _settings(folder)
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),
        "lowercase": settings.get("do_lower_case", True),
    }
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    parts = {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {**model, "max_input_chars_per_word": 100, "vocab": vocab},
    }
    return _assembled(folder, vocab, parts)
