"""The server as an ASGI app: to be run by ``serve`` or any ASGI server, or mounted in another app.

    event loop     reads bodies, checks tokens, decodes, answers idle pulls, sends
    reader thread  pulls and handshakes: one thread, because readers of the store must not pile up;
                   each database has at most two pages in front of it, so they take turns
    unpackers      unpack and decode large bodies, which takes long
    writer thread  one for each database: decides and commits groups of pushes (``group_commit``)
    opener thread  opens databases; the housekeeper closes and purges

Every request holds bytes of one budget while its body and answer are in memory, so that however
many clients send slowly or stop reading, memory is bounded; and nobody gets all of it: what one
subject sends and what one database answers leaves room for others. What a request means is decided
in ``server`` and ``service``; this module moves bytes, and knows ASGI.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from msgspec import json, to_builtins

from entidb.errors import (
    DatabaseClosedError,
    PermissionDeniedError,
    ProtocolError,
    ServerBusyError,
    StorageError,
    SyncError,
    SyncTimeoutError,
)
from entidb.protocol import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    HandshakeRequest,
    PullRequest,
    PushRequest,
    PushResponse,
    SyncRequest,
    encode,
    operations_count,
)
from entidb.server import wire
from entidb.server.config import ServerConfig
from entidb.server.hooks import Grant
from entidb.server.origins import check_single
from entidb.server.server import SyncServer
from entidb.server.stores import Store
from entidb.server.wire import HttpResponse
from entidb.version import VERSION

if TYPE_CHECKING:
    from entidb.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("entidb.server")
access_logger = logging.getLogger("entidb.access")

#: Sent at a time: as much as a transport buffers by itself before it asks to wait.
_CHUNK_BYTES: Final = 64 * 1024
#: Larger bodies are unpacked off the event loop.
_INLINE_UNPACK_BYTES: Final = 64 * 1024
#: Larger ones, unpacked, are decoded off it: what is no message of ours can take long in there.
_INLINE_DECODE_BYTES: Final = 128 * 1024
_UNPACKERS: Final = 2
#: Seconds that a refused request gets to finish sending what nobody will read: a client that is
#: cut off while it sends sees a broken connection and not the reason.
_DRAIN_S: Final = 5.0
#: What an operation of a decoded push takes in memory beside its payload (measured: 500 to 600).
_OPERATION_MEMORY_BYTES: Final = 512
#: Seconds a pull waits for room in the budget before it is told to come again.
_ROOM_WAIT_S: Final = 5.0
#: Seconds it waits for the pages in front of it before that.
_LINE_WAIT_S: Final = 15.0
_RETRY_S: Final = 1.0
#: What a page takes beside its entity values, generously, when room for it is set aside.
_PAGE_FRAMING_BYTES: Final = 256 * 1024
#: Pages of one database being read or waiting in front of the reader; the rest wait and hold no
#: room. With one more the reader would not idle between two of them, and with many a database
#: would be served before all others.
_PAGES_AHEAD: Final = 2
#: How many times what is free one subject or one database may hold: three quarters of everything
#: if it is alone, and the more of them hold much, the less each, so that some is always free.
_SHARE: Final = 3
_HOUSEKEEP_S: Final = 30.0
#: Characters of one value in a line of the access log.
_LOGGED_MAX: Final = 500
_PLAIN: Final = frozenset(("/healthz", "/v1/info", "/metrics"))


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
        self._budget = _Budget(server.config.in_flight_bytes_max)
        self._running: _Running | None = None
        self._stopping = False
        self._metrics = _make_metrics(self) if server.config.metrics else None

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
        self._stopping = True
        running, self._running = self._running, None
        if self._owned:
            # In a thread, so that answers to the last pushes go out meanwhile.
            await asyncio.to_thread(self.server.close)
        if running is not None:
            await asyncio.to_thread(running.close)

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

    def _start(self) -> _Running:
        loop = asyncio.get_running_loop()
        running = self._running
        if running is None or running.loop is not loop:
            running = self._running = _Running(loop, self.server)
        return running

    # ------------------------------------------------------------ one request

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(scope, receive, self.server)
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
                await self._send(exchange, response, send)
            except _GoneError as gone:
                # Nobody is there to be answered; what was committed stays.
                exchange.gone = str(gone)
        self._note(exchange)

    async def _respond_or_explain(self, exchange: _Exchange, held: _Held) -> HttpResponse:
        try:
            return await self._respond(exchange, held)
        except _GoneError:
            raise
        except Exception as error:
            answer = self.server.explain(error, exchange.id)
            exchange.code = answer.code
            held.clear()
            await exchange.drain(self._config.body_bytes_max)
            response = wire.error_response(answer)
            if response.status == 405 and exchange.path in _PLAIN:
                response.headers["allow"] = "GET, HEAD"
            return response

    async def _respond(self, exchange: _Exchange, held: _Held) -> HttpResponse:
        check_single(exchange.raw_headers)
        origins = self.server.origins
        origins.check(exchange.headers)
        if self._config.cors_origins and origins.is_preflight(exchange.method, exchange.headers):
            exchange.preflight = True
            return HttpResponse(204)
        if exchange.path in _PLAIN and (exchange.path != "/metrics" or self._metrics is not None):
            return self._plain(exchange)
        wire.check_route(exchange.method, exchange.path)
        if self._stopping:
            raise ServerBusyError(
                "the server is shutting down", code="shutting_down", retry_after=_RETRY_S
            )
        grants = self.server.authenticate(wire.bearer_token(exchange.headers))
        exchange.subject = grants.subject
        held.charge(("subject", grants.subject))
        request = await self._read_request(exchange, held)
        exchange.db_id = request.db_id
        grant = self.server.permit(request, grants)
        if isinstance(request, PushRequest):
            store = await self._use_for(request, grant)
            return await self._push(exchange, store, request, grant)
        return await self._read(exchange, request, grant, held)

    @asynccontextmanager
    async def _using(self, request: SyncRequest, grant: Grant) -> AsyncIterator[Store]:
        """``Stores.using``, without waiting on the event loop."""
        store = await self._use_for(request, grant)
        try:
            yield store
        except (StorageError, DatabaseClosedError) as error:
            store.report(error)
            raise
        finally:
            self.server.stores.release(store)

    async def _use_for(self, request: SyncRequest, grant: Grant) -> Store:
        try:
            return await self._use(request.db_id, create=self.server.makes(request, grant))
        except PermissionDeniedError as error:
            raise self.server.missing(request, grant, error) from error

    async def _use(self, db_id: str, *, create: bool) -> Store:
        stores = self.server.stores
        store = stores.try_use(db_id)
        if store is not None:
            return store
        opening = self._start().opener.submit(stores.use, db_id, create=create)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._give_back)
            raise

    def _give_back(self, opening: Future[Store]) -> None:
        """Nobody waits for this one any more, but it was opened, and counts as used."""
        if not opening.cancelled() and opening.exception() is None:
            self.server.stores.release(opening.result())

    # ------------------------------------------------------------ reading a request

    async def _read_request(self, exchange: _Exchange, held: _Held) -> SyncRequest:
        headers, limit = exchange.headers, self._config.body_bytes_max
        wire.check_content_type(headers)
        encoding = self.server.request_encoding(headers)
        wire.content_length(headers, limit)
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                body = await exchange.read(limit, held)
        except TimeoutError as error:
            raise SyncTimeoutError(
                f"the body did not arrive within {self._config.body_timeout_s:g} s"
            ) from error
        if encoding is not None:
            body = await self._unpack(encoding, body, limit, held)
        if len(body) <= _INLINE_DECODE_BYTES:
            request = self.server.decode(exchange.path, body)
        else:
            unpackers = self._start().unpackers
            request = await self._run(unpackers, self.server.decode, exchange.path, body)
        if isinstance(request, PushRequest):
            # It waits for its turn decoded, and small operations are much larger that way.
            size = _OPERATION_MEMORY_BYTES * operations_count(request)
            held.take(min(size, self._room_max()))
        return request

    async def _unpack(self, encoding: str, body: bytes, limit: int, held: _Held) -> bytes:
        # How large it will be only shows afterwards, but few at a time are unpacked.
        if len(body) <= _INLINE_UNPACK_BYTES:
            unpacked = wire.decompress(encoding, body, limit)
        else:
            unpacked = await self._run(
                self._start().unpackers, wire.decompress, encoding, body, limit
            )
        held.take(len(unpacked))
        return unpacked

    # ------------------------------------------------------------ handshake and pull

    async def _read(
        self,
        exchange: _Exchange,
        request: HandshakeRequest | PullRequest,
        grant: Grant,
        held: _Held,
    ) -> HttpResponse:
        running = self._start()
        async with self._using(request, grant) as store:
            if isinstance(request, HandshakeRequest):
                answer = await self._run(
                    running.reader, self.server.handshake, store.service, request, grant
                )
                return wire.message_response(encode(answer))
            idle = store.service.idle_pull(request, grant)
            if idle is not None:
                return wire.message_response(encode(idle))
            request = self.server.bounded(request)
            room = min(request.bytes_max + _PAGE_FRAMING_BYTES, self._room_max())
            held.charge(("database", request.db_id))
            response: HttpResponse
            if store.service.is_recent(request) and held.try_reserve(room):
                # What somebody has just pushed, for everybody else: at once, and without waiting
                # in front of the reader, behind somebody's first sync.
                response = self._page(store, request, grant, exchange.headers)
                held.resize(len(response.body))
                return response
        # Who waits is no user of the database: it could not be opened again after an error.
        async with running.line(request.db_id):
            await held.reserve(room)
            async with self._using(request, grant) as store:
                response = await self._run(
                    running.reader, self._page, store, request, grant, exchange.headers
                )
                held.resize(len(response.body))
        return response

    def _page(
        self, store: Store, request: PullRequest, grant: Grant, headers: Mapping[str, str]
    ) -> HttpResponse:
        body = store.service.pull_bytes(request, grant)
        return wire.message_response(body, self.server.response_encoding(headers, len(body)))

    def _room_max(self) -> int:
        # The largest page or push must fit beside what else is going on, or it never would.
        return self._config.in_flight_bytes_max // 4

    async def _run(self, where: Executor, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(where, call, *arguments)

    # ------------------------------------------------------------ push

    async def _push(
        self, exchange: _Exchange, store: Store, request: PushRequest, grant: Grant
    ) -> HttpResponse:
        running = self._start()
        future: asyncio.Future[PushResponse | SyncError] = running.loop.create_future()

        def done(answer: PushResponse | SyncError) -> None:
            # On the writer's thread. The store is given back here and not where the answer is
            # awaited: that may have been cancelled, and the push goes on all the same.
            self.server.stores.release(store)
            running.ready.append((future, answer))

        try:
            store.committer.submit(request, grant, done)
        except BaseException:
            self.server.stores.release(store)
            raise
        answer = await future
        if isinstance(answer, SyncError):
            raise answer
        if self._metrics is not None:
            self._metrics.pushed(answer)
        body = encode(answer)
        return wire.message_response(
            body, self.server.response_encoding(exchange.headers, len(body))
        )

    # ------------------------------------------------------------ plain addresses

    def _plain(self, exchange: _Exchange) -> HttpResponse:
        if exchange.method not in ("GET", "HEAD"):
            raise ProtocolError("read this with GET", code="method_not_allowed")
        if exchange.path == "/metrics":
            assert self._metrics is not None
            return self._metrics.response()
        if exchange.path == "/healthz":
            status = "stopping" if self._stopping else "ok"
            return _json({"status": status}, 503 if self._stopping else 200)
        return _json(self.info())

    def info(self) -> dict[str, Any]:
        """What ``GET /v1/info`` says: nothing secret, and nothing about databases."""
        return {
            "name": "entidb",
            "version": VERSION,
            "protocol": {"major": PROTOCOL_MAJOR, "minor": PROTOCOL_MINOR},
            "limits": to_builtins(self.server.limits),
            "encodings": list(self.server.encodings),
        }

    # ------------------------------------------------------------ answering

    async def _send(self, exchange: _Exchange, response: HttpResponse, send: Send) -> None:
        body = response.body
        headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in response.headers.items()
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        headers.append((b"x-request-id", exchange.id.encode()))
        if not exchange.body_read:
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        # In pieces, each waited for: a whole page at once would lie in the transport of a
        # client that has stopped reading, out of anybody's sight.
        for at in range(0, len(body) or 1, _CHUNK_BYTES):
            piece = body if len(body) <= _CHUNK_BYTES else body[at : at + _CHUNK_BYTES]
            more = at + _CHUNK_BYTES < len(body)
            message = {"type": "http.response.body", "body": piece, "more_body": more}
            await self._send_some(send, (start, message) if at == 0 else (message,))

    async def _send_some(self, send: Send, messages: tuple[Message, ...]) -> None:
        try:
            async with asyncio.timeout(self._config.write_timeout_s):
                for message in messages:
                    await send(message)
        except TimeoutError as error:
            raise _GoneError("stopped reading its answer") from error
        except OSError as error:
            raise _GoneError("closed the connection") from error

    # ------------------------------------------------------------ records

    def _note(self, exchange: _Exchange) -> None:
        seconds = exchange.seconds()
        if self._metrics is not None:
            self._metrics.answered(exchange.path, exchange.status, seconds)
        if self._config.access_log and access_logger.isEnabledFor(logging.INFO):
            access_logger.info("%s", exchange.log_line(seconds))


def _json(value: object, status: int = 200) -> HttpResponse:
    return HttpResponse(status, {"content-type": wire.JSON_TYPE}, json.encode(value))


def _make_metrics(app: SyncApp) -> Metrics:
    from entidb.server.metrics import Metrics

    return Metrics(
        in_flight_bytes=lambda: app.in_flight_bytes,
        open_databases=lambda: app.server.stores.open_count,
    )


class _GoneError(Exception):
    """The client of this request is not there any more, or as good as."""


# ---------------------------------------------------------------- one request and its answer


class _Exchange:
    """What is known of one request, and its body as long as it is coming in."""

    def __init__(self, scope: Scope, receive: Receive, server: SyncServer) -> None:
        self.method: str = scope["method"]
        self.path = _path_in_app(scope)
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.preflight = False
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        self.id = wire.request_id(self.headers) or server.new_request_id()
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.body_read = not self._announces_body()
        self.bytes_in = 0
        self.bytes_out = 0
        self.status = 0
        self.subject: str | None = None
        self.db_id: str | None = None
        self.code: str | None = None
        self.gone: str | None = None
        self._receive = receive
        self._clock = server.clock
        self._began = server.clock.monotonic()

    def _announces_body(self) -> bool:
        length = self.headers.get("content-length", "0")
        return length != "0" or "transfer-encoding" in self.headers

    async def read(self, limit: int, held: _Held) -> bytes:
        """The whole body. Raises ``ProtocolError`` (too_large), ``ServerBusyError``."""
        buffer: bytes | bytearray = b""
        while True:
            piece, more = await self._next()
            if self.bytes_in > limit:
                raise wire.too_large(limit)
            held.take(len(piece))
            if not buffer:
                buffer = piece
            else:
                # One buffer: a list of pieces would cost more than the bytes in them.
                if isinstance(buffer, bytes):
                    buffer = bytearray(buffer)
                buffer += piece
            if not more:
                return bytes(buffer)

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
            raise _GoneError("closed the connection while sending")
        piece: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        self.bytes_in += len(piece)
        self.body_read = not more
        return piece, more

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


def _path_in_app(scope: Scope) -> str:
    """The path below the place this app is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path


