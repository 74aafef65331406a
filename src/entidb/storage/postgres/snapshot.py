"""Reading: one transaction, repeatable read, on a connection that is the snapshot's until it ends.

Each value is proved by its checksum before it is returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final
from zlib import crc32

import psycopg

from entidb.errors import CorruptionError, DatabaseClosedError, StorageError
from entidb.storage.base import KEY_BYTES_MAX
from entidb.storage.checksums import RESIDUE
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.opened import Opened
from entidb.storage.postgres.schema import Connection

#: Keys that one statement looks for.
_KEYS_AT_ONCE: Final = 1000
#: Connections that may have died unnoticed before one that works.
_TRIES: Final = 20


class PostgresSnapshot:
    """See the module."""

    def __init__(self, store: Opened) -> None:
        self._store = store
        self._connection: Connection | None = None
        self._connection, self.mark = _begin(store)
        store.readers.add(id(self))

    def get(self, key: bytes) -> bytes | None:
        rows = self.rows("SELECT k, v FROM entidb_kv WHERE store = %s AND k = %s", key)
        return _proved(*rows[0]) if rows else None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found: dict[bytes, bytes] = {}
        wanted = [*dict.fromkeys(keys)]
        for first in range(0, len(wanted), _KEYS_AT_ONCE):
            part = wanted[first : first + _KEYS_AT_ONCE]
            rows = self.rows(
                "SELECT kv.k, kv.v FROM entidb_kv kv WHERE kv.store = %s AND kv.k = ANY(%s)", part
            )
            found |= {key: _proved(key, stored) for key, stored in rows}
        return [found.get(key) for key in keys]

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        rows = self._range("k, v", start, stop, limit, reverse)
        return [(key, _proved(key, stored)) for key, stored in rows]

    def scan_keys(
        self,
        start: bytes,
        stop: bytes,
        *,
        limit: int | None = None,
        reverse: bool = False,
        proved: bool = False,
    ) -> list[bytes]:
        if proved:
            return [key for key, _ in self.scan(start, stop, limit=limit, reverse=reverse)]
        return [key for (key,) in self._range("k", start, stop, limit, reverse)]

    def _range(
        self, columns: str, start: bytes, stop: bytes, limit: int | None, reverse: bool
    ) -> list[tuple[Any, ...]]:
        order = "DESC" if reverse else "ASC"
        most = "" if limit is None else f" LIMIT {max(0, int(limit))}"
        return self.rows(
            f"SELECT {columns} FROM entidb_kv WHERE store = %s AND k >= %s AND k < %s "
            f"ORDER BY k {order}{most}",
            start,
            stop,
        )

    def rows(self, statement: str, *rest: Any) -> list[tuple[Any, ...]]:
        """What ``statement`` finds in this state, as it is stored; its first value is the store."""
        connection, store = self._open(), self._store
        try:
            with connection.cursor(binary=True) as cursor:
                return cursor.execute(statement.encode(), (store.number, *rest)).fetchall()
        except psycopg.Error as error:
            raise store.failure(error, f"reading {store.path}") from error

    def _open(self) -> Connection:
        if self._connection is None:
            raise DatabaseClosedError("this snapshot is closed; take a new one")
        self._store.check_open()
        return self._connection

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        store = self._store
        store.readers.discard(id(self))
        store.node.take_back(store.node.reading, _ended(connection))

    def __enter__(self) -> PostgresSnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # interrupted while it was made
            connection, self._connection = self._connection, None
            if connection is not None:
                self._store.readers.discard(id(self))
                self._store.node.forgotten.append(connection)


def _ended(connection: Connection) -> Connection:
    """The pool would do it too, on a thread of its own, and say so in the log."""
    try:
        connection.execute("ROLLBACK")
    except psycopg.Error:
        connection.close()
    return connection


def _begin(store: Opened) -> tuple[Connection, int]:
    """A connection inside a transaction, whose state is that of the mark it has read: the first
    statement decides which. An idle connection may have died; one that did says so at once."""
    node, failed = store.node, None
    for _ in range(_TRIES):
        try:
            connection = node.lend(node.reading)
        except psycopg.Error as error:
            raise store.failure(error, f"reading {store.path}") from error
        try:
            cursor = connection.execute(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; "
                f"SELECT mark FROM entidb_store WHERE id = {store.number:d}".encode()
            )
            cursor.nextset()
            row = cursor.fetchone()
            if row is None:
                raise StorageError(f"{store.path} was removed; nothing of it can be read")
            return connection, int(row[0])
        except psycopg.Error as error:
            node.take_back(node.reading, connection)
            if not connection.closed:
                raise store.failure(error, f"reading {store.path}") from error
            failed = error
        except BaseException:
            node.take_back(node.reading, _ended(connection))
            raise
    assert failed is not None
    raise storage_error(failed, f"reading {store.path}") from failed


def _proved(key: bytes, stored: bytes) -> bytes:
    if crc32(stored, crc32(key)) != RESIDUE:
        raise CorruptionError(
            f"the record at key {key.hex()} fails its checksum; it was not returned. Restore a "
            "backup of the PostgreSQL database"
        )
    return stored[:-4]


#: Above every key.
ABOVE_ALL: Final = b"\xff" * (KEY_BYTES_MAX + 1)

__all__ = ["ABOVE_ALL", "PostgresSnapshot"]
