"""Weights that lie somewhere, in whatever layout, and the model they are fitted into.

What the shape is, and which tokenizer belongs to it, is known before a weight is read; reading goes one
tensor at a time, so that a model never needs much more memory than its weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer.tokenizer import Tokenizer, from_text

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's models
POSITIONS = "position.wpe.weight"
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
