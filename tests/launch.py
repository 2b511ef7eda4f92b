"""Start programs in processes forked from one that has imported torch, which saves seconds per start.

`python -m tests.launch` reads one command per line, as JSON, and answers each with its exit code.
"""

import atexit
import json
import os
import runpy
import signal
import socket
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
    words: Sequence[str],
    cwd: Path = ROOT,
    variables: Mapping[str, str] | None = None,
    timeout_s: int = 120,
    ranks: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` (a file, -m or -c) in `cwd`, with `variables` added to the environment, as
    subprocess.run does with captured output; with several `ranks` as many processes, as torchrun does."""
    tasks, environment = [], {**os.environ, **(variables or {})}
    if sys.platform != "linux" and ranks == 1:  # Windows cannot fork, and Apple's libraries do not allow it
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        files = [f"{scratch}/out", f"{scratch}/err"]
        for rank in range(ranks):
            place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
            place |= {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}"}
            place |= {"MASTER_PORT": f"{free.getsockname()[1]}"}
            its_own = environment | (place if ranks > 1 else {})
            tasks.append([list(words), str(cwd), its_own, files, timeout_s])
        free.close()
        process = server()
        assert process.stdin and process.stdout
        print(json.dumps(tasks), file=process.stdin, flush=True)
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
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.path.remove(os.fspath(ROOT))
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
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


def fork(*task: object) -> int:
    """Start `become(*task)` in a new process; return its id."""
    if child := os.fork():
        return child
    code = 0
    try:
        become(*task)  # type: ignore[arg-type]
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


def main() -> None:
    import torch._dynamo  # needed by FSDP, DDP and optimizers
    import torch.distributed.fsdp  # noqa: F401

    for line in sys.stdin:
        children = [fork(*task) for task in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(next(filter(None, codes), 0), flush=True)


if __name__ == "__main__":
    main()
