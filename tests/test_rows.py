"""Rows of CSV and JSON: each field exactly as written, or an error with the row."""

import csv
import io
import json
import random
import re
from pathlib import Path

import pytest

from nanogpt.errors import UserError
from nanogpt.prepare import corpus, encode, formats, rows, text_files
from tests.conftest import documents
from tests.test_readers import BODIES
from tests.texts import chinese_novel

TRICKY = [
    'say "hello", friend',
    "two\nlines",
    "",
    "a;b\tc|d",
    " blanks ",
    "é 🦊 三国",
    "'",
    "1,5",
    '"',
    "x" * 3000,
]


def table(bodies: list[str], separator: str = ",", names: tuple[str, ...] = ("id", "text"), **options) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator="\n", **options)
    writer.writerows([names, *([number, body] for number, body in enumerate(bodies))])
    return file.getvalue()


def read(path: Path, content: str | bytes, text_key: str = "text") -> list[str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return documents(text_files.find([path], text_key=text_key), text_key)


def refusal(path: Path, content: str | bytes, text_key: str = "text") -> str:
    with pytest.raises(UserError) as error:
        read(path, content, text_key)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("block", [7, 1000, 1 << 20])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_fields_of_csv_are_exact(block, separator, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", block)
    name = "x.tsv" if separator == "\t" else "x.csv"
    expected = [body for body in TRICKY if body]
    assert read(tmp_path / name, table(TRICKY, separator)) == expected
    quoted = table(TRICKY, separator, quoting=csv.QUOTE_ALL).replace("\n", "\r\n")
    assert read(tmp_path / name, quoted) == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "gb18030"])
def test_csv_of_spreadsheets_is_read_in_their_encodings(encoding, tmp_path):
    bodies = [chinese_novel(400)[i * 40 :][:40] for i in range(10)]
    expected = [body for body in bodies if body]
    assert read(tmp_path / "x.csv", table(bodies).encode(encoding)) == expected


def test_tables_with_tabs_and_without_quoting_keep_their_quotes(tmp_path):
    lines = [f'{i}\t"He said {i}' for i in range(50)]
    assert read(tmp_path / "x.tsv", "id\ttext\n" + "\n".join(lines)) == [f'"He said {i}' for i in range(50)]


def test_quotes_that_match_by_chance_do_not_join_the_rows_of_a_table_with_tabs(tmp_path):
    content = 'id\ttext\n1\t"Hello\n2\tthere\n3\tsaid he"\n4\t"all" of it\n'
    expected = ['"Hello', "there", 'said he"', '"all" of it']
    assert read(tmp_path / "x.tsv", content) == read(tmp_path / "x.csv", content) == expected


@pytest.mark.parametrize("head", ["id, text, note", "id,text,note"])
def test_a_space_after_the_separators_is_not_part_of_a_field(head, tmp_path):
    content = head + '\n1, "He said ""no"", twice", a\n2, "plain", b\n'
    assert read(tmp_path / "x.csv", content) == ['He said "no", twice', "plain"]
    assert read(tmp_path / "x.csv", "id,text\n1, indented\n2,not\n") == [" indented", "not"]
    assert read(tmp_path / "x.csv", "id, text\n1,     indented\n2, not\n") == ["    indented", "not"]


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize(
    "bodies",
    [
        ["def f():", "    return 1", "todo, "],
        ["def f():", "    return 1", "todo; ", " 4"],
        [' "said" he', "  indented", 'x, "y'],
        [" 4", " 5", " 6"],
    ],
)
def test_spaces_at_the_start_of_fields_are_kept(bodies, separator, tmp_path):
    for options in ({}, {"quoting": csv.QUOTE_ALL}):
        assert read(tmp_path / "x.csv", table(bodies, separator, **options)) == bodies


def test_tables_written_by_csv_are_read_exactly():
    draw = random.Random(0)
    for _ in range(1000):
        names = ["id", "text", "note"][draw.choice([0, 1]) : draw.choice([2, 3])]
        separator = draw.choice(",;|") if len(names) > 1 else ","
        alphabet = draw.choice(["ab ,", 'ab "', 'a \n"', 'ab;\t |,"\n '])
        size = draw.randint(1, 12)
        body = [["".join(draw.choices(alphabet, k=draw.randint(1, 6))) for _ in names] for _ in range(size)]
        file = io.StringIO()
        quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(file, delimiter=separator, lineterminator="\n", quoting=quoting).writerows([names, *body])
        lines = rows.of_csv([file.getvalue()], "text", tabs=False)
        assert [json.loads(line)["text"] for line in lines] == [row[names.index("text")] for row in body]


