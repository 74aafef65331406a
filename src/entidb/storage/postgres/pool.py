"""Connections that are used again, and are given up together.

A thread that wants one takes one that is idle, or makes one itself: an outage is said at once, to
each who asks, and its end is noticed by the next who does. One that is idle and that the server has
ended is never lent: its socket has something to read. When one turns out to be broken, those beside
it go too, because a server mostly ends all of them.

A connection that is lost is not counted any more: a thread that was interrupted need not have given
its own back. And an answer that nobody waits for may still be under way on one that is idle
(``Line.leave``).

Not here: what a connection is made of (``reaching``), and who notices that a server does not
answer (``pulse``).
"""

from __future__ import annotations

import select
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final

import psycopg

from entidb.errors import DatabaseClosedError, StorageUnreachableError
from entidb.events import SafeEvent
from entidb.storage.postgres.line import Line

#: Seconds after which a connection that nobody used is closed.
_IDLE_S: Final = 60.0
#: Seconds between two looks whether a connection was lost.
_LOOK_S: Final = 0.05
#: Seconds after which one who has not looked is taken for gone.
_GONE_S: Final = 1.0


class _Kept:
    """A place among the connections of a pool, and what the pool knows of the one that has it:
    which is in ``line`` while it is idle, and has this otherwise."""

    def __init__(self, generation: int) -> None:
        self.line: Line | None = None
        self.generation = generation
        self.used_at = 0.0


class _Waiting:
    """A thread in line for a connection, which looks again and again; ``until`` is when it is taken
    for gone."""

    def __init__(self) -> None:
        self.until = 0.0
        self.bell = SafeEvent()


class Pool:
    """At most ``size`` connections that ``connect`` makes, lent in the order in which they are
    asked for: under a load that uses all of them, somebody else would be faster each time.
    Thread-safe."""

    def __init__(self, connect: Callable[[], Line], size: int, wait_s: float) -> None:
        self._connect = connect
        self._size = size
        self._wait_s = wait_s
        #: Guards what follows; nothing is waited for meanwhile. No ``Condition``: Ctrl-C within one
        #: of its steps leaves it locked for ever. Who has it may end a lost snapshot, by the
        #: collector, which gives its connection back.
        self._lock = threading.RLock()
        #: First come, first served.
        self._line: list[_Waiting] = []
        self._idle: list[_Kept] = []
        self._places: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._generation = 0
        #: How often connections were lost, or all of them given up.
        self.losses = 0
        self._closed = False

    def getconn(self) -> Line:
        """One that is in no transaction; ``putconn`` is the caller's. Raises
        ``StorageUnreachableError`` if none is free in time, and what ``connect`` raises."""
        until = time.monotonic() + self._wait_s
        while True:
            kept = self._take(until)
            line, kept.line = kept.line, None
            if line is None:
                line = self._connect_for(kept)
            elif not _is_alive(line):
                self.losses += 1
                self._free(kept)
                line.close()
                continue
            line.kept = kept
            return line

    def _connect_for(self, kept: _Kept) -> Line:
        try:
            return self._connect()
        except BaseException:
            # Its place is not lost with it: the error keeps this frame for as long as it is kept.
            self._free(kept)
            raise

    def _free(self, kept: _Kept) -> None:
        with self._lock:
            self._places.discard(kept)
            self._ring()

    def _take(self, until: float) -> _Kept:
        """One that is idle, or a place for a new one."""
        waiting = None
        try:
            while True:
                with self._lock:
                    if self._closed:
                        raise DatabaseClosedError("this store is closed; open it again to use it")
                    now = time.monotonic()
                    if waiting is not None:
                        waiting.until = now + _GONE_S
                    if self._line:
                        # An interrupt may leave one here.
                        self._line = [each for each in self._line if each.until > now]
                    if self._line[:1] in ([], [waiting]) and (kept := self._lend()) is not None:
                        return kept
                    if now >= until:
                        raise StorageUnreachableError(
                            f"all connections to PostgreSQL were in use for {self._wait_s:g} s; "
                            "are the snapshots closed?"
                        )
                    if waiting is None:
                        waiting = _Waiting()
                        waiting.until = now + _GONE_S
                    if waiting not in self._line:
                        self._line.append(waiting)
                    waiting.bell.clear()
                waiting.bell.wait(min(until - now, _LOOK_S))
        finally:
            if waiting is not None:
                with self._lock:
                    if waiting in self._line:
                        self._line.remove(waiting)
                    self._ring()

    def _lend(self) -> _Kept | None:
        if self._idle:
            return self._idle.pop()
        if len(self._places) >= self._size:
            return None
        kept = _Kept(self._generation)
        self._places.add(kept)
        return kept

    def _ring(self) -> None:
        """Wake who is first in line, if there is something for him."""
        if self._line and (self._idle or len(self._places) < self._size):
            self._line[0].bell.set()

    def putconn(self, line: Line) -> None:
        """Whatever state it is in."""
        kept, line.kept = line.kept, None
        assert isinstance(kept, _Kept)
        gone: list[_Kept] = []
        with self._lock:
            if line.closed:
                self.losses += 1
                self._generation += 1
                gone, self._idle = self._idle, []
            good = not self._closed and kept.generation == self._generation and line.is_free()
            if good:
                kept.used_at = time.monotonic()
                kept.line = line
                self._idle.append(kept)
            else:
                self._places.discard(kept)
            self._ring()
        # From here on a good one is another's, who may have it already.
        if not good:
            line.close()
        _close(gone)

    def tidy(self) -> None:
        """Close those that have been idle for long: they are the first ones."""
        before = time.monotonic() - _IDLE_S
        with self._lock:
            count = sum(1 for kept in self._idle if kept.used_at < before)
            old, self._idle = self._idle[:count], self._idle[count:]
        _close(old)

    def drain(self) -> None:
        """None that is here now is lent again."""
        with self._lock:
            self.losses += 1
            self._generation += 1
            gone, self._idle = self._idle, []
        _close(gone)

    def close(self) -> None:
        """Those that are lent are closed when they come back."""
        with self._lock:
            self._closed = True
        self.drain()


def _is_alive(line: Line) -> bool:
    """Whether it is as it was left. A server that ends it has said so."""
    try:
        line.settle()
    except psycopg.Error:
        return False
    if line.closed:
        return False
    look = select.poll()
    look.register(line.fileno(), select.POLLIN)
    return not look.poll(0)


def _close(several: list[_Kept]) -> None:
    for kept in several:
        if kept.line is not None:
            kept.line.close()


__all__ = ["Pool"]
