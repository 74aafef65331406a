"""Builds indexes in the background, one bounded commit after the other."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Final

from entidb.db.core import Core
from entidb.db.index_care import build_on
from entidb.errors import CorruptionError, DatabaseClosedError, DatabaseMovedError, EntiDBError
from entidb.events import SafeEvent, Thread

_log = logging.getLogger("entidb.db")
#: A breath between two commits: who waits for the turn gets it.
_PAUSE_S: Final = 0.001
#: Seconds before it goes on after an error, twice as many after each further one.
_AGAIN_S: Final = 0.5
_AGAIN_S_MAX: Final = 60.0


class IndexBuilder:
    """The thread that builds what a database has to build. It ends when nothing is left, and begins
    again when it is asked to."""

    def __init__(self, database: Core) -> None:
        # A database without other references is not kept by its builder.
        self._database = weakref.ref(database)
        self._lock = threading.Lock()
        self._ended = SafeEvent()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Build in the background, unless that is under way."""
        with self._lock:
            if self._ended.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            thread = Thread(target=self._run, name="entidb-index-builder", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                # The next declaration, or whoever waits for it, goes on.
                _log.warning("there is no thread to build an index: %s", error)
                return
            self._thread = thread

    def end(self) -> None:
        """No commit begins any more; waits for one that is under way. A build goes on when the
        database is opened the next time."""
        self._ended.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        pause_s, said = _PAUSE_S, ""
        while not self._ended.wait(pause_s):
            database = self._database()
            try:
                if database is None or not build_on(database, self._ended.is_set):
                    return
                pause_s, said = _PAUSE_S, ""
            except (DatabaseClosedError, CorruptionError, DatabaseMovedError):
                return
            except EntiDBError as error:
                if error.code == "busy":
                    continue
                # Such as a full disk, for as long as that lasts.
                pause_s = min(max(_AGAIN_S, 2 * pause_s), _AGAIN_S_MAX)
                if str(error) != said:
                    _log.warning("the build of an index is held up: %s", error)
                said = str(error)
            finally:
                del database


__all__ = ["IndexBuilder"]
