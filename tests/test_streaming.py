"""How often the scheduler's thread calls the event loop: for a first piece, for the end, and now and then."""

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from nanogpt.inference.engine import Token
from nanogpt.server import openai_api, streaming
from nanogpt.server.openai_api import Limits
from nanogpt.server.scheduler import Piece
from nanogpt.server.streaming import Answer, EventQueue
from nanogpt.tokenizer.tokenizer import ByteTokenizer

LETTERS = "abcdefghij" * 5


def answering(**fields: Any) -> tuple[Answer, list[None]]:
    """An answer to be written, and a list that grows with each call of the loop."""
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
        choice.emit(choice, Piece(character, [Token(ord(character), None, [])], end))


def texts(event: bytes) -> str:
    parts = [part.removeprefix("data: ") for part in event.decode().split("\n\n") if part]
    return "".join(json.loads(part)["choices"][0]["text"] for part in parts if part != "[DONE]")


def test_a_stream_begins_and_ends_at_once_and_is_called_for_no_piece_between(monkeypatch):
    monkeypatch.setattr(streaming, "EVENT_S", 60.0)

    async def stream() -> None:
        answer, calls = answering(stream=True)
        events = answer.stream()
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(write, answer, 0, "f")
        assert texts(await first) == "f" and len(calls) == 2  # one is the end of to_thread
        rest = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(write, answer, 0, LETTERS)
        assert len(calls) == 3 and not rest.done()
        await asyncio.to_thread(write, answer, 0, "last", "stop")
        assert texts(await rest) == LETTERS + "last" and len(calls) == 5
        assert [event async for event in events] == [b"data: [DONE]\n\n"]

    asyncio.run(stream())


def test_a_stream_has_an_event_now_and_then():
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


def test_a_whole_answer_is_called_for_the_ends_of_its_texts():
    async def whole() -> None:
        answer, calls = answering(n=2)
        never: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        request: Any = SimpleNamespace(receive=lambda: never)
        done = asyncio.ensure_future(answer.whole(request))
        await asyncio.sleep(0.01)
        for number in (0, 1):
            await asyncio.to_thread(write, answer, number, LETTERS)
        assert len(calls) == 2  # the ends of to_thread
        await asyncio.to_thread(write, answer, 1, "1", "stop")
        await asyncio.to_thread(write, answer, 0, "0", "length")
        said = json.loads((await done).body)["choices"]
        assert [(one["text"], one["finish_reason"]) for one in said] == [
            (LETTERS + "0", "length"),
            (LETTERS + "1", "stop"),
        ]
        assert len(calls) == 6

    asyncio.run(whole())


def test_who_has_left_gets_nothing_more():
    async def stream() -> None:
        answer, _ = answering(stream=True)
        answer.served.scheduler = SimpleNamespace(cancel=lambda choices: cancelled.extend(choices))
        answer.served.meters = SimpleNamespace(cancelled=lambda: None)
        cancelled: list[Any] = []
        waiting = asyncio.ensure_future(anext(answer.stream()))
        await asyncio.sleep(0.01)
        answer.leave()
        with pytest.raises(streaming.ClientDisconnect):
            await waiting
        assert cancelled == answer.choices

    asyncio.run(stream())
