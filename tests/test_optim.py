"""AdamW and Muon against torch.optim and float64 references, and gradient clipping."""

import pytest
import torch
from torch import nn

from nanogpt.optim import Muon, build, clip_gradients, orthogonalize
from nanogpt.options import OptimizerOptions


def model_and_gradients(seed=0, steps=6):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    drawn = [[torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]
    return model, drawn


def build_adamw(model):
    return build(OptimizerOptions(), model.named_parameters())


def stepped_adamw(lrs=(1e-2,) * 6):
    """Return a model and its optimizer after a step with each learning rate."""
    model, gradients = model_and_gradients(steps=len(lrs))
    optimizer = build_adamw(model)
    for lr, drawn in zip(lrs, gradients, strict=True):
        for parameter, gradient in zip(model.parameters(), drawn, strict=True):
            parameter.grad = gradient.clone()
        optimizer.lr = lr
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_adamw_equals_torch():
    theirs, gradients = model_and_gradients()
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for drawn in gradients:
        for parameter, gradient in zip(theirs.parameters(), drawn, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    ours, _ = stepped_adamw()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_adamw_equals_the_formula_in_float64():
    lrs = (1e-2, 5e-3, 1e-3, 2e-2, 0.0, 1e-3)
    ours, _ = stepped_adamw(lrs)
    start, gradients = model_and_gradients()
    for i, (name, p) in enumerate(start.named_parameters()):
        w, m, v = p.detach().double(), torch.zeros(()).double(), torch.zeros(()).double()
        decay = 0.1 if p.dim() >= 2 else 0.0
        for t, (lr, drawn) in enumerate(zip(lrs, gradients, strict=True), 1):
            g = drawn[i].double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(dict(ours.named_parameters())[name].double(), w, rtol=1e-5, atol=1e-6)


def test_state_has_every_tensor_by_name():
    model, optimizer = stepped_adamw()
    names = {name for name, _ in model.named_parameters()}
    moments = {f"{n}.{kind}" for n in names for kind in ("exp_avg", "exp_avg_sq")}
    assert optimizer.state().keys() == {"steps", *moments}
    assert float(optimizer.state()["steps"]) == 6


def test_frozen_parameters_are_unchanged():
    model, _ = model_and_gradients()
    model[0].requires_grad_(False)
    before = [p.clone() for p in model[0].parameters()]
    optimizer = build_adamw(model)
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


# ----------------------------------------------------------------------------- Muon


SHAPES = {"h.0.wide": (6, 10), "h.0.tall": (12, 4), "h.1.wide": (6, 10), "h.0.fused": (9, 5), "wte": (7, 4)}
ROWS = {"h.0.fused": [5, 2, 2]}


def matrices(seed=0):
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def build_with_muon(named, decay=0.0):
    config = OptimizerOptions(
        "muon", learning_rate=1e-2, weight_decay=0.0, muon_lr=0.05, muon_weight_decay=decay
    )
    return build(config, [*named.items(), ("h.0.gain", nn.Parameter(torch.ones(3)))], ROWS)


def build_muon_rule(named, decay=0.0):
    config = OptimizerOptions("muon", muon_weight_decay=decay)
    return Muon(config, named, {k: v for k, v in ROWS.items() if k in dict(named)})


def exact_polar(g):
    """Return the polar factor U V^T in float64."""
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5), (1, 1, 7)])
def test_orthogonalized_singular_values_are_near_one(shape):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1.0, 0.02, u.shape[-1])
    for scale in (1e-4, 1.0, 1e4):
        result = orthogonalize(u * (scale * values) @ vh)
        singular_values = torch.linalg.svdvals(result)
        assert singular_values.min() > 0.8 and singular_values.max() < 1.2
        error = torch.linalg.matrix_norm(result - u @ vh) / torch.linalg.matrix_norm(u @ vh)
        assert error.max() < 0.2  # same singular vectors: close to the exact polar factor
    assert not orthogonalize(torch.zeros(shape)).any()


