"""Text reading: correct characters for any encoding and newline; ambiguous files are rejected."""

import codecs
import hashlib
import itertools
import json
import os
import random
import re
from functools import partial
from pathlib import Path

import pytest

from nanogpt.errors import UserError
from nanogpt.prepare import formats, rows, text_files
from tests import texts as ours
from tests.conftest import documents, found
from tests.texts import ENGLISH, GERMAN


def read(paths, **options) -> list[str]:
    """Return the complete documents of `paths`."""
    paths = [paths] if isinstance(paths, Path) else paths
    return documents(text_files.find(paths, **options))


def refusal(paths, **options) -> str:
    with pytest.raises(UserError) as error:
        read(paths, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.fixture(scope="session")
def languages() -> dict[str, list[str]]:
    """Texts of 1,500 characters per language: generated ones, and excerpts of the Universal Declaration."""
    by_language = {language: [body] for language, body in ours.languages().items()}
    if path := found("odd/many_scripts_udhr.txt"):
        parts = re.split(r"(?m)^== (\w+) ==\n", path.read_text(encoding="utf-8"))
        for language, body in zip(parts[1::2], parts[2::2], strict=True):
            by_language.setdefault(language, []).append(body)
    return by_language


NOVELS = {"random": ours.chinese_novel}
if path := found("chinese/sanguo_yanyi.txt"):
    NOVELS["sanguo"] = partial(path.read_text, encoding="utf-8")


@pytest.fixture(scope="session", params=NOVELS)
def novel(request) -> str:
    return NOVELS[request.param]()[:50_000]


# ----------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("block", [1, 3, 4096])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (b"", "utf-16-le"),
        (b"", "utf-16-be"),
        (b"", "gb18030"),
    ],
)
def test_encodings_are_recognized_at_any_block_boundary(mark, encoding, block, novel, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", block)
    chinese = novel[:1500] + "🦊 and English.\n"  # 4 bytes in UTF-8 and GB18030, a pair in UTF-16
    path = written(tmp_path, "x.txt", mark + chinese.encode(encoding))
    assert read(path) == [chinese]
    sizes: list[int] = []
    found = text_files.find([path], advance=sizes.append).sources[0]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(sizes) >= found.bytes  # hashing is progress


def test_every_script_reads_from_utf8_and_utf16(languages, tmp_path):
    for language, bodies in languages.items():
        encodings = ["utf-8", "utf-16", "utf-16-le", "utf-16-be"] + ["gb18030"] * language.startswith("cmn")
        for body, encoding in itertools.product(bodies, encodings):
            path = written(tmp_path, "x.txt", body.encode(encoding))
            assert read(path) == [body], (language, encoding)


@pytest.mark.parametrize(
    ("language", "encoding"),
    [
        ("deu_1901", "latin-1"),
        ("fra", "cp1252"),
        ("spa", "iso8859-15"),
        ("pol", "iso8859-2"),
        ("rus", "cp1251"),
        ("rus", "koi8-r"),
        ("ell_monotonic", "cp1253"),
        ("tur", "cp1254"),
        ("heb", "cp1255"),
        ("arb", "cp1256"),
        ("tha", "tis-620"),
        ("jpn", "shift_jis"),
        ("jpn", "euc-jp"),
        ("kor", "euc-kr"),
        ("cmn_hant", "big5"),
    ],
)
def test_other_encodings_are_rejected_unless_specified(language, encoding, languages, tmp_path):
    for whole in languages[language]:
        body = whole.encode(encoding, "ignore")
        path = written(tmp_path, "x.txt", body)
        said = refusal(path)
        byte, offset = re.search(
            r"byte 0x(..) at offset (\d+) is neither UTF-8 nor UTF-16 nor GB18030", said
        ).groups()
        assert body[int(offset)] == int(byte, 16)
        body[: int(offset)].decode("utf-8")  # valid up to the reported offset
        assert "--encoding=" in said
        assert read(path, encoding=encoding) == [body.decode(encoding)]


def test_text_fragments_are_never_misdetected(languages, novel, tmp_path):
    draw = random.Random(0)
    for body in [novel, *itertools.chain(*languages.values())]:
        start = draw.randrange(len(body) // 2)
        part = body[start : start + 600]
        for encoding in (
            "gb18030",
            "big5",
            "euc-kr",
            "euc-jp",
            "shift_jis",
            "cp1251",
            "latin-1",
            "utf-16-le",
        ):
            path = written(tmp_path, "x.txt", part.encode(encoding, "ignore"))
            try:
                assert read(path) == [part.encode(encoding, "ignore").decode(encoding)], encoding
            except UserError as error:
                assert "is neither" in str(error)


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_kr"])
def test_encodings_of_seven_bits_are_named(encoding, tmp_path):
    body = "会議の議題" if encoding == "iso2022_jp" else "회의 의제"
    path = written(tmp_path, "x.txt", f"Subject: {body}\n".encode(encoding))
    with pytest.raises(UserError, match="contains codes of ISO-2022; set --encoding=iso2022_jp or"):
        read(path)
    assert read(path, encoding=encoding) == [f"Subject: {body}\n"]


def test_a_file_in_utf8_beside_files_in_a_given_encoding_stays_utf8(tmp_path):
    body = "Das Mädchen hört die Vögel.\n"
    plain = "a text of ASCII only: +AGE-\n"  # in UTF-7: a
    for number, data in enumerate(
        (body.encode("cp1252"), body.encode(), plain.encode(), body.encode("cp1252"))
    ):
        written(tmp_path / "mix", f"{number}.txt", data)
    mixed = text_files.find([tmp_path / "mix"], encoding="cp1252")
    assert documents(mixed) == [body, body, plain, body]
    notes = [source.note for source in mixed.sources]
    assert notes == ["", "valid UTF-8, and read as that instead of cp1252", "", ""]
    rows = "".join(json.dumps({"text": body}, ensure_ascii=False) + "\n" for _ in range(3))
    path = written(tmp_path, "x.jsonl", "\n" * 70_000 + rows)
    (source,) = text_files.find([path], encoding="cp1252").sources
    assert source.encoding == "utf-8" and "valid UTF-8" in source.note
    assert read(tmp_path / "mix" / "2.txt", encoding="utf-7") == ["a text of ASCII only: a\n"]
    assert read(written(tmp_path, "a.txt", plain.encode("utf-16-le")), encoding="utf-16-le") == [plain]


def test_the_mark_of_an_encoding_contradicts_another_one(tmp_path):
    swapped = written(tmp_path, "y.txt", "café".encode("utf-16"))
    with pytest.raises(UserError, match="begins with the mark of UTF-16-LE, so it is not utf-16-be"):
        read(swapped, encoding="utf-16-be")
    path = written(tmp_path, "x.txt", "café".encode("utf-8-sig"))
    with pytest.raises(UserError, match="begins with the mark of UTF-8, so it is not cp1252"):
        read(path, encoding="cp1252")
    assert read(path, encoding="utf-8") == ["café"]
    (source,) = text_files.find([written(tmp_path, "z.txt", "café")], encoding="utf8").sources
    assert not source.note


def test_damaged_chinese_text_is_reported_where_its_own_encoding_failed(tmp_path):
    body = ("子曰：學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？" * 50).encode("gb18030")
    path = written(tmp_path, "x.txt", body[:1000] + b"\xff" + body[1000:])
    with pytest.raises(UserError, match="byte 0xff at offset 1000 is neither UTF-8 nor"):
        read(path)


def test_damaged_text_is_rejected_with_its_offset(novel, tmp_path, monkeypatch):
    body = novel.encode("utf-8")
    monkeypatch.setattr(formats, "BLOCK", 1000)
    for at in (5000, 99_999, len(body) - 1):
        path = written(tmp_path, "x.txt", body[:at] + b"\xff" + body[at:])
        offset = int(re.search(r"at offset (\d+)", refusal(path))[1])
        assert at - 3 < offset <= at  # start of the character that the byte corrupts
    assert f"offset {len(body) - 3} " in refusal(written(tmp_path, "x.txt", body[:-1].rstrip(b"\n")[:-1]))
    assert "is not utf-16-le" in refusal(written(tmp_path, "x.txt", codecs.BOM_UTF16_LE + b"a\0\0\xd8b\0"))


def test_specified_encoding_is_used_and_validated(tmp_path):
    path = written(tmp_path, "x.txt", GERMAN.encode("latin-1"))
    assert read(path, encoding="latin-1") == read(path, encoding="ISO-8859-1") == [GERMAN]
    assert re.search(r"byte 0xe4 at offset \d+ is not ascii; .*--encoding=", refusal(path, encoding="ascii"))
    for name in ("latin-99", "hex", "rot13", "undefined", "\N{SNOWMAN}"):
        assert "unknown encoding" in refusal(path, encoding=name)
    assert read(written(tmp_path, "m.txt", codecs.BOM_UTF8 + b"a b"), encoding="utf8") == ["a b"]
    assert "surrogate" in refusal(written(tmp_path, "7.txt", b"a+2AA-b"), encoding="utf-7")
    assert "start with BOM" in refusal(written(tmp_path, "u.txt", "ab" * 10), encoding="utf-16")


def test_nul_bytes_are_text_in_a_given_file_and_binary_in_a_folder(tmp_path):
    body = "text\0with\1some\x1bcontrol\x7f characters\n" * 10
    path = written(tmp_path, "x.txt", body)
    assert read(path) == [body]
    assert text_files.find([path]).sources[0].note == "10 NUL characters, as if a part had another encoding"
    assert text_files.find([tmp_path]).skipped == [
        (f"{tmp_path.name}/x.txt", "binary: 10 of 350 characters are NUL")
    ]
    assert "are NUL" in refusal(written(tmp_path, "y.bin", ENGLISH.encode("utf-32-le")))


# ----------------------------------------------------------------------------- newlines


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_newlines_become_lf_and_nothing_else_changes(block, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", block)
    body = "a\r\nb\rc\nd\r\r\ne\u2028f\u2029g\x85h\x0bi\x0cj\ufeffk\r"
    texts = text_files.find([written(tmp_path, "x.txt", body)])
    assert documents(texts) == ["a\nb\nc\nd\n\ne\u2028f\u2029g\x85h\x0bi\x0cj\ufeffk\n"]
    assert texts.sources[0].newlines_changed
    texts = text_files.find([written(tmp_path, "x.txt", "a\nb\u2028c\n")])
    assert documents(texts) == ["a\nb\u2028c\n"]
    assert not texts.sources[0].newlines_changed


# ----------------------------------------------------------------------------- JSONL


def test_each_row_of_jsonl_is_a_document(tmp_path, monkeypatch):
    bodies = ["one", "two\nlines", "three \u2028 no line end 🦊", "CR\rLF\r\n", "é" * 5000]
    rows = [json.dumps({"id": i, "text": body}, ensure_ascii=i % 2 == 0) for i, body in enumerate(bodies)]
    bodies[3] = "CR\nLF\n"
    for newline in ("\n", "\r\n", "\n\n \n"):
        for block in (7, 1 << 20):
            monkeypatch.setattr(formats, "BLOCK", block)
            assert read(written(tmp_path, "x.JSONL", newline.join(rows) + newline)) == bodies
    assert read(written(tmp_path, "x.jsonl", codecs.BOM_UTF8 + rows[0].encode())) == ["one"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "cut', "is not valid JSON"),
        ("plain text", "is not valid JSON"),
        ("[" * 1900, "is not valid JSON"),
        ('{"txt": "a"}', "has no string `text`"),
        ('{"text": 3}', "has no string `text`"),
        ('["text"]', "has no string `text`"),
        ('{"text": "a\\ud800b"}', r"a lone surrogate, U\+D800"),
        ('{"text": "' + "x" * 3000 + '"}', "is longer than 2,000 bytes"),
    ],
)
def test_invalid_row_is_rejected_with_its_line(row, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 2000)
    monkeypatch.setattr(formats, "BLOCK", 500)
    path = written(tmp_path, "x.jsonl", '{"text": "fine"}\n\n' + row + '\n{"text": "fine"}\n')
    assert re.search(rf"x\.jsonl, line 3,? .*{reason}", refusal(path))


# ----------------------------------------------------------------------------- folders


def test_folder_is_read_in_name_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y/deep.md", "B.txt", ".hidden/x.txt", ".hidden.txt", "a/.x", "c"):
        written(tmp_path, name, f"text of {name}")
    names = ["B.txt", "b.txt", "c", "a/z.txt", "a/y/deep.md"]
    assert read(tmp_path) == [f"text of {name}" for name in names]
    assert [source.name for source in text_files.find([tmp_path]).sources] == [
        f"{tmp_path.name}/{n}" for n in names
    ]
    assert read(tmp_path, keep=lambda file: file.suffix == ".txt") == [
        f"text of {name}" for name in names if name.endswith(".txt")
    ]


def test_non_text_files_in_a_folder_are_skipped_with_a_reason(tmp_path):
    written(tmp_path, "good.txt", ENGLISH)
    written(tmp_path, "empty.txt", "")
    written(tmp_path, "mark.txt", codecs.BOM_UTF8)
    written(tmp_path, "image.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)))
    written(tmp_path, "latin.txt", GERMAN.encode("latin-1"))
    for name, step in (("train.bin", 1), ("val.bin", 50)):  # uint16 ids, which look like UTF-16
        written(tmp_path, name, bytes(x for i in range(6500) for x in (i // step % 65, 0)))
    written(tmp_path, "few.bin", bytes(x for i in range(6500) for x in (32 + i % 33 if i % 100 else 1, 0)))
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "above").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "same.txt").symlink_to(tmp_path / "good.txt")
    texts = text_files.find([tmp_path])
    assert documents(texts) == [ENGLISH]
    reasons = {Path(name).name: reason for name, reason in texts.skipped}
    assert reasons.pop("image.png").startswith("an image")
    assert reasons.pop("latin.txt").startswith("byte 0xe4 at offset ")
    for name in ("train.bin", "val.bin", "few.bin"):
        assert reasons.pop(name).startswith("binary")
    assert reasons == {
        "empty.txt": "empty",
        "mark.txt": "empty",
        "broken": "not a regular file",
        "loop": "not a regular file",
        "same.txt": "given twice",
    }


def test_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    written(tmp_path, "closed/x.txt", ENGLISH)
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError("closed")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError):
        text_files.find([tmp_path])


def test_explicitly_given_files_are_rejected_not_skipped(tmp_path):
    good, empty = written(tmp_path, "good.txt", ENGLISH), written(tmp_path, "empty.txt", "")
    assert refusal([good, empty]) == f"{empty}: empty"
    assert "no such file" in refusal([good, tmp_path / "missing.txt"])
    assert read([good, tmp_path]) == [ENGLISH]  # the same file in the folder is not read twice


def test_text_modified_while_reading_is_detected(tmp_path):
    path = written(tmp_path, "x.txt", ENGLISH)
    texts = text_files.find([path])
    path.write_text(ENGLISH + "more", encoding="utf-8")
    with pytest.raises(UserError, match="changed while it was being read"):
        documents(texts)
