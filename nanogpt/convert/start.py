"""A run that starts from weights: what they decide of its options, and which data they fit."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nanogpt import ROOT
from nanogpt.convert import weights
from nanogpt.convert.pretrained import Pretrained
from nanogpt.data.loader import Dataset
from nanogpt.errors import UserError
from nanogpt.options import TrainOptions

FREE = {"block_size", "dropout", "vocab_multiple"}  # what may differ from the model as it lies there
C = TypeVar("C", bound=TrainOptions)


def adopt(config: C, origins: dict[str, str], shape: set[str], notices: list[str]) -> tuple[C, Pretrained]:
    """Return `config` with the shape of the weights that --init_from names, and those weights. The context
    may be cut, and the vocabulary padded otherwise; UserError if another option of `shape` was given that is
    not what the weights need."""
    found = weights.open_weights(config.init_from, ROOT, Path(config.out_dir))
    notices += found.notices
    wrong = [
        f"{name}={getattr(config, name)} given, {name}={getattr(found.config, name)} in the weights"
        for name in sorted((shape & set(origins)) - FREE)
        if getattr(config, name) != getattr(found.config, name)
    ]
    if wrong:
        raise UserError(
            f"{found.origin} was trained as another model, and its weights mean nothing in this one: "
            f"{'; '.join(wrong)}; leave these out"
        )
    fitted = found.fitted(
        block_size=config.block_size if "block_size" in origins else 0,
        vocab_multiple=config.vocab_multiple,
        dropout=config.dropout,
    )
    origins |= {name: found.origin for name in shape - set(origins)}
    return replace(config, **{name: getattr(fitted, name) for name in shape}), found


def require_tokenizer(found: Pretrained, dataset: Dataset) -> None:
    """UserError unless the dataset is in the model's ids; it gets the more complete tokenizer of the two."""
    sha256 = found.tokenizer_sha256
    same = sha256 == dataset.fingerprint if sha256 else found.config.vocab_size == dataset.vocab_size
    if not same:
        raise UserError(
            f"{found.origin} was trained with another tokenizer ({found.config.vocab_size} ids) than that "
            f"of {dataset.folder} ({dataset.vocab_size} ids); give a --dataset prepared with its own"
        )
    dataset.tokenizer = max(dataset.tokenizer, found.tokenizer, key=len)  # the one with its merges
