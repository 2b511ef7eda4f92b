"""Each sampling option draws from the distribution of its definition: chi-square tests on toy logits."""

import math

import pytest
import torch

from nanogpt.errors import UserError
from nanogpt.inference import sampling
from nanogpt.inference.sampling import (
    SamplingOptions,
    apply_repetition_penalty,
    draw,
    draw_each,
    keep_min_p,
    keep_top_p,
    sample_inverse_cdf,
    top_k,
)

LOGITS = [1.0, 0.0, -1.0, 2.0, -3.0, 1.5, 0.0]
N = 20_000
BOUND = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}  # chi-square, p = 0.001


def by_definition(temperature=1.0, k=0, p=1.0, min_p=0.0, penalty=1.0, seen=()) -> list[float]:
    """Return reference probabilities, computed token by token in plain Python."""
    logits = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(LOGITS)]
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    order = sorted(weights, key=lambda i: -weights[i])[: k or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass / total < p:
            kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(LOGITS))]


def assert_drawn_from(tokens: torch.Tensor, probs: list[float]) -> None:
    counts = torch.bincount(tokens, minlength=len(probs)).tolist()
    assert not any(count for count, p in zip(counts, probs, strict=True) if p == 0)
    there = [(count, p * len(tokens)) for count, p in zip(counts, probs, strict=True) if p > 0]
    chi_square = sum((count - expected) ** 2 / expected for count, expected in there)
    assert len(there) == 1 or chi_square < BOUND[len(there) - 1]


def uniform(n: int = N) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(
    "controls",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"k": 3},
        {"k": 99},
        {"p": 0.8},
        {"p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"penalty": 1.5, "seen": (3, 2)},
        {"penalty": 0.5, "seen": (0, 4)},
        {"temperature": 1.7, "k": 5, "p": 0.9, "min_p": 0.25, "penalty": 1.2, "seen": (3,)},
    ],
    ids=str,
)
def test_samples_follow_the_defined_distribution(controls):
    logits = torch.tensor(LOGITS).repeat(N, 1)
    seen = torch.zeros(len(LOGITS), dtype=torch.bool)
    seen[list(controls.get("seen", ()))] = True
    logits = apply_repetition_penalty(logits, seen, controls.get("penalty", 1.0))
    options = SamplingOptions(
        temperature=controls.get("temperature", 1.0),
        top_k=controls.get("k", 0),
        top_p=controls.get("p", 1.0),
        min_p=controls.get("min_p", 0.0),
    )
    assert_drawn_from(draw(logits, options, uniform()), by_definition(**controls))


def test_chi_square_test_detects_another_temperature():
    with pytest.raises(AssertionError):
        assert_drawn_from(
            draw(torch.tensor(LOGITS).repeat(N, 1), SamplingOptions(temperature=1.1), uniform()),
            by_definition(),
        )


def test_temperature_0_and_near_0_are_greedy():
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, -5.0, 1e4, 9e3]])
    for temperature in (0.0, 1e-300, 1e-6):
        drawn = draw(logits, SamplingOptions(temperature=temperature), torch.tensor([0.0, 0.999]).double())
        assert drawn.tolist() == [1, 2]


def test_top_k_keeps_exactly_k():
    values, ids = top_k(torch.tensor([[1.0, 5.0, 3.0, 3.0], [0.0, -1.0, -2.0, -3.0]]), 2)
    assert ids.shape == (2, 2) and ids[1].tolist() == [0, 1] and 1 in ids[0]
    assert values[1].tolist() == [0.0, -1.0] and sorted(values[0].tolist()) == [3.0, 5.0]


@pytest.mark.parametrize(("k", "size"), [(1, 17), (7, 300), (200, 50257), (200, 4000), (50, 101), (3, 3)])
def test_top_k_of_a_large_vocabulary(k, size):
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(k))
    logits[1, : size // 2] += 5  # the largest are adjacent
    logits[2] = torch.arange(size).float()
    logits[3] = logits[3].round()  # many ties
    values, ids = top_k(logits, k)
    assert torch.equal(values.sort(descending=True).values, logits.topk(k).values)
    assert torch.equal(logits.gather(-1, ids), values)
    assert (ids.diff(dim=-1) > 0).all()


def test_top_p_sorts_all_if_the_shortlist_is_insufficient(monkeypatch):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    logits[1] *= 20
    whole = {p: keep_top_p(logits, p) for p in (0.1, 0.9, 0.999)}
    monkeypatch.setattr(sampling, "SHORTLIST", 10)
    for p, expected in whole.items():
        assert torch.equal(keep_top_p(logits, p), expected)
        mass = logits.softmax(-1).where(expected > -torch.inf, 0).sum(-1)
        assert (mass >= p - 1e-6).all()


def test_filters_never_remove_the_most_likely_token():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for kept in (keep_top_p(logits, 1e-12), keep_min_p(logits, 1.0)):
        assert torch.equal(kept.argmax(-1), logits.argmax(-1))
        assert (kept > -torch.inf).sum(-1).tolist() == [1] * 50


def test_removed_tokens_are_not_drawn_at_the_extremes():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    assert sample_inverse_cdf(logits, torch.tensor([0.0, 1 - 1e-16]).double()).tolist() == [1, 2]


def test_rows_have_individual_options():
    kinds = [SamplingOptions(temperature=0), SamplingOptions(top_k=2), SamplingOptions(top_p=0.3)] * 100
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    u = uniform(300)
    expected = [draw(logits[i : i + 1], kinds[i], u[i : i + 1]).item() for i in range(300)]
    assert draw_each(logits, kinds, u).tolist() == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 given; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0 given; it must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -0.5}, "min_p=-0.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 given; it must be above 0"),
    ],
)
def test_invalid_values_are_rejected(wrong, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**wrong)
