"""Commits of several threads at once become one storage commit, and wait for the disk together.

A thread that has no company commits by itself. Others hand over what they have decided, in the
order of their turns, to a thread that stores all there is at once, each transaction with a sequence
and an error of its own; whoever comes next reads what is on its way as if it were stored. That
thread is no program's, so no Ctrl-C ends it in the middle.

What is on its way lives in ``Sharing.jobs`` alone: whose turn it is appends, the thread that stores
removes, each in one step. As long as there is something in it, this process keeps the turn of the
store. If a transaction cannot be stored, those fail too that have read what it wrote.

Not here: whose turn it is (``core``), and what a transaction becomes (``local``).
"""

from __future__ import annotations

import copy
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Protocol, cast

from entidb.db.catalogue import Catalogue
from entidb.db.feed import load_events
from entidb.db.handed import Shared, do_errands, tell
from entidb.db.jobs import GROUP_MAX
from entidb.db.local import Role, Writes, check_size, commit_local
from entidb.db.observers import CommitEvent, Observers
from entidb.db.records import feed_key
from entidb.db.rows import OverlayRows, Rows, SnapshotRows
from entidb.db.uniqueness import refuse_taken
from entidb.db.writer import Writer
from entidb.errors import EntiDBError, StorageFullError, TransactionError
from entidb.events import Thread
from entidb.storage import Snapshot, Storage
from entidb.storage.turns import Turn, Turns
from entidb.types import IdSource

#: Seconds without work after which the thread ends; the next commit begins another.
_IDLE_S: Final = 1.0
#: Seconds between two looks at what a bell should have told.
_LOOK_S: Final = 0.05
#: And at whether all is stored.
_DRAIN_S: Final = 0.0002
#: For so long threads of this process may follow one another before other processes come in.
HOLD_S: Final = 0.05


#: What is written of an entity's id, the payload given for it, and the one that is stored.
Merge = Callable[[bytes, bytes, bytes], bytes]


#: Seconds that are given at a time to threads which are about to commit again.
_COME_S: Final = 0.00005


class SharingHost(Protocol):
    """What sharing needs of a database: ``Core`` has it."""

    storage: Storage
    role: Role
    transaction_bytes_max: int
    _ids: IdSource
    _observers: Observers
    _turns: Turns
    _catalogue_cache: tuple[bytes, Catalogue, int]

    def _take(self, turn: Turn, shares: bool = False) -> None: ...

    def _give_back(self, turn: Turn) -> None: ...

    def _rows_to_write(self, snapshot: Snapshot) -> SnapshotRows: ...

    def _writer(self, snapshot: Snapshot) -> Writer: ...

    def _tick(self, writer: Writer) -> int: ...

    def _store(self, writer: Writer, origin: str, calls: Sequence[CommitEvent] = ()) -> None: ...


class AheadRows(OverlayRows):
    """Entities as they are when what is on its way is stored."""

    __slots__ = ("failures",)

    def __init__(self, below: SnapshotRows, writes: Writes, failures: int) -> None:
        super().__init__(below, writes)
        self.failures = failures


