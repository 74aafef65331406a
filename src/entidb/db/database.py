"""The database: opening, reading, committing, telling observers. The same core on both sides.

One writer at a time holds the writer lock; readers take snapshots and wait for nobody. What a
commit contains is decided in ``transaction`` (local writes), ``entidb.sync`` (applying and
settling) and ``entidb.server`` (pushes); all of them go through ``Database.write``. Checks and
housekeeping are in ``maintenance``.
"""

from __future__ import annotations

import os
import sys
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, overload

from msgspec import Struct

from entidb import cbor
from entidb.db.catalogue import Catalogue, decode_catalogue, empty_catalogue
from entidb.db.codec import Keep, codec_for
from entidb.db.collection import Collection, ReadCollection, kept
from entidb.db.feed import ChangeEvent, ChangeFeed, load_events
from entidb.db.listeners import add_listener, report_bug
from entidb.db.records import (
    META_BEGUN,
    META_CATALOGUE,
    META_COLUMNS,
    META_FORMAT,
    META_HEAD,
    META_IDENTITY,
    SPACED,
    Head,
    decode_format,
    decode_head,
    encode_format,
    is_spacer,
)
from entidb.db.rows import Rows, SnapshotRows
from entidb.db.transaction import Role, Transaction, Writes, check_size, commit_local
from entidb.db.writer import STALE_ROWS_MAX, Writer
from entidb.errors import (
    ConfigError,
    CorruptionError,
    DatabaseClosedError,
    DatabaseLockedError,
    FormatError,
    ScopeError,
    StorageError,
    TransactionError,
)
from entidb.storage import MemoryStorage, Storage, open_storage
from entidb.storage import Snapshot as StorageSnapshot
from entidb.storage.regions import spacers_of
from entidb.storage.turns import EndOfBlock, Turn, Turns, enter_block
from entidb.types import (
    SEQUENCE_MAX,
    TRANSACTION_BYTES_MAX,
    Clock,
    Entropy,
    IdSource,
    SystemClock,
    check_bool,
    check_int,
    check_name,
    check_number,
    next_timestamp,
    path_text,
    system_entropy,
    timestamp_from_ms,
)

V = TypeVar("V")

#: Bounds that only keep a typo from going unnoticed; ``map_bytes``: what a process can address.
_MAP_BYTES_MAX = 1 << 46
_TRANSACTION_BYTES_LIMIT = 1 << 30
_BUSY_TIMEOUT_MAX_S = 7 * 24 * 3600.0
_STALE_ROWS_LIMIT = 10_000_000
#: Names of the columns of one collection that are worth remembering.
COLUMNS_BYTES_MAX = 64 << 10
#: By so much a server's clock may go back, and what it writes is still later than what it wrote.
CLOCK_BACK_MS = 60_000


class CommitEvent(Struct, frozen=True):
    """What observers are called with, once per storage commit that changed what readers see.
    ``origin`` is ``"local"`` or ``"sync"``."""

    sequence: int
    origin: str
    events: list[ChangeEvent]


Observer = Callable[[CommitEvent], None]


class Snapshot:
    """One unchanging view of the whole database. Close it, or use it as a context manager."""

    def __init__(self, rows: SnapshotRows) -> None:
        self._rows = rows
        raw = rows.snapshot.get(META_HEAD)
        #: The newest commit this snapshot contains.
        self.sequence = 0 if raw is None else decode_head(raw).sequence

    @overload
    def collection(self, name: str) -> ReadCollection[Any]: ...

    @overload
    def collection(self, name: str, type: type[V]) -> ReadCollection[V]: ...

    def collection(self, name: str, type: type[Any] | None = None) -> ReadCollection[Any]:
        check_name(name)
        return ReadCollection(name, codec_for(type), self._open)

    def __getitem__(self, name: str) -> ReadCollection[Any]:
        """``snapshot["notes"]`` is ``snapshot.collection("notes")``."""
        return self.collection(name)

    def collections(self) -> list[str]:
        return sorted(self._rows.catalogue.by_name)

    def close(self) -> None:
        """Idempotent."""
        self._rows.snapshot.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def _open(self) -> Iterator[Rows]:
        yield self._rows


