"""Tests of the time per rank: it is that of the forward passes, and a slow rank is named once."""

import json
import time

import pytest
import torch

from nanogpt.distributed.step_times import EVERY, StepTimes
from nanogpt.world import World
from tests import processes


def test_times_of_forward_passes_are_exchanged(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    rows: list[dict] = []
    times = StepTimes(World(size=2), torch.device("cpu"), lambda **values: rows.append(values))
    function = times.timed(lambda x: x + 1)
    for _ in range(EVERY):
        assert [function(1), function(2)] == [2, 3]  # two micro-batches of one second
        times.end_step()
    assert rows == [{"forward_s": [2.0, 0.0]}] and not times.spans


def test_slow_rank_is_named_until_it_recovers():
    times = StepTimes(World(size=4), torch.device("cpu"), None)
    assert times.slowest([1.0, 1.1, 1.0, 1.4]) == ""
    both = "3000 ms per step in forward passes, the others 1000 ms"
    said = f"rank 2 is slow, and all others wait for it: {both}"
    assert times.slowest([1.0, 1.1, 3.0, 1.0]) == said
    assert times.slowest([1.0, 1.1, 3.0, 1.0]) == ""
    assert times.slowest([1.0, 1.1, 1.0, 1.0]) == ""
    assert times.slowest([1.0, 1.1, 3.0, 1.0]) == said


@pytest.mark.parametrize("slow", [0, 1])
def test_slow_rank_is_named_in_a_run(slow, dataset, tmp_path):
    shape = "n_layer=1 n_head=2 n_embd=16 block_size=16 batch_size=4 gradient_accumulation_steps=2 device=cpu"
    loop = f"max_iters={2 * EVERY + 1} eval_interval=1000 eval_iters=1 warmup_iters=1 backend=gloo"
    options = [f"--{option}" for option in f"dataset={dataset} {shape} {loop}".split()]
    job = processes.Job("slow", 2, options, slow=slow)
    processes.run(tmp_path, [job])
    assert f"rank {slow} is slow, and all others wait for it" in processes.said(tmp_path, "slow")
    lines = (tmp_path / "slow" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "ranks"]
    assert [row["iter"] for row in rows] == [EVERY - 1, 2 * EVERY - 1]
    assert all(len(row["forward_s"]) == 2 and row["forward_s"][slow] > 0.01 for row in rows)
