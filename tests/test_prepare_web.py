"""The programs that prepare large web datasets, on small data of the same format."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanogpt.data import loader
from nanogpt.errors import UserError
from nanogpt.tokenizer import isolated, tokenizer
from nanogpt.tokenizer.gpt2 import load_gpt2
from tests import texts
from tests.conftest import found, words
from tests.hub_server import dataset_hub
from tests.test_prepare import assert_refused, prepare


@pytest.fixture(scope="module", params=["english/sample.jsonl" if found("english/sample.jsonl") else "own"])
def pages(request, real) -> list[str]:
    if request.param == "own":
        return texts.web_pages(326)
    lines = real(request.param).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def repository(pages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as on the hub: Parquet files in a folder, and a README."""
    folder = tmp_path_factory.mktemp("repository")
    for i, part in enumerate((pages[:200], pages[200:])):
        path = folder / "data" / f"train-0000{i}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [f"<{n}>" for n in range(len(part))], "text": part}), path)
    (folder / "README.md").write_text("# Web pages\n", encoding="utf-8")
    return folder


def documents_of(out: Path) -> list[list[int]]:
    """Return the documents of both splits, sorted."""
    loaded = loader.load(out)
    found = []
    for tokens in (loaded.train, loaded.val):
        ids = tokens.read(0, len(tokens))
        ends = np.flatnonzero(ids == 50256)
        assert ends[-1] == len(ids) - 1
        found += [part[part != 50256].tolist() for part in np.split(ids, ends + 1)[:-1]]
    return sorted(found)


def test_web_pages_become_gpt2_tokens(repository, pages, tmp_path, real):
    merges = real("gpt2/vocab.bpe")
    common = ["--val_fraction=0.05", "--seed=1", f"--gpt2_bpe={merges}"]
    splits = []
    for name, source in [
        ("openwebtext", f"--source={repository}"),
        ("openwebtext", f"--hub={repository}"),
        ("fineweb_edu", f"--source={repository / 'data'}/*.parquet"),
    ]:
        out = tmp_path / str(len(splits))
        shard = ["--shard_tokens=50000"] if name == "fineweb_edu" else []
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
        run = prepare(f"{name}/prepare.py", source, f"--out={out}", *common, *shard, **offline)
        assert (run.returncode, run.stderr) == (0, "")
        loaded = loader.load(out)
        splits.append([part.read(0, len(part)) for part in (loaded.train, loaded.val)])
        per_token = sum(len(page.encode()) for page in pages) / sum(map(len, splits[-1]))
        assert f"{len(pages)} documents" in run.stdout and f"bytes per token: {per_token:.2f}" in run.stdout
        assert 3 < per_token < 6
    for train, val in splits[1:]:
        assert np.array_equal(train, splits[0][0]) and np.array_equal(val, splits[0][1])
    assert len(list(out.glob("tokens_train_*.bin"))) > 5
    tokens = load_gpt2(str(merges))
    assert documents_of(out) == sorted(tokens.encode(page).tolist() for page in pages)


def branch(folder: Path, pages: list[str], names: list[str]) -> Path:
    """Write `pages` to the Parquet files `names` of a branch, about equally many in each."""
    bounds = np.linspace(0, len(pages), len(names) + 1).astype(int)
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": pages[bounds[i] : bounds[i + 1]]}), path)
    (folder / "README.md").write_text("# OpenWebText\n", encoding="utf-8")
    return folder


MAIN = [f"plain_text/train-{i:05}-of-00080.parquet" for i in range(80)]
CONVERTED = [f"plain_text/train/{i:04}.parquet" for i in range(3)]
PARTIAL = [f"plain_text/partial-train/{i:04}.parquet" for i in range(2)]
OLD = ["openwebtext.py.parquet"]  # a main branch without plain_text/


