"""From text to a dataset folder: the right ids in the right split, in little memory, or nothing at all."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanogpt import data, files, tokenizer
from nanogpt.errors import UserError
from nanogpt.prepare import corpus, encode, shards, text
from tests.conftest import words

ROOT = Path(__file__).resolve().parent.parent


def written(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8"))
    return path


def rows(folder: Path, name: str, bodies: list[str]) -> Path:
    return written(folder, name, "".join(json.dumps({"text": body}) + "\n" for body in bodies))


def ids_of(out: Path, split: str) -> np.ndarray:
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    return np.fromfile(out / f"{split}.bin", dtype=np.dtype(meta["dtype"]).newbyteorder("<"))


def text_of(out: Path, split: str) -> str:
    tokens = tokenizer.from_text((out / "tokenizer.json").read_text(encoding="utf-8"))
    return tokenizer.decode(tokens, ids_of(out, split).tolist())


def documents_of(out: Path, split: str) -> list[list[int]]:
    """The ids between the end_of_text tokens of a GPT-2 split."""
    ids = ids_of(out, split)
    ends = np.flatnonzero(ids == 50256)
    assert ends[-1] == len(ids) - 1
    return [part[part != 50256].tolist() for part in np.split(ids, ends + 1)[:-1]]


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: no test here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    return written(tmp_path, "novel.txt", words(2000))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut everywhere, so that a mistake at a cut would show."""
    monkeypatch.setattr(text, "BLOCK", 61)
    monkeypatch.setattr(encode, "PIECE", 37)


# ----------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_one_text_is_cut_as_nanogpt_cuts_it(kind, tmp_path, small_pieces):
    body = words(300) + "Ende gut, alles gut: 三国演义 🦊"
    out = tmp_path / "out"
    corpus.prepare([written(tmp_path, "x.txt", body)], out, kind=kind)
    cut = int(len(body) * 0.9)
    assert (text_of(out, "train"), text_of(out, "val")) == (body[:cut], body[cut:])


