"""Tests of trackers: curves equal metrics.jsonl, a resumed run continues them, and no error stops a run."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest

import train
from nanogpt import metrics
from nanogpt.diagnostics import trackers
from tests.conftest import small_run


@pytest.fixture
def config(dataset, tmp_path):
    return small_run(dataset, tmp_path / "out", max_iters=6, eval_interval=3, eval_iters=1)


def resumed(config, iters: int):
    options = {"init_from": "resume", "max_iters": iters}
    train.main(replace(config, **options), {name: "given" for name in options})


class FakeRun:
    def __init__(self, log: list, **given):
        self.rows, self.given, self.id = log, given, given["id"] or "first"

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "iter")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.rows.append("finished")


def fake_wandb(monkeypatch, init):
    stub = ModuleType("wandb")
    stub.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)


def test_tensorboard_curves_equal_the_log_also_after_resuming(config, tmp_path, capsys):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("tensorboard")
    train.main(replace(config, track="tensorboard", health_interval=2))
    resumed(replace(config, track="tensorboard", health_interval=2), 9)
    found = accumulators.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    found.Reload()
    rows = metrics.read(tmp_path / "out")
    for name, event, key in (("step/loss", "step", "loss"), ("eval/val_loss", "eval", "val_loss")):
        logged = {row["iter"]: row[key] for row in rows if row["event"] == event}
        drawn = {point.step: point.value for point in found.Scalars(name)}
        assert drawn == pytest.approx(logged)
    assert {"health/grad_norm/0", "health/grad_norm/1", "step/tokens_per_s"} <= set(found.Tags()["scalars"])


def test_resumed_run_keeps_its_id_in_wandb(config, monkeypatch):
    runs: list[FakeRun] = []
    log: list = []

    def init(**given):
        runs.append(FakeRun(log, **given))
        return runs[-1]

    fake_wandb(monkeypatch, init)
    train.main(replace(config, wandb_log=True))
    resumed(replace(config, wandb_log=True), 9)
    assert [run.given["id"] for run in runs] == [None, "first"] and runs[0].given["resume"] == "allow"
    assert log.count("finished") == 2
    steps = [row["iter"] for row in log if row != "finished" and "step/loss" in row]
    assert steps == list(range(9))


def test_wandb_without_a_key_logs_offline(config, monkeypatch, capsys):
    modes, log = [], []

    def init(mode="online", **given):
        modes.append(mode)
        if mode == "online":
            raise RuntimeError("No API key configured.\nmore")
        return FakeRun(log, **given)

    fake_wandb(monkeypatch, init)
    train.main(replace(config, track="wandb"))
    assert modes == ["online", "offline"] and len(log) > 6
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("wandb: "))
    assert line.startswith("wandb: No API key configured.; logging to ") and line.endswith("with wandb sync")


def test_missing_library_is_one_line_and_the_run_goes_on(config, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train.main(replace(config, track="wandb"))
    assert "--track=wandb needs a package: pip install wandb; the run goes on" in capsys.readouterr().out
    assert metrics.read(tmp_path / "out")[-1]["iter"] == 6


def test_tracker_that_fails_is_dropped_with_one_line(config, monkeypatch, tmp_path, capsys):
    class Broken:
        def __init__(self, *given):
            self.calls = 0

        def log(self, row):
            self.calls += 1
            raise OSError("disk full\nmore")

        close = None

    monkeypatch.setitem(trackers.KINDS, "tensorboard", Broken)
    train.main(replace(config, track="tensorboard"))
    assert capsys.readouterr().out.count("--track=tensorboard: disk full; the run goes on without it") == 1
    assert metrics.read(tmp_path / "out")[-1]["iter"] == 6


def test_only_finite_numbers_are_drawn():
    row = {
        "event": "eval",
        "iter": 3,
        "val_loss": None,
        "loss": 2,
        "val_losses": {"a": 1.5},
        "dead": [0.0, 0.5],
    }
    assert trackers.scalars(row | {"dead": [0.0, 0.5], "warnings": ["x"]}) == {
        "eval/loss": 2.0,
        "eval/val_losses/a": 1.5,
        "eval/dead/0": 0.0,
        "eval/dead/1": 0.5,
    }
