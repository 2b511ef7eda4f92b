"""AdamW against torch's own, against float64 by hand, and clipping."""

import pytest
import torch
from torch import nn

from nanogpt.optim import AdamW, clip_gradients


def model_and_gradients(seed=0, steps=6):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    drawn = [[torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]
    return model, drawn


def ours(steps=6, lrs=(1e-2,) * 6):
    model, gradients = model_and_gradients(steps=steps)
    optimizer = AdamW(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for lr, drawn in zip(lrs, gradients, strict=True):
        for parameter, gradient in zip(model.parameters(), drawn, strict=True):
            parameter.grad = gradient.clone()
        optimizer.lr = lr
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_equals_torch_optim():
    theirs, gradients = model_and_gradients()
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for drawn in gradients:
        for parameter, gradient in zip(theirs.parameters(), drawn, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    mine, _ = ours()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_equals_the_formula_in_float64():
    lrs = (1e-2, 5e-3, 1e-3, 2e-2, 0.0, 1e-3)
    mine, _ = ours(lrs=lrs)
    start, gradients = model_and_gradients()
    for i, (name, p) in enumerate(start.named_parameters()):
        w, m, v = p.detach().double(), torch.zeros(()).double(), torch.zeros(()).double()
        decay = 0.1 if p.dim() >= 2 else 0.0
        for t, (lr, drawn) in enumerate(zip(lrs, gradients, strict=True), 1):
            g = drawn[i].double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(dict(mine.named_parameters())[name].double(), w, rtol=1e-5, atol=1e-6)


def test_state_has_every_tensor_by_name():
    model, optimizer = ours()
    names = {name for name, _ in model.named_parameters()}
    moments = {f"{n}.{kind}" for n in names for kind in ("exp_avg", "exp_avg_sq")}
    assert optimizer.state().keys() == {"steps", *moments}
    assert float(optimizer.state()["steps"]) == 6


def test_frozen_parameters_are_left_alone():
    model, _ = model_and_gradients()
    model[0].requires_grad_(False)
    before = [p.clone() for p in model[0].parameters()]
    optimizer = AdamW(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model(torch.randn(4, 5)).square().mean().backward()
    optimizer.lr = 0.1
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_equals_torch(max_norm):
    a, gradients = model_and_gradients(steps=1)
    b, _ = model_and_gradients(steps=1)
    for model in (a, b):
        for parameter, gradient in zip(model.parameters(), gradients[0], strict=True):
            parameter.grad = gradient.clone()
    norm = clip_gradients(a.parameters(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(b.parameters(), max_norm or float("inf"))
    torch.testing.assert_close(norm, expected)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
