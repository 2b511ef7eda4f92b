"""uvicorn's HTTP with deadlines that it does not have: on receiving a request, and on taking an answer.

uvicorn waits for ever for the rest of a request, so that some hundred sockets that send a byte now and
then hold all connections; nothing behind it can know. The deadline is absolute, not one on idleness.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogpt.server.api_errors import Refusal


class DeadlineProtocol(H11Protocol):
    receive_s = 8.0  # from a connection, or the first byte of a further request, to the end of the request
    send_s = 8.0  # that a client may take nothing of an answer while much of it waits

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._receiving = self.loop.call_later(self.receive_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(began=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch(began=self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0]))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receiving, self._sending):
            if timer:
                timer.cancel()
        self._receiving = self._sending = None
        super().connection_lost(exc)

    def _watch(self, began: bool) -> None:
        """Set the deadline when a request begins, and forget it when it is complete."""
        complete = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if complete and self._receiving:
            self._receiving.cancel()
            self._receiving = None
        elif not complete and began and not self._receiving and not self.transport.is_closing():
            self._receiving = self.loop.call_later(self.receive_s, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = self.loop.call_later(self.send_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._sending:
            self._sending.cancel()
            self._sending = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of our shape, unless an answer is under way already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = Refusal(400, f"this is not a request of HTTP/1.1: {msg}")
            headers = [*refusal.headers(), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=refusal.body()),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
