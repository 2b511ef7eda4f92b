"""Tests of the model: GPT-2's sizes and computation, causality, and vocabulary padding."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nanogpt.model import GPT, GPT2_SIZES, IGNORE, POSITIONS, GPTConfig, attention

SMALL = GPTConfig(vocab_size=37, block_size=16, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(SMALL)


def batch(seed=0, length=16):
    torch.manual_seed(seed)
    idx = torch.randint(SMALL.vocab_size, (2, length + 1))
    return idx[:, :-1], idx[:, 1:]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_of_gpt2(name, count):
    with torch.device("meta"):
        assert GPT(GPT2_SIZES[name]).n_params() == count
        assert GPT(replace(GPT2_SIZES[name], vocab_multiple=64)).n_params() == count


def test_forward_equals_a_reference_gpt2(model):
    """Compare the forward pass with a reference of plain matmuls and explicit softmax."""
    torch.manual_seed(1)
    for parameter in model.parameters():  # biases other than 0 and gains other than 1
        parameter.data.normal_(std=0.2)
    w = {name: p.double() for name, p in model.named_parameters()}
    idx, targets = batch()

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["position.wpe.weight"][: idx.shape[1]]
    hidden = torch.ones(16, 16).triu(1).bool()
    for i in range(SMALL.n_layer):
        parts = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(SMALL.n_embd, dim=-1)
        q, k, v = (part.unflatten(-1, (SMALL.n_head, -1)).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    expected = norm(x, "ln_f") @ w["wte.weight"].T
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    log_probs = expected.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss.double(), -log_probs.mean(), rtol=1e-5, atol=1e-5)


def test_initial_loss_is_that_of_uniform_guessing(model):
    _, loss = model(*batch())
    assert loss.item() == pytest.approx(math.log(SMALL.vocab_size), abs=0.1)


def test_initialization_statistics():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, n_embd=128, n_layer=6))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.1), name


def test_logits_are_causal(model):
    idx, _ = batch()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.vocab_size
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


def test_gradients_match_finite_differences_in_float64(model):
    """Compare d loss / d weight with central differences, for one entry of every parameter."""
    model.double()
    idx, targets = batch()
    model(idx, targets)[1].backward()
    for name, p in model.named_parameters():
        at = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-5
        losses = []
        for sign in (1, -1):
            flat[at] += sign * step
            losses.append(model(idx, targets)[1].item())
            flat[at] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(p.grad.view(-1)[at]) == pytest.approx(slope, rel=1e-5, abs=1e-9), name


def test_vocabulary_padding_has_no_effect():
    idx, targets = batch()
    results = []
    for multiple in (1, 64):
        torch.manual_seed(0)
        model = GPT(replace(SMALL, vocab_multiple=multiple))
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            p.data.copy_(
                torch.randn(64, 32)[: len(p)] if name == "wte.weight" else torch.randn(p.shape) * 0.1
            )
        logits, loss = model(idx, targets)
        loss.backward()
        results.append((logits, loss, model.wte.weight.grad))
    (logits, loss, grad), (padded_logits, padded_loss, padded_grad) = results
    assert padded_grad.shape[0] == 64 and not padded_grad[37:].any()
    torch.testing.assert_close(logits, padded_logits)
    torch.testing.assert_close(loss, padded_loss)
    torch.testing.assert_close(grad, padded_grad[:37])


def test_ignored_targets_do_not_contribute_to_the_loss(model):
    idx, targets = batch()
    masked = targets.clone()
    masked[:, :10] = IGNORE
    expected = F.cross_entropy(model(idx)[0][:, 10:].flatten(0, 1), targets[:, 10:].flatten())
    torch.testing.assert_close(model(idx, masked)[1], expected)


def test_dropout_is_active_only_in_training():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, dropout=0.5))
    idx, _ = batch()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_overfits_one_batch(model):
    idx, targets = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_invalid_inputs_are_rejected(model):
    with pytest.raises(ValueError, match="n_embd=30 is not divisible by n_head=4"):
        GPT(replace(SMALL, n_embd=30))
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model(torch.zeros(1, 17, dtype=torch.long))


# ----------------------------------------------------------------------------- architecture options


MODERN = {
    "position": "rope",
    "norm": "rms",
    "activation": "relu2",
    "qk_norm": True,
    "tied": False,
    "softcap": 15.0,
    "init": "zero",
    "bias": False,
}
SWITCHES = [
    {"position": "rope"},
    {"position": "alibi"},
    {"norm": "rms"},
    {"activation": "gelu"},
    {"activation": "relu2"},
    {"activation": "swiglu"},
    {"qk_norm": True},
    {"tied": False},
    {"softcap": 15.0},
    {"n_kv_head": 2},
    {"n_kv_head": 1, "position": "rope"},
    {"head_dim": 12},
    {"smear": True},
    {"init": "zero"},
    {"init": "depth"},
    MODERN,
    MODERN | {"activation": "swiglu", "n_kv_head": 2, "head_dim": 16, "vocab_multiple": 64, "smear": True},
]


def changed_model(switches, **others):
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **switches, **others))
    with torch.no_grad():  # zero-initialized weights would hide the layers before them
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model


def name_of(switches):
    return "modern" if switches == MODERN else ",".join(f"{k}={v}" for k, v in switches.items())[:40]


@pytest.mark.parametrize("switches", SWITCHES, ids=name_of)
def test_architecture_option_keeps_the_model_causal_and_differentiable(switches):
    model = changed_model(switches)
    idx, _ = batch()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.vocab_size
    before, after = model(idx)[0], model(changed)[0]
    assert before.shape == (2, 16, 37)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-6, atol=1e-6)
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()
    torch.testing.assert_close(model(idx)[0][:, -1], before[:, -1], rtol=1e-5, atol=1e-5)
    model.double()
    test_gradients_match_finite_differences_in_float64(model)


@pytest.mark.parametrize("switches", SWITCHES, ids=name_of)
def test_architecture_option_initial_loss_and_parameter_count(switches):
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **switches))
    with torch.no_grad():
        assert model(*batch())[1].item() == pytest.approx(math.log(37), abs=0.25)
    C, layers = 32, 3
    config = model.config
    hs, kv = config.head_size, config.n_kv_head or 4
    hidden = 8 * round(C / 3) if config.activation == "swiglu" else 4 * C
    widths = [(4 + 2 * kv) * hs, C, hidden * (2 if config.activation == "swiglu" else 1), C]
    block = widths[0] * C + 4 * hs * C + widths[2] * C + hidden * C + config.bias * sum(widths)
    norm = (1 + config.bias) * C if config.norm == "layer" else 0
    positions = 16 * C if config.position == "learned" else 0
    embeddings = 37 * C * (1 if config.tied else 2)
    expected = layers * (block + 2 * norm) + norm + positions + embeddings + config.smear * C
    assert model.n_params() == expected


def test_zero_initialized_projections_pass_the_embedding_through():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **MODERN))
    idx, _ = batch()
    x = model.wte(idx)
    torch.testing.assert_close(model.hidden(idx), x / x.square().mean(-1, keepdim=True).sqrt())
    assert not model(idx)[0].any()


def test_soft_cap_bounds_the_logits():
    model = changed_model({"softcap": 3.0})
    with torch.no_grad():
        for p in model.parameters():
            p *= 10
        logits = model(batch()[0])[0]
    assert 2.5 < logits.abs().max() <= 3.0


def test_grouped_queries_equal_repeated_keys_and_values():
    grouped, full = changed_model({"n_kv_head": 2}), changed_model({})
    with torch.no_grad():
        for a, b in zip(grouped.h, full.h, strict=True):
            for kind in ("weight", "bias"):
                q, k, v = getattr(a.attn.c_attn, kind).split([32, 16, 16])
                k, v = (
                    part.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v)
                )
                getattr(b.attn.c_attn, kind).copy_(torch.cat([q, k, v]))
        shared = {n: p for n, p in grouped.named_parameters() if "c_attn" not in n}
        full.load_state_dict(shared, strict=False)
    idx, _ = batch()
    torch.testing.assert_close(grouped(idx)[0], full(idx)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.cpu
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_attention_matches_float32(kv_heads, biased):
    """Compare both CPU implementations, forward and backward, on the same rounded inputs."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 24, 16) for heads in (4, kv_heads, kv_heads)]
    exact = [torch.randn(shape, generator=draw).bfloat16().float().requires_grad_() for shape in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    bias = POSITIONS["alibi"](24, 64, 4, 16).bias(24) if biased else None
    for inputs in (exact, rounded):
        y = attention(*inputs, bias if bias is None else bias.to(inputs[0].dtype), 0.0)
        assert y.shape == shapes[0]
        (y.float() * torch.linspace(-1, 1, 16)).sum().backward()
    with torch.no_grad():
        y, z = (attention(*x, bias if bias is None else bias.to(x[0].dtype), 0.0) for x in (exact, rounded))
    torch.testing.assert_close(z.float(), y, rtol=0.03, atol=0.03)
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(b.grad.float(), a.grad, rtol=0.05, atol=0.12)


@pytest.mark.cpu
@pytest.mark.parametrize("length", [128, 129, 300, 600])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_of_queries_equal_full_attention(length, biased):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16, generator=draw).bfloat16() for heads in (4, 2, 2))
    bias = POSITIONS["alibi"](length, 64, 4, 16).bias(length) if biased else None
    with torch.no_grad():
        output = attention(q, k, v, bias if bias is None else bias.bfloat16(), 0.0)
        exact = attention(q.float(), k.float(), v.float(), bias, 0.0)
    torch.testing.assert_close(output.float(), exact, rtol=0.03, atol=0.03)


@pytest.mark.cpu
def test_bfloat16_attention_dropout():
    q = torch.randn(2, 4, 24, 16, dtype=torch.bfloat16)
    torch.manual_seed(0)
    dropped = torch.stack([attention(q, q, q, None, 0.5).float() for _ in range(400)])
    torch.testing.assert_close(dropped.mean(0), attention(q, q, q, None, 0.0).float(), rtol=0, atol=0.6)
    assert dropped.std(0).mean() > 0.1


def test_invalid_shape_is_reported():
    with pytest.raises(ValueError, match="n_embd=30 is not divisible by n_head=4"):
        GPT(replace(SMALL, n_embd=30, n_head=4))
