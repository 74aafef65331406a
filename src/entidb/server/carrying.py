"""A page that comes with a hint: the answer that a device would get if it pulled now, sent before
it asks.

A stream that has asked for it gets the page in the place of a hint that follows one it has read: a
device that has pulled what it was told of stands just there. One page serves all streams that ask
for the same from the same place. Where there is none for whatever reason (it is large, the database
is closed, the asker may not have it), the hint goes without, and the device pulls.

Not here: who is told, and when (``live``); what is in a page (``service``).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Awaitable, Callable
from typing import Final
from weakref import WeakValueDictionary

from msgspec.structs import replace

from entidb import protocol
from entidb.collector import paused
from entidb.errors import EntiDBError, ProtocolError, SyncError
from entidb.protocol import PullRequest, PullResponse
from entidb.server.auth import Grants
from entidb.server.front import Front
from entidb.server.hooks import Grant
from entidb.server.live_http import CarriedTo, PageEvent, Wanted
from entidb.server.stores import Holding, Store
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

FEATURE: Final = "pages"
#: Bytes of an encoded page that is carried. Text of it is a third more.
CARRIED_BYTES_MAX: Final = 16 * 1024
CARRIED_OPERATIONS_MAX: Final = 200
#: Pages that are kept for the next stream that asks for the same.
_KEPT_MAX: Final = 16

Read = Callable[[Store, PullRequest, Callable[[], bytes]], Awaitable[bytes]]


class PageCarrier:
    """Makes the pages of one app; used from its event loop. ``read`` calls what reads in a store,
    at once where that waits for nothing, else on a thread; ``note`` is told what leads a device
    where."""

    def __init__(
        self,
        front: Front,
        clock: Clock,
        read: Read,
        note: Callable[[PullRequest, int], None],
        *,
        operations_max: int = CARRIED_OPERATIONS_MAX,
        whole: bool = True,
    ) -> None:
        """Pages of ``operations_max`` operations at most; ``whole``: none that is the first of
        several, which would spare nobody a request."""
        self._front = front
        self._clock = clock
        self._read = read
        self._note = note
        self._operations_max = operations_max
        self._whole = whole
        self._wanted: WeakValueDictionary[object, Wanted] = WeakValueDictionary()
        self._kept: dict[tuple[Wanted, int], PageEvent] = {}
        self._making: dict[tuple[Wanted, int], asyncio.Future[None]] = {}

    def wanted(
        self, text: str | None, db_id: str, device_id: bytes | None, grants: Grants
    ) -> Wanted | None:
        """What ``text`` asks for: a pull, as a device would send it now. Raises ``ProtocolError``
        for one of another database or device."""
        if text is None:
            return None
        pull = _pull_in(text)
        if pull.db_id != db_id or pull.device_id != device_id:
            raise ProtocolError("pages holds a pull of another database or device")
        if pull.full or pull.columns:
            raise ProtocolError("pages holds a pull that asks for more than what has changed")
        allowed = grants.on(db_id).collections
        names = None if pull.collections is None else tuple(pull.collections)
        key = (db_id, pull.history, names, pull.schema, allowed)
        found = self._wanted.get(key)
        if found is None:
            # Where it begins is another place for each page, and whose it is for each stream.
            shared = replace(
                pull,
                device_id=bytes(16),
                cursor=0,
                have=[],
                limit=self._operations_max,
                bytes_max=CARRIED_BYTES_MAX,
            )
            found = self._wanted[key] = Wanted(shared, allowed)
        return found

    async def page(self, to: CarriedTo, begins: int, head: int) -> PageEvent | None:
        """The page that leads ``to`` from ``begins`` to ``head`` or beyond; None where it gets
        none, and one without text where all of it is its own."""
        wanted, device_id = to.wanted, to.device_id
        if wanted is None or device_id is None:
            return None
        key = wanted, begins
        page = self._kept.get(key)
        if page is None or page.head < head:
            making = self._making.get(key)
            if making is None:
                await self._make(key, to, device_id, head)
            else:
                await making
            page = self._kept.get(key)
        if page is None or page.head < head or not page.text:
            return None
        if page.writers == {device_id}:
            return PageEvent(b"", page.head, page.writers)
        if not self._may(to):
            return None
        self._note(replace(wanted.pull, device_id=device_id, cursor=begins), page.head)
        return page

    def _may(self, to: CarriedTo) -> bool:
        """Whether ``to`` would get an answer to a pull; asked once, since it counts as one where
        that counts, and last: nothing may come between it and what is sent."""
        control, grants = self._front.control, to.grants
        if control.far and control.is_stale():
            return False  # a pull waits for the look
        if grants.until_s is not None and grants.until_s * 1000 <= self._clock.now_ms():
            return False
        assert to.wanted is not None and to.device_id is not None
        request = replace(to.wanted.pull, device_id=to.device_id)
        try:
            self._front.permit(request, grants)
        except SyncError:
            return False
        return True

    async def _make(
        self, key: tuple[Wanted, int], to: CarriedTo, device_id: bytes, head: int
    ) -> None:
        self._making[key] = made = asyncio.get_running_loop().create_future()
        page = PageEvent(b"", head)
        try:
            page = await self._made(key, to, device_id, head)
        except EntiDBError as error:
            # A pull gets the reason.
            logger.debug("a hint goes without its page: %s", error)
        finally:
            del self._making[key]
            self._kept.pop(key, None)
            self._kept[key] = page
            if len(self._kept) > _KEPT_MAX:
                del self._kept[next(iter(self._kept))]
            made.set_result(None)

    async def _made(
        self, key: tuple[Wanted, int], to: CarriedTo, device_id: bytes, head: int
    ) -> PageEvent:
        (wanted, begins), stores = key, self._front.stores
        none = PageEvent(b"", head)
        store = stores.try_use(to.db_id)
        if store is None:
            return none  # who waits is no reason to open it (R17)
        request = replace(wanted.pull, device_id=device_id, cursor=begins)
        grant = to.grants.on(to.db_id)
        with Holding(stores, store):
            body = await self._read(store, request, lambda: _read_in(store, request, grant, head))
        if not body or len(body) > CARRIED_BYTES_MAX:
            return none
        page = protocol.decode(PullResponse, body)
        if page.has_more and self._whole:
            return none
        writers = frozenset(commit.device_id for commit in page.commits)
        text = event_text(request.history, begins, page.head, body)
        return PageEvent(text, page.head, writers)


def event_text(history: bytes, begins: int, head: int, body: bytes) -> bytes:
    """The event with an encoded page, which is the answer to a pull from ``begins``."""
    page, of = base64.b64encode(body), history.hex().encode()
    return b"id: %d\nevent: page\ndata: %b %d %d %b\n\n" % (head, of, begins, head, page)


def _read_in(store: Store, request: PullRequest, grant: Grant, head: int) -> bytes:
    """The encoded page; empty where the database does not end where it was said to."""
    with paused(), store.database.view() as view:
        if view.head.sequence < head:
            return b""
        return store.service.pull_bytes(request, grant, view)


def _pull_in(text: str) -> PullRequest:
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return protocol.decode(PullRequest, data)
    except (binascii.Error, ValueError, SyncError) as error:
        raise ProtocolError(f"pages holds no pull that can be read: {error}") from error


__all__ = ["CARRIED_BYTES_MAX", "FEATURE", "CarriedTo", "PageCarrier"]
