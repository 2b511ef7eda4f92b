"""Task files: parsing, and errors for invalid files."""

import gzip
import json
import lzma
import sys

import pytest

from nanogpt.errors import UserError
from nanogpt.evaluation import tasks
from nanogpt.evaluation.tasks import Item

ARC = {
    "question": "Which is a gas?",
    "choices": {"text": ["iron", "air", "wood"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}


@pytest.fixture
def write(tmp_path):
    def to(name: str, *rows) -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return to


def one(spec: str) -> Item:
    task = tasks.load(spec)
    assert len(task.items) == 1
    return task.items[0]


# ----------------------------------------------------------------------------- parsing


def test_hellaswag_markup_is_removed(write):
    row = {"activity_label": "Cooking", "label": "1"}
    row["endings"] = ["[substeps] Boil it.", "Wait. [step] Then  eat."]
    whole = {**row, "ctx": "[header] How to cook [title] Begin. [step] Take a pot"}
    parts = {**row, "ctx_a": "[header] How to cook [title] Begin. [step] Take a pot", "ctx_b": "the cook"}
    item = one("hellaswag:" + write("whole.jsonl", whole))
    assert item.context == "Cooking:  How to cook. Begin. Take a pot".replace("  ", " ")
    assert item.endings == (" Boil it.", "Wait. Then eat.") and item.label == 1
    item = one(write("parts.jsonl", parts))  # recognized by its fields
    assert item.context == "Cooking: How to cook. Begin. Take a pot The cook" and item.joint == " "


def test_lambada_predicts_the_last_word(write):
    text = 'He said:\n"I can make it, Shane'
    for spec in ("lambada:", "cloze:", ""):
        for blanks in ("", "\n", " "):
            item = one(spec + write("l.jsonl", {"text": text + blanks}))
            assert item == Item('He said:\n"I can make it,', ("Shane",))


def test_multiple_choice_field_names(write):
    expected = Item("Which is a gas?", ("iron", "air", "wood"), 1)
    plain = {"query": "Which is a gas?", "choices": ["iron", "air", "wood"], "gold": 1}
    swag = {"ctx": "Which is a gas?", "endings": ["iron", "air", "wood"], "label": "1"}
    for row in (ARC, plain, swag):
        assert one("choice:" + write("c.jsonl", row)) == expected
        assert one(write("c.jsonl", row)) == expected


def test_a_row_with_a_passage_and_a_question_has_both_as_context(write):
    race = {"article": "A passage.", "question": "Who?", "options": ["x", "y"], "answer": "B"}
    assert one(write("c.jsonl", race)) == Item("A passage.\nWho?", ("x", "y"), 1)
    squad = {"context": "A passage.", "question": "Who?", "target": "she"}
    assert one(write("c.jsonl", squad)) == Item("A passage.\nWho?", ("she",))


@pytest.mark.parametrize("name", ["story", "dialogue", "text"])
def test_other_names_of_a_passage_are_known(write, name):
    row = {name: "A passage.", "question": "Who?", "options": ["x", "y"], "answer": "B"}
    assert one(write("c.jsonl", row)) == Item("A passage.\nWho?", ("x", "y"), 1)
    for target in ("target", "answer"):
        assert one(write("c.jsonl", {name: "A passage.", target: "she"})) == Item("A passage.", ("she",))


def test_fields_of_text_that_are_not_used_are_named(write):
    row = {"question": "Who?", "options": ["x", "y"], "answer": "B", "id": "a1"}
    spare = {"prompt": "Answer the question.", "explanation": "It was said before."}
    assert tasks.load(write("c.jsonl", row, row | spare)).note == "c: fields not used: explanation, prompt\n"
    assert tasks.load(write("c.jsonl", row)).note == ""
    both = {"context": "She said", "text": "She said no", "target": "no"}
    assert tasks.load(write("d.jsonl", both)).note == "d: fields not used: text\n"


def test_labels_that_differ_are_refused(write):
    row = {"question": "Who?", "options": ["x", "y"], "label": 1}
    for same in ({"answer": "B"}, {"answerKey": "B", "gold": 1}, {"answer": "It was y, as he said."}):
        assert one(write("c.jsonl", row | same)).label == 1
    for other in ({"answer": "A"}, {"gold": 0}):
        with pytest.raises(UserError, match=r"its fields `label`, `.*` name different endings"):
            tasks.load(write("c.jsonl", row | other))


@pytest.mark.parametrize("labels", [["1", "2", "3"], [1, 2, 3]])
@pytest.mark.parametrize("key", ["2", 2])
def test_numbers_that_name_endings_are_not_indices(write, labels, key):
    row = ARC | {"choices": {"text": ["iron", "air", "wood"], "label": labels}, "answerKey": key}
    assert one(write("c.jsonl", row)).label == 1
    row["options"] = row.pop("choices")
    assert one(write("c.jsonl", row)).label == 1


def test_existing_spaces_are_not_doubled(write):
    row = {"question": "Q: \n", "choices": ["a", "b"], "label": 0}
    assert one(write("c.jsonl", row)).joint == ""
    row = {"question": "Q:", "choices": [" a", " b"], "label": 0}
    assert one(write("c.jsonl", row)).joint == ""
    row = {"prompt": "Once", "target": ", long ago"}
    assert one(write("c.jsonl", row)) == Item("Once", (", long ago",), joint=" ")


def test_compressed_files_and_limits(tmp_path):
    content = "".join(json.dumps({"text": f"a{i} b c"}) + "\n" for i in range(5)).encode()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(content))
    for name in ("x.jsonl.gz", "x.jsonl.xz"):
        assert len(tasks.load(f"lambada:{tmp_path / name}").items) == 5
        task = tasks.load(f"cloze:{tmp_path / name}", limit=2)
        assert [item.context for item in task.items] == ["a0 b", "a1 b"] and task.name == "x"


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "LONGEST", 1000)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * (3 << 20)))
    with pytest.raises(UserError, match=r"t.jsonl.gz has a line of more than 1,000 bytes"):
        list(tasks.file_rows(tmp_path / "t.jsonl.gz"))


