"""Dataset mixtures: `--dataset=web:0.7,books:0.3` samples sequences from each dataset by weight.

Weights need not sum to 1; without weights, datasets are weighted by their number of tokens. Sample n is a
pure function of (seed, n) (mixture_sampler.py), so resuming, several ranks and batch size ramp-up need no
special handling.
"""

from fractions import Fraction
from pathlib import Path

from nanogpt.data import loader
from nanogpt.data.loader import Dataset
from nanogpt.data.token_files import Tokens
from nanogpt.errors import UserError


def load(name: str, root: Path) -> Dataset:
    """Load the dataset or mixture `name`: folders as for loader.find, all with weights or all without.

    Raise UserError as loader.find and loader.load do, for invalid weights, and for datasets that cannot be
    combined (different tokenizers, or only some with response masks).
    """
    parts = parse(name)
    if len(parts) == 1:
        return loader.load(loader.find(parts[0][0], root))
    folders = [loader.find(part, root) for part, _ in parts]
    for number, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise UserError(f"--dataset={name} lists {folder} twice; give it once, with a larger weight")
    datasets = [loader.load(folder) for folder in folders]
    first = datasets[0]
    for other in datasets[1:]:
        if other.fingerprint != first.fingerprint:
            raise UserError(
                f"--dataset={name}: {other.folder} ({other.vocab_size} ids) has a different tokenizer from "
                f"{first.folder} ({first.vocab_size} ids); prepare both with the same --tokenizer"
            )
        if (other.train.scored is None) != (first.train.scored is None):
            raise UserError(
                f"--dataset={name}: only one of {first.folder} and {other.folder} holds prompts and "
                f"responses; train on one kind at a time"
            )
    amounts = [weight or Fraction(len(one.train)) for one, (_, weight) in zip(datasets, parts, strict=True)]
    weights = [amount / sum(amounts) for amount in amounts]
    names = _names(folders)
    val = _joined([one.val for one in datasets], names, weights)
    if parts[0][1]:  # given: the validation loss is another mean for others
        val.content += f" by {' '.join(map(str, weights))}"
    lengths = [one.bytes_per_token for one in datasets if one.bytes_per_token]
    mean = sum(float(w) * length for w, length in zip(weights, lengths, strict=False))
    return Dataset(
        Path(name),
        _joined([one.train for one in datasets], names, weights),
        val,
        max((one.tokenizer for one in datasets), key=len),  # prefer GPT-2's with merges
        first.vocab_size,
        first.fingerprint,
        mean if len(lengths) == len(datasets) else None,
    )


def parse(name: str) -> list[tuple[str, Fraction | None]]:
    """Parse `name` into (dataset, weight) pairs; weights are None for all or for none."""
    if Path(name).is_dir():  # even if its name contains , or :
        return [(name, None)]
    pairs = [_part(part.strip(), name) for part in name.split(",")]
    if len({weight is None for _, weight in pairs}) > 1:
        raise UserError(f"--dataset={name} gives weights to some only; write NAME:WEIGHT for all, or none")
    return pairs


def _part(part: str, name: str) -> tuple[str, Fraction | None]:
    folder, colon, text = part.rpartition(":")
    try:
        weight = Fraction(text) if colon else None
    except (ValueError, ZeroDivisionError):
        weight = None
    folder = folder if weight is not None else part
    if not folder or (weight is not None and weight <= 0):
        raise UserError(f"--dataset={name}: {part!r} is not NAME or NAME:WEIGHT with a weight above 0")
    return folder, weight


def _joined(texts: list[Tokens], names: list[str], weights: list[Fraction]) -> Tokens:
    for text, name, weight in zip(texts, names, weights, strict=True):
        text.name, text.weight = name, weight
    joined = Tokens([part for text in texts for part in text.parts], texts[0].vocab_size, texts)
    joined.content = " ".join(text.content for text in texts)
    masks = [text.scored for text in texts if text.scored]
    if len(masks) == len(texts):
        joined.scored = Tokens([part for mask in masks for part in mask.parts], 2)
    return joined


def _names(folders: list[Path]) -> list[str]:
    """Return the last component of each path, or the full paths if those are not unique."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]
