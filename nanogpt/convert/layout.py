"""Map parameter names and shapes of GPT-2 and nanoGPT files to those of our GPT."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.reader import empty_model
from nanogpt.convert.pretrained import POSITIONS
from nanogpt.errors import UserError
from nanogpt.model import GPTConfig
from nanogpt.options import shape_problems
from nanogpt.tokenizer import vocabulary

OWN_TOKENIZER = "tokenizer.nanogpt.json"  # our tokenizer.json in exported folders, beside Hugging Face's
NO_SWITCH = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "vocab_multiple", "init"}
NO_SWITCH |= {"ngram_rows"}  # of no effect without ngram_orders
PADDING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # candidate values of vocab_multiple


def ours(name: str) -> str:
    """Return our name for the parameter called `name` in GPT-2 and nanoGPT files."""
    plain = name.removeprefix("transformer.")
    return POSITIONS if plain == "wpe.weight" else plain


def theirs(name: str) -> str:
    """Return the name of our parameter `name` in GPT-2 and nanoGPT files."""
    if name == "lm_head.weight":
        return name
    return "transformer." + ("wpe.weight" if name == POSITIONS else name)


def parameter_shapes(config: GPTConfig, path: Path) -> dict[str, list[int]]:
    """Return the shape of each parameter. Raise UserError if the file `path` describes an invalid model."""
    shape = (config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.position)
    if problems := shape_problems(*shape):
        raise UserError(f"{path}: {'; '.join(problems)}")
    return {name: list(p.shape) for name, p in empty_model(config, path).named_parameters()}


def mismatches(expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]]) -> str:
    """Describe the differences of two tables of shapes, up to three names of each kind; "" if they agree."""
    both = [name for name in expected if name in actual and list(expected[name]) != list(actual[name])]
    kinds = {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "of wrong shape": [f"{n} {list(actual[n])}, expected {list(expected[n])}" for n in both],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    )


def unlike(config: GPTConfig, known: Mapping[str, Any]) -> list[str]:
    """Return NAME=VALUE for each architecture option of `config` whose value is not in `known` (None: any).
    Options missing from `known` must have their defaults, so that a new option is never dropped silently.
    """
    switches = [field for field in fields(GPTConfig) if field.name not in NO_SWITCH]
    return [
        f"{field.name}={getattr(config, field.name)}"
        for field in switches
        if (values := known.get(field.name, (field.default,))) is not None
        and getattr(config, field.name) not in values
    ]


def with_vocabulary(config: GPTConfig, text: str, origin: str) -> GPTConfig:
    """Return `config` with the vocabulary of tokenizer `text` (contents of tokenizer.json; empty: unknown).

    Embedding rows beyond its ids become vocabulary padding, which is neither scored nor sampled. Raise
    UserError if the tokenizer has more ids than the embedding has rows, or fewer than padding explains.
    """
    if not text:
        return config
    ids = vocabulary.identify(text).vocab_size
    if ids > config.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has {ids} ids, but the embedding has {config.vocab_size} rows; "
            f"use the tokenizer that the model was trained with"
        )
    fitting = [m for m in PADDING if -(-ids // m) * m == config.vocab_size]
    if not fitting:
        more = f"the embedding has {config.vocab_size} rows, the tokenizer {ids} ids"
        raise UserError(f"{origin}: {more}; give the tokenizer.json that includes the added tokens")
    return replace(config, vocab_size=ids, vocab_multiple=min(fitting))
