"""Group commit: pushes of many devices in one storage commit (R16).

One thread per database takes everything that has queued up while the last commit was syncing, has
it decided and committed at once, and answers every member. ``service`` decides. Threads of several
databases go one by one (``gate``). Where threads are not wanted, the caller says when that is done
(``Schedule``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from entidb.errors import (
    CommitStaleError,
    DatabaseClosedError,
    DatabaseLockedError,
    EntiDBError,
    ServerBusyError,
    ServerError,
    StorageFullError,
    SyncError,
    TransactionError,
)
from entidb.events import Thread
from entidb.protocol import PushRequest, PushResponse, RoundRequest
from entidb.server.away import come_again, full_retry_after_s, is_away
from entidb.server.gate import WriterGate
from entidb.server.hooks import Grant

_log = logging.getLogger("entidb.server")

Done = Callable[[PushResponse | SyncError], None]
Member = tuple[PushRequest | RoundRequest, Grant, Done]
#: Has a function called once, at once or later, on whatever thread it likes.
Schedule = Callable[[Callable[[], None]], None]

#: Transactions decided in one commit at most: bounds how long the first member waits.
GROUP_TRANSACTIONS_MAX = 10_000
#: Seconds without a try after one that found no room.
_FULL_S = 1.0
#: How often a group is decided, when each time another opener commits before it is stored.
_TRIES = 3


class Decider(Protocol):
    """What decides pushes, all of them in one commit: a ``DatabaseService``."""

    db_id: str

    def push_many(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]: ...


class Meter:
    """``note`` is called with the pushes of a group and the seconds until they were decided and
    durable, on the writer's thread; None: nobody measures, and no clock is read."""

    def __init__(self) -> None:
        self.note: Callable[[int, float], None] | None = None


