"""Choose which parameters finetuning trains, and freeze the rest."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from nanogpt.errors import UserError
from nanogpt.finetune import lora
from nanogpt.options import FinetuneOptions


def choose_trained(model: nn.Module, options: FinetuneOptions) -> list[str]:
    """Freeze the parameters of `model` that `options` exclude, in place; return a summary to print.

    A tied LM head is the embedding (wte.weight) and is frozen with it. Raise UserError if a pattern matches
    no parameter, or if none is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    if options.lora_rank:
        trained = {name for name in names if lora.is_adapter(name)}
    else:
        trained = matching(options.train_only, names, "train_only") if options.train_only else set(names)
        trained -= matching(options.freeze, names, "freeze") if options.freeze else set()
    if not trained:
        raise UserError(
            f"--freeze={options.freeze} leaves nothing to train in --train_only={options.train_only or '*'}; "
            f"{_known(names)}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if len(trained) == len(names):
        return []
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [f"trainable parameters: {count:,} of {total:,} ({len(trained)} of {len(names)} tensors)"]


def matching(patterns: str, names: Iterable[str], option: str) -> set[str]:
    """Return the `names` that match any of the comma-separated shell patterns. Raise UserError if a pattern
    matches none."""
    names, matched = list(names), set()
    for pattern in (part.strip() for part in patterns.split(",")):
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise UserError(f"--{option}: no parameter matches {pattern!r}; {_known(names)}")
        matched |= matches
    return matched


def _known(names: list[str]) -> str:
    """Return the list of parameter names for error messages; those of block 0 stand for all blocks."""
    shown = [name for name in names if not name.startswith("h.") or name.startswith("h.0.")]
    return f"there are {', '.join(shown)}, ...; example pattern: h.0.*,wte*"
