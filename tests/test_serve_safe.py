"""Server security and robustness: hostile requests are rejected, and closed connections free resources."""

import http.client
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.serving import eventually, serving, train_small

JSON = "application/json"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("served"), max_iters=20)


@pytest.fixture(scope="module")
def server(out):
    with serving(out, "--slots=8") as running:
        yield running


def hostile(port: int) -> list[dict[str, str]]:
    """Return headers that a browser sends from a foreign page or after DNS rebinding."""
    own = f"127.0.0.1:{port}"
    hosts = [
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        f"evil.example.localhost:{port}",
        f"localhost.evil.example:{port}",
        f"2130706433:{port}",
        f"0x7f000001:{port}",
        f"0177.0.0.1:{port}",
        f"127.1:{port}",
        f"0.0.0.0:{port}",
        f"[::ffff:127.0.0.1]:{port}",
        f"[::]:{port}",
        f"[0:0:0:0:0:0:0:2]:{port}",
        f"127.0.0.1:{port + 1}",
        "127.0.0.1",
        "localhost",
        f"user@127.0.0.1:{port}",
        f"127.0.0.1:{port}@evil.example",
        f"127.0.0.1:{port}.evil.example",
        f"192.168.0.1:{port}",
        f"127.0.0.1.:{port}",
        f"localhost.:{port}",
        "127.0.0.1:",
        f"127.0.0.1:{port} evil.example",
    ]
    origins = [
        "null",
        "https://evil.example",
        "http://evil.example",
        f"http://evil.example:{port}",
        f"https://{own}",
        f"http://localhost:{port}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{port + 1}",
        f"http://{own}.evil.example",
        f"http://{own}@evil.example",
        f"http://user@{own}",
        f"http://{own}/",
        f"{own}",
        "file://",
        f"ws://{own}",
        "chrome-extension://abcdefgh",
        f"http://2130706433:{port}",
        f"http://[::1]:{port}",
    ]
    kinds = [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/json-patch+json",
        "text/plain; application/json",
        "text/json",
        "",
    ]
    combinations = [{"Host": host} for host in hosts]
    combinations += [{"Origin": origin} for origin in origins]
    combinations += [{"Content-Type": kind} for kind in kinds]
    for site in ("cross-site", "same-site", "", "nonsense"):
        combinations.append({"Sec-Fetch-Site": site or "CROSS-SITE"})
    combinations += [{"Host": hosts[1], "Origin": f"http://{hosts[1]}"}]
    combinations += [{"Origin": "null", "Content-Type": "text/plain", "Sec-Fetch-Site": "cross-site"}]
    combinations += [{"Host": hosts[2], "Origin": f"http://{hosts[2]}", "Sec-Fetch-Site": "same-origin"}]
    combinations += [{"Content-Encoding": "gzip"}, {"Origin": "https://evil.example", "Host": hosts[5]}]
    return combinations


def test_60_hostile_combinations_are_rejected_and_write_nothing(server):
    combinations = hostile(server.port)
    assert len(combinations) >= 60
    before = server.meter("generated_tokens_total")
    for headers in combinations:
        status, content = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 5}, headers)
        assert status in (400, 403, 415), (headers, status)
        assert json.loads(content)["error"]["message"]
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET"):
        assert server.ask("/v1/completions", {"prompt": "a"}, method=method)[0] == 405
    assert server.meter("generated_tokens_total") == before
    assert server.meter("active") == 0


