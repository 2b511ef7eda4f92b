"""The server's routes: OpenAI's completions, health and metrics, the page, and the run it shows.

    /v1/models  /v1/completions  /health  /metrics      what clients of OpenAI and Prometheus know
    /  /style.css  /page.js                             the page, read once from web/
    /about  /run/metrics  /run/samples                  what the page asks for beside completions

HTTP only: requests are understood in `completions`, served by `scheduler`, and let in by `guard`.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from nanogpt.serving import completions, follow
from nanogpt.serving.completions import CompletionRequest, Limits, LogProbs
from nanogpt.serving.guard import Guard, Receive, Scope, Send
from nanogpt.serving.meters import Meters
from nanogpt.serving.refusal import Refusal
from nanogpt.serving.scheduler import Choice, Full, Piece, PromptScores, Scheduler
from nanogpt.tokenizer import Tokenizer

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
EVENT_S = 0.02  # from one event of a stream to the next, at least: tokens that come faster share one
SHORT = 1 << 14  # bytes of a request that is read at once
PUBLIC = frozenset([*PAGE, "/health"])  # these say nothing of the model


@dataclass(frozen=True)
class Served:
    """What is served."""

    name: str  # of the model
    tokenizer: Tokenizer
    scheduler: Scheduler
    meters: Meters
    limits: Limits
    about: dict[str, Any]  # what the page shows of the model
    run: Path | None  # the folder of train.py, where there is one
    web: Path


def build(served: Served, *, port: int, local: bool, token: str) -> Callable[..., Awaitable[None]]:
    """The ASGI app: see Guard for `port`, `local` and `token`. It starts and closes the scheduler."""
    routes = _Routes(served)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        served.scheduler.start()
        yield
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
    known = frozenset(paths)

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                served.meters.answered(
                    scope["path"] if scope["path"] in known else "other", message["status"]
                )
            await send(message)

        with suppress(ClientDisconnect):
            await guarded(scope, receive, send_counted)

    guarded = Guard(app, port=port, local=local, token=token, public=PUBLIC)
    return counted


class _Routes:
    def __init__(self, served: Served):
        self.served = served
        self.mail = _Mail()
        self.files = {path: ((served.web / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}

    async def page(self, request: Request) -> Response:
        content, kind = self.files[request.url.path]
        return Response(content, media_type=kind)

    async def health(self, request: Request) -> Response:
        alive = self.served.scheduler.alive
        return _json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.served.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def about(self, request: Request) -> Response:
        return _json(self.served.about)

    async def run_metrics(self, request: Request) -> Response:
        if not self.served.run:
            return _json({"rows": [], "next": "", "anew": True})
        after = request.query_params.get("after", "")
        rows, position, anew = await asyncio.to_thread(follow.rows_since, self.served.run, after)
        return _json({"rows": rows, "next": position, "anew": anew})

    async def run_samples(self, request: Request) -> Response:
        if not self.served.run:
            return _json({"samples": []})
        after = request.query_params.get("after", "")[:18]
        number = int(after) if after.isascii() and after.isdigit() else -1
        return _json({"samples": await asyncio.to_thread(follow.samples, self.served.run, number)})

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.served.name:
            message = f"no model {name[:80]!r} here; there is {self.served.name!r}"
            raise Refusal(404, message, "model", "model_not_found")
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        created = self.served.about["created"]
        return {"id": self.served.name, "object": "model", "created": created, "owned_by": "nanogpt"}

    async def complete(self, request: Request) -> Response:
        served = self.served
        body = await request.body()
        known = (body, served.tokenizer, served.name, served.limits)
        if len(body) > SHORT:  # encoding a long text takes a while, in which others want their tokens
            asked = await asyncio.to_thread(completions.parse, *known)
        else:
            asked = completions.parse(*known)
        if not served.scheduler.alive:
            raise Refusal(503, "the model has failed; see the server's log and start it again")
        answer = _Answer(served, asked, self.mail)
        await asyncio.sleep(0)  # who comes at the same moment is read first, and joins the same step
        try:
            served.scheduler.submit(answer.choices)
        except Full:
            raise Refusal(
                429, "the queue is full; ask again in a moment", code="rate_limit_exceeded"
            ) from None
        if asked.stream:
            return _Events(answer)
        return await answer.whole(request)


class _Mail:
    """From the scheduler's thread into the loop: what a step has for all requests, in one call."""

    def __init__(self) -> None:
        self._letters: list[tuple[_Answer, Choice, Piece]] = []
        self._lock = threading.Lock()

    def send(self, answer: "_Answer", choice: Choice, piece: Piece) -> None:
        """Called in the scheduler's thread."""
        with self._lock:
            self._letters.append((answer, choice, piece))
            if len(self._letters) > 1:
                return
        with suppress(RuntimeError):  # the server has ended meanwhile
            answer.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            letters, self._letters = self._letters, []
        # Who has nothing yet comes first: each wakes a task that writes to a socket, for up to a millisecond.
        for answer, choice, piece in sorted(letters, key=lambda letter: any(letter[0].begun)):
            answer.arrived.put_nowait((choice, piece))


