"""Connections of the server: how many there may be, which one goes when there are too many, and an
end to those that never ask and those that never read.

A device that syncs in the background keeps its connection between two cycles and does nothing with
it. So idle connections do no harm: when all are taken, the one that has been idle for longest is
closed for the new one, and its device makes another when it has something to say. Only when every
connection is being answered does a request get the answer to come again, and its connection closed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from entidb.protocol import ErrorResponse
from entidb.server import refusing, wire
from entidb.server.config import ServerConfig
from entidb.server.cycle import ConnectionFlow, Flag, RequestCycle
from entidb.server.deadlines import Deadline
from entidb.server.live_http import LIVE_PATH
from entidb.server.refusing import NO_ADDRESS, RefusedError, answer_of, refusal_of, too_long

logger = logging.getLogger("entidb.server")

#: Bytes of a request's line and headers, and of anything else that is no body. A token is at most
#: 8 KiB.
_HEAD_BYTES_MAX: Final = 64 * 1024
#: Requests that wait for the answer to one before them. No client of ours sends two at once, and
#: each takes a hundred times the room of the words that ask for it.
_WAITING_MAX: Final = 64
#: Seconds that a client gets to hear the last answer on its connection, and bytes that it may go on
#: sending meanwhile.
_PARTING_S: Final = 2.0
_DROPPED_BYTES_MAX: Final = 4 * 2**20
#: Seconds that a connection gets before its first request comes, even when all are taken.
_FIRST_WORD_S: Final = 1.0
#: Connections beyond the limit that get an answer; more are closed without one.
_TOLD_SHARE: Final = 10
_TOLD_MIN: Final = 16
#: Seconds, spread over twice as much, until one who was turned away may come again.
_RETRY_S: Final = 1.0
#: Files that a process needs for anything else: standard streams, the loop, logs, libraries.
_OTHER_FILES: Final = 64
#: Files of an open database: its directory, its data four times, the readers' table, and three
#: for locks.
_DATABASE_FILES: Final = 9

#: Multiples of it, without their whole part, are spread evenly, however many there are.
_GOLDEN: Final = 0.6180339887
_turned_away = itertools.count()
#: Of all connections on which no request waits for the one before it; never changed.
_NOTHING_WAITS: Final[deque[Any]] = deque()

Told = Callable[[str], None]
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def _nothing(code: str) -> None:
    return None


class Connections:
    """All connections of one server. Used from its event loop only."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.most = most
        self._told_most = most + max(_TOLD_MIN, most // _TOLD_SHARE)
        self._clock = clock
        self.count = 0
        #: Those that have been answered and wait for their next request, longest first; and those
        #: that have not asked anything yet, with the time since when.
        self.idle: OrderedDict[LimitedConnection, None] = OrderedDict()
        self.new: OrderedDict[LimitedConnection, float] = OrderedDict()

    def enter(self, connection: LimitedConnection) -> bool:
        """Count ``connection``. False if there is not even time to answer that it has to go."""
        self.count += 1
        self.new[connection] = self._clock()
        return self.count <= self._told_most

    def leave(self, connection: LimitedConnection) -> None:
        self.count -= 1
        self.idle.pop(connection, None)
        self.new.pop(connection, None)

    def asks(self, connection: LimitedConnection) -> bool:
        """A request of ``connection`` is beginning; whether there is room for it."""
        self.idle.pop(connection, None)
        self.new.pop(connection, None)
        while self.count - self._closing > self.most:
            if not self._close_one():
                return False
        return True

    def rests(self, connection: LimitedConnection) -> None:
        """``connection`` has its answer, and nothing else was asked."""
        self.idle[connection] = None
        if self.count - self._closing > self.most:
            self._close_one()

    _closing = 0

    def _close_one(self) -> bool:
        if self.idle:
            connection, _ = self.idle.popitem(last=False)
        elif self.new and self._clock() - next(iter(self.new.values())) >= _FIRST_WORD_S:
            connection, _ = self.new.popitem(last=False)
        else:
            return False
        # Its end is only counted when the loop comes to it, and until then it is none any more.
        connection.making_room = True
        self._closing += 1
        connection.transport.close()
        return True

    def closed(self, connection: LimitedConnection) -> None:
        self.leave(connection)
        if connection.making_room:
            self._closing -= 1


class LimitedConnection(HttpToolsProtocol):
    """uvicorn's connection, within limits.

    uvicorn itself waits without end for the head of a first request, takes heads of any size, keeps
    what a client does not read until that one goes away by itself, and counts idle connections like
    busy ones.
    """

    #: Set by ``connection_class``.
    settings: ServerConfig
    connections_of_all: Connections
    #: Hears the code of each refusal that the app does not know of.
    told: Told
    # With these in the dictionary of uvicorn's attributes, it is one that shares no names with
    # those of other connections any more, and five times as large.
    __slots__ = (
        "_came_bytes",
        "_dropped_bytes",
        "_head_bytes",
        "_head_limit",
        "_idle_limit",
        "_in_pieces",
        "_last_words",
        "_parting",
        "_write_limit",
        "making_room",
    )

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.pipeline = _NOTHING_WAITS
        self.making_room = False
        loop, settings = self.loop, self.settings
        self._head_limit = Deadline(loop, settings.head_timeout_s, self._end_of_head)
        self._write_limit = Deadline(loop, settings.write_timeout_s, self._cut)
        self._idle_limit = Deadline(loop, self.timeout_keep_alive, self.timeout_keep_alive_handler)
        #: Bytes that came in since the last of a body, or since a request was expected.
        self._head_bytes = 0
        #: Whether a head has begun that did not come in at once; and how much came in at last.
        self._in_pieces, self._came_bytes = False, 0
        self.url, self.headers = b"", []
        #: What is answered last; and until when it is waited for a client to take that. What comes
        #: in counts no more then.
        self._last_words: bytes | None = None
        self._parting: asyncio.TimerHandle | None = None
        self._dropped_bytes = 0
        #: The request that is being answered; ``cycle`` is the newest one, which may wait for it.
        self._answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = ConnectionFlow(transport)
        self._expect_head()
        if not self.connections_of_all.enter(self):
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for limit in (self._head_limit, self._write_limit, self._idle_limit):
            limit.end()
        if self._parting is not None:
            self._parting.cancel()
        self.connections_of_all.closed(self)
        self.pipeline.clear()
        answered = self._answered
        if answered is not None and not answered.response_complete:
            answered.disconnected = True
            answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._parting is not None:
            self._dropped_bytes += len(data)
            if self._dropped_bytes > _DROPPED_BYTES_MAX:
                self.transport.abort()
            return
        self._idle_limit.stop()
        if not self._head_limit.running and self._is_idle():
            self._expect_head()
        self._came_bytes = len(data)
        self._head_bytes += self._came_bytes
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except httptools.HttpParserError as error:
            self._refuse(refusal_of(error))
        self._in_pieces = bool(self.url or self.headers)
        if self._head_bytes > _HEAD_BYTES_MAX:
            # A head, or a trailer, or the next head while an answer is under way: the parser keeps
            # all of it until it ends.
            self._refuse(too_long(_HEAD_BYTES_MAX))

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that says nothing more may still wait for its answer. With TLS both directions
        end together; and who waits for news and hangs up waits no more."""
        transport, cycle = self.transport, self.cycle
        if self._parting is not None or not transport.can_write_eof():
            return False
        if self._is_idle():
            if not self._head_limit.running or not self._head_bytes:
                return False
            self._refuse(RefusedError(408, "the request ended before its head did"))
            return True
        if cycle.more_body:
            self._refuse(RefusedError(408, "the request ended before its body did"))
            return True
        if cycle.response_started or cycle.scope["path"].endswith(LIVE_PATH):
            return False
        cycle.keep_alive = False
        return True

    def _refuse(self, refused: RefusedError) -> None:
        """Answer so, after what was asked before, and then nothing any more."""
        if self._parting is not None or self.transport.is_closing():
            return
        self._last_words = answer_of(refused)
        self.told(refused.code)
        self._head_limit.stop()
        self._idle_limit.stop()
        self._parting = self.loop.call_later(_PARTING_S, self._cut)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._part()
        elif cycle.more_body and cycle is self._answered:
            # What is refused is the rest of this one.
            if cycle.response_started:
                self._cut()
            else:
                cycle.disconnected = True
                cycle.message_event.set()
                self._part()
        elif cycle.more_body:
            self.pipeline.popleft()

    def _part(self) -> None:
        """Say the last words, and read on until the client has heard them: of a connection that is
        closed with something unread in it the answer is lost."""
        words, self._last_words = self._last_words, None
        if words is not None:
            self.transport.write(words)
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered as if it had not asked for another protocol (RFC 9110, section
        7.8). uvicorn would tell the log to install something, whenever a stranger asks."""

    def on_headers_complete(self) -> None:
        self._head_limit.stop()
        may_be_long = self._in_pieces or self._came_bytes > _HEAD_BYTES_MAX
        if may_be_long and self._bytes_of_head() > _HEAD_BYTES_MAX:
            self._refuse(too_long(_HEAD_BYTES_MAX))
        self._head_bytes = 0
        if len(self.pipeline) >= _WAITING_MAX:
            # The parser reads to the end of what has come, which may be thousands of requests.
            self._refuse(
                RefusedError(
                    400, f"{_WAITING_MAX} requests wait on this connection: read their answers"
                )
            )
        if self._parting is not None or self.transport.is_closing():
            return
        # What the parser still calls a header comes behind the body, where nobody who looked at the
        # head has seen it.
        self.headers = []
        app = self.app
        if not self.connections_of_all.asks(self) and not self.url.startswith(b"/healthz"):
            # What looks after the server has to be answered most of all when there is too much.
            app = _turn_away
            self.told("busy")
        before: RequestResponseCycle | None = self.cycle
        cycle = self.cycle = self._begun()
        self.url = b""
        if before is None or before.response_complete:
            self._answered = cycle
            self._start_asgi_task(cycle, app)
        else:
            # Requests that do not wait for the answer before them do.
            self.flow.pause_reading()
            self.pipeline = deque([(cycle, app), *self.pipeline])

    def _bytes_of_head(self) -> int:
        """What came in may be more than the head."""
        return len(self.url) + sum([len(name) + len(value) + 4 for name, value in self.headers])

    def _begun(self) -> RequestCycle:
        """The request whose head has come in."""
        parser, scope = self.parser, self.scope
        version = parser.get_http_version()
        scope["method"] = parser.get_method().decode("ascii")
        if version != "1.1" or self.url[:1] != b"/" or b"host" not in dict(scope["headers"]):
            scope["http_version"] = refusing.check_line(version, self.url, scope["headers"])
        try:
            url = httptools.parse_url(self.url)
            raw_path = url.path or b"/"
            path = raw_path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError) as error:
            raise RefusedError(400, NO_ADDRESS) from error
        scope["path"] = self.root_path + (unquote(path) if "%" in path else path)
        scope["raw_path"] = self.root_path.encode("ascii") + raw_path
        scope["query_string"] = url.query or b""
        return RequestCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=Flag(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if self._parting is not None:
            return
        assert isinstance(cycle, RequestCycle), "every request begins with its head"
        if not cycle.response_complete:
            self._head_bytes = 0
            cycle.came(body)

    def on_message_complete(self) -> None:
        if self._parting is None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        waiting = self.pipeline.pop() if self.pipeline else None
        if not self.pipeline:
            # Not before: more is not read than is answered.
            self.flow.resume_reading()
        if waiting is not None:
            self._answered = waiting[0]
            self._start_asgi_task(*waiting)
            return
        if self._parting is not None:
            self._part()
            return
        self._idle_limit.start()
        if self._is_idle():
            self.connections_of_all.rests(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_limit.start()

    def resume_writing(self) -> None:
        self._write_limit.stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        # Closing would first wait for the client to read the rest.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _is_idle(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_limit.start()

    def _end_of_head(self) -> None:
        if self._head_bytes:
            words = f"the head of the request did not come in {self.settings.head_timeout_s:g} s"
            self._refuse(RefusedError(408, words))
        else:
            self._cut()

    def _cut(self) -> None:
        self.transport.abort()


def connection_class(
    settings: ServerConfig,
    most: int,
    told: Told = _nothing,
) -> type[LimitedConnection]:
    """The class of a server's connections, of which there are ``most`` at once. ``told`` hears the
    code of each refusal that the app does not know of."""

    def now() -> float:
        return asyncio.get_running_loop().time()

    named = {
        "settings": settings,
        "connections_of_all": Connections(most, now),
        "told": staticmethod(told),
    }
    return type("LimitedConnection", (LimitedConnection,), named)


async def _turn_away(scope: Scope, receive: Any, send: Send) -> None:
    """The answer to a request for which there is no room."""
    # Who was turned away together should not come back together.
    retry_after = _RETRY_S * (1 + 2 * (next(_turned_away) * _GOLDEN % 1))
    response = wire.error_response(
        ErrorResponse(
            code="busy",
            message="this server has as many connections as it takes; come again",
            retryable=True,
            retry_after=retry_after,
        )
    )
    named = response.headers | {
        "connection": "close",
        "content-length": str(len(response.body)),
    }
    headers = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


# ---------------------------------------------------------------- open files


def files_needed(settings: ServerConfig) -> int:
    """Open files that the limits of ``settings`` can come to."""
    told = max(_TOLD_MIN, settings.connections_max // _TOLD_SHARE)
    return settings.connections_max + told + _database_files(settings) + _OTHER_FILES


def _database_files(settings: ServerConfig) -> int:
    return 0 if settings.directory is None else _DATABASE_FILES * settings.databases_open_max


def fit_connections(settings: ServerConfig, files: int | None) -> int:
    """How many connections there may be where the process may have ``files`` open files (None:
    any number). Databases get half of them at most."""
    if files is None or files_needed(settings) <= files:
        return settings.connections_max
    left = files - min(_database_files(settings), files // 2) - _OTHER_FILES - _TOLD_MIN
    return max(1, min(settings.connections_max, left * _TOLD_SHARE // (_TOLD_SHARE + 1)))


def fit_databases(settings: ServerConfig, files: int | None) -> int:
    """How many databases may be open at once where the process may have ``files`` open files."""
    if files is None or files_needed(settings) <= files or not _database_files(settings):
        return settings.databases_open_max
    return max(1, min(settings.databases_open_max, files // 2 // _DATABASE_FILES))


def raise_file_limit(needed: int) -> int | None:
    """Let this process have ``needed`` open files, as far as the system lets it by itself; how
    many it may have now, None where there is no such limit."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return None
    if soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            # Some systems have a limit below the one that they report; then it stays as it is.
            logger.debug("the limit of %d open files could not be raised", soft)
    return soft
