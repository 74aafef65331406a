"""From a request for news to a waiter: who may wait, and where the database ends when it begins to.

The order matters: first a waiter, then the look at the database, so that whatever is committed
after the look reaches it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from entidb.errors import DatabaseClosedError, PermissionDeniedError, StorageError
from entidb.server.auth import Grants
from entidb.server.front import Front
from entidb.server.live import LiveChannels
from entidb.server.live_http import (
    EVENTS_TYPE,
    Headers,
    LiveRequest,
    Newest,
    PageSource,
    Poll,
    Receive,
    Send,
    Stream,
)
from entidb.server.stores import Store, Stores
from entidb.server.wire import ServerResponse
from entidb.types import Clock


@dataclass(frozen=True, kw_only=True)
class Streamed(ServerResponse):
    """The answer that is a stream; ``body`` stays empty."""

    stream: Stream
    newest: Newest

    async def run(self, live: LiveChannels, send: Send, receive: Receive, headers: Headers) -> None:
        """To its end. Raises what ``send`` and ``receive`` raise."""
        try:
            await self.stream.run(live, self.newest, send, receive, headers)
        finally:
            live.remove(self.stream)


def _headers() -> dict[str, str]:
    return {
        "content-type": EVENTS_TYPE,
        "cache-control": "no-store",
        # A proxy that gathers answers would keep every hint for itself.
        "x-accel-buffering": "no",
    }


class LiveServer(Protocol):
    """What is needed of a server."""

    @property
    def front(self) -> Front: ...

    @property
    def stores(self) -> Stores: ...

    @property
    def clock(self) -> Clock: ...


class LiveAnswers:
    """Answers ``GET /v1/live``; ``use`` opens a database without waiting on the event loop, and
    ``ask`` calls a function that reads in one; ``carrier`` has pages in the place of hints."""

    def __init__(
        self,
        server: LiveServer,
        use: Callable[[str], Awaitable[Store]],
        ask: Callable[[Callable[[Store], Newest], Store], Awaitable[Newest]],
        carrier: PageSource | None = None,
    ) -> None:
        self._server = server
        self._use = use
        self._ask = ask
        self._carrier = carrier
        self._decided = server.front.control.decided
        self._streams = 0

    async def answer(
        self, live: LiveChannels, request: LiveRequest, grants: Grants
    ) -> ServerResponse:
        """The answer, or a ``Streamed`` one to be run. Raises ``PermissionDeniedError``,
        ``ServerBusyError``."""
        if not grants.on(request.db_id).read:
            raise PermissionDeniedError("the token does not allow reading this database")
        self._server.front.control.admit(grants, request)
        live.on_tick = partial(self._look, live)
        if not request.stream:
            poll = Poll(request, grants)
            live.add(poll)
            try:
                return await poll.answer(await self._newest(request.db_id))
            finally:
                live.remove(poll)
        self._streams += 1
        clock = self._server.clock
        stream = Stream(request, grants, clock, self._streams, self._carrier)
        live.add(stream)
        try:
            newest = await self._newest(request.db_id)
            return Streamed(200, _headers(), stream=stream, newest=newest)
        except BaseException:
            live.remove(stream)
            raise

    def _look(self, live: LiveChannels) -> None:
        """Send away who was revoked since the last look (R32), also by another process."""
        control = self._server.front.control
        decided = control.decided
        if decided is not self._decided:
            self._decided = decided
            live.end_where(
                lambda each: control.is_revoked(each.grants, each.db_id, each.device_id), "revoked"
            )

    async def _newest(self, db_id: str) -> Newest:
        store = await self._use(db_id)
        try:
            self._server.stores.listen(store)
            return await self._ask(_newest_in, store)
        except (StorageError, DatabaseClosedError) as error:
            store.report(error)
            raise
        finally:
            # Who waits is no user of the database (R17).
            self._server.stores.release(store)


def _newest_in(store: Store) -> Newest:
    return Newest(store.database.history, store.database.read_head().sequence)
