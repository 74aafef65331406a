"""Many databases under one directory: opened on demand, closed when idle, reopened after an error.

Each database has its own ``Database``, ``DatabaseService`` and ``GroupCommitter``. Whoever works
with one *uses* it from ``use`` or ``try_use`` to ``release``, and a database in use is never closed
for being idle or to make room. After a storage error it is closed as soon as nobody uses it any
more, and opened again by the next request (R17). What a request means is not known here.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from entidb.db import Database, Role, purge_tombstones
from entidb.db.maintenance import clock_mark_ms, mark_clock, sequence_at
from entidb.errors import (
    ConfigError,
    DatabaseClosedError,
    DatabaseLockedError,
    EntiDBError,
    InvalidNameError,
    PermissionDeniedError,
    ProtocolError,
    ServerBusyError,
    StorageError,
    TransactionError,
)
from entidb.protocol import PullRequest
from entidb.server.allocator import large_pieces_apart
from entidb.server.checks import CheckingError, Checks
from entidb.server.config import ServerConfig, check_db_id, db_id_of, directory_name
from entidb.server.group_commit import GroupCommitter, Schedule
from entidb.server.hooks import ValidateHook
from entidb.server.service import DatabaseService
from entidb.storage.directories import is_at, make_directory
from entidb.storage.locks import FileLock, HeldError
from entidb.storage.opening import holds_store
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

#: Locked by the server of a data directory; no database is called so.
SERVER_LOCK: Final = "entidb-server.lock"

_DAY_MS: Final = 24 * 3600 * 1000
_RETRY_S: Final = 1.0
#: Tombstones are looked for no more often, however short they are kept.
_PURGE_INTERVAL_S_MIN: Final = 1.0

#: Opens the database of that name, making it if it is not there and the second argument says so;
#: else ``PermissionDeniedError``, code ``unknown_database``.
OpenDatabase = Callable[[str, bool], Database]


class Store:
    """One open database. ``broken`` is set by the first storage error and never taken back."""

    def __init__(
        self, db_id: str, database: Database, service: DatabaseService, committer: GroupCommitter
    ) -> None:
        self.db_id = db_id
        self.database = database
        self.service = service
        self.committer = committer
        #: Held for a push that does not go through the committer.
        self.push_lock = threading.Lock()
        self.broken = False
        self.pinned = False
        self.users = 0
        self.used_at = 0.0
        self.purged_at: float | None = None

    def report(self, error: Exception) -> None:
        """Tell of an error that came out of this database: what it knows may be wrong now."""
        # A lock that somebody held too long says nothing about what is on the disk.
        if isinstance(error, EntiDBError) and not isinstance(error, TransactionError):
            self.broken = True

    def close(self) -> None:
        """Finish what is queued, then close."""
        self.committer.stop()
        self.service.close()
        self.database.close()


class Stores:
    """The open databases of one server. Thread-safe; starts no threads by itself. With
    ``schedule`` pushes are committed where that has them committed (``group_commit``)."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        clock: Clock,
        open_database: OpenDatabase,
        schedule: Schedule | None = None,
    ) -> None:
        self._config = config
        self._schedule = schedule
        self._clock = clock
        self._open_database = open_database
        self._validate: ValidateHook | None = config.load_validate()
        self._limits = config.limits()
        self._retention_ms = int(config.tombstone_retention_days * _DAY_MS)
        self._clock_mark_ms = clock_mark_ms(self._retention_ms)
        # A retention of minutes is kept in minutes.
        often_s = max(_PURGE_INTERVAL_S_MIN, self._retention_ms / 4000)
        self._purge_interval_s = min(config.purge_interval_s, often_s)
        #: Called on a writer's thread after the members of a group have been told.
        self.on_group: Callable[[], None] = _nothing
        #: Called with a database and its newest commit, after every one (R17: it is durable); from
        #: any thread.
        self.on_commit: Callable[[str, int], None] = _ignore
        #: Called with a pull and the cursor that its page leads to; from any thread.
        self.on_page: Callable[[PullRequest, int], None] = _ignore_page
        #: Called with a database that was opened: it may have been put back meanwhile.
        self.on_open: Callable[[str, int], None] = _ignore
        self._stores: dict[str, Store] = {}
        #: Guards the table and the counters of its entries; never held during I/O.
        self._lock = threading.Lock()
        #: Held while a database is opened or closed, so that it is open once. Opening takes less
        #: than a millisecond, which is why one lock for all of them is enough: a large file that
        #: has to be read first is read elsewhere (``checks``).
        self._changing = threading.Lock()
        self._closed = False

    # ------------------------------------------------------------ using

    def try_use(self, db_id: str) -> Store | None:
        """The store if it is open and well, without waiting for anything; else None."""
        with self._lock:
            store = self._stores.get(db_id)
            if store is None or store.broken or self._closed:
                return None
            store.users += 1
            return store

    def use(self, db_id: str, *, create: bool) -> Store:
        """The store, opened if need be. Give it back with ``release``.

        Raises ``PermissionDeniedError`` (unknown_database), ``ServerBusyError``, or what opening
        it raises: ``StorageError``, ``DatabaseLockedError``.
        """
        store = self.try_use(db_id)
        if store is not None:
            return store
        _check_known_name(db_id)
        with self._changing:
            return self.try_use(db_id) or self._open(db_id, create)

    def release(self, store: Store) -> None:
        with self._lock:
            store.users -= 1
            store.used_at = self._clock.monotonic()

    @contextmanager
    def using(self, db_id: str, *, create: bool) -> Iterator[Store]:
        """``use`` and ``release`` around a block; a storage error in it is reported."""
        with self.holding(self.use(db_id, create=create)) as store:
            yield store

    @contextmanager
    def holding(self, store: Store) -> Iterator[Store]:
        """``release`` at the end of a block for what was used before it; a storage error in it is
        reported."""
        try:
            yield store
        except (StorageError, DatabaseClosedError) as error:
            store.report(error)
            raise
        finally:
            self.release(store)

    def pin(self, db_id: str, *, create: bool) -> Database:
        """The database, kept open until ``close``. After a storage error this one is closed;
        call again for the one that took its place."""
        while True:
            try:
                store = self.use(db_id, create=create)
                break
            except CheckingError as checking:
                checking.done.wait()
        store.pinned = True
        self.release(store)
        return store.database

    @property
    def open_count(self) -> int:
        return len(self._stores)

    def _open(self, db_id: str, create: bool) -> Store:
        self._drop_broken(db_id)
        self._make_room()
        database = self._open_database(db_id, create and self._config.create_databases)
        database.on_commit = lambda head: self.on_commit(db_id, head)
        service = DatabaseService(
            database,
            db_id=db_id,
            limits=self._limits,
            validate=self._validate,
            clock_mark_ms=self._clock_mark_ms,
        )
        service.on_page = lambda request, cursor: self.on_page(request, cursor)
        store = Store(db_id, database, service, self._committer(service))
        store.used_at = self._clock.monotonic()
        store.users = 1
        with self._lock:
            opened = not self._closed
            if opened:
                self._stores[db_id] = store
        if opened:
            self.on_open(db_id, database.read_head().sequence)
            return store
        store.close()
        raise _stopping()

    def _committer(self, service: DatabaseService) -> GroupCommitter:
        def failed(error: EntiDBError) -> None:
            logger.error("database %s: a group of pushes failed: %s", service.db_id, error)
            store = self._stores.get(service.db_id)
            if store is not None and store.service is service:
                store.report(error)

        return GroupCommitter(
            service,
            queue_max=self._config.push_queue_max,
            on_failure=failed,
            on_group=lambda: self.on_group(),
            schedule=self._schedule,
        )

    def _drop_broken(self, db_id: str) -> None:
        with self._lock:
            if self._closed:
                raise _stopping()
            store = self._stores.get(db_id)
            if store is None:
                return
            if store.users:
                # Nobody new gets in, so this ends with the requests that are under way.
                raise ServerBusyError(
                    "the database is being opened again after an error", retry_after=_RETRY_S
                )
            del self._stores[db_id]
        self._close(store)

    def _make_room(self) -> None:
        with self._lock:
            if len(self._stores) < self._config.databases_open_max:
                return
            unused = [store for store in self._stores.values() if _closable(store)]
            if not unused:
                raise ServerBusyError("too many databases are in use", retry_after=_RETRY_S)
            victim = min(unused, key=lambda store: store.used_at)
            del self._stores[victim.db_id]
        self._close(victim)

    def _close(self, store: Store) -> None:
        try:
            store.close()
        except StorageError:
            # It is out of the table, and what was acknowledged is on the disk already.
            logger.exception("database %s: closing it failed", store.db_id)

    # ------------------------------------------------------------ housekeeping

    def housekeep(self) -> None:
        """Close what is idle and purge tombstones where that is due (R28)."""
        self._close_idle()
        with self._lock:
            names = list(self._stores)
        for name in names:
            store = self.try_use(name)
            if store is not None:
                try:
                    self._purge(store)
                except EntiDBError as error:
                    store.report(error)
                    logger.exception("database %s: purging tombstones failed", name)
                finally:
                    with self._lock:  # not ``release``: housekeeping is no use of it
                        store.users -= 1

    def _close_idle(self) -> None:
        idle_s = self._config.idle_close_s
        before = self._clock.monotonic() - idle_s
        with self._changing:
            with self._lock:
                idle = [
                    store
                    for store in self._stores.values()
                    if (idle_s and _closable(store) and store.used_at <= before)
                    or (store.broken and not store.users)
                ]
                for store in idle:
                    del self._stores[store.db_id]
            for store in idle:
                self._close(store)

    def _purge(self, store: Store) -> None:
        now = self._clock.monotonic()
        due = store.purged_at is None or now - store.purged_at >= self._purge_interval_s
        if not due:
            return
        store.purged_at = now
        with store.database.write() as writer:
            if writer.head.sequence:
                mark_clock(writer, self._clock_mark_ms)
        up_to = sequence_at(store.database, self._clock.now_ms() - self._retention_ms)
        if up_to:
            purged = purge_tombstones(store.database, up_to)
            logger.info("database %s: purged %d tombstones", store.db_id, purged)

    def close(self) -> None:
        """Finish every queued push and close every database. Idempotent."""
        with self._lock:
            self._closed = True
        with self._changing:
            with self._lock:
                stores = list(self._stores.values())
                self._stores.clear()
            for store in stores:
                self._close(store)


