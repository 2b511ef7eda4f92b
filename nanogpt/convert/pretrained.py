"""Pretrained weights in any supported layout, and the model they are loaded into.

Shape and tokenizer are known before any weight is read. Weights are read one tensor at a time, so that
peak memory stays close to the size of the weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.checkpoint.reader import empty_model, open_tensors
from nanogpt.errors import UserError
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer.tokenizer import Tokenizer, from_text

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's models
POSITIONS = "position.wpe.weight"
TABLES = ("wte.weight", "lm_head.weight")  # one row per token


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model in a file or folder, its weights not read yet."""

    origin: str  # path or name, for messages
    config: GPTConfig  # shape as stored
    tokenizer: str  # contents of its tokenizer.json; empty if unknown
    tokenizer_sha256: str  # its fingerprint; empty if unknown
    read: Callable[[], Iterable[tuple[str, Tensor]]]  # parameters by name; may be views of a mapped file
    notices: tuple[str, ...] = ()  # messages for the user
    iter_num: int = 0  # iterations trained for, if known
    val_loss: float | None = None
    dataset: str = ""  # training data, as in train.py's --dataset

    def fitted(self, *, block_size: int = 0, vocab_multiple: int = 0, dropout: float = 0.0) -> GPTConfig:
        """Return the shape with a context shortened to `block_size` (0: as stored) and a vocabulary padded to
        a multiple of `vocab_multiple` (0: as stored).

        Raise UserError if `block_size` exceeds the stored context.
        """
        if block_size > self.config.block_size:
            raise UserError(f"block_size={block_size} exceeds the {self.config.block_size} of {self.origin}")
        return replace(
            self.config,
            block_size=block_size or self.config.block_size,
            vocab_multiple=vocab_multiple or self.config.vocab_multiple,
            dropout=dropout,
        )

    def open_tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the model; raise UserError if it is unknown."""
        if not self.tokenizer:
            raise UserError(
                f"the tokenizer of {self.origin} is unknown: put meta.pkl (nanoGPT) or merges.txt beside it"
            )
        return from_text(self.tokenizer, self.origin)

    def load(self, config: GPTConfig, device: torch.device | str = "cpu") -> GPT:
        """Return a model of shape `config` (from `fitted`) with these weights in float32, in evaluation mode.

        Rows of vocabulary padding that the file lacks are zero.
        """
        model = empty_model(config, self.origin)
        wanted = dict(model.named_parameters())
        tensors = {}
        for name, tensor in self.read():
            if not (tensor.is_floating_point() and tensor.sum(dtype=torch.float32).isfinite()):
                raise UserError(f"{self.origin}: {name} has values that are not finite floats; it is damaged")
            padded = name in wanted and (name in TABLES or name == POSITIONS)
            rows = wanted[name].shape[0] if padded else tensor.shape[0]
            # Always copy: the file may be replaced while the model is used, and c_* matrices are transposed.
            fresh = torch.zeros((rows, *tensor.shape[1:]))
            kept = min(rows, len(tensor))
            fresh[:kept] = tensor[:kept]
            tensors[name] = fresh
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in wanted.items()}:
            raise UserError(f"{self.origin} has tensors of another model than it describes")
        model.load_state_dict(tensors, assign=True)
        # Position tables that are not parameters were created with the model, on the CPU.
        return model.requires_grad_().eval().to(device)


def stored_tensor(path: Path, name: str) -> Tensor:
    """Return a tensor of a safetensors file as a view of the memory-mapped file.

    Each call maps the file anew, and the mapping ends with the tensor: mapped pages count as memory of the
    process. For GPT-2 (124M) this lowers the peak from 1.17 GB to 0.85 GB at the same speed.
    """
    with open_tensors(path) as file:
        return file.get_tensor(name)
