"""Your own texts: `nanogpt novel.txt`, `train.py --dataset=novel.txt`, what prepare.py suggests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from nanogpt.checkpoint import reader
from nanogpt.config import load
from nanogpt.errors import UserError
from nanogpt.prepare import corpus, own_text
from tests import launch
from tests.conftest import words

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--eval_iters=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text(words(900), encoding="utf-8")
    return tmp_path


def nanogpt(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return launch.run(["-m", "nanogpt", *arguments], folder)


def test_one_command_leads_from_a_text_to_samples(folder):
    done = nanogpt(folder, "novel.txt", "--max_iters=3", "--device=cpu", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prepared 1 file: ") and done.stdout.count("-" * 15) == 3
    assert (folder / "out-novel" / "step-000003").is_dir()
    (data,) = (folder / "data").iterdir()
    assert f"the model is in out-novel, the tokens of the text in {Path('data', data.name)}" in done.stdout
    made = (data / "train.bin").stat().st_mtime_ns
    done = nanogpt(folder, "novel.txt", "--max_iters=4", "--device=cpu", "--out_dir=mine", *SMALL)
    assert done.returncode == 0 and "prepared" not in done.stdout, done.stderr
    assert (data / "train.bin").stat().st_mtime_ns == made and (folder / "mine" / "step-000004").is_dir()


def test_one_command_trains_for_minutes_by_default():
    started = []
    with pytest.raises(SystemExit):
        own_text.train_and_sample(["--help"], lambda *words: started.append(words) or sys.exit(0))
    assert started == [("train", "--help")]


@pytest.mark.parametrize(
    ("options", "length"),
    [([], ["--minutes=5"]), (["--minutes=1"], []), (["--max_iters=9"], []), (["--init_from=resume"], [])],
)
def test_length_of_training(folder, options, length):
    started = []
    own_text.train_and_sample(["novel.txt", *options], lambda *words: started.append(list(words)))
    (name, preset, dataset, out, *rest), sampled = started
    assert name == "train" and (ROOT / preset).is_file() and out == "--out_dir=out-novel"
    assert dataset == f"--dataset={own_text.folder_of([Path('novel.txt')])}" and rest == [*length, *options]
    assert sampled[:2] == ["sample", "--out_dir=out-novel"]


def test_dataset_is_found_by_content(folder):
    first = own_text.folder_of([folder / "novel.txt"])
    assert first.parent == Path("data") and first.name.startswith("novel-")
    os.utime(folder / "novel.txt", (0, 0))
    assert own_text.folder_of([folder / "novel.txt"]) == first
    with (folder / "novel.txt").open("a", encoding="utf-8") as file:
        file.write("more")
    assert own_text.folder_of([folder / "novel.txt"]) != first
    assert own_text.folder_of([folder]).name.startswith(f"{folder.name}-")


def test_folder_is_prepared_anew_after_a_change_of_names_or_behind_links(folder):
    files = {"corp/a.txt": words(300), "corp/b.txt": words(200), "far/c.txt": words(100)}
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    os.symlink("../far", "corp/lib")
    seen = [own_text.folder_of([Path("corp")])]
    Path("far/c.txt").write_text(words(101), encoding="utf-8")
    seen.append(own_text.folder_of([Path("corp")]))
    Path("corp/b.txt").rename("corp/valid.txt")
    seen.append(own_text.folder_of([Path("corp")]))
    Path("corp/.hidden").write_text("not read", encoding="utf-8")
    assert len(set(seen)) == 3 and own_text.folder_of([Path("corp")]) == seen[-1]


def test_what_is_left_out_is_reported_with_one_command_too(folder, capsys):
    Path("mix").mkdir()
    Path("mix/a.txt").write_bytes("Das Mädchen\n".encode("cp1252") * 100)
    Path("mix/b.txt").write_text(words(300), encoding="utf-8")
    Path("mix/c.pdf").write_bytes(b"%PDF-1.7\n")
    Path("mix/test.txt").write_text("<|endoftext|>", encoding="utf-8")
    own_text.prepare([Path("mix")])
    said = capsys.readouterr().out
    assert "skipped mix/a.txt: byte 0xe4 at offset 5" in said and "skipped mix/c.pdf: a PDF" in said
    assert "not used, because named as test data: mix/test.txt" in said


def test_one_document_per_split_has_no_end(folder):
    Path("two").mkdir()
    for name in ("train.txt", "val.txt"):
        Path("two", name).write_text(words(300), encoding="utf-8")
    assert not any("document ends" in line for line in corpus.prepare([Path("two")], Path("d")).lines())
    Path("two", "train2.txt").write_text(words(200), encoding="utf-8")
    assert "each document ends with a newline" in corpus.prepare([Path("two")], Path("d")).lines()


def test_dataset_option_takes_a_text_and_the_run_does_not_need_it_again(folder):
    given = [
        "--dataset=novel.txt",
        "--out_dir=out",
        "--device=cpu",
        "--gradient_accumulation_steps=1",
        *SMALL,
    ]
    train.main(*load(train.Config, [*given, "--max_iters=2"]))
    saved = json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))["options"]["dataset"]
    assert Path(saved) == own_text.folder_of([Path("novel.txt")])
    (folder / "novel.txt").unlink()
    train.main(*load(train.Config, ["--out_dir=out", "--init_from=resume", "--max_iters=4"]))
    assert reader.find(folder / "out")[0].iter_num == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "novel.txt: empty"), ("one line", "has 7 tokens, fewer than one sequence of block_size")],
)
def test_unusable_text_is_a_one_line_error(folder, text, message):
    (folder / "novel.txt").write_text(text, encoding="utf-8")
    done = nanogpt(folder, "novel.txt")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(folder.glob("out*"))


def test_options_of_preparation_are_referred_to_its_program(folder):
    (folder / "novel.txt").write_bytes(b"some words\n" * 500 + b"\xff\n")
    done = nanogpt(folder, "novel.txt", "--on_undecodable=replace")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "options such as these go to: nanogpt prepare novel.txt\n" in done.stderr


def test_a_prepared_dataset_is_not_read_as_text(folder):
    own_text.prepare([folder / "novel.txt"])
    (dataset,) = (folder / "data").iterdir()
    done = nanogpt(folder, f"data/{dataset.name}")
    assert done.returncode == 2
    assert f"to train on it: nanogpt train PRESET --dataset=data/{dataset.name}\n" in done.stderr


def test_unknown_files_and_options_are_named(folder):
    done = nanogpt(folder, "novell.txt")
    assert done.returncode == 2 and "no file or program 'novell.txt'" in done.stderr
    done = nanogpt(folder, "novel.txt", "other.txt")
    assert done.returncode == 2 and "no file or folder 'other.txt'" in done.stderr
    done = nanogpt(folder, "novel.txt", "--lerning_rate=1")
    assert done.returncode == 2 and "did you mean 'learning_rate'?" in done.stderr


@pytest.mark.parametrize(
    ("kind", "gpu", "expected"),
    [
        ("char", False, "config/quickstart.py --dataset=data/my_book --out_dir=out-my-book"),
        ("char", True, "config/train_shakespeare_char.py --dataset=data/my_book --out_dir=out-my-book"),
        ("byte", False, "config/quickstart.py --dataset=data/my_book --out_dir=out-my-book"),
    ],
)
def test_prepare_names_the_preset_for_the_data_and_the_machine(folder, monkeypatch, kind, gpu, expected):
    monkeypatch.setattr(own_text, "has_gpu", lambda: gpu)
    summary = corpus.prepare([Path("novel.txt")], Path("data/my_book"), kind=kind)
    assert own_text.training_command(summary) == f"python train.py {expected}"


def test_prepare_suggests_finetuning_for_gpt2_tokens(folder, monkeypatch, real):
    monkeypatch.setattr(own_text, "has_gpu", lambda: False)
    merges = str(real("gpt2/vocab.bpe"))
    summary = corpus.prepare([Path("novel.txt")], Path("data/novel"), kind="gpt2", gpt2_bpe=merges)
    expected = "config/finetune_shakespeare.py --init_from=gpt2 --dataset=data/novel --out_dir=out-novel"
    assert own_text.training_command(summary) == f"python train.py {expected}"


def test_missing_text_raises(folder):
    with pytest.raises(UserError, match="no file or folder 'x'"):
        own_text.train_and_sample(["novel.txt", "x"], print)
