"""Dataset preparation: correct ids in the correct split, bounded memory, and no partial output."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanogpt import files
from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.prepare import corpus, encode, formats, shards
from nanogpt.tokenizer import tokenizer
from tests import texts
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
    """Return the ids between the end_of_text tokens of a BPE split."""
    ids = ids_of(out, split)
    end = tokenizer.from_file(out).end_of_text
    ends = np.flatnonzero(ids == end)
    assert ends[-1] == len(ids) - 1
    return [part[part != end].tolist() for part in np.split(ids, ends + 1)[:-1]]


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable fsync; no test here simulates a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    return written(tmp_path, "novel.txt", words(2000))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiny blocks and pieces, so that errors at their boundaries show."""
    monkeypatch.setattr(formats, "BLOCK", 61)
    monkeypatch.setattr(encode, "PIECE", 37)


# ----------------------------------------------------------------------------- output files


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_single_text_is_split_as_in_nanogpt(kind, tmp_path, small_pieces):
    body = words(300) + "Ende gut, alles gut: 三国演义 🦊"
    out = tmp_path / "out"
    corpus.prepare([written(tmp_path, "x.txt", body)], out, kind=kind)
    cut = int(len(body) * 0.9)
    assert (text_of(out, "train"), text_of(out, "val")) == (body[:cut], body[cut:])


def test_meta_describes_the_files(novel, tmp_path):
    out = tmp_path / "out"
    summary = corpus.prepare([novel], out, kind="byte", val_fraction=0.25)
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert meta == summary.meta and meta["format"] == loader.FORMAT
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


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300", "gpt2"])
def test_loader_opens_prepared_datasets(kind, novel, tmp_path, of_kind):
    summary = corpus.prepare([novel], tmp_path / "out", **of_kind(kind))
    dataset = loader.load(tmp_path / "out")
    assert dataset.vocab_size == summary.tokenizer.vocab_size
    assert dataset.fingerprint == tokenizer.fingerprint(summary.tokenizer)
    assert len(dataset.train) == summary.meta["splits"]["train"]["tokens"]


def test_same_text_gives_identical_files(novel, tmp_path, small_pieces):
    corpus.prepare([novel], tmp_path / "a")
    (tmp_path / "b").mkdir()
    written(tmp_path / "b", "prepare.py", "mine")
    corpus.prepare([novel], tmp_path / "b")
    corpus.prepare([novel], tmp_path / "b")
    assert state(tmp_path / "b") == {**state(tmp_path / "a"), "prepare.py": b"mine"}


def test_vocabulary_beyond_uint16_is_written_as_uint32(tmp_path):
    body = "".join(chr(point) for point in range(0x20000, 0x20000 + 65_537)) * 2
    summary = corpus.prepare([written(tmp_path, "x.txt", body)], tmp_path / "out", kind="char")
    assert (summary.meta["dtype"], summary.meta["vocab_size"]) == ("uint32", 65_537)
    assert text_of(tmp_path / "out", "train") + text_of(tmp_path / "out", "val") == body
    corpus.prepare([written(tmp_path, "x.txt", body[:-1] + body[:-1])], tmp_path / "out", kind="char")
    assert loader.load(tmp_path / "out").vocab_size == 65_537


def test_byte_tokens_are_the_default_for_a_huge_alphabet(tmp_path):
    for size, kind in ((19_999, "char"), (20_000, "byte")):
        body = "".join(chr(point) for point in range(0x20000, 0x20000 + size))
        summary = corpus.prepare([written(tmp_path, "x.txt", body)], tmp_path / "out")
        assert summary.tokenizer.kind == kind
        assert any("using byte tokens" in line for line in summary.lines()) == (kind == "byte")


def test_summary_contents(tmp_path):
    for i in range(12):
        written(tmp_path, f"in/{i:02}.txt", "")
    written(tmp_path, "in/good.txt", words(50).replace("\n", "\r\n"))
    written(tmp_path, "in/rows.jsonl", '{"text": ""}\n{"text": "abc"}\n')
    lines = "\n".join(corpus.prepare([tmp_path / "in"], tmp_path / "out").lines())
    assert "2 files, 2 documents" in lines
    assert lines.count("newlines normalized to \\n") == 1
    assert lines.count(".txt: empty") == 10 and "skipped 2 more files" in lines
    assert "skipped 1 empty row" in lines


# ----------------------------------------------------------------------------- documents and splits


def test_few_documents_are_split_individually_and_joined_by_newlines(tmp_path, small_pieces):
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


def test_separator_newline_is_in_the_vocabulary(tmp_path):
    summary = corpus.prepare([rows(tmp_path, "x.jsonl", ["abab", "baba"])], tmp_path / "out", kind="char")
    assert summary.tokenizer.vocab_size == 3
    assert text_of(tmp_path / "out", "train") == "aba\nbab\n"
    summary = corpus.prepare([rows(tmp_path, "x.jsonl", ["abab"])], tmp_path / "out", kind="char")
    assert summary.tokenizer.vocab_size == 2


