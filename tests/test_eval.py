"""Tests of eval.py."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as program
import train
from nanogpt import files
from nanogpt.diagnostics import overlap
from nanogpt.errors import UserError
from nanogpt.evaluation import counting, evals
from nanogpt.prepare import corpus
from tests.conftest import train_until_it_knows, words, write_dataset

QUESTIONS = [{"context": "", "choices": ["abc", "fgh"], "label": i % 2} for i in range(6)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a dataset and the folder of a run on it with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    train_until_it_knows(folder, max_iters=200)
    return folder


@pytest.fixture
def config(trained, tmp_path):
    return program.Config(out_dir=str(trained / "out"), device="cpu", out=str(tmp_path / "out.json"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return str(path)


def result(config) -> dict:
    program.main(config)
    return json.loads(Path(config.out).read_text(encoding="utf-8"))


def test_default_is_the_validation_split(config, trained, capsys):
    found = result(config)
    scores = found["results"]["dataset/val"]
    state = files.read_json(Path(found["model"]) / "state.json")
    assert scores["loss"] == pytest.approx(state["val_loss"], abs=1e-5)  # by train.py, on the full split
    assert scores["bits_per_byte"] == pytest.approx(state["val_loss"] / 0.6931472, abs=1e-5)
    assert 0 < scores["loss_stderr"] < 0.1
    printed = capsys.readouterr().out
    assert f"dataset/val: loss {scores['loss']:.4f} ± " in printed and "context 16" in printed
    assert result(replace(config, split="train"))["results"]["dataset/train"]["tokens"] > scores["tokens"]


def test_a_line_tells_on_what_part_of_the_split_training_evaluated(trained, tmp_path, capsys):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "eval_iters": 3}
    shape |= {"gradient_accumulation_steps": 1, "warmup_iters": 0, "max_iters": 3, "device": "cpu"}
    run = train.Config(dataset=str(trained / "dataset"), out_dir=str(tmp_path / "part"), **shape)
    train.main(run)
    logged = re.findall(r"step 3: .* val loss (\S+)", capsys.readouterr().out)[0]
    program.main(program.Config(out_dir=run.out_dir, device="cpu"))
    said = capsys.readouterr().out
    whole = int(re.findall(r"(\d+) windows", said)[0])
    part = f"training evaluated 12 of the {whole - 1} sequences of this split (--eval_iters)"
    assert f"{part}: val loss {logged}\n" in said  # the last window is shorter
    program.main(program.Config(out_dir=str(trained / "out"), device="cpu"))
    program.main(program.Config(out_dir=run.out_dir, device="cpu", limit=5))
    program.main(program.Config(out_dir=run.out_dir, device="cpu", split="train"))
    assert "training evaluated" not in capsys.readouterr().out  # the whole split, or another part


@pytest.mark.parametrize("limit", [0, 3])
def test_prompts_and_responses_are_scored_together_and_apart(limit, tmp_path, capsys):
    rows = [{"prompt": words(9, seed=i), "response": words(5, seed=i + 500)} for i in range(200)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    how = {"kind": "byte", "text_key": "prompt+response", "val_fraction": 0.3}
    corpus.prepare([tmp_path / "rows.jsonl"], tmp_path / "data", **how)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "eval_iters": 99}
    shape |= {"gradient_accumulation_steps": 1, "warmup_iters": 0, "max_iters": 3}
    run = str(tmp_path / "out")
    train.main(train.Config(dataset=str(tmp_path / "data"), out_dir=run, device="cpu", **shape))
    found = result(program.Config(out_dir=run, device="cpu", limit=limit, out=str(tmp_path / "out.json")))
    scores = found["results"]["data/val"]
    mask = np.fromfile(tmp_path / "data" / "val.mask.bin", "u1")
    assert f"response_loss {scores['response_loss']:.4f} ± " in capsys.readouterr().out
    if limit:
        assert 0 < scores["response tokens"] < scores["tokens"] <= limit * 32
        return
    assert (scores["tokens"], scores["response tokens"]) == (len(mask) - 1, mask[1:].sum())
    state = files.read_json(Path(found["model"]) / "state.json")
    assert scores["response_loss"] == pytest.approx(state["val_loss"], abs=1e-5)  # which train.py minimizes
    assert abs(scores["loss"] - scores["response_loss"]) > 1e-3


def test_text_file_and_prepared_data_have_equal_scores(config, trained, tmp_path):
    text = words(1800)
    (tmp_path / "val.txt").write_text(text[int(len(text) * 0.9) :], encoding="utf-8")
    found = result(replace(config, text=str(tmp_path / "val.txt"), dataset=str(trained / "dataset")))[
        "results"
    ]
    assert found["val.txt"]["loss"] == pytest.approx(found["dataset/val"]["loss"], abs=1e-6)
    assert found["val.txt"]["tokens"] == found["dataset/val"]["tokens"]
    near = result(replace(config, text=str(tmp_path / "val.txt"), stride=1))["results"]["val.txt"]
    assert near["tokens"] == found["val.txt"]["tokens"] == near["windows"] + 15
    few = result(replace(config, text=str(tmp_path / "val.txt"), limit=3))["results"]["val.txt"]
    assert few["windows"] == 3 and few["tokens"] == 40 and "word_perplexity" not in few


def test_jsonl_rows_are_separate_texts(config, tmp_path):
    path = tmp_path / "texts.jsonl"
    scores = []
    for empty in ("", '{"text": ""}\n' * 5):
        path.write_text(
            '{"text": "abcdef gh"}\n{"text": "a"}\n' + empty + '{"text": "fe"}\n', encoding="utf-8"
        )
        scores.append(result(replace(config, text=str(path)))["results"]["texts.jsonl"])
        assert scores[-1]["tokens"] == 8 + 1
    assert scores[0]["word_perplexity"] == scores[1]["word_perplexity"]


def test_task_scores_and_items(config, questions, tmp_path):
    items = tmp_path / "items.jsonl"
    found = result(replace(config, tasks=questions, items=str(items)))
    scores = found["results"]["questions"]
    assert scores["acc"] == 0.5 and scores["items"] == 6  # labels alternate, questions are identical
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    assert [row["label"] for row in rows] == [0, 1] * 3 and len(rows[0]["loglikelihoods"]) == 2
    assert {row["task"] for row in rows} == {"questions"} and rows[0]["model"] == found["model"]
    assert result(replace(config, tasks=questions, limit=4))["results"]["questions"]["items"] == 4


def test_scores_are_independent_of_batch_size(config, questions):
    options = {"tasks": questions, "dataset": ""}
    one, many = (result(replace(config, batch_size=n, **options))["results"]["questions"] for n in (1, 50))
    assert {k: v for k, v in one.items() if k != "seconds"} == {
        k: v for k, v in many.items() if k != "seconds"
    }


def test_comparison_with_itself_shows_no_difference(config, questions, capsys):
    found = result(replace(config, against=config.out_dir, tasks=questions))
    assert found["against"]["results"]["questions"]["acc"] == found["results"]["questions"]["acc"]
    assert all(one["value"] == 0 and one["p"] == 1 for one in found["differences"]["questions"].values())
    assert "questions: acc +0.0000 ± 0.0000 (p = 1, McNemar's exact test)" in capsys.readouterr().out


def test_both_models_are_compared_on_the_data_of_the_first(config, trained, tmp_path):
    train_until_it_knows(tmp_path, max_iters=20)
    other = str(tmp_path / "out")
    own = result(replace(config, against=other))
    given = result(replace(config, against=other, dataset=str(trained / "dataset")))
    assert own["differences"] == given["differences"]
    report = SimpleNamespace(kind="text")
    pair = [(SimpleNamespace(subject=SimpleNamespace(block_size=n)), [report]) for n in (8, 16)]
    with pytest.raises(UserError, match=r"--limit=2 selects other parts of a text for contexts of \[8, 16\]"):
        program.compare(*pair, limit=2)


def test_a_text_that_has_changed_since_training_is_mentioned(tmp_path, capsys):
    train_until_it_knows(tmp_path, max_iters=20)
    config = program.Config(out_dir=str(tmp_path / "out"), device="cpu", out=str(tmp_path / "out.json"))
    result(config)
    assert "has changed" not in capsys.readouterr().out
    write_dataset(tmp_path / "dataset", words(1800)[::-1])
    result(replace(config, baseline=True))
    said = capsys.readouterr().out
    assert f"note: {tmp_path / 'dataset'} has changed since" in said and "on the same sequences" not in said
    with pytest.raises(UserError, match=r"dataset has changed since .*out was trained"):
        overlap.open_dataset(tmp_path / "out")


def test_longer_training_is_significantly_better(config, trained):
    found = result(replace(config, against=str(trained / "out" / "step-000100")))
    difference = found["differences"]["dataset/val"]["loss"]
    assert difference["value"] < 0 and difference["p"] < 1e-3
    own, other = (found[k]["results"] if k else found["results"] for k in ("", "against"))
    expected = own["dataset/val"]["loss"] - other["dataset/val"]["loss"]
    assert difference["value"] == pytest.approx(expected)


def test_different_tokenizers_are_compared_in_bits_per_byte():
    """The same text in 1-byte and 2-byte tokens: only bits/byte are comparable."""
    import numpy as np

    draw = np.random.default_rng(0)
    ones, twos = draw.random(40_000), draw.random(20_000)
    reports = []
    for nats, width in ((ones, 1), (twos, 2)):
        totals, rows = evals._stretches(nats, np.full(len(nats), width))
        reports.append(evals.Report("x", "text", {}, {}, 0, totals, rows))
    found = evals.compare(*reports)
    assert list(found) == ["bits_per_byte"] and found["bits_per_byte"].p < 1e-3
    assert found["bits_per_byte"].value == pytest.approx(0.5 / 0.6931 - 0.25 / 0.6931, abs=0.01)


def test_lm_eval_tasks(config, tmp_path, capsys):
    """A file-based lm-eval task with local rows gets the same score as our own scoring."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "abc def"}\n{"text": "gh abcd ef"}\n', encoding="utf-8")
    task = tmp_path / "own_task.yaml"
    lines = [
        "task: own_task",
        "dataset_path: json",
        "dataset_kwargs: {data_files: {test: '" + str(rows) + "'}}",
        "test_split: test",
        "output_type: loglikelihood",
        "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"",
        "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"",
        "metric_list: [{metric: perplexity}, {metric: acc}]",
    ]
    task.write_text("\n".join(lines), encoding="utf-8")
    found = result(replace(config, tasks=f"lambada:{rows},lm_eval:{task}"))
    theirs, ours = found["lm_eval"]["own_task"], found["results"]["lambada"]
    assert theirs["acc"] == ours["acc"]
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-4)
    assert "|own_task|" in capsys.readouterr().out


