"""Sampling: the distribution, the seed, the context."""

import pytest
import torch

from nanogpt import runtime
from nanogpt.generate import draw, generate, keep_top_k
from nanogpt.model import GPT, GPTConfig

MACHINE = runtime.setup("cpu", "float32", 32)


def options(**changes):
    usual = {
        "block_size": 8,
        "num_samples": 3,
        "max_new_tokens": 20,
        "temperature": 1.0,
        "top_k": 0,
        "seed": 1,
    }
    return {**usual, "machine": MACHINE, **changes}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=37, block_size=8, n_layer=1, n_head=2, n_embd=16, vocab_multiple=64))
    with torch.no_grad():
        model.wte.weight.normal_()
    return model.eval()


def text(model, prompt=(1, 2), **changes):
    return torch.stack(list(generate(model.next_logits, list(prompt), **options(**changes))), dim=1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3)])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    n = 4000
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    drawn = draw(logits.repeat(n, 1), temperature, top_k, generators)
    kept = logits.clone()
    if top_k:
        kept[logits.argsort(descending=True)[top_k:]] = -torch.inf
    expected = (kept / temperature).softmax(-1) * n
    counts = torch.bincount(drawn, minlength=5).float()
    assert not counts[expected == 0].any()
    there = expected > 0
    chi_square = ((counts - expected)[there].square() / expected[there]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_top_k_keeps_the_highest():
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0], [0.0, -1.0, -2.0, -3.0]])
    assert keep_top_k(logits, 1).isfinite().tolist() == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    assert keep_top_k(logits, 2).isfinite().sum(-1).tolist() == [3, 2]  # a tie stays
    assert torch.equal(keep_top_k(logits, 99), logits)


def test_one_seed_gives_the_same_text_at_any_number_of_samples(model):
    alone = text(model, num_samples=1)
    assert torch.equal(text(model, num_samples=5)[:1], alone)
    assert torch.equal(text(model, num_samples=3, seed=2)[0], text(model, num_samples=5)[1])
    assert not torch.equal(text(model, seed=77, num_samples=1), alone)


def test_temperature_0_is_greedy(model):
    rows = text(model, temperature=0.0)
    assert torch.equal(rows[0], rows[1])
    idx = torch.tensor([[1, 2]])
    for token in rows[0]:
        assert token == model.next_logits(idx[:, -8:]).argmax()
        idx = torch.cat([idx, token.view(1, 1)], dim=1)


def test_ids_stay_in_the_vocabulary(model):
    """10,000 tokens of a model of 37 ids, whose table is padded to 64."""
    rows = text(model, num_samples=50, max_new_tokens=200, temperature=5.0)
    assert rows.min() >= 0 and rows.max() == 36


def test_a_prompt_longer_than_the_context_is_cut_from_the_left(model):
    long = list(range(30))
    assert torch.equal(text(model, prompt=long), text(model, prompt=long[-8:]))
    assert text(model, max_new_tokens=0 + 1).shape == (3, 1)
