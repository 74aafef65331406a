"""One request of an ASGI server: what is known of it, its body as long as it comes in, and its line
in the access log.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from msgspec import json

from entidb.errors import ProtocolError
from entidb.protocol import PushResponse, SyncRequest
from entidb.server import wire
from entidb.server.auth import Grants
from entidb.server.registry import Registry, client_text
from entidb.server.room import Held
from entidb.types import Clock

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
#: Seconds that a refused request gets to finish sending what the server will not read: a client
#: that is cut off while it sends sees a broken connection and not the reason.
_DRAIN_S: Final = 5.0
#: Characters of one value in a line of the access log.
_LOGGED_MAX: Final = 500


#: Codes for things whose existence an answer must not show.
_STRANGERS: Final = frozenset(("forbidden", "unknown_database", "invalid_message"))
#: Percent-encoded letters, digits, ``-._~`` and slashes: no client encodes those, because they mean
#: the same as they are (RFC 3986, section 2.3), or because they part an address.
_DISGUISE: Final = re.compile(
    rb"%(?:2[def]|3[0-9]|4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9ae])", re.IGNORECASE
)


class ExchangeHost(Protocol):
    """What a request needs of its server."""

    @property
    def clock(self) -> Clock: ...
    def new_request_id(self) -> str: ...


class GoneError(Exception):
    """The client of this request is not there any more, or as good as."""


# ---------------------------------------------------------------- one request and its answer


class HttpExchange:
    """What is known of one request, and its body as long as it is coming in."""

    def __init__(self, scope: Scope, receive: Receive, server: ExchangeHost) -> None:
        self.method: str = scope["method"]
        self.path = path_in_app(scope)
        self.raw_path: bytes = scope.get("raw_path") or b""
        self.query: bytes = scope.get("query_string", b"")
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.preflight = False
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in self.raw_headers
        }
        #: Whether a header stands there more than once.
        self.repeats = len(self.headers) < len(self.raw_headers)
        self.id = wire.request_id(self.headers) or server.new_request_id()
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.body_read = not self._announces_body()
        self.bytes_in = 0
        self.bytes_out = 0
        self.status = 0
        self.subject: str | None = None
        #: What was asked, by whom, and the verdicts, as far as it came to that.
        self.request: SyncRequest | None = None
        self.grants: Grants | None = None
        self.verdicts: PushResponse | None = None
        self.db_id: str | None = None
        self.code: str | None = None
        self.gone: str | None = None
        self._receive = receive
        self._clock = server.clock
        self._began = server.clock.monotonic()

    def _announces_body(self) -> bool:
        length = self.headers.get("content-length", "0")
        return length != "0" or "transfer-encoding" in self.headers

    def check_address(self) -> None:
        """Raises ``ProtocolError`` (not_found) for an address in disguise: a proxy that keeps some
        addresses from the public may know them by their plain form alone."""
        if b"%" in self.raw_path and _DISGUISE.search(self.raw_path) is not None:
            raise ProtocolError(
                "there is nothing at this address: its letters are percent-encoded",
                code="not_found",
            )

    async def read(self, limit: int, held: Held) -> bytes:
        """The whole body. Raises ``ProtocolError`` (too_large), ``ServerBusyError``."""
        first, buffer = b"", None
        while True:
            piece, more = await self._next()
            if self.bytes_in > limit:
                raise wire.too_large(limit)
            held.take(len(piece))
            if buffer is not None:
                buffer.write(piece)
            elif not first:
                first = piece
            else:
                # One buffer, because a list of pieces would cost more than the bytes in them; and
                # of this kind, because it gives its bytes away without a copy.
                buffer = io.BytesIO()
                buffer.write(first)
                buffer.write(piece)
                first = b""
            if not more:
                return first if buffer is None else buffer.getvalue()

    async def drain(self, limit: int) -> None:
        """Let the client finish sending what was refused, within bounds; what is left then is
        cut off by closing the connection."""
        if self.body_read or "expect" in self.headers:
            return
        try:
            async with asyncio.timeout(_DRAIN_S):
                while self.bytes_in <= 2 * limit:
                    _, more = await self._next()
                    if not more:
                        return
        except TimeoutError:
            return

    async def _next(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise GoneError("closed the connection while sending")
        piece: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        self.bytes_in += len(piece)
        self.body_read = not more
        return piece, more

    def tell(self, registry: Registry) -> None:
        """Note the device, if its token grants the database at all."""
        if self.request is None or self.grants is None or self.code in _STRANGERS:
            return
        registry.heard(
            self.request,
            self.grants,
            code=self.code,
            answer=self.verdicts,
            client=client_text(self.headers.get("user-agent")),
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )

    def seconds(self) -> float:
        return self._clock.monotonic() - self._began

    def log_line(self, seconds: float) -> str:
        line = {
            "time": datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC).isoformat(
                timespec="milliseconds"
            ),
            "request_id": self.id,
            "client": self.client,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "ms": round(seconds * 1000, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        optional = {
            "subject": self.subject,
            "db_id": self.db_id,
            "code": self.code,
            "gone": self.gone,
        }
        line.update({name: value for name, value in optional.items() if value is not None})
        return json.encode({name: _loggable(value) for name, value in line.items()}).decode()


def _loggable(value: object) -> object:
    """Text that can be written, whatever a client or an authenticator put into it: no request
    goes without its line."""
    if not isinstance(value, str):
        return value
    return value[:_LOGGED_MAX].encode("utf-8", "backslashreplace").decode()


def path_in_app(scope: Scope) -> str:
    """The path below the place this app is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path