def test_12_valid_combinations_are_accepted(server):
    port = server.port
    for name in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        host = f"{name}:{port}"
        for more in (
            {},
            {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin", "Content-Type": JSON},
            {"Sec-Fetch-Site": "none", "Content-Type": f"{JSON}; charset=utf-8"},
        ):
            asked = {"prompt": "a", "max_tokens": 1}
            assert server.ask("/v1/completions", asked, {"Host": host, **more})[0] == 200


def test_no_cors_headers_are_sent(server):
    for path in ("/", "/health", "/v1/models", "/nothing"):
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
        head = server.raw(request.encode()).partition(b"\r\n\r\n")[0].lower()
        assert b"access-control" not in head
        policy = next(line for line in head.split(b"\r\n") if line.startswith(b"content-security-policy:"))
        assert b"default-src 'none'" in policy and b"unsafe" not in policy
        assert b"x-content-type-options: nosniff" in head


def test_two_host_headers_are_rejected(server):
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    answer = server.raw(f"GET /health HTTP/1.1\r\n{host}{host}Connection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400")
    assert server.raw(b"GET /health HTTP/1.0\r\n\r\n").split()[1] in (b"400", b"403")


def test_path_traversal_and_unknown_paths_are_rejected(server):
    paths = ["/../serve.py", "/..%2f..%2fetc/passwd", "/web/page.js", "//etc/passwd", "/%2e%2e/serve.py"]
    paths += ["/style.css/..", "/page.js%00", "/.git/config", "/run/../serve.py", "/%ff%fe", "/run/", "/v1"]
    for path in paths:
        status, content = server.ask(path)
        assert status == 404 and b"error" in content, path


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1", "/completions", "/models", "/v1/embeddings", "/docs", "/favicon.ico"],
)
def test_unknown_path_is_answered_with_the_known_ones(server, path):
    status, content = server.ask(path)
    message = json.loads(content)["error"]["message"]
    assert status == 404 and message.startswith(f"{path} not found; there are ")
    for known in ("GET /v1/models", "POST /v1/completions", "GET /health", "GET /metrics", "GET /"):
        assert known in message


def test_bodies_headers_and_urls_have_size_limits(server):
    big = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    assert server.ask("/v1/completions", big)[0] == 413
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: {JSON}\r\n"
    answer = server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 17)
    assert not answer or answer.startswith(b"HTTP/1.1 413")  # or closed during the request
    for size in (20_000, 300_000):
        assert server.ask("/health", headers={"X": "a" * size})[0] in (400, 431)
        assert server.ask("/" + "a" * size)[0] in (400, 414)
    assert server.ask("/v1/completions", {"prompt": "a"})[0] == 200


def test_public_address_requires_a_token(out):
    with serving(out, "--host=0.0.0.0", NANOGPT_TOKEN="open-sesame") as public:
        assert public.line.split()[2].endswith("/#token=open-sesame")
        for given in (
            "",
            "Bearer",
            "Bearer wrong",
            "Basic open-sesame",
            "open-sesame",
            "Bearer open-sesam\xe9",
        ):
            for path in ("/v1/models", "/metrics", "/about", "/run/metrics", "/run/samples"):
                status, content = public.ask(path, headers={"Authorization": given})
                assert status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key"
            assert public.ask("/v1/completions", {"prompt": "a"}, {"Authorization": given})[0] == 401
        allowed = {"Authorization": "Bearer open-sesame"}
        assert public.ask("/v1/completions", {"prompt": "a"}, allowed)[0] == 200
        assert public.ask("/v1/models", headers=allowed | {"Host": "my-machine:8000"})[0] == 200
        assert public.ask("/v1/models", headers=allowed | {"Origin": "http://evil.example"})[0] == 403
        behind = {"Host": "gpt.example", "Origin": "https://gpt.example", "Sec-Fetch-Site": "same-origin"}
        asked = {"prompt": "a", "max_tokens": 1}
        assert public.ask("/v1/completions", asked, allowed | behind)[0] == 200  # a proxy adds TLS
        status, content = public.ask("/v1/completions", asked, allowed | behind | {"Host": "inner:8000"})
        assert status == 403 and "--public_address=https://gpt.example" in str(content)
        assert public.ask("/health")[0] == public.ask("/")[0] == 200
    with serving(out, "--host=0.0.0.0") as public:  # a token is generated if none is given
        assert len(public.line.split()[2].partition("#token=")[2]) >= 32


