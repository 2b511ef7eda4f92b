"""How files of GPT-2 and nanoGPT name and shape what a GPT of ours has."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanogpt.convert.pretrained import POSITIONS
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import shape_problems
from nanogpt.tokenizer import vocabulary

OWN_TOKENIZER = "tokenizer.nanogpt.json"  # ours beside Hugging Face's, in the folders that we write
NO_SWITCH = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "vocab_multiple", "init"}
PADDING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # multiples to which tables are padded


def ours(name: str) -> str:
    """Our name of a parameter that the files of GPT-2 and nanoGPT call `name`."""
    plain = name.removeprefix("transformer.")
    return POSITIONS if plain == "wpe.weight" else plain


def theirs(name: str) -> str:
    """The name in files of GPT-2 and nanoGPT of our parameter `name`."""
    if name == "lm_head.weight":
        return name
    return "transformer." + ("wpe.weight" if name == POSITIONS else name)


def require_possible(config: GPTConfig, path: Path) -> None:
    """UserError if the file `path` describes a model that cannot be."""
    shape = (config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.position)
    if problems := shape_problems(*shape):
        raise UserError(f"{path}: {'; '.join(problems)}")


def parameter_shapes(config: GPTConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        model: nn.Module = GPT(config)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def mismatches(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> str:
    """How two tables of shapes differ, in words, the first three of each kind; empty if they agree."""
    both = [name for name in expected if name in found and list(expected[name]) != list(found[name])]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "not expected": [name for name in found if name not in expected],
        "of another shape": [f"{n} {list(found[n])}, expected {list(expected[n])}" for n in both],
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in kinds.items()
        if names
    )


def unlike(config: GPTConfig, known: Mapping[str, tuple[Any, ...] | None]) -> list[str]:
    """The switches of `config` with a value that is not among those `known` (None: any). A switch that
    `known` does not name must have its default, so that a new one is never left out in silence."""
    switches = [field for field in fields(GPTConfig) if field.name not in NO_SWITCH]
    return [
        field.name
        for field in switches
        if (values := known.get(field.name, (field.default,))) is not None
        and getattr(config, field.name) not in values
    ]


def with_vocabulary(config: GPTConfig, text: str, origin: str) -> GPTConfig:
    """`config` with the vocabulary of the tokenizer `text` (of tokenizer.json; empty: unknown): rows of
    the table beyond its ids are padding, which is neither scored nor sampled."""
    if not text:
        return config
    ids = vocabulary.identify(text).vocab_size
    if ids > config.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has {ids} ids, but the model's table has {config.vocab_size} rows; "
            f"they do not belong together"
        )
    fitting = [m for m in PADDING if -(-ids // m) * m == config.vocab_size]
    return replace(config, vocab_size=ids, vocab_multiple=min(fitting, default=1))
