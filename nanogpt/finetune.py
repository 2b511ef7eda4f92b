"""Finetuning: which parameters are trained, when to stop, and what to say at the end."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from nanogpt import lora
from nanogpt.config import Count, Rate
from nanogpt.errors import UserError
from nanogpt.lora import Adapters


@dataclass(frozen=True)
class FinetuneOptions:
    # finetuning
    patience: Count = 0  # stop after so many evaluations without a better validation loss; 0: never
    freeze: str = ""  # leave these parameters alone: patterns such as wte*,h.0.*
    train_only: str = ""  # train these parameters alone
    lora_rank: Count = 0  #: train adapters of this rank beside frozen weights; 0: the weights
    lora_alpha: Rate = 16.0  # what adapters add counts lora_alpha / lora_rank
    lora_targets: str = "c_attn,c_proj"  # linear maps that get one: c_attn, c_proj, c_fc, h.0.*

    def adapters(self) -> Adapters | None:
        return Adapters(self.lora_rank, self.lora_alpha, self.lora_targets) if self.lora_rank else None


FIXED = {"freeze", "train_only", "lora_rank", "lora_alpha", "lora_targets"}  # a resumed run keeps them


def problems(options: FinetuneOptions) -> list[str]:
    """What makes these options impossible; empty if nothing does."""
    wrong = []
    if options.lora_rank and (options.freeze or options.train_only):
        wrong.append("--lora_rank freezes all weights; leave out --freeze and --train_only")
    if options.lora_rank and not options.lora_alpha:
        wrong.append("lora_alpha=0 switches the adapters off; 2 * lora_rank is usual")
    return wrong


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


def gap(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line on training and validation loss of the `rows` of metrics.jsonl: at the best evaluation, and
    at the last if that is another; empty where nothing was evaluated."""
    evaluations = [row for row in rows if row["event"] == "eval"]
    if not evaluations:
        return ""
    best, last = min(evaluations, key=lambda row: row["val_loss"]), evaluations[-1]
    line = f"best validation loss {best['val_loss']:.4f} at iteration {best['iter']}: {_difference(best)}"
    if last is not best:
        line += f"; at the end, iteration {last['iter']}: {_difference(last)}"
        if last["train_loss"] < best["train_loss"]:
            line += " (it learns the training text by heart)"
    return line


def _difference(row: Mapping[str, Any]) -> str:
    train, val = row["train_loss"], row["val_loss"]
    return f"train {train:.4f}, val {val:.4f}, gap {val - train:+.4f}"
