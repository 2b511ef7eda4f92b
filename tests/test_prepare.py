"""The programs in data/, run from the command line on realistic input."""

import hashlib
import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nanogpt.data import loader
from nanogpt.prepare import analyze
from nanogpt.tokenizer import download, tokenizer
from tests import launch, texts
from tests.conftest import found, words

ROOT = Path(__file__).resolve().parent.parent
PLAY = "".join(texts.web_pages(8))
EXPECT_PLAY = [  # Python arguments: run the program that follows, with PLAY as Shakespeare's text
    "-c",
    "import runpy, sys; from nanogpt.tokenizer import download\n"
    f"download.SHAKESPEARE_SHA256 = {hashlib.sha256(PLAY.encode()).hexdigest()!r}\n"
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')",
]
SHAKESPEARE = "tinyshakespeare.txt"
NANOGPTS = {  # SHA-256 of the files that nanoGPT's programs produce
    "shakespeare/train.bin": "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
    "shakespeare/val.bin": "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
    "shakespeare_char/train.bin": "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
    "shakespeare_char/val.bin": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
}
REFUSED = {
    "empty.txt": "empty",
    "invalid_utf8.bin": "byte 0xc3 at offset {} is neither UTF-8 nor UTF-16 nor GB18030",
    "latin1_german.txt": "byte 0xe4 at offset {} is neither UTF-8 nor UTF-16 nor GB18030",
    "one_repeated_char.txt": "at least 2 distinct characters are needed",
    "single_char.txt": "at least 2 are needed",
    "single_newline.txt": "at least 2 are needed",
}


