"""An answer on its way through ASGI, to a client that may stop reading."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from entidb.server.deadlines import within
from entidb.server.exchange import GoneError, HttpExchange, Message, Send
from entidb.server.segments.serving import SegmentAnswer
from entidb.server.wire import ServerResponse

logger = logging.getLogger("entidb.server")

#: Of a file, read and sent at a time: a page of the disk's cache costs less than a step of ours.
PIECE_BYTES: Final = 256 * 1024
#: Sent at a time: as much as a transport buffers by itself before it asks to wait.
_CHUNK_BYTES: Final = 64 * 1024


async def send_answer(
    exchange: HttpExchange, response: ServerResponse, send: Send, timeout_s: float
) -> None:
    """Send ``response`` whole. Raises ``GoneError`` for a client that is gone, or does not read
    for ``timeout_s``."""
    if isinstance(response, SegmentAnswer):
        return await _send_file(exchange, response, send, timeout_s)
    body = response.body
    headers = raw_headers(exchange, response)
    headers.append((b"content-length", str(len(body)).encode()))
    if not exchange.body_read:
        headers.append((b"connection", b"close"))
    start = {"type": "http.response.start", "status": response.status, "headers": headers}
    # In pieces, each waited for: a whole page at once would lie in the transport of a client that
    # has stopped reading, unnoticed.
    for at in range(0, len(body) or 1, _CHUNK_BYTES):
        piece = body if len(body) <= _CHUNK_BYTES else body[at : at + _CHUNK_BYTES]
        more = at + _CHUNK_BYTES < len(body)
        message = {"type": "http.response.body", "body": piece, "more_body": more}
        await _send_some(send, (start, message) if at == 0 else (message,), timeout_s)


async def _send_file(
    exchange: HttpExchange, response: SegmentAnswer, send: Send, timeout_s: float
) -> None:
    """A part of a file, never more than ``PIECE_BYTES`` of it in memory."""
    file, at, end = response.file, response.begin, response.begin + response.length
    headers = raw_headers(exchange, response)
    headers.append((b"content-length", str(response.length).encode()))
    if not exchange.body_read:
        headers.append((b"connection", b"close"))
    messages: tuple[Message, ...] = (
        {"type": "http.response.start", "status": response.status, "headers": headers},
    )
    try:
        if exchange.method == "HEAD":
            at = end
        exchange.bytes_out = end - at
        while at < end or messages:
            piece: bytes | bytearray = b""
            if at < end:
                count = min(PIECE_BYTES, end - at)
                try:
                    there = file.read_now(at, count)
                    if there is None:
                        there = await asyncio.to_thread(file.read, at, count)
                    piece = there
                except OSError as error:
                    logger.error("request %s: a segment cannot be read: %s", exchange.id, error)
                    raise GoneError("was sent a file that cannot be read") from error
                if len(piece) != count:
                    raise GoneError("was sent a file that has become shorter")
            at += len(piece)
            body = {"type": "http.response.body", "body": piece, "more_body": at < end}
            await _send_some(send, (*messages, body), timeout_s)
            messages = ()
    finally:
        file.close()


async def _send_some(send: Send, messages: tuple[Message, ...], timeout_s: float) -> None:
    try:
        await within(timeout_s, _send_all(send, messages))
    except TimeoutError as error:
        raise GoneError("stopped reading its answer") from error
    except OSError as error:
        raise GoneError("closed the connection") from error


async def _send_all(send: Send, messages: tuple[Message, ...]) -> None:
    for message in messages:
        await send(message)


def raw_headers(exchange: HttpExchange, response: ServerResponse) -> list[tuple[bytes, bytes]]:
    headers = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in response.headers.items()
    ]
    return [*headers, (b"x-request-id", exchange.id.encode())]


__all__ = ["PIECE_BYTES", "raw_headers", "send_answer"]