def test_address_of_a_tunnel_is_accepted_in_addition(out):
    asked, page = {"prompt": "a", "max_tokens": 1}, {"Sec-Fetch-Site": "same-origin"}
    with serving(out, "--public_address=https://gpt.example/") as server:
        own = f"127.0.0.1:{server.port}"
        for host in (own, "gpt.example"):
            headers = page | {"Host": host, "Origin": "https://gpt.example"}
            assert server.ask("/v1/completions", asked, headers)[0] == 200
        assert server.ask("/v1/completions", asked, page | {"Host": own, "Origin": f"http://{own}"})[0] == 200
        for other in ("https://gpt.example.evil", "http://gpt.example", "https://evil.example", "null"):
            assert server.ask("/v1/completions", asked, page | {"Host": own, "Origin": other})[0] == 403
        assert server.ask("/v1/completions", asked, {"Host": "evil.example"})[0] == 403


NGINX = """
daemon off; pid {folder}/pid; error_log stderr; worker_processes 1; events {{}}
http {{
  access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;
  fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    location / {{ proxy_pass http://127.0.0.1:{inner}; {keep} }}
  }}
}}
"""
CADDY = """
{{
  admin off
  auto_https off
  skip_install_trust
}}
https://:{port} {{
  bind 127.0.0.1
  tls {folder}/cert.pem {folder}/key.pem
  reverse_proxy 127.0.0.1:{inner} {keep}
}}
"""
PROXIES = {  # configuration; what keeps the name that the browser asked for; what replaces it; how to start
    "nginx": (NGINX, "proxy_set_header Host $http_host;", "", ["-e", "stderr", "-c"]),
    "caddy": (
        CADDY,
        "",
        "{{\n    header_up Host {{upstream_hostport}}\n  }}",
        ["run", "--adapter=caddyfile", "--config"],
    ),
}


