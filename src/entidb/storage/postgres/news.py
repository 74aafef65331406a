"""What the nodes of a PostgreSQL database tell each other: that there is something new in a store.

The truth is the mark of the store, which is read for many stores in one statement. A notification
only says that looking is worth while. It is sent after the commit, by a transaction of its own:
inside one it would make all commits of the server wait for each other. Nothing is durable that is
done here, and so nothing of it waits for a disk or a standby.

Not here: who wants to know (``server.news``).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from entidb.errors import StorageUnreachableError
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.line import Line
from entidb.storage.postgres.node import Node
from entidb.storage.postgres.snapshot import proved

_CHANNEL: Final = "entidb_news"


class PostgresNews:
    """One thread uses it, on one connection, which is made again after a failure; but for ``wake``,
    which any thread may call. ``close`` when it is over."""

    def __init__(self, node: Callable[[], Node]) -> None:
        self._node = node
        self._line: Line | None = None
        self._heard: set[str] = set()
        #: Held while the pipe is used by ``wake``: its number may be another file's afterwards.
        self._waking = threading.Lock()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)

    def wake(self) -> None:
        """Have ``wait`` return. Of several calls one is enough."""
        with self._waking:
            if self._wake >= 0:
                with contextlib.suppress(BlockingIOError):  # it is full of them
                    os.write(self._wake, b"\0")

    def wait(self, timeout_s: float) -> set[str]:
        """Wait until other nodes have told something, at most ``timeout_s``, or until ``wake``; the
        names of the stores. Raises ``StorageError``; the next call connects again."""
        with self._failing("waiting for news") as line:
            if not self._heard:
                look = select.poll()
                look.register(line.fileno(), select.POLLIN)
                look.register(self._woken, select.POLLIN)
                ready = {number for number, _ in look.poll(max(0.0, timeout_s) * 1000)}
                if self._woken in ready:
                    os.read(self._woken, 65536)
                if line.fileno() in ready:
                    self._take_in(line)
        heard, self._heard = self._heard, set()
        return heard

    def _take_in(self, line: Line) -> None:
        with line.lock:
            line.pgconn.consume_input()
            while (found := line.pgconn.notifies()) is not None:
                self._note(found.extra.decode(), found.be_pid)

    def _note(self, name: str, process: int) -> None:
        if self._line is None or process != self._line.info.backend_pid:
            self._heard.add(name)

    def tell(self, names: Collection[str]) -> None:
        """Tell the other nodes that there is something new in these stores. Raises
        ``StorageError``."""
        with self._failing("telling other nodes of news") as line:
            line.execute(
                "SELECT pg_notify(%s, name) FROM unnest(%s::text[]) name", (_CHANNEL, list(names))
            )

    def marks(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        """Of the stores that there are of these: the number, which is another one where another
        store has the name now, and the mark. Raises ``StorageError``."""
        with self._failing("looking for news") as line:
            rows = line.execute(
                "SELECT name, id, mark FROM entidb_store WHERE name = ANY(%s)", (list(names),)
            ).fetchall()
        return {name: (number, mark) for name, number, mark in rows}

    def value(self, number: int, key: bytes) -> bytes | None:
        """The value at ``key`` of a store by its number, no older than a mark that was read before.
        Raises ``StorageError``."""
        with self._failing("reading news") as line, line.cursor(binary=True) as cursor:
            row = cursor.execute(
                "SELECT v FROM entidb_kv WHERE store = %s AND k = %b", (number, key)
            ).fetchone()
        return None if row is None else proved(key, bytes(row[0]))

    @contextmanager
    def _failing(self, doing: str) -> Iterator[Line]:
        node = self._node()
        try:
            yield self._line or self._begin(node)
        except (psycopg.Error, StorageUnreachableError) as error:
            self._end()
            node.note(error)
            raise storage_error(error, doing) from error

    def _begin(self, node: Node) -> Line:
        self._line = line = node.connect()
        line.execute("SET synchronous_commit = off")
        line.add_notify_handler(lambda found: self._note(found.payload, found.pid))
        line.execute(f"LISTEN {_CHANNEL}".encode())
        return line

    def _end(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def close(self) -> None:
        """Idempotent; when the thread that used it has ended."""
        self._end()
        with self._waking:
            if self._wake >= 0:
                os.close(self._wake)
                os.close(self._woken)
                self._wake = -1


__all__ = ["PostgresNews"]
