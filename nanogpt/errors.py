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
from collections.abc import Callable


class UserError(ValueError):
    """The message says what was given, what was expected and what to type."""


class Diverged(RuntimeError):
    """The loss, a gradient or a weight is no longer a finite number."""


class Stopped(Exception):
    """The program left early on purpose; its state is saved and can be resumed."""


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
        leave(2, f"error: {error}")
    except Diverged as error:
        leave(70, f"diverged: {error}")
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        leave(74, f"input/output error: {error}")
    except Stopped as error:
        leave(75, str(error))
    except KeyboardInterrupt:
        leave(130, "interrupted")


def leave(code: int, message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)
