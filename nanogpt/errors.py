"""What a program says and returns when it cannot go on.

Every program ends through `run_program`, so one cause has one exit code everywhere:

==== ================================================================
0    done
2    the user can mend it: an option, a file, a combination
70   the numbers diverged
74   reading or writing failed (a full disk, say)
75   stopped by a signal or a time limit; run it again to go on
76   another process of the run was lost or hangs; start all of them again
==== ================================================================
"""

import io
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """The message says what was given, what was expected and what to type."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is no longer a finite number."""


class Stopped(Exception):
    """The program left early on purpose; its state is saved and can be resumed."""


class Lost(RuntimeError):
    """Another process of the run is gone, or does not move."""


SHARED = "every process of the run has this error"  # a note on it: the first process tells
TOLD = "another process has told of this error"
UNDER_TORCHRUN = "TORCHELASTIC_ERROR_FILE"  # is in the environment of processes that torchrun has started


def run_program(main: Callable[[], T]) -> T:
    """Return what `main` returns; an expected failure ends the program with one line on stderr and its code.

    So do Ctrl-C and a missing package while modules are imported afterwards.
    """
    sys.excepthook = _in_one_line
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character gets its number, and a pipe each line when it is printed.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if UNDER_TORCHRUN in os.environ:
        from nanogpt import torchrun

        torchrun.leave_as_before()
    try:
        result = main()
        sys.stdout.flush()
        return result
    except UserError as error:
        leave(2, error, f"error: {error}")
    except Diverged as error:
        leave(70, error, f"diverged: {error}")
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        leave(74, error, f"input/output error: {error}")
    except Stopped as error:
        leave(75, error, str(error))
    except Lost as error:
        leave(76, error, f"lost: {error}")
    except KeyboardInterrupt as error:
        leave(130, error, "interrupted")


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook, for what needs no stack."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("nanogpt"):
        name = error.name.partition(".")[0]
        print(f"error: the package {name} is not installed: pip install {name}", file=sys.stderr, flush=True)
        os._exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


def leave(code: int, error: BaseException, message: str) -> NoReturn:
    """Leave with `code`, and `message` for stderr; of an error that all processes share, one tells."""
    sys.stdout.flush()
    notes = getattr(error, "__notes__", ())
    silent = TOLD in notes or (SHARED in notes and os.environ.get("RANK", "0") != "0")
    if UNDER_TORCHRUN in os.environ:
        from nanogpt import torchrun

        torchrun.report(code, "another process tells why" if silent else message)
    if silent:
        time.sleep(2)  # the first to leave makes torchrun end the others: let it be the one that tells
    else:
        print(message, file=sys.stderr)
    sys.exit(code)