# ---------------------------------------------------------------- threads


class _Running:
    """Threads, and what is bound to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: SyncServer) -> None:
        self.loop = loop
        self.reader = ThreadPoolExecutor(1, "entidb-reader")
        self.opener = ThreadPoolExecutor(1, "entidb-opener")
        self.unpackers = ThreadPoolExecutor(_UNPACKERS, "entidb-unpacker")
        #: Who reads and who waits to read, by database; there as long as somebody does.
        self._lines: dict[str, _Line] = {}
        #: Answers of the writers' threads on their way to the loop.
        self.ready: deque[
            tuple[asyncio.Future[PushResponse | SyncError], PushResponse | SyncError]
        ] = deque()
        self._server = server
        self._stop = threading.Event()
        server.stores.on_group = self._wake
        self._housekeeper = threading.Thread(
            target=self._housekeep, name="entidb-housekeeper", daemon=True
        )
        self._housekeeper.start()

    @asynccontextmanager
    async def line(self, db_id: str) -> AsyncIterator[None]:
        """A turn among those who read pages of ``db_id``. Raises ``ServerBusyError``."""
        line = self._lines.get(db_id)
        if line is None:
            line = self._lines[db_id] = _Line(asyncio.Semaphore(_PAGES_AHEAD))
        line.members += 1
        try:
            try:
                async with asyncio.timeout(_LINE_WAIT_S):
                    await line.turns.acquire()
            except TimeoutError as error:
                # Those in front may be clients that have stopped reading: whoever waits behind
                # them is told, instead of finding out by a timeout of its own.
                raise _no_room() from error
            try:
                yield
            finally:
                line.turns.release()
        finally:
            line.members -= 1
            if not line.members:
                del self._lines[db_id]

    def _wake(self) -> None:
        """One wakeup of the loop for all answers of a group."""
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop is closed: nobody waits for these answers any more, and the devices ask
            # again (R5).
            self.ready.clear()

    def _deliver(self) -> None:
        while self.ready:
            future, answer = self.ready.popleft()
            if not future.done():
                future.set_result(answer)

    def _housekeep(self) -> None:
        config = self._server.config
        pause = min(_HOUSEKEEP_S, config.purge_interval_s, (config.idle_close_s or 60.0) / 2)
        while not self._server.clock.wait(self._stop, max(pause, 0.1)):
            try:
                self._server.housekeep()
            except Exception:
                # The next round may work, and without housekeeping nothing is ever closed.
                logger.exception("housekeeping failed")

    def close(self) -> None:
        self._stop.set()
        self._housekeeper.join()
        self.reader.shutdown()
        self.opener.shutdown()
        self.unpackers.shutdown()


@dataclass
class _Line:
    turns: asyncio.Semaphore
    members: int = 0


# ---------------------------------------------------------------- memory

#: To whom bytes are charged: a subject or a database, by name.
_Account = tuple[str, str]


class _Budget:
    """Bytes in memory for all requests together, shared between those they are charged to. Used
    from the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._used_by: dict[_Account, int] = {}
        self._waiting: deque[tuple[int, _Account | None, asyncio.Future[None]]] = deque()

    def hold(self) -> _Held:
        return _Held(self)

    def take(self, size: int, account: _Account | None = None) -> bool:
        if self.used + size > self.limit or not self._is_fair(size, account):
            return False
        self.charge(size, account)
        return True

    def charge(self, size: int, account: _Account | None) -> None:
        """As ``take``, whether or not there is room: it is in memory already."""
        self.used += size
        if account is not None and size:
            self._used_by[account] = self._used_by.get(account, 0) + size

    def _is_fair(self, size: int, account: _Account | None) -> bool:
        # Whoever holds nothing yet gets what it wants, if it is there.
        held = 0 if account is None else self._used_by.get(account, 0)
        return not held or held + size <= _SHARE * (self.limit - self.used)

    def give(self, size: int, account: _Account | None = None) -> None:
        self.used -= size
        if account is not None and size:
            left = self._used_by[account] - size
            if left:
                self._used_by[account] = left
            else:
                del self._used_by[account]
        if self._waiting:
            self._serve()

    def _serve(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        while waiting:
            entry = waiting.popleft()
            size, account, future = entry
            if future.done():
                continue
            if self.take(size, account):
                future.set_result(None)
                continue
            self._waiting.append(entry)
            if self._is_fair(size, account):
                # In order, so that a large page is not overtaken for ever by small ones. Only who
                # holds more than its share lets others pass.
                break
        self._waiting.extend(waiting)

    async def wait(self, size: int, account: _Account | None = None) -> None:
        """Take ``size``, as soon as there is room. Raises ``TimeoutError``."""
        if not self._waiting and self.take(size, account):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, account, future))
        self._serve()
        try:
            async with asyncio.timeout(_ROOM_WAIT_S):
                await future
        except BaseException:
            if future.done() and not future.cancelled():
                self.give(size, account)
            else:
                # What stood behind it may fit.
                future.cancel()
                self._serve()
            raise


