"""Start programs in processes forked from one that has imported torch, which saves seconds per start.

`python -m tests.launch` reads one command per line, as JSON, and answers each with its exit code.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.launch"]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(
    words: Sequence[str], cwd: Path, variables: Mapping[str, str] | None = None, timeout_s: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` (a file, -m or -c) in `cwd`, with `variables` added to the environment, as
    subprocess.run does with captured output."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [f"{scratch}/out", f"{scratch}/err"]
        environment = {**os.environ, **(variables or {})}
        process = server()
        assert process.stdin and process.stdout
        task = json.dumps([list(words), str(cwd), environment, files, timeout_s])
        print(task, file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        out, err = (Path(path).read_text(encoding="utf-8") for path in files)
    return subprocess.CompletedProcess(words, code, out, err)


def become(words: list[str], cwd: str, environment: dict[str, str], files: list[str], timeout_s: int) -> None:
    """Run a command in this process as a new Python interpreter would."""
    signal.alarm(timeout_s)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate([os.devnull, *files]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.path.remove(os.fspath(ROOT))
    assert "nanogpt" not in sys.modules  # `cwd` may hold another copy of the project
    if words[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    import torch._dynamo  # noqa: F401  # FSDP, DDP and optimizers need it

    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 0
            try:
                become(*json.loads(line))
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
                print(error.code if isinstance(error.code, str) else "", end="", file=sys.stderr)
            except BaseException as error:
                code = 1
                sys.excepthook(type(error), error, error.__traceback__)
            # As the interpreter ends, but without freeing all modules, which takes a second.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
