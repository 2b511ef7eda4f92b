"""Responses to completion requests, whole or streamed: from the scheduler's thread to the event loop.

`EventQueue` is the only object that both threads use.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from nanogpt.inference.engine import Completion, Text
from nanogpt.server import openai_api
from nanogpt.server.access import Receive, Scope, Send
from nanogpt.server.api_errors import Refusal
from nanogpt.server.metrics import Meters
from nanogpt.server.openai_api import CompletionRequest, Limits, LogProbs
from nanogpt.server.scheduler import Choice, Piece, PromptScores, Scheduler
from nanogpt.tokenizer.tokenizer import Tokenizer

EVENT_S = 0.02  # minimum time between events of a stream; faster tokens share an event


@dataclass(frozen=True)
class Served:
    """The served model and its resources."""

    name: str  # model name
    tokenizer: Tokenizer
    scheduler: Scheduler | None  # None: the run has no checkpoint yet, and only its log is served
    meters: Meters
    limits: Limits
    about: dict[str, Any]  # facts about the model, for the page
    run: Path | None  # run folder of train.py, if any


class EventQueue:
    """Delivers pieces from the scheduler's thread to the event loop, waking it at most once per step."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._called: list[Answer] = []

    def send(self, answer: "Answer", number: int, piece: Piece) -> None:
        """Queue a piece of choice `number` of `answer`; called in the scheduler's thread."""
        with self.lock:
            answer.unread.setdefault(number, []).append(piece)
            if not answer.waiting or (answer.patient and not piece.finish):
                return
            answer.waiting = False
            self._called.append(answer)
            if len(self._called) > 1:
                return
        with suppress(RuntimeError):  # the event loop is closed
            answer.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self.lock:
            called, self._called = self._called, []
        # First tokens first: each answer wakes a task that writes to a socket, which takes up to 1 ms.
        for answer in sorted(called, key=lambda answer: bool(answer.begun)):
            answer.arrived.set()


class Answer:
    """An active request: its choices in the scheduler, and the pieces received from its thread."""

    def __init__(self, served: Served, asked: CompletionRequest, mail: EventQueue):
        self.served, self.asked, self.mail = served, asked, mail
        self.fields = fields = asked.fields
        known = served.tokenizer
        self.loop = asyncio.get_running_loop()
        # Guarded by mail.lock: unread pieces by choice, and whether the event loop waits for more.
        self.unread: dict[int, list[Piece]] = {}
        self.waiting = False
        self.patient = False  # wait for the end of a text only
        self.arrived = asyncio.Event()
        self.choices: list[Choice] = []
        self.logprobs: list[LogProbs] = []
        for prompt in asked.prompts:
            scores = None
            if fields.echo and fields.logprobs is not None:
                scores = PromptScores(prompt.ids, fields.logprobs)
            for number in range(fields.n):
                seed = (fields.seed + number) % (1 << 63)
                text = Text(prompt.ids, asked.options, seed, fields.logprobs)
                completion = Completion(text, known, fields.max_tokens, fields.stop, known.end_of_text)
                emit = partial(mail.send, self, len(self.choices))
                self.choices.append(Choice(prompt.ids, completion, emit, scores))
                before, offset = ([], 0) if fields.echo else (prompt.ids, len(prompt.text))
                self.logprobs.append(LogProbs(known, before, offset, fields.logprobs or 0))
        self.begun: set[int] = set()  # choices of which something has been read
        self.ended, self.left = 0, False

    async def _available(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield lists of the choices with new output until all have ended. Of a stream, the first list comes
        at once, others every EVENT_S and whenever a text ends; else there is one list. Raise ClientDisconnect
        if the client has left."""
        while self.ended < len(self.choices):
            self.patient = bool(self.begun) or not self.fields.stream
            timer = self.loop.call_later(EVENT_S, self._hurry) if self.begun else None
            try:
                while not self._ready():
                    await self.arrived.wait()
                    self.arrived.clear()
                    if self.left:
                        raise ClientDisconnect
            finally:
                if timer:
                    timer.cancel()
            with self.mail.lock:
                unread, self.unread = self.unread, {}
            yield [self._choice(*item) for item in sorted(unread.items())]

    def _ready(self) -> bool:
        """Return whether the unread pieces should be sent now; if not, wait for more."""
        with self.mail.lock:
            finished = sum(pieces[-1].finish is not None for pieces in self.unread.values())
            ready = finished == len(self.choices)
            if self.fields.stream:
                ready = finished > 0 or (bool(self.unread) and not self.patient)
            self.waiting = not ready
        return ready

    def _hurry(self) -> None:
        self.patient = False
        self.arrived.set()

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return the output of a choice; with echo, the first includes the prompt."""
        finish = pieces[-1].finish
        if finish == "error":
            raise Refusal(500, "the model failed on this request; see the server log")
        self.ended += finish is not None
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        if self.fields.echo and number not in self.begun:
            text = self.asked.prompts[number // self.fields.n].text + text
            scores = self.choices[number].scores
            tokens = [*(scores.tokens or []), *tokens] if scores else tokens
        self.begun.add(number)
        logprobs = None if self.fields.logprobs is None else self.logprobs[number].of(tokens)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def written(self) -> int:
        return sum(choice.written for choice in self.choices)

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events. Raise ClientDisconnect if the client has left."""
        name, asked = self.served.name, self.asked
        try:
            async for choices in self._available():
                parts = (openai_api.answer(asked, name, [choice]) for choice in choices)
                yield b"".join(b"data: " + part + b"\n\n" for part in parts)
            if self.fields.stream_options.include_usage:
                yield b"data: " + openai_api.answer(asked, name, [], self.written()) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Refusal as refusal:
            yield b"data: " + refusal.body() + b"\n\n"

    async def whole(self, request: Request) -> Response:
        """Return the complete response. Raise ClientDisconnect if the client has left."""
        with self.watched(request.receive):
            choices = [choice async for available in self._available() for choice in available]
        content = openai_api.answer(self.asked, self.served.name, choices, self.written())
        return Response(content, media_type="application/json")

    @contextmanager
    def watched(self, receive: Receive) -> Iterator[None]:
        """Cancel the answer when its client disconnects, or at the end of the block if it is incomplete."""
        leaving = asyncio.ensure_future(_left(receive))
        leaving.add_done_callback(lambda _: self.leave())
        try:
            yield
        finally:
            leaving.cancel()
            self.leave()

    def leave(self) -> None:
        """Cancel an incomplete answer: free its slots and raise ClientDisconnect in the task that waits."""
        if self.ended < len(self.choices) and not self.left:
            self.left = True
            self.arrived.set()
            assert self.served.scheduler
            self.served.scheduler.cancel(self.choices)
            self.served.meters.cancelled.inc()


class Events(Response):
    """A streamed response, like Starlette's StreamingResponse.

    It uses one task to detect disconnects instead of a task group with two, which delays all first tokens.
    """

    def __init__(self, answer: Answer):
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect), self.answer.watched(receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self.answer.stream():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