def test_split_of_whole_documents_is_independent_of_order(tmp_path):
    bodies = [f"document {i} {words(10, seed=i)}" for i in range(300)]

    def side(bodies: list[str]) -> dict[str, str]:
        corpus.prepare([rows(tmp_path, "x.jsonl", bodies)], tmp_path / "out", val_fraction=0.2)
        texts = {split: text_of(tmp_path / "out", split) for split in ("train", "val")}
        assert sum(map(len, texts.values())) == sum(map(len, bodies))  # all in one split
        return {body: split for split, whole in texts.items() for body in bodies if body in whole}

    first = side(bodies)
    assert 30 <= list(first.values()).count("val") <= 90  # expected: 60, standard deviation 7
    assert side(bodies[::-1]) == first
    more = side([f"another {words(10, seed=1000 + i)}" for i in range(200)] + bodies + bodies[:50])
    assert {body: more[body] for body in bodies} == first

    for i, body in enumerate(bodies):
        written(tmp_path, f"in/{i}.txt", body.replace("\n", "\r\n"))
    corpus.prepare([tmp_path / "in"], tmp_path / "out", val_fraction=0.2)
    texts = {split: text_of(tmp_path / "out", split) for split in ("train", "val")}
    assert all(body in texts[first[body]] for body in bodies)


# ----------------------------------------------------------------------------- BPE


def documents_with(out: Path, files: list[Path], folder: Path, options: dict) -> list[list[int]]:
    """Prepare `files` with enough filler that each file goes to one split whole; return all documents."""
    filler = rows(folder, "filler.jsonl", [f"filler {i}" for i in range(100)])
    corpus.prepare([*files, filler], out, **options)
    return documents_of(out, "train") + documents_of(out, "val")


@pytest.mark.parametrize("kind", ["bpe:500", "gpt2"])
def test_bpe_in_pieces_equals_bpe_of_the_whole_file(kind, of_kind, tmp_path, small_pieces):
    bodies = {name: content.decode("utf-8", "ignore") for name, content in texts.awkward().items()}
    plain = {n: body for n, body in bodies.items() if body and "\r" not in body and body[0] != "\ufeff"}
    assert len(plain) > 15
    files = [written(tmp_path, name, body) for name, body in plain.items()]
    prepared = documents_with(tmp_path / "out", files, tmp_path, of_kind(kind))
    tokens = tokenizer.from_file(tmp_path / "out")
    assert all(tokens.encode(body).tolist() in prepared for body in plain.values())


def test_gpt2_in_pieces_gives_the_published_ids(real, of_kind, tmp_path, small_pieces):
    published = json.loads(real("gpt2/expected_tokens.json").read_text(encoding="utf-8"))
    chosen = {}
    for name, entry in published.items():
        if " " not in name and "[" not in name:
            content = real(name).read_bytes()
            if content and b"\r" not in content and not content.startswith(b"\xef\xbb\xbf"):
                chosen[name] = entry["sha256_uint16le"]
    assert len(chosen) == 17
    prepared = documents_with(tmp_path / "out", [*map(real, chosen)], tmp_path, of_kind("gpt2"))
    hashes = {hashlib.sha256(np.array(ids, dtype="<u2").tobytes()).hexdigest() for ids in prepared}
    assert set(chosen.values()) <= hashes


def in_order(out: Path, bodies: list[str]) -> list[int]:
    """Return the documents of a dataset in the order of `bodies`, each taken from the split it is next in."""
    tokens = tokenizer.from_file(out)
    splits = {split: documents_of(out, split) for split in ("train", "val")}
    assert min(map(len, splits.values())) > 10
    whole: list[int] = []
    for body in bodies:
        ids = tokens.encode(body).tolist()
        split = next(split for split in splits.values() if split and split[0] == ids)
        whole += [*split.pop(0), tokens.end_of_text]
    assert not any(splits.values())
    return whole


@pytest.mark.parametrize("kind", ["bpe:500", "gpt2"])
def test_bpe_rows_keep_their_order_and_end_with_end_of_text(kind, of_kind, tmp_path):
    pages = texts.web_pages(200)
    summary = corpus.prepare([rows(tmp_path, "x.jsonl", pages)], tmp_path / "out", **of_kind(kind))
    splits = summary.meta["splits"].values()
    assert len(in_order(tmp_path / "out", pages)) == sum(split["tokens"] for split in splits)


def test_gpt2_rows_have_the_published_ids(real, of_kind, tmp_path):
    published = json.loads(real("gpt2/expected_tokens.json").read_text(encoding="utf-8"))
    entry = published["english/sample.jsonl (each text + 50256)"]
    source = real("english/sample.jsonl")
    corpus.prepare([source], tmp_path / "out", **of_kind("gpt2"))
    lines = source.read_text(encoding="utf-8").splitlines()
    whole = in_order(tmp_path / "out", [json.loads(line)["text"] for line in lines])
    assert len(whole) == entry["tokens"]
    assert hashlib.sha256(np.array(whole, dtype="<u2").tobytes()).hexdigest() == entry["sha256_uint16le"]


