"""A store in a PostgreSQL database, which any number of nodes may have open.

A commit is one transaction of PostgreSQL on the connection that has the turn: it moves the mark of
the store, compares it with the one that the commit was decided on, writes the records, and ends.
Where all that fits into one statement, the statement is the transaction, and takes one round trip.
What is read in a snapshot is read with its mark, in one transaction; what is kept in memory is good
for that mark alone (``remembered``).

A commit is never given up: PostgreSQL answers one that was cancelled while it waited for its
synchronous standby with *success* and a warning. That warning, and a connection that ends before
the answer, leave the outcome open: ``CommitUnknownError`` closes the store, and opening it again
waits for the standby before anything is read (``node``).

Not here: connections (``node``), questions on one (``line``), tables (``schema``), reading
(``snapshot``), turns (``turn``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final

import psycopg
from psycopg import errors, pq, sql
from psycopg.pq.abc import PGresult

from entidb.errors import (
    CommitStaleError,
    CommitUnknownError,
    ConfigError,
    StorageError,
    StorageUnreachableError,
)
from entidb.storage.base import Batch, StorageInfo
from entidb.storage.checksums import RESIDUE, Puts, stage
from entidb.storage.crc import crc32
from entidb.storage.directories import absolute
from entidb.storage.disk_errors import disk_error
from entidb.storage.opening import open_storage
from entidb.storage.partial import Partial
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.fresh import Pairs
from entidb.storage.postgres.line import (
    Line,
    Question,
    Statement,
    Value,
    byteas,
    int4,
    int8,
    number_in,
)
from entidb.storage.postgres.node import BARRIER_S, CONNECTIONS_MAX, Lease, lease
from entidb.storage.postgres.opened import Opened
from entidb.storage.postgres.reaching import ask
from entidb.storage.postgres.schema import Tables
from entidb.storage.postgres.snapshot import ABOVE_ALL, PostgresSnapshot
from entidb.storage.postgres.turn import PostgresRight, PostgresTurn

#: Records and bytes of one statement.
ROWS_AT_ONCE: Final = 5000
_BYTES_AT_ONCE: Final = 8 << 20
#: Records that verify and backup read at once.
_READ_AT_ONCE: Final = 5000
#: What PostgreSQL says with a commit that it was made to stop waiting for.
_CANCELLED: Final = "01000"

_LOOK: Final = Statement(b"mark", b"SELECT mark FROM entidb_store WHERE id = $1 AND name = $2")


def _whole(name: bytes, *, deletes: bool = False, new: bool = False) -> Statement:
    """A whole commit. Where the mark is another one nothing is written, and there is no row. Only
    who has the turn comes here, so that nothing was committed after the statement began to look.

    ``deletes``: with keys to delete, which most commits have not; ``new``: with records that are
    known to be new."""
    keys = b"gone AS (DELETE FROM entidb_kv kv USING moved, unnest($4::bytea[]) AS old(k) "
    keys += b"WHERE kv.store = $1 AND kv.k = old.k), "
    parts, at = [keys] if deletes else [], 5 if deletes else 4
    parts.append(_INSERT % (b"put", at, at + 1) + b" " + _REPLACE + b") ")
    if new:
        parts[-1:] = [_INSERT % (b"made", at, at + 1) + b"), "]
        parts.append(_INSERT % (b"put", at + 2, at + 3) + b" " + _REPLACE + b") ")
    return Statement(
        name,
        b"WITH moved AS (UPDATE entidb_store SET mark = mark + 1 WHERE id = $1 "
        b"AND name = $3 AND mark = coalesce($2::bigint, mark) RETURNING mark), "
        + b"".join(parts)
        + b"SELECT mark FROM moved",
    )


_INSERT: Final = (
    b"%b AS (INSERT INTO entidb_kv (store, k, v) SELECT $1, new.k, new.v "
    b"FROM moved, unnest($%d::bytea[], $%d::bytea[]) AS new(k, v)"
)
_REPLACE: Final = b"ON CONFLICT (store, k) DO UPDATE SET v = excluded.v"
#: By whether there are keys to delete, and records that are known to be new.
_COMMIT: Final = {
    (False, False): _whole(b"commit_puts"),
    (False, True): _whole(b"commit_new", new=True),
    (True, False): _whole(b"commit", deletes=True),
    (True, True): _whole(b"commit_all", deletes=True, new=True),
}
#: The parts of one that does not fit.
_BEGIN: Final = Statement(b"begin_commit", b"BEGIN")
_MOVE: Final = Statement(
    b"move",
    b"UPDATE entidb_store SET mark = mark + 1 WHERE id = $1 AND name = $2 RETURNING mark",
)
_DELETE: Final = Statement(
    b"delete",
    b"DELETE FROM entidb_kv kv USING unnest($2::bytea[]) AS old(k) "
    b"WHERE kv.store = $1 AND kv.k = old.k",
)
_PUT_NEW: Final = Statement(
    b"put_new",
    b"INSERT INTO entidb_kv (store, k, v) SELECT $1, new.k, new.v "
    b"FROM unnest($2::bytea[], $3::bytea[]) AS new(k, v)",
)
_PUT: Final = Statement(b"put", _PUT_NEW.text + b" " + _REPLACE)
_END: Final = Statement(b"end_commit", b"COMMIT")


class _AlreadyThereError(Exception):
    """What was taken to be new is there already; nothing was changed."""


class PostgresStorage:
    """An open store. Thread-safe, but for ``commit`` and the turn, which one thread uses at a
    time."""

    shared = True
    #: Where bytes of what was deleted may be after ``compact``.
    left_by_compact: Final = (
        "the table entidb_kv of PostgreSQL, until VACUUM FULL has written it anew",
        "PostgreSQL's log (pg_wal, and what is archived of it)",
        "its standbys and its own backups",
    )

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
        read_only: bool = False,
        connections_max: int = CONNECTIONS_MAX,
    ) -> PostgresStorage:
        """Open the store ``name`` in the PostgreSQL database at ``address``, a URL or what libpq
        calls a connection string; it is made if it is not there and ``create``, and so are the
        tables. With ``read_only`` nothing is made, and tables of an older format stay as they are;
        whoever opens it does not write.

        Raises ``ConfigError`` for an address or a name that cannot be, ``StorageError`` if the
        server cannot be reached or may lose commits, or there is no such store, ``FormatError``
        for tables of a newer program."""
        if not name or "\0" in name:
            raise ConfigError("a store has a name, without the character NUL")
        create = create and not read_only
        use = Tables.MAKE if create else Tables.LOOK if read_only else Tables.CONVERT
        leased = lease(address, connections_max, use)
        where = leased.node.where
        try:
            number = _number(leased.node.connect, name, create)
            if number is None:
                raise StorageError(f"there is no store {name!r} at {where}", code="no_store")
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
        node, failure = self.opened.node, self.opened.failure
        try:
            line, (answer,) = node.ask(node.reading, [(_LOOK, self._row())])
        except psycopg.Error as error:
            raise failure(error, f"reading {self.path}") from error
        node.take_back(node.reading, line)
        return self._there(answer)

    def _row(self) -> tuple[bytes, bytes]:
        return int4(self.opened.number), self.opened.known_as

    def _there(self, answer: PGresult) -> int:
        mark = number_in(answer)
        if mark is None:
            raise self.opened.gone()
        return mark

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
        remembered, losses = self.opened.remembered, self.opened.node.losses
        had = self.turn.mine
        try:
            if not had and not self.turn.take():
                raise StorageError(f"it is not the turn of this opener of {self.path}")
            with remembered.commit():
                mark = self._commit(puts, deletes, after)
                if batch:
                    remembered.committed(mark, losses, batch)
            return mark
        finally:
            if not had:
                self.turn.give_back()

    def _commit(self, puts: Puts, deletes: list[bytes], after: int | None) -> int:
        line = self.turn.connection
        assert line is not None
        if not puts and not deletes:
            mark = self._look(line)
            if after is not None and mark != after:
                raise CommitStaleError.of(self.path, after, mark)
            return mark
        fresh = self.opened.fresh
        old, new = fresh.guess(puts)
        try:
            mark = self._put(line, old, new, deletes, after)
        except _AlreadyThereError:
            fresh.was_wrong()
            mark = self._put(line, list(puts), [], deletes, after)
        self.opened.node.marks.tell(self.opened.number, mark)
        return mark

    def _put(
        self, line: Line, old: Pairs, new: Pairs, deletes: list[bytes], after: int | None
    ) -> int:
        """Commit it; the mark that it makes. Raises ``_AlreadyThereError`` where one of ``new`` is
        not."""
        parts, news = list(_in_parts(old)), list(_in_parts(new))
        if len(parts) <= 1 and len(news) <= 1 and len(deletes) <= ROWS_AT_ONCE:
            return self._commit_at_once(line, old, new, deletes, after)
        mark = self._begin(line, parts, news, deletes, after)
        self._end(line, *line.ask_to_the_end(_END))
        return mark

    def _commit_at_once(
        self, line: Line, old: Pairs, new: Pairs, deletes: list[bytes], after: int | None
    ) -> int:
        given = None if after is None else int8(after)
        values: list[Value] = [int4(self.opened.number), given, self.opened.known_as]
        if deletes:
            values.append(byteas(deletes))
        if new:
            values += _columns(new)
        values += _columns(old)
        try:
            line.check()
        except psycopg.Error as error:
            raise self.opened.failure(error, f"writing to {self.path}") from error
        statement = _COMMIT[bool(deletes), bool(new)]
        mark = number_in(self._end(line, *line.ask_to_the_end(statement, *values)))
        if mark is None:
            mark = self._look(line)
            raise CommitStaleError.of(self.path, mark if after is None else after, mark)
        return mark

    def _look(self, line: Line) -> int:
        try:
            return self._there(line.ask(_LOOK, *self._row()))
        except psycopg.Error as error:
            raise self.opened.failure(error, f"writing to {self.path}") from error

    def _begin(
        self,
        line: Line,
        parts: list[Pairs],
        news: list[Pairs],
        deletes: list[bytes],
        after: int | None,
    ) -> int:
        """Everything but the end of a transaction, which holds the row of the store until then; the
        mark that it makes."""
        store = int4(self.opened.number)

        def questions() -> Iterator[Question]:
            yield _BEGIN, ()
            yield _MOVE, self._row()
            for first in range(0, len(deletes), ROWS_AT_ONCE):
                yield _DELETE, (store, byteas(deletes[first : first + ROWS_AT_ONCE]))
            for part in news:
                yield _PUT_NEW, (store, *_columns(part))
            for part in parts:
                yield _PUT, (store, *_columns(part))

        try:
            mark = self._there(line.ask_all(questions())[1])
            if after is not None and mark - 1 != after:
                raise CommitStaleError.of(self.path, after, mark - 1)
            return mark
        except errors.UniqueViolation as error:
            self._undo(line)
            raise _AlreadyThereError from error
        except psycopg.Error as error:
            self._undo(line)
            raise self.opened.failure(error, f"writing to {self.path}") from error
        except BaseException:
            self._undo(line)
            raise

    def _undo(self, line: Line) -> None:
        """After a failure before the COMMIT, which PostgreSQL undoes whatever comes next."""
        try:
            if not line.closed:
                line.execute("ROLLBACK")
        except psycopg.Error:
            line.close()

    def _end(self, line: Line, answer: PGresult, said: list[str | None]) -> PGresult:
        """The answer to a commit that is done; raises for every other one."""
        good = answer.status in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)
        if good and answer.command_status != b"ROLLBACK" and _CANCELLED not in said:
            return answer
        lost = line.pgconn.status != pq.ConnStatus.OK
        if not lost and _CANCELLED not in said:
            # It has answered, and not with a commit: nothing was changed.
            self._undo(line)
            if good:
                raise StorageError(f"committing to {self.path}: PostgreSQL refused it")
            error = errors.error_from_result(answer)
            if isinstance(error, errors.UniqueViolation):
                raise _AlreadyThereError from error
            raise self.opened.failure(error, f"committing to {self.path}") from error
        self._close_now(line)
        raise CommitUnknownError(
            f"the connection to {self.path} ended before its answer, or PostgreSQL stopped waiting "
            "for its standby: open it again to find out whether the commit is there"
        ) from StorageUnreachableError(f"committing to {self.path}: no answer")

    def _close_now(self, line: Line) -> None:
        line.close()
        self.close()

    # ---- care

    def verify(self) -> Iterator[str]:
        with self.snapshot() as snapshot:
            last = b""
            while True:
                rows = snapshot.stored(last + b"\0", ABOVE_ALL, limit=_READ_AT_ONCE)
                for key, stored in rows:
                    if crc32(key + stored) != RESIDUE:
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
        where = absolute(path)
        if os.path.lexists(where):
            raise _exists(where)
        try:
            with Partial(where, "backup") as partial:
                self._copy_to(partial.path, changes)
                if os.path.lexists(where):
                    raise StorageError(
                        f"{where} exists already; name a new directory", code="exists"
                    )
                partial.finish()
        except OSError as error:
            raise disk_error(error.errno or errno.EIO, f"writing the backup {where}") from error

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
            records, used = snapshot.size()
        return StorageInfo("postgres", self.path, used, used, 0, records, len(self.opened.readers))

    def close(self) -> None:
        self.opened.closed = True
        self.opened.remembered.end()
        self.opened.lease.close()


def _number(connect: Any, name: str, create: bool) -> int | None:
    """Which store it is. Opening is a commit (``epoch``), so that it waits for the standby."""
    named = sql.Literal(name).as_string(None)
    opens = f"UPDATE entidb_store SET epoch = epoch + 1 WHERE name = {named} RETURNING id"
    makes = f"INSERT INTO entidb_store (name) VALUES ({named}) ON CONFLICT DO NOTHING"
    with connect() as connection:
        for _ in range(2):
            # Given up where the standby stays away: what becomes of an epoch matters to nobody.
            found = ask(connection, opens.encode(), BARRIER_S)
            if found is not None or not create:
                return None if found is None else int(found)
            ask(connection, makes.encode(), BARRIER_S)
    raise StorageError(f"the store {name!r} was removed while it was opened")


def _in_parts(puts: Puts) -> Iterator[Pairs]:
    part: Pairs = []
    size = 0
    for pair in puts:
        part.append(pair)
        size += len(pair[1])
        if len(part) >= ROWS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _columns(puts: Pairs) -> tuple[bytes, bytes]:
    """Keys and values, as arrays."""
    return byteas([key for key, _ in puts]), byteas([value for _, value in puts])


def _exists(where: str) -> StorageError:
    return StorageError(f"{where} exists already; name a new directory", code="exists")


__all__ = ["ROWS_AT_ONCE", "PostgresStorage"]
