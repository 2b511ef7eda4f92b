"""Start a run from pretrained weights: options that they determine, and check of the dataset."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nanogpt import ROOT
from nanogpt.convert import weights
from nanogpt.convert.pretrained import Pretrained
from nanogpt.data.loader import Dataset
from nanogpt.errors import UserError
from nanogpt.options import TrainOptions

FREE = {"block_size", "dropout", "vocab_multiple"}  # options that may differ from the stored model
C = TypeVar("C", bound=TrainOptions)


def adopt(config: C, origins: dict[str, str], shape: set[str], notices: list[str]) -> tuple[C, Pretrained]:
    """Return `config` with the shape of the weights named by --init_from, and those weights.

    The context may be shortened and the vocabulary padding changed. `origins` and `notices` are updated in
    place. Raise UserError if another option of `shape` was given a value that does not match the weights.
    """
    source = weights.open_weights(config.init_from, ROOT, Path(config.out_dir))
    notices += source.notices
    wrong = [
        f"{name}={getattr(config, name)} given, {name}={getattr(source.config, name)} in the weights"
        for name in sorted((shape & set(origins)) - FREE)
        if getattr(config, name) != getattr(source.config, name)
    ]
    if wrong:
        raise UserError(
            f"{source.origin} has a different architecture: {'; '.join(wrong)}; omit these options"
        )
    fitted = source.fitted(
        block_size=config.block_size if "block_size" in origins else 0,
        vocab_multiple=config.vocab_multiple,
        dropout=config.dropout,
    )
    origins |= {name: source.origin for name in shape - set(origins)}
    return replace(config, **{name: getattr(fitted, name) for name in shape}), source


def require_tokenizer(source: Pretrained, dataset: Dataset) -> None:
    """Raise UserError unless the dataset is encoded with the model's tokenizer. `dataset.tokenizer` is set in
    place to the more complete of the two.
    """
    sha256 = source.tokenizer_sha256
    same = sha256 == dataset.fingerprint if sha256 else source.config.vocab_size == dataset.vocab_size
    if not same:
        raise UserError(
            f"{source.origin} was trained with another tokenizer ({source.config.vocab_size} ids) than "
            f"{dataset.folder} ({dataset.vocab_size} ids); give a --dataset encoded with its own"
        )
    dataset.tokenizer = max(dataset.tokenizer, source.tokenizer, key=len)  # the longer one includes merges
