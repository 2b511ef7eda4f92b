"""What a program says and returns when it cannot go on.

Every program ends through `run_program`, so one cause has one exit code everywhere:

==== ================================================================
0    done
2    the user can mend it: an option, a file, a combination
70   the numbers diverged
74   reading or writing failed (a full disk, say)
75   stopped by a signal or a time limit; run it again to go on
==== ================================================================
"""

import io
import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """The message says what was given, what was expected and what to type."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is no longer a finite number."""


class Stopped(Exception):
    """The program left early on purpose; its state is saved and can be resumed."""


SHARED = "every process of the run has this error"  # a note on it


def run_program(main: Callable[[], None]) -> None:
    """Call `main` and leave with its exit code; an expected failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character gets its number, and a pipe each line when it is printed.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        leave(2, error, f"error: {error}")
    except Diverged as error:
        leave(70, error, f"diverged: {error}")
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        leave(74, error, f"input/output error: {error}")
    except Stopped as error:
        leave(75, error, str(error))
    except KeyboardInterrupt as error:
        leave(130, error, "interrupted")


def leave(code: int, error: BaseException, message: str) -> None:
    """Leave with `code`, and `message` for stderr; of an error that all processes share, one tells."""
    sys.stdout.flush()
    if os.environ.get("RANK", "0") != "0" and SHARED in getattr(error, "__notes__", ()):
        time.sleep(2)  # the first to leave makes torchrun end the others: let it be the one that tells
    else:
        print(message, file=sys.stderr)
    sys.exit(code)
