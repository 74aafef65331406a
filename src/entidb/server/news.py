"""News between the nodes of a server: what one of them commits reaches those who wait at another.

A thread looks once in a second at the marks of all databases for which somebody waits here, in one
question, whether they are open here or not; and at once where another node has said so. It tells
the others what was committed here: after the commit, and many commits at a time.

Not here: who waits, and how they are told (``live``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from typing import Final, Protocol

from entidb.db.records import META_HEAD, decode_head
from entidb.errors import EntiDBError
from entidb.events import SafeEvent, Thread

logger = logging.getLogger("entidb.server")

#: Seconds between two looks at all marks, and between two at those of which something was said.
LOOK_S: Final = 1.0
_PAUSE_S: Final = 0.03


class MarkSource(Protocol):
    """Where news are, of databases by their names. One thread uses it, but for ``wake``. All but
    that raise ``StorageError``."""

    def wake(self) -> None:
        """Have ``wait`` return. From any thread."""
        ...

    def wait(self, timeout_s: float) -> set[str]:
        """The names of which other nodes have said that there is something new."""
        ...

    def tell(self, names: Collection[str]) -> None:
        """Say so to the other nodes."""
        ...

    def marks(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        """Of those that there are: a number, another one where another database has the name now,
        and the mark."""
        ...

    def value(self, number: int, key: bytes) -> bytes | None:
        """The newest value at ``key`` of the database with that number."""
        ...

    def close(self) -> None: ...


class Awaiting(Protocol):
    """What is needed of ``LiveChannels``. From any thread."""

    def awaited(self) -> set[str]: ...
    def told(self, db_id: str, head: int) -> None: ...
    def opened(self, db_id: str, head: int) -> None: ...


class News:
    """Runs from when it is made until ``close``."""

    def __init__(self, source: MarkSource, live: Awaiting) -> None:
        self._source, self._live = source, live
        self._lock = threading.Lock()
        #: Committed here since the others were told; under the lock.
        self._committed: set[str] = set()
        #: What was seen of databases for which somebody waits.
        self._seen: dict[str, tuple[int, int]] = {}
        self._look_at = 0.0
        self._stop = SafeEvent()
        self._thread = Thread(target=self._run, name="entidb-news", daemon=True)
        self._thread.start()

    def committed(self, db_id: str, head: int) -> None:
        """Something was committed here. From any thread; quick."""
        self._live.told(db_id, head)
        with self._lock:
            first = not self._committed
            self._committed.add(db_id)
        if first:
            self._source.wake()

    def close(self) -> None:
        """Idempotent."""
        if not self._stop.is_set():
            self._stop.set()
            self._source.wake()
            self._thread.join()
            self._source.close()

    def _run(self) -> None:
        said = ""
        while not self._stop.is_set():
            try:
                self._step()
                said = ""
            except EntiDBError as error:
                # As long as the store is away: once, and not at each look.
                if str(error) != said:
                    logger.warning("no news of other nodes: %s", error)
                said = str(error)
                self._look_at = 0.0
                self._stop.wait(LOOK_S)
            except Exception:
                # The next step may work, and without this thread nobody would hear of anything.
                logger.exception("looking for news of other nodes failed")
                self._look_at = 0.0
                self._stop.wait(LOOK_S)
            self._stop.wait(_PAUSE_S)

    def _step(self) -> None:
        heard = self._source.wait(self._look_at - time.monotonic())
        with self._lock:
            committed, self._committed = self._committed, set()
        if committed:
            self._source.tell(committed)
        awaited = self._live.awaited()
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._seen = {name: seen for name, seen in self._seen.items() if name in awaited}
            self._look(awaited)
        elif awaited & heard:
            self._look(awaited & heard)

    def _look(self, names: set[str]) -> None:
        found = self._source.marks(names) if names else {}
        for name in names:
            seen, known = found.get(name), self._seen.pop(name, None)
            if seen is None:
                continue  # it is not there; who waits is told when he asks for it
            if seen != known:
                raw = self._source.value(seen[0], META_HEAD)
                head = 0 if raw is None else decode_head(raw).sequence
                # Another database of that name may end earlier.
                replaced = known is not None and known[0] != seen[0]
                (self._live.opened if replaced else self._live.told)(name, head)
            self._seen[name] = seen


__all__ = ["LOOK_S", "News", "MarkSource"]