@contextmanager
def tls_proxy(name: str, folder: Path, inner: int, keeps_host: bool) -> Iterator[http.client.HTTPSConnection]:
    """Run a proxy with TLS for https://gpt.example in front of port `inner`; yield a connection to it."""
    program, openssl = shutil.which(name), shutil.which("openssl")
    if not program or not openssl:
        pytest.skip(f"needs {name} and openssl")
    subject = ["-subj", "/CN=gpt.example", "-addext", "subjectAltName=DNS:gpt.example"]
    pair = ["-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([openssl, "req", "-x509", *pair, *subject], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text, keep, replaced, start = PROXIES[name]
    keep = keep if keeps_host else replaced
    settings = text.format(folder=folder, port=port, inner=inner, keep=keep.format())
    (folder / "proxy.conf").write_text(settings, encoding="utf-8")
    environment = {**os.environ, "HOME": str(folder)}
    command = [program, *start, str(folder / "proxy.conf")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    ) as proxy:
        try:
            trusted = ssl.create_default_context(cafile=str(folder / "cert.pem"))
            for _ in range(200):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                    connection = http.client.HTTPSConnection("gpt.example", port, timeout=20)
                    connection.sock = trusted.wrap_socket(raw, server_hostname="gpt.example")
                    yield connection
                    return
                assert proxy.poll() is None, proxy.stderr.read()
                time.sleep(0.05)
            raise TimeoutError(name)
        finally:
            proxy.terminate()


@pytest.mark.parametrize("keeps_host", [True, False])
@pytest.mark.parametrize("name", PROXIES)
def test_page_and_api_work_behind_a_proxy_with_tls(name, keeps_host, out, tmp_path):
    """A proxy that keeps the name in Host needs no option; otherwise --public_address names it."""
    options = ["--host=0.0.0.0"] if keeps_host else ["--public_address=https://gpt.example"]
    with (
        serving(out, *options, NANOGPT_TOKEN="secret") as server,
        tls_proxy(name, tmp_path, server.port, keeps_host) as client,
    ):
        page = {"Host": "gpt.example", "Sec-Fetch-Site": "same-origin", "Authorization": "Bearer secret"}

        def ask(method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
            client.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = client.getresponse()
            return answer.status, answer.read().decode()

        status, content = ask("GET", "/", Host="gpt.example")
        assert status == 200 and "<html" in content
        asked = json.dumps({"prompt": "a", "max_tokens": 3})
        own = page | {"Origin": "https://gpt.example"}
        status, content = ask("POST", "/v1/completions", asked, **own)
        assert status == 200 and len(json.loads(content)["choices"][0]["text"]) == 3, content
        streamed = json.dumps({"prompt": "a", "max_tokens": 9, "stream": True})
        status, content = ask("POST", "/v1/completions", streamed, **own)
        assert status == 200 and content.endswith("data: [DONE]\n\n"), content
        for other in ({"Origin": "https://evil.example"}, {"Authorization": "Bearer wrong"}):
            assert ask("POST", "/v1/completions", asked, **own | other)[0] in (401, 403)


def streamed(server, **fields) -> socket.socket:
    """Return a connection on which a response is being streamed."""
    body = json.dumps({"prompt": "a", "max_tokens": 4096, "stream": True, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: {JSON}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_leaves(server, stream):
    for _ in range(10):
        connection = streamed(server, stream=stream, n=8)
        eventually(lambda: server.meter("active") == 8, 10)
        connection.close()
        eventually(lambda: server.meter("active") == 0, 2)  # generous; measured in benchmarks/serve.py
    before = server.meter("generated_tokens_total")
    time.sleep(0.1)
    assert server.meter("generated_tokens_total") == before


def test_queued_requests_can_be_canceled(server):
    busy = streamed(server, n=8)
    eventually(lambda: server.meter("active") == 8, 10)
    waiting = streamed(server, n=4)
    eventually(lambda: server.meter("waiting") == 4, 10)
    busy.close()
    waiting.close()
    eventually(lambda: server.meter("active") == server.meter("waiting") == 0, 2)
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 3})[0] == 200


def test_slow_sockets_are_closed_while_others_are_served(server):
    """40 connections, slow in every way; benchmarks/serve.py uses 500."""
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    post = f"POST /v1/completions HTTP/1.1\r\n{host}Content-Type: {JSON}\r\n"
    begun = [
        b"",
        b"G",
        f"GET / HTTP/1.1\r\n{host}X: ".encode(),
        f"{post}Content-Length: 900\r\n\r\n{{".encode(),
    ]
    begun.append(f"GET /health HTTP/1.1\r\n{host}\r\nGET /he".encode())  # slow in the second request
    slow = []
    for i in range(40):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(begun[i % len(begun)])
        slow.append(connection)
    started = time.perf_counter()
    left = set(slow)
    while left:
        assert time.perf_counter() - started < 11
        assert server.ask("/health")[0] == 200
        for connection in list(left):
            try:
                connection.sendall(b"a")
                connection.settimeout(0.001)
                if connection.recv(65536) == b"":
                    left.discard(connection)
            except TimeoutError:
                continue
            except OSError:
                left.discard(connection)
        time.sleep(0.2)
    for connection in slow:
        connection.close()


def test_fuzzed_requests_get_no_5xx(server):
    """300 requests; benchmarks/serve.py sends 10,000."""
    from benchmarks.serve import mutated

    draw = random.Random(1)
    for _ in range(300):
        answer = server.raw(mutated(draw, server.port), timeout_s=10)
        answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert not answer or answer.split()[1][:1] in (b"2", b"4"), answer[:200]
    assert server.ask("/health")[0] == 200
    eventually(lambda: server.meter("active") == 0, 10)
    assert server.process.poll() is None and not [line for line in server.errors if "Traceback" in line]


def test_many_concurrent_clients(server):
    """8 clients for 2 s: every response arrives at its client; benchmarks/serve.py uses 100 for 60 s."""
    expected = {i: server.complete(prompt="a", max_tokens=20, seed=i)["choices"][0]["text"] for i in range(8)}
    wrong, deadline = [], time.perf_counter() + 2

    def work(i):
        while time.perf_counter() < deadline:
            text = server.complete(prompt="a", max_tokens=20, seed=i)["choices"][0]["text"]
            if text != expected[i]:
                wrong.append((i, text))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
