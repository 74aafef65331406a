"""A segment over HTTP: who may have it, and on its way, piece by piece, from the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct

from entidb.errors import DatabaseClosedError, StorageError
from entidb.protocol import SegmentInfo
from entidb.server.auth import Grants
from entidb.server.exchange import HttpExchange
from entidb.server.room import Held
from entidb.server.segments.serving import OpenFile, SegmentRequest, answer_with, find_segment
from entidb.server.sending import PIECE_BYTES
from entidb.server.server import SyncServer
from entidb.server.stores import Store
from entidb.server.wire import ServerResponse

#: Segments of which it is remembered that they are there.
_KNOWN_MAX: Final = 64


class _Known(Struct, frozen=True):
    """A segment that was found at ``mark`` of its database: nothing was committed since, so it is
    there, and of that collection."""

    mark: int
    collection: str
    info: SegmentInfo


class SegmentAnswers:
    """``use`` opens a database without waiting on the event loop.

    A segment is asked for in parts. With the first of them it is looked for on a thread; that the
    image counts stays true until the next commit, and its file was opened a moment ago, so the
    others are answered at once."""

    def __init__(self, server: SyncServer, use: Callable[[str], Awaitable[Store]]) -> None:
        self._server = server
        self._use = use
        self._known: dict[tuple[str, bytes], _Known] = {}

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
            found = self._at_once(store, request)
            if found is None:
                found = await asyncio.to_thread(self._find, store, request)
            redirect_to = server.config.segments_redirect_to
            return answer_with(found, store, request, grants, exchange.headers, redirect_to)
        except (StorageError, DatabaseClosedError) as error:
            store.report(error)
            raise
        finally:
            server.stores.release(store)

    def _at_once(self, store: Store, request: SegmentRequest) -> OpenFile | None:
        known = self._known.get((request.db_id, request.sha256))
        if known is None or request.history is not None or known.mark != store.database.commit_mark:
            return None
        try:
            file = self._server.images.files(store.db_id).open(request.sha256)
        except OSError:
            return None  # the thread finds the same, and says so
        if file is not None and file.size != known.info.bytes:
            file.close()
            return None
        return None if file is None else (known.collection, known.info, file)

    def _find(self, store: Store, request: SegmentRequest) -> OpenFile:
        """On a thread."""
        # Before it is looked for: what is committed meanwhile may end its image.
        mark = store.database.commit_mark
        found = find_segment(self._server.images, store, request)
        # Where there is no file of its own, even asking for the mark may wait.
        if getattr(store.database.storage, "reads_mapped_files", False):
            known = self._known
            if len(known) >= _KNOWN_MAX:
                known.clear()
            known[request.db_id, request.sha256] = _Known(mark, *found[:2])
        return found


__all__ = ["SegmentAnswers"]
