"""Large files that have to be read before they are opened, because they may be damaged.

That takes seconds for each GiB, and happens where the server ended without closing: then with every
database that was open. So it is done on a thread of its own, one file at a time, and who asks for
such a database meanwhile gets the answer to come again; all others are served as ever.

Not here: what is looked for (``storage``).
"""

from __future__ import annotations

import os
import threading
from typing import Final

from entidb.errors import ServerBusyError
from entidb.events import SafeEvent, Thread
from entidb.server.cores import run_anywhere
from entidb.storage import opening

#: Files up to here are read while they are opened, in less than a tenth of a second.
AT_ONCE_BYTES: Final = 8 * 2**20
_RETRY_S: Final = 1.0


class CheckingError(ServerBusyError):
    """The database is being read; ``done`` is set when that is over."""

    def __init__(self, done: threading.Event) -> None:
        super().__init__(
            "the database was not closed and is being checked before it is opened",
            retry_after=_RETRY_S,
        )
        self.done = done


class FileChecks:
    """The files that are being read. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._running: dict[str, threading.Event] = {}
        #: Read a moment ago: opened now, whatever came of it.
        self._over: set[str] = set()

    def require(self, path: str | os.PathLike[str]) -> None:
        """Return if the database at ``path`` can be opened at once. Raises ``CheckingError``, and
        ``ServerBusyError`` where it cannot be checked at the moment."""
        where = os.fspath(path)
        with self._lock:
            if where in self._over:
                self._over.discard(where)
                return
            done = self._running.get(where)
        if done is None:
            if opening.doubtful_bytes(where) <= AT_ONCE_BYTES:
                return
            done = self._start(where)
        raise CheckingError(done)

    def _start(self, where: str) -> threading.Event:
        with self._lock:
            if where in self._running:
                return self._running[where]
            done = self._running[where] = SafeEvent()
        # The end of the process does not wait for this: nothing is changed.
        thread = Thread(target=self._check, args=(where, done), name="entidb-checker", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            with self._lock:
                self._running.pop(where, None)
            done.set()  # who waits already asks again
            raise ServerBusyError(
                "the server has no thread to check a database at the moment", retry_after=_RETRY_S
            ) from error
        return done

    def _check(self, where: str, done: threading.Event) -> None:
        run_anywhere()
        try:
            with self._one_at_a_time:
                opening.look(where)
        finally:
            with self._lock:
                self._running.pop(where, None)
                self._over.add(where)
            done.set()


__all__ = ["AT_ONCE_BYTES", "CheckingError", "FileChecks"]