def test_muon_is_close_to_the_exact_polar_update():
    """Compare three steps with float64 SVDs: the polynomial only approximates the polar factor."""
    named = matrices()
    optimizer = build_with_muon(named)
    expected = {name: p.detach().double().clone() for name, p in named.items()}
    buffers = {name: torch.zeros(p.shape).double() for name, p in named.items()}
    for t in range(3):
        torch.manual_seed(10 + t)
        momentum = 0.85 + 0.1 * t / 300
        for name, p in named.items():
            p.grad = torch.randn(p.shape)
            if not name.startswith("h."):
                continue
            buffers[name].mul_(momentum).add_((1 - momentum) * p.grad.double())
            nesterov = momentum * buffers[name] + (1 - momentum) * p.grad.double()
            for part in nesterov.split(ROWS.get(name, [p.shape[0]])):
                part.copy_(max(1, part.shape[0] / part.shape[1]) ** 0.5 * exact_polar(part))
            expected[name] -= 0.05 * nesterov
        optimizer.param_groups[0]["params"][-1].grad = torch.zeros(3)  # h.0.gain, which AdamW trains
        optimizer.lr = 1e-2  # equals learning_rate, so Muon's is muon_lr = 0.05
        optimizer.step()
    for name, p in named.items():
        if name.startswith("h."):
            update = torch.linalg.matrix_norm(expected[name] - matrices()[name].double())
            assert torch.linalg.matrix_norm(p.double() - expected[name]) < 0.25 * update, name


def test_muon_is_close_to_torch():
    """A step of torch.optim.Muon, whose polynomial differs, has nearly the same direction and length."""
    torch.manual_seed(0)
    start, gradient = torch.randn(16, 48), torch.randn(16, 48)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    build_muon_rule([("h.0.w", ours)]).step(0.1)
    torch.optim.Muon([theirs], lr=0.1, momentum=0.85, weight_decay=0.0, nesterov=True).step()
    a, b = (ours - start).flatten(), (theirs - start).flatten()
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95
    assert 0.8 < a.norm() / b.norm() < 1.25


def test_muon_in_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    gradients = torch.randn(4, 24, 60)
    exact, rough = orthogonalize(gradients), orthogonalize(gradients.bfloat16()).float()
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.99


def test_muon_trains_matrices_of_blocks_and_adamw_the_rest():
    named = matrices()
    names = set(build_with_muon(named).state())
    assert {"h.0.wide.momentum", "h.0.tall.momentum", "h.0.fused.2.momentum", "muon.steps"} < names
    assert {"wte.exp_avg", "h.0.gain.exp_avg"} < names and not any("h.0.wide.exp" in name for name in names)


def test_fused_matrix_is_orthogonalized_per_projection():
    named = matrices()
    alone = {"h.0.q": nn.Parameter(named["h.0.fused"].detach()[:5].clone())}
    torch.manual_seed(3)
    for p in named.values():
        p.grad = torch.randn(p.shape)
    alone["h.0.q"].grad = named["h.0.fused"].grad[:5].clone()
    build_muon_rule([(n, p) for n, p in named.items() if n.startswith("h.")]).step(0.1)
    build_muon_rule(list(alone.items())).step(0.1)
    torch.testing.assert_close(named["h.0.fused"][:5], alone["h.0.q"], rtol=1e-4, atol=1e-5)


def test_cautious_decay_applies_only_where_the_update_shrinks_weights():
    plain, decayed = matrices(), matrices()
    for named, decay in ((plain, 0.0), (decayed, 0.5)):
        torch.manual_seed(3)
        for p in named.values():
            p.grad = torch.randn(p.shape)
        build_muon_rule([("h.0.wide", named["h.0.wide"])], decay).step(0.1)
    before = matrices()["h.0.wide"].detach()
    update = before - plain["h.0.wide"].detach()  # the subtracted update
    pull = plain["h.0.wide"].detach() - decayed["h.0.wide"].detach()
    expected = 0.1 * 0.5 * before * (update * before > 0)
    torch.testing.assert_close(pull, expected, rtol=1e-4, atol=1e-6)


def test_muon_resumes_from_its_state():
    def run_steps(optimizer, first, last):
        for t in range(first, last):
            torch.manual_seed(t)
            for p in optimizer.parameters:
                p.grad = torch.randn(p.shape)
            optimizer.lr = 1e-2
            optimizer.step()

    uninterrupted, interrupted = matrices(), matrices()
    run_steps(build_with_muon(uninterrupted), 0, 6)
    before = build_with_muon(interrupted)
    run_steps(before, 0, 3)
    after = build_with_muon(interrupted)
    for name, tensor in after.state().items():
        tensor.copy_(before.state()[name].clone())
    run_steps(after, 3, 6)
    for name in SHAPES:
        assert torch.equal(uninterrupted[name], interrupted[name]), name