def test_single_column_of_csv_keeps_its_indentation(tmp_path):
    assert read(tmp_path / "x.csv", "text\n  a\n  b\n") == ["  a", "  b"]


def test_quoted_cells_of_a_single_column_may_span_lines(tmp_path):
    poems = [f"poem {i}\nsecond line, {i}" for i in range(1300)]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([["text"], *([poem] for poem in poems)])
    assert read(tmp_path / "x.tsv", file.getvalue()) == poems
    plain = '"Hello," he said.\nplain\n"Yes"\n'
    assert read(tmp_path / "x.tsv", "text\n" + plain) == plain.splitlines()


def test_cells_with_tabs_whose_lines_begin_with_quotes_are_read(tmp_path):
    talks = [f'He said {i}:\n"Hello" he went on\n"and left"' if i % 2 else f"plain {i}" for i in range(700)]
    assert read(tmp_path / "x.tsv", table(talks, "\t")) == talks


def test_repeated_names_of_joined_tables_are_not_documents(tmp_path):
    with pytest.raises(UserError, match="line 2 repeats the names of the first line"):
        read(tmp_path / "x.csv", "id,text\n1,first\nid,text\n2,second\n")


def test_a_quote_that_would_join_later_rows_of_a_table_with_tabs_is_refused(tmp_path):
    start = "id\ttext\n" + "".join(f"{i}\tword\n" for i in range(1200))
    content = start + '1200\t"Hello\n1201\tthere"\n1202\tlast\n'
    with pytest.raises(UserError, match=r"x\.tsv.*row 1201 would span several lines"):
        read(tmp_path / "x.tsv", content)


def test_quoted_fields_of_a_table_with_tabs_may_span_lines(tmp_path):
    content = 'id\ttext\n1\t"first\nsecond ""line"""\n2\tlast\n'
    assert read(tmp_path / "x.tsv", content) == ['first\nsecond "line"', "last"]


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_separator_that_excel_names_first_is_known(separator, tmp_path):
    bodies = ["a, b", "c; d", "e | f", 'said "no"']
    content = f"sep={separator}\r\n" + table(bodies, separator).replace("\n", "\r\n")
    assert read(tmp_path / "x.csv", content) == bodies


def test_prompts_and_responses_are_read_from_csv(tmp_path):
    content = table(["answer", "yes"], names=("question", "answer"))
    found = read(tmp_path / "x.csv", content, "question+answer")
    assert found == ["0answer", "1yes"] and isinstance(found[0], rows.Pair)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            "id,body\n1,a\n",
            "has no column `text`; its first line, .* is: id, body; choose one with --text_key",
        ),
        ("1,some words\n2,more\n", "has no column `text`"),
        ("text,text\na,b\n", "has two columns `text`"),
        (
            table(BODIES) + '9,"never closed\n9,more\n',
            r"row 701 \(line \d+\) is not valid CSV: unexpected end",
        ),
        ('text\n"a" b\n', r"row 1 \(line 2\) is not valid CSV"),
        ("id,text\n1,a,b\n", "row 1 has 3 fields, and the first line 2 names"),
        ("", "empty"),
    ],
)
def test_invalid_csv_is_rejected_with_its_row(content, reason, tmp_path):
    assert re.search(reason, refusal(tmp_path / "x.csv", content))


def test_rows_with_other_numbers_of_fields_are_skipped_and_counted(tmp_path):
    (tmp_path / "x.csv").write_text(table(BODIES) + "1,a,b\n\n2\n3,last\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.csv, row 701 has 3 fields.*--skip_bad"):
        corpus.prepare([tmp_path / "x.csv"], tmp_path / "out", kind="byte")
    summary = corpus.prepare([tmp_path / "x.csv"], tmp_path / "out", kind="byte", skip_bad=True)
    assert sum(summary.counts.documents.values()) == 701 and "skipped 2 broken rows" in "\n".join(
        summary.lines()
    )


