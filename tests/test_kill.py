"""A run whose processes are killed, or hang, at random moments becomes the run that was left alone."""

import multiprocessing
import sys

import pytest

from benchmarks import kill


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)
def test_killed_and_resumed_is_the_same_run_to_the_bit(tmp_path):
    result = kill.campaign(tmp_path, kill.Config(kills=8, steps_per_kill=3))
    assert result.problems == []
    assert result.kills == 8
    assert result.before_first + result.during_save >= 1  # moments that matter


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_and_hanging_processes_are_named_and_the_run_goes_on_to_the_bit(tmp_path):
    config = kill.Config(kills=2, hangs=1, steps_per_kill=30, timeout_s=3.0, processes=2)
    result = kill.campaign_of_two(tmp_path, config)
    assert result.problems == []
    assert (result.killed_named, result.stopped_named) == (2, 1)
    assert max(result.until_named_s) < config.timeout_s + 5
