"""Position encodings: RoPE's relative distances, ALiBi's slopes, and lengths beyond training."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt.model import GPT, ALiBi, GPTConfig, Learned, Rotary, alibi_slopes
from nanogpt.tokenizer.tokenizer import CharTokenizer
from tests.conftest import words


def test_rotary_products_depend_only_on_distance():
    rotary = Rotary(64, 32, 4, 8)
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    turned_q = rotary.rotate(q.expand(1, 1, 64, 8))[0, 0]
    turned_k = rotary.rotate(k.expand(1, 1, 64, 8))[0, 0]
    products = turned_q @ turned_k.T
    for distance in (0, 1, 5, 30):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert products.diagonal(1)[0] != products.diagonal(5)[0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(64))
    torch.testing.assert_close(turned_q[0], q)


def test_first_vector_math_call_is_single_threaded(monkeypatch):
    """MKL's initialization is not thread-safe: tables of 2 x 2,048 elements were sometimes less accurate."""
    sizes = []
    real = torch.Tensor.cos
    monkeypatch.setattr(torch.Tensor, "cos", lambda x: sizes.append(x.numel()) or real(x))
    GPT(GPTConfig(vocab_size=8, block_size=256, n_layer=1, n_head=1, n_embd=32, position="rope"))
    assert sizes == [1, 256 * 16]


def test_alibi_slopes_and_bias():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    bias = ALiBi(16, 32, 2, 16).bias(4)
    assert bias.shape == (2, 4, 4)
    assert bias[0, 3].tolist() == [-3 / 16, -2 / 16, -1 / 16, 0]
    assert bias[1].isinf().tolist() == torch.ones(4, 4).triu(1).bool().tolist()


def test_unused_hooks_of_each_scheme_are_identities():
    x = torch.randn(2, 3, 8)
    learned, rotary, alibi = (cls(16, 8, 2, 4) for cls in (Learned, Rotary, ALiBi))
    torch.nn.init.normal_(learned.wpe.weight)
    assert not torch.equal(learned.embed(x), x)
    for scheme in (rotary, alibi):
        assert scheme.embed(x) is x and not list(scheme.parameters()) and not scheme.state_dict()
    assert learned.bias(3) is None and rotary.bias(3) is None


def test_rotary_requires_an_even_head_size():
    with pytest.raises(ValueError, match="an even number of channels per head, not 3"):
        Rotary(16, 6, 2, 3)


def loss_at_twice_the_length(position: str) -> tuple[float, float]:
    """Train with a context of 24 characters; return the loss on its second half, and on characters 24 to 48,
    positions that the model has not seen in training."""
    torch.manual_seed(0)
    text = words(4000)
    ids = torch.from_numpy(CharTokenizer(sorted(set(text))).encode(text))
    config = GPTConfig(vocab_size=10, block_size=48, n_layer=2, n_head=4, n_embd=32, position=position)
    model = GPT(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(300):
        starts = torch.randint(len(ids) - 3000, (16,), generator=draw)
        rows = torch.stack([ids[start : start + 25] for start in starts])
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        rows = ids[-2950:].unfold(0, 49, 29)
        losses = F.cross_entropy(model(rows[:, :-1])[0].mT, rows[:, 1:], reduction="none")
    return losses[:, 12:24].mean().item(), losses[:, 24:].mean().item()


def test_alibi_extrapolates_better_than_learned_positions_and_rope():
    rises = {}
    for position in ("learned", "rope", "alibi"):
        seen, beyond = loss_at_twice_the_length(position)
        assert seen < 1.0, position  # trained; uniform guessing is 2.3
        rises[position] = beyond - seen
    assert rises["alibi"] < rises["rope"] and rises["alibi"] < rises["learned"]