def _nothing() -> None:
    return None


def _ignore(db_id: str, head: int) -> None:
    return None


def _ignore_page(request: PullRequest, cursor: int) -> None:
    return None


def _closable(store: Store) -> bool:
    return not store.users and not store.pinned


def _stopping() -> ServerBusyError:
    return ServerBusyError("the server is shutting down", code="shutting_down", retry_after=1.0)


def unknown_database() -> PermissionDeniedError:
    return PermissionDeniedError("there is no such database", code="unknown_database")


def _check_known_name(db_id: str) -> None:
    try:
        check_db_id(db_id)
    except InvalidNameError as error:
        # Not "unknown", which sends people to look for a database: there can be none.
        raise ProtocolError(str(error)) from error


# ---------------------------------------------------------------- where databases come from


class DataDirectory:
    """``config.data_dir``, for one server: made if missing, and locked as long as it is served.
    Several processes that work for one server would share this object's lock."""

    def __init__(self, root: str, locks: list[FileLock]) -> None:
        self._lock_path = os.path.join(root, SERVER_LOCK)
        self._locks = locks

    @classmethod
    def take(cls, config: ServerConfig) -> DataDirectory:
        """Raises ``ConfigError`` for a place that cannot be made or written, and
        ``DatabaseLockedError`` if another server has it, in this process or in another."""
        root = _root(config)
        try:
            make_directory(root)
            try:
                return cls._lock(root)
            except HeldError as error:
                if error.holder != str(os.getpid()):
                    raise
            # A server that nobody refers to any more may still wait for the collector.
            gc.collect()
            return cls._lock(root)
        except HeldError as error:
            raise _served(root, error.holder) from error
        except OSError as error:
            raise _unusable(root, error) from error

    @classmethod
    def _lock(cls, root: str) -> DataDirectory:
        locks = [FileLock.take(os.path.join(root, SERVER_LOCK), os.stat(root))]
        try:
            if sys.platform != "win32":
                # A lock file can be deleted, so the directory itself is locked too.
                locks.append(FileLock(os.open(root, os.O_RDONLY)))
        except BaseException:
            locks[0].release()
            raise
        return cls(root, locks)

    def release(self) -> None:
        """Idempotent. Leaves no lock file behind; who dies does, which does no harm."""
        with contextlib.suppress(OSError):
            if self._locks[0].descriptor >= 0 and is_at(self._lock_path, self._locks[0].descriptor):
                os.unlink(self._lock_path)
        for lock in self._locks:
            lock.release()


