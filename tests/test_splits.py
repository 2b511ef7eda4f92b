"""Splits and documents that the user names: --val, files named train, valid and test, --split_at."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.prepare import corpus, formats
from nanogpt.tokenizer import tokenizer
from tests.conftest import words


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("train", 1), ("valid", 2), ("test", 3)):
        (tmp_path / f"{name}.txt").write_text(words(400, seed), encoding="utf-8")
    return tmp_path


def texts_of(out: Path) -> list[str]:
    """Return the decoded splits of a dataset."""
    dataset = loader.load(out)
    encoder = tokenizer.from_text(dataset.tokenizer)
    return [tokenizer.decode(encoder, split.read(0, len(split))) for split in (dataset.train, dataset.val)]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_validation_text_of_ones_own(folder, tmp_path):
    summary = corpus.prepare([folder / "train.txt"], tmp_path / "out", val=str(folder / "valid.txt"))
    assert texts_of(tmp_path / "out") == [text(folder / "train.txt"), text(folder / "valid.txt")]
    assert "split: train is train.txt, val is valid.txt" in summary.lines()


def test_validation_folder_with_several_training_files(folder, tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "a.txt").write_text("held out\n", encoding="utf-8")
    given = [folder / "train.txt", folder / "valid.txt", folder / "test.txt"]
    summary = corpus.prepare(given, tmp_path / "out", val=str(tmp_path / "held"))
    train, val = texts_of(tmp_path / "out")
    assert train == text(folder / "train.txt") + text(folder / "valid.txt") and val == "held out\n"
    assert any("named as test data: test.txt" in line for line in summary.lines())


def test_rows_of_a_validation_file(folder, tmp_path):
    for name, count in (("a", 300), ("b", 20)):
        rows = [json.dumps({"text": f"{name} {number}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    summary = corpus.prepare([tmp_path / "a.jsonl"], tmp_path / "out", val=str(tmp_path / "b.jsonl"))
    assert summary.counts.documents == {"train": 300, "val": 20}
    train, val = texts_of(tmp_path / "out")
    assert "b" not in train and val.splitlines() == [f"b {number}" for number in range(20)]


def test_bpe_is_not_learnt_from_the_validation_text(folder, tmp_path):
    (folder / "valid.txt").write_text("zzzzzzzz " * 300, encoding="utf-8")
    corpus.prepare([folder / "train.txt"], tmp_path / "out", val=str(folder / "valid.txt"), kind="bpe:300")
    assert "zz" not in json.loads(text(tmp_path / "out" / "tokenizer.json"))["model"]["vocab"]


@pytest.mark.parametrize("given", ["folder", "files"])
def test_files_named_as_splits_are_the_splits_and_test_is_not_used(folder, tmp_path, given):
    paths = [folder] if given == "folder" else sorted(folder.glob("*.txt"))
    summary = corpus.prepare(paths, tmp_path / "out", keep=lambda file: file.suffix == ".txt")
    assert texts_of(tmp_path / "out") == [text(folder / "train.txt"), text(folder / "valid.txt")]
    lines = "\n".join(summary.lines())
    assert "train is" in lines and "not used, because named as test data: " in lines and "test.txt" in lines


@pytest.mark.parametrize("given", ["folder", "files", "pattern"])
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt", ""),
        ("c4-train.00000-of-01024.txt", "c4-validation.00000-of-00008.txt", ""),
        ("imdb-train.txt", "", "imdb-test.txt"),
        ("TRAIN1.TXT", "Dev1.txt", "Test1.txt"),
        ("train.txt|chapter.txt", "eval.txt", "test_2.txt"),
        ("book.txt|letters.txt", "held/heldout.txt", "test data.txt"),
        ("train/a.txt|extra/b.txt", "", "test/a.txt"),
        ("trainset.txt", "held_out.txt|devset.txt", "testset.txt"),
        ("train.en|train.de", "validation.en", "newstest/test.en"),
        ("training set.txt", "", "sub/testing/deep/x.txt"),
        ("chapter.txt|train.txt", "", ""),
        ("train_1.txt|train_2.txt", "", ""),
        ("A Test of Faith.txt|contest.txt|latest/protest.txt", "", ""),
        ("valid.txt", "", "test.txt"),
        ("test_1.txt|test_2.txt", "", ""),
    ],
)
def test_names_of_splits_decide_and_test_is_never_trained_on(tmp_path, given, train, val, test):
    folder = tmp_path / "test"  # the name of a folder that contains all is of no split
    for split, names in (("train", train), ("val", val), ("test", test)):
        for path in [folder / name for name in names.split("|") if name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{split} {path.name}\n" * 50, encoding="utf-8")
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = {"folder": [folder], "files": every, "pattern": [folder / "**" / "*.*"]}[given]
    summary = corpus.prepare(paths, tmp_path / "out")
    assert {source.path for source in summary.texts.sources} == {
        folder / name for name in f"{train}|{val}".split("|") if name
    }
    assert (summary.split.val_from >= 0) == bool(val)
    there = texts_of(tmp_path / "out")
    assert not any("test " in text for text in there)
    assert not val or ("val " not in there[0] and "train " not in there[1])
    assert bool(test) == any("named as test data" in line for line in summary.lines())


def test_train_and_test_alone_leave_the_test_file_out(folder, tmp_path):
    (folder / "valid.txt").unlink()
    summary = corpus.prepare([folder], tmp_path / "out", keep=lambda file: file.suffix == ".txt")
    assert "".join(texts_of(tmp_path / "out")) == text(folder / "train.txt")
    assert any("named as test data" in line for line in summary.lines())


def test_the_same_text_in_both_splits_is_an_error(folder, tmp_path):
    with pytest.raises(UserError, match=r"train\.txt is also a training text"):
        corpus.prepare([folder / "train.txt"], tmp_path / "out", val=str(folder / "train.txt"))
    with pytest.raises(UserError, match="no such file or folder"):
        corpus.prepare([folder / "train.txt"], tmp_path / "out", val=str(folder / "none.txt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("val", ["validation", "valid", "dev", "val", ""])
def test_folders_named_as_splits_are_the_splits(tmp_path, val):
    """As datasets saves a DatasetDict, and as many corpora are packed."""
    for number, name in enumerate(filter(None, ("train", val, "test"))):
        (tmp_path / "data" / name / "deep").mkdir(parents=True)
        (tmp_path / "data" / name / "deep" / "a.txt").write_text(words(400, number), encoding="utf-8")
    (tmp_path / "data" / "README").write_text("Read me.", encoding="utf-8")
    summary = corpus.prepare([tmp_path / "data"], tmp_path / "out")
    train, held = texts_of(tmp_path / "out")
    expected = words(400, 0)
    assert (train, held) == (expected, words(400, 1)) if val else train + held == expected
    said = "\n".join(summary.lines())
    assert "not used, because named as test data: data/test/deep/a.txt" in said
    assert "not used, because not named as a split, as others are: data/README" in said


def test_a_saved_dataset_dict_is_its_splits(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = {name: {"text": [f"{name} {i}" for i in range(9)]} for name in ("train", "validation", "test")}
    saved = {name: datasets.Dataset.from_dict(columns) for name, columns in rows.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "cache-0123.arrow").write_bytes(
        (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").read_bytes()
    )
    corpus.prepare([tmp_path / "saved"], tmp_path / "out")
    train, val = texts_of(tmp_path / "out")
    assert train.splitlines() == rows["train"]["text"] and val.splitlines() == rows["validation"]["text"]


def test_tables_left_by_an_earlier_save_to_disk_are_skipped(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"row {i}" for i in range(300)]
    whole = datasets.Dataset.from_dict({"text": rows})
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    whole.select(range(150)).save_to_disk(tmp_path / "saved", num_shards=2)
    summary = corpus.prepare([tmp_path / "saved"], tmp_path / "out")
    train, val = texts_of(tmp_path / "out")
    assert sorted((train + val).splitlines()) == sorted(rows[:150])
    assert sum("not listed in state.json" in line for line in summary.lines()) == 3


def test_texts_of_train_that_are_also_in_val_are_counted(folder, tmp_path):
    (folder / "valid.txt").write_text(text(folder / "train.txt"), encoding="utf-8")
    summary = corpus.prepare([folder], tmp_path / "out", keep=lambda file: file.suffix == ".txt")
    assert any("; 1 document of val also in train" in line for line in summary.lines())


STORIES = [f"Story {number}: there were {number % 31} cats.\nThe end." for number in range(400)]


@pytest.mark.parametrize(
    ("mark", "between", "documents"),
    [
        ("<|endoftext|>", "\n<|endoftext|>\n", STORIES),
        ("blank_line", "\n\n\n", STORIES),
        ("blank_line", "\n \t\n", STORIES),
        ("line", "\n", "\n".join(STORIES).split("\n")),
        ("%%", "%%", STORIES),
    ],
)
def test_marks_separate_the_documents_of_a_text(tmp_path, monkeypatch, mark, between, documents):
    (tmp_path / "stories.txt").write_text(between.join(STORIES) + "\n", encoding="utf-8", newline="\r\n")
    monkeypatch.setattr(formats, "BLOCK", 1000)  # several pieces
    summary = corpus.prepare([tmp_path / "stories.txt"], tmp_path / "out", kind="bpe:400", split_at=mark)
    assert sum(summary.counts.documents.values()) == len(documents)
    dataset = loader.load(tmp_path / "out")
    encoder = tokenizer.from_text(dataset.tokenizer)
    found = []
    for split in (dataset.train, dataset.val):
        ids = split.read(0, len(split))
        ends = np.flatnonzero(ids == encoder.end_of_text)
        found += [
            tokenizer.decode(encoder, part[part != encoder.end_of_text]) for part in np.split(ids, ends)
        ]
    assert sorted(filter(None, found)) == sorted(documents)


def test_a_known_mark_is_hinted_at(tmp_path):
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    summary = corpus.prepare([tmp_path / "stories.txt"], tmp_path / "out")
    assert any(
        "--split_at='<|endoftext|>' makes it the end of a document" in line for line in summary.lines()
    )
    (tmp_path / "plain.txt").write_text(STORIES[0], encoding="utf-8")
    summary = corpus.prepare([tmp_path / "plain.txt"], tmp_path / "plain")
    assert not any("split_at" in line for line in summary.lines())


@pytest.mark.parametrize("given", [[0, 2], [0, 1, 2]])
def test_missing_files_of_a_numbered_set_are_reported(tmp_path, given):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in given:
        rows = "".join(json.dumps({"text": words(40, 10 * number + i)}) + "\n" for i in range(200))
        (folder / f"train-{number:05}-of-00003.jsonl").write_text(rows, encoding="utf-8")
    lines = corpus.prepare([folder], tmp_path / "out", kind="byte").lines()
    notes = [line for line in lines if "-of-00003" in line]
    found = "note: 2 of 3 files shards/train-*-of-00003.jsonl are here"
    assert notes == ([f"{found}; the others are not part of this dataset"] if len(given) < 3 else [])


def test_marks_are_for_text_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b c"}), encoding="utf-8")
    with pytest.raises(UserError, match="--split_at=line is for text files, and there are none"):
        corpus.prepare([tmp_path / "a.jsonl"], tmp_path / "out", split_at="line")
