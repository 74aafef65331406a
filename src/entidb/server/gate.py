"""One writer's thread after the other, though each database has one of its own.

Threads that decide pushes need the interpreter, and give it up and take it again with each row that
they store. When fifty of them do that at once, most of a core goes into handing it over. So they
pass a gate one by one: meanwhile pushes of the others queue up, and are decided together. Flushes
overlap where the disk is slow: who has been inside for a few milliseconds, because it waits for the
disk or for another process, keeps nobody out any more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final

#: Seconds that who is inside keeps others out.
PATIENCE_S: Final = 0.002


class WriterGate:
    """Of all writers' threads of a process; they go in in the order in which they came."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._line: deque[GateTurn] = deque()
        #: Who went in last, until it leaves; and when.
        self._newest: GateTurn | None = None
        self._went_in = 0.0

    def enter(self) -> GateTurn:
        """Wait for a turn, which ``leave`` ends."""
        turn = GateTurn()
        with self._lock:
            self._line.append(turn)
            self._look()
            place = len(self._line)
        # Whoever leaves lets the next one in. Only where nobody leaves for long does somebody look:
        # those in front first.
        while not turn.wait(self._patience_s * place):
            with self._lock:
                self._look()
        return turn

    def leave(self, turn: GateTurn) -> None:
        with self._lock:
            if self._newest is turn:
                self._newest = None
                self._look()

    def _look(self) -> None:
        """Let the first of the line in, if nobody keeps it out."""
        now = time.monotonic()
        if self._line and (self._newest is None or now - self._went_in >= self._patience_s):
            self._newest, self._went_in = self._line.popleft(), now
            self._newest.let_in()


class GateTurn:
    """Of one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float) -> bool:
        """Whether it was let in within so long."""
        return self._lock.acquire(timeout=seconds)

    def let_in(self) -> None:
        self._lock.release()


__all__ = ["PATIENCE_S", "WriterGate", "GateTurn"]
