"""Tests of a training step and of evaluation."""

import math
from dataclasses import replace

import pytest
import torch

import train
from nanogpt import runtime, validation
from nanogpt.data import loader
from nanogpt.errors import Diverged
from nanogpt.model import GPT, GPTConfig
from nanogpt.optim import Optimizer, build
from nanogpt.options import OptimizerOptions
from tests.conftest import update

CONFIG = GPTConfig(vocab_size=10, block_size=16, n_layer=2, n_head=2, n_embd=32)


def machine_of(dtype="float32"):
    """Return a Machine on the device on which tests create tensors."""
    return runtime.setup(str(torch.empty(0).device), dtype, 32)


def adamw(model) -> Optimizer:
    return build(OptimizerOptions(), model.named_parameters())


def parts(dropout=0.0, dtype="float32"):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(CONFIG), "dropout": dropout}))
    optimizer = adamw(model)
    machine = machine_of(dtype)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=dtype == "float16")
    return model, optimizer, machine, scaler


def some(count, rows=12, seed=3):
    draw = torch.Generator().manual_seed(seed)
    idx = torch.randint(10, (rows, 17), generator=draw).to(machine_of().device)
    return [(part[:, :-1], part[:, 1:]) for part in idx.chunk(count)]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 12])
def test_accumulation_equals_one_large_batch(count):
    results = []
    for n in (1, count):
        everything = parts()
        result = update(*everything, some(n))
        results.append((result, [p.detach().clone() for p in everything[0].parameters()]))
    (one, weights), (many, others) = results
    torch.testing.assert_close(one[0], many[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one[1], many[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(weights, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_smaller_last_micro_batch_weighs_less():
    """12 sequences in micro-batches of 5, 5 and 2: all sequences have equal weight."""
    ((idx, targets),) = some(1)
    results = []
    for batches in ([(idx, targets)], list(zip(idx.split(5), targets.split(5), strict=True))):
        everything = parts()
        result = update(*everything, batches)
        results.append((result, everything[1].state()))
    (one, whole), (many, uneven) = results
    torch.testing.assert_close(many[0], one[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(many[1], one[1], rtol=1e-5, atol=1e-6)
    for (
        name,
        tensor,
    ) in whole.items():  # AdamW's first update is independent of gradient scale, its moments are not
        torch.testing.assert_close(uneven[name], tensor, rtol=1e-4, atol=1e-7)


def test_dropout_is_a_function_of_seed_and_step():
    def loss(iter_num, between):
        everything = parts(dropout=0.3)
        torch.rand(between)  # random numbers drawn elsewhere
        return float(update(*everything, some(2), iter_num=iter_num)[0])

    assert loss(5, 0) == loss(5, 100) != loss(6, 0)


def test_gradients_are_clipped_and_the_unclipped_norm_is_returned():
    everything = parts()
    result = update(*everything, some(1), lr=0.0, grad_clip=1e-3)
    assert float(result[1]) > 0.1
    assert all(p.grad is None for p in everything[0].parameters())
    means = [tensor for name, tensor in everything[1].state().items() if name.endswith(".exp_avg")]
    seen = torch.cat([mean.flatten() for mean in means]).norm() / (1 - OptimizerOptions().beta1)
    assert float(seen) == pytest.approx(1e-3, rel=1e-3)  # norm that the optimizer received


def test_non_finite_loss_is_detected():
    model, *rest = parts()
    with torch.no_grad():
        model.wte.weight[:] = float("inf")
    result = update(model, *rest, some(1))
    with pytest.raises(Diverged, match=r"iteration 7 with learning rate 0\.001"):
        train.check_finite(*result, 7, 1e-3, scaled=False)


def test_non_finite_gradient_with_finite_loss_is_detected():
    model, *rest = parts()
    model.h[1].mlp.c_fc.weight.register_hook(lambda gradient: gradient * float("nan"))
    result = update(model, *rest, some(2), lr=0.0)
    assert math.isfinite(float(result[0]))
    with pytest.raises(Diverged, match=r"gradient norm nan at iteration 7"):
        train.check_finite(*result, 7, 1e-3, scaled=False)
    train.check_finite(*result, 7, 1e-3, scaled=True)  # float16: the scaler skipped this update


def test_float16_skips_an_update_that_overflows():
    model, optimizer, machine, scaler = parts(dtype="float16")
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**60)
    result = update(model, optimizer, machine, scaler, some(2))
    train.check_finite(*result, 0, 1e-3, scaled=True)  # not a divergence: the scaler handled it
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**59
    scaler = torch.amp.GradScaler(machine.device.type, init_scale=2.0**4)
    losses = [float(update(model, optimizer, machine, scaler, some(2), iter_num=i)[0]) for i in range(20)]
    assert losses[-1] < losses[0] - 0.1


def test_bfloat16_trains_with_float32_weights():
    everything = parts(dtype="bfloat16")
    losses = [float(update(*everything, some(2), iter_num=i)[0]) for i in range(20)]
    assert losses[-1] < losses[0] - 0.1
    assert {p.dtype for p in everything[0].parameters()} == {torch.float32}


# ----------------------------------------------------------------------------- evaluation


@pytest.fixture
def tokens(dataset):
    return loader.load(dataset).val


def score(model, tokens, batch_size, most=10**9, **kwargs):
    machine = machine_of()
    batches = loader.eval_batches(tokens, 16, batch_size, most, machine.device)
    return validation.evaluate(model, batches, machine, **kwargs)


def test_evaluation_is_the_token_mean_at_any_batch_size(tokens):
    model = parts()[0]
    results = [score(model, tokens, batch_size) for batch_size in (1, 7, 64)]
    assert {result.tokens for result in results} == {len(tokens) - 1}
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-6)
        assert result.stderr == pytest.approx(results[0].stderr, rel=1e-3)
    ids = torch.from_numpy(tokens.read(0, len(tokens))).to(machine_of().device)
    total, starts = 0.0, range(0, len(ids) - 1, 16)
    for start in starts:  # reference; the last sequence overlaps the one before
        first = min(start, len(ids) - 17)
        logits = model.eval()(ids[None, first : first + 16])[0][0].double().log_softmax(-1)
        for place in range(start, min(start + 16, len(ids) - 1)):
            total -= float(logits[place - first, ids[place + 1]].detach())
    assert results[0].loss == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def test_standard_error_matches_repeated_samples(tokens):
    """The standard deviation of the loss on random sequences is close to the standard error."""
    model = parts()[0]
    few = score(model, tokens, 8, most=12)
    draw = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(tokens.read(0, len(tokens))).to(machine_of().device)
    means = []
    for _ in range(200):
        starts = torch.randint(len(ids) - 17, (12,), generator=draw)
        rows = torch.stack([ids[s : s + 17] for s in starts])
        means.append(validation.evaluate(model, [(rows[:, :-1], rows[:, 1:])], machine_of()).loss)
    assert few.stderr == pytest.approx(torch.tensor(means).std().item(), rel=0.5)


def test_evaluation_has_no_side_effects(tokens):
    model = parts(dropout=0.5)[0]
    state = torch.get_rng_state()
    first, second = score(model, tokens, 8), score(model, tokens, 8)
    assert first == second and model.training
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_stops_on_request(tokens):
    answers = iter([False, False, True, True, True])
    assert score(parts()[0], tokens, 4, stopped=lambda: next(answers)) is None


def test_loss_description():
    result = validation.Evaluation(loss=math.log(8), stderr=0.1, tokens=10)
    assert result.describe(None) == "± 0.1000, perplexity 8"
    assert replace(result, stderr=math.nan).describe(2.0) == "perplexity 8, 1.5000 bits/byte"
    assert replace(result, stderr=0.00004).describe(None) == "perplexity 8"
