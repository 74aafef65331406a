"""A store in a PostgreSQL database, which any number of nodes may have open.

A commit is one transaction of PostgreSQL on the connection that has the turn: it moves the mark of
the store, compares it with the one that the commit was decided on, writes the records, and ends.
What is read in a snapshot is read with its mark, in one transaction. Nothing is kept in memory.

A COMMIT is never given up: PostgreSQL answers a commit that was cancelled while it waited for its
synchronous standby with *success* and a warning. That warning, and a connection that ends before
the answer, leave the outcome open: ``CommitUnknownError`` closes the store, and opening it again
waits for the standby before anything is read (``node``).

Not here: connections (``node``), tables (``schema``), reading (``snapshot``), turns (``turn``).
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final
from zlib import crc32

import psycopg
from psycopg import pq

from entidb.errors import (
    CommitStaleError,
    CommitUnknownError,
    ConfigError,
    StorageError,
)
from entidb.storage.base import Batch, StorageInfo
from entidb.storage.checksums import RESIDUE, stage
from entidb.storage.opening import open_storage
from entidb.storage.partial import Partial
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.node import CONNECTIONS_MAX, Lease, lease
from entidb.storage.postgres.opened import Opened
from entidb.storage.postgres.schema import Connection
from entidb.storage.postgres.snapshot import ABOVE_ALL, PostgresSnapshot
from entidb.storage.postgres.turn import PostgresRight, PostgresTurn

#: Records and bytes of one statement.
_ROWS_AT_ONCE: Final = 2000
_BYTES_AT_ONCE: Final = 8 << 20
#: Records that verify and backup read at once.
_READ_AT_ONCE: Final = 5000
#: What PostgreSQL says with a commit that it was made to stop waiting for.
_CANCELLED: Final = "01000"

_PUT: Final = (
    "INSERT INTO entidb_kv (store, k, v) SELECT %s, * FROM unnest(%b::bytea[], %b::bytea[]) "
    "ON CONFLICT (store, k) DO UPDATE SET v = excluded.v"
)


class PostgresStorage:
    """An open store. Thread-safe, but for ``commit`` and the turn, which one thread uses at a
    time."""

    shared = True

    def __init__(self, lease: Lease, name: str, number: int) -> None:
        """Programs use ``open``. ``lease`` is the store's from now on."""
        self.opened = Opened(lease, name, number)
        self.turn = PostgresTurn(self.opened)
        #: A store that is lost gives back what it has.
        self._lost = weakref.finalize(self, lease.close_later)
        self._lost.atexit = False

    @property
    def name(self) -> str:
        return self.opened.name

    @property
    def path(self) -> str:
        """For messages: the address without its password, and the name."""
        return self.opened.path

    @classmethod
    def open(
        cls,
        address: str,
        name: str,
        *,
        create: bool = True,
        connections_max: int = CONNECTIONS_MAX,
    ) -> PostgresStorage:
        """Open the store ``name`` in the PostgreSQL database at ``address``, a URL or what libpq
        calls a connection string; it is made if it is not there and ``create``.

        Raises ``ConfigError`` for an address or a name that cannot be, ``StorageError`` if the
        server cannot be reached or may lose commits, or there is no such store, ``FormatError``
        for tables of a newer program."""
        if not name or "\0" in name:
            raise ConfigError("a store has a name, without the character NUL")
        leased = lease(address, connections_max)
        where = leased.node.where
        try:
            number = _number(leased.node.connect, name, create)
            if number is None:
                raise StorageError(f"there is no store {name!r} at {where}")
            return cls(leased, name, number)
        except BaseException as error:
            leased.close()
            if isinstance(error, psycopg.Error):
                raise storage_error(error, f"opening {where}") from error
            raise

    # ---- reading

    def snapshot(self) -> PostgresSnapshot:
        self.opened.check_open()
        return PostgresSnapshot(self.opened)

    def mark(self) -> int:
        self.opened.check_open()
        node = self.opened.node
        return int(self._on(node.reading, "SELECT mark FROM entidb_store WHERE id = %s", "reading"))

    def wait(self, mark: int, timeout_s: float) -> bool:
        if self.mark() != mark:
            return True
        opened = self.opened
        return opened.node.marks.wait(opened.number, mark, timeout_s) or self.mark() != mark

    # ---- committing

    def claim(self, name: str) -> PostgresRight:
        return PostgresRight(self.opened, name)

    def commit(self, batch: Batch, after: int | None = None) -> int:
        self.opened.check_open()
        puts, deletes = stage(batch)
        if self.turn.mine:
            return self._commit(puts, deletes, after)
        try:
            if not self.turn.take():
                raise StorageError(f"it is not the turn of this opener of {self.path}")
            return self._commit(puts, deletes, after)
        finally:
            self.turn.give_back()

    def _commit(
        self, puts: list[tuple[bytes, bytes]], deletes: list[bytes], after: int | None
    ) -> int:
        connection = self.turn.connection
        assert connection is not None
        try:
            mark = self._begin(connection, after, bool(puts or deletes))
            self._write(connection, puts, deletes)
        except psycopg.Error as error:
            self._undo(connection)
            raise self.opened.failure(error, f"writing to {self.path}") from error
        except BaseException:
            self._undo(connection)
            raise
        self._end(connection)
        self.opened.node.marks.tell(self.opened.number, mark)
        return mark

    def _begin(self, connection: Connection, after: int | None, changes: bool) -> int:
        """Inside a transaction, which holds the row of the store until it ends; the mark that it
        makes."""
        step = 1 if changes else 0
        cursor = connection.execute(
            f"BEGIN; UPDATE entidb_store SET mark = mark + {step} "
            f"WHERE id = {self.opened.number:d} RETURNING mark".encode()
        )
        cursor.nextset()
        row = cursor.fetchone()
        if row is None:
            raise StorageError(f"{self.path} was removed; nothing was written")
        mark = int(row[0])
        if after is not None and mark - step != after:
            raise CommitStaleError.of(self.path, after, mark - step)
        return mark

    def _write(
        self, connection: Connection, puts: list[tuple[bytes, bytes]], deletes: list[bytes]
    ) -> None:
        for first in range(0, len(deletes), _ROWS_AT_ONCE):
            part = deletes[first : first + _ROWS_AT_ONCE]
            connection.execute(
                "DELETE FROM entidb_kv WHERE store = %s AND k = ANY(%s)", (self.opened.number, part)
            )
        for rows in _in_parts(puts):
            keys, values = [key for key, _ in rows], [value for _, value in rows]
            connection.execute(_PUT, (self.opened.number, keys, values))

    def _undo(self, connection: Connection) -> None:
        """After a failure before the COMMIT, which PostgreSQL undoes whatever comes next."""
        try:
            if not connection.closed:
                connection.execute("ROLLBACK")
        except psycopg.Error:
            connection.close()

    def _end(self, connection: Connection) -> None:
        """The COMMIT, in one call of libpq that no signal handler of Python interrupts: psycopg
        would cancel it."""
        said: list[str | None] = []

        def listen(notice: psycopg.errors.Diagnostic) -> None:
            said.append(notice.sqlstate)

        connection.add_notice_handler(listen)
        try:
            result = connection.pgconn.exec_(b"COMMIT")
            status = result.status
            ended = result.command_status
        finally:
            connection.remove_notice_handler(listen)
        if status == pq.ExecStatus.COMMAND_OK and ended == b"COMMIT" and _CANCELLED not in said:
            return
        lost = connection.pgconn.status != pq.ConnStatus.OK
        if not lost and _CANCELLED not in said:
            # It has answered, and not with a commit: nothing was changed.
            self._undo(connection)
            raise StorageError(f"committing to {self.path}: PostgreSQL refused it")
        self._close_now(connection)
        raise CommitUnknownError(
            f"the connection to {self.path} ended before its answer, or PostgreSQL stopped waiting "
            "for its standby: open it again to find out whether the commit is there"
        )

    def _close_now(self, connection: Connection) -> None:
        connection.close()
        self.close()

    # ---- care

    def verify(self) -> Iterator[str]:
        with self.snapshot() as snapshot:
            last = b""
            while True:
                rows = snapshot.rows(
                    "SELECT k, v FROM entidb_kv WHERE store = %s AND k > %s ORDER BY k "
                    f"LIMIT {_READ_AT_ONCE}",
                    last,
                )
                for key, stored in rows:
                    if crc32(stored, crc32(key)) != RESIDUE:
                        yield f"the record at key {key.hex()} fails its checksum"
                if len(rows) < _READ_AT_ONCE:
                    return
                last = rows[-1][0]

    def compact(self) -> None:
        """Does nothing: PostgreSQL uses again what is free (autovacuum)."""
        self.opened.check_open()

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        """A copy in files: a store on disk in the new directory ``path``. PostgreSQL's own backups
        are the better ones of a whole server."""
        where = os.path.abspath(os.fspath(path))
        if os.path.lexists(where):
            raise StorageError(f"{where} exists already; name a new directory")
        try:
            with Partial(where, "backup") as partial:
                self._copy_to(partial.path, changes)
                if os.path.lexists(where):
                    raise StorageError(f"{where} exists already; name a new directory")
                partial.finish()
        except OSError as error:
            raise StorageError(f"writing the backup {where}: {error.strerror}") from error

    def _copy_to(self, path: str, changes: Iterable[tuple[bytes, bytes | None]]) -> None:
        with contextlib.closing(open_storage(path)) as copy, self.snapshot() as snapshot:
            start = b""
            while rows := snapshot.scan(start, ABOVE_ALL, limit=_READ_AT_ONCE):
                copy.commit(dict(rows))
                start = rows[-1][0] + b"\0"
            copy.commit(dict(changes))

    def info(self) -> StorageInfo:
        self.opened.check_open()
        self.opened.node.reclaim()
        with self.snapshot() as snapshot:
            ((records, used),) = snapshot.rows(
                "SELECT count(*), coalesce(sum(length(k) + length(v)), 0)::bigint FROM entidb_kv "
                "WHERE store = %s"
            )
        return StorageInfo("postgres", self.path, used, used, 0, records, len(self.opened.readers))

    def close(self) -> None:
        self.opened.closed = True
        self.opened.lease.close()

    def _on(self, pool: Any, statement: str, doing: str) -> Any:
        """The one value that a statement finds, on a connection for a moment."""
        node = self.opened.node
        try:
            connection = node.lend(pool)
            try:
                row = connection.execute(statement.encode(), (self.opened.number,)).fetchone()
            finally:
                node.take_back(pool, connection)
        except psycopg.Error as error:
            raise self.opened.failure(error, f"{doing} {self.path}") from error
        if row is None:
            raise StorageError(f"{self.path} was removed")
        return row[0]


def _number(connect: Any, name: str, create: bool) -> int | None:
    """Which store it is. Opening is a commit (``epoch``), so that it waits for the standby."""
    with connect() as connection:
        for _ in range(2):
            row = connection.execute(
                "UPDATE entidb_store SET epoch = epoch + 1 WHERE name = %s RETURNING id", (name,)
            ).fetchone()
            if row is not None or not create:
                return None if row is None else int(row[0])
            connection.execute(
                "INSERT INTO entidb_store (name) VALUES (%s) ON CONFLICT DO NOTHING", (name,)
            )
    raise StorageError(f"the store {name!r} was removed while it was opened")


def _in_parts(puts: list[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    part: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in puts:
        part.append((key, value))
        size += len(value)
        if len(part) >= _ROWS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


__all__ = ["PostgresStorage"]
