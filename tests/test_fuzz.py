"""Damaged files and wrong command lines end in one line: a small part of benchmarks/fuzz.py."""

import json
import pickle
import random
import subprocess
import sys

import pytest

from benchmarks import fuzz, fuzz_cases
from nanogpt import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads the memory of children")


FILES, OPTIONS = 40, 10


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pytest.importorskip("pyarrow")
    log = tmp_path_factory.mktemp("fuzz") / "log.jsonl"
    # In a process of its own: forks of this one, which has threads of OpenMP, would hang.
    command = [sys.executable, "-m", "benchmarks.fuzz", f"--files={FILES}", f"--options={OPTIONS}"]
    done = subprocess.run(
        [*command, f"--log={log}", "--limit_s=60"], cwd=ROOT, capture_output=True, text=True
    )
    assert log.is_file(), done.stderr
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def test_damaged_files_and_wrong_options_end_in_one_line(rows):
    assert len(rows) == FILES + OPTIONS
    assert [row for row in rows if row["outcome"] in fuzz.BAD] == []
    assert len([row for row in rows if row["outcome"] == "exit 2"]) > len(rows) // 4


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("raise ValueError('x')", "traceback"),
        ("import os; os.system('true')", "execution"),
        ("import os; os.kill(os.getpid(), 9)", "crash"),
        ("import time; time.sleep(60)", "hang"),
        ("open('/var/tmp/nanogpt-fuzz-test', 'w')", "execution"),
        ("raise SystemExit(2)", "exit 2"),
    ],
)
def test_each_kind_of_failure_is_recognized(tmp_path, monkeypatch, code, outcome):
    monkeypatch.setattr(fuzz_cases, "program", lambda name: lambda argv: exec(code))
    try:
        limit_s = 0.2 if outcome == "hang" else 1.0  # a program that waits may take ten times as long
        assert fuzz.run(["sample"], tmp_path, limit_s)[0] == outcome
    finally:
        fuzz.Path("/var/tmp/nanogpt-fuzz-test").unlink(missing_ok=True)


def test_damage_depends_on_the_seed_only_and_changes_most_files():
    content = pickle.dumps({"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}})
    seen = [fuzz_cases.damaged("meta.pkl", content, random.Random(n)) for n in range(100)]
    assert seen == [fuzz_cases.damaged("meta.pkl", content, random.Random(n)) for n in range(100)]
    assert len(set(seen)) > 60 and seen.count(content) < 20
