"""What is in a file or a directory, read again when it changes, without a restart.

The code that asks looks at the disk at most twice a second, and only at sizes and times; the file
is read when those have changed. What cannot be read leaves the last good state in force, and is
said once.

Not here: what the file means.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from entidb.errors import EntiDBError
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

#: Seconds between two looks at the disk: what changed there counts within a second.
LOOK_S: Final = 0.5
#: Seconds for which a look over a network counts.
FRESH_S: Final = 1.0

T = TypeVar("T")
#: What changes when the content does.
Mark = tuple[Any, ...]


class Watched(Generic[T]):
    """The newest good state of what ``read`` reads. Thread-safe; starts no thread.

    The constructor reads, and raises what ``read`` raises. After that an error of ours or of the
    system is logged and the state before it stays.
    """

    def __init__(
        self, what: str, read: Callable[[], T], mark: Callable[[], Mark], clock: Clock
    ) -> None:
        """``what`` names it in the log."""
        self._what = what
        self._read = read
        self._mark = mark
        self._clock = clock
        self._lock = threading.Lock()
        self._next_look = clock.monotonic() + LOOK_S
        #: What was said last of what cannot be read.
        self._said = ""
        self._seen = mark()
        self._value = read()

    def current(self) -> T:
        if self._clock.monotonic() >= self._next_look:
            # Who comes while another looks goes on with what is known.
            if self._lock.acquire(blocking=False):
                try:
                    self._look()
                finally:
                    self._lock.release()
        return self._value

    def reread(self) -> T:
        """Read it now, whether or not it looks changed. Raises what ``read`` raises; the state
        stays as it was then."""
        with self._lock:
            self._take(self._mark())
            return self._value

    def set(self, value: T, mark: Mark) -> None:
        """What this process has just written there, and its mark."""
        with self._lock:
            self._seen = mark
            self._value = value

    def is_stale(self) -> bool:
        """Whether ``reread`` is to be called before ``current`` is believed: never, because that
        looks by itself."""
        return False

    def _look(self) -> None:
        self._next_look = self._clock.monotonic() + LOOK_S
        mark = self._mark()
        if mark == self._seen:
            return
        try:
            self._take(mark)
        except (EntiDBError, OSError) as error:
            # The next look tries again: what kept it from being read, such as too many open files,
            # may pass without another change.
            if str(error) != self._said:
                self._said = str(error)
                logger.error(
                    "%s has changed and cannot be read; the last state stays: %s",
                    self._what,
                    error,
                )
        else:
            logger.info("%s has changed and was read again", self._what)

    def _take(self, mark: Mark) -> None:
        # The mark is older than what is read: a change in between is found by the next look.
        value = self._read()
        self._seen, self._value, self._said = mark, value, ""


class Followed(Generic[T]):
    """As ``Watched``, of what is asked over a network: ``current`` looks at nothing, and whoever
    may wait calls ``look`` now and then. Until that was done within ``FRESH_S``, what is known is
    stale, and is not believed."""

    def __init__(
        self, what: str, read: Callable[[], T], mark: Callable[[], Mark], clock: Clock
    ) -> None:
        self._what = what
        self._read = read
        self._mark = mark
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at = clock.monotonic()
        self._seen = mark()
        self._value = read()

    def current(self) -> T:
        return self._value

    def is_stale(self) -> bool:
        return self._clock.monotonic() - self._looked_at > FRESH_S

    def look(self) -> None:
        """Raises what ``read`` raises; what is known is as old as before then."""
        with self._lock:
            began = self._clock.monotonic()
            mark = self._mark()
            if mark != self._seen:
                # The mark is older than what is read: a change in between is found by the next.
                value = self._read()
                self._seen, self._value = mark, value
                logger.info("%s has changed and was read again", self._what)
            self._looked_at = began

    def reread(self) -> T:
        """As ``look``."""
        self.look()
        return self._value

    def set(self, value: T, mark: Mark) -> None:
        """What this process has just written there, and its mark."""
        with self._lock:
            if mark > self._seen:
                self._seen, self._value = mark, value


def mark_of(path: str | os.PathLike[str]) -> Mark:
    """The mark of a file, or of a directory and everything in it. Never raises."""
    found = _stat(path)
    if not os.path.isdir(path):
        return found
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return (*found, error.errno)
    return (*found, *((name, _stat(os.path.join(path, name))) for name in names))


def _stat(path: str | os.PathLike[str]) -> Mark:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        return (getattr(error, "errno", None),)
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


__all__ = ["FRESH_S", "LOOK_S", "Followed", "Mark", "Watched", "mark_of"]
