"""Formats recognized by content: read in any compression, or rejected by name, never by an encoding."""

import bz2
import gzip
import io
import lzma
import random
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from nanogpt.errors import UserError
from nanogpt.prepare import corpus, formats, text_files
from tests.conftest import documents, words
from tests.test_readers import BODIES, lines
from tests.texts import chinese_novel, languages

TEXT = words(3000)
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
PACK["lzma"] = lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["book.txt.{}", "book.{}", "book.txt"])
def test_compressed_text_is_read_whatever_its_name(packed, name, tmp_path):
    path = tmp_path / name.format(packed)
    path.write_bytes(PACK[packed](TEXT.encode()))
    assert documents(text_files.find([path])) == [TEXT]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["rows.jsonl.{}", "rows.ndjson.{}", "rows.{}", "rows.txt"])
def test_compressed_rows_are_rows_whatever_their_name(packed, name, tmp_path):
    path = tmp_path / name.format(packed)
    path.write_bytes(PACK[packed](lines(BODIES)))
    assert documents(text_files.find([path])) == BODIES


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030"])
@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_encodings_are_recognized_in_compressed_text(encoding, packed, tmp_path):
    path = tmp_path / f"novel.txt.{packed}"
    path.write_bytes(PACK[packed](chinese_novel(6000).encode(encoding)))
    assert documents(text_files.find([path])) == [chinese_novel(6000)]


def test_several_members_and_skippable_frames_are_read(tmp_path):
    first, second = TEXT[:5000].encode(), TEXT[5000:].encode()
    for packed in ("gz", "bz2", "xz", "zst"):
        path = tmp_path / f"two.txt.{packed}"
        path.write_bytes(PACK[packed](first) + PACK[packed](second))
        assert documents(text_files.find([path])) == [TEXT]
    path = tmp_path / "pzstd.txt.zst"  # parallel zstd writes sizes into frames to be skipped
    path.write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0size" + zstandard.compress(TEXT.encode()))
    assert documents(text_files.find([path])) == [TEXT]


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("after", ["text", "damaged"])
def test_what_follows_a_compressed_text_is_not_left_out(packed, after, tmp_path):
    """Other programs ignore it; Python's readers of bzip2 and xz do so without a word."""
    path, first, second = tmp_path / f"x.txt.{packed}", *map(PACK[packed], (TEXT.encode(), b"more"))
    path.write_bytes(first + (b"appended" if after == "text" else bytes([second[0] ^ 1]) + second[1:]))
    with pytest.raises(UserError, match=rf"x\.txt\.{packed} is damaged or partially downloaded"):
        documents(text_files.find([path]))


def test_padding_between_streams_is_skipped(tmp_path):
    for packed in ("gz", "bz2", "xz"):
        path = tmp_path / f"padded.txt.{packed}"
        first, second = (PACK[packed](part.encode()) for part in (TEXT[:50], TEXT[50:]))
        path.write_bytes(first + bytes(8) + second + bytes(4))
        assert documents(text_files.find([path])) == [TEXT]


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("name", ["book.txt", "table.csv", "array.json"])
def test_truncated_compressed_files_are_errors_also_in_folders(packed, name, tmp_path):
    content = random.Random(0).randbytes(30_000).hex().encode()
    (tmp_path / f"{name}.{packed}").write_bytes(PACK[packed](content)[:-40])
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}\.{packed} is damaged or partially downloaded \(.*again"):
        text_files.find([tmp_path])


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_what_unpacks_to_much_more_is_read_in_bounded_memory(packed, tmp_path):
    path = tmp_path / f"zeros.{packed}"
    path.write_bytes(PACK[packed](bytes(100 << 20)))
    sizes = [len(block) for block in formats.unpacked(path)]
    assert sum(sizes) == 100 << 20 and max(sizes) <= 17 << 20


def zipped(*names: str, content: str = "text") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("book.txt"))
    return file.getvalue()


def old_tar(name: str, content: bytes) -> bytes:
    """Return an archive as tar wrote it before POSIX, as `tar --format=v7` does."""
    fields = [b"0000644\0", b"0001750\0", b"0001750\0", b"%011o\0" % len(content), b"14000000000\0"]
    start, end = name.encode().ljust(100, b"\0") + b"".join(fields), b"0".ljust(512 - 156, b"\0")
    total = sum(start) + 8 * ord(" ") + sum(end)
    return start + b"%06o\0 " % total + end + content + bytes(-len(content) % 512 + 1024)


