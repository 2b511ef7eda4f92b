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

CPU_S = 20  # seconds of CPU time per call, such as reading a batch of a table or trying a tokenizer
MEMORY = 1 << 29  # bytes per call, plus 8 per byte read; docs/data.md lists what formats need
FRUGAL = {  # environment in which libraries do not reserve memory: Arrow's own allocator takes a gigabyte
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    **dict.fromkeys(
        ("ARROW_IO_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
    ),
}
SERVE = "import sys; from nanogpt.tokenizer import isolated; isolated.serve(int(sys.argv[1]))"
_child: "tuple[subprocess.Popen[bytes], connection.Connection] | None" = None


def call(where: str, size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return function(...), computed by a process that is kept for further calls (on Windows by this one).

    `function` is at the top of a module, and reads about `size` bytes. Raise UserError, which begins with
    `where`, if the process dies, needs more than CPU_S, or more memory than reading that many bytes does;
    exceptions of `function` are raised here.
    """
    if os.name == "nt":
        return function(*args, **kwargs)
    process, pipe = _running()
    try:
        pipe.send((os.getcwd(), size, function, args, kwargs))
        result, error = pipe.recv()
    except (EOFError, OSError):
        raise UserError(
            f"{where}: the library that reads it crashes, or takes {CPU_S} s or too much memory "
            f"(exit status {process.wait()}); the file is damaged, or made to do so"
        ) from None
    except BaseException:  # the answer to an interrupted call must not be taken for that to the next
        process.kill()
        process.wait()
        raise
    if isinstance(error, str):
        raise UserError(f"{where}: the library that reads it fails: {error}")
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
            [sys.executable, "-P", "-c", SERVE, str(theirs.fileno())],  # imports nothing from this folder
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # libraries print their panics
            env={**os.environ, **FRUGAL, "PYTHONPATH": path},
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
            folder, size, function, args, kwargs = pipe.recv()
            os.chdir(folder)
            limit(CPU_S, MEMORY + 8 * size)
            answer: tuple[Any, UserError | OSError | str | None]
            try:
                answer = (function(*args, **kwargs), None)
            except (UserError, OSError) as error:
                answer = (None, error)
            except BaseException as error:  # panics of Rust are not of type Exception
                answer = (None, (str(error).splitlines() or [type(error).__name__])[0])
            pipe.send(answer)


def limit(seconds: int, memory: int) -> None:
    """Let the system end this process after `seconds` more of CPU time, and refuse it more than `memory` more
    bytes, where it can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        memory += pages * resource.getpagesize()  # already in use, for example by threads of libraries
        resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
