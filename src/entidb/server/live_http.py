"""``GET /v1/live``: the channel of hints as a stream of events, or as a poll that waits.

A stream (``text/event-stream``) says the newest commit at once, every newer one, and every
``BEAT_S`` that it is alive; where that was asked for, what is newer comes with the page that a pull
would bring (``carrying``). It ends by itself after some minutes, before its token does, and when
the server stops; the last event says why. The same address asked for as ``application/cbor``
answers once: at once if there is more than the asker has seen, else with the first news, or after
``POLL_S``. ``live`` decides which waiter gets news, and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from msgspec import Struct

from entidb import cbor
from entidb.errors import ProtocolError
from entidb.protocol import CONTENT_TYPE, PullRequest
from entidb.server.auth import Grants
from entidb.server.cycle import UNBUFFERED
from entidb.server.live import LiveChannels
from entidb.server.wire import ServerResponse, query_of
from entidb.types import Clock

LIVE_PATH: Final = "/v1/live"
EVENTS_TYPE: Final = "text/event-stream"
#: Seconds that a poll waits for news at most: below what proxies let a request take.
POLL_S: Final = 25.0
#: Seconds after which a stream ends, a fifth more or less, so that those that began together do
#: not come back together.
STREAM_S: Final = 300.0
_SPREAD: Final = 0.2
#: So many seconds before its token a stream ends.
TOKEN_MARGIN_S: Final = 10.0
#: Milliseconds after which a client may come again when the server stops: up to so many.
_RESTART_MS: Final = 10_000
_GOLDEN: Final = 0.6180339887

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class LiveRequest:
    """What the address asks for. Raises ``ProtocolError``."""

    def __init__(self, query: bytes, headers: Mapping[str, str]) -> None:
        given = query_of(query)
        self.db_id = given.get("db_id", "")
        if not self.db_id:
            raise ProtocolError("name the database: ?db_id=…")
        #: The newest commit that the asker has seen; -1: whatever there is is news.
        self.cursor = _number(given["cursor"]) if "cursor" in given else -1
        self.history = _bytes(given.get("history"), "history")
        self.device_id = _bytes(given.get("device_id"), "device_id")
        #: The pull that pages in the place of hints are to answer, still encoded.
        self.pages = given.get("pages")
        accepted = headers.get("accept", "")
        self.stream = EVENTS_TYPE in accepted or CONTENT_TYPE not in accepted
        last = headers.get("last-event-id")
        if last is not None and re.fullmatch("[0-9]{1,18}", last):
            self.cursor = max(self.cursor, int(last))


def _number(text: str) -> int:
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise ProtocolError("cursor is the number of a commit")
    return int(text)


def _bytes(text: str | None, name: str) -> bytes | None:
    if text is None:
        return None
    if re.fullmatch("[0-9a-f]{32}", text) is None:
        raise ProtocolError(f"{name} is 32 hexadecimal digits, in lower case")
    return bytes.fromhex(text)


@dataclass(frozen=True)
class Newest:
    """Where a database ends."""

    history: bytes | None
    head: int

    def is_news(self, request: LiveRequest) -> bool:
        """Also where the asker has seen more than there is: this is another database by now."""
        return self.head != request.cursor or request.history not in (None, self.history)


# ---------------------------------------------------------------- a poll


class Poll:
    """One who asks once, and is a waiter already; ``answer`` waits for what it is told."""

    def __init__(self, request: LiveRequest, grants: Grants) -> None:
        self.db_id = request.db_id
        self.device_id = request.device_id
        self.grants = grants
        self.subject = grants.subject
        self.head = request.cursor
        self._request = request
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def hint(self, head: int, *, own: bool = False) -> bool:
        self._done()
        return True

    async def beat(self) -> bool:
        """A poll that shows signs of life would be a stream."""
        return True

    def end(self, reason: str) -> None:
        self._done()

    def _done(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def answer(self, newest: Newest) -> ServerResponse:
        """``newest`` is where the database ends, read after this became a waiter."""
        head = newest.head
        if not newest.is_news(self._request):
            with contextlib.suppress(TimeoutError):  # nothing new is an answer too
                async with asyncio.timeout(POLL_S):
                    await self._news
            head = max(head, self.head)
        headers = {"content-type": CONTENT_TYPE, "cache-control": "no-store"}
        return ServerResponse(200, headers, cbor.encode({"head": head}))


# ---------------------------------------------------------------- a stream


class Wanted(Struct, frozen=True, eq=False, weakref=True):
    """What the pulls of a stream's device ask for, and what its token grants: one object for all
    streams of which both are the same."""

    pull: PullRequest
    collections: frozenset[str] | None


class PageEvent(Struct, frozen=True):
    """A page that leads from where it was made to ``head``, as an event; ``text`` is empty where
    there is none. ``writers`` are the devices whose changes it brings."""

    text: bytes
    head: int
    writers: frozenset[bytes] = frozenset()


class CarriedTo(Protocol):
    """Who gets a page."""

    db_id: str
    device_id: bytes | None
    grants: Grants
    wanted: Wanted | None


class PageSource(Protocol):
    """Has pages that go with news: a ``PageCarrier``."""

    def wanted(
        self, text: str | None, db_id: str, device_id: bytes | None, grants: Grants
    ) -> Wanted | None:
        """What ``text`` asks for. Raises ``ProtocolError``."""

    async def page(self, to: CarriedTo, begins: int, head: int) -> PageEvent | None:
        """The page that leads ``to`` from ``begins`` to ``head`` or beyond; None where it gets
        none, and one without text where all of it is its own."""


class Stream:
    """One stream of events, and a waiter already; ``run`` is the rest of its life."""

    __slots__ = (
        "_carrier",
        "_cut",
        "_ending",
        "_life_s",
        "_main",
        "_number",
        "_over",
        "_reason",
        "_send",
        "_sending",
        "_sent",
        "bytes_out",
        "db_id",
        "device_id",
        "grants",
        "head",
        "subject",
        "wanted",
    )

    def __init__(
        self,
        request: LiveRequest,
        grants: Grants,
        clock: Clock,
        number: int,
        carrier: PageSource | None = None,
    ) -> None:
        """``number`` is another one for each stream of a server, and spreads when they end;
        ``carrier`` has pages for those who ask for them. Raises ``ProtocolError``."""
        self.db_id = request.db_id
        self.device_id = request.device_id
        self.grants = grants
        self.subject = grants.subject
        self.head = 0
        self.bytes_out = 0
        self.wanted: Wanted | None = None
        self._carrier = carrier
        if carrier is not None:
            self.wanted = carrier.wanted(request.pages, self.db_id, self.device_id, grants)
        self._number = number
        self._life_s = STREAM_S * (1 - _SPREAD + 2 * _SPREAD * (self._number * _GOLDEN % 1))
        self._reason = "time"
        if grants.until_s is not None:
            ends_s = grants.until_s - clock.now_ms() / 1000
            # At least a second, so that one whose tokens are short hears something; but no longer
            # than the token.
            left = max(min(1.0, ends_s), ends_s - TOKEN_MARGIN_S)
            if left < self._life_s:
                self._life_s, self._reason = left, "token"
        self._sent = -1
        #: Until the head of the answer is out nothing else may go.
        self._sending = True
        self._over = self._cut = False
        self._main: asyncio.Task[Any] | None = None

    async def run(
        self, live: LiveChannels, newest: Newest, send: Send, receive: Receive, headers: Headers
    ) -> None:
        """Until the client is gone or the stream ends. ``newest`` is where the database ended
        after this became a waiter. Raises what ``send`` and ``receive`` raise."""
        loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        self._send = send
        timer = loop.call_later(self._life_s, self._time_is_up, live)
        try:
            begins = {"type": "http.response.start", "status": 200, "headers": headers}
            # A page that a client does not read must not lie here beside others.
            await send({**begins, UNBUFFERED: True})
            self._sending = False
            await self.hint(newest.head)
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not self._cut:
                raise
            self._main.uncancel()  # type: ignore[union-attr]
        finally:
            self._main = None
            timer.cancel()

    async def hint(self, head: int, *, own: bool = False) -> bool:
        self.head = max(self.head, head)
        if self._sending:
            return True  # the one who sends sees that there is more
        self._sending = True
        try:
            page = await self._page()
            if page is not None and not page.text:
                if not own:
                    return False
                page = None  # it has what it wrote
            while self._sent < self.head and not self._over:
                if page is not None:
                    self._sent = page.head
                    self.head = max(self.head, page.head)
                    await self._write(page.text)
                    # Who was slow to read that one is told the rest in a word.
                    page = None
                    continue
                now = self._sent = self.head
                await self._write(b"id: %d\nevent: head\ndata: %d\n\n" % (now, now))
        finally:
            self._sending = False
        return True

    async def _page(self) -> PageEvent | None:
        """The page that leads from what this stream was told of to what it is to be told of."""
        if self.wanted is None or self._carrier is None or not 0 <= self._sent < self.head:
            return None
        return await self._carrier.page(self, self._sent, self.head)

    async def beat(self) -> bool:
        if not self._sending and not self._over:
            await self._write(b":\n\n")
        return True

    async def _write(self, text: bytes, *, more: bool = True) -> None:
        self.bytes_out += len(text)
        try:
            await self._send({"type": "http.response.body", "body": text, "more_body": more})
        except OSError:
            self._give_up()

    def _time_is_up(self, live: LiveChannels) -> None:
        live.remove(self)
        self.end(self._reason)

    def end(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        # Those who are all sent away at once should not come back at once.
        wait = int(_RESTART_MS * (self._number * _GOLDEN % 1)) if reason == "shutdown" else 0
        self._ending = asyncio.get_running_loop().create_task(self._say_goodbye(reason, wait))

    async def _say_goodbye(self, reason: str, wait_ms: int) -> None:
        if not self._sending:
            # The server does not wait to take leave of a client that does not read.
            said = f"retry: {wait_ms}\nevent: bye\ndata: {reason}\n\n"
            await self._write(said.encode(), more=False)
        self._give_up()

    def _give_up(self) -> None:
        self._over = True
        if self._main is not None and not self._cut:
            self._cut = True
            self._main.cancel()
