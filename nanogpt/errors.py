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

import io
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Invalid user input; the message states what was given, what was expected and what to type."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is not finite."""


class Stopped(Exception):
    """Stopped early on request; the state is saved and can be resumed."""


class Lost(RuntimeError):
    """Another rank has exited or hangs."""


SHARED = "raised on every rank"  # exception note: only rank 0 prints the error
TOLD = "printed by another rank"  # exception note: not printed again
UNDER_TORCHRUN = "TORCHELASTIC_ERROR_FILE"  # environment variable set by torchrun


def run_program(main: Callable[[], T]) -> T:
    """Return the result of `main`; on an expected error print one line to stderr and exit with its code.

    Also installs an excepthook that does so for Ctrl-C and missing packages in later imports.
    """
    sys.excepthook = _in_one_line
    for stream in (sys.stdout, sys.stderr):
        # Escape characters that the terminal cannot encode; flush each line when writing to a pipe.
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
    except BrokenPipeError:  # the reader of stdout (head, less) has exited
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
    """Excepthook that prints one line, without a traceback, for expected errors."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("nanogpt"):
        name = error.name.partition(".")[0]
        print(f"error: the package {name} is not installed: pip install {name}", file=sys.stderr, flush=True)
        os._exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


def leave(code: int, error: BaseException, message: str) -> NoReturn:
    """Print `message` to stderr and exit with `code`. Only one rank prints an error shared by all."""
    sys.stdout.flush()
    notes = getattr(error, "__notes__", ())
    silent = TOLD in notes or (SHARED in notes and os.environ.get("RANK", "0") != "0")
    if UNDER_TORCHRUN in os.environ:
        from nanogpt import torchrun

        torchrun.report(code, "see the error of another rank" if silent else message)
    if silent:
        time.sleep(2)  # torchrun kills the others when the first rank exits: let that be the one that prints
    else:
        print(message, file=sys.stderr)
    sys.exit(code)