class _OpenRows:
    """Context manager of one short read; a class because it is entered for every ``get``."""

    __slots__ = ("_database", "_snapshot")

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> SnapshotRows:
        self._snapshot = snapshot = self._database.storage.snapshot()
        try:
            return SnapshotRows(snapshot, self._database.read_catalogue(snapshot))
        except BaseException:
            snapshot.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self._snapshot.close()


class _WriteBlock:
    """Context manager of ``Database.write``; a class because its end may not be missed."""

    __slots__ = ("__weakref__", "_database", "_leaving", "_origin", "_snapshot", "_turn", "_writer")

    def __init__(self, database: Database, origin: str) -> None:
        self._leaving: weakref.ref[Any] | None = None
        self._database = database
        self._origin = origin
        self._snapshot: StorageSnapshot | None = None
        self._turn = Turn()

    def __enter__(self) -> Writer:
        database = self._database
        try:
            enter_block(self._turn, self._leaving)
            database._take(self._turn)
            self._snapshot = snapshot = database.storage.snapshot()
            self._writer = database._writer(database._rows_to_write(snapshot))
            return self._writer
        except BaseException:
            self._end()
            raise

    def _leave(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._database._begin_commit(self._turn)
                self._database._store(self._writer, self._origin)
            self._end()
            if kind is None:
                self._database._deliver()
        except BaseException:
            self._end()
            if kind is None:
                # What was committed before an interrupt, or by an observer that raised one.
                self._database._deliver()
            raise

    def _end(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
        self._database._turns.give_back(self._turn)

    if TYPE_CHECKING:

        def __exit__(self, kind: object, *rest: object) -> None: ...

    else:
        __exit__ = EndOfBlock()


class Database:
    """An embedded, transactional entity database.

    ``Database.open(path)`` opens or creates one in a directory, ``Database.in_memory()`` one that
    is gone when it is closed. Thread-safe; one process at a time.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        role: Role = Role.DEVICE,
        create: bool = True,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
        transaction_bytes_max: int = TRANSACTION_BYTES_MAX,
        busy_timeout_s: float = 60.0,
        stale_rows_max: int = STALE_ROWS_MAX,
        where: str = "this store",
        read_only: bool = False,
    ) -> None:
        """A database on an open ``storage``, which it owns from now on. Programs use ``open``.

        ``role`` matters when the store is new; an existing one keeps its own, and
        ``ConfigError`` says so if ``role`` is another, or which setting cannot be. Raises
        ``FormatError``.
        """
        _check_settings(
            transaction_bytes_max=transaction_bytes_max,
            busy_timeout_s=busy_timeout_s,
            stale_rows_max=stale_rows_max,
        )
        self.storage = storage
        self.clock: Clock = clock or SystemClock()
        self.entropy = entropy
        self.transaction_bytes_max = transaction_bytes_max
        self.where = where
        self._read_only = read_only
        self._ids = IdSource(self.clock, entropy)
        self._busy_timeout_s = busy_timeout_s
        self._stale_rows_max = stale_rows_max
        self._turns = Turns()
        self._catalogue_cache: tuple[bytes, Catalogue] = (b"", empty_catalogue())
        #: Head and catalogue of the last commit, for whoever has the turn; None: not known.
        self._head_cache: bytes | None = None
        self._committed_catalogue: Catalogue | None = None
        #: Moves before and after every attempt to commit: what was read while it stood still is
        #: still true while it has not moved (R17).
        self.commit_mark = 0
        self._observers: list[Observer] = []
        self._deliveries: deque[CommitEvent] = deque()
        self._delivering = Turns()
        self._engine: object | None = None
        self._closed = False
        self._load(role, create)

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
        Windows), and what would write raises ``TransactionError``. Other options are those of the
        constructor.

        Raises ``ConfigError`` for a setting that cannot be (nothing is made then),
        ``FormatError`` (not a database, truncated, newer; left untouched),
        ``CorruptionError`` (damaged pages; left untouched),
        ``DatabaseLockedError`` (open in another process, or twice in this one), ``StorageError``.
        """
        where = path_text(path)
        check_bool("salvage", salvage)
        check_bool("read_only", read_only)
        _check_settings(map_bytes=map_bytes, **options)
        create = create and not read_only
        storage = open_storage(
            where, create=create, map_bytes=map_bytes, salvage=salvage, read_only=read_only
        )
        try:
            if role is None:
                role = _stored_role(storage)
            options |= {"where": where, "read_only": read_only}
            return cls(storage, role=role, create=create, **options)
        except BaseException:
            storage.close()
            raise

    @classmethod
    def in_memory(cls, **options: Any) -> Database:
        """A database without files, for tests and caches; it can sync like any other."""
        return cls(MemoryStorage(), where="memory", **options)

    # ------------------------------------------------------------ reading

    @overload
    def collection(self, name: str, *, local: bool | None = None) -> Collection[Any]: ...

    @overload
    def collection(
        self, name: str, type: type[V], *, local: bool | None = None, exact: bool = False
    ) -> Collection[V]: ...

    def collection(
        self,
        name: str,
        type: type[Any] | None = None,
        *,
        local: bool | None = None,
        exact: bool = False,
    ) -> Collection[Any]:
        """The collection ``name`` as a mapping from ``uuid.UUID`` to values.

        ``type`` makes it typed: a dataclass, an attrs class, a msgspec Struct, a TypedDict or a
        pydantic model. What is written comes back equal, or the write is refused. Fields of a
        stored entity that the class does not know, because a newer program wrote them, survive a
        write; ``exact=True`` erases them.
        ``local=True`` declares that it never synchronises (R31); stored in the database.
        Raises ``InvalidNameError``; ``ValueTypeError`` for a class that cannot come back as it
        was, naming the field; ``ScopeError`` when a collection with data or pending
        changes would turn local or synchronised (use ``set_scope`` and ``declare_local``).
        """
        check_name(name)
        codec = codec_for(type, exact=exact)
        if local is not None:
            self.declare_local(name, local)
        return Collection(name, codec, self._open_rows, self.transaction, self.commit_one)

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
        given: object = after
        if not isinstance(given, int) or isinstance(given, bool):
            raise ConfigError(
                f"after must be the number of a commit, as `cursor` gives it, not {given!r:.60}"
            )
        chosen = None if collections is None else _names(collections)
        return ChangeFeed(self._open_rows, min(max(after, 0), SEQUENCE_MAX), chosen)

    @property
    def sequence(self) -> int:
        """The newest commit sequence."""
        return self.read_head().sequence

    def read_head(self) -> Head:
        with self.storage.snapshot() as snapshot:
            raw = snapshot.get(META_HEAD)
        return Head() if raw is None else decode_head(raw)

    # ------------------------------------------------------------ writing

    def transaction(self) -> Transaction:
        """Begin a transaction; ``with db.transaction() as tx: tx.collection("notes")[id] = …``.

        Waits for another thread's transaction, at most ``busy_timeout_s``. Raises
        ``TransactionError`` for a second one in the same thread.
        """
        turn = Turn()
        snapshot = None
        try:
            self._take(turn)
            snapshot = self.storage.snapshot()
            rows = self._rows_to_write(snapshot)
            identity = self._ids.new_bytes()
            commit, release = self._commit_transaction, self._end_transaction
            made = Transaction(identity, rows, turn, commit, release, self._ids.new_bytes)
            turn.kept = weakref.ref(made)
            return made
        except BaseException:
            if snapshot is not None:
                snapshot.close()
            self._turns.give_back(turn)
            raise

    def _end_transaction(self, tx: Transaction) -> None:
        rows = tx._rows.below
        assert isinstance(rows, SnapshotRows)
        rows.snapshot.close()
        self._turns.give_back(tx._turn)
        self._deliver()

    def _commit_transaction(self, tx: Transaction) -> int:
        self._begin_commit(tx._turn)
        check_size(tx.writes, self.transaction_bytes_max)
        if not tx.writes:
            return 0
        rows = tx._rows.below
        assert isinstance(rows, SnapshotRows)
        writer = self._writer(rows)
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
        with self.write("local") as writer:
            transaction_id = self._ids.new_bytes()
            made = self._ids.new_bytes() if entity_id is None else entity_id
            if keep is not None:
                rows = SnapshotRows(writer.snapshot, writer.catalogue)
                if (stored := rows.get(name, made)) is not None:
                    payload = kept(keep, name, made, payload, stored)
            writes: Writes = {name: {made: payload}}
            check_size(writes, self.transaction_bytes_max)
            commit_local(writer, self.role, writes, transaction_id, self._tick(writer))
        return made

    def write(self, origin: str = "sync") -> AbstractContextManager[Writer]:
        """Stage one storage commit of any kind; committed when the block ends, dropped when it
        raises. For the sync engine and the server; programs use ``transaction``."""
        return _WriteBlock(self, origin)

    @contextmanager
    def view(self) -> Iterator[Writer]:
        """The same reading methods as ``write`` gives, on a snapshot, without a lock; what is
        staged in it is dropped."""
        with self._open_rows() as rows:
            raw = rows.snapshot.get(META_HEAD)
            yield Writer(rows.snapshot, rows.catalogue, raw, self.device_id, 0)

    def commit_writes(self, writer: Writer, writes: Writes) -> int:
        """Stage a local transaction with a new id within ``writer``; returns its sequence."""
        if not writes:
            return 0
        return commit_local(writer, self.role, writes, self._ids.new_bytes(), self._tick(writer))

    def column_order(self, name: str) -> list[str]:
        """In which order an imported file had the fields of collection ``name``; canonical CBOR
        keeps none. Empty if nobody knows. Of this device alone."""
        with self._open_rows() as rows:
            raw = rows.snapshot.get(META_COLUMNS)
        order: list[str] = [] if raw is None else cbor.decode_trusted(raw).get(name, [])
        return order

    def keep_column_order(self, name: str, columns: Sequence[str]) -> None:
        """Remember ``columns`` for ``column_order``, in front of those that are known already;
        nothing, where they are more than ``COLUMNS_BYTES_MAX``."""
        check_name(name)
        order = list(dict.fromkeys([*columns, *self.column_order(name)]))
        if order == self.column_order(name) or len("".join(order).encode()) > COLUMNS_BYTES_MAX:
            return
        with self.write("local") as writer:
            raw = writer.get(META_COLUMNS)
            known = {} if raw is None else cbor.decode_trusted(raw)
            writer.put(META_COLUMNS, cbor.encode({**known, name: order}))

    def begin_history(self, times_max: int, within_ms: int) -> bool:
        """Give a server's database a new history (R29), in one commit; whether it was done: more
        than ``times_max`` times within ``within_ms`` it is not. Entities, versions and ids stay.
        The times stand in the database, so whoever puts its files back puts them back too."""
        with self.write() as writer:
            since, now = writer.now_ms - within_ms, writer.now_ms
            raw = writer.get(META_BEGUN)
            times = [] if raw is None else cbor.decode_trusted(raw)
            # One from beyond the present is a wrong clock's.
            times = [time for time in times if since < time <= now]
            if len(times) >= times_max:
                return False
            stored = writer.get(META_IDENTITY)
            assert stored is not None, "a database that is open has an identity"
            identity = {**cbor.decode_trusted(stored), "history": self.entropy(16)}
            writer.put(META_IDENTITY, cbor.encode(identity))
            writer.put(META_BEGUN, cbor.encode([*times, now]))
        self._take_identity(identity)
        return True

    def _rows_to_write(self, snapshot: StorageSnapshot) -> SnapshotRows:
        """For whoever has the turn: nobody has committed since the last one who had it did."""
        catalogue = self._committed_catalogue
        if catalogue is None:
            catalogue = self.read_catalogue(snapshot)
        return SnapshotRows(snapshot, catalogue)

    def _writer(self, rows: SnapshotRows) -> Writer:
        raw = self._head_cache
        if raw is None:
            raw = rows.snapshot.get(META_HEAD)
        now = self.clock.now_ms()
        slack = self._stale_rows_max
        return Writer(rows.snapshot, rows.catalogue, raw, self.device_id, now, slack)

    def _tick(self, writer: Writer) -> int:
        last = writer.head.timestamp
        if self.role is Role.SERVER and last > timestamp_from_ms(writer.now_ms + CLOCK_BACK_MS):
            # Nobody tells a server what time it is, so a time far beyond its clock is one from when
            # that was wrong (R27). Small steps back are made up for as anywhere.
            last = 0
        writer.head.timestamp = next_timestamp(writer.now_ms, last)
        return writer.head.timestamp

    def _store(self, writer: Writer, origin: str) -> None:
        changes = writer.finish()
        if not changes:
            return
        # A map that has to grow waits for open snapshots, so this one must not be among them.
        writer.snapshot.close()
        # R17: whatever the commit does, nothing is answered from memory until it has worked.
        self._head_cache = self._committed_catalogue = None
        try:
            self.commit_mark += 1
            self.storage.commit(changes)
            self.commit_mark += 1
        except BaseException:
            self.commit_mark += 1
            raise
        self._head_cache = writer.encoded_head
        self._committed_catalogue = writer.catalogue
        raw = changes.get(META_CATALOGUE)
        if raw is not None:
            # Readers need not decode what was in hand a moment ago.
            self._catalogue_cache = raw, writer.catalogue
        if self._observers and (rows := writer.feed_rows()):
            self._deliveries.append(self._describe(writer.head.sequence, rows, origin))

    # ------------------------------------------------------------ observers

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call ``observer`` after every commit that changes what readers see, in commit order,
        outside all locks, in the thread that committed; returns a function that ends it.

        What an observer raises goes to ``sys.unraisablehook``, the other observers are called,
        and the commit returns: it is durable and cannot fail any more. (Ctrl-C and other
        ``BaseException`` go on to whoever commits, after the other observers.) Raises
        ``ConfigError`` for what cannot be called, and for an ``async def``."""
        return add_listener(self._observers, observer, "observe")

    def tells_observers(self, thread: int | None) -> bool:
        """Whether ``thread`` is calling observers now."""
        return any(turn.thread == thread for turn in self._delivering.first())

    @property
    def in_transaction(self) -> bool:
        """Whether this thread has a transaction open, or waits for one."""
        return self._turns.mine() is not None

    def _describe(
        self, sequence: int, feed: list[tuple[tuple[int, int, bytes], bytes]], origin: str
    ) -> CommitEvent:
        with self._open_rows() as rows:
            entities = [place for place, _ in feed if place[1]]
            events = load_events(rows.snapshot, rows.catalogue, entities)
        for place, record in feed:
            if not place[1]:
                names = cbor.decode_trusted(record)
                events += [ChangeEvent(place[0], "reset", name, "remote") for name in names]
        return CommitEvent(sequence, origin, events)

    def _deliver(self) -> None:
        # Commits made by an observer queue up and are delivered by the loop that is running.
        while self._deliveries and self._delivering.idle():
            turn = Turn()
            try:
                if not self._delivering.take(turn, 0):
                    return
                while self._deliveries:
                    self._call_observers(self._deliveries.popleft())
                self._delivering.give_back(turn)
            except BaseException:
                self._delivering.give_back(turn)
                raise

    def _call_observers(self, event: CommitEvent) -> None:
        self._call_each(iter(list(self._observers)), event)

    def _call_each(self, observers: Iterator[Observer], event: CommitEvent) -> None:
        for observer in observers:
            try:
                observer(event)
            except Exception as error:
                report_bug(error, observer)
            except BaseException:
                self._call_each(observers, event)
                raise

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
        from entidb.db.scope import change_local

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
        from entidb.db.scope import change_scope

        if self.role is Role.SERVER:
            raise ScopeError("a server has no scope; declare_local() keeps a collection on it")
        wanted = None if collections is None else _names(collections)
        if wanted == self.scope:
            return
        with self.write("local") as writer:
            change_scope(writer, wanted)

    def forget(self, name: str) -> None:
        """Drop the local copy of a collection that does not synchronise (R31): what a narrowed
        scope left behind, or a local collection. Readers get a ``reset`` event.

        Raises ``ScopeError`` for a collection that synchronises."""
        from entidb.db.scope import forget_collection

        check_name(name)
        with self.write("local") as writer:
            forget_collection(writer, name)

    def attach_engine(self, engine: object) -> None:
        """One sync engine at a time (other processes are kept out by the store's lock)."""
        if self._engine is not None and self._engine is not engine:
            raise DatabaseLockedError(
                f"{self.where} already has a sync engine; close that one first"
            )
        self._engine = engine

    def detach_engine(self, engine: object) -> None:
        if self._engine is engine:
            self._engine = None

    # ------------------------------------------------------------ care

    def verify(self) -> list[str]:
        """Check every record, checksum and cross-reference; returns the faults found, one line
        each, empty when all is well."""
        from entidb.db.maintenance import verify

        return verify(self)

    def compact(self) -> None:
        """Empty what was replaced and give unused room back to the file system."""
        if self._read_only:
            raise self._no_writing()
        from entidb.db.maintenance import sweep_garbage

        while sweep_garbage(self):
            continue
        self.storage.compact()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a consistent copy to the new directory ``path`` while work goes on. A server
        opened from it begins a new history (R29). Raises ``StorageError`` if ``path`` exists,
        ``ConfigError`` for what cannot be a path."""
        self.storage.backup(path_text(path), [(META_FORMAT, encode_format(backup=True))])

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
            self._turns.give_back(mine)
        with self._turns.hold():
            self.storage.close()
            self._closed = True

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Database {self.where!r} {self.role.value}>"

    # ------------------------------------------------------------ inside

    def _open_rows(self) -> _OpenRows:
        return _OpenRows(self)

    def read_catalogue(self, snapshot: Any) -> Catalogue:
        """The catalogue of ``snapshot``; decoding is skipped while it has not changed."""
        raw = snapshot.get(META_CATALOGUE)
        cached = self._catalogue_cache
        if raw == cached[0]:
            return cached[1]
        catalogue = empty_catalogue() if raw is None else decode_catalogue(raw)
        self._catalogue_cache = (raw or b"", catalogue)
        return catalogue

    def _take(self, turn: Turn) -> None:
        """It is ``turn``'s turn to write. ``give_back`` is the caller's, whatever this raises."""
        if self._closed:
            raise DatabaseClosedError(f"{self.where} is closed; open it again to use it")
        if self._read_only:
            raise self._no_writing()
        if self._turns.mine() is not None:
            raise TransactionError(
                "a transaction is already open in this thread; write through it "
                "(`tx.collection(name)`), or commit it first"
            )
        if not self._turns.take(turn, self._busy_timeout_s):
            raise TransactionError(
                f"another thread's transaction on {self.where} has been open for more than "
                f"{self._busy_timeout_s:g} s; keep transactions short",
                code="busy",
            )

    def _no_writing(self) -> TransactionError:
        return TransactionError(
            f"{self.where} was opened only to read; open it without read_only to write"
        )

    def _begin_commit(self, turn: Turn) -> None:
        turn.committing = True
        if turn.void or not self._turns.has(turn):
            raise TransactionError(
                "this transaction was aborted when its block was left or its database closed; "
                "begin another"
            )

    def _load(self, role: Role, create: bool) -> None:
        with self.storage.snapshot() as snapshot:
            raw_format = snapshot.get(META_FORMAT)
            empty = raw_format is None and not any(
                not is_spacer(key) for key in snapshot.scan_keys(b"\0", b"\xff", limit=100)
            )
            raw_identity = snapshot.get(META_IDENTITY)
            raw_head = snapshot.get(META_HEAD)
        if empty:
            if not create:
                raise FormatError(f"{self.where} holds no EntiDB database")
            self._initialise(role)
            return
        backup = decode_format(raw_format, self.where)
        self._head_cache = raw_head or Head().encode()
        if raw_identity is None:
            raise FormatError(f"{self.where} has no identity record; restore it from a backup")
        identity = cbor.decode_trusted(raw_identity)
        self._take_identity(identity)
        if self.role is not role:
            raise ConfigError(
                f"{self.where} is a {self.role.value} database, not a {role.value} one; "
                "give another directory"
            )
        if backup and not self._read_only:
            self._leave_backup(identity)

    def _initialise(self, role: Role) -> None:
        identity = {
            "role": role.value,
            "device_id": self.entropy(16),
            "created_ms": self.clock.now_ms(),
            "history": self.entropy(16) if role is Role.SERVER else None,
        }
        first, rows = spacers_of(self.storage, SPACED)
        # Who dies behind this leaves what ``_load`` takes for empty.
        self.storage.commit(first)
        rows |= {META_FORMAT: encode_format(), META_IDENTITY: cbor.encode(identity)}
        self.storage.commit(rows)
        self._take_identity(identity)

    def _leave_backup(self, identity: dict[str, Any]) -> None:
        """A copy comes to life: a server's begins a new history, so that devices notice (R29)."""
        if self.role is Role.SERVER:
            identity["history"] = self.entropy(16)
        self.storage.commit({META_FORMAT: encode_format(), META_IDENTITY: cbor.encode(identity)})
        self._take_identity(identity)

    def _take_identity(self, identity: dict[str, Any]) -> None:
        try:
            self.role = Role(identity["role"])
            #: 16 bytes that name this database in what it writes (R30).
            self.device_id: bytes = identity["device_id"]
            self.created_ms: int = identity["created_ms"]
            #: A server database's history (R29); None on a device.
            self.history: bytes | None = identity["history"]
        except (KeyError, TypeError, ValueError) as error:
            raise _no_identity() from error


def _check_settings(
    *,
    map_bytes: int | None = None,
    transaction_bytes_max: int = TRANSACTION_BYTES_MAX,
    busy_timeout_s: float = 0.0,
    stale_rows_max: int = STALE_ROWS_MAX,
    **others: Any,
) -> None:
    """Raises ``ConfigError``; ``others`` are the constructor's to judge."""
    if map_bytes is not None:
        check_int("map_bytes", map_bytes, 1, _MAP_BYTES_MAX)
    check_int("transaction_bytes_max", transaction_bytes_max, 1, _TRANSACTION_BYTES_LIMIT)
    check_number("busy_timeout_s", busy_timeout_s, 0.0, _BUSY_TIMEOUT_MAX_S)
    check_int("stale_rows_max", stale_rows_max, 0, _STALE_ROWS_LIMIT)


def _names(collections: Iterable[str]) -> frozenset[str]:
    """Raises ``ConfigError``, ``InvalidNameError``."""
    if isinstance(collections, str | bytes) or not isinstance(collections, Iterable):
        raise ConfigError(
            f"collections must be several names or None, not {collections!r:.60}: write ('notes',)"
        )
    names = list(collections)
    for name in names:
        check_name(name)
    return frozenset(names)


def _stored_role(storage: Storage) -> Role:
    with storage.snapshot() as snapshot:
        raw = snapshot.get(META_IDENTITY)
    if raw is None:
        return Role.DEVICE
    try:
        return Role(cbor.decode_trusted(raw)["role"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_identity() from error


def _no_identity() -> StorageError:
    return CorruptionError("the identity record cannot be read; restore a backup")
