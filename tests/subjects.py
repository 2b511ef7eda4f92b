"""Shared by tests of scores: a small model with a peaked output distribution."""

import torch

from nanogpt import runtime
from nanogpt.evaluation.log_likelihood import Subject
from nanogpt.model import GPT, GPTConfig
from nanogpt.tokenizer import tokenizer

LETTERS = tokenizer.CharTokenizer("\n abcdefgh")


def subject_of(tokens, block_size: int, **options) -> Subject:
    """Return a model with weights large enough to peak its output distribution."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32} | options
    model = GPT(GPTConfig(vocab_size=tokens.vocab_size, block_size=block_size, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return Subject(model, tokens, runtime.Machine(torch.device("cpu"), "float32", "test"))