def test_hellaswag_files(real):
    names = ("hellaswag/hellaswag_val.jsonl.xz", "hellaswag/hellaswag_val_raw500.jsonl")
    packed, raw = (tasks.load(f"hellaswag:{real(name)}") for name in names)
    assert len(packed.items) == 10042 and len(raw.items) == 500
    assert [sum(item.label == i for item in packed.items) for i in range(4)] == [2515, 2485, 2584, 2458]
    assert not any("[" in item.context for item in raw.items if "[header]" in item.context)


def test_lambada_file(real):
    assert len(tasks.load(f"lambada:{real('lambada/lambada_test_0001-1000.jsonl')}").items) == 1000


def test_task_name_finds_the_file_in_the_cache(write, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    write("tasks/lambada_test.jsonl", {"text": "a b c"})
    assert one("lambada").endings == ("c",)


# ----------------------------------------------------------------------------- invalid input


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("helaswag", "unknown task 'helaswag'; did you mean 'hellaswag'"),
        ("helaswag:x.jsonl", "unknown task 'helaswag' in .*; did you mean 'hellaswag'"),
        ("nothing_like_it", "unknown task 'nothing_like_it'; give hellaswag, lambada, choice, cloze"),
        ("choice", "needs a file: --tasks=choice:FILE.jsonl"),
        ("lambada:nowhere.jsonl", "no task file at nowhere.jsonl"),
    ],
)
def test_invalid_task_names_are_rejected(spec, message):
    with pytest.raises(UserError, match=message):
        tasks.load(spec)


