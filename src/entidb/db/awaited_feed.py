"""The change feed for asyncio: what changed, and then what changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final

from entidb.db.core import Core
from entidb.db.feed import ChangeEvent, ChangeFeed
from entidb.db.observing import add_observer
from entidb.db.settings import cursor_of

#: Events that are read at a time while a feed is awaited: few milliseconds of the loop.
_EVENTS_AT_ONCE: Final = 200


class AsyncChanges:
    """What changed, and what changes: iterate with ``async for``, which has no end. ``cursor`` is
    where to go on, as in ``ChangeFeed``. Raises ``DatabaseClosedError`` when the database is
    closed."""

    def __init__(self, core: Core, after: int, chosen: frozenset[str] | None) -> None:
        self._core = core
        self._feed = ChangeFeed(core._open_rows, cursor_of(after), chosen)

    @property
    def cursor(self) -> int:
        return self._feed.cursor

    async def __aiter__(self) -> AsyncIterator[ChangeEvent]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            call_on(loop, news.set)

        # When the database is closed the feed looks once more, and raises what that raises.
        stop = add_observer(self._core, "changes", lambda event: wake(), wake)
        try:
            while True:
                news.clear()
                for number, event in enumerate(self._feed, 1):
                    yield event
                    if not number % _EVENTS_AT_ONCE:
                        await asyncio.sleep(0)
                await news.wait()
        finally:
            stop()


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call ``function`` on ``loop``; nothing if that has ended."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return


__all__ = ["AsyncChanges", "call_on"]