# ----------------------------------------------------------------------------- invalid input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_dir": "nowhere"}, "no checkpoint in nowhere"),
        ({"tasks": "helaswag"}, "did you mean 'hellaswag'"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"dataset": "nowhere"}, "no dataset at 'nowhere'"),
        ({"stride": 17}, "--stride=17 exceeds the context of 16 tokens"),
        ({"against": "out", "tasks": "lm_eval:piqa"}, "--against needs per-item scores"),
        ({"items": "no/such/folder/x.jsonl"}, "create its folder first"),
        ({"which": "7"}, "no checkpoint '7'"),
    ],
)
def test_invalid_options_are_rejected(config, options, message):
    with pytest.raises(UserError, match=message):
        program.main(replace(config, **options))
    assert not Path(config.out).exists()


def test_results_that_cannot_be_written_are_refused_or_told(config, capsys, monkeypatch):
    def refuse(*given):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(counting.files, "write_json", refuse)
        program.main(replace(config, baseline=True, out=""))
    assert capsys.readouterr().out.splitlines()[-1].endswith("(not kept: Permission denied)")
    monkeypatch.setattr(program.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not a writable file path"):
        program.main(config)
    assert capsys.readouterr().out == ""


def test_advice_about_the_encoding_of_a_text_does_not_name_options_of_eval(config, tmp_path):
    (tmp_path / "x.txt").write_bytes("déjà vu ".encode("latin-1") * 20)
    with pytest.raises(UserError, match=r"x\.txt: .* options of data/prepare.py: for --text convert it"):
        program.main(replace(config, text=str(tmp_path / "x.txt")))


def test_invalid_text_files_are_rejected(config, tmp_path):
    for name, content in (("empty.txt", ""), ("rows.jsonl", '{"text": ""}\n'), ("one.txt", "a")):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"empty|no text"):
            program.main(replace(config, text=str(path)))
    (tmp_path / "odd.txt").write_text("abc Z", encoding="utf-8")
    with pytest.raises(UserError, match="'Z'"):
        program.main(replace(config, text=str(tmp_path / "odd.txt")))


def test_dataset_with_another_tokenizer_is_rejected(config, tmp_path):
    from tests.conftest import write_dataset

    write_dataset(tmp_path / "other", "xyz " * 300)
    with pytest.raises(UserError, match="different tokenizers"):
        program.main(replace(config, dataset=str(tmp_path / "other")))


def test_model_may_be_a_positional_argument(monkeypatch, config):
    given = []
    monkeypatch.setattr(program, "main", given.append)
    monkeypatch.setattr("sys.argv", ["eval.py", "out-mine", "--limit=3"])
    program.program()
    assert given == [program.Config(out_dir="out-mine", limit=3)]
    monkeypatch.setattr("sys.argv", ["eval.py", "out-a", "out-b"])
    with pytest.raises(UserError, match="--against=FOLDER"):
        program.program()
    monkeypatch.setattr("sys.argv", ["eval.py", "out-a", "--out_dir=out-b"])
    with pytest.raises(UserError, match="out-a and --out_dir=out-b given; expected one model"):
        program.program()