class GroupCommitter:
    """The writer thread of one database, started with the first push; with ``schedule`` there is
    none, and what has queued up is committed when that calls back. ``gate`` is what its thread
    shares with those of other databases.

    ``done`` is called on that thread, once per submitted push, after the commit that covers it is
    durable; it must be quick and must not raise. ``on_failure`` is called with storage errors,
    after which the owner closes the database and opens it again (R17).
    """

    def __init__(
        self,
        service: Decider,
        *,
        queue_max: int = 1000,
        group_transactions_max: int = GROUP_TRANSACTIONS_MAX,
        on_failure: Callable[[EntiDBError], None] = lambda error: None,
        on_commit: Callable[[int], None] = lambda head: None,
        on_group: Callable[[], None] = lambda: None,
        schedule: Schedule | None = None,
        meter: Meter | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        gate: WriterGate | None = None,
    ) -> None:
        self._service = service
        self._queue_max = queue_max
        self._group_max = group_transactions_max
        self._on_failure = on_failure
        self._on_commit = on_commit
        self._on_group = on_group
        #: What the group under way has committed, and nobody was told yet. Of its thread.
        self._news: int | None = None
        self._schedule = schedule
        self._meter = meter or Meter()
        self._gate = gate
        self._monotonic = monotonic
        #: The schedule was asked, and has not called back yet.
        self._scheduled = False
        self._queue: deque[Member] = deque()
        #: Entered itself, and not by way of the condition, whose own lines an interrupt could leave
        #: with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False
        #: Until when no push is tried, because there was no room for one.
        self._full_until: float | None = None

    def submit(self, request: PushRequest | RoundRequest, grant: Grant, done: Done) -> None:
        """Queue a push. Raises ``ServerBusyError`` (``busy`` when the queue is full, or there is no
        thread, ``shutting_down`` when stopping), and ``ServerError`` (``storage_full``) for a
        moment after one that found no room; ``done`` is not called then."""
        with self._lock:
            if self._full_until is not None:
                if self._monotonic() < self._full_until:
                    raise _no_room()
                self._full_until = None
            if self._stopping:
                raise ServerBusyError(
                    "the server is shutting down", code="shutting_down", retry_after=1.0
                )
            if len(self._queue) >= self._queue_max:
                raise ServerBusyError(
                    "too many pushes are waiting for this database", retry_after=1.0
                )
            if self._schedule is None:
                self._begin()
            self._queue.append((request, grant, done))
            self._changed.notify()
            asks, self._scheduled = not self._scheduled, True
        if self._schedule is not None and asks:
            self._schedule(self._commit_queued)

    def committed(self, head: int) -> None:
        """Commit ``head`` of the database is durable, whoever made it; ``on_commit`` is to be
        called. For a group that is just before its answers are given out: whoever is told at once
        would need the interpreter while they are made."""
        if threading.current_thread() is self._thread:
            self._news = head
        else:
            self._on_commit(head)

    def _begin(self) -> None:
        if self._thread is not None:
            return
        name = f"entidb-writer-{self._service.db_id}"
        thread = Thread(target=self._run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives none; the next push tries again
            raise ServerBusyError(
                "the server has no thread for this at the moment", retry_after=1.0
            ) from error
        self._thread = thread

    def stop(self) -> None:
        """Finish what is queued, then end; idempotent."""
        with self._lock:
            self._stopping = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()
        elif self._schedule is not None:
            self._commit_queued()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._stopping:
                    self._changed.wait()
                if not self._queue:
                    return
            # What comes while it waits for its turn is in the group, too.
            turn = None if self._gate is None else self._gate.enter(self._service.db_id)
            try:
                with self._lock:
                    group = self._take()
                self._commit(group)
            finally:
                if self._gate is not None and turn is not None:
                    self._gate.leave(turn)

    def _commit_queued(self) -> None:
        """All of it; nothing if there is nothing."""
        while True:
            with self._lock:
                self._scheduled = False
                if not self._queue:
                    return
                group = self._take()
            self._commit(group)

    def _take(self) -> list[Member]:
        group = [self._queue.popleft()]
        size = len(group[0][0].transactions)
        while self._queue:
            size += len(self._queue[0][0].transactions)
            if size > self._group_max:
                break
            group.append(self._queue.popleft())
        return group

    def _commit(self, group: list[Member]) -> None:
        answers: list[PushResponse | SyncError]
        note = self._meter.note
        began = 0.0 if note is None else time.perf_counter()
        try:
            answers = self._decided([(request, grant) for request, grant, _ in group])
        except EntiDBError as error:
            if isinstance(error, StorageFullError):
                # Each try writes until the disk is full, and those who read wait meanwhile.
                self._full_until = self._monotonic() + _FULL_S
            self._on_failure(error)
            answers = [_not_stored(error) for _ in group]
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is not self._thread:
                raise
            # Our own mistake must not end the writer thread: every later push would hang.
            self._on_failure(ServerError(f"push failed: {error!r}"))
            answers = [ServerError("the server failed to decide this push")] * len(group)
        news, self._news = self._news, None
        if news is not None:
            self._on_commit(news)
        if note is not None:
            note(len(group), time.perf_counter() - began)
        for (_, _, done), answer in zip(group, answers, strict=True):
            done(answer)
        self._on_group()

    def _decided(
        self, members: Sequence[tuple[PushRequest | RoundRequest, Grant]]
    ) -> list[PushResponse | SyncError]:
        for _ in range(_TRIES - 1):
            try:
                return self._service.push_many(members)
            except CommitStaleError as error:
                # Nothing was changed: the store is well, and they are decided on its newest state.
                _log.warning(
                    "database %s: a group of pushes is decided again: %s",
                    self._service.db_id,
                    error,
                )
        return self._service.push_many(members)


def _not_stored(error: EntiDBError) -> ServerError:
    # Closed after an error, and about to be opened again; or another process has its turn for long.
    passing = DatabaseClosedError | DatabaseLockedError | TransactionError
    if is_away(error) or isinstance(error, passing):
        return come_again()
    if isinstance(error, StorageFullError):
        return _no_room()
    return ServerError(
        "the server could not store this push; nothing of it was accepted, try again",
        code="storage_error",
    )


def _no_room() -> ServerError:
    return ServerError(
        "the server's disk is full, and nothing of this push was accepted; it is taken when there "
        "is room",
        code="storage_full",
        retry_after=full_retry_after_s(),
    )
