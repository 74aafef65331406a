"""One writer's thread after the other, though each database has one of its own.

Threads that decide pushes need the interpreter, and give it up and take it again with each row that
they store. When fifty of them do that at once, most of a core goes into handing it over. So they
pass a gate one by one: meanwhile pushes of the others queue up, and are decided together. Flushes
overlap where the disk is slow: who has been inside for a few milliseconds, because it waits for the
disk or for another process, keeps nobody out any more.

Who works for a crowd lets others pass first, for a moment (``passes``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final, Protocol

#: Seconds that who is inside keeps others out.
PATIENCE_S: Final = 0.002
#: Seconds for which others come first, at most, and between two looks whether they still do.
COURTESY_S: Final = 0.004
_LOOK_S: Final = 0.0005


class Manners(Protocol):
    """What a server knows of the requests that are under way; asked from any thread."""

    def gives_way(self, db_id: str) -> bool:
        """Whether others come first now, for a moment."""
        ...

    def lets_go(self, db_id: str) -> bool:
        """Whether who works for this database lets others have the interpreter now and then."""
        ...


class WriterGate:
    """Of all writers' threads of a process; they go in in the order in which they came."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._line: deque[GateTurn] = deque()
        #: Who went in last, until it leaves; and when.
        self._newest: GateTurn | None = None
        self._went_in = 0.0
        #: None: nobody says who comes first.
        self.manners: Manners | None = None

    def enter(self, db_id: str = "") -> GateTurn:
        """Wait for a turn, which ``leave`` ends."""
        manners = self.manners
        if manners is not None and manners.gives_way(db_id):
            until = time.monotonic() + COURTESY_S
            while time.monotonic() < until and manners.gives_way(db_id):
                time.sleep(_LOOK_S)
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


def lets_go(gate: WriterGate | None, db_id: str) -> bool:
    """As ``Manners.lets_go``; nobody need where there is no gate."""
    manners = None if gate is None else gate.manners
    return manners is not None and manners.lets_go(db_id)


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


__all__ = ["COURTESY_S", "PATIENCE_S", "GateTurn", "Manners", "WriterGate", "lets_go"]
