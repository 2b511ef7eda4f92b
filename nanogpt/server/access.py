"""ASGI middleware for access control: host and origin checks, token, size limits, security headers.

A web page open in another tab can reach every port of the machine, but cannot forge the headers Host, Origin
and Sec-Fetch-Site, so these are checked (DNS rebinding: CVE-2024-28224). Plain ASGI.
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Set
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect

from nanogpt.server.api_errors import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Answered = Callable[[str, int], None]

MAX_BODY = 1 << 20  # bytes
MAX_HEAD = 1 << 14  # bytes of the URL; also of all headers together
CHECKED = (b"host", b"origin", b"sec-fetch-site", b"content-type", b"authorization")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SECURITY_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """Wraps an app: rejects forbidden requests, limits body sizes and adds security headers."""

    def __init__(
        self, app: App, answered: Answered, port: int, local: bool, token: str, public: Set[str], address: str
    ):
        """`answered` is called with the path and status of each response. `local`: accept only loopback names
        as Host, else any. `token`: bearer token; "": not required. `public`: paths that need no token.
        `address`: that of a proxy or tunnel, such as https://gpt.example, whose page and host are accepted
        too."""
        self._answered = answered
        self._app = app
        self._hosts = {f"{name}:{port}" for name in LOOPBACK} if local else set()
        if local and port == 80:
            self._hosts |= set(LOOPBACK)
        self._address = address.lower().rstrip("/")
        if self._hosts and address:
            self._hosts.add(self._address.partition("://")[2])
        self._token = token
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # lifespan events
            return

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
                self._answered(scope["path"], message["status"])
            await send(message)

        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_secured)
            return
        with suppress(ClientDisconnect):
            await self._app(scope, bounded(receive), send_secured)

    def _check(self, scope: Scope) -> None:
        # uvicorn's own limit applies only to headers that arrive in several parts.
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_HEAD:
            raise Refusal(414, f"the URL is too long: at most {MAX_HEAD} bytes")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
            raise Refusal(431, f"the headers are too large: at most {MAX_HEAD} bytes")
        headers = _single(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not host or (self._hosts and host not in self._hosts):
            expected = " or ".join(sorted(self._hosts)) or "a value"
            raise Refusal(403, f"Host is {host[:80]!r}, expected {expected}", code="forbidden_host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        pages = {f"{scope['scheme']}://{host}", self._address}
        if not self._hosts:  # reachable from elsewhere, perhaps through a proxy with TLS
            pages.add(f"https://{host}")
        if b"origin" in headers and origin not in pages:
            raise Refusal(
                403,
                f"the page is at {origin[:80]!r}, the server at {host[:80]!r}: cross-origin requests are not "
                f"allowed; behind a proxy or tunnel, start with --public_address={origin[:80]}",
                code="forbidden_origin",
            )
        if headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
            raise Refusal(403, "cross-origin requests are not allowed", code="forbidden_origin")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refusal(405, f"method {scope['method'][:20]} is not allowed; use GET or POST")
        if scope["method"] == "POST":
            _check_body(headers)
        if self._token and scope["path"] not in self._public:
            self._check_token(headers.get(b"authorization", b""))

    def _check_token(self, given: bytes) -> None:
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token.encode()):
            raise Refusal(
                401, "send the server's token as 'Authorization: Bearer ...'", code="invalid_api_key"
            )


def _single(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name; refuse duplicates of those checked, as a proxy might use the other value."""
    by_name: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in by_name and name in CHECKED:
            raise Refusal(400, f"duplicate header {name.decode('latin-1')}")
        by_name[name] = value
    return by_name


def _check_body(headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Refusal(415, f"Content-Type is {kind[:80].decode('latin-1')!r}, expected application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(415, "compressed bodies are not supported; send it uncompressed")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > MAX_BODY:
        raise _too_large()


def _too_large() -> Refusal:
    return Refusal(413, f"the body is too large: at most {MAX_BODY} bytes")


def bounded(receive: Receive) -> Receive:
    """Wrap `receive` to raise Refusal (413) once a body exceeds MAX_BODY."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise _too_large()
        return message

    return counted
