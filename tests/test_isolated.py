"""Calls in another process: results, errors, and an ordinary error for a crash, a hang or too much memory."""

import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanogpt.errors import UserError
from nanogpt.prepare import tables
from nanogpt.tokenizer import isolated

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="calls run in this process there")


@pytest.fixture(autouse=True)
def own_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    monkeypatch.setattr(isolated, "_child", None)
    yield
    if isolated._child:
        isolated._child[0].kill()
        isolated._child[0].wait()


def crash() -> None:
    os.abort()


def be_impatient() -> None:
    isolated.CPU_S = 0


def hang() -> None:
    while True:
        pass


def exhaust() -> int:
    return len(bytearray(1 << 31))


def refuse() -> None:
    raise UserError("not this one")


def fail() -> None:
    raise KeyboardInterrupt("a panic\nin two lines")


def test_results_come_from_one_process_that_is_kept(tmp_path, monkeypatch):
    assert isolated.call("x", 0, sorted, [3, 1, 2], reverse=True) == [3, 2, 1]
    monkeypatch.chdir(tmp_path)
    assert isolated.call("x", 0, os.getcwd) == os.getcwd()
    assert isolated.call("x", 0, os.getpid) == isolated.call("x", 0, os.getpid) != os.getpid()


def test_modules_in_the_current_folder_are_not_imported(tmp_path, monkeypatch):
    for name in ("json", "pyarrow", "tokenizers", "nanogpt"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": ["a", "b"]}), "x.parquet")
    found = isolated.call("x", 0, tables.batch, Path("x.parquet"), "text", 0)
    assert found and found[1] == ["a", "b"] and not Path("ran").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (crash, "^x.json: the library that reads it crashes.*exit status -6"),
        (refuse, "^not this one$"),
        (fail, "^x.json: the library that reads it fails: a panic$"),
        (exhaust, "^x.json: the library that reads it fails: MemoryError"),
    ],
)
def test_faults_are_errors_of_one_line_and_the_next_call_works(function, said):
    with pytest.raises(UserError, match=said):
        isolated.call("x.json", 0, function)
    assert isolated.call("x.json", 0, len, "abc") == 3


def test_a_hang_is_ended():
    isolated.call("x", 0, be_impatient)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"x\.json: .* or takes .* s or too much memory"):
        isolated.call("x.json", 0, hang)
    assert time.monotonic() - started < 20


def test_an_interrupted_call_does_not_answer_the_next():
    _, pipe = isolated._running()

    class Interrupted:
        send = pipe.send

        def recv(self) -> None:
            raise KeyboardInterrupt

    isolated._child = isolated._child[0], Interrupted()  # type: ignore[index, assignment]
    with pytest.raises(KeyboardInterrupt):
        isolated.call("x", 0, len, "stale")
    assert isolated.call("x", 0, len, "abc") == 3
