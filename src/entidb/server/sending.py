"""An answer on its way through ASGI, to a client that may stop reading."""

from __future__ import annotations

import asyncio
from typing import Final

from entidb.server.exchange import GoneError, HttpExchange, Message, Send
from entidb.server.wire import ServerResponse

#: Sent at a time: as much as a transport buffers by itself before it asks to wait.
_CHUNK_BYTES: Final = 64 * 1024


async def send_answer(
    exchange: HttpExchange, response: ServerResponse, send: Send, timeout_s: float
) -> None:
    """Send ``response`` whole. Raises ``GoneError`` for a client that is gone, or does not read
    for ``timeout_s``."""
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


async def _send_some(send: Send, messages: tuple[Message, ...], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            for message in messages:
                await send(message)
    except TimeoutError as error:
        raise GoneError("stopped reading its answer") from error
    except OSError as error:
        raise GoneError("closed the connection") from error


def raw_headers(exchange: HttpExchange, response: ServerResponse) -> list[tuple[bytes, bytes]]:
    headers = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in response.headers.items()
    ]
    return [*headers, (b"x-request-id", exchange.id.encode())]


__all__ = ["raw_headers", "send_answer"]
