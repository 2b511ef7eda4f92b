"""Exit with one line and a code, after an error; report it to torchrun, and avoid pointless restarts.

torchrun restarts the ranks after any nonzero exit code (--max_restarts). After a code that a restart cannot
fix (FINAL), the restarted ranks exit at once, silently.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

FINAL = (2, 70, 75)  # exit codes that a restart cannot fix
ENV_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # path of the file that torchrun reads the error from


def leave(code: int, message: str, silent: bool) -> NoReturn:
    """Print `message` to stderr and exit with `code`; `silent`: another rank prints it."""
    sys.stdout.flush()
    report(code, "see the error of another rank" if silent else message)
    if silent:
        time.sleep(2)  # torchrun kills the others when the first rank exits: let that be the one that prints
    else:
        print(message, file=sys.stderr)
    sys.exit(code)


def in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Excepthook that prints one line, without a traceback, for Ctrl-C, lack of memory and of packages."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("nanogpt"):
        name = error.name.partition(".")[0]
        print(f"error: the package {name} is not installed: pip install {name}", file=sys.stderr, flush=True)
        os._exit(2)
    elif isinstance(error, MemoryError) or (kind is RuntimeError and "can't allocate memory" in str(error)):
        said = str(error).splitlines()[0] if str(error) else "choose smaller numbers"
        print(f"error: out of memory: {said.partition('DefaultCPUAllocator: ')[2] or said}", file=sys.stderr)
        os._exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


def leave_as_before() -> None:
    """Exit with the code of the previous attempt if it is one of FINAL."""
    if code := final_code_of_last_attempt(os.environ):
        report(code, "same error as in the previous attempt")
        sys.exit(code)


def leave_at_once(message: str) -> None:
    """Exit with code 76 from another thread while the main thread hangs; print `message` unless empty."""
    report(76, message or "see the error of another rank")
    if message:
        print(f"lost: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # as in leave
    os._exit(76)


def report(code: int, message: str) -> None:
    """Write the error to the file that torchrun reads, so that its failure report includes it."""
    path = os.environ.get(ENV_ERROR_FILE)
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    about = {"message": {"message": message, "errorCode": code, "extraInfo": extra}}
    with suppress(OSError):  # torchrun's report then lacks the error, which is on stderr
        Path(path).write_text(json.dumps(about), encoding="utf-8")


def final_code_of_last_attempt(environment: Mapping[str, str]) -> int:
    """Return the exit code of the previous attempt if it is one of FINAL, else 0.

    Reads torchrun's attempt_N/LOCAL_RANK/error.json; 0 also if the files are missing or laid out otherwise.
    """
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or ENV_ERROR_FILE not in environment:
        return 0
    before = Path(environment[ENV_ERROR_FILE]).parent.parent.with_name(f"attempt_{attempt - 1}")
    for path in sorted(before.glob("*/error.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):
            code = json.loads(path.read_text(encoding="utf-8"))["message"]["errorCode"]
            if code in FINAL:
                return int(code)
    return 0
