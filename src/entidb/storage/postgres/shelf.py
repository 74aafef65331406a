"""The stores in one PostgreSQL database, by name: which there are, how large they are, and giving
one another name.

A store that is open knows the name by which it was opened: with another name it is another store to
whoever has it open, and every read, mark and commit of it says ``DatabaseMovedError``. So nobody
has to be asked to close one before its name is changed.

Not here: what is in a store (``store``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from psycopg import errors

from entidb.errors import StorageError
from entidb.storage.postgres.failures import as_ours
from entidb.storage.postgres.line import Line
from entidb.storage.postgres.node import CONNECTIONS_MAX, lease
from entidb.storage.postgres.schema import Tables

#: All stores together are measured up to this size, and estimated from the statistics of
#: PostgreSQL above it.
_MEASURED_BYTES: Final = 32 << 20


class Shelf:
    """Keeps the connections of this process to ``address`` until ``close``. Thread-safe."""

    def __init__(
        self,
        address: str,
        connections_max: int = CONNECTIONS_MAX,
        *,
        read_only: bool = False,
    ) -> None:
        """With ``read_only`` no tables are made. Raises as ``PostgresStorage.open``."""
        use = Tables.LOOK if read_only else Tables.MAKE
        self._lease = lease(address, connections_max, use)
        self.node: Final = self._lease.node
        self.where: Final = self.node.where

    def names(self) -> list[str]:
        with self.connection(f"listing the stores at {self.where}") as connection:
            rows = connection.execute("SELECT name FROM entidb_store ORDER BY name").fetchall()
        return [name for (name,) in rows]

    def holds(self, name: str) -> bool:
        with self.connection(f"looking for a store at {self.where}") as connection:
            found = connection.execute("SELECT 1 FROM entidb_store WHERE name = %s", (name,))
            return found.fetchone() is not None

    def sizes(self, only: str | None = None) -> dict[str, int]:
        """About how many bytes each store takes, or the one that is named."""
        with self.connection(f"measuring the stores at {self.where}") as connection:
            row = connection.execute(_ALL_BYTES).fetchone()
            measured = row is None or row[0] <= _MEASURED_BYTES
            rows = connection.execute(_MEASURED if measured else _ESTIMATED, (only, only))
            return {name: int(size) for name, size in rows.fetchall()}

    def rename(self, name: str, to: str) -> bool:
        """Whether there was such a store. Raises ``StorageError`` (exists) if there is one ``to``.
        Whoever has it open finds it gone."""
        with self.connection(f"renaming a store at {self.where}") as connection:
            try:
                done = connection.execute(_RENAME, (to, name))
            except errors.UniqueViolation as error:
                raise StorageError(
                    f"there is a store {to!r} at {self.where} already", code="exists"
                ) from error
            return done.rowcount > 0

    def replace(self, name: str, made: str, aside: str | None) -> None:
        """The store ``made`` gets the name ``name``, and the one that had it the name ``aside``, in
        one commit; None: there is none. Raises ``StorageError`` if ``made`` is not there, and then
        changes nothing."""
        doing = f"renaming a store at {self.where}"
        with self.connection(doing) as connection, connection.transaction():
            if aside is not None:
                connection.execute(_RENAME, (aside, name))
            if not connection.execute(_RENAME, (name, made)).rowcount:
                raise StorageError(f"there is no store {made!r} at {self.where}", code="no_store")

    def remove(self, name: str) -> bool:
        """Remove a store for good; whether there was one."""
        doing = f"removing a store at {self.where}"
        with self.connection(doing) as connection, connection.transaction():
            row = connection.execute(
                "DELETE FROM entidb_store WHERE name = %s RETURNING id", (name,)
            ).fetchone()
            if row is not None:
                connection.execute("DELETE FROM entidb_kv WHERE store = %s", row)
        return row is not None

    def check(self) -> None:
        """Raises ``StorageError`` if nothing can be written there at the moment. It is a commit of
        one row, so that it waits for the standby as every commit does."""
        with self.connection(f"writing to {self.where}") as connection:
            self.node.bar(connection)

    def close(self) -> None:
        self._lease.close()

    @contextmanager
    def connection(self, doing: str) -> Iterator[Line]:
        """One for a statement or two; ``doing`` is for messages."""
        node = self.node
        with as_ours(doing):
            connection = node.lend(node.reading)
            try:
                yield connection
            except Exception as error:
                node.note(error)
                raise
            finally:
                node.take_back(node.reading, connection)


#: The mark moves, for those who wait for another one.
_RENAME: Final = (
    "UPDATE entidb_store SET name = %s, epoch = epoch + 1, mark = mark + 1 WHERE name = %s"
)
_ALL_BYTES: Final = (
    "SELECT coalesce(sum(pg_table_size(inhrelid)), 0) FROM pg_inherits "
    "WHERE inhparent = 'entidb_kv'::regclass"
)
_MEASURED: Final = (
    "SELECT s.name, coalesce((SELECT sum(length(k) + length(v)) FROM entidb_kv WHERE store = s.id),"
    " 0) FROM entidb_store s WHERE %s::text IS NULL OR s.name = %s"
)
#: A part of the table as large as its share of the rows, as ANALYZE has found it.
_ESTIMATED: Final = (
    "SELECT s.name, coalesce((SELECT max(pg_table_size(i.inhrelid) * f.share) FROM pg_inherits i "
    "JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_stats t ON t.tablename = c.relname AND "
    "t.schemaname = c.relnamespace::regnamespace::text AND t.attname = 'store', "
    "unnest(t.most_common_vals::text::integer[], t.most_common_freqs) AS f(store, share) "
    "WHERE i.inhparent = 'entidb_kv'::regclass AND f.store = s.id), 0) "
    "FROM entidb_store s WHERE %s::text IS NULL OR s.name = %s"
)

__all__ = ["Shelf"]
