"""Waits for the marks of the stores that one node has: one statement for all of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import psycopg

from entidb.errors import StorageError
from entidb.events import Thread

logger = logging.getLogger("entidb.storage")

#: The newest marks of stores by their numbers. Raises what psycopg raises, and ``StorageError``.
ReadMarks = Callable[[list[int]], dict[int, int]]
#: Seconds between two looks at the marks that somebody waits for.
LOOK_S: Final = 0.02
#: Seconds until the next one after they could not be read.
_AWAY_S: Final = 0.5


class Marks:
    """Waits for the marks of stores: one statement for all of a node, while anybody waits."""

    def __init__(self, read: ReadMarks) -> None:
        self._read = read
        #: Entered itself, and not by way of the condition, whose own lines an interrupt could leave
        #: with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        #: What is waited for, how often, and the newest that was seen of it.
        self._waiting: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._failed = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def wait(self, store: int, mark: int, timeout_s: float) -> bool:
        """Whether it is another one before the time is over; also ends, with False, when the marks
        cannot be read: the caller asks itself then."""
        until = time.monotonic() + timeout_s
        with self._lock:
            self._waiting[store] = self._waiting.get(store, 0) + 1
            self._failed = False
            self._begin()
            try:
                while self._seen.get(store, mark) == mark:
                    left = until - time.monotonic()
                    if left <= 0 or self._failed or self._closed:
                        return False
                    self._changed.wait(left)
                return True
            finally:
                self._waiting[store] -= 1
                if not self._waiting[store]:
                    del self._waiting[store]
                    self._seen.pop(store, None)

    def tell(self, store: int, mark: int) -> None:
        """What this process has committed itself."""
        with self._lock:
            if store in self._waiting:
                self._seen[store] = mark
                self._changed.notify_all()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def _begin(self) -> None:
        if self._thread is None:
            thread = Thread(target=self._look, name="entidb-marks", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the caller asks itself, and the next wait tries again
                self._failed = True
                logger.warning("there is no thread to look for commits: %s", error)
                return
            self._thread = thread

    def _look(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._waiting:
                    self._thread = None
                    return
                wanted = list(self._waiting)
            try:
                found = self._read(wanted)
            except (psycopg.Error, StorageError):
                found = None
            except Exception:
                # Without this thread nobody would hear of commits any more.
                logger.exception("looking for commits failed")
                found = None
            with self._lock:
                self._failed = found is None
                for store, mark in (found or {}).items():
                    if store in self._waiting:
                        self._seen[store] = max(mark, self._seen.get(store, 0))
                self._changed.notify_all()
            time.sleep(_AWAY_S if found is None else LOOK_S)


__all__ = ["LOOK_S", "Marks"]
