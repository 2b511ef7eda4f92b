"""Convert our tokenizers to Hugging Face's tokenizers library, with the same ids for the same text."""

import json
from pathlib import Path
from typing import Any

from nanogpt import files
from nanogpt.errors import UserError, imported
from nanogpt.tokenizer import bpe
from nanogpt.tokenizer.gpt2 import GPT2Tokenizer
from nanogpt.tokenizer.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.vocabulary import END_OF_TEXT

# transformers' value for no model_max_length: texts to encode may be longer than block_size.
UNBOUNDED = int(1e30)


def write(folder: Path, tokens: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json; for GPT-2's tokenizer also vocab.json and merges.txt.

    Raise UserError if the library cannot match the tokenizer exactly or is not installed.
    """
    built = build(tokens)
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer" if tokens.kind == "gpt2" else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": UNBOUNDED,
        # transformers 4 adds token_type_ids otherwise, which GPT2LMHeadModel embeds as tokens
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokens.end_of_text is not None:
        name = built.id_to_token(tokens.end_of_text)
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), name)
    if isinstance(tokens, GPT2Tokenizer):
        config["add_prefix_space"] = False
        vocabulary = built.get_vocab(with_added_tokens=True)
        files.write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        files.write_text(folder / "merges.txt", tokens.merges)
    files.write_text(folder / "tokenizer.json", built.to_str(pretty=True))
    files.write_json(folder / "tokenizer_config.json", config)


def build(tokens: Tokenizer) -> Any:
    """Return a tokenizers.Tokenizer with the ids of `tokens`. Raise UserError as `write` does."""
    tokenizers = imported("tokenizers", "writing a Hugging Face tokenizer needs a package")
    if isinstance(tokens, CharTokenizer):
        return _characters(tokenizers, tokens)
    if isinstance(tokens, ByteTokenizer):
        return _byte_level(tokenizers, bpe.BYTE_OF, [], use_regex=False)
    if isinstance(tokens, GPT2Tokenizer):
        return _gpt2(tokenizers, tokens)
    if tokens.kind == "hf":  # already in the library's format; without settings that change its ids
        return bpe.load(json.dumps(tokens.to_json() | {"post_processor": None}), "tokenizer.json")
    raise UserError(f"a tokenizer of type {tokens.kind} has no Hugging Face equivalent")


def _characters(library: Any, tokens: CharTokenizer) -> Any:
    if unwritable := [c for c in tokens.characters if "\ud800" <= c <= "\udfff"]:
        raise UserError(f"the vocabulary contains {unwritable[0]!r}, which UTF-8 cannot encode")
    # No unk_token: an unknown character is an error, as in CharTokenizer.
    built = library.Tokenizer(library.models.WordLevel({c: i for i, c in enumerate(tokens.characters)}))
    every = library.Regex(r"[\s\S]")
    built.pre_tokenizer = library.pre_tokenizers.Split(every, "isolated")
    built.decoder = library.decoders.Fuse()
    return built


def _gpt2(library: Any, tokens: GPT2Tokenizer) -> Any:
    merges = [tuple(line.split(" ")) for line in bpe.merge_lines(tokens.merges)]
    built = _byte_level(library, bpe.vocabulary(tokens.merges), merges, use_regex=True)
    built.add_special_tokens([library.AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return built


def _byte_level(library: Any, vocabulary: dict[str, int], merges: list, use_regex: bool) -> Any:
    built = library.Tokenizer(library.models.BPE(vocabulary, merges))
    built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    built.decoder = library.decoders.ByteLevel()
    return built
