"""Many databases under one directory: opened on demand, closed when idle, reopened after an error.

Each database has its own ``Database``, ``DatabaseService`` and ``GroupCommitter``. The code that
works with one *uses* it from ``use`` or ``try_use`` to ``release``, and a database in use is never
closed for being idle or to make room. After a storage error it is closed when nobody uses it but
who reads for long, and the next request opens it (R17). Nothing here knows what a request means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Final

from msgspec import Struct

from entidb.db import Database, purge_tombstones
from entidb.db.index_care import declare_all
from entidb.db.maintenance import clock_mark_ms, mark_clock, sequence_at
from entidb.errors import (
    CommitStaleError,
    DatabaseClosedError,
    EntiDBError,
    StorageError,
    StorageFullError,
    TransactionError,
)
from entidb.protocol import PullRequest
from entidb.server import in_use, unset
from entidb.server.checks import CheckingError
from entidb.server.chores import log_failure
from entidb.server.config import ServerConfig
from entidb.server.directory import OpenDatabase, open_with_room
from entidb.server.fullness import fullness_of
from entidb.server.gate import WriterGate, lets_go
from entidb.server.group_commit import GroupCommitter, Meter, Schedule
from entidb.server.hooks import Schema, ValidateHook
from entidb.server.place import check_asked
from entidb.server.service import DatabaseService
from entidb.server.warmth import Warmth, is_small
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

_DAY_MS: Final = 24 * 3600 * 1000
#: Seconds between two looks whether a database is still in use.
_LOOK_S: Final = 0.02
#: Tombstones are looked for no more often, however short they are kept.
_PURGE_INTERVAL_S_MIN: Final = 1.0


class Store:
    """One open database. ``broken`` is set by the first storage error and never taken back."""

    def __init__(
        self, db_id: str, database: Database, service: DatabaseService, committer: GroupCommitter
    ) -> None:
        self.db_id = db_id
        self.database = database
        self.service = service
        self.committer = committer
        self.push_lock = threading.Lock()  # for a push that does not go through the committer
        self.broken = False
        self.pinned = False
        self.users = 0
        #: How many of them only read, and take long (``Stores.lasting``).
        self.lasting = 0
        self.used_at = 0.0
        self.purged_at: float | None = None
        self.warmth = Warmth(counted=getattr(database.storage, "reads_mapped_files", False))

    def has_in_memory(self, request: PullRequest) -> bool:
        """Whether reading what ``request`` asks for waits for no disk, as far as anybody knows."""
        return self.service.is_recent(request) or (self.warmth.is_warm and is_small(request))

    def report(self, error: Exception) -> None:
        """Note an error that came out of this database: what it knows may be wrong now."""
        # A lock that a thread held too long says nothing about what is on the disk. And a commit
        # that found no room, or was overtaken by another, has changed nothing: reading goes on.
        harmless = TransactionError | StorageFullError | CommitStaleError
        self.broken |= isinstance(error, EntiDBError) and not isinstance(error, harmless)

    @property
    def in_the_way(self) -> bool:
        """Whether somebody uses it under whom it must not be closed, though it is broken."""
        return self.users > self.lasting

    def check(self) -> None:
        """For who does something long in steps. Raises ``ServerBusyError`` for a broken one, which
        is waited for to be opened again."""
        if self.broken:
            raise in_use.opened_again(self.db_id)

    def close(self) -> None:
        """Finish what is queued, then close."""
        self.committer.stop()
        self.service.close()
        self.database.close()


class Holding(Struct, frozen=True):
    """``Stores.release`` at the end of a block for what was used before it; a storage error in it
    is reported. Each request has one, and a generator would cost it more."""

    stores: Stores
    store: Store

    def __enter__(self) -> Store:
        return self.store

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StorageError | DatabaseClosedError):
            self.store.report(error)
        self.stores.release(self.store)


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
        self.most = config.databases_open_max  # or fewer, where the system lets no more
        self._schedule = schedule
        self._clock = clock
        self._open_database = open_database
        self._validate: ValidateHook | None = config.load_validate()
        self._schema = Schema(config.schema, config.schema_min, config.load_upcast())
        self._limits = config.limits()
        self._declared = config.declared()
        self._retention_ms = int(config.tombstone_retention_days * _DAY_MS)
        self._clock_mark_ms = clock_mark_ms(self._retention_ms)
        # A retention of minutes is kept in minutes.
        often_s = max(_PURGE_INTERVAL_S_MIN, self._retention_ms / 4000)
        self._purge_interval_s = min(config.purge_interval_s, often_s)
        #: Called on a writer's thread after the members of a group have their answers.
        self.on_group: Callable[[], None] = unset.nothing
        self.meter: Final = Meter()
        self.gate = WriterGate() if config.address is None else None  # no network keeps others out
        #: Called with a database and its newest commit, after every one (R17: it is durable); from
        #: any thread.
        self.on_commit: Callable[[str, int], None] = unset.ignore
        self._on_page: Callable[[PullRequest, int], None] | None = None
        #: Whether a database takes no pushes at the moment; from any thread.
        self.is_frozen: Callable[[str], bool] = unset.never
        #: Called with a database that was opened: it may have been put back meanwhile.
        self.on_open: Callable[[str, int], None] = unset.ignore
        #: Where several processes are one server: the database is closed in the others as long as
        #: this goes on; one of them keeps it closed; somebody waits for news of it here; it is
        #: this process that looks for old tombstones now.
        self.elsewhere: Callable[[str, float], AbstractContextManager[None]] = unset.alone
        self.is_kept_closed: Callable[[str], bool] = unset.never
        self.is_awaited: Callable[[str], bool] = unset.never
        self.may_purge: Callable[[str, float], bool] = unset.always
        #: Whether each database hears of such commits by itself; no where one thread does for all.
        self.hears = True
        self._stores: dict[str, Store] = {}
        #: Guards the table and the counters of its entries; never held during I/O.
        self._lock = threading.Lock()
        #: Held while a database is opened or closed, so that it is open once. Opening takes less
        #: than a millisecond, which is why one lock for all of them is enough: a large file that
        #: has to be read first is read elsewhere (``checks``).
        self._changing = threading.Lock()
        self._closed = False
        self._kept_closed: set[str] = set()  # these must not be opened at the moment

    # ------------------------------------------------------------ using

    def try_use(self, db_id: str) -> Store | None:
        """The store if it is open and well, without waiting for anything; else None."""
        with self._lock:
            store = self._stores.get(db_id)
            if store is None or store.broken or self._closed or db_id in self._kept_closed:
                return None
            store.users += 1
            return store

    def use(self, db_id: str, *, create: bool, anyway: bool = False) -> Store:
        """The store, opened if need be, and made if ``create`` says so and ``create_databases``
        lets it, or ``anyway``. Give it back with ``release``.

        Raises ``PermissionDeniedError`` (unknown_database), ``ServerBusyError``, or what opening
        it raises: ``StorageError``, ``DatabaseLockedError``.
        """
        store = self.try_use(db_id)
        if store is not None:
            return store
        check_asked(db_id)
        with self._changing:
            create = create and (anyway or self._config.create_databases)
            return self.try_use(db_id) or self._open(db_id, create)

    def release(self, store: Store) -> None:
        with self._lock:
            store.users -= 1
            store.used_at = self._clock.monotonic()

    def using(self, db_id: str, *, create: bool) -> AbstractContextManager[Store]:
        """``use`` and ``release`` around a block; a storage error in it is reported."""
        return Holding(self, self.use(db_id, create=create))

    @contextmanager
    def lasting(self, db_id: str) -> Iterator[Store]:
        """As ``using``, for what only reads, and may take minutes. It keeps nobody from opening a
        broken database again (R17): that closes this one, and the block ends with
        ``ServerBusyError`` at its next look."""
        with self.using(db_id, create=False) as store:
            with self._lock:
                store.lasting += 1
            try:
                yield store
            except (StorageError, DatabaseClosedError) as error:
                if self._stores.get(db_id) is store:
                    raise
                raise (in_use.stopping() if self._closed else in_use.opened_again(db_id)) from error
            finally:
                with self._lock:
                    store.lasting -= 1

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

    @contextmanager
    def looking(self, db_id: str) -> Iterator[Store | None]:
        """As ``using``, if the database is open; who only looks does not use it, and keeps nobody
        from closing it for being idle."""
        store = self.try_use(db_id)
        try:
            yield store
        finally:
            if store is not None:
                with self._lock:
                    store.users -= 1

    def tell_pages(self, call: Callable[[PullRequest, int], None]) -> None:
        """Have ``call`` told of every pull and the cursor that its page leads to; from any
        thread."""
        with self._lock:
            self._on_page = call
            for store in self._stores.values():
                store.service.on_page = call

    def make(self, db_id: str) -> None:
        """Make the database, or see that it is there, also where ``create_databases`` is off.
        Raises as ``use``."""
        self.release(self.use(db_id, create=True, anyway=True))

    def opened(self) -> dict[str, float]:
        """The databases that are open, with the monotonic time of their last use."""
        with self._lock:
            return {name: store.used_at for name, store in self._stores.items()}

    @contextmanager
    def closed(self, db_id: str, wait_s: float) -> Iterator[None]:
        """The database is closed inside the block, in every process of this server, and cannot be
        opened. Raises as ``closed_here``."""
        with self.closed_here(db_id, wait_s), self.elsewhere(db_id, wait_s):
            yield

    @contextmanager
    def closed_here(self, db_id: str, wait_s: float) -> Iterator[None]:
        """The database is closed inside the block, and cannot be opened: who asks for it is told
        to come again. Raises ``ServerBusyError`` if somebody uses it for longer than ``wait_s``,
        if it is closed by another such block, and if a program of the server has it open."""
        with self._lock:
            store = self._stores.get(db_id)
            if db_id in self._kept_closed or (store is not None and store.pinned):
                raise in_use.by_the_server(db_id)
            self._kept_closed.add(db_id)
        try:
            self._take_out(db_id, wait_s)
            yield
        finally:
            with self._lock:
                self._kept_closed.discard(db_id)

    def _take_out(self, db_id: str, wait_s: float) -> None:
        end = self._clock.monotonic() + wait_s
        while True:
            with self._changing, self._lock:
                store = self._stores.get(db_id)
                if store is None:
                    return
                if not store.users:
                    del self._stores[db_id]
                    break
            if self._clock.monotonic() >= end:
                raise in_use.by_others(db_id)
            time.sleep(_LOOK_S)
        self._close(store)

    def listen(self, store: Store) -> None:
        """Have ``on_commit`` called for what other processes commit too, where somebody waits for
        it."""
        if self.hears and self.is_awaited(store.db_id):
            store.database.start_hearing()

    @property
    def open_count(self) -> int:
        return len(self._stores)

    def _open(self, db_id: str, create: bool) -> Store:
        self._drop_broken(db_id)
        if self.is_kept_closed(db_id):
            raise in_use.looked_after()
        if len(self._stores) >= self.most and not self._close_oldest():
            raise in_use.too_many()
        database = open_with_room(self._open_database, db_id, create, self._close_oldest)
        if self._declared:
            self._declare(database)
        service = DatabaseService(
            database,
            db_id=db_id,
            limits=self._limits,
            validate=self._validate,
            schema=self._schema,
            clock_mark_ms=self._clock_mark_ms,
            fullness=fullness_of(self._config, database, self._clock),
        )
        service.is_frozen = partial(self.is_frozen, db_id)
        service.lets_go = partial(lets_go, self.gate, db_id)
        service.on_page = self._on_page
        store = Store(db_id, database, service, self._committer(service))
        database.on_commit = store.committer.committed
        store.used_at, store.users = self._clock.monotonic(), 1
        with self._lock:
            opened = not self._closed
            if opened:
                self._stores[db_id] = store
        if not opened:
            store.close()
            raise in_use.stopping()
        try:
            self.on_open(db_id, database.read_head().sequence)
            self.listen(store)
        except BaseException:
            # Nobody has it, and the next one opens it again.
            store.broken = True
            self.release(store)
            raise
        return store

    def _declare(self, database: Database) -> None:
        """Have its indexes, which are built beside its work."""
        try:
            if declare_all(database, self._declared) and self._schedule is None:
                database.build_indexes()
        except BaseException:
            database.close()
            raise

    def _committer(self, service: DatabaseService) -> GroupCommitter:
        def failed(error: EntiDBError) -> None:
            logger.error("database %s: a group of pushes failed: %s", service.db_id, error)
            store = self._stores.get(service.db_id)
            if store is not None and store.service is service:
                store.report(error)
                store.broken |= isinstance(error, CommitStaleError)  # though it was decided again

        return GroupCommitter(
            service,
            queue_max=self._config.push_queue_max,
            on_failure=failed,
            on_commit=lambda head: self.on_commit(service.db_id, head),
            on_group=lambda: self.on_group(),
            schedule=self._schedule,
            meter=self.meter,
            gate=self.gate,
            monotonic=self._clock.monotonic,
        )

    def _drop_broken(self, db_id: str) -> None:
        with self._lock:
            if self._closed:
                raise in_use.stopping()
            if db_id in self._kept_closed:
                raise in_use.looked_after()
            store = self._stores.get(db_id)
            if store is None:
                return
            if store.in_the_way:
                # No new request gets in, so this ends with the requests that are under way.
                raise in_use.waited_for()
            del self._stores[db_id]
        self._close(store)

    def _close_oldest(self) -> bool:
        """Close one that nobody uses, and was not used for longest; whether there was one."""
        with self._lock:
            unused = [store for store in self._stores.values() if _closable(store)]
            if not unused:
                return False
            victim = min(unused, key=lambda store: store.used_at)
            del self._stores[victim.db_id]
        self._close(victim)
        return True

    def _close(self, store: Store) -> None:
        try:
            store.close()
        except StorageError as error:  # out of the table, and what was acknowledged is on the disk
            log_failure(error, f"database {store.db_id}: closing it failed")

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
                    self._keep_declared(store)
                    self._purge(store)
                except Exception as error:  # the others are looked after all the same
                    store.report(error)
                    log_failure(error, f"database {name}: looking after it failed")
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
                    if (idle_s and self._is_idle(store) and store.used_at <= before)
                    or (store.broken and not store.in_the_way)
                ]
                for store in idle:
                    del self._stores[store.db_id]
            for store in idle:
                self._close(store)

    def _is_idle(self, store: Store) -> bool:
        return _closable(store) and not self.is_awaited(store.db_id)

    def _keep_declared(self, store: Store) -> None:
        """Another program may have put an index out of use, and a full disk may have ended a
        build: what is unique waits for it."""
        if self._declared and declare_all(store.database, self._declared):
            if self._schedule is None:
                store.database.build_indexes()

    def _purge(self, store: Store) -> None:
        now = self._clock.monotonic()
        due = store.purged_at is None or now - store.purged_at >= self._purge_interval_s
        if not due:
            return
        store.purged_at = now
        if not self.may_purge(store.db_id, self._purge_interval_s):
            return
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


def _closable(store: Store) -> bool:
    return not store.users and not store.pinned
