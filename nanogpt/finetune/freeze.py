"""Finetuning: which parameters are trained."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from nanogpt.errors import UserError
from nanogpt.finetune import lora
from nanogpt.options import FinetuneOptions


def choose_trained(model: nn.Module, options: FinetuneOptions) -> list[str]:
    """Freeze all parameters of `model` that `options` exclude; returns lines that say so.

    A tied head is the embedding (wte.weight) and is frozen with it. UserError for a pattern that matches
    nothing, and when nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    if options.lora_rank:
        trained = {name for name in names if lora.is_adapter(name)}
    else:
        trained = matching(options.train_only, names, "train_only") if options.train_only else set(names)
        trained -= matching(options.freeze, names, "freeze") if options.freeze else set()
    if not trained:
        raise UserError(
            f"--freeze={options.freeze} leaves nothing to train of --train_only={options.train_only or '*'}; "
            f"{_known(names)}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if len(trained) == len(names):
        return []
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [f"trained are {count:,} of {total:,} parameters ({len(trained)} of {len(names)} tensors)"]


def matching(patterns: str, names: Iterable[str], option: str) -> set[str]:
    """The `names` that one of the comma-separated shell `patterns` matches; UserError if one has none."""
    names, found = list(names), set()
    for pattern in (part.strip() for part in patterns.split(",")):
        fits = {name for name in names if fnmatchcase(name, pattern)}
        if not fits:
            raise UserError(f"--{option}: no parameter is named like {pattern!r}; {_known(names)}")
        found |= fits
    return found


def _known(names: list[str]) -> str:
    """The kinds of parameters, those of blocks once."""
    shown = [name for name in names if not name.startswith("h.") or name.startswith("h.0.")]
    return f"there are {', '.join(shown)} and so on; patterns are like h.0.*,wte*"
