"""Tests of --minutes: training for a given time."""

import itertools
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import train
from nanogpt import metrics, options
from nanogpt.checkpoint import reader
from nanogpt.config import load
from nanogpt.errors import Stopped, UserError
from nanogpt.pace import time_budget
from tests import processes
from tests.conftest import small_run

SHAPE = {"eval_iters": 1, "batch_size": 4, "max_iters": 100, "eval_interval": 25, "log_interval": 1}


@pytest.fixture
def config(dataset, tmp_path):
    return small_run(dataset, tmp_path / "out", minutes=5.0, **SHAPE)


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by half a second each time the main thread reads it; writing takes no time."""
    count = itertools.count(1)

    def now() -> float:
        return next(count) / 2 if threading.current_thread() is threading.main_thread() else 0.0

    monkeypatch.setattr(train.time, "perf_counter", now)
    return count


def rows(config: train.Config, event: str) -> list[dict]:
    return [row for row in metrics.read(Path(config.out_dir)) if row["event"] == event]


def state(config: train.Config) -> dict:
    return reader.find(Path(config.out_dir))[0].state


def test_run_ends_on_time_at_the_floor_of_the_rate_evaluated_and_saved(config, clock, capsys):
    train.main(config)
    assert next(clock) / 2 == pytest.approx(300, abs=15)
    steps, evaluations = rows(config, "step"), rows(config, "eval")
    assert max(row["lr"] for row in steps) == pytest.approx(1e-3, rel=0.2)
    assert steps[-1]["lr"] == pytest.approx(1e-4, rel=0.1)
    assert evaluations[-1]["iter"] == len(steps) and evaluations[-1]["share"] == 1
    assert 4 <= len(evaluations) <= 10
    shares = [row["share"] for row in steps]
    assert shares == sorted(shares) and shares[len(shares) // 2] == pytest.approx(0.5, abs=0.1)
    saved = state(config)
    assert saved["iter_num"] == len(steps) and saved["share"] == 1
    assert saved["clock_s"] == pytest.approx(300, abs=15)
    said = capsys.readouterr().out
    assert "; minutes: 5\n" in said and f"--max_iters={len(steps)} --warmup_iters=" in said
    assert (
        f"train it longer: python train.py --out_dir={config.out_dir} --init_from=resume --minutes=10" in said
    )


def test_real_clock_counts_from_the_start_of_the_run(config, monkeypatch):
    monkeypatch.setattr(options, "MIN_MINUTES", 0)
    started = train.time.perf_counter()
    train.main(replace(config, minutes=0.05, log_interval=100))
    assert train.time.perf_counter() - started == pytest.approx(3, abs=1.5)


def test_stopped_run_resumes_with_the_time_that_is_left(config, clock, capsys):
    with pytest.raises(Stopped):
        train.main(replace(config, max_minutes=2.0))
    before = state(config)
    assert 0.2 < before["share"] < 0.6
    used, resumed = before["clock_s"], next(clock) / 2
    train.main(replace(config, init_from="resume"))
    assert next(clock) / 2 - resumed == pytest.approx(300 - used, abs=15)
    steps = rows(config, "step")
    assert [row["iter"] for row in steps] == list(range(len(steps)))
    shares = [row["share"] for row in steps]
    assert shares == sorted(shares) and state(config)["share"] == 1
    assert rows(config, "step")[-1]["lr"] == pytest.approx(1e-4, rel=0.1)


def test_iterations_given_with_minutes_are_said_to_be_fractions(config, clock, capsys):
    given = {"minutes": "--minutes=5", "warmup_iters": "--warmup_iters=10", "eval_interval": "config/x.py"}
    train.main(replace(config, warmup_iters=10), given)
    note = "iterations stand for shares of max_iters=100 (set by presets): warmup_iters=10 is 10.00%"
    assert note in capsys.readouterr().out


def test_schedule_of_minutes_is_repeated_in_iterations(config):
    decayed = replace(config, max_iters=10_000, warmup_iters=3, lr_decay_iters=3)
    assert time_budget.repeated(decayed, 100) == "--max_iters=100 --warmup_iters=0 --lr_decay_iters=1"


@pytest.mark.parametrize("minutes", [60.0, 0.1])
def test_completed_iterations_go_on_with_more_minutes(config, clock, capsys, minutes):
    train.main(replace(config, minutes=0.0, max_iters=10))
    before = state(config)
    assert before["share"] == 1 and 0.1 < before["clock_s"] / 60 < 30
    given = {"minutes": "--minutes", "init_from": "--init_from=resume"}
    train.main(replace(config, minutes=minutes, init_from="resume"), given)
    if minutes < 1:
        assert "has completed all 0.1 minutes; raise --minutes" in capsys.readouterr().out
        return
    first = next(row["share"] for row in rows(config, "step") if row["iter"] == 10)
    assert first == pytest.approx(before["clock_s"] / 3600, abs=0.02)
    assert state(config)["share"] == 1 and state(config)["iter_num"] > 100


def test_resumed_run_reserves_time_for_its_last_evaluation(config, clock, monkeypatch):
    evaluate = train.validation.evaluate_splits

    def slowly(*given):
        for _ in range(80):  # 40 s
            next(clock)
        return evaluate(*given)

    monkeypatch.setattr(train.validation, "evaluate_splits", slowly)
    with pytest.raises(Stopped):
        train.main(replace(config, max_minutes=2.0))
    train.main(replace(config, init_from="resume"))
    assert state(config)["clock_s"] == pytest.approx(300, abs=15)
    # The evaluation before the stop counts: with it, evaluations have taken more than a tenth of the time.
    assert [row["share"] for row in rows(config, "eval")] == [0, 1]


def test_complete_run_continues_with_more_minutes_or_with_iterations(config, clock, capsys):
    train.main(config)
    first = state(config)["iter_num"]
    given = [f"--out_dir={config.out_dir}", "--init_from=resume"]
    train.main(*load(train.Config, given))
    assert "has completed all 5 minutes; raise --minutes" in capsys.readouterr().out
    train.main(*load(train.Config, [*given, "--minutes=10"]))
    said = capsys.readouterr().out
    # half of the new schedule is over
    assert re.search(r"the learning rate jumps from .*, because the schedule now spans 10 minutes\n", said)
    assert "to repeat this schedule" not in said  # it has a jump, which no number of iterations repeats
    longer = state(config)
    assert longer["clock_s"] == pytest.approx(600, abs=30) and longer["iter_num"] > 1.6 * first
    train.main(*load(train.Config, [*given, f"--max_iters={longer['iter_num'] + 3}"]))
    assert state(config)["iter_num"] == longer["iter_num"] + 3


def test_ramp_follows_the_clock_and_a_resumed_run_reads_what_follows(config, clock, monkeypatch):
    ramped = replace(config, batch_ramp_tokens=2000, gradient_accumulation_steps=4)
    with pytest.raises(Stopped):
        train.main(replace(ramped, max_minutes=2.0))
    part = state(config)
    sizes = part["ramp"]
    assert sizes == sorted(sizes) and 4 <= sizes[0] < sizes[-1] <= 16
    assert len(sizes) <= part["iter_num"]
    train.main(replace(ramped, init_from="resume"))
    assert state(config)["ramp"][: len(sizes)] == sizes
    steps = rows(config, "step")
    read = list(itertools.accumulate(state(config)["ramp"] + [16] * len(steps)))
    assert [row["tokens"] for row in steps] == [16 * total for total in read[: len(steps)]]


@pytest.mark.parametrize("flag", ["--max_iters=7", "--max_tokens=448"])
def test_flag_for_iterations_takes_precedence_over_minutes_in_a_preset(dataset, tmp_path, flag):
    preset = tmp_path / "timed.py"
    preset.write_text("minutes = 5\nbatch_size = 4\nblock_size = 16\ngradient_accumulation_steps = 1\n")
    given = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--device=cpu", "--eval_iters=1"]
    given += [f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    config, origins = load(train.Config, [str(preset), *given, flag])
    train.main(config, origins)
    assert state(config)["iter_num"] == 7 and state(config)["options"]["minutes"] == 0


def test_invalid_minutes_are_one_line_errors(config, monkeypatch):
    slow = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: 2 * next(slow))
    with pytest.raises(UserError, match=r"minutes=0\.01 is too short for start-up; give at least 0\.1"):
        load(train.Config, ["--minutes=0.01"])
    with pytest.raises(UserError, match="--minutes=1 and --max_iters=5 set the same quantity"):
        load(train.Config, ["--minutes=1", "--max_iters=5"])
    with pytest.raises(UserError, match=r"--minutes=0\.1 is too short: .* give at least --minutes="):
        train.main(replace(config, minutes=0.1))
    assert not list(Path(config.out_dir).glob("step-*"))


def slow_clock(monkeypatch, each_s: float) -> None:
    """Let each reading of the clock by the main thread take `each_s`."""
    count = itertools.count(1)

    def now() -> float:
        return each_s * next(count) if threading.current_thread() is threading.main_thread() else 0.0

    monkeypatch.setattr(train.time, "perf_counter", now)


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_that_is_refused_leaves_the_one_before_it(config, clock, monkeypatch, overwrite):
    train.main(config)
    out = Path(config.out_dir)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    slow_clock(monkeypatch, 2)
    with pytest.raises(UserError, match=r"--minutes=0\.1 is too short"):
        train.main(replace(config, minutes=0.1, overwrite=overwrite))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in out.parent.glob("out*")] == ["out"]


@pytest.mark.parametrize(("minutes", "fit"), [(0.5, 2), (1.5, 9), (60.0, None)])
def test_a_note_tells_when_few_iterations_fit(config, monkeypatch, capsys, minutes, fit):
    slow_clock(monkeypatch, 1.5)
    train.main(replace(config, minutes=minutes))
    said = capsys.readouterr().out
    done = len(rows(config, "step"))
    if fit is None:
        assert "few iterations" not in said and done > 50
    else:
        assert f"note: few iterations (about {fit}) fit into --minutes={minutes:g}; 100 need about " in said
        assert abs(done - fit) <= 2


@pytest.mark.parametrize("eval_interval", [25, 12, 5])
def test_no_evaluation_immediately_precedes_the_last(config, clock, eval_interval):
    train.main(replace(config, eval_interval=eval_interval))
    *earlier, last = [row["share"] for row in rows(config, "eval")]
    assert len(earlier) > 3 and last == 1 and earlier[-1] < 1 - eval_interval / 250


def test_two_ranks_stop_after_the_same_iteration(dataset, tmp_path):
    given = ["--device=cpu", "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=4"]
    given += [f"--dataset={dataset}", "--gradient_accumulation_steps=2", "--eval_iters=1"]
    processes.run(tmp_path, [processes.Job("two", 2, [*given, "--minutes=0.1"])])
    outcome = json.loads((reader.find(tmp_path / "two")[0].path / "state.json").read_text(encoding="utf-8"))
    assert outcome["share"] == 1 and outcome["clock_s"] == pytest.approx(6, abs=3)
    assert "took 00:0" in processes.said(tmp_path, "two")
