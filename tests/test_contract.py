"""Stable interfaces (docs/design.md, "Contracts"): keys, printed lines, options, folders.

tests/contract/ was written by commit 4d95b57: a dataset, a run of four iterations on it, and all options of
train.py with their defaults.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import export
import plot
import sample
import train
from nanogpt import metrics, presets
from nanogpt.config import load
from nanogpt.data import loader
from nanogpt.usage import REMOVED, RENAMED
from tests.conftest import small_run

HERE = Path(__file__).resolve().parent / "contract"
BEFORE = json.loads((HERE / "options.json").read_text(encoding="utf-8"))

STEP = {"event", "iter", "tokens", "loss", "lr", "grad_norm", "clipped", "step_s", "tokens_per_s"}
STEP |= {"elapsed_s"}
EVAL = {"event", "iter", "tokens", "train_loss", "val_loss", "val_stderr", "elapsed_s"}
CONFIG = {"options", "model", "command", "commit", "python", "torch", "numpy", "device", "dtype"}
CONFIG |= {"instructions"}
STATE = {"iter_num", "elapsed_s", "val_loss", "best_val_loss", "stale", "options", "model", "scaler", "lora"}
STATE |= {"tokenizer", "environment"}
META = {"format", "dtype", "vocab_size", "tokenizer", "splits", "documents", "source"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------- current output


def test_run_output_keys_and_lines(dataset, tmp_path, capsys):
    config = small_run(dataset, tmp_path / "out", max_iters=2, eval_interval=1, eval_iters=1)
    train.main(config)
    rows = metrics.read(tmp_path / "out")
    assert all(row.keys() >= STEP for row in rows if row["event"] == "step")
    assert all(row.keys() >= EVAL for row in rows if row["event"] == "eval")
    assert [row["event"] for row in rows] == ["eval", "step", "eval", "step", "eval"]
    assert read(tmp_path / "out" / "config.json").keys() >= CONFIG
    state = read(tmp_path / "out" / "step-000002" / "state.json")
    assert state.keys() >= STATE
    assert state["options"] == asdict(config) | {"compile": False}
    lines = capsys.readouterr().out.splitlines()
    numbered = [line for line in lines if line.startswith("iter ")]
    assert len(numbered) == 2
    for number, line in enumerate(numbered):
        loss, time = r"loss \d+\.\d{4}", r"time \d+\.\d\dms"
        assert re.fullmatch(rf"iter {number}: {loss}, {time}, [\d,]+ tok/s(, mfu [^,]*)?, [\d:]+ left", line)
    evaluated = r"(?m)^step \d+: train loss \d+\.\d{4}, val loss \d+\.\d{4} "
    assert len(re.findall(evaluated, "\n".join(lines))) == 3
    assert f"saved {tmp_path / 'out' / 'step-000002'}" in lines


def test_dataset_keys(tmp_path):
    (tmp_path / "x.txt").write_text("some text " * 20, encoding="utf-8")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, root / "data" / "prepare.py", tmp_path / "x.txt", f"--out={tmp_path / 'out'}"]
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"train.bin", "val.bin", "meta.json"}
    meta = read(tmp_path / "out" / "meta.json")
    assert meta.keys() >= META and meta["splits"]["val"].keys() >= {"tokens", "text_bytes", "files"}
    assert np.fromfile(tmp_path / "out" / "train.bin", "<u2").max() < meta["vocab_size"]


# ----------------------------------------------------------------------------- files of older versions


@pytest.fixture
def old_run(tmp_path):
    shutil.copytree(HERE / "run", tmp_path / "run")
    return tmp_path / "run"


def test_old_run_resumes_with_the_losses_of_its_version(old_run, capsys):
    options = [f"--out_dir={old_run}", f"--dataset={HERE / 'dataset'}", "--init_from=resume", "--max_iters=6"]
    train.main(*load(train.Config, options))
    steps = [row["loss"] for row in metrics.read(old_run) if row["event"] == "step"]
    expected = [2.9915590286, 2.9739325047, 2.9768261909, 2.9258227348, 2.9360842705, 2.9300408363]
    assert steps == pytest.approx(expected, abs=1e-4)  # AVX2 and AVX-512 differ by 2e-5 after two updates
    assert metrics.read(old_run)[-1]["val_loss"] == pytest.approx(2.9238834828, abs=1e-4)
    assert (old_run / "step-000006").is_dir()


def test_old_run_can_be_sampled_scored_plotted_and_exported(old_run, tmp_path, capsys):
    run = {"out_dir": str(old_run), "device": "cpu"}
    sample.main(sample.Config(**run, num_samples=2, max_new_tokens=9, start="to"))
    assert capsys.readouterr().out.count("\n---------------\n") == 2
    evaluation.main(evaluation.Config(**run, dataset=str(HERE / "dataset")))
    assert "loss 2.9402 " in capsys.readouterr().out  # as printed by its version
    plot.main(plot.Config(out=str(tmp_path / "x.png")), [str(old_run)])
    assert (tmp_path / "x.png").stat().st_size > 1000
    export.main(export.Config(out_dir=str(old_run), to=str(tmp_path / "exported")))
    assert (tmp_path / "exported" / "config.json").is_file()


def test_old_dataset_loads():
    found = loader.load(HERE / "dataset")
    assert (found.vocab_size, len(found.train), len(found.val)) == (20, 7455, 829)


@pytest.mark.parametrize("name", BEFORE["options"])
def test_old_options_are_accepted(name, capsys):
    """An old option keeps its meaning and default, or a printed line says that it was removed."""
    value = BEFORE["options"][name]
    config, origins = load(train.Config, [f"--{name}={value}"])
    name = RENAMED.get(name, name)
    if name in {field.name for field in fields(train.Config)}:
        assert getattr(config, name) == value == getattr(train.Config(), name) and origins
    else:
        assert name in REMOVED and f"{name} was removed" in capsys.readouterr().err


@pytest.mark.parametrize("name", BEFORE["presets"])
def test_old_presets_exist(name):
    load(train.Config, [str(presets.find(name))])
