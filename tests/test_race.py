"""Tests of races: equal runs, resumed after a signal, ranked with error bars."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import race
import train
from nanogpt import metrics
from nanogpt.config import load, load_with_arguments
from nanogpt.errors import UserError

ROOT = Path(race.__file__).parent
TINY = """
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
batch_size = 4
gradient_accumulation_steps = 1
eval_interval = 1000
eval_iters = 2
log_interval = 10
save_interval = 20
warmup_iters = 2
device = "cpu"
"""


@pytest.fixture
def entrants(dataset, tmp_path) -> list[str]:
    preset = tmp_path / "tiny.py"
    preset.write_text(TINY + f"dataset = {str(dataset)!r}\n", encoding="utf-8")
    return [str(preset), f"{preset} --activation=swiglu"]


def command(entrants, tmp_path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "race.py"), *entrants, f"--out={tmp_path / 'race'}", *options]


def test_race_goes_on_after_a_signal_and_ranks(entrants, tmp_path):
    words = command(entrants, tmp_path, "--max_iters=600", "--seeds=1")
    started = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("race/*/step-*")):  # a checkpoint of the first run
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=60)[0]
    assert started.returncode == 75 and said.endswith("the race is stopped; the same command continues it\n")
    assert not (tmp_path / "race" / "race.json").exists()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    found = json.loads((tmp_path / "race" / "race.json").read_text(encoding="utf-8"))
    assert {row["entrant"] for row in found["ranking"]} == set(entrants)
    assert [row["iter"] for row in found["runs"]] == [600, 600]
    for row in found["runs"]:
        rows = (Path(row["folder"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["val_loss"] for line in rows if '"eval"' in line]
        assert row["val_loss"] == min(losses)
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "---" not in again.stdout.replace("|---", "") and "| 1 | " in again.stdout  # nothing left to run


def row(entrant: str, seed: int, bits: float | None, **others) -> dict:
    about = {"entrant": entrant, "seed": seed, "folder": "", "bits_per_byte": bits, "val_loss": 2.0 + seed}
    return about | {"iter": 10, "tokens": 1000.0, "seconds": 1.0, "dataset": "d"} | others


def test_table_has_error_bars_and_differences(tmp_path):
    rows = [row(name, s, 1.0 + s / 100 + (name == "b") / 2) for name in "ba" for s in range(3)]
    lines = race.write(tmp_path, "--minutes=1", [*rows, {"entrant": "c", "seed": 0, "folder": ""}])
    assert lines[0].startswith("| | entrant | bits/byte |")
    assert lines[2].startswith("| 1 | a | 1.0100 ± 0.0058 |  |  | 10 | 1,000 |")
    assert lines[3].startswith("| 2 | b | 1.5100 ± 0.0058 | +0.5000 ± 0.0227 | yes |")
    assert "c, seed 0: diverged" in lines
    assert (tmp_path / "race.md").read_text(encoding="utf-8").splitlines()[2] == lines[2]
    saved = json.loads((tmp_path / "race.json").read_text(encoding="utf-8"))
    assert saved["ranking"][0]["values"] == [1.0, 1.01, 1.02] and len(saved["runs"]) == 7


def test_text_of_unknown_size_is_ranked_by_loss(tmp_path):
    lines = race.write(tmp_path, "--minutes=1", [row("a", 0, None), row("b", 1, None)])
    assert "validation loss" in lines[0] and lines[3].endswith("| +1.0000 | one seed | 10 | 1,000 |")
    with pytest.raises(UserError, match="several datasets of unknown size"):
        race.write(tmp_path, "--minutes=1", [row("a", 0, None), row("b", 1, None, dataset="e")])


def test_entrants_start_from_the_weights_that_they_name(entrants, dataset, tmp_path):
    preset = entrants[0]
    train.main(*load(train.Config, [preset, "--max_iters=60", f"--out_dir={tmp_path / 'base'}"]))
    both = [preset, f"{preset} --init_from={tmp_path / 'base'}"]
    race.main(race.Config(max_iters=2, seeds=1, out=str(tmp_path / "race")), both)
    found = json.loads((tmp_path / "race" / "race.json").read_text(encoding="utf-8"))
    folders = [row["folder"] for row in found["runs"]]
    first = [metrics.read(Path(folder))[0]["val_loss"] for folder in folders]
    assert first[1] < first[0] - 0.1
    about = json.loads(Path(folders[1], "config.json").read_text(encoding="utf-8"))
    assert about["options"]["init_from"] == str(tmp_path / "base")


def test_several_datasets_are_mentioned(tmp_path):
    lines = race.write(tmp_path, "--minutes=1", [row("a", 0, 1.0), row("b", 1, 1.1, dataset="e")])
    assert lines[-1] == "each entrant is validated on its own dataset: d, e"


def test_entrants_evaluated_on_different_sequences_are_mentioned(tmp_path):
    rows = [row("a", 0, 1.0) | {"sequences": "[4] of 64"}, row("b", 0, 1.1) | {"sequences": "[1] of 64"}]
    assert race.write(tmp_path, "--max_iters=9", rows)[-1].startswith("note: evaluated on different parts")
    assert "note" not in race.write(tmp_path, "--max_iters=9", [rows[0], row("b", 0, 1.1) | rows[0]])[-1]


def test_bad_input_is_reported_before_anything_runs(entrants, tmp_path):
    out = str(tmp_path / "race")
    for given, reason in (
        ([], "no entrants given"),
        (["--activation=swiglu"], "must begin with a preset"),
        (["no-such-preset"], "no preset 'no-such-preset'"),
        ([f"{entrants[0]} --n_layer=x"], "n_layer is 'x', not"),
        ([f"{entrants[0]} --seed=3"], "--seed=3 is chosen by the race; omit it"),
    ):
        with pytest.raises(UserError, match=reason):
            race.main(race.Config(out=out), given)
    assert not os.path.exists(out)
    race.write(tmp_path, "--minutes=1", [row("a", 0, 1.0)])
    with pytest.raises(UserError, match="holds a race with --minutes=1; give that, or another --out"):
        race.main(race.Config(out=str(tmp_path), minutes=2), entrants)


@pytest.mark.parametrize("runs", ["x", [1], [{"entrant": 1}], [{"entrant": "x", "seed": 1, "val_loss": "x"}]])
def test_a_damaged_race_is_an_error_of_one_line(entrants, tmp_path, runs):
    (tmp_path / "race.json").write_text(json.dumps({"length": "--minutes=5", "runs": runs}), encoding="utf-8")
    with pytest.raises(UserError, match=r"race\.json: runs"):
        race.main(race.Config(out=str(tmp_path)), entrants)


def test_command_line_arguments():
    config, entrants = load_with_arguments(race.Config, ["a.py", "--minutes=2", "b.py --x=1"])
    assert config == race.Config(minutes=2.0) and entrants == ["a.py", "b.py --x=1"]
