"""Requests that store nothing, from the ASGI app to the threads that read, and their answers.

Where a look at a database waits for a network, small pulls that wait for their turn are read
together: whoever has the turn takes them along, and one look at the state of the database serves
them all. It begins after each of them has come in, so that none is answered from an older state.

Not here: what is in an answer (``front``, ``service``), and pushes (``app``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, Protocol

from entidb.collector import paused
from entidb.errors import DatabaseClosedError, StorageError
from entidb.protocol import DigestRequest, HandshakeRequest, PullRequest, SnapshotRequest
from entidb.server import wire
from entidb.server.exchange import HttpExchange
from entidb.server.front import Reading
from entidb.server.hooks import Grant
from entidb.server.pages import PAGE_BYTES_MAX, View, known_up_to
from entidb.server.room import Held
from entidb.server.server import SyncServer
from entidb.server.stores import Holding, Store
from entidb.server.threads import AppThreads
from entidb.server.warmth import is_small, waits
from entidb.server.wire import ServerResponse

#: What a page takes beside its entity values, generously, when room for it is set aside.
_PAGE_FRAMING_BYTES: Final = 256 * 1024
#: Pulls that are read together at most: others want their turn too.
_TOGETHER_MAX: Final = 16


class Use(Protocol):
    def __call__(self, request: Reading, grant: Grant) -> Awaitable[Store]: ...


class _Wanted:
    """A page that somebody waits for."""

    def __init__(
        self,
        request: PullRequest,
        grant: Grant,
        headers: Mapping[str, str],
        wrapped: Callable[[bytes], bytes],
        held: Held,
        room: int,
    ) -> None:
        self.request = request
        self.grant = grant
        self.headers = headers
        self.wrapped = wrapped
        self.held = held
        self.room = room
        #: The answer, or why there is none, where another one has brought it along.
        self.came: ServerResponse | BaseException | None = None


class ReadAnswers:
    """Of one app; used from its event loop."""

    def __init__(self, server: SyncServer, start: Callable[[], AppThreads], use: Use) -> None:
        self._server = server
        self._start = start
        self._use = use

    async def answer(
        self,
        exchange: HttpExchange,
        request: Reading,
        grant: Grant,
        held: Held,
        wrapped: Callable[[bytes], bytes] = bytes,
    ) -> ServerResponse:
        """The answer; of a page, what ``wrapped`` makes of it."""
        running, front = self._start(), self._server.front
        using = partial(Holding, self._server.stores)
        if isinstance(request, DigestRequest | SnapshotRequest):
            held.charge(("database", request.db_id))
            async with running.line(request.db_id):
                await held.reserve(min(PAGE_BYTES_MAX, self._room_max()))
                with using(await self._use(request, grant)) as store:
                    body = await _run(running.reader, front.read, store, request, grant)
            return wire.message_response(
                body, self._server.response_encoding(exchange.headers, len(body))
            )
        with using(front.try_use(request) or await self._use(request, grant)) as store:
            if isinstance(request, HandshakeRequest):
                where = running.asker or running.reader
                answer = await _run(where, front.read, store, request, grant)
                return wire.message_response(answer)
            idle = None
            if store.service.may_be_idle(request):
                idle = await running.ask(front.idle, store, request, grant)
            if idle is not None:
                self._server.registry.pulled(request, known_up_to(request))
                return wire.message_response(wrapped(idle))
            request = front.bounded(request)
            room = min(request.bytes_max + _PAGE_FRAMING_BYTES, self._room_max())
            held.charge(("database", request.db_id))
            wanted = _Wanted(request, grant, exchange.headers, wrapped, held, room)
            if running.is_near(store, request) and held.try_reserve(room):
                # As what one device has just pushed, for all others: at once, and without waiting
                # in front of the reader, behind another device's first sync.
                response = self._page(store, wanted)
                held.resize(len(response.body))
                return response
        # Who waits is no user of the database: it could not be opened again after an error.
        return await self._in_line(wanted)

    async def _in_line(self, wanted: _Wanted) -> ServerResponse:
        running, request, held = self._start(), wanted.request, wanted.held
        together = running.asker is not None and is_small(request)
        brought = wanted if together else None
        while True:
            async with running.line(
                request.db_id, small=is_small(request), brought=brought
            ) as has_turn:
                if wanted.came is not None:
                    if isinstance(wanted.came, BaseException):
                        raise wanted.came
                    return wanted.came
                await held.reserve(wanted.room)
                with Holding(self._server.stores, await self._use(request, wanted.grant)) as store:
                    if running.is_near(store, request):
                        running.hurry(request.db_id)
                        response = self._page(store, wanted)
                    elif not has_turn:
                        continue
                    elif together:
                        response = await self._together(running, store, wanted)
                    else:
                        response = await _run(running.reader, self._page, store, wanted)
                    held.resize(len(response.body))
                    return response

    async def _together(self, running: AppThreads, store: Store, first: _Wanted) -> ServerResponse:
        """The page of ``first``, which has the turn, and those of some that wait behind it."""
        taken = running.take_along(
            first.request.db_id,
            _TOGETHER_MAX - 1,
            lambda other: isinstance(other, _Wanted) and other.held.try_reserve(other.room),
        )
        if not taken:
            response: ServerResponse = await _run(running.reader, self._page, store, first)
            return response
        others: list[_Wanted] = [other for _, other in taken]
        job = asyncio.get_running_loop().run_in_executor(
            running.reader, self._pages, store, [first, *others]
        )

        def deliver(job: asyncio.Future[list[ServerResponse | BaseException]]) -> None:
            answers = [] if job.cancelled() else job.result()
            for place, (turn, other) in enumerate(taken, 1):
                if turn.done():
                    continue  # its client has gone
                if answers:
                    answer = other.came = answers[place]
                    if isinstance(answer, ServerResponse):
                        other.held.resize(len(answer.body))
                else:
                    other.came = asyncio.CancelledError()
                turn.set_result(False)

        job.add_done_callback(deliver)
        # The others want theirs, also where the client of the first one goes.
        answer = (await asyncio.shield(job))[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _pages(self, store: Store, several: list[_Wanted]) -> list[ServerResponse | BaseException]:
        """On a reader's thread; raises nothing."""
        answers: list[ServerResponse | BaseException] = []
        try:
            with paused(), store.database.view() as view:
                for wanted in several:
                    try:
                        answers.append(self._page(store, wanted, view))
                    except Exception as error:
                        if isinstance(error, StorageError | DatabaseClosedError):
                            store.report(error)
                        answers.append(error)
        except Exception as error:
            answers += [error] * (len(several) - len(answers))
        return answers

    def _page(self, store: Store, wanted: _Wanted, view: View | None = None) -> ServerResponse:
        waited = waits() if is_small(wanted.request) else None
        page = self._server.front.page(store, wanted.request, wanted.grant, view)
        body = wanted.wrapped(page)
        if waited is not None:
            store.warmth.read(waited, len(body))
        return wire.message_response(
            body, self._server.response_encoding(wanted.headers, len(body))
        )

    def _room_max(self) -> int:
        # The largest page must fit beside what else is going on, or it never would.
        return self._server.config.in_flight_bytes_max // 4


async def _run(where: Executor, call: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(where, call, *arguments)