NOISE = random.Random(1).randbytes(4000)
NOT_TEXT = {
    "a PDF file": b"%PDF-1.7\n%\xe2\xe3\n" + NOISE,
    "an RTF document": rb"{\rtf1\ansi Some text.}" * 50,
    "a PostScript file": b"%!PS-Adobe-3.0\n" * 50,
    "a Word document": zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"),
    "an Excel workbook": zipped("[Content_Types].xml", "xl/workbook.xml"),
    "an EPUB book": zipped("mimetype", content="application/epub+zip"),
    "an OpenDocument file": zipped("mimetype", content="application/vnd.oasis.opendocument.text"),
    "a zip archive": zipped("book.txt"),
    "a PyTorch file": zipped("archive/data.pkl"),
    "an image: not text": b"GIF89a" + NOISE,
    "an image, sound or video": b"RIFF\0\0\1\0WEBPVP8 " + NOISE,
    "sound or video": b"ID3\4\0" + NOISE,
    "an archive": b"7z\xbc\xaf\x27\x1c" + NOISE,
    "a tar archive": tar(),
    "a tar": old_tar("poems/first.txt", b"Night and day.\n" * 99),
    "a program": b"\x7fELF\2\1\1" + NOISE,
    "a Python pickle": b"\x80\4\x95" + NOISE,
    "a WARC archive": b"WARC/1.0\r\nWARC-Type: warcinfo\r\n" * 20,
    "an HDF5 or Avro file": b"\x89HDF\r\n\x1a\n" + NOISE,
    "weights of a model": b"GGUF\3\0\0\0" + NOISE,
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "binary data": NOISE,
    "compressed twice": gzip.compress(gzip.compress(b"text")),
    "a compressed table": gzip.compress(b"PAR1" + NOISE),
}


