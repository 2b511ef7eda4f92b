"""Inputs whose result was wrong without a word: each is now handled, reported or rejected."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from benchmarks import fuzz_cases
from nanogpt import checkpoint, files, metrics
from nanogpt.checkpoint import reader
from nanogpt.convert import ckpt, weights
from nanogpt.data.samplers import EpochSampler
from nanogpt.errors import UserError
from nanogpt.prepare import corpus
from nanogpt.tokenizer import tokenizer
from tests.conftest import words, write_dataset


@pytest.fixture
def config(tmp_path):
    write_dataset(tmp_path / "data", words(900))
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 20}
    sizes |= {"gradient_accumulation_steps": 1, "warmup_iters": 0, "eval_iters": 2, "eval_interval": 10}
    return train.Config(dataset=str(tmp_path / "data"), out_dir=str(tmp_path / "out"), device="cpu", **sizes)


def test_truncation_padding_and_dropout_in_a_tokenizer_file_are_disabled(tmp_path, trained_bpe):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_str(trained_bpe)
    text = words(300)
    plain = inner.encode(text, add_special_tokens=False).ids
    inner.enable_truncation(8)
    inner.enable_padding(length=5000)
    value = json.loads(inner.to_str())
    value["model"]["dropout"] = 0.9
    own = tokenizer.from_text(json.dumps(value))
    assert own.encode(text).tolist() == own.encode_prompt(text) == plain


def test_zstandard_with_a_long_window_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = "".join(json.dumps({"text": f"Row {i} of a dump."}) + "\n" for i in range(300)).encode()
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "t.jsonl.zst").write_bytes(packed.compress(rows) + packed.flush())
    summary = corpus.prepare([tmp_path / "t.jsonl.zst"], tmp_path / "out", kind="byte")
    assert "300 documents" in "\n".join(summary.lines())


def test_a_learning_rate_that_jumps_on_resume_is_reported(config, capsys):
    train.main(config)
    options = {"init_from": "resume", "max_iters": 40}
    train.main(replace(config, **options), {name: "given" for name in options})
    said = capsys.readouterr().out
    assert "note: the learning rate jumps from 6e-05 to 0.00033" in said
    assert "because its options have changed; --lr_decay_iters=20 keeps the old end of the schedule" in said
    options |= {"max_iters": 60, "lr_decay_iters": 40}  # keeps the schedule of the run as it is now
    train.main(replace(config, **options), {name: "given" for name in options})
    assert "jumps" not in capsys.readouterr().out
    options |= {"max_iters": 61, "learning_rate": 5e-3, "min_lr": 4e-3}  # the end of the schedule is the same
    train.main(replace(config, **options), {name: "given" for name in options})
    said = capsys.readouterr().out
    assert "to 0.004, because its options have changed\n" in said and "--lr_decay_iters" not in said


@pytest.mark.parametrize("earlier", [False, True], ids=["this version", "without the count of sequences"])
@pytest.mark.parametrize("ramp", [0, 300], ids=["", "ramp"])
def test_another_batch_size_on_resume_neither_skips_nor_repeats_sequences(earlier, ramp, config, monkeypatch):
    read, sequences = [], EpochSampler.starts
    monkeypatch.setattr(EpochSampler, "starts", lambda *given: read.append(given[1:]) or sequences(*given))
    config = replace(config, batch_size=4, batch_ramp_tokens=ramp, eval_interval=1000)
    for sessions, (size, end) in enumerate([(4, 20), (2, 24), (6, 27)]):
        options = {"batch_size": size, "max_iters": end, **({"init_from": "resume"} if sessions else {})}
        train.main(replace(config, **options), {name: "given" for name in options})
        state = Path(config.out_dir) / f"step-{end:06d}/state.json"
        if earlier and sessions == 0:
            saved = files.read_json(state)
            del saved["sequences"]
            files.write_json(state, saved)
            fuzz_cases.sign(state.parent)
    ends = [first + count for first, count in read]
    assert [first for first, _ in read] == [0, *ends[:-1]]
    assert [count for _, count in read[20:]] == [2] * 4 + [6] * 3
    assert ends[-1] == files.read_json(state)["sequences"] == sum(count for _, count in read)


def test_a_run_that_ends_in_its_warmup_says_so(config, capsys):
    train.main(replace(config, max_iters=3, warmup_iters=3))
    assert "note: warmup_iters=3 is not less than max_iters=3, so" in capsys.readouterr().out
    train.main(replace(config, max_iters=3, warmup_iters=2, overwrite=True))
    train.main(replace(config, max_iters=3, warmup_iters=5, decay_lr=False, overwrite=True))
    assert "warmup" not in capsys.readouterr().out


def test_data_that_has_changed_is_reported_and_losses_are_not_compared(config, tmp_path, capsys):
    train.main(config)
    before = reader.find(Path(config.out_dir))[0].progress.best_val_loss
    train.main(replace(config, max_iters=30, init_from="resume"))
    assert "data has changed" not in capsys.readouterr().out
    write_dataset(tmp_path / "data", words(900)[::-1])
    train.main(replace(config, max_iters=31, init_from="resume"))
    assert "note: the data has changed since the run was saved (train, val)" in capsys.readouterr().out
    after = reader.find(Path(config.out_dir))[0].progress
    assert after.best_val_loss == after.val_loss != before


def test_the_best_checkpoint_is_that_of_the_data_now_trained_on(config, tmp_path, capsys):
    out, data = Path(config.out_dir), tmp_path / "data"
    write_dataset(data, "abcdefghi " * 300)
    train.main(replace(config, eval_interval=10, max_iters=20))
    old = checkpoint.evaluation(checkpoint.step_folders(out)[0])
    write_dataset(data, "".join(np.random.default_rng(0).choice([*"abcdefghi "], 3000)))
    capsys.readouterr()
    train.main(replace(config, eval_interval=10, max_iters=60, init_from="resume"))
    said = capsys.readouterr().out
    best, _ = reader.find(out, "best")
    newest = checkpoint.step_folders(out)[0]
    losses = [float(x) for x in re.findall(r"val loss (\S+)", said)]
    assert checkpoint.evaluation(best.path)[1] == checkpoint.evaluation(newest)[1] != old[1]
    assert old[0] < min(losses) == pytest.approx(best.progress.val_loss, abs=1e-4)
    assert f"best validation loss {min(losses):.4f} at iteration {best.progress.iter_num}" in said
    assert any("other_val_loss" in row for row in metrics.read(out))


def test_losses_on_more_sequences_are_not_compared(config, tmp_path, capsys):
    """A loss on two sequences may be lower than that of any better model on all of them."""
    out = Path(config.out_dir)
    train.main(replace(config, eval_interval=10, max_iters=20, eval_iters=1, batch_size=2))
    old = reader.find(out)[0]
    assert old.state["data"]["sequences"].startswith("[2] of ")
    changed = {"eval_iters": 100, "max_iters": 30, "init_from": "resume"}
    capsys.readouterr()
    config = replace(config, eval_interval=10, batch_size=2, **changed)
    train.main(config, {name: "given" for name in changed})
    assert "note: other validation sequences are evaluated from now on" in capsys.readouterr().out
    after = reader.find(out, "best")[0]
    assert after.progress.iter_num == 30 and after.progress.best_val_loss == after.progress.val_loss
    assert [row["iter"] for row in metrics.read(out) if "other_val_loss" in row] == [0, 10, 20]


@pytest.mark.parametrize(
    ("evaluations", "order"),
    [
        ([(1.5, "a"), (1.2, ""), (None, "a"), (1.4, "a")], [1.2, 1.4, 1.5, None]),  # "": of an older version
        ([(1.5, "a"), (0.0, "b"), (None, "a"), (1.4, "a")], [1.4, 1.5, 0.0, None]),
        ([(None, "a"), (1.2, "b"), (1.4, "a")], [1.4, 1.2, None]),
        ([(1.5, ""), (1.2, "")], [1.2, 1.5]),
    ],
)
def test_checkpoints_of_other_data_come_after_those_of_the_same(evaluations, order, tmp_path):
    folders = []
    for number, (loss, data) in enumerate(evaluations):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        state = {"val_loss": loss} | ({"data": {"train": "t", "val": data}} if data else {})
        (folders[-1] / "state.json").write_text(json.dumps(state), encoding="utf-8")
    ranked = [json.loads((path / "state.json").read_text()) for path in checkpoint.best_first(folders)]
    assert [state["val_loss"] for state in ranked] == order


def test_a_folder_of_nanogpt_is_named_for_what_it_is(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"")
    with pytest.raises(UserError, match=rf"nanoGPT's ckpt.pt in it, use --init_from={tmp_path}"):
        weights.open_weights("resume", Path(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ({"vocab_size": None}, {}),
        ({"n_layer": 1.5}, {}),
        ({"n_head": 0}, {}),
        ({"block_size": "16"}, {}),
        ({}, {"iter_num": "many"}),
        ({}, {"best_val_loss": [1]}),
        ({}, {"config": []}),
    ],
)
def test_odd_values_in_ckpt_pt_are_one_line(tmp_path, arguments, more):
    known = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": False, "vocab_size": 65}
    torch.save({"model": {}, "model_args": known | arguments, "config": {}, **more}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt is not a nanoGPT checkpoint"):
        ckpt.open_file(tmp_path / "ckpt.pt", [])


UNKNOWN = "这是一个中文句子，模型应该学到它。\n"


def test_a_tokenizer_that_loses_characters_is_rejected_unless_accepted(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator([words(300)], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(words(3000) + UNKNOWN * 20, encoding="utf-8")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": UNKNOWN * 20}) + "\n", encoding="utf-8")
    for name in ("t.txt", "t.jsonl"):
        given = {"kind": str(tmp_path / "tokenizer.json")}
        with pytest.raises(UserError, match=rf"{name}: the tokenizer loses .* or pass --lossy"):
            corpus.prepare([tmp_path / name], tmp_path / "out", **given)
        assert not (tmp_path / "out" / "train.bin").exists()
    corpus.prepare([tmp_path / "t.txt"], tmp_path / "out", lossy=True, **given)


def test_a_text_key_without_effect_is_rejected(tmp_path):
    (tmp_path / "rows.txt").write_text("id,body\n1,some words\n" * 50, encoding="utf-8")
    (tmp_path / "README.md").write_text("Some words about these rows.\n", encoding="utf-8")
    rows = "".join(
        json.dumps({"body": words(9), "prompt": "a", "response": words(9)}) + "\n" for _ in range(40)
    )
    (tmp_path / "rows.ndjson").write_text(rows, encoding="utf-8")
    with pytest.raises(UserError, match=r"--text_key=body: rows\.txt is plain text without fields"):
        corpus.prepare([tmp_path / "rows.txt"], tmp_path / "out", text_key="body")
    with pytest.raises(UserError, match=r"--text_key=prompt\+response: README\.md is plain text"):
        both = [tmp_path / "README.md", tmp_path / "rows.ndjson"]
        corpus.prepare(both, tmp_path / "out", text_key="prompt+response", kind="byte")
    summary = corpus.prepare([tmp_path / "rows.ndjson"], tmp_path / "out", text_key="body")
    assert "40 documents" in "\n".join(summary.lines())


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"%PDF-1.5\n", "a PDF file: convert it to text first"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1f\x8b\x08", "is damaged"),
        (b"BZh91AY&SY", "is damaged"),
        (b"\x28\xb5\x2f\xfd", "is damaged"),
        (b"\x89PNG\r\n", "an image"),
        (b"\xd0\xcf\x11\xe0", "an old Office document"),
        (b"SQLite format 3\0", "an SQLite database"),
    ],
)
@pytest.mark.parametrize("encoding", ["", "latin-1"])
def test_formats_are_named_by_their_content_whatever_the_encoding(tmp_path, start, said, encoding):
    (tmp_path / "book.txt").write_bytes(start + bytes(range(1, 200)) * 20)
    with pytest.raises(UserError, match=said) as caught:
        corpus.prepare([tmp_path / "book.txt"], tmp_path / "out", encoding=encoding)
    assert "--encoding" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.parquet", {"encoding": "latin-1"}),
        ("x.parquet", {"on_undecodable": "drop"}),
        ("x.jsonl", {"on_undecodable": "replace"}),
        ("x.txt", {"skip_bad": True}),
        ("x.txt", {"lossy": True, "kind": "char"}),
        ("x.txt", {"val": "v.txt", "val_fraction": 0.2}),
    ],
)
def test_an_option_without_effect_is_rejected(name, options, tmp_path, monkeypatch):
    from tests.test_readers import write

    monkeypatch.chdir(tmp_path)
    for other in ("x.txt", "v.txt"):
        Path(other).write_text(words(300, len(other) + (other == "v.txt")), encoding="utf-8")
    if name != "x.txt":
        write(tmp_path / name, ["some text"] * 9)
    with pytest.raises(UserError, match=rf"--{list(options)[-1]}|--lossy"):
        corpus.prepare([Path(name)], Path("out"), **{"kind": "byte", **options})
    assert not Path("out").exists()


@pytest.mark.parametrize("mark", ["<|endoftext|>", "\\n\\n", "blank_line"])
def test_a_mark_that_does_not_occur_is_rejected(mark, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n" * 50, encoding="utf-8")
    with pytest.raises(UserError, match="these texts do not contain it"):
        corpus.prepare([tmp_path / "a.txt"], tmp_path / "out", split_at=mark)


def test_a_plus_in_text_key_is_always_a_prompt_and_a_response(tmp_path):
    (tmp_path / "a.csv").write_text("a+b,c\nx y,z\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column `a`"):
        corpus.prepare([tmp_path / "a.csv"], tmp_path / "out", text_key="a+b")


def test_empty_validation_texts_are_named(tmp_path):
    (tmp_path / "train.csv").write_text("text\n" + "some words\n" * 50, encoding="utf-8")
    (tmp_path / "valid.csv").write_text("text\n", encoding="utf-8")
    with pytest.raises(UserError, match="the val texts are empty; --val=PATH"):
        corpus.prepare([tmp_path], tmp_path / "out", keep=lambda file: file.suffix == ".csv")
