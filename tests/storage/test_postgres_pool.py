"""Connections of a node are lent to one at a time. No PostgreSQL is asked here."""

from __future__ import annotations

import socket
import threading

import pytest

pytest.importorskip("psycopg")

from entidb.storage.postgres.line import Line
from entidb.storage.postgres.pool import Pool


class Connection:
    """As much of a connection as a pool looks at."""

    def __init__(self) -> None:
        self._mine, self._server = socket.socketpair()
        self.closed = False
        self.kept: object = None

    def settle(self) -> None:
        """Nothing was left to do."""

    def is_free(self) -> bool:
        return not self.closed

    def fileno(self) -> int:
        return self._mine.fileno()

    def close(self) -> None:
        self.closed = True
        self._mine.close()
        self._server.close()


def connect() -> Line:
    return Connection()  # type: ignore[return-value]


class Overtaking:
    """A lock of a pool; whoever leaves it with an idle connection there is overtaken at once."""

    def __init__(self, pool: Pool) -> None:
        self._lock, self._pool = pool._lock, pool
        self.lent: list[Line] = []

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        there = bool(self._pool._idle) and not self.lent
        self._lock.release()
        if there:
            thread = threading.Thread(target=lambda: self.lent.append(self._pool.getconn()))
            thread.start()
            thread.join(10)


def test_who_gives_a_connection_back_does_not_close_it_under_the_next_one() -> None:
    """Who has it next may have it before the one who gave it back is done: with it the turn would
    go, and what was decided in it would be refused."""
    pool = Pool(connect, 1, 5.0)
    line = pool.getconn()
    pool._lock = overtaking = Overtaking(pool)  # type: ignore[assignment]
    pool.putconn(line)
    assert overtaking.lent == [line]
    assert not line.closed
    pool.putconn(line)
    pool.close()
    assert line.closed
