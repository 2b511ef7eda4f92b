"""Comparison of the records of two commits: compared and ignored fields."""

import json

from benchmarks import record


def side(tmp_path, name):
    return record.Side(tmp_path, tmp_path / name)


def test_only_times_and_paths_are_ignored(tmp_path):
    digests = []
    for name, row in (
        ("a", {"iter": 1, "loss": 2.5, "step_s": 0.1}),
        ("b", {"iter": 1, "loss": 2.5, "step_s": 0.2}),
        ("c", {"iter": 1, "loss": 2.5000001, "step_s": 0.1}),
    ):
        here = side(tmp_path, name)
        rows = here.work / "run" / "metrics.jsonl"
        rows.parent.mkdir()
        rows.write_text(json.dumps({**row, "path": str(rows.parent)}) + "\n", encoding="utf-8")
        digests.append({key: record.digest(value) for key, value in here.contents(rows).items()})
    assert digests[0] == digests[1] != digests[2]


def test_only_shared_options_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RENAMED", {"old": "new"})
    found = []
    for name, options in (("a", {"old": 1, "gone": 2}), ("b", {"new": 1}), ("c", {"new": 3})):
        here = side(tmp_path, name)
        config = here.work / "config.json"
        config.write_text(json.dumps({"options": options, "model": {}}), encoding="utf-8")
        found.append({"case": {key: record.digest(value) for key, value in here.contents(config).items()}})
    assert record.compare(found[0], found[1])[0][2] == "equal"
    assert record.compare(found[0], found[2])[0][2] == "DIFFERENT: config.json --new"


def test_missing_results_are_not_equal():
    (row,) = record.compare({"case": {"a.bin": "1"}}, {"case": {}})
    assert row[2] == "DIFFERENT: a.bin"
    (row,) = record.compare({"case": {}}, {"case": {}})
    assert row[2] == "EMPTY"
    (row,) = record.compare({"case": {"failed": "error: no"}}, {"case": {"failed": "error: no"}})
    assert row[2] == "FAILED: error: no"


def test_cases_are_ordered_after_their_inputs():
    every = record.every_case()
    order = record.closure(every, ["finetune an export"])
    assert order == [
        "prepare characters",
        "train GPT-2's shape",
        "export for transformers",
        "finetune an export",
    ]
    assert record.closure(every, list(every)).index("train") < list(every).index("serve")
