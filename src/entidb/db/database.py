"""The database: what programs hold. Opening, collections, transactions, the feed, observers, scope,
and care. The same on both sides.

Not here: what all of them use (``core``), what a local write becomes (``local``), and checks
and housekeeping (``maintenance``).
"""

from __future__ import annotations

import os
import sys
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

from entidb.db.codec import codec_for
from entidb.db.collection import Collection, kept
from entidb.db.feed import ChangeFeed
from entidb.db.identity import stored_role
from entidb.db.indexed import Indexed
from entidb.db.indexing import Index
from entidb.db.leaving import check_may_go
from entidb.db.local import Role, check_size, commit_local, commit_single
from entidb.db.maintenance import sweep_garbage
from entidb.db.observers import Observer
from entidb.db.observing import add_observer
from entidb.db.plain import Keep
from entidb.db.reading import OnInvalid, Upgrade
from entidb.db.records import META_FORMAT, encode_format, format_of
from entidb.db.rows import SnapshotRows
from entidb.db.scope import change_local, change_scope, forget_collection
from entidb.db.settings import check_settings, cursor_of, names_of
from entidb.db.sharing import AheadRows, snapshot_rows
from entidb.db.snapshot import Snapshot
from entidb.db.transaction import Transaction
from entidb.db.uniqueness import refuse_taken
from entidb.db.verifying import verify
from entidb.errors import DatabaseLockedError, ScopeError, TransactionError
from entidb.storage import open_storage
from entidb.storage.base import StoreTurn
from entidb.storage.opening import remove_store
from entidb.storage.turns import Turn
from entidb.types import (
    OPERATION_OVERHEAD_BYTES,
    TRANSACTION_CONTAINERS_MAX,
    check_bool,
    check_name,
    path_text,
)

if TYPE_CHECKING:
    from entidb.db.aio import AsyncDatabase

V = TypeVar("V")