class _Held:
    """What one request holds of the budget, given back at the end of the block."""

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget
        self._size = 0
        self._account: _Account | None = None

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clear()

    def charge(self, account: _Account) -> None:
        """To whom it counts from now on, with what is held already."""
        size = self._size
        self.clear()
        self._account = account
        self._budget.charge(size, account)
        self._size = size

    def take(self, size: int) -> None:
        """Raises ``ServerBusyError``: who is sending would not be read while it waits."""
        if not self._budget.take(size, self._account):
            raise _no_room()
        self._size += size

    def try_reserve(self, size: int) -> bool:
        """As ``reserve``, if there is room at once."""
        self.clear()
        if not self._budget.take(size, self._account):
            return False
        self._size = size
        return True

    async def reserve(self, size: int) -> None:
        """Room for an answer; what its request held is done with. Raises ``ServerBusyError``."""
        self.clear()
        try:
            await self._budget.wait(size, self._account)
        except TimeoutError as error:
            raise _no_room() from error
        self._size = size

    def resize(self, size: int) -> None:
        """What was reserved turned out to be ``size``. A page over it, one large transaction, is
        in memory by now, so that is not asked any more."""
        change = self._size - size
        self._size = size
        if change >= 0:
            self._budget.give(change, self._account)
        else:
            self._budget.charge(-change, self._account)

    def clear(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._budget.give(size, self._account)


def _no_room() -> ServerBusyError:
    return ServerBusyError("too much is under way on this server", retry_after=_RETRY_S)
