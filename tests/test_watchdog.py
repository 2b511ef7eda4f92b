"""A rank that is silent, stuck or gone is named by the other ranks. Threads simulate ranks."""

import os
import signal
import threading
import time

import pytest
from torch.distributed import HashStore

from nanogpt.distributed import watchdog
from nanogpt.distributed.watchdog import Watchdog

TIMEOUT_S = 0.8


class Ended(BaseException):
    pass


@pytest.fixture
def ends(monkeypatch):
    """Collect the messages with which ranks would end, instead of ending this process."""
    said, ended = [], threading.Event()

    def end(message):
        said.append(message)
        ended.set()
        raise Ended

    monkeypatch.setattr(watchdog, "leave_at_once", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    yield said
    ended.set()


@pytest.fixture
def hearts(tmp_path):
    store = HashStore()
    made = [Watchdog(store, rank, 3, TIMEOUT_S, "here:1", tmp_path / "stuck") for rank in range(3)]
    yield made
    for heart in made:
        heart.close()


def wait_for(happened, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_silent_rank_is_reported_with_its_last_position(hearts, ends):
    hearts[2].at(7, "reading data")
    hearts[2].start()
    hearts[2].close()  # simulates a stopped process: no more heartbeats
    for heart in hearts[:2]:
        heart.at(7, "computing")
        heart.start()
        heart.at(7, "waiting")
    wait_for(lambda: len(ends) == 2)
    told = [message for message in ends if message]
    assert len(told) == 1  # two ranks detect it, one reports
    assert "rank 2 has not responded" in told[0] and "rank 2 at step 7, reading data" in told[0]
    assert "the other ranks wait at step 7, waiting" in told[0] and "\n" not in told[0]


def test_hung_rank_is_reported_with_its_stack(hearts, ends, tmp_path):
    for heart in hearts:
        heart.start()
    hearts[0].at(120, "waiting")
    hearts[1].at(120, "reading data")
    hearts[2].at(120, "computing")
    wait_for(lambda: len(ends) == 3)
    told = next(message for message in ends if message)
    assert told.startswith(
        f"rank 1 has made no progress for {TIMEOUT_S:g} s (--hang_timeout_s), at step 120, reading"
    )
    assert f"the other ranks wait at step 120, waiting; stacks are in {tmp_path / 'stuck'}" in told
    for rank in range(3):
        text = (tmp_path / "stuck" / f"process-{rank}.txt").read_text()
        assert "test_watchdog.py" in text  # the main thread's stack


def test_no_timeout_while_an_awaited_rank_makes_progress(hearts, ends):
    """Rank 0 runs eval tasks; the other ranks wait much longer than the timeout."""
    for heart in hearts:
        heart.start()
        heart.at(7, "waiting")
    until = time.monotonic() + 3 * TIMEOUT_S
    while time.monotonic() < until:
        hearts[0].moved()
        time.sleep(0.02)
    assert ends == []


def test_lost_connection_reports_which_rank_is_gone(hearts, ends):
    for heart in hearts:
        heart.at(3, "computing")
        heart.start()
    assert hearts[0].explain() == ""
    hearts[1].close()
    hearts[1]._thread.join()  # it may be about to send one more heartbeat
    assert "rank 1 has not responded" in hearts[0].explain()
    hearts[1].leave("OSError: disk full")
    assert hearts[0].explain() == "rank 1 exited: OSError: disk full"
    assert not hearts[0].told("why") and hearts[2].told("why")


def test_signal_makes_a_stuck_rank_check_the_others(hearts, ends, monkeypatch):
    """Case: a GPU waits for a killed rank, and torchrun sends SIGTERM to the other ranks."""
    monkeypatch.setattr(watchdog, "SIGNALLED_S", 0.5)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        hearts[1].start()
        hearts[1].close()
        hearts[0].timeout_s = 1000.0
        hearts[0].start()
        hearts[0].at(7, "waiting")
        time.sleep(0.5)
        assert ends == []
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: ends)
        assert "ranks 1, 2 have not responded" in ends[0] and "rank 2 at the start" in ends[0]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_losing_the_store_means_rank_0_is_lost():
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("connection refused")

    heart = Watchdog(Broken(), 1, 2, 10.0, "here:1")
    assert "no response from here:1: rank 0 or its machine is down" in heart.explain()


def test_heartbeat_overhead_is_negligible(hearts):
    heart = hearts[0]
    began = time.perf_counter()
    for step in range(10_000):
        heart.at(step, "computing")
    assert (time.perf_counter() - began) / 10_000 < 20e-6
