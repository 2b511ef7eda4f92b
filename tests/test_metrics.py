"""Tests of metrics.jsonl and of the console output."""

import json

import pytest

from nanogpt import metrics
from nanogpt.checkpoint import Progress, resume
from nanogpt.errors import UserError


class Recorder:
    def __init__(self):
        self.rows = []

    def log(self, row):
        self.rows.append(row)

    def close(self):
        self.rows.append("closed")


def test_rows_console_lines_and_tracker(tmp_path, capsys):
    recorder = Recorder()
    log = metrics.Log()
    log.open(tmp_path / metrics.NAME, recorder, mfu_at_one_token_per_s=1e-4)
    log.step(3, step_s=0.05, speed=2000.0, tokens=400, left_s=3700, loss=2.5, lr=1e-3)
    log.evaluation(4, 400, val_loss=float("nan"))
    log.close()
    assert (
        capsys.readouterr().out == "iter 3: loss 2.5000, time 50.00ms, 2,000 tok/s, mfu 20.0%, 1:01:40 left\n"
    )
    step, evaluation = metrics.read(tmp_path)
    assert step == {
        "event": "step",
        "iter": 3,
        "tokens": 400,
        "loss": 2.5,
        "step_s": 0.05,
        "tokens_per_s": 2000.0,
        "lr": 1e-3,
    }
    assert evaluation == {"event": "eval", "iter": 4, "tokens": 400, "val_loss": None}
    assert recorder.rows[0] == step and recorder.rows[-1] == "closed"


def write(folder, rows, tail=""):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / metrics.NAME).write_text(text + tail, encoding="utf-8")


ROWS = [{"event": "eval", "iter": 0}]
ROWS += [{"event": "step", "iter": i} for i in range(5)] + [{"event": "eval", "iter": 5}]
ROWS += [{"event": "step", "iter": i} for i in range(5, 8)]


@pytest.mark.parametrize(
    ("iter_num", "evaluated", "steps", "evals"),
    [(5, True, 5, [0, 5]), (5, False, 5, [0]), (7, False, 7, [0, 5]), (0, False, 0, []), (0, True, 0, [0])],
)
def test_rewind_removes_rows_that_will_be_rewritten(tmp_path, iter_num, evaluated, steps, evals):
    write(tmp_path, ROWS, tail='{"event": "st')  # last line truncated by a kill
    resume.rewind(tmp_path, Progress(iter_num, val_loss=1.0 if evaluated else None))
    rows = metrics.read(tmp_path)
    assert [row["iter"] for row in rows if row["event"] == "step"] == list(range(steps))
    assert [row["iter"] for row in rows if row["event"] == "eval"] == evals
    assert (tmp_path / metrics.NAME).read_text(encoding="utf-8").count("\n") == len(rows)


def test_rewind_of_a_folder_without_rows(tmp_path):
    resume.rewind(tmp_path, Progress(3))
    with pytest.raises(UserError, match=r"has no metrics\.jsonl; give the out_dir of a run"):
        metrics.read(tmp_path)


def test_damaged_rows_are_skipped(tmp_path):
    text = b'{"event": "eval", "iter": 1, "train_loss": 2, "val_loss": 1.5}\n\xff\n[1]\n{"iter": 2}\n'
    text += (
        b'{"event": "eval", "iter": 3, "val_loss": null}\n{"event": "eval", "iter": -1}\n' + b"[" * 100_000
    )
    (tmp_path / metrics.NAME).write_bytes(text)
    rows = metrics.read(tmp_path)
    assert [row["iter"] for row in rows] == [1, 3]
    assert metrics.gap(rows).startswith("best validation loss 1.5000 at iteration 1: train 2.0000")
