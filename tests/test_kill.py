"""Runs killed or hung at random moments resume to the same result as an uninterrupted run."""

import multiprocessing
import sys

import pytest

from benchmarks import kill


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork"
)
def test_kill_and_resume_is_bit_identical(tmp_path):
    result = kill.campaign(tmp_path, kill.Config(kills=8, steps_per_kill=3))
    assert result.problems == []
    assert result.kills == 8
    assert result.before_first + result.during_save >= 1  # critical moments


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_and_hung_ranks_are_named_and_resume_is_bit_identical(tmp_path):
    config = kill.Config(kills=1, hangs=1, steps_per_kill=20, timeout_s=3.0, processes=2)
    result = kill.campaign_of_two(tmp_path, config)
    assert result.problems == []
    assert (result.killed_named, result.stopped_named) == (1, 1)
    assert max(result.until_named_s) < config.timeout_s + 5