@pytest.mark.parametrize(
    ("main", "converted", "used"),
    [
        (MAIN, CONVERTED, MAIN),
        (OLD, CONVERTED, CONVERTED),
        (MAIN[:79], CONVERTED, CONVERTED),  # an upload in progress
        (OLD, PARTIAL, []),
        (MAIN[:79], PARTIAL, []),
        (OLD, [], []),
    ],
    ids=["both", "converted", "incomplete", "partial", "no complete one", "neither"],
)
def test_openwebtext_is_found_in_either_branch_of_the_hub(main, converted, used, tmp_path, real):
    """The default of --hub against a local server; a part of the pages is never taken for all of them."""
    pages = texts.web_pages(160)
    branches = {"main": branch(tmp_path / "main", pages, main)}
    if converted:
        branches["refs/convert/parquet"] = branch(tmp_path / "converted", pages, converted)
    out, bpe = tmp_path / "out", f"--gpt2_bpe={real('gpt2/vocab.bpe')}"
    with dataset_hub("Skylion007/openwebtext", branches) as (url, sent):
        home = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        run = prepare("openwebtext/prepare.py", f"--out={out}", bpe, "--val_fraction=0.05", **home)
    if not used:
        assert_refused(run, "pass --source=FOLDER", out)
        return
    assert (run.returncode, run.stderr) == (0, "")
    assert "160 documents" in run.stdout
    assert set(sent) - {Path(main[0]).name} == {Path(name).name for name in used} - {Path(main[0]).name}
    tokens = load_gpt2(str(real("gpt2/vocab.bpe")))
    assert documents_of(out) == sorted(tokens.encode(page).tolist() for page in pages)


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_no_network_is_a_one_line_error_with_instructions(name, tmp_path, real):
    out = tmp_path / "out"
    bpe = f"--gpt2_bpe={real('gpt2/vocab.bpe')}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    assert_refused(
        prepare(f"{name}/prepare.py", f"--out={out}", bpe, **offline),
        "put its parquet files into a folder and pass --source=FOLDER",
        out,
    )


def test_no_network_and_no_merges_error_says_where_to_put_them(tmp_path):
    nowhere = {"NANOGPT_CACHE": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    nowhere |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    out = tmp_path / "out"
    assert_refused(prepare("openwebtext/prepare.py", f"--out={out}", **nowhere), "put that file at", out)


def test_vocabulary_is_trained_and_reused(tmp_path):
    bodies = [f"Grüße {i}, 世界! {words(60, seed=i)}" for i in range(200)]
    lines = "".join(json.dumps({"body": body}) + "\n" for body in bodies)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    text = [tmp_path / "x.jsonl", "--text_key=body"]
    run = prepare("prepare.py", *text, f"--out={tmp_path / 'a'}", "--tokenizer=bpe:400")
    assert run.returncode == 0 and "tokenizer: hf, vocab size: 400" in run.stdout, run.stderr
    whole = sum(len(body.encode()) for body in bodies)
    loaded = loader.load(tmp_path / "a")
    tokens = len(loaded.train) + len(loaded.val)
    assert f"bytes per token: {whole / tokens:.2f}" in run.stdout
    for again in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        run = prepare("prepare.py", *text, f"--out={tmp_path / 'b'}", f"--tokenizer={again}")
        assert run.returncode == 0, run.stderr
        for name in ("train.bin", "val.bin", "meta.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    made = tokenizer.from_file(tmp_path / "a")
    ids = loaded.train.read(0, len(loaded.train))
    back = tokenizer.decode(made, ids.tolist()).split("<|endoftext|>")
    assert len(back) > 150 and set(back[:-1]) <= set(bodies) and back[-1] == ""


def test_new_options_are_validated_and_documented(tmp_path):
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("some text " * 200, encoding="utf-8")
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "x.parquet")
    for arguments, reason in [
        ([text, "--tokenizer=bpe:many"], "the size must be a number above 257, as in bpe:8192"),
        ([text, "--tokenizer=bpe:257"], "the size must be a number above 257"),
        ([text, "--tokenizer=no/tokenizer.json"], "or the path of a tokenizer.json"),
        ([text, f"--tokenizer={text}"], "is not a tokenizer"),
        ([text, "--workers=-1"], "a whole number from 0 to"),
        ([tmp_path / "x.parquet"], "existing columns: content (string), n (int64)"),
        ([tmp_path / "x.parquet", "--text_key=n"], "'n' is of type int64"),
        ([tmp_path / "*.zst"], "no such file"),
        ([f"--hub={tmp_path / 'nothing'}"], "--hub="),
    ]:
        assert_refused(prepare("prepare.py", *arguments, f"--out={out}", HF_HUB_OFFLINE="1"), reason, out)


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "x.parquet"), ("zstandard", "x.jsonl.zst"), ("datasets", "--hub=x")]
)
def test_missing_package_is_named(package, name, tmp_path, monkeypatch):
    from nanogpt.prepare import corpus

    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / "hidden").mkdir()  # from the process that reads tables
    (tmp_path / "hidden" / f"{package}.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    monkeypatch.setattr(isolated, "_child", None)
    start = b"PAR1" if package == "pyarrow" else b"\x28\xb5\x2f\xfd"
    (tmp_path / name).write_bytes(start + b"x" * 100)
    paths, hub = ([], "x") if name.startswith("--") else ([tmp_path / name], "")
    with pytest.raises(UserError, match=f"pip install {package}"):
        corpus.prepare(paths, tmp_path / "out", hub=hub)
    assert not (tmp_path / "out").exists()