def test_errors_in_encoding_name_the_file_and_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIECE", 50)
    monkeypatch.setattr(encode, "LONGEST_WORD", 100)
    (tmp_path / "x.csv").write_text(f"text\nfine words\n\n{'ACGT' * 100}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.csv, row 3: 100 characters without a space are too long"):
        corpus.prepare([tmp_path / "x.csv"], tmp_path / "out", kind="bpe:300")
    (tmp_path / "x.txt").write_text("fine words " * 30 + "ACGT" * 100, encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.txt: 100 characters without a space are too long"):
        corpus.prepare([tmp_path / "x.txt"], tmp_path / "out", kind="bpe:300")


OBJECTS = [
    {"id": i, "text": body, "of": {"text": f"inner {i}"}} for i, body in enumerate([*BODIES, '"[{],}\\'])
]
ARRAYS = {
    "array": json.dumps(OBJECTS),
    "in utf-8": json.dumps(OBJECTS, ensure_ascii=False),
    "pretty": json.dumps(OBJECTS, indent=2),
    "lines": "\n".join(map(json.dumps, OBJECTS)),
    "pretty objects": "\n".join(json.dumps(row, indent=1) for row in OBJECTS),
    "one after another": "".join(map(json.dumps, OBJECTS)),
    "commas": ",\n".join(map(json.dumps, OBJECTS)) + ",\n",
    "carriage returns": "\r".join(map(json.dumps, OBJECTS)),
    "texts": json.dumps([row["text"] for row in OBJECTS]),
}


@pytest.mark.parametrize("name", ["part-00000", "x.json", "dump.txt"])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_longer_than_the_start_of_a_file_are_recognized(name, indent, tmp_path):
    books = ["word " * (formats.HEAD // 4), "short", "word\n" * formats.HEAD]
    for content in (
        "\n".join(json.dumps({"id": 1, "text": book}, indent=indent) for book in books),
        json.dumps([{"text": book} for book in books], indent=indent),
    ):
        assert read(tmp_path / name, content) == books


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("block", [97, 1 << 20])
def test_json_arrays_and_objects_are_rows(kind, block, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", block)
    expected = [row["text"] for row in OBJECTS]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read(tmp_path / "x.json", ARRAYS[kind].encode(encoding)) == expected
    for name in ("x.jsonl", "x.txt", "x")[: 3 if kind != "texts" else 1]:
        assert read(tmp_path / name, ARRAYS[kind]) == expected


@pytest.mark.parametrize(
    "text", ["[link](x) and more\n", '{"a": 1}\n', "[1] A footnote.\n", '{ "text": }\n', "{"]
)
def test_texts_that_begin_like_json_are_texts(text, tmp_path):
    assert read(tmp_path / "x.txt", text * 50) == [text * 50]


@pytest.mark.parametrize("encoding", ["latin-1", "gb18030"])
def test_rows_in_another_encoding_are_named_for_what_they_are(encoding, tmp_path):
    content = '{"text": "voil\u00e0"}\n'.encode(encoding)
    assert re.search(
        r"line 1 is not UTF-8 \(byte 0x..\); .* set --encoding", refusal(tmp_path / "x.jsonl", content)
    )


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_fields_of_inner_objects_have_names_with_dots(name, tmp_path):
    content = ARRAYS["lines" if name == "x.jsonl" else "pretty"]
    assert read(tmp_path / name, content, "of.text") == [f"inner {i}" for i in range(len(OBJECTS))]
    assert read(tmp_path / name, '{"of.text": "with a dot", "of": {"text": "inner"}}\n', "of.text") == [
        "with a dot"
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ARRAYS["array"][:-30], "row 701 is not valid JSON"),
        (ARRAYS["array"][: ARRAYS["array"].rindex(", {")], "ends within its JSON array, after row 700"),
        (json.dumps({"data": OBJECTS}), "row 1 has no string `text`"),
        (
            json.dumps([{"body": "a"}] * 3),
            r"row 1 has no string `text`.*\(or set --text_key to one of body\)",
        ),
        ('[{"text": "a"} {"text": oops}]', "row 2 is not valid JSON: Expecting value"),
        ("[" * 100_000, "row 1 is not valid JSON"),
        ('["\\ud800"]', "row 1 contains a lone surrogate"),
        ("[1, 2]", "row 1 has no string `text`"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', r"for chats see .* docs/finetuning\.md"),
    ],
)
def test_invalid_json_is_rejected_with_its_row(content, reason, tmp_path):
    assert re.search(reason, refusal(tmp_path / "x.json", content))


def test_tables_without_text_are_skipped_in_folders_and_reported(tmp_path):
    (tmp_path / "good.txt").write_text("some text " * 20, encoding="utf-8")
    (tmp_path / "package.json").write_text('{"name": "x",\n "version": "1"}', encoding="utf-8")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    found = text_files.find([tmp_path])
    assert documents(found) == ["some text " * 20]
    reasons = {Path(name).name: reason for name, reason in found.skipped}
    assert "no column `text`" in reasons["numbers.csv"] and "no string `text`" in reasons["package.json"]
