"""Methods of nanoGPT's GPT class, for code written for it (docs/generation.md lists the others)."""

from pathlib import Path

import torch
from torch import Tensor

from nanogpt import ROOT
from nanogpt.convert.weights import open_weights
from nanogpt.inference.engine import Engine, Text
from nanogpt.inference.sampling import SamplingOptions
from nanogpt.model import GPT


def from_pretrained(name: str) -> GPT:
    """Return a model to train, in float32, with the weights that `name` stands for (see open_weights)."""
    pretrained = open_weights(name, ROOT, Path("out"))
    return pretrained.load(pretrained.fitted()).train()


@torch.no_grad()
def generate(model: GPT, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None) -> Tensor:
    """Return idx (B, T) followed by `max_new_tokens` sampled tokens each. torch.manual_seed seeds the
    samples; beyond the context length the context slides."""
    was_training = model.training
    options = SamplingOptions(temperature=temperature, top_k=top_k or 0)
    seeds = torch.randint(1 << 62, (len(idx),)).tolist()
    texts = [Text(row, options, seed) for row, seed in zip(idx.tolist(), seeds, strict=True)]
    engine = Engine(model.eval(), len(texts))
    engine.add(texts)
    for _ in range(max_new_tokens):
        engine.step()
    model.train(was_training)
    return torch.tensor([text.ids for text in texts], device=idx.device)
