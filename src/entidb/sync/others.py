"""One cycle on a database at a time, among the engines of all processes.

Not here: which of them runs in the background (``background``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Final

from entidb.db import Database
from entidb.errors import DatabaseLockedError
from entidb.sync.drive import Pause
from entidb.types import Clock

#: Seconds for which a sync waits for the cycle of another process.
OTHERS_S = 60.0
#: And between two looks at whether it has ended.
_LOOK_S: Final = 0.05


class Others:
    """The right of one engine to run a cycle."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._right = database.right("engine")

    def enter(
        self, look: Callable[[], None], nudge: threading.Event
    ) -> Generator[Pause, object, None]:
        """Wait until no other process runs a cycle; ``look`` is called before each pause, which
        ``nudge`` ends, and ends the wait by raising. Raises ``DatabaseLockedError`` if it takes too
        long."""
        if self._right.take(0):
            return
        began = self._clock.monotonic()
        while not self._right.take(0):
            look()
            nudge.clear()
            if self._clock.monotonic() - began >= OTHERS_S:
                raise self._stays()
            yield Pause(_LOOK_S, 0.0)

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """No other process runs a cycle while the block runs; raises as ``enter``."""
        try:
            if not self._right.take(OTHERS_S):
                raise self._stays()
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Idempotent."""
        self._right.give_back()

    def _stays(self) -> DatabaseLockedError:
        who = self._right.holder() or "another process"
        return DatabaseLockedError(
            f"a sync cycle of {who} on {self._database.where} has not ended within {OTHERS_S:g} s; "
            "sync again when it has"
        )


__all__ = ["OTHERS_S", "Others"]
