"""The thread that ends requests which take longer than they may in all.

Silence between two reads is bounded by the library.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Final

from entidb.errors import TransportError
from entidb.events import SafeEvent, Thread
from entidb.types import Clock

_JOIN_S: Final = 5.0


class Watchdog:
    """Strikes when a request is not done by its deadline.

    The library only bounds the silence between two reads, so a server that sends a byte now and
    then would hold a device without end. One thread for all requests, asleep until the earliest
    deadline it knew when it looked last: a request that ends in time neither starts nor wakes it.
    """

    #: Seconds until it strikes again: a connection may come up just after.
    AGAIN_S: Final = 1.0

    def __init__(self, clock: Clock, strike: Callable[[], None]) -> None:
        self._clock = clock
        self._strike = strike
        self._lock = threading.Lock()
        self._wake = SafeEvent()
        self._closed = False
        self._deadlines: dict[int, float] = {}
        self._struck: set[int] = set()
        self._tickets = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._looks_at = 0.0

    def watch(self, timeout_s: float) -> int:
        """A ticket for ``done``. Raises ``TransportError`` where nobody could look at it."""
        deadline = self._clock.monotonic() + timeout_s
        with self._lock:
            ticket = next(self._tickets)
            self._deadlines[ticket] = deadline
            if self._thread is None and not self._closed:
                self._looks_at = deadline
                thread = Thread(target=self._run, name="entidb-http-watchdog", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    del self._deadlines[ticket]
                    raise TransportError(
                        f"no thread could be started for the network: {error}"
                    ) from error
                self._thread = thread
            elif deadline < self._looks_at:
                self._wake.set()
        return ticket

    def struck(self, ticket: int) -> bool:
        with self._lock:
            return ticket in self._struck

    def done(self, ticket: int) -> bool:
        """The request is over; returns whether it was struck."""
        with self._lock:
            del self._deadlines[ticket]
            struck = ticket in self._struck
            self._struck.discard(ticket)
            return struck

    def _run(self) -> None:
        while True:
            pause = self._look()
            if pause is None:
                return
            self._clock.wait(self._wake, pause)
            self._wake.clear()

    def _look(self) -> float | None:
        """Strike every request that is late; seconds to the next look, None if there is no need."""
        with self._lock:
            if self._closed or not self._deadlines:
                self._thread = None
                return None
            now = self._clock.monotonic()
            late = [ticket for ticket, at in self._deadlines.items() if at <= now]
            for ticket in late:
                self._struck.add(ticket)
                self._deadlines[ticket] = now + self.AGAIN_S
            self._looks_at = min(self._deadlines.values())
            pause = self._looks_at - now
        if late:
            self._strike()
        return pause

    def close(self) -> None:
        with self._lock:
            self._closed = True
            thread = self._thread
            self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)
