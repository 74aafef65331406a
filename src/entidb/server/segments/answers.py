"""A segment over HTTP: who may have it, and on its way, piece by piece, from the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from entidb.errors import DatabaseClosedError, StorageError
from entidb.server.auth import Grants
from entidb.server.exchange import HttpExchange
from entidb.server.room import Held
from entidb.server.segments.serving import SegmentRequest, segment_answer
from entidb.server.sending import PIECE_BYTES
from entidb.server.server import SyncServer
from entidb.server.stores import Store
from entidb.server.wire import ServerResponse


class SegmentAnswers:
    """``use`` opens a database without waiting on the event loop."""

    def __init__(self, server: SyncServer, use: Callable[[str], Awaitable[Store]]) -> None:
        self._server = server
        self._use = use

    async def answer(self, exchange: HttpExchange, grants: Grants, held: Held) -> ServerResponse:
        """Raises as ``segment_answer``, and ``ServerBusyError``."""
        server = self._server
        request = SegmentRequest(exchange.method, exchange.path, exchange.query.decode("latin-1"))
        exchange.db_id = request.db_id
        server.front.permit_segment(request, grants)
        held.charge(("database", request.db_id))
        await held.reserve(PIECE_BYTES)
        store = await self._use(request.db_id)
        try:
            return await asyncio.to_thread(
                segment_answer,
                server.images,
                store,
                request,
                grants,
                exchange.headers,
                server.config.segments_redirect_to,
            )
        except (StorageError, DatabaseClosedError) as error:
            store.report(error)
            raise
        finally:
            server.stores.release(store)


__all__ = ["SegmentAnswers"]
