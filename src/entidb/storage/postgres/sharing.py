"""What the nodes of one server have together beside the stores: small records, the lines of a
journal, and when something was done last.

Everything is one statement that commits by itself, on a connection that is for this alone: no
reader of a store keeps a decision waiting. A record is written by who has read what it replaces.

Not here: what is in a record or a line, and which nodes there are (``company``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import psycopg

from entidb.errors import CommitUnknownError, DatabaseLockedError, StorageError
from entidb.storage.postgres.failures import as_ours
from entidb.storage.postgres.node import CONNECTIONS_MAX, WAIT_S, Node, lease
from entidb.storage.postgres.schema import Connection, Tables

#: What PostgreSQL says with a commit that it was made to stop waiting for.
_CANCELLED: Final = "01000"
#: Writers who were quicker, one after the other, before a change of a record is given up.
_TRIES: Final = 50
#: Lines that are read at once.
_LINES_AT_ONCE: Final = 1000


class OneConnection:
    """A connection of one process, made anew when it is lost. Thread-safe: one statement at a
    time."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._doubtful = False

    def run(self, doing: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """What ``statement`` finds, committed. Raises ``StorageError``, and
        ``CommitUnknownError`` where it is open whether a change was made for good."""
        with self.alone(), as_ours(doing):
            connection = self._alive()
            try:
                with connection.cursor(binary=True) as cursor:
                    cursor.execute(statement.encode(), values)
                    found = cursor.fetchall() if cursor.description else []
            except psycopg.Error as error:
                self.node.note(error)
                self.drop()
                raise
            if self._doubtful:
                self.drop()
                raise CommitUnknownError(
                    f"{doing}: PostgreSQL stopped waiting for its standby, and may forget it; "
                    "look what came of it, and do it again"
                )
            return found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread uses it in the block."""
        if not self._lock.acquire(timeout=WAIT_S):
            raise StorageError(
                f"another thread has waited for an answer of {self.node.where} for {WAIT_S:g} s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _alive(self) -> Connection:
        """The connection, after a look at it: a statement on one that was lost unnoticed would
        leave it open what became of it."""
        self.node.check_process()
        if self._connection is not None:
            try:
                self._connection.execute("SELECT 1")
            except psycopg.Error:
                self.drop()
        if self._connection is None:
            made = self.node.connect()
            made.add_notice_handler(self._listen)
            self._connection, self._doubtful = made, False
        return self._connection

    def _listen(self, notice: psycopg.errors.Diagnostic) -> None:
        self._doubtful = self._doubtful or notice.sqlstate == _CANCELLED

    def drop(self) -> None:
        """Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class SharedTables:
    """See the module. ``where`` is the address without its password."""

    def __init__(
        self, address: str, connections_max: int = CONNECTIONS_MAX, *, read_only: bool = False
    ) -> None:
        """With ``read_only`` no tables are made, and there are no records in those of an older
        format. Raises ``ConfigError``, ``StorageError``, ``FormatError``."""
        self._lease = lease(address, connections_max, Tables.LOOK if read_only else Tables.MAKE)
        self.node: Final = self._lease.node
        self.where: Final = self.node.where
        self.line: Final = OneConnection(self.node)

    @property
    def has_records(self) -> bool:
        """Whether the tables are of a format that has anything but stores."""
        return self.node.format >= 2

    def close(self) -> None:
        """Idempotent."""
        self.line.drop()
        self._lease.close()

    def check(self) -> None:
        """Raises ``StorageError`` if nothing can be written at the moment."""
        self.line.run(f"writing to {self.where}", "UPDATE entidb_barrier SET passed = passed + 1")

    def user(self) -> str:
        """Who is connected."""
        return str(self.line.run(f"asking {self.where}", "SELECT session_user::text")[0][0])

    # ------------------------------------------------------------ records

    def revision(self, name: str) -> int:
        """Of a record; 0 where it is not there. It has another one after each change."""
        rows = self.line.run(
            f"looking at {name} in {self.where}",
            "SELECT revision FROM entidb_page WHERE name = %s",
            name,
        )
        return int(rows[0][0]) if rows else 0

    def read(self, name: str) -> bytes | None:
        return self._read(name)[1]

    def _read(self, name: str) -> tuple[int, bytes | None]:
        if not self.has_records:
            return 0, None
        rows = self.line.run(
            f"reading {name} in {self.where}",
            "SELECT revision, content FROM entidb_page WHERE name = %s",
            name,
        )
        return (int(rows[0][0]), bytes(rows[0][1])) if rows else (0, None)

    def change(
        self, name: str, make: Callable[[bytes | None], bytes | None], wrote: Callable[[int], None]
    ) -> None:
        """Write what ``make`` makes of what is there; None: nothing. ``wrote`` is told the new
        revision before another thread of this process changes it. ``make`` is called again where
        another node was quicker. Raises ``StorageError``, ``DatabaseLockedError``."""
        with self.line.alone():
            for _ in range(_TRIES):
                revision, before = self._read(name)
                after = make(before)
                if after is None:
                    return
                if self._replace(name, revision, after):
                    wrote(revision + 1)
                    return
        raise DatabaseLockedError(
            f"{name} in {self.where} is being changed by other nodes all the time; try again"
        )

    def _replace(self, name: str, revision: int, content: bytes) -> bool:
        doing = f"writing {name} to {self.where}"
        if revision:
            return bool(
                self.line.run(
                    doing,
                    "UPDATE entidb_page SET content = %b, revision = revision + 1 "
                    "WHERE name = %s AND revision = %s RETURNING 1",
                    content,
                    name,
                    revision,
                )
            )
        return bool(
            self.line.run(
                doing,
                "INSERT INTO entidb_page VALUES (%s, 1, %b) ON CONFLICT DO NOTHING RETURNING 1",
                name,
                content,
            )
        )

    def rename(self, name: str, to: str | None) -> None:
        """A record gets another name, in the place of one that has it; None: it is gone."""
        doing = f"renaming {name} in {self.where}"
        if to is None:
            self.line.run(doing, "DELETE FROM entidb_page WHERE name = %s", name)
            return
        self.line.run(
            doing,
            "INSERT INTO entidb_page SELECT %s, revision, content FROM entidb_page WHERE name = %s "
            "ON CONFLICT (name) DO UPDATE SET content = excluded.content, "
            "revision = greatest(entidb_page.revision, excluded.revision) + 1",
            to,
            name,
        )
        self.line.run(doing, "DELETE FROM entidb_page WHERE name = %s", name)

    def has_store(self, name: str) -> bool:
        return bool(
            self.line.run(
                f"looking for {name} in {self.where}",
                "SELECT 1 FROM entidb_store WHERE name = %s",
                name,
            )
        )

    # ------------------------------------------------------------ the journal

    def append(self, lines: list[bytes]) -> None:
        """Durable when it returns, all or none."""
        self.line.run(
            f"writing to the journal of {self.where}",
            "INSERT INTO entidb_line (line) SELECT * FROM unnest(%b::bytea[])",
            lines,
        )

    def newest(self) -> Iterator[bytes]:
        """The lines, newest first."""
        last = 2**62
        while True:
            rows = self.line.run(
                f"reading the journal of {self.where}",
                "SELECT id, line FROM entidb_line WHERE id < %s ORDER BY id DESC "
                f"LIMIT {_LINES_AT_ONCE}",
                last,
            )
            for number, line in rows:
                last = int(number)
                yield bytes(line)
            if len(rows) < _LINES_AT_ONCE:
                return

    def forget_lines(self, kept: int) -> None:
        """Remove all but the newest, about ``kept`` of them."""
        self.line.run(
            f"clearing the journal of {self.where}",
            "DELETE FROM entidb_line WHERE id <= (SELECT max(id) FROM entidb_line) - %s",
            kept,
        )

    # ------------------------------------------------------------ now and then

    def is_first(self, name: str, every_s: float) -> bool:
        """Whether no node has asked this within ``every_s``."""
        return bool(
            self.line.run(
                f"looking when {name} was last, in {self.where}",
                "INSERT INTO entidb_turn AS t (name) VALUES (%s) ON CONFLICT (name) DO UPDATE "
                "SET at = now() WHERE t.at <= now() - make_interval(secs => %s) RETURNING 1",
                name,
                float(every_s),
            )
        )


__all__ = ["OneConnection", "SharedTables"]
