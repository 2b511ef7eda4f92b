"""Calls from the scheduler's thread to the event loop: first piece, end, and periodically in between."""

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.inference.engine import Token
from nanogpt.server import openai_api, streaming
from nanogpt.server.metrics import Meters
from nanogpt.server.openai_api import Limits
from nanogpt.server.scheduler import Piece
from nanogpt.server.streaming import Answer, EventQueue
from nanogpt.tokenizer.tokenizer import ByteTokenizer

LETTERS = "abcdefghij" * 5


def answering(**fields: Any) -> tuple[Answer, list[None]]:
    """Return a pending answer, and a list that grows with each call to the event loop."""
    known: Any = ByteTokenizer()
    served: Any = SimpleNamespace(tokenizer=known, name="model")
    body = json.dumps({"prompt": "x", **fields}).encode()
    answer = Answer(served, openai_api.parse(body, known, "model", Limits(8, 99, 8)), EventQueue())
    calls: list[None] = []
    call = answer.loop.call_soon_threadsafe
    answer.loop.call_soon_threadsafe = lambda *given: calls.append(None) or call(*given)
    return answer, calls


def write(answer: Answer, number: int, text: str, finish: str | None = None) -> None:
    choice = answer.choices[number]
    for i, character in enumerate(text):
        end = finish if i == len(text) - 1 else None
        choice.emit(Piece(character, [Token(ord(character), None, [])], end))


def texts(event: bytes) -> str:
    parts = [part.removeprefix("data: ") for part in event.decode().split("\n\n") if part]
    return "".join(json.loads(part)["choices"][0]["text"] for part in parts if part != "[DONE]")


def test_stream_wakes_only_for_first_and_last_piece(monkeypatch):
    monkeypatch.setattr(streaming, "EVENT_S", 60.0)

    async def stream() -> None:
        answer, calls = answering(stream=True)
        events = answer.stream()
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(write, answer, 0, "f")
        assert texts(await first) == "f" and len(calls) == 2  # one of them is the completion of to_thread
        rest = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(write, answer, 0, LETTERS)
        assert len(calls) == 3 and not rest.done()
        await asyncio.to_thread(write, answer, 0, "last", "stop")
        assert texts(await rest) == LETTERS + "last" and len(calls) == 5
        assert [event async for event in events] == [b"data: [DONE]\n\n"]

    asyncio.run(stream())


def test_stream_sends_periodic_events():
    async def stream() -> None:
        answer, _ = answering(stream=True)
        events = answer.stream()
        write(answer, 0, "a")
        assert texts(await anext(events)) == "a"
        write(answer, 0, LETTERS)
        begun = time.perf_counter()
        event = await anext(events)
        assert texts(event) == LETTERS and event.count(b"data: ") == 1
        assert time.perf_counter() - begun > 0.9 * streaming.EVENT_S

    asyncio.run(stream())


def test_full_answer_wakes_once_per_finished_text():
    async def whole() -> None:
        answer, calls = answering(n=2)
        never: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        request: Any = SimpleNamespace(receive=lambda: never)
        done = asyncio.ensure_future(answer.whole(request))
        await asyncio.sleep(0.01)
        for number in (0, 1):
            await asyncio.to_thread(write, answer, number, LETTERS)
        assert len(calls) == 2  # the completions of to_thread
        await asyncio.to_thread(write, answer, 1, "1", "stop")
        await asyncio.to_thread(write, answer, 0, "0", "length")
        said = json.loads((await done).body)["choices"]
        assert [(one["text"], one["finish_reason"]) for one in said] == [
            (LETTERS + "0", "length"),
            (LETTERS + "1", "stop"),
        ]
        assert len(calls) == 6

    asyncio.run(whole())


def test_disconnected_client_gets_no_more_events():
    async def stream() -> None:
        answer, _ = answering(stream=True)
        answer.served.scheduler = SimpleNamespace(cancel=lambda choices: cancelled.extend(choices))
        answer.served.meters = Meters()
        cancelled: list[Any] = []
        waiting = asyncio.ensure_future(anext(answer.stream()))
        await asyncio.sleep(0.01)
        answer.leave()
        with pytest.raises(streaming.ClientDisconnect):
            await waiting
        assert cancelled == answer.choices

    asyncio.run(stream())
