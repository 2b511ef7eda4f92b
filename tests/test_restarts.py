"""Processes that are killed or hang are named, and torchrun's restart goes on to the bit."""

import sys

import pytest

from benchmarks import restarts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_and_hanging_processes_are_named_and_the_run_goes_on_to_the_bit(tmp_path):
    config = restarts.Config(kills=2, hangs=1, steps_per_fault=30, timeout_s=3.0)
    result = restarts.campaign(tmp_path, config)
    assert result.problems == []
    assert (result.killed_named, result.stopped_named) == (2, 1)
    assert max(result.until_named_s) < config.timeout_s + 5