def prepare(
    program: str, *arguments: object, cwd: Path = ROOT, before: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess:
    """Run `python BEFORE data/PROGRAM ARGUMENTS`."""
    command = [str(ROOT / "data" / program), *map(str, arguments)]
    variables = {"NO_PROXY": "127.0.0.1", **variables}
    if not before:
        return launch.run(command, cwd, variables)
    return subprocess.run(
        [sys.executable, *before, *command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def assert_refused(run: subprocess.CompletedProcess, reason: str, out: Path) -> None:
    """Assert exit code 2, one line on stderr, and no output folder."""
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert reason in run.stderr
    assert not out.exists()


def text_of(out: Path) -> str:
    tokens = tokenizer.from_text((out / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [np.fromfile(out / f"{split}.bin", dtype="<u2") for split in ("train", "val")]
    return tokenizer.decode(tokens, np.concatenate(ids).tolist())


def hashes_of(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("train.bin", "val.bin")}


def by_nanogpts_rule(text: str) -> dict[str, str]:
    """Return the hashes of nanoGPT's character files: ids in character order, the first 90% is train."""
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    cut = int(len(text) * 0.9)
    parts = {"train.bin": text[:cut], "val.bin": text[cut:]}
    ids = {name: struct.pack(f"<{len(part)}H", *map(number.get, part)) for name, part in parts.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in ids.items()}


def nanogpts(name: str) -> dict[str, str]:
    return {split: NANOGPTS[f"{name}/{split}"] for split in ("train.bin", "val.bin")}


# ----------------------------------------------------------------------------- data/prepare.py


def test_odd_files_round_trip_or_are_rejected_in_one_line(tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for name, content in texts.awkward().items():
        (odd / name).write_bytes(content)
    assert {path.name for path in odd.iterdir()} >= REFUSED.keys()
    folders = [odd, *filter(None, [found("odd")])]
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        out = tmp_path / path.parent.parent.name / path.stem
        run = prepare("prepare.py", path, f"--out={out}")
        if reason := REFUSED.get(path.name):
            byte = re.findall(r"byte 0x(..)", reason)
            offset = path.read_bytes().index(bytes.fromhex(*byte)) if byte else None
            assert_refused(run, reason.format(offset), out)
            continue
        assert (run.returncode, run.stderr) == (0, ""), path.name
        encoding = "utf-16" if path.name.startswith("utf16") else "utf-8-sig"
        with path.open(encoding=encoding) as file:  # universal newlines
            assert text_of(out) == file.read(), path.name
        loader.load(out)


@pytest.mark.parametrize(
    "name", ["own", *["chinese/sanguo_yanyi.txt"] * bool(found("chinese/sanguo_yanyi.txt"))]
)
def test_chinese_novel_becomes_character_tokens(name, real, tmp_path):
    novel = tmp_path / "novel.txt" if name == "own" else real(name)
    if name == "own":
        novel.write_text(texts.chinese_novel(), encoding="utf-8", newline="\r\n")
    text = novel.read_text(encoding="utf-8")
    out = tmp_path / "三国 演义"
    run = prepare("prepare.py", novel, f"--out={out}")
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert f"tokenizer: char, vocab size: {len(set(text)):,}" in lines
    assert "newlines normalized to \\n" in lines
    assert lines[-1] == f'python train.py config/quickstart.py "--dataset={out}" "--out_dir=out-{out.name}"'
    assert text_of(out) == text


def test_paths_are_relative_to_the_working_directory(tmp_path):
    (tmp_path / "my.txt").write_text("some text " * 20, encoding="utf-8")
    run = prepare("prepare.py", "my.txt", "--out=data/mine", "--tokenizer=byte", cwd=tmp_path)
    assert run.stdout.endswith(
        "python train.py config/quickstart.py --dataset=data/mine --out_dir=out-mine\n"
    )
    assert text_of(tmp_path / "data" / "mine") == "some text " * 20


def test_gpt2_tokens_equal_nanogpts(real, tmp_path):
    out = tmp_path / "out"
    bpe = f"--gpt2_bpe={real('gpt2/vocab.bpe')}"
    run = prepare("prepare.py", real(SHAKESPEARE), f"--out={out}", "--tokenizer=gpt2", bpe)
    assert run.returncode == 0
    assert hashes_of(out) == nanogpts("shakespeare")


def test_options_are_validated_and_documented(tmp_path):
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("some text " * 20, encoding="utf-8")
    for arguments, reason in [
        ([text], "--out=... is required"),
        ([f"--out={out}"], "give a text and a dataset folder"),
        ([text, "--out="], "give a text and a dataset folder"),
        ([tmp_path / "no.txt", f"--out={out}"], "no such file"),
        ([text, f"--out={out}", "--val_fraction=1"], "must lie between 0 and 1"),
        ([text, f"--out={out}", "--tokenizer=morse"], "must be auto, char, byte, gpt2"),
        ([text, f"--out={out}", "--encoding=latin-99"], "unknown encoding"),
        ([text, f"--out={out}", "--gpt2_bpe=vocab.bpe"], "needs --tokenizer=gpt2"),
    ]:
        assert_refused(prepare("prepare.py", *arguments), reason, out)
    shown = prepare("prepare.py", "--help").stdout
    assert all(f"--{name}" in shown for name in ("out", "tokenizer", "val_fraction", "encoding", "gpt2_bpe"))


def test_unwritable_disk_is_a_one_line_error(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("some text " * 20, encoding="utf-8")
    run = prepare("prepare.py", text, f"--out={text / 'below a file'}")
    assert run.returncode == 74 and run.stderr.startswith("input/output error: ")
    assert run.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure the peak memory")
def test_memory_is_independent_of_text_size(tmp_path):
    body = words(200_000).encode()
    with (tmp_path / "big.txt").open("wb") as file:
        for _ in range(200_000_000 // len(body)):
            file.write(body)
    code = (
        "import sys; from pathlib import Path; from nanogpt.prepare import corpus\n"
        "corpus.prepare([Path(sys.argv[1])], Path(sys.argv[2]), kind='char')\n"
        "status = Path('/proc/self/status').read_text(encoding='utf-8')\n"
        "print(status.split('VmHWM:')[1].split()[0])"  # kB; ru_maxrss would include the parent's memory
    )
    command = [sys.executable, "-c", code, str(tmp_path / "big.txt"), str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    size = (tmp_path / "out" / "train.bin").stat().st_size + (tmp_path / "out" / "val.bin").stat().st_size
    assert size > 390_000_000
    assert int(run.stdout) < 150_000  # measured: 70 MB, for this and for a text of 1 GB
    for name in ("big.txt", "out/train.bin", "out/val.bin"):  # pytest keeps the last three runs
        (tmp_path / name).unlink()


# ----------------------------------------------------------------------------- Shakespeare


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char"])
def test_shakespeare_gives_nanogpts_files_byte_for_byte(name, real, tmp_path):
    bpe = [f"--gpt2_bpe={real('gpt2/vocab.bpe')}"] if name == "shakespeare" else []
    run = prepare(f"{name}/prepare.py", f"--input={real(SHAKESPEARE)}", f"--out={tmp_path / 'out'}", *bpe)
    assert (run.returncode, run.stderr) == (0, "")
    assert "length of dataset in characters: 1,115,394" in run.stdout and "note:" not in run.stdout
    assert hashes_of(tmp_path / "out") == nanogpts(name)


@pytest.mark.parametrize(
    "text", [PLAY, texts.chinese_novel(5003), "some text " * 20], ids=["play", "hanzi", "short"]
)
def test_different_text_is_prepared_with_a_note(text, tmp_path):
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    run = prepare("shakespeare_char/prepare.py", f"--input={tmp_path / 'x.txt'}", f"--out={tmp_path / 'out'}")
    assert run.returncode == 0 and run.stdout.count("is not the usual tinyshakespeare.txt") == 1
    assert hashes_of(tmp_path / "out") == by_nanogpts_rule(text)


@contextmanager
def serving(content: bytes) -> Iterator[str]:
    """Serve the text, and typical server failures, on localhost; yield the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/missing" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.path == "/cut":
                self.wfile.write(content[: len(content) // 2])
            else:
                self.wfile.write(content.upper() if self.path == "/wrong" else content)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[str]:
    with serving(PLAY.encode()) as address:
        yield address


def download_play(address: str, out: Path, cache: Path) -> subprocess.CompletedProcess:
    program = "shakespeare_char/prepare.py"
    return prepare(program, f"--url={address}", f"--out={out}", before=EXPECT_PLAY, NANOGPT_CACHE=str(cache))


def test_download_is_cached(server, tmp_path):
    for i, address in enumerate((f"{server}/right", "http://127.0.0.1:9/right")):  # no server on port 9
        run = download_play(address, tmp_path / str(i), tmp_path / "cache")
        assert (run.returncode, run.stderr) == (0, "") and "note:" not in run.stdout
        assert hashes_of(tmp_path / str(i)) == by_nanogpts_rule(PLAY)


def test_shakespeare_is_downloaded(real, tmp_path):
    cache, out = str(tmp_path / "cache"), tmp_path / "out"
    with serving(real(SHAKESPEARE).read_bytes()) as server:
        run = prepare("shakespeare_char/prepare.py", f"--url={server}", f"--out={out}", NANOGPT_CACHE=cache)
    assert (run.returncode, run.stderr) == (0, "")
    assert hashes_of(out) == nanogpts("shakespeare_char")


@pytest.mark.parametrize("path", ["missing", "cut", "wrong", "offline", "no address"])
def test_failed_download_leaves_no_files_and_suggests_an_alternative(path, server, tmp_path):
    cache, out = tmp_path / "cache", tmp_path / "out"
    address = {"offline": "http://127.0.0.1:9/right", "no address": "no address"}.get(
        path, f"{server}/{path}"
    )
    run = download_play(address, out, cache)
    assert_refused(run, address, out)
    assert "--input=FILE" in run.stderr and "python data/python_stdlib/prepare.py" in run.stderr
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_damaged_cached_file_is_not_used(server, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / SHAKESPEARE).write_bytes(b"half a down")
    run = download_play(f"{server}/right", tmp_path / "out", cache)
    assert run.returncode == 0
    assert hashes_of(tmp_path / "out") == by_nanogpts_rule(PLAY)


def test_url_equals_nanogpts():
    assert download.SHAKESPEARE_URL.endswith("karpathy/char-rnn/master/data/tinyshakespeare/input.txt")


# ----------------------------------------------------------------------------- Python's standard library


def test_standard_library_is_prepared_as_a_corpus(tmp_path):
    run = prepare("python_stdlib/prepare.py", f"--out={tmp_path / 'a'}")
    assert (run.returncode, run.stderr) == (0, "")
    text = text_of(tmp_path / "a")
    assert text.isascii() and len(text) > 5_000_000
    assert "class OrderedDict(dict):" in text and "class Thread:" in text
    names = [
        source["name"]
        for source in json.loads((tmp_path / "a/meta.json").read_text(encoding="utf-8"))["source"]
    ]
    assert not [name for name in names if "test" in Path(name).parts or "site-packages" in name]
    prepare("python_stdlib/prepare.py", f"--out={tmp_path / 'b'}", cwd=tmp_path)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_progress_is_shown_within_ten_seconds_and_then_each_minute(capsys):
    with analyze.progress("checking") as bar:
        shown, start = [], bar.start_t
        for second in (1, 9, 20, 50, 70):
            bar._time = lambda second=second: start + second
            bar.update(1 << 20)
            shown.append(capsys.readouterr().err.strip())
    assert [bool(line) for line in shown] == [False, True, False, False, True]
    assert "2.10MB [00:09, 233kB/s]" in shown[1]