class Database(Indexed):
    """An embedded, transactional entity database.

    ``Database.open(path)`` opens or creates one in a directory, ``Database.in_memory()`` one that
    is gone when it is closed. Thread-safe, and on Linux open in several processes at once.
    """

    plumbing = frozenset(
        (
            *("attach_engine", "begin_history", "clock", "commit_mark"),
            *("commit_one", "commit_writes", "created_ms", "detach_engine", "entropy", "history"),
            *(
                "build_indexes",
                "hear_others",
                "history_at",
                "in_transaction",
                "moment",
                "moment_of",
            ),
            *("failures", "index_functions", "index_lock", "index_paces", "index_right"),
            *("index_run", "on_commit", "read_only"),
            *("read_catalogue", "read_head", "storage", "tells_observers", "view", "where"),
            *("right", "start_hearing", "transaction_bytes_max", "write"),
        )
    )
    _engine: object | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        role: Role | None = None,
        map_bytes: int | None = None,
        salvage: bool = False,
        read_only: bool = False,
        **options: Any,
    ) -> Database:
        """Open the database in directory ``path``; made if missing and ``create``.

        ``map_bytes`` bounds how large it can grow before the map is enlarged (address space, not
        disk; by default twice what there is, and 4 GiB). ``salvage`` opens a file with damaged
        pages too, to read what can still be read: do it in a process of its own, because a damaged
        page may end it. ``read_only`` makes and changes no file, so that a backup stays one and
        files that may not be written can be read; several processes may do so at once (not on
        Windows), and what would write raises ``TransactionError``. They keep those out who would
        write; beside a process that writes already it reads like any other. Other options are those
        of the constructor.

        Raises ``ConfigError`` for a setting that cannot be (nothing is made then),
        ``FormatError`` (not a database, truncated, newer; left untouched),
        ``CorruptionError`` (damaged pages; left untouched),
        ``DatabaseLockedError`` (open in another process that has it alone, or twice in this one),
        ``StorageError``.
        """
        where = path_text(path)
        check_bool("salvage", salvage)
        check_bool("read_only", read_only)
        check_settings(role=role, map_bytes=map_bytes, **options)
        create = create and not read_only
        storage = open_storage(
            where, create=create, map_bytes=map_bytes, salvage=salvage, read_only=read_only
        )
        try:
            if role is None:
                role = stored_role(storage)
            options |= {"where": where, "read_only": read_only}
            return cls(storage, role=role, create=create, **options)
        except BaseException:
            storage.close()
            raise

    @classmethod
    def in_memory(cls, **options: Any) -> Database:
        """A database without files, for tests and caches; it can sync like any other."""
        from entidb.storage import MemoryStorage  # for tests, mostly

        return cls(MemoryStorage(), where="memory", **options)

    # ------------------------------------------------------------ reading

    @overload
    def collection(
        self,
        name: str,
        *,
        local: bool | None = None,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
        indexes: Sequence[Index] | None = None,
    ) -> Collection[Any]: ...

    @overload
    def collection(
        self,
        name: str,
        type: type[V],
        *,
        local: bool | None = None,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
        indexes: Sequence[Index] | None = None,
    ) -> Collection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        local: bool | None = None,
        exact: bool = False,
        on_invalid: OnInvalid = "raise",
        upgrade: Upgrade | None = None,
        indexes: Sequence[Index] | None = None,
    ) -> Collection[Any]:
        """The collection ``name`` as a mapping from ``uuid.UUID`` to values.

        ``type`` makes it typed: a dataclass, an attrs class, a msgspec Struct, a TypedDict or a
        pydantic model. What is written comes back equal, or the write is refused. Fields of a
        stored entity that the class does not know, because a newer program wrote them, survive a
        write; ``exact=True`` erases them.
        ``upgrade`` makes the newest shape of a stored value of any age, and gives one of that
        shape back as it is; everything that is read here goes through it, also what a condition
        looks at, and nothing is rewritten (``migrate`` does that, once, on the server).
        ``on_invalid`` says what happens to an entity that does not fit the class all the same:
        ``"raise"`` raises ``ValueTypeError`` with its id, the field and the reason, and an
        iterator goes on behind it with ``next``; ``"skip"`` leaves it out wherever several are
        read; a function is given the error and the stored value, and answers what stands in its
        place, or None to leave it out. Asked for by its id, what would be left out raises.
        ``indexes`` are all that the collection is to have, stored in the database: new ones are
        built in the background, others are dropped (None: as they are). They are kept in step by
        every commit of every program, and never synchronised.
        ``local=True`` declares that it never synchronises (R31); stored in the database.
        Raises ``InvalidNameError``; ``ValueTypeError`` for a class that cannot come back as it
        was, naming the field; ``ConfigError``; ``ScopeError`` when a collection with data or
        pending changes would turn local or synchronised (use ``set_scope`` and
        ``declare_local``).
        """
        check_name(name)
        codec = codec_for(type, exact=exact, on_invalid=on_invalid, upgrade=upgrade)
        if local is not None:
            self.declare_local(name, local)
        if indexes is not None:
            self._declare_indexes(name, indexes)
        commit = self.commit_one
        observe = partial(add_observer, self, "live")
        return Collection(name, codec, self._open_rows, self.transaction, commit, observe)

    def __getitem__(self, name: str) -> Collection[Any]:
        """``db["notes"]`` is ``db.collection("notes")``."""
        return self.collection(name)

    def collections(self) -> list[str]:
        """Names of the collections that exist, in order."""
        with self._open_rows() as rows:
            return sorted(rows.catalogue.by_name)

    def snapshot(self) -> Snapshot:
        """One unchanging view to read several things from."""
        snapshot = self.storage.snapshot()
        try:
            return Snapshot(SnapshotRows(snapshot, self.read_catalogue(snapshot)))
        except BaseException:
            snapshot.close()
            raise

    def changes(self, after: int = 0, *, collections: Iterable[str] | None = None) -> ChangeFeed:
        """What changed after commit ``after`` (exclusive), in commit order. See ``ChangeFeed``.
        Raises ``ConfigError`` for what is no cursor, and names that cannot be."""
        chosen = None if collections is None else names_of(collections)
        return ChangeFeed(self._open_rows, cursor_of(after), chosen)

    @property
    def sequence(self) -> int:
        """The newest commit sequence."""
        return self.read_head().sequence

    # ------------------------------------------------------------ writing

    def transaction(self) -> Transaction:
        """Begin a transaction; ``with db.transaction() as tx: tx.collection("notes")[id] = …``.

        Waits for another thread's transaction, at most ``busy_timeout_s``. Raises
        ``TransactionError`` for a second one in the same thread.
        """
        turn = Turn()
        snapshot = None
        try:
            self._take(turn, True)
            ahead = self._sharing.ahead() if self._sharing.jobs else None
            snapshot = self.storage.snapshot()
            now = self._rows_to_write(snapshot)
            rows = now if ahead is None else AheadRows(now, *ahead)
            identity = self._ids.new_bytes()
            commit, release = self._commit_transaction, self._end_transaction
            made = Transaction(identity, rows, turn, commit, release, self._ids.new_bytes)
            turn.kept = weakref.ref(made, self._drop_void)
            return made
        except BaseException:
            if snapshot is not None:
                snapshot.close()
            self._give_back(turn)
            raise

    def _end_transaction(self, tx: Transaction) -> None:
        rows = tx._rows.below
        if not isinstance(rows, SnapshotRows):
            rows = snapshot_rows(rows)
        rows.snapshot.close()
        self._give_back(tx._turn)
        self._observers.deliver()

    def _commit_transaction(self, tx: Transaction) -> int:
        self._begin_commit(tx._turn)
        check_size(tx.writes, self.transaction_bytes_max)
        if not tx.writes:
            return 0
        rows, sharing = tx._rows.below, self._sharing
        if sharing.warm or len(self._turns.line) > 1 or not isinstance(rows, SnapshotRows):
            if sharing.takes(rows, tx.writes):
                return sharing.commit_transaction(tx._turn, rows, tx.writes, tx.transaction_id)
            rows = tx._rows.below = sharing.settled(rows)
        writer = self._writer(rows.snapshot)
        if writer.watcher is not None:
            refuse_taken(writer, tx.writes, decides=self.role is Role.SERVER)
        sequence = commit_local(writer, self.role, tx.writes, tx.transaction_id, self._tick(writer))
        if sequence:
            self._store(writer, "local")
        return sequence

    def commit_one(
        self, name: str, entity_id: bytes | None, payload: bytes, keep: Keep | None = None
    ) -> bytes:
        """Store one entity in a transaction of its own, under a new id where ``entity_id`` is
        None; returns the id. ``keep`` makes what is written of ``payload`` and of what is stored,
        if something is. Raises what ``transaction`` and its ``commit`` do. For collections;
        programs write through those.

        What programs do most, so without the objects that one holds on to in a transaction."""
        if self._turns.line or self._sharing.warm:
            merge = None if keep is None else partial(kept, keep, name)
            if shared := self._sharing.commit_one(name, entity_id, payload, merge):
                return shared
        with self.write("local") as writer:
            new, now = self._ids, writer.now_ms
            transaction_id, made = (new.new_bytes(), entity_id) if entity_id else new.new_pair(now)
            if keep is not None and entity_id is not None:
                rows = SnapshotRows(writer.snapshot, writer.catalogue)
                if (stored := rows.get(name, made)) is not None:
                    payload = kept(keep, name, made, payload, stored)
            # A payload has no more containers than bytes, so a small one is within every bound.
            size = len(payload) + OPERATION_OVERHEAD_BYTES
            if size > TRANSACTION_CONTAINERS_MAX or size > self.transaction_bytes_max:
                check_size({name: {made: payload}}, self.transaction_bytes_max)
            if writer.watcher is not None:
                refuse_taken(writer, {name: {made: payload}}, decides=self.role is Role.SERVER)
            place, stamp = (name, made, payload), self._tick(writer)
            commit_single(writer, self.role, *place, transaction_id, stamp, entity_id is None)
        return made

    @cached_property
    def aio(self) -> AsyncDatabase:
        """This database for an asyncio program: writes are awaited, and do not stop the loop."""
        from entidb.db.aio import AsyncDatabase

        return AsyncDatabase(self, self.close)

    @classmethod
    async def open_async(
        cls, path: str | os.PathLike[str], *, create: bool = True, **options: Any
    ) -> Database:
        """As ``open``, without stopping the event loop meanwhile."""
        from entidb.db.aio import in_thread

        return await in_thread(lambda: cls.open(path, create=create, **options), "entidb-aio-open")

    # ------------------------------------------------------------ observers

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer`` after every commit that changes what readers see, in commit order,
        outside all locks, in the thread that committed; returns a function that ends it. Of what
        other processes commit it hears too, in a thread of its own, within some hundredths of a
        second (``CommitEvent.origin`` is ``"process"``).

        What an observer raises goes to ``sys.unraisablehook``, the other observers are called, and
        the commit returns: it is durable and cannot fail any more. (Ctrl-C and other
        ``BaseException`` reach the caller of the commit, after the other observers.) Raises
        ``ConfigError`` for what cannot be called, and for an ``async def``."""
        return add_observer(self, "observe", observer)

    def tells_observers(self, thread: int | None) -> bool:
        """Whether ``thread`` is calling observers now."""
        return self._observers.is_called_by(thread)

    # ------------------------------------------------------------ scope and engine

    def declare_local(self, name: str, local: bool = True) -> None:
        """Say that collection ``name`` stays on this device (R31), or no longer.

        Raises ``ScopeError`` if it has pending changes (sync first). Going back to synchronised
        makes what is in it pending at the next sync."""
        check_name(name)
        with self._open_rows() as rows:
            info = rows.catalogue.by_name.get(name)
        if (info is None and not local) or (info is not None and info.local == local):
            return
        if self.role is Role.SERVER and not local:
            raise ScopeError(
                f"collection {name!r} is local on this server and devices have pulled past it; "
                "copy its entities into another collection to share them"
            )
        with self.write("local") as writer:
            change_local(writer, name, local)

    @property
    def scope(self) -> frozenset[str] | None:
        """Names of the collections that synchronise; None: all that are not local."""
        with self._open_rows() as rows:
            return rows.catalogue.scope

    def set_scope(self, collections: Iterable[str] | None) -> None:
        """Choose what synchronises, both ways (R31); stored in the database.

        Widening makes what is already in the new collections pending and pulls them from the
        beginning at the next sync; narrowing keeps the local data. Raises ``ScopeError`` if a
        collection that would leave has pending changes; ``ConfigError`` for what are no names."""
        if self.role is Role.SERVER:
            raise ScopeError("a server has no scope; declare_local() keeps a collection on it")
        wanted = None if collections is None else names_of(collections)
        if wanted == self.scope:
            return
        with self.write("local") as writer:
            change_scope(writer, wanted)

    def forget(self, name: str) -> None:
        """Drop the local copy of a collection that does not synchronise (R31): what a narrowed
        scope left behind, or a local collection. Readers get a ``reset`` event.

        Raises ``ScopeError`` for a collection that synchronises."""
        check_name(name)
        with self.write("local") as writer:
            forget_collection(writer, name)

    def attach_engine(self, engine: object) -> None:
        """Give the database to ``engine``, the one sync engine that it has in this process; those
        of several processes take turns. Raises ``DatabaseLockedError``."""
        if self._engine is not None and self._engine is not engine:
            raise DatabaseLockedError(
                f"{self.where} already has a sync engine; close that one first"
            )
        self._engine = engine

    def detach_engine(self, engine: object) -> None:
        if self._engine is engine:
            self._engine = None

    def right(self, name: str) -> StoreTurn:
        """The right called ``name``, which one process has at a time: ``"engine"`` while a cycle
        runs, ``"background"`` for the process whose engine runs in the background."""
        right = self._rights.get(name)
        if right is None:
            # One object, whoever asks at the same time.
            right = self._rights.setdefault(name, self.storage.claim(name))
        return right

    # ------------------------------------------------------------ care

    def verify(self) -> list[str]:
        """Check every record, checksum and cross-reference; returns the faults found, one line
        each, empty when all is well."""
        return verify(self)

    def compact(self) -> None:
        """Empty what was replaced and give unused room back to the file system."""
        if self._read_only:
            raise self._no_writing()
        while sweep_garbage(self):
            continue
        self.storage.compact()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a consistent copy to the new directory ``path`` while work goes on. A server
        opened from it begins a new history (R29). Raises ``StorageError`` if ``path`` exists,
        ``ConfigError`` for what cannot be a path."""
        with self._format_lock:
            with self.storage.snapshot() as snapshot:
                version = format_of(snapshot.get(META_FORMAT) or b"")
            changes = [(META_FORMAT, encode_format(version, backup=True))]
            self.storage.backup(path_text(path), changes)

    def new_id(self) -> uuid.UUID:
        """A new UUIDv7, later than all before it."""
        return self._ids.new()

    def close(self) -> None:
        """Idempotent. Waits for a transaction of another thread to end.

        A transaction of this thread that is still open is aborted when an exception is on its way
        through here, Ctrl-C too. Without one it is a mistake in the program: ``TransactionError``,
        and both stay open."""
        if self._closed:
            return
        mine = self._turns.mine()
        if mine is not None:
            if mine.committing or sys.exception() is None:
                raise TransactionError("close the transaction before the database")
            self._give_back(mine)
        self._end_builder()
        with self._turns.hold():
            for right in self._rights.values():
                right.give_back()
            self._sharing.close()
            self.storage.close()
            self._closed = True
        for tell in list(self._observers.when_closed):
            tell()

    def destroy(self, *, discard_pending: bool = False) -> None:
        """Close the database and remove its files, as when a person signs out for good. The disk
        may keep their bytes until it needs the room; the server's copy is untouched.

        Raises ``ScopeError`` (``scope_pending``) while transactions wait that the server has not
        decided, unless ``discard_pending``; ``TransactionError`` if a sync engine still has it.
        Nothing happens then. ``DatabaseLockedError`` if another process has it open: then it is
        closed here, and nothing is removed. ``StorageError``."""
        check_may_go(self, self._engine is not None, discard_pending)
        path = self.storage.info().path
        self.close()
        if path is not None:
            remove_store(path)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Database {self.where!r} {self.role.value}>"
