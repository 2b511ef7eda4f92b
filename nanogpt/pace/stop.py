"""Stop a run on signals, where it is safe."""

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

REPEATED_S = 1.0  # seconds in which repeated signals count as one


class StopRequest:
    """Context manager that records the first Ctrl-C, SIGTERM, SIGHUP (a closed terminal) or SIGUSR1 (Slurm's
    warning) in `reason`, which the program polls where it is safe to stop.

    A second signal has its default effect. With several processes, one within REPEATED_S seconds of the first
    is ignored, because launchers forward a signal that the process has already received.
    """

    def __init__(self) -> None:
        self.reason, self._since = "", 0.0
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Return whether a signal was received or `reason` was set."""
        return bool(self.reason)

    def __enter__(self) -> "StopRequest":
        hangup = getattr(signal, "SIGHUP", None)
        if hangup and signal.getsignal(hangup) == signal.SIG_IGN:  # under nohup
            hangup = None
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", None), hangup)):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller (notebook, test) handles signals
                break
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not self.reason:
            self.reason, self._since = signal.Signals(number).name, time.monotonic()
            if not several:  # with several ranks, rank 0 reports the outcome later
                self._restore()
                notice = "finishing this step and saving; repeat to exit immediately"
                print(f"\n{self.reason}: {notice}", file=sys.stderr)
        elif time.monotonic() - self._since > REPEATED_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *unused: object) -> None:
        self._restore()
