"""Error types and exit codes of the programs.

Every program runs through `run_program`, so each cause has the same exit code everywhere:

==== ================================================================
0    success
2    user error: an invalid option, file or combination of options
70   training diverged (non-finite loss, gradient or weight)
74   input/output error (for example a full disk)
75   stopped by a signal or a time limit; run again to resume
76   another rank was lost or hangs; restart all ranks
==== ================================================================
"""

import importlib
import io
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Invalid user input; the message states what was given, what was expected and what to type."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is not finite."""


class Stopped(Exception):
    """Stopped early on request; the state is saved and can be resumed."""


class Lost(RuntimeError):
    """Another rank has exited or hangs."""


CODES: dict[type[BaseException], tuple[int, str]] = {  # exit code and start of the line
    UserError: (2, "error: "),
    Diverged: (70, "diverged: "),
    OSError: (74, "input/output error: "),
    Stopped: (75, ""),
    Lost: (76, "lost: "),
    KeyboardInterrupt: (130, "interrupted"),
}
SHARED = "raised on every rank"  # exception note: only rank 0 prints the error
TOLD = "printed by another rank"  # exception note: not printed again
UNDER_TORCHRUN = "TORCHELASTIC_ERROR_FILE"  # environment variable set by torchrun


def imported(package: str, why: str) -> Any:
    """Import an optional package. Raise UserError, which begins with `why`, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{why}: pip install {package}") from None


def run_program(main: Callable[[], T]) -> T:
    """Return the result of `main`; on an expected error print one line to stderr and exit with its code.

    Also install an excepthook that does the same for Ctrl-C and missing packages in later imports.
    """
    sys.excepthook = _in_one_line
    for stream in (sys.stdout, sys.stderr):
        # Escape characters that the terminal cannot encode; flush each line when writing to a pipe.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if UNDER_TORCHRUN in os.environ:
        from nanogpt import exits

        exits.leave_as_before()
    try:
        result = main()
        sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader of stdout (head, less) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except tuple(CODES) as error:
        from nanogpt import exits

        code, label = next(row for kind, row in CODES.items() if isinstance(error, kind))
        notes = getattr(error, "__notes__", ())
        silent = TOLD in notes or (SHARED in notes and os.environ.get("RANK", "0") != "0")
        exits.leave(code, f"{label}{error}", silent)


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from nanogpt import exits

    exits.in_one_line(kind, error, trace)