def test_meta_describes_the_files(novel, tmp_path):
    out = tmp_path / "out"
    summary = corpus.prepare([novel], out, kind="byte", val_fraction=0.25)
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta == summary.meta and meta["format"] == data.FORMAT
    for split in ("train", "val"):
        content = (out / f"{split}.bin").read_bytes()
        assert meta["splits"][split] == {
            "tokens": len(content) // 2,
            "text_bytes": len(text_of(out, split).encode()),
            "files": [
                {
                    "name": f"{split}.bin",
                    "tokens": len(content) // 2,
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            ],
        }
    raw = novel.read_bytes()
    assert meta["source"] == [
        {"name": "novel.txt", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(corpus.NAMES)


def test_the_loader_opens_what_was_prepared(novel, tmp_path, data_folder):
    for kind in ("char", "byte", "gpt2"):
        summary = corpus.prepare([novel], tmp_path / kind, kind=kind, gpt2_bpe=str(data_folder / "gpt2"))
        dataset = data.load(tmp_path / kind)
        assert dataset.vocab_size == summary.tokenizer.vocab_size
        assert dataset.fingerprint == tokenizer.fingerprint(summary.tokenizer)
        assert len(dataset.train) == summary.meta["splits"]["train"]["tokens"]


def test_the_same_text_gives_the_same_bytes(novel, tmp_path, small_pieces):
    corpus.prepare([novel], tmp_path / "a")
    (tmp_path / "b").mkdir()
    written(tmp_path / "b", "prepare.py", "mine")
    corpus.prepare([novel], tmp_path / "b")
    corpus.prepare([novel], tmp_path / "b")
    assert state(tmp_path / "b") == {**state(tmp_path / "a"), "prepare.py": b"mine"}


def test_an_alphabet_beyond_uint16_is_written_in_uint32(tmp_path):
    body = "".join(chr(point) for point in range(0x20000, 0x20000 + 65_537)) * 2
    summary = corpus.prepare([written(tmp_path, "x.txt", body)], tmp_path / "out", kind="char")
    assert (summary.meta["dtype"], summary.meta["vocab_size"]) == ("uint32", 65_537)
    assert text_of(tmp_path / "out", "train") + text_of(tmp_path / "out", "val") == body
    corpus.prepare([written(tmp_path, "x.txt", body[:-1] + body[:-1])], tmp_path / "out", kind="char")
    assert data.load(tmp_path / "out").vocab_size == 65_537


def test_bytes_are_the_default_for_a_huge_alphabet(tmp_path):
    for size, kind in ((19_999, "char"), (20_000, "byte")):
        body = "".join(chr(point) for point in range(0x20000, 0x20000 + size))
        summary = corpus.prepare([written(tmp_path, "x.txt", body)], tmp_path / "out")
        assert summary.tokenizer.kind == kind
        assert any("so bytes are the tokens" in line for line in summary.lines()) == (kind == "byte")


def test_the_summary_says_what_happened(tmp_path):
    for i in range(12):
        written(tmp_path, f"in/{i:02}.txt", "")
    written(tmp_path, "in/good.txt", words(50).replace("\n", "\r\n"))
    written(tmp_path, "in/rows.jsonl", '{"text": ""}\n{"text": "abc"}\n')
    lines = "\n".join(corpus.prepare([tmp_path / "in"], tmp_path / "out").lines())
    assert "2 files, 2 documents" in lines
    assert lines.count("newlines normalised to \\n") == 1
    assert lines.count(".txt: empty") == 10 and "skipped 2 more files" in lines
    assert "skipped 1 row without a character" in lines


# ----------------------------------------------------------------------------- documents and splits


def test_few_documents_are_each_cut_and_set_apart_by_newlines(tmp_path, small_pieces):
    bodies = ["abcdefghij" * 3, "ABCDEFGHI\n" * 5, "x", "01234567\n89"]
    out = tmp_path / "out"
    corpus.prepare([rows(tmp_path, "x.jsonl", bodies)], out, val_fraction=0.2)
    cuts = [int(len(body) * 0.8) for body in bodies]
    for split, parts in (
        ("train", [body[:cut] for body, cut in zip(bodies, cuts, strict=True)]),
        ("val", [body[cut:] for body, cut in zip(bodies, cuts, strict=True)]),
    ):
        assert text_of(out, split) == "".join(
            part if part.endswith("\n") else part + "\n" for part in parts if part
        )


def test_the_newline_that_sets_apart_is_in_the_vocabulary(tmp_path):
    summary = corpus.prepare([rows(tmp_path, "x.jsonl", ["abab", "baba"])], tmp_path / "out", kind="char")
    assert summary.tokenizer.vocab_size == 3
    assert text_of(tmp_path / "out", "train") == "aba\nbab\n"
    summary = corpus.prepare([rows(tmp_path, "x.jsonl", ["abab"])], tmp_path / "out", kind="char")
    assert summary.tokenizer.vocab_size == 2


def test_many_documents_go_whole_to_the_same_side_whatever_the_order(tmp_path):
    bodies = [f"document {i} {words(10, seed=i)}" for i in range(300)]

    def side(bodies: list[str]) -> dict[str, str]:
        corpus.prepare([rows(tmp_path, "x.jsonl", bodies)], tmp_path / "out", val_fraction=0.2)
        texts = {split: text_of(tmp_path / "out", split) for split in ("train", "val")}
        assert sum(map(len, texts.values())) == sum(map(len, bodies))  # each whole, in one split
        return {body: split for split, whole in texts.items() for body in bodies if body in whole}

    first = side(bodies)
    assert 30 <= list(first.values()).count("val") <= 90  # 60 are expected, with a deviation of 7
    assert side(bodies[::-1]) == first
    more = side([f"another {words(10, seed=1000 + i)}" for i in range(200)] + bodies + bodies[:50])
    assert {body: more[body] for body in bodies} == first

    for i, body in enumerate(bodies):
        written(tmp_path, f"in/{i}.txt", body.replace("\n", "\r\n"))
    corpus.prepare([tmp_path / "in"], tmp_path / "out", val_fraction=0.2)
    texts = {split: text_of(tmp_path / "out", split) for split in ("train", "val")}
    assert all(body in texts[first[body]] for body in bodies)


# ----------------------------------------------------------------------------- GPT-2


def test_gpt2_in_pieces_gives_the_published_ids_of_every_text(data_folder, tmp_path, small_pieces):
    expected = json.loads((data_folder / "gpt2" / "expected_tokens.json").read_text(encoding="utf-8"))
    chosen = {}
    for name, entry in expected.items():
        path = data_folder / name
        if path.is_file():
            content = path.read_bytes()
            if content and b"\r" not in content and not content.startswith(b"\xef\xbb\xbf"):
                chosen[name] = entry["sha256_uint16le"]
    assert len(chosen) == 17
    filler = rows(tmp_path, "filler.jsonl", [f"filler {i}" for i in range(100)])
    out = tmp_path / "out"
    paths = [data_folder / name for name in chosen]
    corpus.prepare([*paths, filler], out, kind="gpt2", gpt2_bpe=str(data_folder / "gpt2"))
    prepared = {
        hashlib.sha256(np.array(ids, dtype="<u2").tobytes()).hexdigest()
        for split in ("train", "val")
        for ids in documents_of(out, split)
    }
    assert set(chosen.values()) <= prepared


def test_gpt2_rows_end_with_the_end_of_text(data_folder, tmp_path):
    entry = json.loads((data_folder / "gpt2" / "expected_tokens.json").read_text(encoding="utf-8"))[
        "english/sample.jsonl (each text + 50256)"
    ]
    source = data_folder / "english" / "sample.jsonl"
    out = tmp_path / "out"
    corpus.prepare([source], out, kind="gpt2", gpt2_bpe=str(data_folder / "gpt2"))
    splits = {split: documents_of(out, split) for split in ("train", "val")}
    assert min(map(len, splits.values())) > 10
    tokens = tokenizer.gpt2(str(data_folder / "gpt2"))
    whole: list[int] = []  # the documents in the order of the source, each from the split that has it next
    for line in source.read_text(encoding="utf-8").splitlines():
        ids = tokens.encode(json.loads(line)["text"]).tolist()
        split = next(split for split in splits.values() if split and split[0] == ids)
        whole += [*split.pop(0), 50256]
    assert len(whole) == entry["tokens"]
    assert hashlib.sha256(np.array(whole, dtype="<u2").tobytes()).hexdigest() == entry["sha256_uint16le"]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
def test_gpt2_in_pieces_equals_the_whole_for_awkward_texts(piece, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 5)
    monkeypatch.setattr(encode, "PIECE", piece)
    draw = random.Random(piece)
    characters = "  \n\n\t\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000''!?.,1234½²éßéíıľℵ中文あの，。、🦊\u0301"
    awkward = [*characters, "'s", "'ll", " '", " the", "n't", "s ", " \n", "<|endoftext|>"]
    bodies = ["".join(draw.choices(awkward, k=60)) for _ in range(150)]
    corpus.prepare(
        [rows(tmp_path, "x.jsonl", bodies)], tmp_path / "out", kind="gpt2", gpt2_bpe=str(data_folder / "gpt2")
    )
    tokens = tokenizer.gpt2(str(data_folder / "gpt2"))
    prepared = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert sorted(prepared) == sorted(tokens.encode(body).tolist() for body in bodies)


def test_gpt2_refuses_a_word_that_would_take_all_memory(data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LONGEST_WORD", 1000)
    monkeypatch.setattr(encode, "PIECE", 100)
    bpe = str(data_folder / "gpt2")
    genome = written(tmp_path, "x.txt", "ACGT" * 1000)
    with pytest.raises(UserError, match="characters without a space"):
        corpus.prepare([genome], tmp_path / "out", kind="gpt2", gpt2_bpe=bpe)
    assert not (tmp_path / "out").exists()
    chinese = written(
        tmp_path, "y.txt", "滚滚长江东逝水，浪花淘尽英雄。" * 1000
    )  # no space, but places to cut
    corpus.prepare([chinese], tmp_path / "out", kind="gpt2", gpt2_bpe=bpe)


# ----------------------------------------------------------------------------- refusals and interruptions


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        ("", {}, "empty"),
        ("a", {}, "has 1 character; there is nothing to learn"),
        ("a" * 1000, {}, "'a' over and over"),
        ("ab" * 50, {"val_fraction": 0.0}, "must lie between 0 and 1"),
        ("ab" * 50, {"val_fraction": 1.0}, "must lie between 0 and 1"),
        ("ab" * 50, {"val_fraction": float("nan")}, "must lie between 0 and 1"),
        ("ab" * 50, {"val_fraction": 0.999}, "leaves train without any text"),
        ("ab" * 50, {"val_fraction": 1e-20}, "leaves val without any text"),
        ("ab" * 50, {"kind": "gpt2", "gpt2_bpe": "nowhere"}, "no GPT-2 merges"),
    ],
)
def test_a_hopeless_text_is_refused_and_nothing_written(body, options, reason, tmp_path):
    path = written(tmp_path, "x.txt", body)
    with pytest.raises(UserError, match=reason):
        corpus.prepare([path], tmp_path / "deep" / "out", **options)
    assert not (tmp_path / "deep").exists()


def test_documents_that_leave_a_split_empty_are_refused(tmp_path):
    same = rows(tmp_path, "x.jsonl", ["the same document"] * 200)
    with pytest.raises(UserError, match=r"leaves val without any text \(200 documents"):
        corpus.prepare([same], tmp_path / "out")
    empty = rows(tmp_path, "y.jsonl", ["", ""])
    with pytest.raises(UserError, match="has 0 characters"):
        corpus.prepare([empty], tmp_path / "out")
    (tmp_path / "folder").mkdir()
    written(tmp_path, "folder/x.txt", "")
    with pytest.raises(UserError, match=r"no text in .*folder; skipped folder/x\.txt: empty$"):
        corpus.prepare([tmp_path / "folder"], tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        corpus.prepare([same], same)
    assert not (tmp_path / "out").exists()


def test_its_own_files_are_not_taken_for_text(tmp_path):
    written(tmp_path, "mine/input.txt", words(500))
    summaries = [corpus.prepare([tmp_path / "mine"], tmp_path / "mine") for _ in range(2)]
    assert [len(summary.texts.sources) for summary in summaries] == [1, 1]
    assert summaries[0].meta == summaries[1].meta


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Let `files.<function>` fail when it is called for the time `call` (from 0)."""
    real, calls = getattr(files, function), iter(range(10_000))

    def failing(*arguments):
        if next(calls) == call:
            raise Crash
        return real(*arguments)

    monkeypatch.setattr(files, function, failing)


@pytest.mark.parametrize(
    ("function", "call"), [("rename", i) for i in range(4)] + [("sync", i) for i in range(9)]
)
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_run_leaves_the_old_data_or_none(function, call, before, novel, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if before:
        corpus.prepare([written(tmp_path, "old.txt", "old text " * 100)], out)
    old = state(out)
    crash_at(monkeypatch, function, call)
    with pytest.raises(Crash):
        corpus.prepare([novel], out)
    monkeypatch.undo()
    left = state(out)
    assert not [name for name in left if files.TEMPORARY in name]
    if "train.bin" in left:  # all of the old, or all of the new when only its last flush failed
        if left != old:
            corpus.prepare([novel], tmp_path / "new")
            assert left == state(tmp_path / "new")
    else:
        with pytest.raises(UserError):
            data.load(out)
    assert before or left or not out.exists()
    corpus.prepare([novel], out)
    data.load(out)


def test_a_killed_run_leaves_nothing_loadable_and_the_next_one_cleans_up(novel, tmp_path):
    out = tmp_path / "out"
    for kill_at in range(4):
        code = (
            "import os, sys; from pathlib import Path; from nanogpt import files\n"
            "from nanogpt.prepare import corpus\n"
            "real, calls = files.rename, iter(range(9))\n"
            f"files.rename = lambda a, b: os._exit(9) if next(calls) == {kill_at} else real(a, b)\n"
            "corpus.prepare([Path(sys.argv[1])], Path(sys.argv[2]))"
        )
        run = subprocess.run([sys.executable, "-c", code, str(novel), str(out)], cwd=ROOT, check=False)
        assert run.returncode == 9
        assert (out / shards.UNFINISHED).is_dir()
        with pytest.raises(UserError):
            data.load(out)
    corpus.prepare([novel], out)
    assert sorted(state(out)) == sorted(corpus.NAMES)
    data.load(out)
