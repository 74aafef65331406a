"""Whether the server still answers, and still leads, while somebody waits for it.

A server whose machine is gone ends no connection, and one that is frozen keeps them all open:
whoever waits for an answer would wait for as long as that lasts. No statement has a time limit, for
a commit may rightly wait for its standby. So one connection more asks a small question each second
or two, as long as there are others; when there is no answer, all of them are cut, and whoever
waited hears of it. That is sooner than a server is replaced that says nothing, so that what it says
when it goes on reaches nobody.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import psycopg

from entidb.events import SafeEvent, Thread
from entidb.storage.postgres.reaching import Place, ask, place_of

logger = logging.getLogger("entidb.storage")

#: Seconds between two questions, and until an answer is not waited for any more.
_EVERY_S: Final = 1.5
_ANSWER_S: Final = 4.0
_QUESTION: Final = b"SELECT pg_is_in_recovery()"

Connection = psycopg.Connection[Any]


class Heartbeat:
    """See the module. Thread-safe; its thread ends when there is no connection any more."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        is_watched: Callable[[], bool],
        lost: Callable[[Place | None], None],
    ) -> None:
        """``lost`` is called, on the pulse's thread, with the server that does not answer or leads
        no more, if it is known which."""
        self._connect = connect
        self._is_watched = is_watched
        self._lost = lost
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = SafeEvent()

    def begin(self) -> None:
        """Somebody has a connection now."""
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = Thread(target=self._beat, name="entidb-pulse", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:  # the next who has a connection tries again
                        logger.warning("there is no thread to ask PostgreSQL: %s", error)
                        return
                    self._thread = thread

    def close(self) -> None:
        self._stop.set()

    def _beat(self) -> None:
        connection: Connection | None = None
        while not self._stop.wait(_EVERY_S):
            with self._lock:
                if not self._is_watched():
                    self._thread = None
                    break
            try:
                connection = self._feel(connection)
            except Exception:
                # Without this thread an outage would be waited for without an end.
                logger.exception("asking PostgreSQL whether it answers failed")
                connection = None
        if connection is not None:
            connection.close()

    def _feel(self, connection: Connection | None) -> Connection | None:
        place: Place | None = None
        try:
            if connection is None:
                connection = self._connect()
            place = place_of(connection)
            if ask(connection, _QUESTION, _ANSWER_S) == b"f":
                return connection
        except psycopg.Error as error:
            # One that speaks is there: it may only have no connection left for this question.
            if error.sqlstate is not None and connection is None:
                return None
        if connection is not None:
            connection.close()
        self._lost(place)
        return None


__all__ = ["Heartbeat"]