HELLASWAG = {"activity_label": "a", "ctx": "b", "endings": ["c", "d"], "label": 0}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (
            "hellaswag",
            {"ctx": "b", "endings": ["c", "d"], "label": 0},
            "missing `activity_label`.* fields are ctx,",
        ),
        ("hellaswag", {**HELLASWAG, "label": 2}, "the label is 2, expected an ending's index, 0 to 1"),
        ("hellaswag", {**HELLASWAG, "label": -1}, "the label is -1"),
        ("hellaswag", {**HELLASWAG, "label": "x"}, "the label is 'x'"),
        ("hellaswag", {**HELLASWAG, "endings": ["c", "[step]"]}, "ending 1 is empty"),
        ("hellaswag", {**HELLASWAG, "endings": "c"}, "must be a list of at least two texts"),
        ("hellaswag", {**HELLASWAG, "ctx": " "}, "`ctx` is empty"),
        ("hellaswag", {**HELLASWAG, "ctx": 7}, "`ctx` is 7, not text"),
        ("choice", {"a": 1, "b": 2}, "missing `endings` or `choices`.*fields are a, b; expected: a context"),
        ("choice", {**ARC, "answerKey": "D"}, "the label is 'D'"),
        ("choice", {**ARC, "answerKey": True}, "the label is True"),
        ("choice", {"query": "?", "choices": [" a", "b"], "gold": 0}, "some endings begin with a space"),
        (
            "choice",
            {"query": "?", "choices": ["1", "2"], "answer": "1"},
            "is an ending, and the index of another",
        ),
        ("cloze", {"prompt": "a"}, "missing `target` or `completion`"),
        ("cloze", {"prompt": "a", "target": ""}, "`target` is empty"),
        ("cloze", {**ARC, "answer": "A"}, "it has `choices`, unlike the rows before it"),
        ("lambada", {"text": ""}, "`text` is empty"),
        ("lambada", {"text": "word"}, "the last one is the target"),
        ("cloze", {"text": "a good film", "label": 1}, "`label` without `endings` is a class of the text"),
        ("lambada", {}, "fields are none"),
    ],
)
def test_invalid_rows_are_rejected(write, kind, row, message):
    good = {"hellaswag": HELLASWAG, "choice": ARC, "cloze": {"text": "a b"}, "lambada": {"text": "a b"}}[kind]
    path = write("t.jsonl", good, "", row)
    with pytest.raises(UserError, match=rf"t\.jsonl, line 3 is not a valid {kind} item: .*{message}"):
        tasks.load(f"{kind}:{path}")


def test_invalid_jsonl_files_are_rejected(write, tmp_path):
    with pytest.raises(UserError, match=r"t\.jsonl, line 2 is not valid JSON"):
        tasks.load("lambada:" + write("t.jsonl", {"text": "a b"}, '{"text": "a'))
    with pytest.raises(UserError, match=r"t\.jsonl, line 1 is \[1, 2\], not an object"):
        tasks.load("lambada:" + write("t.jsonl", "[1, 2]"))
    with pytest.raises(UserError, match=r"line 1 is nested too deeply|line 1 is not"):
        tasks.load("lambada:" + write("t.jsonl", "[" * 100_000))
    with pytest.raises(UserError, match=r"has no items"):
        tasks.load("lambada:" + write("t.jsonl", ""))
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "\xff b"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl, line 1 is not valid JSON .*can't decode"):
        tasks.load(f"lambada:{tmp_path / 't.jsonl'}")
    for packer, suffix in ((gzip, "gz"), (lzma, "xz")):
        path = tmp_path / f"t.jsonl.{suffix}"
        path.write_bytes(packer.compress(b'{"text": "a b"}\n' * 5000)[:60])
        with pytest.raises(UserError, match=r"is damaged or partially downloaded"):
            tasks.load(f"lambada:{path}")
        path.write_bytes(b"not packed")
        with pytest.raises(UserError, match=r"line 1 is not valid JSON"):
            tasks.load(f"lambada:{path}")


# ----------------------------------------------------------------------------- the hub


@pytest.fixture
def fake_hub(monkeypatch):
    """A mock of the `datasets` package and its hub."""
    import datasets

    def load_dataset(name, config=None, *, split):
        if name != "owner/questions":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        return datasets.Dataset.from_list([{**ARC, "question": f"{config} {split} {i}"} for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_rows_from_the_hub(fake_hub):
    task = tasks.load("choice:hub:owner/questions/easy/test", limit=2)
    assert [item.context for item in task.items] == ["easy test 0", "easy test 1"]
    assert tasks.load("choice:hub:owner/questions/test").items[2].context == "None test 2"


def test_no_network_error_says_which_file_to_put_where(fake_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"ConnectionError: Couldn't reach.*put hellaswag_val.jsonl at .*tasks"
    ):
        tasks.load("hellaswag")
    with pytest.raises(UserError, match=r"name a file with these rows: --tasks=choice:FILE.jsonl"):
        tasks.load("choice:hub:owner/other/test")
    with pytest.raises(UserError, match=r"expected hub:OWNER/NAME/SPLIT"):
        tasks.load("choice:hub:other")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"put lambada_test.jsonl at .*pip install datasets"):
        tasks.load("lambada")