class _Answer:
    """One request under way: its choices at the scheduler, their pieces coming in from its thread."""

    def __init__(self, served: Served, asked: CompletionRequest, mail: _Mail):
        self.served, self.asked = served, asked
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[Choice, Piece] | None] = asyncio.Queue()  # None: the client left
        self.choices: list[Choice] = []
        self.logprobs: list[LogProbs] = []
        for prompt in asked.prompts:
            scores = None
            if asked.echo and asked.logprobs is not None:
                scores = PromptScores(prompt.ids, asked.logprobs)
            for number in range(asked.n):
                self.choices.append(
                    Choice(
                        prompt.ids,
                        asked.options,
                        seed=(asked.seed + number) % (1 << 63),
                        max_tokens=asked.max_tokens,
                        logprobs=asked.logprobs,
                        stop=asked.stop,
                        emit=partial(mail.send, self),
                        scores=scores,
                    )
                )
                offset = 0 if asked.echo else len(prompt.text)
                self.logprobs.append(LogProbs(served.tokenizer, offset, asked.logprobs or 0))
        self.index = {choice: i for i, choice in enumerate(self.choices)}
        self.begun = [False] * len(self.choices)
        self.ended, self.left = 0, False

    async def _pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(number of the choice, piece), all that are there at once, until all choices have ended; the prompt
        comes first if it is echoed."""
        while self.ended < len(self.choices):
            arrived = [await self.arrived.get()]
            while not self.arrived.empty():
                arrived.append(self.arrived.get_nowait())
            if None in arrived:
                raise ClientDisconnect
            yield [self._received(*letter) for letter in arrived if letter]

    def _received(self, choice: Choice, piece: Piece) -> tuple[int, Piece]:
        number = self.index[choice]
        if piece.finish == "error":
            raise Refusal(500, "the model failed at this request; the server's log says why")
        self.ended += piece.finish is not None
        if self.asked.echo and not self.begun[number]:
            prompt = self.asked.prompts[number // self.asked.n]
            tokens = (choice.scores.tokens or []) if choice.scores else []
            piece = replace(piece, text=prompt.text + piece.text, tokens=[*tokens, *piece.tokens])
        self.begun[number] = True
        return number, piece

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        logprobs = None if self.asked.logprobs is None else self.logprobs[number].of(piece.tokens)
        return completions.choice(number, piece.text, logprobs, piece.finish)

    def written(self) -> int:
        return sum(choice.written for choice in self.choices)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; ClientDisconnect when nobody reads them any more."""
        name, asked = self.served.name, self.asked
        try:
            async for pieces in self._pieces():
                choices = [self._choice(number, piece) for number, piece in pieces]
                parts = (completions.answer(asked, name, [choice]) for choice in choices)
                yield b"".join(b"data: " + part + b"\n\n" for part in parts)
                if self.ended < len(self.choices):
                    await asyncio.sleep(EVENT_S)
            if asked.usage_in_stream:
                yield b"data: " + completions.answer(asked, name, [], self.written()) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Refusal as refusal:
            yield b"data: " + refusal.body() + b"\n\n"
        finally:
            self.leave()

    async def whole(self, request: Request) -> Response:
        """All of the answer at once; ClientDisconnect if nobody waits for it any more."""
        collecting = asyncio.ensure_future(self._collect())
        leaving = asyncio.ensure_future(_left(request.receive))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            return Response(collecting.result(), media_type="application/json")
        finally:
            collecting.cancel()
            leaving.cancel()
            self.leave()

    async def _collect(self) -> bytes:
        found: list[list[Piece]] = [[] for _ in self.choices]
        async for pieces in self._pieces():
            for number, piece in pieces:
                found[number].append(piece)
        joined = [
            Piece("".join(p.text for p in pieces), [t for p in pieces for t in p.tokens], pieces[-1].finish)
            for pieces in found
        ]
        choices = [self._choice(number, piece) for number, piece in enumerate(joined)]
        return completions.answer(self.asked, self.served.name, choices, self.written())

    def leave(self) -> None:
        """Free the slots, if the answer is not complete."""
        if self.ended < len(self.choices) and not self.left:
            self.left = True
            self.served.scheduler.cancel(self.choices)
            self.served.meters.cancelled()


class _Events(Response):
    """A streamed answer. As Starlette's StreamingResponse, with a task for the client's leaving, but without
    one more for each answer and the group around them, which delay the first token of all who wait."""

    def __init__(self, answer: _Answer):
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(_left(receive))
        leaving.add_done_callback(self._client_left)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.answer.stream():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except ClientDisconnect:
            pass
        finally:
            leaving.cancel()

    def _client_left(self, leaving: asyncio.Task[None]) -> None:
        if not leaving.cancelled():
            self.answer.leave()
            self.answer.arrived.put_nowait(None)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200) -> Response:
    content = json.dumps(value, separators=(",", ":")).encode("ascii")
    return Response(content, status_code=status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    message = {404: f"nothing at {path}", 405: f"{request.method} is not for {path}"}
    return await _refused(request, Refusal(error.status_code, message.get(error.status_code, error.detail)))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    response = Response(status_code=error.status)
    response.body, response.raw_headers = error.body(), error.headers()
    return response
