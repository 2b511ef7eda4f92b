"""Weights that lie somewhere, in whatever layout, and the model they are fitted into.

What the shape is, and which tokenizer belongs to it, is known before a weight is read; reading goes one
tensor at a time, so that a model never needs much more memory than its weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.options import shape_problems
from nanogpt.tokenizer import vocabulary
from nanogpt.tokenizer.tokenizer import Tokenizer, from_text

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's models
OWN_TOKENIZER = "tokenizer.nanogpt.json"  # ours beside Hugging Face's, in the folders that we write
POSITIONS = "position.wpe.weight"
NO_SWITCH = {"vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "vocab_multiple", "init"}
PADDING = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # multiples to which tables are padded
FREE = {"block_size", "dropout", "vocab_multiple"}  # what may differ from the model as it lies there
TABLES = ("wte.weight", "lm_head.weight")  # a row a token


@dataclass(frozen=True)
class Pretrained:
    """A model in a file or folder."""

    origin: str  # where it lies, for people
    config: GPTConfig  # as it lies there
    tokenizer: str  # the text of its tokenizer.json; empty where nothing tells
    tokenizer_sha256: str  # its fingerprint; empty where nothing tells
    read: Callable[[], Iterable[tuple[str, Tensor]]]  # parameters by name; perhaps views of a mapped file
    notices: tuple[str, ...] = ()  # lines that the user should see
    iter_num: int = 0  # updates that made them, where they say
    val_loss: float | None = None
    dataset: str = ""  # what they were trained on, as train.py takes it

    def fitted(self, *, block_size: int = 0, vocab_multiple: int = 0, dropout: float = 0.0) -> GPTConfig:
        """The shape with a context cut to `block_size` (0: all of it) and a vocabulary padded to a
        multiple of `vocab_multiple` (0: as it lies there); UserError for a longer context."""
        if block_size > self.config.block_size:
            raise UserError(
                f"block_size={block_size} given, but {self.origin} has {self.config.block_size} positions; "
                f"give at most that"
            )
        return replace(
            self.config,
            block_size=block_size or self.config.block_size,
            vocab_multiple=vocab_multiple or self.config.vocab_multiple,
            dropout=dropout,
        )

    def adopted(self, options: Mapping[str, Any], given: Set[str]) -> GPTConfig:
        """The shape for training: that of the weights, with the `options` in FREE; their context, too,
        unless it is among those `given`. UserError if one given is not what the weights need."""
        wrong = [
            f"{name}={options[name]} given, {name}={getattr(self.config, name)} in the weights"
            for name in sorted(given - FREE)
            if options[name] != getattr(self.config, name)
        ]
        if wrong:
            raise UserError(
                f"{self.origin} was trained as another model, and its weights mean nothing in this one: "
                f"{'; '.join(wrong)}; leave these out"
            )
        return self.fitted(
            block_size=options["block_size"] if "block_size" in given else 0,
            vocab_multiple=options["vocab_multiple"],
            dropout=options["dropout"],
        )

    def require_tokenizer(self, sha256: str, vocab_size: int, folder: Path) -> None:
        """UserError unless data in `folder` with a tokenizer of this fingerprint is in the model's ids."""
        same = (
            self.tokenizer_sha256 == sha256 if self.tokenizer_sha256 else self.config.vocab_size == vocab_size
        )
        if not same:
            raise UserError(
                f"{self.origin} was trained with another tokenizer ({self.config.vocab_size} ids) than that "
                f"of {folder} ({vocab_size} ids); give a --dataset prepared with its own"
            )

    def open_tokenizer(self) -> Tokenizer:
        """What turns its ids into text; UserError where nothing tells."""
        if not self.tokenizer:
            raise UserError(
                f"nothing beside {self.origin} tells its tokenizer: put meta.pkl (nanoGPT) or merges.txt "
                f"there"
            )
        return from_text(self.tokenizer, self.origin)

    def load(self, config: GPTConfig, device: torch.device | str = "cpu") -> GPT:
        """A model of the shape `config` (from `fitted`) with these weights in float32, in evaluation
        mode. Rows of a padded vocabulary that the file has not are zeros."""
        with torch.device("meta"):
            model = GPT(config)
        wanted = dict(model.named_parameters())
        tensors = {}
        for name, tensor in self.read():
            rows = wanted[name].shape[0] if name in TABLES or name == POSITIONS else len(tensor)
            # A copy always: the file may be replaced while the model is used, and c_* matrices are turned.
            fresh = torch.empty((rows, *tensor.shape[1:]))
            kept = min(rows, len(tensor))
            fresh[:kept].copy_(tensor[:kept])
            fresh[kept:].zero_()
            tensors[name] = fresh
        model.load_state_dict(tensors, assign=True)
        # Position tables that are no parameters were made with the model, on the CPU.
        return model.requires_grad_().eval().to(device)


def stored_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, as a view of the mapped file.

    The file is mapped anew for each, and unmapped with it: the pages of a mapped file count as memory of
    the process. For GPT-2 (124M) the peak is 0.85 GB instead of 1.17, at the same speed.
    """
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


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
