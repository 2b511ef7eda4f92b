"""Evaluation tasks and samples during training: their output, and no effect on the run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import train
from nanogpt import metrics, runtime
from nanogpt.errors import Stopped, UserError
from nanogpt.evaluation import in_training
from nanogpt.model import GPT, GPTConfig
from nanogpt.pace.stop import StopRequest
from tests.conftest import small_run
from tests.test_train import bits, logged


@pytest.fixture
def config(dataset, tmp_path):
    batch = {"batch_size": 4, "gradient_accumulation_steps": 4}
    return small_run(dataset, tmp_path / "out", dropout=0.1, eval_interval=4, eval_iters=2, **batch)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"context": "abc", "choices": ["abc", "fgh"], "label": i % 2} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def watched(config, questions, tmp_path):
    return replace(
        config,
        out_dir=str(tmp_path / "watched"),
        eval_tasks=questions,
        eval_tasks_items=7,
        sample_prompt="abc",
        sample_tokens=5,
    )


def scores(config) -> list[dict]:
    return [row for row in metrics.read(Path(config.out_dir)) if row["event"] == "tasks"]


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_in_training_evaluation_leaves_the_run_bit_identical(config, watched, position):
    plain = replace(config, max_iters=20, position=position)
    train.main(plain)
    train.main(replace(watched, max_iters=20, position=position))
    assert bits(plain.out_dir, 20) == bits(watched.out_dir, 20)
    assert logged(plain.out_dir) == logged(watched.out_dir)
    assert logged(plain.out_dir, "eval") == logged(watched.out_dir, "eval")


def test_in_training_output(watched, capsys):
    train.main(replace(watched, max_iters=10))
    rows = scores(watched)
    assert [row["iter"] for row in rows] == [0, 4, 8, 10]  # including the final iteration
    for row in rows:
        assert row["questions_acc"] * 7 == pytest.approx(round(row["questions_acc"] * 7))
        assert row["tokens"] == row["iter"] * 256 and "questions_acc_norm_stderr" in row
    samples = sorted((Path(watched.out_dir) / "samples").iterdir())
    assert [path.name for path in samples] == [f"step-{n:06d}.txt" for n in (0, 4, 8, 10)]
    texts = samples[-1].read_text(encoding="utf-8").split("\n" + "-" * 15 + "\n")
    assert len(texts) == 5 and all(text.startswith("abc") and len(text) == 8 for text in texts[:4])
    out = capsys.readouterr().out
    assert "step 4: questions: acc 0." in out and f"step 10: {texts[0]!r}" in out


def test_resume_neither_repeats_nor_skips_evaluations(watched, tmp_path, monkeypatch):
    whole = replace(watched, max_iters=12)
    train.main(whole)
    parts = replace(whole, out_dir=str(tmp_path / "parts"), save_interval=1)
    seed, stop = runtime.Machine.seed, {}
    enter = StopRequest.__enter__
    monkeypatch.setattr(StopRequest, "__enter__", lambda self: stop.setdefault("request", enter(self)))

    def at_eight(machine, number, iter_num):
        if iter_num == 7:  # stop request before the scores after update 8 are computed
            stop["request"].reason = "a test"
        seed(machine, number, iter_num)

    monkeypatch.setattr(runtime.Machine, "seed", at_eight)
    with pytest.raises(Stopped):
        train.main(parts)
    monkeypatch.undo()
    assert [row["iter"] for row in scores(parts)] == [0, 4]
    for _ in range(2):
        train.main(replace(parts, init_from="resume"))
    assert scores(whole) == scores(parts)
    assert bits(whole.out_dir, 12) == bits(parts.out_dir, 12)


def test_in_training_evaluation_keeps_compiled_blocks(watched, dataset):
    text = (dataset / "tokenizer.json").read_text(encoding="utf-8")
    options = replace(watched, sample_prompt="")
    look = in_training.InTrainingEvaluation(
        options, Path(watched.out_dir), text, runtime.setup("cpu", "bfloat16", 32)
    )
    model = GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=2, n_head=2, n_embd=32))
    seen, plain = [], []
    lines = list(look.maybe_run(model, 0, lambda **values: plain.append(values), lambda: False))
    look.scored.clear()
    for block in model.h:
        block.forward = lambda *given: pytest.fail("a length of its own would be compiled")
    forwards = [block.forward for block in model.h]
    assert len(list(look.maybe_run(model, 0, lambda **values: seen.append(values), lambda: False))) == len(
        lines
    )
    assert seen == plain and [block.forward for block in model.h] == forwards and model.training


def test_invalid_options_are_rejected_before_anything_is_written(watched):
    for options, message in (
        ({"eval_tasks": "helaswag"}, "did you mean 'hellaswag'"),
        ({"eval_tasks": "lm_eval:piqa"}, "after training, with eval.py"),
        ({"sample_prompt": "Z"}, "'Z'"),
    ):
        with pytest.raises(UserError, match=message):
            train.main(replace(watched, **options))
    assert not Path(watched.out_dir).exists()


def test_items_are_spread_over_the_file():
    assert in_training._spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert in_training._spread([1, 2], 4) == [1, 2]


def test_unused_features_load_no_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(in_training.tokenizer, "from_text", lambda text: pytest.fail("a tokenizer was built"))
    machine = runtime.setup("cpu", "float32", 16)
    in_training.InTrainingEvaluation(in_training.InTrainingOptions(), tmp_path, "", machine)
