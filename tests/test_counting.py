"""The counting baseline: probabilities, the sequences it is scored on, and where its figure is shown."""

import json
import math
import re
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch

import eval as eval_program
import plot
import serve
import train
from nanogpt.data import loader
from nanogpt.diagnostics import runs
from nanogpt.errors import UserError
from nanogpt.evaluation import counting
from nanogpt.evaluation.counting import FALLBACK, KneserNey, Sequences
from nanogpt.inference import api
from nanogpt.runtime import Machine
from nanogpt.validation import evaluate_splits
from tests.conftest import small_run, words, write_dataset


def probability(model: KneserNey, context: list[int], token: int) -> float:
    context = context[max(0, len(context) - model.order + 1) :]
    row = [0] * (model.order - 1 - len(context)) + context + [token]
    return float(model.probabilities(np.array([row]), np.array([len(context)]))[0])


def test_probabilities_equal_a_hand_count():
    """a b a b c: with discounts 0.5, 1 and 1.5, because no bigram occurs three times."""
    model = KneserNey(np.array([0, 1, 0, 1, 2]), 3, 2)
    assert model.whole[2].discounts is FALLBACK and model.lower[1].discounts is FALLBACK
    # One distinct token precedes each of a, b and c: 1/3 each.
    expected = {
        (0, 1): (2 - 1) / 2 + 1 / 2 * 1 / 3,
        (0, 0): 1 / 2 * 1 / 3,
        (1, 2): (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * 1 / 3,
        (1, 1): (0.5 + 0.5) / 2 * 1 / 3,
        (2, 0): 1 / 3,  # nothing follows c
    }
    for (before, token), value in expected.items():
        assert probability(model, [before], token) == pytest.approx(value)
    # Without context: a and b occur twice, c once, of five.
    assert probability(model, [], 0) == pytest.approx((2 - 1) / 5 + (1 + 1 + 0.5) / 5 * 1 / 3)
    assert probability(model, [], 2) == pytest.approx((1 - 0.5) / 5 + (1 + 1 + 0.5) / 5 * 1 / 3)


def plainly(
    tokens: list[int], vocab_size: int, context: tuple[int, ...], token: int, top: bool = True
) -> float:
    """Return the probability by dicts, as Chen and Goodman write it."""
    n = len(context) + 1
    every = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    if not top:
        before = {tuple(tokens[i : i + n + 1]) for i in range(len(tokens) - n)}
        every = Counter(gram[1:] for gram in before)
    times = Counter(every.values())
    discounts = [0.0, 0.5, 1.0, 1.5]
    if times[1] and times[2] and times[3]:
        y = times[1] / (times[1] + 2 * times[2])
        exact = [0.0, *(i - (i + 1) * y * times[i + 1] / times[i] for i in (1, 2, 3))]
        if all(0 < d <= i for i, d in enumerate(exact) if i):
            discounts = exact
    shorter = plainly(tokens, vocab_size, context[1:], token, False) if context else 1 / vocab_size
    following = {gram: count for gram, count in every.items() if gram[:-1] == context}
    if not following:
        return shorter
    total = sum(following.values())
    freed = sum(discounts[min(count, 3)] for count in following.values())
    count = following.get((*context, token), 0)
    return (count - discounts[min(count, 3)]) / total + freed / total * shorter


@pytest.mark.parametrize(("vocab_size", "order"), [(4, 4), (7, 3), (300, 2), (5, 7)])
def test_probabilities_equal_a_plain_count_and_sum_to_one(vocab_size, order):
    draw = np.random.default_rng(vocab_size)
    tokens = (draw.random(400) ** 3 * vocab_size).astype(int)
    model = KneserNey(tokens, vocab_size, order)
    discounted = [level.discounts is not FALLBACK for level in model.whole.values()]
    assert any(discounted) or vocab_size in (5, 300)
    for known in range(order):
        place = int(draw.integers(0, 380))
        for context in (
            tokens[place : place + known].tolist(),
            draw.integers(vocab_size, size=known).tolist(),
        ):
            found = [probability(model, context, token) for token in range(vocab_size)]
            assert sum(found) == pytest.approx(1) and min(found) > 0
            for token in {0, 1, vocab_size - 1, int(tokens[place + known])}:
                expected = plainly(tokens.tolist(), vocab_size, tuple(context), token)
                assert found[token] == pytest.approx(expected)


def test_large_vocabularies_fit_into_64_bits():
    tokens = np.array([50256, 0, 50256, 0, 100_000, 50256, 0, 7])
    model = KneserNey(tokens, 100_277, 3)
    assert probability(model, [50256, 0], 50256) == pytest.approx(
        plainly(tokens.tolist(), 100_277, (50256, 0), 50256)
    )


def test_short_and_empty_texts_are_rejected(tmp_path):
    with pytest.raises(UserError, match="3 tokens hold no 7-gram"):
        KneserNey(np.array([1, 2, 3]), 5, 7)
    empty, short = write_dataset(tmp_path / "empty", "abc", 0.0), write_dataset(tmp_path / "short", words(8))
    with pytest.raises(UserError, match="val is empty; prepare the data again"):
        counting.sequences_of(tmp_path, str(empty), 16)
    with pytest.raises(UserError, match="the validation text has 4 tokens, fewer than one sequence"):
        counting.sequences_of(tmp_path, str(short), 16)
    with pytest.raises(UserError, match="needs one dataset, not 'a:1,b:1'"):
        counting.sequences_of(tmp_path, "a:1,b:1", 16)


class Uniform:
    """Stands in for counts: which tokens are scored, and after how many others?"""

    seen: ClassVar[list] = []

    def __init__(self, tokens, vocab_size, order):
        self.order, self.vocab_size = order, vocab_size

    def probabilities(self, tokens, known):
        Uniform.seen += zip(tokens.tolist(), known.tolist(), strict=True)
        return np.full(len(tokens), 1 / self.vocab_size)


@pytest.mark.parametrize("eval_iters", [2, 1000])
def test_the_sequences_of_the_runs_validation_are_scored(dataset, tmp_path, monkeypatch, eval_iters):
    config = small_run(dataset, tmp_path / "out", max_iters=1, eval_iters=eval_iters)
    train.main(config)
    scored: list[tuple[list[int], int]] = []

    class Spy(torch.nn.Module):
        config = compiled_token_losses = None

        def forward(self, idx, targets, documents, reduction):
            for row, wanted in zip(idx.tolist(), targets.tolist(), strict=True):
                for t, token in enumerate(wanted):
                    if token >= 0:
                        context = row[: t + 1][-2:]
                        scored.append(([0] * (2 - len(context)) + context + [token], len(context)))
            return None, torch.zeros(targets.shape)

    opened = loader.load(dataset)
    machine = Machine(torch.device("cpu"), "float32", "")
    evaluate_splits(Spy(), opened, (config.batch_size, 16), eval_iters, machine, lambda: False)
    Uniform.seen = []
    monkeypatch.setattr(counting, "KneserNey", Uniform)
    counting.measure(counting.sequences_of(tmp_path / "out"), order=3)
    of_val = scored[-len(Uniform.seen) :]  # the training split is scored first
    assert Uniform.seen == of_val and len(of_val) > 100


def test_contexts_end_at_documents(dataset, monkeypatch):
    opened = loader.load(dataset)
    Uniform.seen = []
    monkeypatch.setattr(counting, "KneserNey", Uniform)
    counting.measure(Sequences(opened, 16, 20, separator=2), order=4)
    row, known = zip(*Uniform.seen[:16], strict=True)
    ids = opened.val.read(0, 17).tolist()
    since = 0
    for t in range(16):
        since = 1 if ids[t] == 2 and t else since + 1
        assert known[t] == min(since, 3) and row[t][-1] == ids[t + 1]


def test_figure_is_kept_and_shown_where_it_is_known(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(small_run(dataset, out, max_iters=4))
    assert "counting" not in capsys.readouterr().out
    scores = tmp_path / "scores.json"
    eval_program.main(eval_program.Config(out_dir=str(out), baseline=True, device="cpu", out=str(scores)))
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads((dataset / counting.NAME).read_text(encoding="utf-8"))["losses"]
    (by_order,) = figures.values()
    assert f"loss {by_order['7']:.4f}" in next(line for line in lines if line.startswith("counting, 7-grams"))
    assert 0.5 < by_order["7"] < math.log(10)
    baseline = json.loads(scores.read_text(encoding="utf-8"))["baseline"]
    assert baseline == {"loss": by_order["7"], "order": 7, "sequences": next(iter(figures))}
    assert lines[-1].startswith(f"{out}: ") and "nats/token worse than counting (7-grams: " in lines[-1]
    train.main(small_run(dataset, tmp_path / "again", max_iters=4))
    assert "nats/token worse than counting" in capsys.readouterr().out
    train.main(small_run(f"{dataset}:1", tmp_path / "mixture", max_iters=4))  # a mixture of one dataset
    assert "best validation loss" in capsys.readouterr().out
    assert counting.sequences_of(tmp_path / "mixture").best() == counting.sequences_of(out).best()
    train.main(small_run(dataset, tmp_path / "other", max_iters=4, block_size=8))  # other sequences
    assert "counting" not in capsys.readouterr().out
    figure = plot.draw([[plot.load_run(out, "out", "iter")]], plot.Config())
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert f"counting, 7-grams: {by_order['7']:.4f}" in shown
    about = serve.describe(api.load(out, device="cpu"))
    assert about["baseline"] == {"loss": by_order["7"], "order": 7}
    for damage in ("{", "{}", '{"loss": "x", "order": 7}'):
        (out / counting.NAME).write_text(damage, encoding="utf-8")
        assert runs.baseline(out) == {} and serve.describe(api.load(out, device="cpu"))["baseline"] is None
    other = small_run(dataset, out, max_iters=6, eval_iters=1, init_from="resume")
    train.main(other)  # other sequences: another figure
    assert not (out / counting.NAME).exists()


def test_mixtures_are_refused_before_anything_is_scored(dataset, tmp_path, capsys):
    other = write_dataset(tmp_path / "other", words(600))
    train.main(small_run(f"{dataset},{other}", tmp_path / "out", max_iters=2))
    capsys.readouterr()
    with pytest.raises(UserError, match="needs one dataset, not "):
        eval_program.main(eval_program.Config(out_dir=str(tmp_path / "out"), baseline=True, device="cpu"))
    assert "loss" not in capsys.readouterr().out


def test_figure_of_other_data_or_damaged_is_ignored(tmp_path):
    folder = write_dataset(tmp_path / "data", words(600))
    counting.measure(Sequences(loader.load(folder), 16, 5), order=2)
    assert Sequences(loader.load(folder), 16, 5).best()
    kept = (folder / counting.NAME).read_text(encoding="utf-8")
    odd = [kept.replace(": {", ': "x", "y": {'), kept.replace('"2"', '"x"'), re.sub(r"\d+\.\d+", '"x"', kept)]
    for damage in ("{", "[]", '{"data": 1}', *odd):
        (folder / counting.NAME).write_text(damage, encoding="utf-8")
        assert Sequences(loader.load(folder), 16, 5).best() is None
        (folder / counting.NAME).write_text(kept, encoding="utf-8")
    write_dataset(folder, words(700, seed=5))
    assert Sequences(loader.load(folder), 16, 5).best() is None
