"""The addresses of a server that need no token: whether it lives, whether it is ready, what it is,
and its counters. Nothing of them says anything about databases or people.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from msgspec import json, to_builtins

from entidb.errors import ProtocolError
from entidb.protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from entidb.server import wire
from entidb.server.admin.readiness import Readiness
from entidb.server.exchange import Exchange
from entidb.server.server import SyncServer
from entidb.server.wire import HttpResponse
from entidb.version import VERSION

if TYPE_CHECKING:
    from entidb.server.metrics import Metrics

ADDRESSES: Final = frozenset(("/healthz", "/readyz", "/v1/info", "/metrics"))


class Plain:
    """Without ``metrics`` there is no address for them."""

    def __init__(self, server: SyncServer, readiness: Readiness, metrics: Metrics | None) -> None:
        self._server = server
        self._readiness = readiness
        self._metrics = metrics

    def serves(self, path: str) -> bool:
        return path in ADDRESSES and (path != "/metrics" or self._metrics is not None)

    async def answer(self, exchange: Exchange, *, stopping: bool) -> HttpResponse:
        """Raises ``ProtocolError`` (method_not_allowed)."""
        if exchange.method not in ("GET", "HEAD"):
            raise ProtocolError("read this with GET", code="method_not_allowed")
        if exchange.path == "/metrics":
            assert self._metrics is not None
            return self._metrics.response()
        if exchange.path == "/healthz":
            status = "stopping" if stopping else "ok"
            return _json({"status": status}, 503 if stopping else 200)
        if exchange.path == "/readyz":
            return await self._ready(stopping)
        return _json(self.info())

    async def _ready(self, stopping: bool) -> HttpResponse:
        reasons = ("stopping",) if stopping else await asyncio.to_thread(self._readiness.reasons)
        if reasons:
            return _json({"status": "not ready", "reasons": list(reasons)}, 503)
        return _json({"status": "ready"})

    def info(self) -> dict[str, Any]:
        """What ``GET /v1/info`` says."""
        return {
            "name": "entidb",
            "version": VERSION,
            "protocol": {"major": PROTOCOL_MAJOR, "minor": PROTOCOL_MINOR},
            "limits": to_builtins(self._server.limits),
            "encodings": list(self._server.encodings),
        }


def _json(value: object, status: int = 200) -> HttpResponse:
    return HttpResponse(status, {"content-type": wire.JSON_TYPE}, json.encode(value))
