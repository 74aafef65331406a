"""One request and its answer on a connection: uvicorn's, without what small messages do not need.

uvicorn copies what a client sends twice, looks for forbidden characters in each header by itself,
and writes the head of an answer before it knows the body. Here a body that came in one piece is
passed on as it is, and an answer that is all there is written at once. Any other answer goes
uvicorn's way. And uvicorn has queues for what next to no connection ever has to wait for.

Not here: how many connections there may be, and when they end (``connections``).
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Literal

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_START: Final = "http.response.start"
_BODY: Final = "http.response.body"
_LENGTH: Final = b"content-length"
#: Headers that say how an answer is cut into pieces, or what becomes of the connection.
_SPECIAL: Final = frozenset((b"connection", b"transfer-encoding"))
#: In the message that begins an answer: what the system does not take at once is waited for, so
#: that no more than one piece of it lies in this process.
UNBUFFERED: Final = "entidb.unbuffered"
#: A larger body is not worth a copy.
_JOINED_BYTES_MAX: Final = 64 * 1024


class Flag:
    """What ``asyncio.Event`` is, without a queue before somebody waits: a thousand connections with
    two of them each would hold more than a megabyte of empty queues."""

    __slots__ = ("_is_up", "_those")

    def __init__(self, *, up: bool = False) -> None:
        self._is_up = up
        self._those: tuple[asyncio.Future[None], ...] = ()

    def is_set(self) -> bool:
        return self._is_up

    def set(self) -> None:
        self._is_up = True
        for each in self._those:
            if not each.done():
                each.set_result(None)

    def clear(self) -> None:
        self._is_up = False

    async def wait(self) -> Literal[True]:
        if not self._is_up:
            waiting = asyncio.get_running_loop().create_future()
            self._those = (*self._those, waiting)
            try:
                await waiting
            finally:
                self._those = tuple(each for each in self._those if each is not waiting)
        return True


class ConnectionFlow(FlowControl):
    """uvicorn's, with a ``Flag``."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = self.write_paused = False
        self._is_writable_event = Flag(up=True)  # type: ignore[assignment]


class RequestCycle(RequestResponseCycle):
    """``body`` is what has come in and was not received yet."""

    body: bytes | bytearray  # type: ignore[assignment]

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.body = b""
        #: How an answer begins, until the first of its body is there: ASGI lets it wait.
        self._start: Any = None

    def came(self, piece: bytes) -> None:
        """A piece of the body has come in."""
        if not self.body:
            self.body = piece
        else:
            if isinstance(self.body, bytes):
                self.body = bytearray(self.body)
            self.body += piece
        if len(self.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.message_event.set()

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            if not self.message_event.is_set():
                await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self.body = self.body, b""
        return {"type": "http.request", "body": bytes(body), "more_body": self.more_body}

    async def send(self, message: Any) -> None:
        start = self._start
        if start is None:
            if message["type"] == _START and not self.response_started:
                self._start = message
                if UNBUFFERED in message:
                    self.transport.set_write_buffer_limits(high=0)
                return
        else:
            self._start = None
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            if self._write_whole(start, message):
                return
            await super().send(start)
        await super().send(message)

    async def send_500_response(self) -> None:
        self._start = None
        await super().send_500_response()

    def _write_whole(self, start: Any, message: Any) -> bool:
        """Write the answer that begins with ``start``, if ``message`` is the rest of it and nothing
        about it is special; whether that was done."""
        body: bytes = message.get("body", b"")
        if (
            message["type"] != _BODY
            or message.get("more_body", False)
            or not self.keep_alive
            or self.disconnected
            or self.scope["method"] == "HEAD"
        ):
            return False
        parts = [STATUS_LINE[start["status"]]]
        length: bytes | None = None
        headers = [*self.default_headers, *start["headers"]]
        for name, value in headers:
            if name in _SPECIAL:
                return False
            if name == _LENGTH:
                length = value
            parts += (name, b": ", value, b"\r\n")
        head = b"".join(parts) + b"\r\n"
        # A header that has a line's end in it would be more than one.
        if length != b"%d" % len(body) or head.count(b"\n") != len(headers) + 2:
            return False
        if len(body) > _JOINED_BYTES_MAX:
            self.transport.writelines((head, body))
        else:
            self.transport.write(head + body)
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.message_event.set()
        self.on_response()
        return True
