"""The head of a request and a small body leave together, in one packet where they fit into one.

The library writes them one after the other, and a server that gets the head alone wakes up twice.
Loaded with the first connection, as the library's own sockets are.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, Final

import httpcore2
import httpx2

#: A larger body is not worth a copy that saves one write.
_JOINED_BYTES_MAX: Final = 64 * 1024


class JoinedStream(httpcore2.NetworkStream):
    """What is written first, at the beginning or after something was read, waits for what is
    written next. Who reads has written all: nothing waits then."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream
        self._held: bytes | None = None
        self._begins = True

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._begins:
            self._begins, self._held = False, buffer
            return
        held, self._held = self._held, None
        if held is not None:
            if len(buffer) <= _JOINED_BYTES_MAX:
                buffer = held + buffer
            else:
                self._stream.write(held, timeout)
        self._stream.write(buffer, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._held is not None:
            self.write(b"", timeout)
        self._begins = True
        return self._stream.read(max_bytes, timeout)

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        return JoinedStream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        return JoinedStream(super().connect_tcp(host, port, timeout, local_address, socket_options))


def join_writes(transport: httpx2.HTTPTransport) -> None:
    """Have the connections that ``transport`` makes join what they write. It has no argument for
    that; where its pool is not what it is today, requests leave in two writes."""
    pool = getattr(transport, "_pool", None)
    if type(getattr(pool, "_network_backend", None)) is httpcore2.SyncBackend:
        setattr(pool, "_network_backend", _Backend())  # noqa: B010


__all__ = ["JoinedStream", "join_writes"]
