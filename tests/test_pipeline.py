"""The encoding pipeline: identical output for any number of processes, after interruptions, and in shards."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt import files
from nanogpt.data import loader
from nanogpt.errors import Stopped, UserError
from nanogpt.prepare import corpus, encode, formats, pool, shards, text_files
from nanogpt.tokenizer import tokenizer
from tests.conftest import words
from tests.test_readers import write

ROOT = Path(__file__).resolve().parent.parent
BODIES = [f"document {i}: {words(5 + i % 90, seed=i)}" for i in range(1500)]


def content(out: Path) -> dict[str, bytes]:
    assert not (out / shards.UNFINISHED).exists()
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable fsync; no test here simulates a power cut."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "x.jsonl.xz", BODIES)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BLOCK", 10_000)


# ----------------------------------------------------------------------------- processes


@pytest.mark.parametrize("kind", ["bpe:400", "gpt2"])
def test_output_is_independent_of_the_number_of_processes(kind, source, tmp_path, of_kind, small_pieces):
    long = tmp_path / "long.txt"
    long.write_text(words(8000), encoding="utf-8")
    for workers in (0, 1, 2):
        out = tmp_path / f"out{workers}"
        corpus.prepare([source, long], out, workers=workers, **of_kind(kind))
    assert content(tmp_path / "out0") == content(tmp_path / "out1") == content(tmp_path / "out2")


def test_results_are_ordered_and_items_are_read_lazily():
    drawn = []

    def items():
        for i in range(10, 100):
            drawn.append(i)
            yield i

    for workers in (0, 1):
        drawn.clear()
        results = pool.ordered(hex, items(), workers, int, ())
        assert [next(results) for _ in range(10)] == [hex(i) for i in range(10, 20)]
        assert len(drawn) <= 10 + 2 * workers + 1
        assert list(results) == [hex(i) for i in range(20, 100)]


def test_worker_errors_are_reported():
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        list(pool.ordered(tokenizer.from_text, ["{}"], 1, int, ()))
    with pytest.raises(OSError, match="a worker process was killed"):
        list(pool.ordered(os._exit, [1], 1, int, ()))


# ----------------------------------------------------------------------------- interruptions


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (Crash, {}),
        (KeyboardInterrupt, {}),
        (Crash, {"shard_tokens": 7000}),
        (KeyboardInterrupt, {"shard_tokens": 7000}),
        (Crash, {"text_key": "prompt+response"}),  # with a loss mask file
    ],
)
def test_interrupted_run_resumes_to_identical_output(
    error, options, source, tmp_path, small_pieces, monkeypatch
):
    options = {"kind": "byte", **options}
    if "text_key" in options:
        source = tmp_path / "questions.jsonl"
        rows = [{"prompt": body[:9], "response": body[9:]} for body in BODIES]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = corpus.prepare([source], tmp_path / "whole", **options)
    monkeypatch.setattr(corpus, "RECORD_S", 0.0)
    real = shards.Writer.add
    out = tmp_path / "out"
    for stop in (9, 12, 20):  # calls, two per piece: the third run encodes the first piece again
        calls = iter(range(1000))

        def failing(writer, split, ids, calls=calls, stop=stop):
            real(writer, split, ids)
            if next(calls) == stop:
                raise error

        monkeypatch.setattr(shards.Writer, "add", failing)
        with pytest.raises(Stopped if error is KeyboardInterrupt else error):
            corpus.prepare([source], out, **options)
        with pytest.raises(UserError):
            loader.load(out)
    unfinished = out / shards.UNFINISHED
    grown = [path for path in unfinished.iterdir() if path.name not in ("state.json", ".lock")]
    assert {"folded", "train-000000"} <= {path.name for path in grown}
    # As after a power cut: files longer than recorded progress. In `folded` this would put a document
    # into both splits.
    beyond = np.array([2, 3], "<u8").tobytes() * 40_000
    for path in grown:
        with path.open("ab") as file:
            file.write(beyond)
    monkeypatch.setattr(shards.Writer, "add", real)
    summary = corpus.prepare([source], out, **options)
    assert content(out) == content(tmp_path / "whole")
    assert ("train.mask.bin" in content(out)) == ("text_key" in options)
    assert summary.in_both == whole.in_both
    assert summary.resumed and "resumed an interrupted run" in summary.lines()


def test_changed_options_start_over(source, tmp_path, small_pieces, monkeypatch):
    corpus.prepare([source], tmp_path / "whole", kind="byte", seed=1)
    monkeypatch.setattr(corpus, "RECORD_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(corpus.Counts, "add", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            corpus.prepare([source], tmp_path / "out", kind="byte")
    assert not (tmp_path / "out").exists()  # no progress was recorded, so nothing is kept
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        real = shards.Writer.record
        patch.setattr(
            shards.Writer,
            "record",
            lambda writer, progress: (
                real(writer, progress) if next(calls) < 3 else (_ for _ in ()).throw(Crash)
            ),
        )
        with pytest.raises(Crash):
            corpus.prepare([source], tmp_path / "out", kind="byte")
    assert (tmp_path / "out" / shards.UNFINISHED / "state.json").is_file()
    summary = corpus.prepare([source], tmp_path / "out", kind="byte", seed=1)
    assert not summary.resumed and content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["counts", "tokens", "folded", "cut", "no object", "not JSON"])
def test_damaged_progress_starts_over(source, tmp_path, small_pieces, monkeypatch, damage):
    corpus.prepare([source], tmp_path / "whole", kind="byte")
    monkeypatch.setattr(corpus, "RECORD_S", 0.0)
    real, unfinished = shards.Writer.record, tmp_path / "out" / shards.UNFINISHED

    def stop(writer, progress):
        real(writer, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(shards.Writer, "record", stop)
        corpus.prepare([source], tmp_path / "out", kind="byte")
    state = json.loads((unfinished / "state.json").read_text(encoding="utf-8"))
    if damage == "cut":  # not filled up with zeros
        (unfinished / "train-000000").write_bytes(b"")
    elif damage in ("no object", "not JSON"):
        (unfinished / "state.json").write_text("[]" if damage == "no object" else "{", encoding="utf-8")
    else:
        changed = {"counts": {"progress": {"counts": []}}, "tokens": {"tokens": {"train": 10**9, "val": 1}}}
        state |= changed.get(damage, {"folded": 1.5})
        (unfinished / "state.json").write_text(json.dumps(state), encoding="utf-8")
    summary = corpus.prepare([source], tmp_path / "out", kind="byte")
    assert not summary.resumed and content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_pipeline_resumes_to_identical_output(number, tmp_path):
    source = write(tmp_path / "x.jsonl.xz", BODIES * 4)
    code = (
        "import sys; from pathlib import Path; from nanogpt.prepare import corpus, formats; import time\n"
        "from nanogpt.errors import run_program\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # may be ignored
        "formats.BLOCK, corpus.RECORD_S = 20_000, float(sys.argv[4])\n"
        "if __name__ == '__main__':\n"
        "    add = corpus.Counts.add\n"
        "    corpus.Counts.add = lambda *a: (time.sleep(float(sys.argv[3])), add(*a))[1]\n"
        "    paths = [Path(sys.argv[1])]\n"
        "    run_program(lambda: corpus.prepare(paths, Path(sys.argv[2]), kind='byte', workers=2))"
    )
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    out = tmp_path / "out"

    def start(pause: float, record_s: float) -> subprocess.Popen:
        command = [sys.executable, tmp_path / "program.py", source, out, str(pause), str(record_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    running = start(0.05, 0.0)
    state = out / shards.UNFINISHED / "state.json"
    deadline = time.monotonic() + 60
    while not state.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # like Ctrl-C in a terminal
    else:
        running.kill()
    said = running.communicate(timeout=60)[1]
    assert running.returncode == (75 if number == signal.SIGINT else -9), said
    if number == signal.SIGINT:
        assert said.strip() == "interrupted; run the same command again to resume"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # wait until the workers exit, too
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("processes are left")
    place = json.loads(state.read_text(encoding="utf-8"))["progress"]["next"]
    assert place[1][1] > 0  # lines
    assert start(0.0, 5.0).wait() == 0
    corpus.prepare([source], tmp_path / "whole", kind="byte")
    assert content(out) == content(tmp_path / "whole")


def test_second_process_is_locked_out(source, tmp_path):
    held = files.lock(tmp_path / "out" / shards.UNFINISHED)
    with pytest.raises(UserError, match="another process is writing to"):
        corpus.prepare([source], tmp_path / "out", kind="byte")
    held.release()
    corpus.prepare([source], tmp_path / "out", kind="byte")


# ----------------------------------------------------------------------------- shards


@pytest.mark.parametrize("kind", ["bpe:400", "gpt2"])
def test_shards_hold_the_same_tokens_in_llm_c_format(kind, source, tmp_path, of_kind):
    options = of_kind(kind)
    corpus.prepare([source], tmp_path / "one", **options)
    corpus.prepare([source], tmp_path / "many", shard_tokens=10_000, **options)
    one, many = loader.load(tmp_path / "one"), loader.load(tmp_path / "many")
    for split in ("train", "val"):
        a, b = getattr(one, split), getattr(many, split)
        assert np.array_equal(a.read(0, len(a)), b.read(0, len(b)))
    names = sorted(path.name for path in (tmp_path / "many").glob("*.bin"))
    assert names[0] == "tokens_train_000000.bin" and len(names) > 5
    raw = np.fromfile(tmp_path / "many" / names[0], "<i4", 256)
    assert raw[:3].tolist() == [20240520, 1, 10_000] and not raw[3:].any()
    assert all(part.tokens == 10_000 for part in many.train.parts[:-1])
    corpus.prepare([source], tmp_path / "many", **options)  # overwrites it with a single file
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_exactly_filled_shards_leave_no_empty_shard(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("ab" * 500, encoding="utf-8")
    corpus.prepare([path], tmp_path / "out", kind="byte", shard_tokens=100)
    loaded = loader.load(tmp_path / "out")
    assert [part.tokens for part in loaded.train.parts] == [100] * 9
    assert [part.tokens for part in loaded.val.parts] == [100]


# ----------------------------------------------------------------------------- splits and counts


def side(out: Path, **options: object) -> set[str]:
    """Return the documents of BODIES that are in the validation split."""
    corpus.prepare([write(out.parent / "s.jsonl", BODIES)], out, kind="byte", val_fraction=0.2, **options)
    tokens = tokenizer.ByteTokenizer()
    whole = tokens.decode_bytes(np.fromfile(out / "val.bin", "<u2")).decode()
    return {body for body in BODIES if body in whole}


def test_seed_determines_the_split(tmp_path):
    none, one, two = (side(tmp_path / str(seed), seed=seed) for seed in (0, 1, 2))
    assert all(200 < len(found) < 400 for found in (none, one, two))
    for a, b in ((none, one), (none, two), (one, two)):
        assert 20 < len(a & b) < 120  # expected: 1500 / 5 / 5 = 60
    assert side(tmp_path / "again", seed=1) == one


def test_documents_in_both_splits_are_counted(tmp_path, monkeypatch):
    changed = [body.upper().replace(" ", "  ") + "!!" for body in BODIES[:400]]
    path = write(tmp_path / "x.jsonl", BODIES + changed + BODIES[:100])
    out = tmp_path / "out"
    found = set()
    for at_a_time in (4_000_000, 300):
        monkeypatch.setattr(shards, "AT_A_TIME", at_a_time)
        summary = corpus.prepare([path], out, kind="byte", val_fraction=0.2)
        found.add(summary.in_both)
    split = encode.Split(0.2)

    def in_val(body: str) -> bool:
        digest = text_files.Digest()
        digest.add(body)
        return split.train_length(digest.document()) == 0

    in_both = 0
    for i, body in enumerate(BODIES[:400]):
        first, second = in_val(body), in_val(changed[i])
        if first != second:  # a copy of a document is in the same split, and counts again
            in_both += 2 if first and i < 100 else 1
    assert found == {in_both} and in_both > 100
    assert f"{in_both} of val also in train" in "\n".join(summary.lines())


def test_broken_rows_are_skipped_and_counted_only_on_request(tmp_path):
    path = tmp_path / "x.jsonl"
    good = [json.dumps({"text": body}) for body in BODIES]
    broken = {5: "{", 300: '{"body": 1}', 301: "[]", 302: "x", 900: '{"text": null}'}
    rows = [line for i, row in enumerate(good) for line in ([broken[i], row] if i in broken else [row])]
    path.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl, line 6 is not valid JSON.*--skip_bad"):
        corpus.prepare([path], tmp_path / "out", kind="byte")
    assert not (tmp_path / "out").exists()
    summary = corpus.prepare([path], tmp_path / "out", kind="byte", skip_bad=True)
    assert summary.counts.bad_rows == 5 and sum(summary.counts.documents.values()) == len(BODIES)
    line = next(line for line in summary.lines() if "broken" in line)
    assert line.startswith("skipped 5 broken rows") and "line 6" in line and "line 302" in line
    corpus.prepare([write(tmp_path / "clean.jsonl", BODIES)], tmp_path / "clean", kind="byte")
    assert (tmp_path / "out" / "train.bin").read_bytes() == (tmp_path / "clean" / "train.bin").read_bytes()


# ----------------------------------------------------------------------------- progress display


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


def test_terminal_shows_rate_and_remaining_time(source, tmp_path, small_pieces, monkeypatch):
    shown = Screen(terminal=True)
    monkeypatch.setattr(sys, "stderr", shown)
    add = corpus.Counts.add
    monkeypatch.setattr(corpus.Counts, "add", lambda *given: (time.sleep(0.03), add(*given)))
    corpus.prepare([source], tmp_path / "out", kind="byte")
    assert re.search(r"encoding: +\d+%.*\d\d:\d\d<\d\d:\d\d, .*B/s.*M tokens", shown.getvalue())
    quiet = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", quiet)
    corpus.prepare([source], tmp_path / "out", kind="byte")
    assert quiet.getvalue() == ""