@pytest.mark.parametrize("kind", ["bpe:400", "gpt2"])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
def test_bpe_in_pieces_equals_bpe_of_the_whole_for_awkward_texts(piece, kind, of_kind, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 5)
    monkeypatch.setattr(encode, "PIECE", piece)
    draw = random.Random(piece)
    characters = "  \n\n\t\x0b\x1c\x1f\x85\xa0\u2003\u2028\u3000''!?.,1234½²éßéíıľℵ中文あの，。、🦊\u0301"
    awkward = [*characters, "'s", "'ll", " '", " the", "n't", "s ", " \n", "<|endoftext|>"]
    bodies = ["".join(draw.choices(awkward, k=60)) for _ in range(150)]
    corpus.prepare([rows(tmp_path, "x.jsonl", bodies)], tmp_path / "out", **of_kind(kind))
    tokens = tokenizer.from_file(tmp_path / "out")
    prepared = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert sorted(prepared) == sorted(tokens.encode(body).tolist() for body in bodies)


@pytest.mark.parametrize("kind", ["bpe:300", "gpt2"])
def test_overlong_word_is_rejected(kind, of_kind, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LONGEST_WORD", 1000)
    monkeypatch.setattr(encode, "PIECE", 100)
    genome = written(tmp_path, "x.txt", "ACGT" * 1000)
    with pytest.raises(UserError, match="characters without a space"):
        corpus.prepare([genome], tmp_path / "out", **of_kind(kind))
    assert not (tmp_path / "out").exists()
    chinese = written(
        tmp_path, "y.txt", "滚滚长江东逝水，浪花淘尽英雄。" * 1000
    )  # without spaces, but with places to cut
    corpus.prepare([chinese], tmp_path / "out", **of_kind(kind))


# ----------------------------------------------------------------------------- errors and interruptions


@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        ("", {}, "empty"),
        ("a", {}, "has 1 character; at least 2 are needed"),
        ("a" * 1000, {}, "consists of 'a' only"),
        ("ab" * 50, {"val_fraction": 0.0}, "must lie between 0 and 1"),
        ("ab" * 50, {"val_fraction": 1.0}, "must lie between 0 and 1"),
        ("ab" * 50, {"val_fraction": float("nan")}, "must lie between 0 and 1"),
        ("ab" * 50, {"val_fraction": 0.999}, "leaves train empty"),
        ("ab" * 50, {"val_fraction": 1e-20}, "leaves val empty"),
        ("ab" * 50, {"kind": "gpt2", "gpt2_bpe": "nowhere"}, "no GPT-2 merges"),
    ],
)
def test_unusable_text_is_rejected_and_nothing_written(body, options, reason, tmp_path):
    path = written(tmp_path, "x.txt", body)
    with pytest.raises(UserError, match=reason):
        corpus.prepare([path], tmp_path / "deep" / "out", **options)
    assert not (tmp_path / "deep").exists()


def test_empty_split_is_rejected(tmp_path):
    same = rows(tmp_path, "x.jsonl", ["the same document"] * 200)
    with pytest.raises(UserError, match=r"leaves val empty \(200 documents"):
        corpus.prepare([same], tmp_path / "out")
    empty = rows(tmp_path, "y.jsonl", ["", ""])
    with pytest.raises(UserError, match="has 0 characters"):
        corpus.prepare([empty], tmp_path / "out")
    (tmp_path / "folder").mkdir()
    written(tmp_path, "folder/x.txt", "")
    with pytest.raises(UserError, match=r"no text found in .*folder; skipped folder/x\.txt: empty$"):
        corpus.prepare([tmp_path / "folder"], tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        corpus.prepare([same], same)
    assert not (tmp_path / "out").exists()


def test_own_output_files_are_not_read_as_text(tmp_path):
    written(tmp_path, "mine/input.txt", words(500))
    summaries = [corpus.prepare([tmp_path / "mine"], tmp_path / "mine") for _ in range(2)]
    assert [len(summary.texts.sources) for summary in summaries] == [1, 1]
    assert summaries[0].meta == summaries[1].meta


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int) -> None:
    """Make call number `call` (from 0) of `files.<function>` raise Crash."""
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
def test_interrupted_run_leaves_the_old_data_or_none(function, call, before, novel, tmp_path, monkeypatch):
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
    if "train.bin" in left:  # all old files, or all new ones if only the last fsync failed
        if left != old:
            corpus.prepare([novel], tmp_path / "new")
            assert left == state(tmp_path / "new")
    else:
        with pytest.raises(UserError):
            loader.load(out)
    assert before or left or not out.exists()
    corpus.prepare([novel], out)
    loader.load(out)


def test_killed_run_leaves_nothing_loadable_and_is_cleaned_up(novel, tmp_path):
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
            loader.load(out)
    corpus.prepare([novel], out)
    assert sorted(state(out)) == sorted(corpus.NAMES)
    loader.load(out)
