"""What torchrun is told of a failure, and what it has been told before.

torchrun starts processes again after any exit code but 0. After one that would come again (FINAL) they leave
at once, without a word.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

FINAL = (2, 70, 75)  # starting again cannot mend these
ENV_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun looks for the reason of a failure


def leave_as_before() -> None:
    """Leave with the exit code of the attempt before this one, if that was final."""
    if code := final_code_of_last_attempt(os.environ):
        report(code, "as in the attempt before this one")
        sys.exit(code)


def leave_at_once(message: str) -> None:
    """End a process whose main thread is stuck (exit code 76), from another thread; "": without a word."""
    report(76, message or "another process tells why")
    if message:
        print(f"lost: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # as in errors.leave
    os._exit(76)


def report(code: int, message: str) -> None:
    """Leave the reason where torchrun looks for it: its report, which follows, then ends with it."""
    path = os.environ.get(ENV_ERROR_FILE)
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    about = {"message": {"message": message, "errorCode": code, "extraInfo": extra}}
    try:
        Path(path).write_text(json.dumps(about), encoding="utf-8")
    except OSError:
        return  # torchrun then says less; our line is on stderr


def final_code_of_last_attempt(environment: Mapping[str, str]) -> int:
    """The exit code that torchrun has seen before it started this process again, if it is one of FINAL.

    torchrun keeps ATTEMPT/LOCAL_RANK/error.json; 0 if it keeps them otherwise, or nothing was left there.
    """
    attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not attempt or ENV_ERROR_FILE not in environment:
        return 0
    before = Path(environment[ENV_ERROR_FILE]).parent.parent.with_name(f"attempt_{attempt - 1}")
    for path in sorted(before.glob("*/error.json")):
        try:
            code = json.loads(path.read_text(encoding="utf-8"))["message"]["errorCode"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if code in FINAL:
            return int(code)
    return 0
