"""Watchdog that identifies ranks that hang or are lost.

A thread on each rank writes a heartbeat with the phase of the main thread to the shared store, a few times
per second; this costs the main thread a few assignments per step. Heartbeats are read only once a rank has
made no progress for the timeout or has lost a connection: two snapshots a few beats apart then show which
ranks are silent (killed, stopped, machine down) and which are behind.
"""

import faulthandler
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.exits import leave_at_once

PHASES = ("starting", "reading data", "computing", "updating", "evaluating", "saving", "waiting")  # of a step
BEATS = 6  # a rank without a new heartbeat in this many intervals counts as silent
SIGNALLED_S = 5.0  # timeout of a stuck rank once it has received a signal to stop
STARTING_S = 60.0  # shortest timeout before the first step, which compiles and loads data
DUMP_S = 3.0  # longest wait for the stack dump
GO_ON = "with torchrun --max-restarts and --init_from=auto the run resumes from its last checkpoint"


@dataclass(frozen=True)
class Place:
    """Last heartbeat of a rank."""

    beat: int = -1  # counter; -1: no heartbeat received
    step: int = 0
    phase: str = PHASES[0]
    still_s: float = 0.0  # seconds since its main thread last made progress

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.beat >= 0 else "the start"

    @property
    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)


class Watchdog:
    """Heartbeat and hang detection of one rank.

    `store` has set, get, check and add (torch.distributed.Store), is not shared with other threads, and
    raises RuntimeError if `address` is unreachable. Stack dumps of aborted ranks go to the folder `stacks`.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout_s: float,
        address: str = "",
        stacks: Path | None = None,
    ):
        self.store, self.rank, self.size, self.timeout_s = store, rank, size, timeout_s
        self.address, self.stacks = address, stacks
        self.record: Callable[[], None] = lambda: None  # further diagnostics to dump
        self.interval_s = min(max(0.25, size / 200), timeout_s / 8)
        self.place, self._moved, self._beat = (0, PHASES[0]), time.monotonic(), 0
        self._signals, self._signalled = -1, False
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread; call from the main thread.

        Signals are noticed even while the main thread waits for a GPU and Python's handlers do not run:
        torchrun sends one when a rank is lost.
        """
        self._say()
        if threading.current_thread() is threading.main_thread():
            self._signals, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Record the step and phase of the main thread."""
        self.place, self._moved = (step, phase), time.monotonic()

    def moved(self) -> None:
        """Record progress of the main thread within its phase."""
        self._moved = time.monotonic()

    def close(self) -> None:
        self._ended.set()
        if self._signals >= 0:
            signal.set_wakeup_fd(-1)

    # ------------------------------------------------------------------------- main thread, on failure

    def told(self, message: str) -> bool:
        """Return whether another rank has claimed `message`; if not, claim it, and the caller reports it.

        "end" stands for the report of a lost rank, whose wording differs between ranks.
        """
        try:
            with self._lock:
                return self.store.add(f"told/{message}", 1) > 1
        except RuntimeError:
            return False

    def leave(self, reason: str) -> None:
        """Announce to the other ranks that this one exits on its own."""
        with suppress(RuntimeError), self._lock:
            self.store.set(f"left/{self.rank}", reason)

    def explain(self) -> str:
        """Return which other rank is lost and where it was last seen; "" if all respond."""
        try:
            return self._look()[0]
        except RuntimeError:
            return self._no_store()

    # ------------------------------------------------------------------------- watchdog thread

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            try:
                self._say()
                with self._lock:
                    verdict = self.store.check(["verdict"])
                if verdict:
                    self._end("")
                elif self._still_s() > self._patience_s():
                    self._judge()
            except RuntimeError:
                if self._still_s() > self.timeout_s and not self._ended.is_set():
                    self._end(self._no_store())

    def _say(self) -> None:
        (step, phase), self._beat = self.place, self._beat + 1
        with self._lock:
            self.store.set(f"beat/{self.rank}", json.dumps([self._beat, step, phase, self._still_s()]))

    def _patience_s(self) -> float:
        if self._signals >= 0 and select.select([self._signals], [], [], 0)[0]:
            self._signalled = bool(os.read(self._signals, 512))
        if self._signalled:
            return min(SIGNALLED_S, self.timeout_s)
        return max(self.timeout_s, STARTING_S) if self.place[1] == "starting" else self.timeout_s

    def _still_s(self) -> float:
        return time.monotonic() - self._moved

    def _judge(self) -> None:
        """End the run if a rank is lost or hangs; return if any rank has made progress."""
        lost, places = self._look()
        if self._still_s() <= self._patience_s() or self._ended.is_set():
            return
        if lost:
            self._end(lost)
        if min(place.still_s for place in places.values()) < self.timeout_s:
            return
        first = min(place.order for place in places.values())
        behind = [rank for rank, place in places.items() if place.order == first]
        ahead = [str(place) for place in places.values() if place.order > first]
        others = f"; the other ranks wait at {ahead[0]}" if ahead else ""
        late = f"made no progress for {self.timeout_s:g} s (--hang_timeout_s)"
        self._end(f"{_named(behind)} {late}, at {places[behind[0]]}{others}")

    def _end(self, message: str) -> None:
        """Exit, whatever the main thread is stuck in; the first rank to get here reports `message`."""
        try:
            with self._lock:
                told = message and self.store.add("told/end", 1) > 1
                if message and not told:
                    self.store.set("verdict", message)
        except RuntimeError:
            told = False
        dump = threading.Thread(target=self._dump, daemon=True)
        dump.start()
        dump.join(DUMP_S)
        where = f"; stacks are in {self.stacks}" if self.stacks and self.stacks.is_dir() else ""
        leave_at_once("" if told or not message else f"{message}{where}; {GO_ON}")

    def _dump(self) -> None:
        """Dump all stacks if the run folder exists. Runs in a thread: the disk may be what hangs."""
        if self.stacks and self.stacks.parent.is_dir():
            self.stacks.mkdir(exist_ok=True)
            with (self.stacks / f"process-{self.rank}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self.record()

    def _look(self) -> tuple[str, dict[int, Place]]:
        """Return which other rank has left or is silent, "" if none, and the places of those that respond."""
        before = self._places()
        for _ in range(BEATS):
            time.sleep(self.interval_s)
            self._say()
        after = self._places()
        for rank in range(self.size):
            with self._lock:
                if rank != self.rank and self.store.check([f"left/{rank}"]):
                    return f"rank {rank} exited: {self.store.get(f'left/{rank}').decode()}", {}
        responding = {rank: place for rank, place in after.items() if place.beat > before[rank].beat}
        silent = [rank for rank in after if rank not in responding]
        return self._silent(silent, after), responding

    def _places(self) -> dict[int, Place]:
        places = {}
        for rank in range(self.size):
            with self._lock:
                content = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            places[rank] = Place(*json.loads(content)) if content else Place()
        return places

    def _silent(self, ranks: list[int], places: dict[int, Place]) -> str:
        if not ranks:
            return ""
        seen = "; ".join(f"rank {rank} at {places[rank]}" for rank in ranks[:8])
        step, phase = self.place
        return (
            f"{_named(ranks)} not responded for {self._still_s():.0f} s (killed, stopped, or machine down), "
            f"last seen: {seen}; the other ranks wait at step {step}, {phase}"
        )

    def _no_store(self) -> str:
        return f"no response from {self.address}: rank 0 or its machine is down"


def _named(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {listed} has" if len(ranks) == 1 else f"ranks {listed} have"
