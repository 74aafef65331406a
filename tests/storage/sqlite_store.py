"""A third store, on ``sqlite3``: what the layers above assume of a store, and no promise names,
breaks here.

For tests only. Debian 12's library can damage a database when its write-ahead log is reset under
load, so nobody should keep data in this; the tests are too short-lived to meet that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import entidb.storage.memory
from entidb.errors import (
    CommitStaleError,
    CorruptionError,
    DatabaseClosedError,
    StorageError,
    StorageFullError,
)
from entidb.storage.base import KEY_BYTES_MAX, Batch, StorageInfo

_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS kv (k BLOB PRIMARY KEY, v BLOB NOT NULL, c INTEGER NOT NULL) "
    "WITHOUT ROWID"
)
_PUT: Final = "INSERT INTO kv VALUES (?, ?, ?) ON CONFLICT (k) DO UPDATE SET v = ?2, c = ?3"
#: Host parameters of one statement; the library takes 32,766.
_KEYS_AT_ONCE: Final = 5000
_FILE: Final = "kv.sqlite"
_MARK: Final = "SELECT mark FROM mark"
#: Seconds between two looks at whose turn it is, or at the mark.
_LOOK_SECONDS: Final = 0.002


def _checksum(key: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key))


def _connect(path: Path) -> sqlite3.Connection:
    made = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    made.execute("PRAGMA journal_mode = WAL")
    made.execute("PRAGMA synchronous = FULL")
    return made


class SqliteSnapshot:
    """One read transaction on a connection of its own."""

    def __init__(self, store: SqliteStorage) -> None:
        self._store = store
        self._connection: sqlite3.Connection | None = store._lend()
        [(self.mark,)] = self._connection.execute(_MARK)

    def get(self, key: bytes) -> bytes | None:
        row = self._open().execute("SELECT v, c FROM kv WHERE k = ?", (key,)).fetchone()
        return None if row is None else _proved(key, *row)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        connection = self._open()
        found: dict[bytes, bytes] = {}
        wanted = [*dict.fromkeys(keys)]
        for first in range(0, len(wanted), _KEYS_AT_ONCE):
            part = wanted[first : first + _KEYS_AT_ONCE]
            marks = ",".join("?" * len(part))
            rows = connection.execute(f"SELECT k, v, c FROM kv WHERE k IN ({marks})", part)
            found |= {key: _proved(key, value, c) for key, value, c in rows}
        return [found.get(key) for key in keys]

    def scan(
        self, start: bytes, stop: bytes, *, limit: int | None = None, reverse: bool = False
    ) -> list[tuple[bytes, bytes]]:
        rows = self._select("k, v, c", start, stop, limit, reverse)
        return [(key, _proved(key, value, c)) for key, value, c in rows]

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
        return [key for (key,) in self._select("k", start, stop, limit, reverse)]

    def _select(
        self, columns: str, start: bytes, stop: bytes, limit: int | None, reverse: bool
    ) -> sqlite3.Cursor:
        order = "DESC" if reverse else "ASC"
        return self._open().execute(
            f"SELECT {columns} FROM kv WHERE k >= ? AND k < ? ORDER BY k {order} LIMIT ?",
            (start, stop, -1 if limit is None else max(0, limit)),
        )

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise DatabaseClosedError("this snapshot is closed; take a new one")
        if self._store._closed:
            raise DatabaseClosedError("the store of this snapshot is closed; open it again")
        return self._connection

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._store._take_back(connection)

    def __enter__(self) -> SqliteSnapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # Interrupted while it was made.
            self.close()


def _proved(key: bytes, value: bytes, checksum: int) -> bytes:
    if _checksum(key, value) != checksum:
        raise CorruptionError(f"the value at {key.hex()} is not the one that was written")
    return value


class SqliteTurn:
    """A write transaction on a file of its own: the lock of the library, which goes with the
    process. Of a closed store it is anybody's: whatever comes next says that the store is closed.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA busy_timeout = 0")
        self._lock = threading.RLock()

    def take(self, timeout_s: float | None = None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._try():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def _try(self) -> bool:
        with self._lock:
            if not self.mine:
                try:
                    self._connection.execute("BEGIN EXCLUSIVE")
                except sqlite3.OperationalError:
                    return False
                except sqlite3.ProgrammingError:
                    pass  # closed, perhaps at this very line
            return True

    def give_back(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.ProgrammingError):
            if self.mine:
                self._connection.execute("ROLLBACK")

    @property
    def mine(self) -> bool:
        with contextlib.suppress(sqlite3.ProgrammingError):
            return self._connection.in_transaction
        return False

    def holder(self) -> str:
        return ""

    def close(self) -> None:
        self._connection.close()


class SqliteStorage:
    """An open store in the directory ``path``, which is made if it is not there."""

    supports_files = True
    shared = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._file = self.path / _FILE
        self._writer = _connect(self._file)
        self._writer.execute(_TABLE)
        self._writer.execute("CREATE TABLE IF NOT EXISTS mark (mark INTEGER NOT NULL)")
        self._writer.execute("INSERT INTO mark SELECT 0 WHERE NOT EXISTS (SELECT * FROM mark)")
        self.turn = SqliteTurn(self.path / "turn.sqlite")
        # Reentrant: the collector may close a forgotten snapshot while this is held.
        self._lock = threading.RLock()
        self._idle: list[sqlite3.Connection] = []
        self._lent: set[sqlite3.Connection] = set()
        self._closed = False

    def snapshot(self) -> SqliteSnapshot:
        self._check_open()
        return SqliteSnapshot(self)

    def claim(self, name: str) -> SqliteTurn:
        made = SqliteTurn(self.path / f"{name}.sqlite")
        weakref.finalize(made, made._connection.close)
        return made

    def mark(self) -> int:
        self._check_open()
        with self._lock:
            [(mark,)] = self._writer.execute(_MARK)
        return int(mark)

    def wait(self, mark: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.mark() == mark:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def commit(self, batch: Batch, after: int | None = None) -> int:
        self._check_open()
        for key, value in batch.items():
            _check_record(key, value)
        if self.turn.mine:
            return self._commit(batch, after)
        try:
            self.turn.take()
            return self._commit(batch, after)
        finally:
            self.turn.give_back()

    def _commit(self, batch: Batch, after: int | None) -> int:
        with self._lock:
            writer = self._writer
            try:
                writer.execute("BEGIN IMMEDIATE")
                [(mark,)] = writer.execute(_MARK)
                if after is not None and after != mark:
                    raise CommitStaleError.of(str(self.path), after, mark)
                if batch:
                    self._put(batch)
                    mark += 1
                writer.execute("COMMIT")
            except BaseException as error:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    full = "full" in str(error)
                    raise (StorageFullError if full else StorageError)(str(error)) from error
                raise
            return int(mark)

    def _put(self, batch: Batch) -> None:
        writer = self._writer
        writer.executemany(
            _PUT, [(k, v, _checksum(k, v)) for k, v in batch.items() if v is not None]
        )
        gone = [(key,) for key, value in batch.items() if value is None]
        writer.executemany("DELETE FROM kv WHERE k = ?", gone)
        writer.execute("UPDATE mark SET mark = mark + 1")

    def verify(self) -> Iterator[str]:
        self._check_open()
        for (line,) in self._writer.execute("PRAGMA integrity_check"):
            if line != "ok":
                yield line
        for key, value, checksum in self._writer.execute("SELECT k, v, c FROM kv"):
            if _checksum(key, value) != checksum:
                yield f"the value at {key.hex()} is not the one that was written"

    def compact(self) -> None:
        self._check_open()
        self._writer.execute("VACUUM")
        # What was deleted goes from the write-ahead log too.
        self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        if Path(path).exists():
            raise StorageError(f"{path} exists already; name a new directory")
        copy = SqliteStorage(path)
        try:
            with self.snapshot() as snapshot:
                rows = snapshot.scan(b"", b"\xff" * (KEY_BYTES_MAX + 1))
            copy.commit(dict(rows) | dict(changes))
        finally:
            copy.close()

    def info(self) -> StorageInfo:
        self._check_open()
        [(records, used)] = self._writer.execute(
            "SELECT count(*), coalesce(sum(length(k) + length(v)), 0) FROM kv"
        )
        size = self._file.stat().st_size
        return StorageInfo("sqlite", str(self.path), size, used, 0, records, len(self._lent))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self.turn.close()
            for connection in (*self._idle, self._writer):
                connection.close()
            self._idle.clear()

    def _lend(self) -> sqlite3.Connection:
        """A connection inside a read transaction. ``BEGIN`` alone sees nothing yet: the state is
        that of the first read."""
        with self._lock:
            connection = self._idle.pop() if self._idle else _connect(self._file)
            connection.execute("BEGIN")
            connection.execute("SELECT 1 FROM kv LIMIT 1").fetchall()
            self._lent.add(connection)
            return connection

    def _take_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            self._lent.discard(connection)
            connection.execute("ROLLBACK")
            if self._closed:
                connection.close()
            else:
                self._idle.append(connection)

    def _check_open(self) -> None:
        if self._closed:
            raise DatabaseClosedError("the store is closed; open it again")


class ScratchStorage(SqliteStorage):
    """One that takes no path and leaves no files, as a ``MemoryStorage`` does."""

    supports_files = False

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="entidb-scratch-", dir=_memory_disk())
        super().__init__(folder)
        weakref.finalize(self, _end, self._idle, self._writer, self.turn, folder)
        self._writer.execute("PRAGMA synchronous = OFF")

    shared = False

    def another(self) -> SqliteStorage:
        return SqliteStorage(self.path)

    def copy(self, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> ScratchStorage:
        made = ScratchStorage()
        with self.snapshot() as snapshot:
            rows = snapshot.scan(b"", b"\xff" * (KEY_BYTES_MAX + 1))
        made.commit(dict(rows) | dict(changes))
        return made

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        raise StorageError(f"a store in memory has no files to write to {path}; use copy()")

    def info(self) -> StorageInfo:
        return replace(super().info(), kind="memory", path=None, file_bytes=0)


def _memory_disk() -> str | None:
    """A folder that is in memory, where the system has one: thousands of stores are made."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _end(
    idle: list[sqlite3.Connection], writer: sqlite3.Connection, turn: SqliteTurn, folder: str
) -> None:
    """A store in memory need not be closed, so neither need this one."""
    turn.close()
    for connection in (*idle, writer):
        connection.close()
    shutil.rmtree(folder, ignore_errors=True)


def take_the_place_of_memory() -> None:
    """Every ``MemoryStorage`` made after this is a ``ScratchStorage``."""
    for module in (entidb.storage, entidb.storage.memory):
        module.MemoryStorage = ScratchStorage  # type: ignore[attr-defined]


def _check_record(key: bytes, value: bytes | None) -> None:
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise StorageError(
            f"a key of {len(key)} bytes cannot be stored; keys have 1 to {KEY_BYTES_MAX} bytes"
        )
    for part in (key, value):
        if part is not None and type(part) is not bytes:
            raise TypeError(f"keys and values are bytes, not {type(part).__name__}")
