"""Queries that go on: what they find now, and again whenever that has changed."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

from entidb.db.observers import CommitEvent, Observer
from entidb.db.rows import Pair
from entidb.events import SafeEvent

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)
#: What a query finds: (id, value), in its order.
Found = list[tuple[uuid.UUID, V]]
#: Has an observer called after every commit, and a function when the database is closed; what it
#: returns ends both.
Observe = Callable[[Observer, Callable[[], None]], Callable[[], None]]
#: Seconds between two looks whether the store is open still: a failed commit closes it, too.
_LOOK_S: Final = 1.0


class LiveSource(Protocol[V_co]):
    """The query that is asked again."""

    def _read_once(self) -> tuple[list[Pair], Iterator[tuple[uuid.UUID, V_co]]]:
        """What it finds, from one snapshot: as it is stored, and to be converted."""
        ...

    def _check_open(self) -> None:
        """Raises ``DatabaseClosedError``."""
        ...


class LiveQuery(Generic[V]):
    """What both kinds of live query share: whether there may be news, and what was given last."""

    def __init__(
        self, query: LiveSource[V], name: str, observe: Observe, news: Callable[[], object]
    ) -> None:
        self._query = query
        self._name = name
        self._news = news
        self._last: list[Pair] | None = None
        heard = weakref.WeakMethod(self._heard)

        def tell(event: CommitEvent) -> None:
            method = heard()
            if method is not None:
                method(event)

        ended = weakref.WeakMethod(self._ended)

        def closed() -> None:
            method = ended()
            if method is not None:
                method()

        # Nothing that is called after commits keeps this alive, and its end ends that.
        self._end = weakref.finalize(self, observe(tell, closed))

    def _heard(self, event: CommitEvent) -> None:
        if any(each.collection == self._name for each in event.events):
            self._news()

    def _ended(self) -> None:
        # Who looks then is told by what the query raises.
        self._news()

    def look(self) -> Found[V] | None:
        """What the query finds; None if that is what it found when it was looked last."""
        pairs, rows = self._query._read_once()
        if pairs == self._last:
            return None
        self._last = pairs
        return list(rows)

    def end(self) -> None:
        self._end()


class Live(Generic[V]):
    """What a query finds, as a list of ``(id, value)``, and then again after every commit that
    changed it; several commits that come at once are one change. Made by ``Query.live``.

    Waits in between. ``close`` ends the iteration, from any thread. Raises what the query raises,
    and goes on after that; ``DatabaseClosedError`` when the database is closed."""

    def __init__(self, query: LiveSource[V], name: str, observe: Observe) -> None:
        self._news = SafeEvent()
        self._news.set()
        self._query = query
        self._closed = False
        self._listening: LiveQuery[V] = LiveQuery(query, name, observe, self._news.set)

    def __iter__(self) -> Iterator[Found[V]]:
        return self

    def __next__(self) -> Found[V]:
        while True:
            while not self._news.wait(_LOOK_S):
                self._query._check_open()
            if self._closed:
                raise StopIteration
            self._news.clear()
            found = self._listening.look()
            if found is not None:
                return found

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._listening.end()
        self._news.set()

    def __enter__(self) -> Live[V]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


__all__ = ["Found", "LiveQuery", "Live", "Observe"]
