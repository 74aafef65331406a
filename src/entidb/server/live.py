"""Hints that a database has something new, for those who wait for them: who waits, when they are
told, and when they are sent away.

A hint is the number of the newest commit and carries nothing else, so nothing can be applied twice,
out of order or without permission: what follows it is an ordinary pull. A waiter holds a number and
never a queue, so a slow waiter gets one message, of the newest commit. The waiters of one database
get theirs in small batches one after the other, which spreads the pulls that follow.

Not here: addresses, headers and the shape of an event (``live_http``). A waiter is no user of
a database, which can be closed for being idle, and opened again after an error, while thousands
wait (R17). Used from the event loop only, but for ``told``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Final, Protocol

from entidb.errors import ServerBusyError
from entidb.server.auth import Grants

#: Whether it was told; if not, its turn comes again.
Tell = Callable[["Waiter"], Coroutine[object, object, bool]]
logger = logging.getLogger("entidb.server")

#: Waiters that get news together, and seconds until the next do: 0.2 ms for each of them.
BATCH: Final = 50
BATCH_PAUSE_S: Final = 0.01
#: Seconds between two hints to the same waiter, at least.
HINT_PAUSE_S: Final = 0.05
#: Seconds after which a device is told of what it has written itself. It learns that from the
#: answer to its push; and so that comes first, and the hints of those to whom it is news.
OWN_S: Final = 0.01
#: Seconds between two signs of life.
BEAT_S: Final = 15.0
#: Seconds that one waiter holds up the others of its batch at most, when it does not read.
_STUCK_S: Final = 0.25
_RETRY_S: Final = 2.0
#: Multiples of it, without their whole part, are spread evenly, however many there are.
_GOLDEN: Final = 0.6180339887


class Waiter(Protocol):
    """One who waits. The methods are called by ``LiveChannels`` and must not raise; ``hint`` and
    ``beat`` may wait for a slow reader."""

    db_id: str
    subject: str
    #: What it may do, and from which device it says it comes.
    grants: Grants
    device_id: bytes | None
    #: The newest commit that it has news of.
    head: int

    async def hint(self, head: int, *, own: bool = False) -> bool:
        """Commit ``head`` is there. False where all that leads there was written by this one, and
        was not told: this is called again ``OWN_S`` later, with ``own``."""

    async def beat(self) -> bool:
        """Show that the connection is alive; True."""

    def end(self, reason: str) -> None:
        """Send it away; it is no waiter any more."""


class _Channel:
    """Those who wait for one database."""

    def __init__(self) -> None:
        self.waiters: dict[Waiter, None] = {}
        self.head = 0
        #: Those of this round that have no news yet.
        self.round: deque[Waiter] = deque()
        self.timer: asyncio.TimerHandle | None = None
        #: When the next round may begin.
        self.free_at = 0.0


class LiveChannels:
    """All who wait at one server. ``most`` of them at once, ``most_each`` of one subject."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int, most_each: int) -> None:
        self._loop = loop
        self._most = most
        self._most_each = most_each
        self._channels: dict[str, _Channel] = {}
        self._by_subject: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_away = 0
        self._closed = False
        #: Waiters by the second of ``BEAT_S`` in which they are shown that all is well.
        self._beats: list[dict[Waiter, None]] = [{} for _ in range(int(BEAT_S))]
        self._beat_at = 0
        self._slot_of: dict[Waiter, int] = {}
        self._ticking: asyncio.TimerHandle | None = None
        #: Called once in a second as long as there are waiters.
        self.on_tick: Callable[[], None] = _nothing

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._slot_of)

    def is_awaited(self, db_id: str) -> bool:
        """Whether somebody waits for news of ``db_id``. From any thread."""
        return db_id in self._channels

    def awaited(self) -> set[str]:
        """The databases of which somebody waits for news. From any thread."""
        return set(self._channels)

    def look(self) -> None:
        """Do now what is done once in a second. From any thread."""
        self._call(lambda: self.on_tick())

    # ------------------------------------------------------------ coming and going

    def check_room(self, subject: str) -> None:
        """Raises ``ServerBusyError`` where there is no room for another waiter of ``subject``."""
        if self._closed:
            raise ServerBusyError(
                "the server is shutting down", code="shutting_down", retry_after=_RETRY_S
            )
        if self.count < self._most and self._by_subject[subject] < self._most_each:
            return
        self._turned_away += 1
        # Who was turned away together should not come back together.
        retry_after = _RETRY_S * (1 + 4 * (self._turned_away * _GOLDEN % 1))
        raise ServerBusyError(
            "as many wait for news here as this server takes; ask now and then instead",
            retry_after=retry_after,
        )

    def add(self, waiter: Waiter) -> None:
        """``waiter`` gets news of every commit beyond its ``head``. Raises ``ServerBusyError``."""
        self.check_room(waiter.subject)
        channel = self._channels.get(waiter.db_id)
        if channel is None:
            channel = self._channels[waiter.db_id] = _Channel()
        channel.waiters[waiter] = None
        self._by_subject[waiter.subject] += 1
        slot = self._slot_of[waiter] = (self._beat_at - 1) % len(self._beats)
        self._beats[slot][waiter] = None
        if self._ticking is None:
            self._ticking = self._loop.call_later(1.0, self._tick)
        if waiter.head < channel.head:
            # What was committed between looking and waiting.
            channel.round.append(waiter)
            self._schedule(channel)

    def remove(self, waiter: Waiter) -> None:
        """Idempotent."""
        slot = self._slot_of.pop(waiter, None)
        if slot is None:
            return
        del self._beats[slot][waiter]
        self._by_subject[waiter.subject] -= 1
        if not self._by_subject[waiter.subject]:
            del self._by_subject[waiter.subject]
        channel = self._channels[waiter.db_id]
        del channel.waiters[waiter]
        if not channel.waiters:
            del self._channels[waiter.db_id]
            if channel.timer is not None:
                channel.timer.cancel()
                channel.timer = None

    def end_where(self, test: Callable[[Waiter], bool], reason: str) -> int:
        """Send away all for whom ``test`` is true; how many that were."""
        ending = [waiter for waiter in self._slot_of if test(waiter)]
        for waiter in ending:
            self.remove(waiter)
            waiter.end(reason)
        return len(ending)

    def opened(self, db_id: str, head: int) -> None:
        """``db_id`` was opened, and ends at ``head``. If it went further before, it was put back,
        and who waits has to come again and see. From any thread."""
        if db_id in self._channels:
            self._call(self._opened, db_id, head)

    def _opened(self, db_id: str, head: int) -> None:
        channel = self._channels.get(db_id)
        if channel is not None and head < channel.head:
            self.end_where(lambda waiter: waiter.db_id == db_id, "restarted")
        else:
            self._told(db_id, head)

    def close(self) -> None:
        """Send all away, and take no more. Idempotent."""
        self._closed = True
        self.end_where(lambda waiter: True, "shutdown")
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    # ------------------------------------------------------------ telling

    def told(self, db_id: str, head: int) -> None:
        """Commit ``head`` of ``db_id`` is durable. From any thread; costs nothing where nobody
        waits."""
        if db_id in self._channels:
            self._call(self._told, db_id, head)

    def _call(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            logger.debug("a hint came after the loop was closed, and with it every connection")

    def _told(self, db_id: str, head: int) -> None:
        channel = self._channels.get(db_id)
        if channel is None or head <= channel.head:
            return
        channel.head = head
        if channel.timer is None:
            self._begin_round(channel)

    def _schedule(self, channel: _Channel) -> None:
        if channel.timer is None:
            self._go_on(channel)

    def _begin_round(self, channel: _Channel) -> None:
        """A round gives news to every waiter once. A head that comes in the middle of it goes to
        those whose turn is still to come, and to the others in the next."""
        channel.timer = None
        wait = channel.free_at - self._loop.time()
        if wait > 0:
            channel.timer = self._loop.call_later(wait, self._begin_round, channel)
            return
        channel.free_at = self._loop.time() + HINT_PAUSE_S
        channel.round = deque(waiter for waiter in channel.waiters if waiter.head < channel.head)
        self._go_on(channel)

    def _go_on(self, channel: _Channel) -> None:
        channel.timer = None
        batch: deque[Waiter] = deque()
        while channel.round and len(batch) < BATCH:
            waiter = channel.round.popleft()
            if waiter in channel.waiters and waiter.head < channel.head:
                batch.append(waiter)
        if batch:
            head = channel.head
            for waiter in batch:
                waiter.head = head
            self._spawn(batch, lambda waiter: waiter.hint(waiter.head))
        if channel.round:
            channel.timer = self._loop.call_later(BATCH_PAUSE_S, self._go_on, channel)
        elif any(waiter.head < channel.head for waiter in channel.waiters):
            self._begin_round(channel)

    def _tick(self) -> None:
        self._ticking = None
        if not self._slot_of:
            return
        self._ticking = self._loop.call_later(1.0, self._tick)
        self.on_tick()
        due, self._beat_at = self._beats[self._beat_at], (self._beat_at + 1) % len(self._beats)
        if due:
            self._spawn(deque(due), lambda waiter: waiter.beat())

    def _spawn(self, waiters: deque[Waiter], call: Tell) -> None:
        task = self._loop.create_task(self._each(waiters, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take_over(self, waiters: deque[Waiter], call: Tell) -> None:
        if waiters:
            self._spawn(waiters, call)

    async def _each(self, waiters: deque[Waiter], call: Tell) -> None:
        """One after the other, in one task: a task for each would cost more than what it does. If
        one does not read, another task takes the rest over."""
        handle = self._loop.call_later(_STUCK_S, self._take_over, waiters, call)
        own: deque[Waiter] = deque()
        try:
            while waiters:
                waiter = waiters.popleft()
                if waiter in self._slot_of and not await call(waiter):
                    own.append(waiter)
        finally:
            handle.cancel()
            if own:
                self._loop.call_later(OWN_S, self._take_over, own, _hint_own)


async def _hint_own(waiter: Waiter) -> bool:
    return await waiter.hint(waiter.head, own=True)


def _nothing() -> None:
    return None
