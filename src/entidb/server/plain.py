"""The addresses of a server that need no token: whether it lives, whether it is ready, what it is,
its counters, and the files of the console. Nothing of them says anything about databases or people.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from msgspec import json, to_builtins

from entidb.errors import ProtocolError
from entidb.protocol import PROTOCOL_MAJOR, PROTOCOL_MINOR
from entidb.server import wire
from entidb.server.admin.office import Office
from entidb.server.admin.readiness import Readiness
from entidb.server.console.serving import Console
from entidb.server.exchange import HttpExchange
from entidb.server.server import SyncServer
from entidb.server.wire import ServerResponse
from entidb.version import VERSION

if TYPE_CHECKING:
    from entidb.server.metrics import Metrics

ADDRESSES: Final = frozenset(("/healthz", "/readyz", "/v1/info", "/metrics"))


class Plain:
    """Without ``metrics`` there is no address for them."""

    def __init__(self, server: SyncServer, office: Office, metrics: Metrics | None) -> None:
        self._server = server
        self._office = office
        self._readiness = Readiness(office)
        self._metrics = metrics
        self._console = Console() if server.config.console else None

    def serves(self, path: str) -> bool:
        if self._console is not None and self._console.serves(path):
            return True
        return path in ADDRESSES and (path != "/metrics" or self._metrics is not None)

    async def answer(self, exchange: HttpExchange, *, stopping: bool) -> ServerResponse:
        """Raises ``ProtocolError`` (method_not_allowed)."""
        if exchange.method not in ("GET", "HEAD"):
            raise ProtocolError("read this with GET", code="method_not_allowed")
        if self._console is not None and self._console.serves(exchange.path):
            return self._console.answer(exchange.path, exchange.headers)
        if exchange.path == "/metrics":
            assert self._metrics is not None
            return await asyncio.to_thread(self._metrics.response)
        if exchange.path == "/healthz":
            status = "stopping" if stopping else "ok"
            count = self._office.others.count()
            # Those of a PostgreSQL database may be on as many machines.
            what = "workers" if self._server.config.address is None else "nodes"
            there = {} if count is None else {what: count}
            return _json({"status": status, **there}, 503 if stopping else 200)
        if exchange.path == "/readyz":
            return await self._ready(stopping)
        return _json(self.info())

    async def _ready(self, stopping: bool) -> ServerResponse:
        reasons = ["stopping"] if stopping else await asyncio.to_thread(self._reasons)
        if reasons:
            to_do = self._readiness.to_do(reasons)
            return _json({"status": "not ready", "reasons": reasons, "to_do": to_do}, 503)
        return _json({"status": "ready"})

    def _reasons(self) -> list[str]:
        """Of all processes of this server."""
        mine = self._readiness.reasons()
        return [*mine, *sorted(self._office.others.reasons() - set(mine))]

    def info(self) -> dict[str, Any]:
        """What ``GET /v1/info`` says."""
        return {
            "name": "entidb",
            "version": VERSION,
            "protocol": {"major": PROTOCOL_MAJOR, "minor": PROTOCOL_MINOR},
            "limits": to_builtins(self._server.limits),
            "encodings": list(self._server.encodings),
        }


def _json(value: object, status: int = 200) -> ServerResponse:
    return ServerResponse(status, {"content-type": wire.JSON_TYPE}, json.encode(value))
