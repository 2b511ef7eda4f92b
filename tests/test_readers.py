"""Readers: equal documents from every file format, resumable at any position, and clear error messages."""

import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from nanogpt.errors import UserError
from nanogpt.prepare import formats, readers, tables, text_files
from nanogpt.prepare.text_files import Texts
from tests.conftest import documents, words

BODIES = [f"document {i}: {words(1 + i % 40, seed=i)}é 🦊" for i in range(700)]


def lines(bodies: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": body}) + "\n" for body in bodies).encode()


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=90)


def write(path: Path, bodies: list[str]) -> Path:
    """Write `bodies` in the format given by the file extension."""
    table = pa.table({"id": list(range(len(bodies))), "text": bodies})
    writers = {
        ".jsonl": lambda: path.write_bytes(lines(bodies)),
        ".gz": lambda: path.write_bytes(gzip.compress(lines(bodies))),
        ".xz": lambda: path.write_bytes(lzma.compress(lines(bodies))),
        ".zst": lambda: path.write_bytes(  # two frames, as written by parallel compressors
            zstandard.compress(lines(bodies[:300])) + zstandard.compress(lines(bodies[300:]))
        ),
        ".parquet": lambda: pq.write_table(table, path, row_group_size=120),
        ".arrow": lambda: write_arrow(path, table),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix]()
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as in a hub repository: two Parquet files in data/, and a README."""
    folder = tmp_path / "repository"
    write(folder / "data" / "train-00000-of-00002.parquet", BODIES[:400])
    write(folder / "data" / "train-00001-of-00002.parquet", BODIES[400:])
    (folder / "README.md").write_text("# A dataset\n", encoding="utf-8")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return folder


NAMES = ["x.jsonl", "x.jsonl.gz", "x.jsonl.xz", "x.jsonl.zst", "x.parquet", "x.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_format_gives_the_same_documents(name, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 5000)
    assert documents(text_files.find([write(tmp_path / name, BODIES)])) == BODIES


def test_hub_datasets_are_streamed(hub):
    found = readers.hub(str(hub), "text", "")
    assert documents(Texts([found])) == BODIES


@pytest.mark.parametrize("name", [*NAMES, "x.txt", "hub"])
def test_reading_resumes_at_any_position(name, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 20_000)
    monkeypatch.setattr(tables, "ROWS", 64)
    if name == "hub":
        found = [readers.hub(str(hub), "text", "")]
    elif name == "x.txt":
        (tmp_path / "x.txt").write_text("".join(BODIES), encoding="utf-8")
        found = text_files.find([tmp_path / "x.txt"]).sources
    else:
        found = text_files.find([write(tmp_path / name, BODIES)]).sources
    found = [*found, *text_files.find([write(tmp_path / "last.jsonl", ["the last"])]).sources]
    reading = readers.Reading()

    def bodies(pieces):
        for piece in pieces:
            kind = found[piece.source].kind
            if kind == "text":
                yield piece.content
            else:
                yield from (row for _, row in readers.documents(piece, "text"))

    pieces = list(readers.pieces(found, reading))
    whole = list(bodies(pieces))
    assert len(pieces) >= 3 and "".join(whole) == "".join([*BODIES, "the last"])
    for i in (0, 1, len(pieces) // 2, len(pieces) - 2):
        place = json.loads(json.dumps(pieces[i].place))  # JSON round trip, as when saved
        rest = bodies(readers.pieces(found, reading, (pieces[i].source, place)))
        assert list(rest) == list(bodies(pieces[i + 1 :]))


def test_patterns_and_folders_find_table_files(tmp_path):
    for i, name in enumerate(NAMES):
        write(tmp_path / "a" / "b" / f"{i}-{name}", BODIES[i * 100 : i * 100 + 100])
    assert len(documents(text_files.find([tmp_path / "a" / "*" / "*.jsonl*"]))) == 400
    assert documents(text_files.find([tmp_path / "**" / "*-x.parquet"])) == BODIES[400:500]
    assert documents(text_files.find([tmp_path / "a"])) == BODIES[:600]
    with pytest.raises(UserError, match=r"\*\.nothing: no such file"):
        text_files.find([tmp_path / "*.nothing"])


def test_readme_next_to_tables_is_not_a_document(hub):
    found = text_files.find([hub])
    assert documents(found) == BODIES
    assert found.skipped == [("repository/README.md", "not a table, unlike others in its folder")]


def test_texts_in_other_folders_than_tables_are_documents(tmp_path):
    for name in ("README.md", "tables/card.md", "books/a.txt", "rows/LICENSE", "rows/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name} is a text.\n", encoding="utf-8")
    write(tmp_path / "tables" / "x.parquet", ["a table"])
    write(tmp_path / "rows" / "x.jsonl", ["a row"])
    found = text_files.find([tmp_path])
    names = {source.name.partition("/")[2] for source in found.sources}
    assert names == {"books/a.txt", "rows/notes.txt", "rows/x.jsonl", "tables/x.parquet"}
    assert len(found.skipped) == 3


def test_empty_and_missing_values_are_empty_documents(tmp_path):
    pq.write_table(pa.table({"text": ["one", "", None, "two"]}), tmp_path / "x.parquet")
    assert documents(text_files.find([tmp_path / "x.parquet"])) == ["one", "two"]


TABLES = {  # name of the column: column
    "text": pa.array(BODIES).dictionary_encode(),
    "a": pa.array(BODIES, pa.large_string()),
    "b.c": pa.array([{"c": body, "d": 1} for body in BODIES]),
    "d.e.f": pa.array([{"e": {"f": body}} for body in BODIES]),
    "g.h": pa.array(
        [{"h": body} for body in BODIES], pa.struct({"h": pa.dictionary(pa.int32(), pa.string())})
    ),
    "i.j": pa.array(BODIES),  # a name with a dot
}


def write_table(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=150)
    elif path.suffix == ".arrow":
        write_arrow(path, table)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    return path


@pytest.mark.parametrize("key", TABLES)
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather", "parquet.txt"])
def test_categorical_and_nested_columns_are_read(key, name, tmp_path):
    column = key if key == "i.j" else key.split(".")[0]
    path = write_table(tmp_path / name.replace("parquet.txt", "x.parquet"), pa.table({column: TABLES[key]}))
    path = path.rename(tmp_path / name)  # recognized by content
    assert documents(text_files.find([path]), key) == BODIES


def test_null_columns_and_rows_of_null_structs_are_empty(tmp_path):
    write_table(tmp_path / "a.parquet", pa.table({"text": pa.nulls(5)}))
    inner = pa.array([{"t": "one"}, None, {"t": None}, {"t": "two"}])
    write_table(tmp_path / "b.arrow", pa.table({"text": inner}))
    write_table(tmp_path / "c.parquet", pa.table({"text": BODIES}))
    found = text_files.find([tmp_path / "a.parquet", tmp_path / "c.parquet"])
    assert documents(found) == BODIES
    assert documents(text_files.find([tmp_path / "b.arrow"]), "text.t") == ["one", "two"]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.feather"])
def test_prompts_and_responses_are_read_from_tables(name, tmp_path):
    table = pa.table({"question": ["a", "b"], "answer": ["1", "2"]})
    found = text_files.find([write_table(tmp_path / name, table)])
    assert documents(found, "question+answer") == ["a1", "b2"]
    with pytest.raises(UserError, match="column 'reply' does not exist; existing columns: question"):
        readers.check_columns(found.sources, "question+reply")


def test_a_value_that_is_not_utf_8_is_a_broken_row(tmp_path):
    values = pa.array([b"good", b"bad \xff", b"fine"]).view(pa.string())
    path = write_table(tmp_path / "x.parquet", pa.table({"text": values}))
    with pytest.raises(UserError, match=r"x\.parquet, line 2 is not valid UTF-8"):
        documents(text_files.find([path]))


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".feather"])
def test_damaged_tables_are_errors_of_one_line(kind, tmp_path):
    path = write_table(tmp_path / f"x{kind}", pa.table({"text": BODIES[:200]}))
    content, draw = path.read_bytes(), random.Random(kind)
    for _ in range(12):
        damaged = bytearray(content)
        for _ in range(30):
            damaged[draw.randrange(8, len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            found = text_files.find([path])
            readers.check_columns(found.sources, "text")
            documents(found)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# ----------------------------------------------------------------------------- invalid input


def refusal(path: Path, text_key: str = "text") -> str:
    with pytest.raises(UserError) as error:
        found = text_files.find([path])
        readers.check_columns(found.sources, text_key)
        documents(found)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_missing_column_error_lists_the_columns(name, tmp_path):
    said = refusal(write(tmp_path / name, BODIES), "body")
    assert "column 'body' does not exist; existing columns: id (int64), text (string)" in said
    assert "'id' is of type int64" in refusal(tmp_path / name, "id")


@pytest.mark.parametrize("name", NAMES[1:])
def test_truncated_file_is_reported(name, tmp_path):
    path = write(tmp_path / name, BODIES)
    path.write_bytes(path.read_bytes()[:-2000])
    said = refusal(path)
    assert "download it again" in said and ("damaged" in said or "not a complete" in said)


def test_broken_line_in_a_compressed_file_is_located(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 3000)
    path = tmp_path / "x.jsonl.xz"
    path.write_bytes(lzma.compress(lines(BODIES[:200]) + b"\n{broken\n" + lines(BODIES)))
    assert "x.jsonl.xz, line 202 is not valid JSON" in refusal(path)
    path.write_bytes(lzma.compress(lines(BODIES[:3]) + b'{"text": "\xff"}\n'))
    assert "x.jsonl.xz, line 4 is not UTF-8 (byte 0xff)" in refusal(path)
    path.write_bytes(lzma.compress(b'{"body": "a", "id": 3}\n'))
    assert "set --text_key to one of body" in refusal(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-dataset-anywhere", r"--hub=no-such-dataset-anywhere: .*; put it there"),
        ("{hub}:another", "'another' not found. Available: .*default"),
        ("{hub}::test", "Bad split: test"),
    ],
)
def test_unavailable_dataset_is_a_one_line_error(name, reason, hub, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=reason) as error:
        readers.hub(name.format(hub=hub), "text", "put it there")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"'body' does not exist; existing columns: id \(int64\), text"):
        readers.hub(str(hub), "body", "")
