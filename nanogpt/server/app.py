"""Routes of the server: OpenAI completions, health, metrics, the web page and the run it shows.

    /v1/models  /v1/completions  /health  /metrics      for OpenAI and Prometheus clients
    /  /style.css  /page.js                             the web page, read once from web/
    /about  /run/metrics  /run/samples                  data for the web page

HTTP only: `openai_api` parses requests, `scheduler` serves them and `access` authorizes them.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanogpt import ROOT
from nanogpt.server import openai_api, run_log
from nanogpt.server.access import Guard
from nanogpt.server.api_errors import Refusal
from nanogpt.server.scheduler import Full
from nanogpt.server.streaming import Answer, EventQueue, Events, Served

WEB = ROOT / "web"
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
SHORT = 1 << 14  # bytes; shorter requests are parsed in the event loop
PUBLIC = frozenset([*PAGE, "/health"])  # reveal nothing about the model


def build(served: Served, *, port: int, local: bool, token: str, address: str = "") -> Guard:
    """Return the ASGI app. Closes the running scheduler on shutdown. For the options see Guard."""
    routes = _Routes(served)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if served.scheduler:
            await asyncio.to_thread(served.scheduler.close)

    methods = {"/v1/completions": ["POST"]}
    paths: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/models": routes.models,
        "/v1/models/{name:path}": routes.model,
        "/v1/completions": routes.complete,
        "/health": routes.health,
        "/metrics": routes.metrics,
        "/about": routes.about,
        "/run/metrics": routes.run_metrics,
        "/run/samples": routes.run_samples,
        **{path: routes.page for path in PAGE},
    }
    app = Starlette(
        routes=[Route(path, route, methods=methods.get(path, ["GET"])) for path, route in paths.items()],
        exception_handlers={HTTPException: _http_error, Refusal: _refused},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False

    def answered(path: str, status: int) -> None:
        served.meters.requests.labels(path if path in paths else "other", str(status)).inc()

    return Guard(app, answered, port, local, token, PUBLIC, address)


class _Routes:
    def __init__(self, served: Served):
        self.served = served
        self.mail = EventQueue()
        self.files = {path: ((WEB / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

    async def page(self, request: Request) -> Response:
        content, kind = self.files[request.url.path]
        return Response(content, media_type=kind)

    async def health(self, request: Request) -> Response:
        scheduler = self.served.scheduler
        status = "waiting" if not scheduler else "ok" if scheduler.alive else "failed"
        return _json({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.served.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def about(self, request: Request) -> Response:
        return _json(self.served.about)

    async def run_metrics(self, request: Request) -> Response:
        if not self.served.run:
            return _json({"rows": [], "next": "", "anew": True})
        after = request.query_params.get("after", "")
        rows, position, anew = await asyncio.to_thread(run_log.rows_since, self.served.run, after)
        return _json({"rows": rows, "next": position, "anew": anew})

    async def run_samples(self, request: Request) -> Response:
        if not self.served.run:
            return _json({"samples": []})
        after = request.query_params.get("after", "")[:18]
        number = int(after) if after.isascii() and after.isdigit() else -1
        return _json({"samples": await asyncio.to_thread(run_log.samples, self.served.run, number)})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.served.name:
            message = f"model {name[:80]!r} not found; available: {self.served.name!r}"
            raise Refusal(404, message, "model", "model_not_found")
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        created = self.served.about["created"]
        return {"id": self.served.name, "object": "model", "created": created, "owned_by": "nanogpt"}

    async def complete(self, request: Request) -> Response:
        served = self.served
        if not served.scheduler:
            raise Refusal(503, "the run has no checkpoint yet; train.py writes one at its first evaluation")
        body = await request.body()
        known = (body, served.tokenizer, served.name, served.limits)
        if len(body) > SHORT:  # encoding a long text would block the event loop
            asked = await asyncio.to_thread(openai_api.parse, *known)
        else:
            asked = openai_api.parse(*known)
        if not served.scheduler.alive:
            raise Refusal(503, "the model has failed; see the server log and restart the server")
        answer = Answer(served, asked, self.mail)
        await asyncio.sleep(0)  # let concurrent requests be read, so that they join the same step
        try:
            served.scheduler.submit(answer.choices)
        except Full:
            raise Refusal(429, "the queue is full; retry later", code="rate_limit_exceeded") from None
        if asked.fields.stream:
            return Events(answer)
        return await answer.whole(request)


def _json(value: Any, status: int = 200) -> Response:
    content = json.dumps(value, separators=(",", ":")).encode("ascii")
    return Response(content, status_code=status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    there = ", ".join(f"{min(route.methods)} {route.path}" for route in request.app.routes)
    message = {404: f"{path} not found; there are {there}"}
    message[405] = f"{request.method} is not allowed for {path}"
    return await _refused(request, Refusal(error.status_code, message.get(error.status_code, error.detail)))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()