@pytest.mark.parametrize("what", NOT_TEXT)
@pytest.mark.parametrize("encoding", ["", "latin-1"])
def test_other_formats_are_named_and_never_read_in_another_encoding(what, encoding, tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(NOT_TEXT[what])
    with pytest.raises(UserError, match=what) as caught:
        corpus.prepare([path], tmp_path / "out", encoding=encoding)
    assert "--encoding" not in str(caught.value) and not (tmp_path / "out").exists()
    if "compressed" not in what:
        (tmp_path / "book.txt.gz").write_bytes(gzip.compress(NOT_TEXT[what]))
        with pytest.raises(UserError, match=what):
            corpus.prepare([tmp_path / "book.txt.gz"], tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize(
    "start", ["RIFF is a format.", "ORC", "BZh", "ID3 tags", "PK", "MZ", "Obj", "GIF8", "ftyp"]
)
def test_text_that_begins_like_the_name_of_a_format_is_text(start, tmp_path):
    (tmp_path / "x.txt").write_text(start + "\n" + TEXT, encoding="utf-8")
    assert documents(text_files.find([tmp_path / "x.txt"])) == [start + "\n" + TEXT]


# ----------------------------------------------------------------------------- bytes that are not text


DAMAGE = {  # bytes put into a text, and the number of bytes that are undecodable
    "one byte": ("utf-8", b"\xff", 1),
    "three bytes": ("utf-8", b"\xff\xfe\xfd", 3),
    "half a character": ("utf-8", b"\xe4\xb8", 2),
    "encoded surrogate": ("utf-8", b"\xed\xa0\x80", 3),
    "in GB18030": ("gb18030", b"\xff", 1),
    "in UTF-16": ("utf-16", b"\0\xd8", 2),
}


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("packed", [False, True])
def test_undecodable_bytes_are_refused_replaced_or_dropped_and_counted(what, packed, tmp_path, monkeypatch):
    encoding, damage, count = DAMAGE[what]
    first, second = chinese_novel(4000), chinese_novel(5000)[4000:]
    start = first.encode(encoding)
    content = start + damage + (second.encode(encoding.replace("utf-16", "utf-16-le")))
    path = tmp_path / ("x.txt.gz" if packed else "x.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=r"--on_undecodable=replace|is not utf-16-le"):
        corpus.prepare([path], tmp_path / "out")
    for option, instead in (("replace", "\ufffd"), ("drop", "")):
        summary = corpus.prepare([path], tmp_path / "out", on_undecodable=option)
        said = "\n".join(summary.lines())
        action = "dropped" if option == "drop" else "replaced by U+FFFD"
        assert f"{path.name}: {count} undecodable bytes {action}, the first at offset {len(start):,}" in said
        found = documents(summary.texts)[0]
        assert found.replace("\ufffd", "") == first + second
        assert instead == "" or 1 <= found.count(instead) <= count


OTHER_ENCODINGS = {"latin-1": "deu_1901", "cp437": "deu_1901", "koi8-r": "rus", "cp1253": "ell_monotonic"}
OTHER_ENCODINGS |= {"shift_jis": "jpn", "euc-jp": "jpn", "euc-kr": "kor", "big5": "cmn_hant", "cp874": "tha"}


@pytest.mark.parametrize("encoding", OTHER_ENCODINGS)
def test_a_text_in_another_encoding_is_not_replaced_to_nothing(encoding, tmp_path):
    body = languages(4000)[OTHER_ENCODINGS[encoding]]
    (tmp_path / "x.txt").write_bytes(body.encode(encoding, "ignore"))
    with pytest.raises(UserError, match=r"of the first [\d,]+ bytes is neither UTF-8.*--encoding="):
        text_files.find([tmp_path / "x.txt"], on_undecodable="replace")


def test_control_characters_of_a_wrong_encoding_are_reported(tmp_path):
    (tmp_path / "x.txt").write_bytes("He said \u201chello\u201d to me \u2014 twice.\n".encode("cp1252") * 30)
    said = "\n".join(corpus.prepare([tmp_path / "x.txt"], tmp_path / "out", encoding="latin-1").lines())
    assert "x.txt: 90 control characters, as if its encoding were not latin-1" in said
    said = "\n".join(corpus.prepare([tmp_path / "x.txt"], tmp_path / "out", encoding="cp1252").lines())
    assert "control characters" not in said


# ----------------------------------------------------------------------------- folders


def test_linked_folders_are_followed_once(tmp_path):
    for folder in ("real", "outside/deep", "given"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "real" / "a.txt").write_text("of a", encoding="utf-8")
    (tmp_path / "outside" / "deep" / "b.txt").write_text("of b", encoding="utf-8")
    (tmp_path / "given" / "c.txt").write_text("of c", encoding="utf-8")
    links = {"one": "../real", "two": "../real", "loop": "../given", "up": "..", "far": "../outside"}
    for name, target in links.items():
        (tmp_path / "given" / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "outside" / "back").symlink_to("../given", target_is_directory=True)
    assert sorted(documents(text_files.find([tmp_path / "given"]))) == ["of a", "of b", "of c"]


def test_one_nul_character_does_not_cost_a_file_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[:500] + "\0" + TEXT[500:], encoding="utf-8")
    assert len(text_files.find([tmp_path]).sources) == 1


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_a_table_by_name_only_is_rejected(name, tmp_path):
    (tmp_path / name).write_text("<!DOCTYPE html><title>404</title>", encoding="utf-8")
    with pytest.raises(UserError, match="neither a Parquet nor an Arrow file"):
        text_files.find([tmp_path / name])


def test_rows_of_json_without_the_field_are_reported(tmp_path):
    path: Path = tmp_path / "x.txt"
    path.write_bytes(lines(BODIES).replace(b'"text"', b'"body"'))
    summary = corpus.prepare([path], tmp_path / "out", kind="byte")
    assert "looks like rows of JSON without `text`" in "\n".join(summary.lines())
    assert documents(text_files.find([path], text_key="body"), "body") == BODIES


def test_documented_refusals_are_those_of_the_program():
    root = Path(__file__).resolve().parent.parent
    table = (
        (root / "docs" / "data.md").read_text(encoding="utf-8").split("## Forty formats")[1].split("\n## ")[0]
    )
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", table, re.M)[1:]
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((root / "nanogpt").glob("*/*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    quoted = [
        said for _, result in rows for said in re.findall(r"`([^`]+)`", result) if not said.startswith("--")
    ]
    assert len(rows) >= 40 and sum(result.startswith("not known") for _, result in rows) <= 5
    assert [said for said in quoted if said not in code.replace("`", "")] == []
