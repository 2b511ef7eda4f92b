"""Paths in options: ~ is expanded, addresses are refused, and what a run does when its terminal goes away."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import sample
import train
from nanogpt import checkpoint, metrics
from nanogpt.config import load, read
from nanogpt.errors import UserError
from tests.conftest import words, write_dataset

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["out_dir", "init_from", "dataset"])
def test_home_is_expanded_and_addresses_are_refused(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config, _ = load(train.Config, [f"--{name}=~/x"])
    assert getattr(config, name) == "/home/someone/x"
    with pytest.raises(UserError, match=rf"--{name}=s3://bucket/x: .* mount remote storage"):
        load(train.Config, [f"--{name}=s3://bucket/x"])


def test_every_part_of_a_mixture_and_positional_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config, _ = load(train.Config, ["--dataset=~/a:0.7,~/b:0.3"])
    assert config.dataset == "/home/someone/a:0.7,/home/someone/b:0.3"
    assert read(sample.Config, ["~/x"], arguments=True).arguments == ["/home/someone/x"]
    with pytest.raises(UserError, match=r"gs://bucket is not naming a path"):
        read(sample.Config, ["gs://bucket"], arguments=True)


def test_a_preset_may_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "x.py").write_text("out_dir = '~/runs/x'\n", encoding="utf-8")
    assert load(train.Config, [str(tmp_path / "x.py")])[0].out_dir == "/home/someone/runs/x"


@pytest.fixture
def config(tmp_path):
    write_dataset(tmp_path / "data", words(900))
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4}
    sizes |= {"gradient_accumulation_steps": 1, "warmup_iters": 0, "eval_iters": 2, "eval_interval": 10_000}
    return train.Config(dataset=str(tmp_path / "data"), out_dir=str(tmp_path / "out"), device="cpu", **sizes)


def test_a_checkpoint_by_the_clock(config, monkeypatch):
    """With a clock that runs a minute per look a run without evaluations saves, and keeps the newest two."""
    ticks = iter(range(0, 10**9, 60))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(ticks)))
    train.main(replace(config, max_iters=40, save_minutes=10))
    assert len(checkpoint.step_folders(Path(config.out_dir))) >= 2
    saved = [int(path.name[5:]) for path in checkpoint.step_folders(Path(config.out_dir))]
    assert saved[0] == 40 and 0 < saved[1] < 40
    train.main(replace(config, max_iters=40, save_minutes=0, overwrite=True))
    assert [int(path.name[5:]) for path in checkpoint.step_folders(Path(config.out_dir))] == [40]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_saves_unless_under_nohup(config, nohup):
    out = Path(config.out_dir)
    options = [
        f"--{key}={value}" for key, value in vars(config).items() if value != getattr(train.Config(), key)
    ]
    command = [sys.executable, "train.py", *options, "--max_iters=1000000", "--save_interval=1000000"]
    action = signal.SIG_IGN if nohup else signal.SIG_DFL  # the tests themselves may run under nohup
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, action),
    )
    try:
        while not (out / metrics.NAME).is_file() or len(metrics.read(out)) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        if nohup:
            rows = len(metrics.read(out))
            while len(metrics.read(out)) < rows + 50:  # it runs on
                assert process.poll() is None
                time.sleep(0.05)
            process.terminate()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75 and checkpoint.step_folders(out), error
    assert ("SIGTERM" if nohup else "SIGHUP") in error


def test_threads_spin_shortly_unless_the_user_says_otherwise():
    code = "import os, nanogpt; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, expected in (
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment | given, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
