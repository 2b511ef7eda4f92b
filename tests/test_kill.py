"""A run that is killed at random moments becomes the run that was left alone."""

import multiprocessing

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
