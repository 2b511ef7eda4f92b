"""doctor.py: the report of a machine, and checks of run and dataset folders."""

import getpass
import platform
import shutil
from pathlib import Path

import pytest
import torch

import doctor
from nanogpt.errors import UserError
from tests.conftest import train_until_it_knows


@pytest.fixture
def run(tmp_path):
    train_until_it_knows(tmp_path, 3)
    return tmp_path / "out"


def test_report_names_versions_hardware_and_settings(capsys):
    doctor.main([])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and f"Python {platform.python_version()}" in out
    for part in ("processor: ", f"{torch.get_num_threads()} thread", "free: ", "environment: ", "cuda: "):
        assert part in out
    assert platform.node() not in out and str(Path.home()) not in out
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in out


def test_intact_folders_are_described_without_their_paths(run, capsys):
    doctor.main([str(run), str(run.parent / "dataset")])
    out = capsys.readouterr().out
    assert "out: step-000003: intact, 2 layers" in out and "vocabulary 10, tokenizer char" in out
    assert str(run.parent) not in out


def test_problems_are_named_after_the_whole_report(run, capsys):
    weights = run / "step-000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    data = run.parent / "dataset" / "val.bin"
    data.write_bytes(data.read_bytes()[:-3])
    empty = run.parent / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="4 of 4 folders have a problem"):
        doctor.main([str(run), str(data.parent), str(empty), str(run.parent / "none")])
    out = capsys.readouterr().out
    assert "out: PROBLEM: out/step-000003/model.safetensors is damaged" in out
    assert "dataset: PROBLEM: dataset/val.bin is truncated" in out
    assert "empty: PROBLEM: empty holds neither a run nor a dataset" in out
    assert "none: PROBLEM: none is not a folder" in out and str(run.parent) not in out


def test_folder_of_an_interrupted_run_without_checkpoint(run, capsys):
    shutil.rmtree(run / "step-000003")
    for step in run.glob("step-*"):
        shutil.rmtree(step)
    doctor.main([str(run)])
    assert "rows of metrics" in capsys.readouterr().out
