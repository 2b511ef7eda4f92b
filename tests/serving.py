"""A small trained run, and a server process for tests."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import train
from nanogpt import ROOT
from tests.conftest import words, write_dataset

LANGUAGE = words(1800)


def train_small(folder: Path, text: str = LANGUAGE, **options: Any) -> Path:
    """Train for about a second; return the run folder."""
    dataset = write_dataset(folder / "dataset", text)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "max_iters": 150}
    sizes |= {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 5, "eval_interval": 50, "eval_iters": 4}
    sizes |= {"gradient_accumulation_steps": 1, "log_interval": 5}
    out = folder / "out"
    train.main(train.Config(out_dir=str(out), dataset=str(dataset), device="cpu", **(sizes | options)))
    return out


class Server:
    """serve.py in a subprocess, with real sockets."""

    def __init__(self, out: Path, *options: str, **environment: str):
        command = [sys.executable, "serve.py", f"--out_dir={out}", "--port=0", "--dtype=float32", *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and self.process.stderr
        self.line = self.process.stdout.readline()
        assert "serving at http" in self.line, self.process.stderr.read()
        self.errors: list[str] = []
        threading.Thread(target=self._drain, daemon=True).start()
        self.url = self.line.split()[2].split("#")[0].rstrip("/")
        self.port = int(self.url.rpartition(":")[2])

    def _drain(self) -> None:
        assert self.process.stderr
        self.errors.extend(self.process.stderr)

    def raw(self, request: bytes, timeout_s: float = 20.0) -> bytes:
        """Send the bytes of `request`; return everything received until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            connection.sendall(request)
            answer = b""
            try:
                while part := connection.recv(65536):
                    answer += part
            except (TimeoutError, ConnectionResetError):
                pass
            return answer

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, bytes]:
        """Return (status, content); a `body` other than bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if body is not None:
            given |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        given |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        verb = method or ("GET" if body is None else "POST")
        request = f"{verb} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1")
        answer = self.raw(request + (content if body is not None else b""))
        top, _, rest = answer.partition(b"\r\n\r\n")
        assert top, "no answer"
        if b"transfer-encoding: chunked" in top.lower():
            rest = _joined(rest)
        return int(top.split()[1]), rest

    def complete(self, **fields: Any) -> dict[str, Any]:
        status, content = self.ask("/v1/completions", fields)
        assert status == 200, content
        return json.loads(content)

    def meter(self, name: str, **labels: str) -> float:
        """Return a value of /metrics, summed over its labels; `labels` are sent as request headers."""
        _, content = self.ask("/metrics", headers=labels)
        lines = [line for line in content.decode().splitlines() if line.startswith(f"nanogpt_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def _joined(chunked: bytes) -> bytes:
    found = b""
    while chunked:
        size, _, chunked = chunked.partition(b"\r\n")
        found += chunked[: int(size or b"0", 16)]
        chunked = chunked[int(size or b"0", 16) + 2 :]
    return found


@contextmanager
def serving(out: Path, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(out, *options, **environment)
    try:
        yield server
    finally:
        server.close()


def eventually(check: Any, within_s: float) -> float:
    """Return the seconds until `check()` is true; fail after `within_s`."""
    started = time.perf_counter()
    while not check():
        assert time.perf_counter() - started < within_s, "it did not happen"
        time.sleep(0.01)
    return time.perf_counter() - started