def _root(config: ServerConfig) -> str:
    assert config.data_dir is not None
    root = os.path.abspath(config.data_dir)
    if holds_store(root):
        raise ConfigError(
            f"{root} is itself a database, and a server keeps databases in directories below its "
            "own: name an empty directory, or the one above"
        )
    return root


def _served(root: str, holder: str) -> DatabaseLockedError:
    if holder == str(os.getpid()):
        return DatabaseLockedError(
            f"{root} is served by another server in this process; close that one first, or give "
            "another directory"
        )
    process = f"process {holder}" if holder else "another process"
    return DatabaseLockedError(
        f"{root} is served by {process} already; stop that server, or give another directory"
    )


def _unusable(root: str, error: OSError) -> ConfigError:
    what = "cannot be used" if os.path.isdir(root) else "cannot be made"
    return ConfigError(
        f"data_dir {what}: {root}: {error.strerror}; give a directory that the user of the server "
        "may write to"
    )


def on_disk(config: ServerConfig, **options: Any) -> OpenDatabase:
    """Databases in directories below ``config.data_dir``."""
    root = Path(_root(config))
    checks = Checks()

    def open_database(db_id: str, create: bool) -> Database:
        path = root / directory_name(db_id)
        if not create and not path.is_dir():
            raise unknown_database()
        checks.require(path)
        with large_pieces_apart():
            return Database.open(path, create=create, role=Role.SERVER, **options)

    return open_database


def in_memory(**options: Any) -> OpenDatabase:
    """Databases that are gone with the server."""

    def open_database(db_id: str, create: bool) -> Database:
        if not create:
            raise unknown_database()
        return Database.in_memory(role=Role.SERVER, **options)

    return open_database


def list_databases(data_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the databases below ``data_dir``, in order; empty if there is no such place."""
    root = Path(data_dir)
    found = (db_id_of(entry.name) for entry in root.iterdir()) if root.is_dir() else ()
    return sorted(name for name in found if name is not None)
