"""The core of a database: its storage, whose turn it is to write, one commit at a time, and what
may be remembered between two.

One writer at a time holds the writer lock; readers take snapshots and never wait. What a commit
contains is decided in ``local`` (local writes), ``entidb.sync`` (applying and settling) and
``entidb.server`` (pushes); all of them go through ``Core.write``.

Not here: what programs hold (``database``), and the record of which database it is (``identity``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from entidb import cbor
from entidb.db.catalogue import Catalogue, decode_catalogue, empty_catalogue
from entidb.db.hearing import Hearing
from entidb.db.identity import (
    another_history,
    end_backup,
    identity_fields,
    make_identity,
    read_identity,
)
from entidb.db.index_pace import Paces
from entidb.db.index_run import IndexRun
from entidb.db.indexing import WELL_KNOWN, Functions, Indexing
from entidb.db.local import Role, Writes, commit_local
from entidb.db.moment import Moment
from entidb.db.notebook import Explored
from entidb.db.observers import CommitEvent, Observers
from entidb.db.records import (
    META_CATALOGUE,
    META_HEAD,
    META_IDENTITY,
    Head,
    decode_format,
    decode_head,
)
from entidb.db.replica import Inflight
from entidb.db.rows import SnapshotRows
from entidb.db.settings import check_settings
from entidb.db.sharing import Sharing
from entidb.db.terms import terms_of
from entidb.db.writer import STALE_ROWS_MAX, Left, Writer
from entidb.errors import (
    ConfigError,
    DatabaseClosedError,
    FormatError,
    LocalError,
    TransactionError,
)
from entidb.storage import Snapshot as StorageSnapshot
from entidb.storage.base import OPENING_SHIFT, Storage, StoreTurn
from entidb.storage.turns import EndOfBlock, Turn, Turns, enter_block
from entidb.types import (
    TRANSACTION_BYTES_MAX,
    Clock,
    Entropy,
    IdSource,
    check_clock,
    next_timestamp,
    system_entropy,
    timestamp_from_ms,
)

#: By so much a server's clock may go back, and what it writes is still later than what it wrote.
CLOCK_BACK_MS = 60_000
#: Beyond every mark of a store.
_FAILURE = 1 << 64


class _OpenRows(Struct, eq=False):
    """Context manager of one short read; a class because it is entered for every ``get``."""

    _database: Core
    _snapshot: Any = None

    def __enter__(self) -> SnapshotRows:
        self._snapshot = snapshot = self._database.storage.snapshot()
        try:
            return SnapshotRows(snapshot, self._database.read_catalogue(snapshot))
        except BaseException:
            snapshot.close()
            raise

    def __exit__(self, *exc: object) -> None:
        self._snapshot.close()


class _WriteBlock(Struct, eq=False, weakref=True):
    """Context manager of ``Database.write``; a class because its end may not be missed."""

    _database: Core
    _origin: str
    _turn: Turn = field(default_factory=Turn)
    _leaving: weakref.ref[Any] | None = None
    _snapshot: StorageSnapshot | None = None
    _writer: Writer | None = None

    def __enter__(self) -> Writer:
        database = self._database
        try:
            enter_block(self._turn, self._leaving)
            database._take(self._turn)
            self._snapshot = snapshot = database.storage.snapshot()
            self._writer = writer = database._writer(snapshot)
            if self._origin != "local" and (writer.marks or writer.unsent is not None):
                writer.begin(self._origin)
            return writer
        except BaseException:
            self._end()
            raise

    def _leave(self, kind: object, *rest: object) -> None:
        try:
            if kind is None and (writer := self._writer) is not None:
                self._database._begin_commit(self._turn)
                self._database._store(writer, self._origin)
                if writer.changes:
                    self._snapshot = None  # closed before its changes were committed
            self._end()
            if kind is None and self._database._observers.deliveries:
                self._database._observers.deliver()
        except BaseException:
            self._end()
            if kind is None:
                # What was committed before an interrupt, or by an observer that raised one.
                self._database._observers.deliver()
            raise

    def _end(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
        self._database._give_back(self._turn)

    if TYPE_CHECKING:

        def __exit__(self, kind: object, *rest: object) -> None: ...

    else:
        __exit__ = EndOfBlock()


class Core(Explored):
    """What reading and committing need of a database, for all that is built on it."""

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
        check_settings(
            transaction_bytes_max=transaction_bytes_max,
            busy_timeout_s=busy_timeout_s,
            stale_rows_max=stale_rows_max,
        )
        self.storage = storage
        self.clock: Clock = check_clock(clock)
        self.entropy = entropy
        self.transaction_bytes_max = transaction_bytes_max
        self.where = where
        self._read_only = read_only
        self._ids = IdSource(self.clock, entropy)
        self._busy_timeout_s = busy_timeout_s
        self._stale_rows_max = stale_rows_max
        self._turns = Turns()
        self._store_turn = storage.turn
        self._rights: dict[str, StoreTurn] = {}
        self._catalogue_cache: tuple[bytes, Catalogue, int] = (b"", empty_catalogue(), -1)
        #: Good for the thread that has the turn and finds the store at its mark.
        self._left: Left | None = None
        #: Moves with every attempt to commit that failed: nothing is answered from memory (R17).
        self.failures = 0
        self._observers = Observers()
        self._sharing = Sharing(self)
        #: Held while the files are copied: what a copy says of its format must stay true.
        self._format_lock = threading.Lock()
        #: The functions that indexes go by, by name.
        self.index_functions: Functions = dict(WELL_KNOWN)
        #: What one is being built from, and how fast; which thread, and which process builds.
        self.index_run: IndexRun | None = None
        self.index_paces, self.index_lock = Paces(), threading.Lock()
        self.index_right = storage.claim("indexes")
        self._hearing = Hearing(storage, self.hear_others, self._is_heard)
        #: Called with the sequence of every commit, after it, by the thread that still has the
        #: turn: quick, and without raising. For what passes the news on.
        self.on_commit: Callable[[int], None] | None = None
        #: Whether local commits mark what they commit as in flight (R5); a mark that was not sent.
        self.marks_commits = False
        self.unsent: Inflight | None = None
        self._closed = False
        #: The mark at which the identity was read; of no state at first.
        self._identity_mark = -1
        self._load(role, create)
        self._terms = terms_of(storage, role, read_only, entropy)

    # ---- reading

    def read_head(self) -> Head:
        with self.storage.snapshot() as snapshot:
            raw = snapshot.get(META_HEAD)
        return Head() if raw is None else decode_head(raw)

    @contextmanager
    def view(self) -> Iterator[Writer]:
        """The same reading methods as ``write`` gives, on a snapshot, without a lock; what is
        staged in it is dropped."""
        with self._open_rows() as rows:
            raw, moment = rows.snapshot.get(META_HEAD), self.moment_of(rows.snapshot)
            yield Writer(rows.snapshot, rows.catalogue, raw, self.device_id, moment)

    def moment(self) -> Moment:
        """Now, for code that is about to read and wants to remember what it reads."""
        with self.storage.snapshot() as snapshot:
            return self.moment_of(snapshot)

    def moment_of(self, snapshot: StorageSnapshot) -> Moment:
        """The moment at which everything is true that is read in ``snapshot``."""
        return Moment(self, self.failures + snapshot.mark)

    @property
    def commit_mark(self) -> int:
        """Of the newest state: another one after each attempt to commit."""
        return self.failures + self.storage.mark()

    def _open_rows(self) -> _OpenRows:
        return _OpenRows(self)

    def read_catalogue(self, snapshot: Any) -> Catalogue:
        """The catalogue of ``snapshot``; read only of a state that is not the last one that was
        asked for, and decoded only when it has changed."""
        before, catalogue, mark = self._catalogue_cache
        if snapshot.mark != mark:
            raw = snapshot.get(META_CATALOGUE)
            if raw != before:
                catalogue = empty_catalogue() if raw is None else decode_catalogue(raw)
            self._catalogue_cache = (raw or b"", catalogue, snapshot.mark)
        return catalogue

    # ---- writing

    def write(self, origin: str = "sync") -> AbstractContextManager[Writer]:
        """Stage one storage commit of any kind; committed when the block ends, dropped when it
        raises. For the sync engine and the server; programs use ``transaction``."""
        return _WriteBlock(self, origin)

    def commit_writes(self, writer: Writer, writes: Writes) -> int:
        """Stage a local transaction with a new id within ``writer``; returns its sequence."""
        if not writes:
            return 0
        return commit_local(writer, self.role, writes, self._ids.new_bytes(), self._tick(writer))

    @property
    def read_only(self) -> bool:
        """Whether it was opened only to read."""
        return self._read_only

    @property
    def in_transaction(self) -> bool:
        """Whether this thread has a transaction open, or waits for one."""
        return self._turns.mine() is not None

    def _take(self, turn: Turn, shares: bool = False) -> None:
        """It is ``turn``'s turn to write; with ``shares`` some commits may still be on their way,
        which come before. ``give_back`` is the caller's, whatever this raises."""
        if self._closed:
            raise DatabaseClosedError(f"{self.where} is closed; open it again to use it")
        if self._read_only:
            raise self._no_writing()
        if self._turns.line and self._turns.mine() is not None:
            raise TransactionError(
                "a transaction is already open in this thread; write through it "
                "(`tx.collection(name)`), or commit it first"
            )
        if not self._turns.take(turn, self._busy_timeout_s):
            raise self._busy("another thread's transaction")
        if turn.served:
            return
        if self._sharing.jobs and not self._sharing.enter(shares, self._busy_timeout_s):
            raise self._busy("another thread's commit")
        if not self._store_turn.take(self._busy_timeout_s):
            raise self._busy(f"a transaction of {self._store_turn.holder() or 'another process'}")

    def _busy(self, what: str) -> TransactionError:
        return TransactionError(
            f"{what} on {self.where} has been open for more than {self._busy_timeout_s:g} s; keep "
            "transactions short",
            code="busy",
        )

    def _give_back(self, turn: Turn) -> None:
        """End ``turn``, had or not. May be repeated when it was interrupted."""
        if turn in self._turns.line[:1] and not (self._sharing.jobs and self._sharing.leave()):
            self._store_turn.give_back()
        self._turns.give_back(turn)

    def _drop_void(self, gone: object = None) -> None:
        """Give back a turn that no thread is left to end: other processes may wait for it."""
        for first in self._turns.first():
            if first.void:
                self._give_back(first)

    def _no_writing(self) -> TransactionError:
        return TransactionError(
            f"{self.where} was opened only to read; open it without read_only to write"
        )

    def _rows_to_write(self, snapshot: StorageSnapshot) -> SnapshotRows:
        """For the thread that has the turn, with the snapshot that it took in it."""
        left = self._left
        if left is None or left[0] != snapshot.mark:
            return SnapshotRows(snapshot, self.read_catalogue(snapshot))
        return SnapshotRows(snapshot, left[2])

    def _writer(self, snapshot: StorageSnapshot) -> Writer:
        left, mark = self._left, snapshot.mark
        if left is None or left[0] != mark:
            left = mark, snapshot.get(META_HEAD), self.read_catalogue(snapshot), None, {}
            self.unsent = None  # another process may have sent it meanwhile
        _, raw, catalogue, known_state, known_counts = left
        moment, now = Moment(self, self.failures + mark), self.clock.now_ms()
        slack = self._stale_rows_max
        writer = Writer(snapshot, catalogue, raw, self.device_id, moment, now, slack)
        writer.marks, writer.unsent = self.marks_commits, self.unsent
        writer.known_state, writer.known_counts = known_state, known_counts
        if catalogue.indexes.each:
            writer.watcher = Indexing(writer, self.index_functions)
        return writer

    def _tick(self, writer: Writer) -> int:
        last = writer.head.timestamp
        if self.role is Role.SERVER and last > timestamp_from_ms(writer.now_ms + CLOCK_BACK_MS):
            # A server takes the time from no device, so a time far beyond its clock is one from
            # when that was wrong (R27). Small steps back are made up for as anywhere.
            last = 0
        writer.head.timestamp = next_timestamp(writer.now_ms, last)
        return writer.head.timestamp

    def _begin_commit(self, turn: Turn) -> None:
        turn.committing = True
        kept = turn.kept  # as ``void``, without asking twice for each commit
        if (kept is not None and kept() is None) or turn not in self._turns.line[:1]:
            raise TransactionError(
                "this transaction was aborted when its block was left or its database closed; "
                "begin another"
            )

    def _store(self, writer: Writer, origin: str, calls: Sequence[CommitEvent] = ()) -> None:
        terms = self._terms
        if terms is not None and terms.opening != writer.snapshot.mark >> OPENING_SHIFT:
            terms.begin(writer)
        if not (changes := writer.finish()):
            return
        # A map that has to grow waits for open snapshots, so this one must not be among them.
        writer.snapshot.close()
        observers = self._observers
        observers.committing = writer.first_sequence
        try:
            self.unsent = writer.unsent  # first: who sees the mark must know that it was not sent
            mark = self.storage.commit(changes, writer.snapshot.mark)
            writer.moment.mark = self.failures + mark
            if self._identity_mark == mark - 1:
                self._identity_mark = mark  # whoever changes it takes it over
            known = writer.known_state, writer.known_counts
            self._left = mark, writer.encoded_head, writer.catalogue, *known
            raw = changes.get(META_CATALOGUE)
            if raw is not None:
                # Readers need not decode what was in hand a moment ago.
                self._catalogue_cache = raw, writer.catalogue, mark
            if self.on_commit is not None:
                self.on_commit(writer.head.sequence)
            if observers.listeners and (rows := writer.feed_rows()):
                observers.tell(self._open_rows(), writer.head.sequence, rows, origin, calls)
            observers.committing = 0
        except BaseException:
            self.failures, self.unsent, observers.committing = self.failures + _FAILURE, None, 0
            raise

    def hear_others(self) -> int:
        """Call observers with what other processes have committed since they were last called; the
        mark of the store up to which that is. A thread calls this while there are observers."""
        if self._observers.listeners:
            mark = self._observers.tell_others(self._open_rows())
            self._observers.deliver()
        else:
            with self.storage.snapshot() as snapshot:
                mark = snapshot.mark
        left, on_commit = self._left, self.on_commit
        if on_commit is not None and (left is None or left[0] != mark):
            on_commit(self.read_head().sequence)
        return mark

    def start_hearing(self) -> None:
        """Call ``on_commit`` after commits of other processes too, in a thread of its own, for as
        long as it is set."""
        if self.storage.shared:
            self._hearing.start()

    def _is_heard(self) -> bool:
        return not self._closed and (bool(self._observers.listeners) or self.on_commit is not None)

    # ---- identity

    def _load(self, role: Role, create: bool) -> None:
        raw_format, raw_identity, empty = read_identity(self.storage)
        if empty:
            if not create:
                raise FormatError(f"{self.where} holds no EntiDB database")
            with self._turn_of_store():
                # Another process may have made it while this one waited.
                raw_format, raw_identity, empty = read_identity(self.storage)
                if empty:
                    made = make_identity(self.storage, role, self.entropy, self.clock.now_ms())
                    self._take_identity(made)
                    return
        backup = decode_format(raw_format, self.where)
        if raw_identity is None:
            raise FormatError(f"{self.where} has no identity record; restore it from a backup")
        self._take_identity(cbor.decode_trusted(raw_identity))
        if self.role is not role:
            raise ConfigError(
                f"{self.where} is a {self.role.value} database, not a {role.value} one; "
                "give another directory"
            )
        if backup and not self._read_only:
            with self._turn_of_store():
                self._leave_backup()

    @contextmanager
    def _turn_of_store(self) -> Iterator[None]:
        """The turn among processes, before any other thread of this one uses the database."""
        turn = self._store_turn
        try:
            if not turn.take(self._busy_timeout_s):
                raise self._busy(f"a transaction of {turn.holder() or 'another process'}")
            yield
        finally:
            turn.give_back()

    def _leave_backup(self) -> None:
        self._take_identity(end_backup(self.storage, self.role, self.entropy, self.where))

    def begin_history(self, times_max: int, within_ms: int, past: bytes | None = None) -> bool:
        """Give a server's database a new history (R29), in one commit; whether it has one: more
        than ``times_max`` times within ``within_ms``, as the database knows, it gets none. Where
        another opener has ended ``past`` already, that is enough. Entities, versions, ids stay."""
        with self.write() as writer:
            identity = another_history(writer, times_max, within_ms, self.entropy, past)
            if identity is None:
                return False
        self._take_identity(identity)
        return True

    @property
    def history(self) -> bytes | None:
        """A server database's history (R29); None on a device. Another process may begin one."""
        if self.role is Role.SERVER and not self._closed:
            with suppress(LocalError):  # closed meanwhile
                if self.storage.mark() != self._identity_mark:
                    with self.storage.snapshot() as snapshot:
                        return self.history_at(snapshot)
        return self._history

    def history_at(self, snapshot: StorageSnapshot) -> bytes | None:
        """As ``history``, in the state of ``snapshot``; the store is asked for nothing else."""
        mark = snapshot.mark
        if mark == self._identity_mark or (raw := snapshot.get(META_IDENTITY)) is None:
            return self._history
        identity = cbor.decode_trusted(raw)
        if mark > self._identity_mark:
            self._take_identity(identity)
            self._identity_mark = mark
        return identity_fields(identity)[3]

    def _take_identity(self, identity: dict[str, Any]) -> None:
        # ``device_id`` is the 16 bytes that name this database in what it writes (R30).
        self.role, self.device_id, self.created_ms, self._history = identity_fields(identity)
