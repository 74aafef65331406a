"""The server as an ASGI app: to be run by ``serve`` or any ASGI server, or mounted in another app.

    event loop     reads bodies, checks tokens, decodes, answers idle pulls, and those for few
                   operations that are in memory; sends; databases take turns (``passes``)
    reader thread  pulls and handshakes: one thread, because readers of the store must not pile up;
                   each database has at most two pages in front of it, so they take turns
    unpackers      unpack and decode large bodies, which takes long
    writer thread  one for each database: decides and commits groups of pushes (``group_commit``)
    opener thread  opens databases; the housekeeper closes and purges

Every request holds bytes of one budget while its body and answer are in memory, so that however
many clients send slowly or stop reading, memory is bounded; and no client gets all of it: what one
subject sends and what one database answers leaves room for others. What a request means is decided
in ``server`` and ``service``; this module moves bytes, and knows ASGI.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from entidb.errors import (
    ProtocolError,
    ServerBusyError,
    SyncError,
    SyncTimeoutError,
)
from entidb.protocol import (
    PullRequest,
    PushRequest,
    PushResponse,
    RoundRequest,
    SyncRequest,
    encode,
    encode_round,
    operations_count,
)
from entidb.server import wire
from entidb.server.admin.asking import PREFIX
from entidb.server.admin.opening import office_of
from entidb.server.carrying import CARRIED_BYTES_MAX, PageCarrier
from entidb.server.carrying import FEATURE as PAGES
from entidb.server.config import ServerConfig
from entidb.server.deadlines import within
from entidb.server.exchange import GoneError, HttpExchange, Receive, Scope, Send
from entidb.server.fresh import Freshness
from entidb.server.hooks import Grant
from entidb.server.live_answers import LiveAnswers, Streamed
from entidb.server.live_http import LIVE_PATH, LiveRequest
from entidb.server.measured import metrics_of, pulse_of
from entidb.server.origins import check_single
from entidb.server.pages import unseen
from entidb.server.plain import ADDRESSES, Plain
from entidb.server.read_answers import ReadAnswers
from entidb.server.room import RETRY_S, Budget, Held
from entidb.server.segments.answers import SegmentAnswers
from entidb.server.segments.serving import SEGMENTS_PATH
from entidb.server.sending import raw_headers, send_answer
from entidb.server.server import SyncServer
from entidb.server.service import BehindError
from entidb.server.stores import Store
from entidb.server.threads import AppThreads
from entidb.server.wire import ServerResponse
from entidb.server.workers.team import Team, company_of

if TYPE_CHECKING:
    from entidb.server.admin.http import AdminHttp

access_logger = logging.getLogger("entidb.access")
#: Larger bodies are unpacked off the event loop.
_INLINE_UNPACK_BYTES: Final = 64 * 1024
#: Larger ones, unpacked, are decoded off it: what is no message of ours can take long in there.
_INLINE_DECODE_BYTES: Final = 128 * 1024
#: What an operation of a decoded push takes in memory beside its payload (measured: 500 to 600).
_OPERATION_MEMORY_BYTES: Final = 512
#: Codes of who is refused for his token.
_KNOCKS: Final = ("unauthorized", "revoked", "too_many_devices")


def create_app(config: ServerConfig | SyncServer) -> SyncApp:
    """The ASGI app of a server: its own, made from a ``ServerConfig``, or one that you made.

    Run by itself it starts and stops with the ASGI lifespan. Mounted in another app, whose server
    does not tell mounted apps of the lifespan, wrap ``async with app.lifespan():`` into that app's
    own; a ``SyncServer`` of yours stays yours to close. Raises ``ConfigError``;
    ``DatabaseLockedError`` if another server has the directory.
    """
    if isinstance(config, SyncServer):
        return SyncApp(config, owned=False)
    return SyncApp(SyncServer(config), owned=True)


class SyncApp:
    """What ``create_app`` returns: an ASGI 3 application."""

    def __init__(self, server: SyncServer, *, owned: bool) -> None:
        self.server = server
        self._config = server.config
        self._owned = owned
        self._budget = Budget(server.config.in_flight_bytes_max)
        self._running: AppThreads | None = None
        self._team: Team | None = None
        self._stopping = False
        if self._config.live_max:
            server.front.announce("live")
            server.front.announce(PAGES)
        self._live = LiveAnswers(
            server,
            self._use_existing,
            lambda *given: self._start().ask(*given),
            PageCarrier(server.front, server.clock, self._carried, self._note_carried),
        )
        self._segments = SegmentAnswers(server, self._use_existing)
        self._reading = ReadAnswers(server, self._start, self._use)
        self._office = office_of(server)
        self._fresh = Freshness(server.front.control)
        self._admin: AdminHttp | None = None
        self._metrics = metrics_of(self, self._office) if server.config.metrics else None
        self._pulse = self._office.pulse = pulse_of(self) if server.config.console else None
        self._plain = Plain(server, self._office, self._metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of bodies and answers in memory now."""
        return self._budget.used

    @property
    def waiting(self) -> int:
        """How many wait for news now."""
        return 0 if self._running is None else self._running.live.count

    # ------------------------------------------------------------ life

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Start, and at the end finish what is under way and close. Fits Starlette's
        ``lifespan=``; the argument is ignored."""
        self._start()
        try:
            yield
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Refuse what is new, finish queued pushes, and close what the app opened. Idempotent."""
        self.send_away()
        running, self._running = self._running, None
        if self._owned:
            # In a thread, so that answers to the last pushes go out meanwhile.
            await asyncio.to_thread(self.server.close)
        if running is not None:
            await asyncio.to_thread(running.close)
        team, self._team = self._team, None
        if team is not None:
            await asyncio.to_thread(team.close)

    def send_away(self) -> None:
        """Refuse what is new, and tell those who wait for news to come again later: a server that
        waits for its connections to end would wait for them."""
        self._stopping = True
        if self._running is not None:
            self._running.live.close()

    def discard(self) -> None:
        """Close what the app opened, when it never ran."""
        if self._owned:
            self.server.close()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    def _start(self) -> AppThreads:
        loop = asyncio.get_running_loop()
        running = self._running
        if running is None or running.loop is not loop:
            self.server.begin()
            company = None if self._team else company_of(self.server)
            running = self._running = AppThreads(loop, self.server)
            if company is not None:
                self._team = Team(self.server, self._office, running.live, company, self._metrics)
        return running

    # ------------------------------------------------------------ one request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpExchange(scope, receive, self.server)
        with self._budget.hold() as held:
            try:
                response = await self._respond_or_explain(exchange, held)
                response.headers.update(
                    self.server.origins.answer_headers(
                        exchange.headers, preflight=exchange.preflight
                    )
                )
                exchange.status = response.status
                exchange.bytes_out = len(response.body)
                if isinstance(response, Streamed):
                    await self._stream(exchange, response, receive, send)
                else:
                    await send_answer(exchange, response, send, self._config.write_timeout_s)
            except GoneError as gone:
                # The client has gone; what was committed stays.
                exchange.gone = str(gone)
        self._note(exchange)

    async def _stream(
        self, exchange: HttpExchange, response: Streamed, receive: Receive, send: Send
    ) -> None:
        headers = raw_headers(exchange, response)
        # A stream lives for minutes, and nobody asks for its head again.
        exchange.headers = {}
        exchange.query = b""
        try:
            await response.run(self._start().live, send, receive, headers)
        except OSError as error:
            raise GoneError("closed the connection") from error
        finally:
            exchange.bytes_out = response.stream.bytes_out

    def _note_carried(self, request: PullRequest, cursor: int) -> None:
        self.server.registry.pulled(request, cursor)
        if self._metrics is not None:
            self._metrics.carried()

    async def _carried(
        self, store: Store, request: PullRequest, read: Callable[[], bytes]
    ) -> bytes:
        """A page that nobody has asked for yet, which waits for nothing on the event loop."""
        running = self._start()
        with self._budget.hold() as held:
            if not held.try_reserve(CARRIED_BYTES_MAX):
                raise ServerBusyError("the server has no room for this page now")
            if running.is_near(store, request):
                return read()
            async with running.line(request.db_id):
                page: bytes = await self._run(running.reader, read)
                return page

    async def _respond_or_explain(self, exchange: HttpExchange, held: Held) -> ServerResponse:
        try:
            return await self._respond(exchange, held)
        except GoneError:
            raise
        except Exception as error:
            answer = self.server.front.explain(error, exchange.id)
            exchange.code = wire.said_code(answer)
            held.clear()
            await exchange.drain(self._config.body_bytes_max)
            response = wire.error_response(answer)
            if response.status == 405 and exchange.path in ADDRESSES:
                response.headers["allow"] = "GET, HEAD"
            return response

    async def _respond(self, exchange: HttpExchange, held: Held) -> ServerResponse:
        if exchange.repeats:
            check_single(exchange.raw_headers)
        exchange.check_address()
        origins = self.server.origins
        origins.check(exchange.headers)
        if self._config.cors_origins and origins.is_preflight(exchange.method, exchange.headers):
            exchange.preflight = True
            return ServerResponse(204)
        if self._plain.serves(exchange.path):
            return await self._plain.answer(exchange, stopping=self._stopping)
        administers = _administers(exchange)
        segment = exchange.path.startswith(SEGMENTS_PATH)
        if exchange.path != LIVE_PATH and not administers and not segment:
            wire.check_route(exchange.method, exchange.path)
        elif exchange.path == LIVE_PATH and exchange.method != "GET":
            raise ProtocolError("read this with GET", code="method_not_allowed")
        if self._stopping:
            raise ServerBusyError(
                "the server is shutting down", code="shutting_down", retry_after=RETRY_S
            )
        if administers:
            return await self._administration().answer(exchange, held)
        front = self.server.front
        await self._fresh.wait()
        grants = front.authenticate(wire.bearer_token(exchange.headers))
        exchange.subject = grants.subject
        if exchange.path == LIVE_PATH:
            wanted = LiveRequest(exchange.query, exchange.headers)
            exchange.db_id = wanted.db_id
            return await self._live.answer(self._start().live, wanted, grants)
        held.charge(("subject", grants.subject))
        if segment:
            return await self._segments.answer(exchange, grants, held)
        request = await self._read_request(exchange, held)
        exchange.db_id = request.db_id
        exchange.request, exchange.grants = request, grants
        with await self._start().passes.turn(request.db_id):
            await self._fresh.wait()  # the body may have taken its time
            grant = front.permit(request, grants)
            if isinstance(request, PushRequest):
                store = front.try_use(request) or await self._use(request, grant)
                return await self._push(exchange, store, request, grant)
            if isinstance(request, RoundRequest):
                return await self._round(exchange, request, grant, held)
            return await self._reading.answer(exchange, request, grant, held)

    def _administration(self) -> AdminHttp:
        if self._admin is None:
            # Most servers are never asked this way, and its rooms take a megabyte.
            from entidb.server.admin.http import AdminHttp

            self._admin = AdminHttp(self._office, self._fresh.wait)
        return self._admin

    async def _use(self, request: SyncRequest, grant: Grant) -> Store:
        """``Front.use``, without waiting on the event loop."""
        front = self.server.front
        return front.try_use(request) or await self._opened(front.use, request, grant)

    async def _use_existing(self, db_id: str) -> Store:
        stores = self.server.stores
        return stores.try_use(db_id) or await self._opened(partial(stores.use, create=False), db_id)

    async def _opened(self, use: Callable[..., Store], *arguments: object) -> Store:
        running = self._start()
        opening = running.opener.submit(use, *arguments)
        try:
            return await running.bounded(asyncio.wrap_future(opening))
        except (asyncio.CancelledError, ServerBusyError):
            opening.add_done_callback(self._give_back)
            raise

    def _give_back(self, opening: Future[Store]) -> None:
        """No request waits for this one any more, but it was opened, and counts as used."""
        if not opening.cancelled() and opening.exception() is None:
            self.server.stores.release(opening.result())

    # ------------------------------------------------------------ reading a request

    async def _read_request(self, exchange: HttpExchange, held: Held) -> SyncRequest:
        headers, limit = exchange.headers, self._config.body_bytes_max
        wire.check_content_type(headers)
        encoding = self.server.request_encoding(headers)
        wire.content_length(headers, limit)
        try:
            body = await within(self._config.body_timeout_s, exchange.read(limit, held))
        except TimeoutError as error:
            raise SyncTimeoutError(
                f"the body did not arrive within {self._config.body_timeout_s:g} s"
            ) from error
        if encoding is not None:
            body = await self._unpack(encoding, body, limit, held)
        if len(body) <= _INLINE_DECODE_BYTES:
            request = self.server.front.decode(exchange.path, body)
        else:
            unpackers = self._start().unpackers
            request = await self._run(unpackers, self.server.front.decode, exchange.path, body)
        pushed = request.push if isinstance(request, RoundRequest) else request
        if isinstance(pushed, PushRequest):
            # It waits for its turn decoded, and small operations are much larger that way.
            size = _OPERATION_MEMORY_BYTES * operations_count(pushed)
            held.take(min(size, self._room_max()))
        return request

    async def _unpack(self, encoding: str, body: bytes, limit: int, held: Held) -> bytes:
        # How large it will be only shows afterwards, but few at a time are unpacked.
        if len(body) <= _INLINE_UNPACK_BYTES:
            unpacked = wire.decompress(encoding, body, limit)
        else:
            unpacked = await self._run(
                self._start().unpackers, wire.decompress, encoding, body, limit
            )
        held.take(len(unpacked))
        return unpacked

    def _room_max(self) -> int:
        # The largest push must fit beside what else is going on, or it never would.
        return self._config.in_flight_bytes_max // 4

    async def _run(self, where: Executor, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(where, call, *arguments)

    # ------------------------------------------------------------ push

    async def _round(
        self, exchange: HttpExchange, request: RoundRequest, grant: Grant, held: Held
    ) -> ServerResponse:
        """A push that is decided if the device has seen everything, and what it has not seen."""
        answer: PushResponse | None = None
        store = await self._use(request, grant)
        if store.service.is_behind(request):
            self.server.stores.release(store)
        else:
            with contextlib.suppress(BehindError):
                answer = await self._decided(exchange, store, request, grant)
        pull = unseen(request, answer)
        return await self._reading.answer(
            exchange, pull, grant, held, lambda page: encode_round(page, answer)
        )

    async def _push(
        self, exchange: HttpExchange, store: Store, request: PushRequest, grant: Grant
    ) -> ServerResponse:
        body = encode(await self._decided(exchange, store, request, grant))
        return wire.message_response(
            body, self.server.response_encoding(exchange.headers, len(body))
        )

    async def _decided(
        self,
        exchange: HttpExchange,
        store: Store,
        request: PushRequest | RoundRequest,
        grant: Grant,
    ) -> PushResponse:
        running = self._start()
        future: asyncio.Future[PushResponse | SyncError] = running.loop.create_future()

        def done(answer: PushResponse | SyncError) -> None:
            running.ready.append((request.db_id, future, answer))  # on the writer's thread

        # The front gives the store back, and not the task that awaits the answer: that may have
        # been cancelled, or waited for long enough, and the push goes on all the same.
        self.server.front.push(store, request, grant, done)
        answer = await running.bounded(future)
        if isinstance(answer, SyncError):
            raise answer
        exchange.verdicts = answer
        if self._metrics is not None:
            self._metrics.pushed(answer)
        return answer

    # ------------------------------------------------------------ records

    def note_refused(self, code: str) -> None:
        """Of what never became a request of the app: who serves it says so."""
        if self._metrics is not None:
            self._metrics.refused(code)

    def _note(self, exchange: HttpExchange) -> None:
        seconds = exchange.seconds()
        exchange.tell(self.server.registry)
        if exchange.code in _KNOCKS or (exchange.code == "forbidden" and _administers(exchange)):
            self._office.audit.refused(exchange.subject, exchange.client, exchange.code)
        if self._metrics is not None and exchange.path != LIVE_PATH:
            # How long a stream was open says nothing about how fast answers are.
            status, code = exchange.status, exchange.code
            self._metrics.answered(exchange.path, status, seconds, code, exchange.db_id)
        if self._pulse is not None:
            self._pulse.answered(exchange, seconds, streamed=exchange.path == LIVE_PATH)
        if self._config.access_log and access_logger.isEnabledFor(logging.INFO):
            access_logger.info("%s", exchange.log_line(seconds))


def _administers(exchange: HttpExchange) -> bool:
    return exchange.path.startswith(PREFIX)
