"""Run parsers in native code in another process: a crash or a hang in them is then an ordinary error."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nanogpt.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

SERVE = "import sys; from nanogpt.tokenizer import isolated; isolated.serve(int(sys.argv[1]))"
_child: "tuple[subprocess.Popen[bytes], connection.Connection] | None" = None


def call(where: str, cpu_s: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return function(...), computed by a process that is kept for further calls (on Windows by this one).

    `function` is at the top of a module. Raise UserError, which begins with `where`, if the process dies or
    needs more than `cpu_s` seconds of CPU time; exceptions of `function` are raised here.
    """
    if os.name == "nt":
        return function(*args, **kwargs)
    process, pipe = _running()
    try:
        pipe.send((cpu_s, function, args, kwargs))
        result, error = pipe.recv()
    except (EOFError, OSError):
        raise UserError(
            f"{where}: the library that reads it crashes or takes more than {cpu_s} s "
            f"(exit status {process.wait()}); the file is damaged, or made to do so"
        ) from None
    except BaseException:  # the answer to an interrupted call must not be taken for that to the next
        process.kill()
        process.wait()
        raise
    if error is not None:
        raise error
    return result


def _running() -> "tuple[subprocess.Popen[bytes], connection.Connection]":
    global _child
    if _child is None or _child[0].poll() is not None:
        ours, theirs = connection.Pipe()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # libraries print their panics
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        _child = process, ours
    return _child


def serve(handle: int) -> None:
    """Answer calls until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    pipe = connection.Connection(handle)
    with contextlib.suppress(EOFError, OSError):
        while True:
            cpu_s, function, args, kwargs = pipe.recv()
            limit_cpu(cpu_s)
            answer: tuple[Any, BaseException | None]
            try:
                answer = (function(*args, **kwargs), None)
            except BaseException as error:  # panics of Rust are not of type Exception
                known = isinstance(error, (UserError, OSError))
                answer = (None, error if known else UserError(f"{type(error).__name__}: {error}"))
            pipe.send(answer)


def limit_cpu(seconds: int) -> None:
    """Let the system end this process after `seconds` more of CPU time, where it can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, most))
