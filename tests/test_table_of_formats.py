"""Every row of the table of formats in docs/data.md: its files are read, or refused with the text quoted."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import zstandard

from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.prepare import corpus, encode, shards
from nanogpt.tokenizer import bpe
from tests.conftest import words
from tests.test_readers import write_arrow

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"Line {i} of a small text, {words(5, i)}.\n" for i in range(200))
CHINESE = "这是一个中文句子，模型应该学到它。他不在这里的时候，我们上了山。\n" * 60
ROWS = [{"id": i, "text": line} for i, line in enumerate(TEXT.splitlines())]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
RANDOM = np.random.default_rng(0).bytes(5000)
IDS = np.random.default_rng(0).integers(0, 300, 5000).astype("<u2")
TABLE = pa.table({"text": [row["text"] for row in ROWS]})
PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zst": zstandard.compress,
    "zstd": zstandard.compress,
}
Write = bytes | Callable[[Path], object]  # the content of a file, or a function that writes it


def csv(separator: str) -> bytes:
    return (f"id{separator}text\n" + "".join(f"{i}{separator}a text of words\n" for i in range(50))).encode()


def archive(*names: str, mode: str = "w") -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, mode, zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(zipfile.ZipInfo(name), TEXT)  # stored, as mimetype must be

    return write


def tar(mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(mode=mode, fileobj=buffer) as file:
        about = tarfile.TarInfo("a.txt")
        about.size = len(TEXT)
        file.addfile(about, io.BytesIO(TEXT.encode()))
    return buffer.getvalue()


def parquet(column: pa.Array | pa.ChunkedArray) -> Write:
    return lambda path: pq.write_table(pa.table({"text": column}), path)


def database(path: Path) -> None:
    with sqlite3.connect(path) as made:
        made.execute("create table t (a text)")
    made.close()


def saved(path: Path) -> None:
    import datasets

    part = datasets.Dataset.from_dict({"text": [row["text"] for row in ROWS]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(path)


def tokens(start: bytes) -> Write:
    def write(path: Path) -> None:
        path.mkdir()
        for split in ("train", "val"):
            (path / f"x_{split}_0.bin").write_bytes(start + IDS.tobytes())

    return write


def arrays(path: Path) -> None:
    path.mkdir()
    for split in ("train", "val"):
        np.save(path / f"x_{split}_0.npy", IDS)


FILES: dict[str, dict[str, Write]] = {
    "text in UTF-8, with or without a byte order mark": {
        "a.txt": TEXT.encode(),
        "b": TEXT.encode("utf-8-sig"),
    },
    "text in UTF-16 or UTF-32": {
        f"{e}.txt": TEXT.encode(e) for e in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
    },
    "text in GB18030, GBK or GB 2312": {f"{e}.txt": CHINESE.encode(e) for e in ("gb18030", "gbk", "gb2312")},
    "text in latin-1, cp1252, Shift-JIS, Big5, EUC-KR, KOI8-R, ...": {
        "1.txt": "Où est le café français à Orléans ?\n".encode("latin-1") * 50,
        "2.txt": "“Où” est — l’été ?\n".encode("cp1252") * 50,
        "3.txt": "これは日本語の文章です。私は毎日本を読みます。\n".encode("shift-jis") * 50,
        "4.txt": "這是一個繁體中文的句子，他們都在學校裡。\n".encode("big5") * 50,
        "5.txt": "이것은 한국어 문장입니다.\n".encode("euc-kr") * 50,
        "6.txt": "Это русский текст.\n".encode("koi8-r") * 50,
    },
    "text in ISO-2022-JP or ISO-2022-KR": {
        "1.txt": "件名: 会議の議題\n".encode("iso2022_jp") * 50,
        "2.txt": "회의 의제\n".encode("iso2022_kr") * 50,
    },
    "Markdown, HTML, XML, LaTeX, source code": {
        "a.md": b"# Title\n\nText [1].\n" * 50,
        "a.html": b"<html><p>Text</p></html>\n" * 50,
        "a.xml": b"<?xml version='1.0'?><a>Text</a>\n" * 50,
        "a.tex": b"\\section{Text} text\n" * 50,
        "a.py": b"def text():\n    return 1\n" * 50,
    },
    "`.jsonl`, `.ndjson`": {"a.jsonl": JSONL.encode(), "a.ndjson": JSONL.encode()},
    "`.json`: an array, or objects one after another": {
        "a.json": json.dumps(ROWS).encode(),
        "b.json": "".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    },
    "`.json`: one object that holds the rows": {"a.json": json.dumps({"data": ROWS}).encode()},
    "`.csv`, `.tsv`": {"a.csv": csv(","), "b.csv": csv(";"), "a.tsv": csv("\t")},
    "`.csv` without a first line of names": {"a.csv": b"1,some words\n2,other words\n"},
    "`.parquet`, also categorical, nested and null columns": {
        "a.parquet": parquet(TABLE["text"]),
        "b.parquet": parquet(TABLE["text"].dictionary_encode()),
        "c.parquet": parquet(pa.array([None, *TABLE["text"].to_pylist()])),
    },
    "Parquet, Arrow: columns of lists, bytes or numbers": {
        "a.parquet": parquet(pa.array([["a", "b"]])),
        "b.parquet": parquet(pa.array([b"a"])),
        "c.arrow": lambda path: write_arrow(path, pa.table({"text": [1]})),
    },
    "`.arrow` stream, as written by datasets": {"a.arrow": lambda path: write_arrow(path, TABLE)},
    "`.arrow` file format, `.feather`": {
        "a.feather": lambda path: pyarrow.feather.write_feather(TABLE, path)
    },
    "DatasetDict or Dataset saved with `save_to_disk`": {"saved": saved},
    "`.gz`, `.bz2`, `.xz`, `.lzma`, `.zst`, `.zstd` of text, JSON or CSV": {
        f"{name}.{kind}": pack(content)
        for kind, pack in PACKERS.items()
        for name, content in (
            ("a.txt", TEXT.encode()),
            ("a.json", json.dumps(ROWS).encode()),
            ("a.csv", csv(",")),
        )
    },
    "compressed twice": {"a.gz": gzip.compress(gzip.compress(TEXT.encode()))},
    "compressed Parquet or Arrow file": {
        "a.parquet.gz": lambda path: (
            pq.write_table(TABLE, path),
            path.write_bytes(gzip.compress(path.read_bytes())),
        )
    },
    "`.tar`, `.tar.gz`": {"a.tar": tar("w"), "a.tar.gz": tar("w:gz"), "a.tar.xz": tar("w:xz")},
    "`.zip`": {"a.zip": archive("a.txt", "b.txt")},
    "`.7z`, `.rar`, `.lz`, `.lz4`": {
        "a.7z": b"7z\xbc\xaf\x27\x1c" + RANDOM,
        "a.rar": b"Rar!\x1a\x07" + RANDOM,
        "a.lz": b"LZIP\x01" + RANDOM,
        "a.lz4": b"\x04\x22M\x18" + RANDOM,
    },
    "PDF": {"a.pdf": b"%PDF-1.7\n" + RANDOM},
    "`.docx`, `.xlsx`, `.pptx`": {"a.docx": archive("[Content_Types].xml", "word/document.xml")},
    "`.doc`, `.xls`": {"a.doc": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + RANDOM},
    "`.odt`": {
        "a.odt": lambda path: zipfile.ZipFile(path, "w").writestr(
            "mimetype", "application/vnd.oasis.opendocument.text"
        )
    },
    "`.rtf`": {"a.rtf": b"{\\rtf1\\ansi Text}"},
    "`.epub`": {
        "a.epub": lambda path: zipfile.ZipFile(path, "w").writestr("mimetype", "application/epub+zip")
    },
    "images, sound, video": {"a.png": b"\x89PNG\r\n\x1a\n" + RANDOM},
    "WARC": {"a.warc": b"WARC/1.0\r\nWARC-Type: response\r\n" * 9},
    "SQLite": {"a.db": database},
    "HDF5, Avro": {"a.h5": b"\x89HDF\r\n\x1a\n" + RANDOM, "a.avro": b"Obj\x01" + RANDOM},
    "pickle, PyTorch `.pt`": {"a.pkl": pickle.dumps({"a": list(range(100))})},
    "`.npy`, llm.c's `.bin`, nanoGPT's `train.bin`": {
        "arrays": arrays,
        "llmc": tokens(shards.header(len(IDS))),
        "bare": tokens(b""),
    },
    "TinyLlama's packed tokens": {"a.bin": b"LITPKDS" + bytes(17) + IDS.tobytes()},
    "other binary files": {"a.bin": RANDOM, "b.txt": RANDOM},
}
IN_OTHER_WORDS = {  # of formats that a row names together
    "a.pt": (lambda path: torch.save({"a": torch.zeros(9)}, path), "a PyTorch file"),
    "a.xlsx": (archive("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook"),
    "a.pptx": (archive("[Content_Types].xml", "ppt/slides.xml"), "a PowerPoint file"),
    "a.mp3": (b"ID3\x03" + RANDOM, "sound or video"),
    "a.mp4": (b"\0\0\0\x18ftypmp42" + RANDOM, "an image, sound or video"),
    "a.jpg": (b"\xff\xd8\xff\xe0" + RANDOM, "an image: not text"),
}


# ----------------------------------------------------------------------------- tokenizers


def byte_level(path: Path) -> None:
    path.write_text(bpe.train([TEXT], 400), encoding="utf-8")


def unigram(path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.save(str(path))


def vocabulary_and_merges(folder: Path) -> None:
    folder.mkdir()
    model = json.loads(bpe.train([TEXT], 400))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")


def word_piece(path: Path) -> None:
    letters = sorted(set(TEXT) - set(" \n"))
    path.write_text("\n".join(["[UNK]", *letters, *(f"##{c}" for c in letters)]), encoding="utf-8")


TOKENIZERS: dict[str, dict[str, Write]] = {
    "tokenizer.json of GPT-2, RoBERTa, Llama 3, Qwen (byte-level BPE)": {"tokenizer.json": byte_level},
    "tokenizer.json of Llama 2, Mistral (BPE with bytes), T5 (Unigram)": {"tokenizer.json": unigram},
    "`vocab.json` and `merges.txt`, OpenAI's `encoder.json` and `vocab.bpe`": {"gpt2": vocabulary_and_merges},
    "`vocab.txt` (WordPiece)": {"vocab.txt": word_piece},
    "SentencePiece `.model`, tiktoken files": {
        "tokenizer.model": b"\n\x0e\n\x05<unk>",
        "cl100k_base.tiktoken": b"IQ== 0\nIg== 1\n",
    },
}


@pytest.mark.parametrize("row", TOKENIZERS)
def test_rows_of_tokenizers_are_true(row, tmp_path):
    result = rows_of_the_table()[row]
    quoted = [said for said in re.findall(r"`([^`]+)`", result) if said != "--lossy"]
    said = re.escape(quoted[0] if quoted else "")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.txt").write_text(CHINESE, encoding="utf-8")
    for name, content in TOKENIZERS[row].items():
        given = {"kind": str(put(tmp_path / name, content)), "lossy": "--lossy" in result}
        if result.startswith("read"):
            summary = corpus.prepare([tmp_path / "a.txt"], tmp_path / "out", **given)
            assert given["lossy"] == any(re.match(said, line) for line in summary.lines() if said)
        if said:
            with pytest.raises(UserError, match=said):
                corpus.prepare([tmp_path / "b.txt"], tmp_path / "out", **given | {"lossy": False})


def test_all_rows_are_tried():
    tried = {*FILES, *TOKENIZERS}
    assert [row for row, result in rows_of_the_table().items() if not result.startswith("not known")] == [
        row for row in rows_of_the_table() if row in tried
    ]


def rows_of_the_table() -> dict[str, str]:
    document = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = document.split("## Forty formats")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.M)[1:])


def put(path: Path, content: Write) -> Path:
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return path


@pytest.mark.parametrize("row", FILES)
def test_rows_of_files_are_true(row, tmp_path):
    result = rows_of_the_table()[row]
    for name, content in FILES[row].items():
        path = put(tmp_path / name, content)
        if result.startswith("read"):
            summary = corpus.prepare([path], tmp_path / "out")
            assert summary.counts.characters > 700 and not summary.texts.skipped[8:]
            if {".csv", ".tsv", ".json", ".jsonl"} & {*path.suffixes}:  # rows: their markup is not text
                characters = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["characters"]
                assert not {*"{}\t;|", *("," if ".csv" in path.suffixes else "")} & {*characters}
        elif result.startswith("token ids"):
            assert len(loader.load(path).train) == len(IDS)
        else:
            said = re.escape(re.findall(r"`([^`]+)`", result)[0])
            with pytest.raises(UserError, match=said.replace("the\\ tokenizer", "tokenizer")) as caught:
                corpus.prepare([path], tmp_path / "out")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", IN_OTHER_WORDS)
def test_formats_of_a_kind_are_named(name, tmp_path):
    content, said = IN_OTHER_WORDS[name]
    with pytest.raises(UserError, match=said):
        corpus.prepare([put(tmp_path / name, content)], tmp_path / "out")


def test_spaces_that_a_tokenizer_adds_between_prompt_and_response_are_refused(tmp_path):
    rows = (json.dumps({"prompt": f"{i} plus 1 is", "response": f" {i + 1}"}) for i in range(50))
    (tmp_path / "x.jsonl").write_text("\n".join(rows), encoding="utf-8")
    kind = str(put(tmp_path / "x.json", unigram))
    said = "between prompt and response.* makes 'a a' of 'a' and 'a'"
    options = {"kind": kind, "text_key": "prompt+response", "val_fraction": 0.3}
    with pytest.raises(UserError, match=said):
        corpus.prepare([tmp_path / "x.jsonl"], tmp_path / "out", **options)
    summary = corpus.prepare([tmp_path / "x.jsonl"], tmp_path / "out", **options, lossy=True)
    assert any(re.search(said, line) for line in summary.lines())


def test_spaces_that_a_tokenizer_adds_within_long_texts_are_reported(tmp_path, monkeypatch):
    """Unigram puts a space before each text that it encodes, so also where a long one is cut."""
    monkeypatch.setattr(encode, "PIECE", 200)
    said = "at each megabyte of a text, the tokenizer makes 'a a' of 'a' and 'a'"
    for name, content in {"long.txt": TEXT, "short.txt": TEXT[:150]}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        kind = str(put(tmp_path / f"{name}.json", unigram))
        summary = corpus.prepare([tmp_path / name], tmp_path / f"{name}.out", kind=kind, lossy=True)
        assert (said in summary.lines()) == (name == "long.txt")
