"""uvicorn's HTTP protocol with deadlines for receiving a request and for sending a response.

uvicorn waits forever for the rest of a request, so a few hundred slow clients can occupy all connections
(slowloris), which an ASGI app cannot detect. The deadline on receiving is absolute, not an idle timeout.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class DeadlineProtocol(H11Protocol):
    receive_s = 8.0  # seconds from connecting, or the first byte of a later request, to the request's end
    send_s = 8.0  # seconds that a client may read nothing while the write buffer is full

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
        """Set the deadline when a request begins; cancel it when the request is complete."""
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
        """Reject invalid HTTP; if a response has already started, only close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