class Sharing:
    """Thread-safe."""

    def __init__(self, host: SharingHost) -> None:
        # Not the database itself: one that is lost is to be noticed at once.
        self._database = weakref.ref(host)
        #: What is decided and not yet stored, in order.
        self.jobs: list[Shared] = []
        #: Whether others were there lately: then a commit is handed over at once.
        self.warm = False
        #: How many transactions the last commit had.
        self._company = 1
        self._failures = 0
        self._failure: BaseException | None = None
        self._staging = False
        self._since = 0.0
        #: Whether the turn of the store was left to the thread that stores.
        self._has_turn = False
        self._handing = Turns()
        self._running = Turns()
        self._bell = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def _host(self) -> SharingHost:
        host = self._database()
        assert host is not None, "who waits for a commit holds its database"
        return host

    # ------------------------------------------------------------ for who has the turn

    def ahead(self) -> tuple[Writes, int]:
        """What is on its way, and how many failures there have been; before a snapshot is taken,
        over which the first is laid. What is stored meanwhile is the same in both."""
        failures = self._failures
        writes: Writes = {}
        for job in self.jobs[:]:
            if job.error is None:
                for name, ids in job.writes.items():
                    writes.setdefault(name, {}).update(ids)
        return writes, failures

    def commit(
        self, turn: Turn, writes: Writes, transaction_id: bytes, failures: int | None
    ) -> int:
        """Store ``writes``, together with what others commit, and end ``turn``, which the caller
        has; the sequence, when it is durable. An interrupt comes out when it is known what became
        of it."""
        self._host.storage.mark()  # says whether it is closed, or of another process
        job = Shared(writes, transaction_id, failures)
        try:
            self._submit(job)
            self._host._give_back(turn)
            self._wait_for(job)
            self._host._observers.deliver()
        except BaseException:
            self._host._give_back(turn)
            self._wait_for(job)
            self._host._observers.deliver()
            raise
        job.result()
        return job.sequence or 0

    def takes(self, rows: Rows, writes: Writes) -> bool:
        """Whether a transaction that was decided on ``rows`` cannot be refused any more, by what
        is unique: else others would build on what never comes."""
        known = snapshot_rows(rows).catalogue.by_name
        infos = [info for name in writes if (info := known.get(name)) is not None]
        return not any(index.unique for info in infos for index in info.indexes)

    def settled(self, rows: Rows) -> SnapshotRows:
        """``rows`` when all is stored that is on its way; closed by the caller. Raises what that
        has failed with."""
        if not isinstance(rows, AheadRows):
            return snapshot_rows(rows)
        self._drain()
        if rows.failures != self._failures:
            assert self._failure is not None, "one has failed"
            raise _own(self._failure)
        snapshot_rows(rows).snapshot.close()
        return self._host._rows_to_write(self._host.storage.snapshot())

    def commit_transaction(
        self, turn: Turn, rows: Rows, writes: Writes, transaction_id: bytes
    ) -> int:
        """As ``commit``, of what was decided on ``rows``."""
        # What has to grow the file waits for open snapshots.
        snapshot_rows(rows).snapshot.close()
        failures = rows.failures if isinstance(rows, AheadRows) else None
        return self.commit(turn, writes, transaction_id, failures)

    def commit_one(
        self, name: str, entity_id: bytes | None, payload: bytes, keep: Merge | None
    ) -> bytes:
        """As ``Database.commit_one``, together with what others commit; an empty id, and nothing
        was done, for what has to be committed by itself."""
        host, turn = self._host, Turn()
        writes: Writes
        if keep is None or entity_id is None:
            known = host._catalogue_cache[1].by_name.get(name)
            if known is None or not any(index.unique for index in known.indexes):
                made = host._ids.new_bytes() if entity_id is None else entity_id
                writes = {name: {made: payload}}
                check_size(writes, host.transaction_bytes_max)
                self.commit_handed(writes, host._ids.new_bytes())
                return made
        try:
            host._take(turn, True)
            ahead = self.ahead() if keep is not None else ({}, 0)
            with host.storage.snapshot() as snapshot:
                rows = AheadRows(host._rows_to_write(snapshot), *ahead)
                if not self.takes(rows, {name: {}}):
                    host._give_back(turn)
                    return b""
                stored = None
                if keep is not None and entity_id is not None:
                    stored = rows.get(name, entity_id)
            transaction_id = host._ids.new_bytes()
            made = host._ids.new_bytes() if entity_id is None else entity_id
            if keep is not None and stored is not None:
                payload = keep(made, payload, stored)
            failures = ahead[1] if ahead[0] else None
            writes = {name: {made: payload}}
            check_size(writes, host.transaction_bytes_max)
            self.commit(turn, writes, transaction_id, failures)
        except BaseException:
            host._give_back(turn)
            raise
        return made

    def commit_handed(self, writes: Writes, transaction_id: bytes) -> int:
        """As ``commit``, of what has read nothing: it may be stored before this thread has had a
        turn."""
        host, job = self._host, Shared(writes, transaction_id, None)
        job.handed = True
        turn = Turn(bell=job.bell, errand=partial(self._hand_over, job))
        try:
            host._take(turn, True)
            if not turn.served:
                host.storage.mark()  # as in ``commit``
                self._submit(job)
                host._give_back(turn)
            self._wait_for(job)
        except BaseException as error:
            withdrawn = job.withdraw()
            host._give_back(turn)
            if withdrawn:
                raise  # and nobody is told: it may have met this thread's own transaction
            self._wait_for(job)
            if not isinstance(error, TransactionError):
                host._observers.deliver()
                raise
        host._observers.deliver()
        job.result()
        return job.sequence or 0

    def _submit(self, job: Shared) -> None:
        self._hand_over(job)
        self._wake()

    def _hand_over(self, job: Shared) -> None:
        """Only who has the turn does this; it may be repeated."""
        self.warm = True
        if not self.jobs:
            self._since = time.monotonic()
        if job not in self.jobs and not job.over:
            self.jobs.append(job)

    def _wait_for(self, job: Shared) -> None:
        """Until it is over; not at all for one that was never handed over."""
        try:
            while job in self.jobs:
                if not job.bell.acquire(timeout=_LOOK_S):
                    self._wake()
        finally:
            job.tell_next()

    def enter(self, shares: bool, timeout_s: float) -> bool:
        """Of the turn of the store, which this process has as long as there are ``jobs``: go on
        with it if the caller ``shares`` and others have not waited for long, else wait until all
        is stored and it was given back. False if that takes longer than ``timeout_s``."""
        now = time.monotonic()
        if shares and now - self._since < HOLD_S:
            with self._handing.hold():
                self._has_turn = False
            return True
        if not self._drain(timeout_s):
            return False
        # The thread that stores has given the turn back when it comes out of this.
        with self._handing.hold():
            return True

    def _drain(self, timeout_s: float = math.inf) -> bool:
        until = time.monotonic() + timeout_s
        while self.jobs:
            if time.monotonic() > until:
                return False
            self._wake()
            time.sleep(_DRAIN_S)
        return True

    def leave(self) -> bool:
        """Leave the turn of the store to the thread that stores; False if it has nothing to do
        any more. Those who come next and need no turn of their own come along, unless others have
        waited for long."""
        if time.monotonic() - self._since < HOLD_S and do_errands(self._host._turns.line):
            self._wake()
        with self._handing.hold():
            self._has_turn = bool(self.jobs)
            return self._has_turn

    def close(self) -> None:
        """Wait until everything is stored, and end the thread. Called in the turn; idempotent."""
        self._drain()
        self._closed = True
        thread = self._thread
        self._ring()
        if thread is not None and thread.is_alive():
            thread.join()

    # ------------------------------------------------------------ its thread

    def _wake(self) -> None:
        self._ring()
        thread = self._thread
        if thread is None or not thread.is_alive():
            # If two threads come here, the second one waits until the first has ended.
            self._thread = thread = Thread(target=self._run, name="entidb-sharing", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                # The system gives no thread any more, or the program is about to end.
                self._commit_here()

    def _commit_here(self) -> None:
        with self._running.hold():
            while self.jobs:
                self._commit_waiting()

    def _ring(self) -> None:
        with suppress(RuntimeError):  # it rings already
            self._bell.release()

    def _run(self) -> None:
        with self._running.hold():
            while True:
                if self.jobs:
                    self._commit_waiting()
                elif self._closed or not self._bell.acquire(timeout=_IDLE_S):
                    self._thread = None
                    # Who appends looks for a thread after it.
                    if not self.jobs:
                        return

    def _commit_waiting(self) -> None:
        self._let_others_come()
        group = self._next_group()
        self._company = len(group)
        self._commit(group)
        try:
            for job in group:
                job.over = True
            self._take_off(len(group))
        finally:
            self.warm = len(group) > 1 or bool(self.jobs)
            tell(group)

    def _take_off(self, count: int) -> None:
        with self._handing.hold():
            try:
                if self._has_turn and len(self.jobs) == count:
                    self._has_turn = False
                    self._host.storage.turn.give_back()
            finally:
                del self.jobs[:count]

    def _let_others_come(self) -> None:
        """Those who were told a moment ago may be about to come again, and need this thread's time
        for that; for as long as they do come."""
        here = 0
        while here < len(self.jobs) < self._company:
            here = len(self.jobs)
            time.sleep(_COME_S)

    def _next_group(self) -> list[Shared]:
        waiting, size = self.jobs[:GROUP_MAX], 0
        for place, job in enumerate(waiting):
            size += _bytes_of(job.writes)
            if place and size > self._host.transaction_bytes_max:
                return waiting[:place]
        return waiting

    def _commit(self, group: Sequence[Shared]) -> None:
        try:
            self._store(group)
        except BaseException as error:
            together = len(group) > 1
            if not together or not (self._staging or isinstance(error, StorageFullError)):
                self._fail(group, error)
                return
            # One of them is at fault, or needs more room than there is; the others go on.
            for job in group:
                self._commit_alone(job)

    def _commit_alone(self, job: Shared) -> None:
        try:
            self._store([job])
        except BaseException as error:
            self._fail([job], error)

    def _fail(self, jobs: Sequence[Shared], error: BaseException) -> None:
        for job in jobs:
            job.fail(_own(error))
        # After that: who counts the failures now reads nothing of these.
        self._failure = error
        self._failures += 1

    def _store(self, group: Sequence[Shared]) -> None:
        host = self._host
        with host.storage.snapshot() as snapshot:
            self._staging = True
            writer = host._writer(snapshot)
            staged = []
            calls: list[CommitEvent] = []
            for job in group:
                if job.error is not None:
                    continue
                if job.failures is not None and job.failures != self._failures:
                    assert self._failure is not None, "one has failed"
                    self._fail([job], self._failure)
                    continue
                if not job.is_stored():
                    self._fail([job], TransactionError("it was given up in line", code="busy"))
                    continue
                assert job.transaction_id is not None, "given when it was made"
                if job.handed and writer.watcher is not None:
                    try:
                        refuse_taken(writer, job.writes, decides=host.role is Role.SERVER)
                    except EntiDBError as error:
                        self._fail([job], error)
                        continue
                stamp = host._tick(writer)
                sequence = commit_local(writer, host.role, job.writes, job.transaction_id, stamp)
                staged.append((job, sequence))
                if len(group) > 1 and sequence and host._observers.listeners:
                    calls.append(_call(writer, sequence, job.writes))
            self._staging = False
            self._store_staged(writer, staged, calls)

    def _store_staged(
        self,
        writer: Writer,
        staged: Sequence[tuple[Shared, int]],
        calls: Sequence[CommitEvent],
    ) -> None:
        begun = writer.moment.mark
        try:
            self._host._store(writer, "local", calls)
        except BaseException as error:
            if writer.moment.mark == begun:
                raise
            # It is stored, and telling of it has failed.
            for job, _ in staged:
                job.error = _own(error)
        for job, sequence in staged:
            job.sequence = sequence


def _call(writer: Writer, sequence: int, writes: Writes) -> CommitEvent:
    """What observers are called with for one of the transactions that ``writer`` has staged, which
    is the last one; what comes after it may replace what it wrote."""
    places = []
    for name, ids in writes.items():
        info = writer.catalogue.by_name.get(name)
        if info is not None:
            places += [(sequence, info.number, entity_id) for entity_id in ids]
    places = sorted(place for place in places if feed_key(*place) in writer.changes)
    # Read as they are at this moment of the commit.
    events = load_events(cast("Snapshot", writer), writer.catalogue, places)
    return CommitEvent(sequence, "local", events)


def _own(error: BaseException) -> BaseException:
    """``error``, for one of several threads that raise it."""
    try:
        made = copy.copy(error)
    except Exception:
        return error
    made.__cause__ = error.__cause__
    return made


def _bytes_of(writes: Writes) -> int:
    return sum(len(p) for ids in writes.values() for p in ids.values() if p is not None)


def snapshot_rows(rows: Rows) -> SnapshotRows:
    """What is under the rows of a transaction."""
    while isinstance(rows, OverlayRows):
        rows = rows.below
    assert isinstance(rows, SnapshotRows)
    return rows


__all__ = ["AheadRows", "Shared", "Sharing", "snapshot_rows"]
