"""Load and robustness tests of the server; prints one line per test.

    python -m benchmarks.serve --out_dir=out-shakespeare-char                    # starts serve.py
    python -m benchmarks.serve --out_dir=out-shakespeare-char --only=speed,fuzz

speed: 16 clients compared with one; load: 100 clients for a minute; fuzz: 10,000 malformed requests; slow:
500 sockets that never finish a request; leave: 100 clients that disconnect while being served. Linux only.
"""

import json
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanogpt import ROOT
from nanogpt.config import PositiveInt, load
from nanogpt.errors import UserError, run_program


@dataclass(frozen=True)
class Config:
    out_dir: str = "out"  # run folder of train.py
    only: str = "speed,load,fuzz,slow,leave"  # comma-separated tests to run
    requests: PositiveInt = 10_000  # fuzz: number of requests
    clients: PositiveInt = 100  # load: number of clients
    seconds: PositiveInt = 60  # load: duration in seconds
    sockets: PositiveInt = 500  # slow: number of sockets
    leaving: PositiveInt = 100  # leave: number of disconnecting clients
    prompt: str = "\n"  # prompt; its characters must be in the vocabulary
    tokens: PositiveInt = 64  # tokens per response in speed and load


class Server:
    def __init__(self, config: Config):
        command = [sys.executable, "serve.py", f"--out_dir={config.out_dir}", "--port=0", "--queue=512"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)):
            raise UserError(f"serve.py did not start with --out_dir={config.out_dir}; see its message above")
        self.port = int(found[1])
        self.config = config

    def send(self, request: bytes, timeout_s: float = 60.0) -> tuple[bytes, float]:
        """Send a request; return the response, and the seconds to its first event (0: none)."""
        started, first = time.perf_counter(), 0.0
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            try:
                connection.sendall(request)
                while part := connection.recv(65536):
                    answer += part
                    if not first and b"data: " in answer:
                        first = time.perf_counter() - started
            except (TimeoutError, ConnectionResetError, BrokenPipeError):
                pass
        return answer, first

    def completion(self, **fields: object) -> bytes:
        body = json.dumps({"prompt": self.config.prompt, "max_tokens": self.config.tokens, **fields}).encode()
        return request(self.port, body)

    def get(self, path: str) -> bytes:
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n"
        return self.send(head.encode())[0].partition(b"\r\n\r\n")[2]

    def meter(self, name: str) -> float:
        return float(re.search(rf"^nanogpt_{name} (\S+)", self.get("/metrics").decode(), re.M)[1])

    def resident(self) -> int:
        """Return the resident set size in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


def request(port: int, body: bytes, extra: bytes = b"", length: int | None = None) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    size = len(body) if length is None else length
    return head.encode() + extra + f"Connection: close\r\nContent-Length: {size}\r\n\r\n".encode() + body


# ----------------------------------------------------------------------------- mutated requests

VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    1e308,
    -1e308,
    1 << 63,
    1 << 200,
    "",
    "a",
    "\ud800",
    "\0",
    "\u202e",
]
VALUES += [
    [],
    [[]],
    ["a"],
    [0],
    [1, 2],
    [-1],
    [1 << 40],
    {},
    {"a": 1},
    [None],
    ["a", 1],
    "a" * 5000,
    [0] * 5000,
]
VALUES += ["NaN", "<script>alert(1)</script>", [["a"]], [[[1]]], [[1], "a"], 0.0, 2, 20, 21, [True]]
FIELDS = [
    "prompt",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "echo",
    "stream",
]
FIELDS += [
    "logprobs",
    "model",
    "best_of",
    "suffix",
    "user",
    "stream_options",
    "logit_bias",
    "presence_penalty",
]
FIELDS += ["repetition_penalty", "nonsense"]
PATHS = [
    "/",
    "/v1/models",
    "/v1/models/x",
    "/health",
    "/metrics",
    "/about",
    "/run/metrics?after=9-zz",
    "/nothing",
]
PATHS += [
    "/run/samples?after=-1",
    "/run/metrics?after=99999999999999999999-1",
    "/v1/models/%00",
    "*",
    "/%",
    "/?a=%zz",
]


def mutated(draw: random.Random, port: int) -> bytes:
    """Return a randomly malformed request (some are valid), with `Connection: close`."""
    kind = draw.randrange(6)
    if kind == 0:
        path, method = draw.choice(PATHS), draw.choice(["GET", "HEAD", "POST", "PUT", "BREW", "get"])
        return f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
    fields = {"prompt": "\n", "max_tokens": 2}
    for _ in range(draw.randrange(4)):
        fields[draw.choice(FIELDS)] = draw.choice(VALUES)
    body = bytearray(json.dumps(fields).encode())
    if kind == 1:  # broken JSON
        for _ in range(draw.randrange(1, 8)):
            body[draw.randrange(len(body))] = draw.randrange(256)
    if kind == 2:
        body = body[: draw.randrange(len(body))]
    if kind == 3:  # body longer than its Content-Length
        return request(port, bytes(body), length=draw.randrange(len(body) + 1))
    whole = bytearray(
        request(port, bytes(body), draw.choice([b"", b"X: y\r\n", b"Expect: 100-continue\r\n"]))
    )
    if kind == 4:  # broken HTTP
        for _ in range(draw.randrange(1, 6)):
            whole[draw.randrange(min(len(whole), 120))] = draw.randrange(256)
        whole += b"\r\n\r\n"
    return bytes(whole)


# ----------------------------------------------------------------------------- campaigns


def together(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def speed(server: Server) -> str:
    def tokens_a_second(clients: int, rounds: int) -> tuple[float, float]:
        firsts: list[float] = []

        def work(number: int) -> None:
            for turn in range(rounds):
                asked = server.completion(stream=True, seed=number * 1000 + turn)
                firsts.append(server.send(asked)[1])

        started, before = time.perf_counter(), server.meter("generated_tokens_total")
        together(clients, work)
        took = time.perf_counter() - started
        return (server.meter("generated_tokens_total") - before) / took, statistics.median(firsts)

    tokens_a_second(1, 3)
    alone, first_alone = tokens_a_second(1, 10)
    all_at_once, first = tokens_a_second(16, 5)
    return (
        f"1 client: {alone:.0f} tokens/s, first token after {first_alone * 1000:.1f} ms; 16 clients: "
        f"{all_at_once:.0f} tokens/s ({all_at_once / alone:.2f}x), first token after "
        f"{first * 1000:.1f} ms ({first / first_alone:.2f}x)"
    )


def load_(server: Server) -> str:
    config = server.config
    statuses: list[bytes] = []
    health: list[float] = []
    end = time.perf_counter() + config.seconds

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() < end:
            asked = server.completion(stream=draw.random() < 0.5, max_tokens=draw.randint(1, 64), logprobs=2)
            answer = server.send(asked)[0]
            whole = answer.endswith((b"0\r\n\r\n", b"}"))
            statuses.append(answer[9:12] if whole else b"cut")

    def watch() -> None:
        while time.perf_counter() < end:
            started = time.perf_counter()
            server.get("/health")
            health.append(time.perf_counter() - started)
            time.sleep(0.2)

    handles, threads, before = server.descriptors(), server.threads(), server.resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    together(config.clients, work)
    watcher.join()
    grown = server.resident() / before - 1
    counts = {status.decode(): statuses.count(status) for status in sorted(set(statuses))}
    time.sleep(1)
    return (
        f"{config.clients} clients, {config.seconds} s: responses by status {counts}; memory {grown:+.1%} "
        f"of {before / 1e6:.0f} MB; "
        f"health p99 {sorted(health)[int(len(health) * 0.99)] * 1000:.0f} ms; descriptors {handles} -> "
        f"{server.descriptors()}, threads {threads} -> {server.threads()}"
    )


def fuzz(server: Server) -> str:
    draw = random.Random(0)
    sent = [mutated(draw, server.port) for _ in range(server.config.requests)]
    statuses: dict[str, int] = {}
    warm = 0

    def work(number: int) -> None:
        nonlocal warm
        for i, one in enumerate(sent[number::8]):
            if number == 0 and i == len(sent) // 32:
                warm = server.resident()
            answer = server.send(one, timeout_s=20)[0].removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            status = answer[9:12].decode("latin-1") if answer else "closed"
            statuses[status] = statuses.get(status, 0) + 1

    together(8, work)
    bad = sum(count for status, count in statuses.items() if status.startswith("5"))
    alive = b"ok" in server.get("/health")
    return (
        f"{len(sent)} requests: {dict(sorted(statuses.items()))}; {bad} with 5xx; alive: {alive}; "
        f"memory {server.resident() / warm - 1:+.1%} after the first quarter"
    )


def slow(server: Server) -> str:
    def healthy() -> float:
        started = time.perf_counter()
        server.get("/health")
        return time.perf_counter() - started

    before = sorted(healthy() for _ in range(50))[48]
    begun = [b"", b"G", f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nX: ".encode()]
    begun.append(request(server.port, b"{", length=900))
    opened: dict[socket.socket, float] = {}
    for i in range(server.config.sockets):
        connection = socket.create_connection(("127.0.0.1", server.port))
        opened[connection] = time.perf_counter()
        connection.sendall(begun[i % 4])
        connection.setblocking(False)
    lived, times = [], []
    while opened and (not lived or max(lived) < 60):
        times.append(healthy())
        for connection, since in list(opened.items()):
            try:
                connection.send(b"a")
                closed = connection.recv(65536) == b""
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                lived.append(time.perf_counter() - since)
                connection.close()
                del opened[connection]
        time.sleep(0.05)
    beside = sorted(times)[int(len(times) * 0.98)]
    return (
        f"{len(lived)} of {server.config.sockets} slow sockets closed, the last after "
        f"{max(lived):.1f} s; /health p98 {before * 1000:.1f} ms before, {beside * 1000:.1f} ms meanwhile"
    )


def leave(server: Server) -> str:
    waits = []
    for i in range(server.config.leaving):
        stream = i % 2 == 0
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(server.completion(stream=stream, max_tokens=4096, n=1 + i % 4))
        while not server.meter("active"):
            pass
        time.sleep(random.Random(i).random() * 0.1)
        connection.close()
        left = time.perf_counter()
        while server.meter("active"):
            if time.perf_counter() - left > 10:
                break
        waits.append(time.perf_counter() - left)
    return (
        f"{sum(wait <= 0.25 for wait in waits)} of {len(waits)} stopped within 250 ms; median "
        f"{statistics.median(waits) * 1000:.0f} ms, longest {max(waits) * 1000:.0f} ms"
    )


CAMPAIGNS = {"speed": speed, "load": load_, "fuzz": fuzz, "slow": slow, "leave": leave}


def main(config: Config, origins: dict[str, str] | None = None) -> None:
    if unknown := set(config.only.split(",")) - set(CAMPAIGNS):
        raise UserError(f"--only={config.only}: {', '.join(unknown)} not in {', '.join(CAMPAIGNS)}")
    for name in config.only.split(","):
        server = Server(config)
        try:
            print(f"{name}: {CAMPAIGNS[name](server)}", flush=True)
        finally:
            server.process.terminate()
            server.process.wait(20)


if __name__ == "__main__":
    run_program(lambda: main(*load(Config, sys.argv[1:])))
