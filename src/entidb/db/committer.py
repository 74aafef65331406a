"""One thread that commits for callers that must not wait for a disk: tasks of an event loop.

What waits when it is its turn goes into one storage commit, each job with a sequence, a result and
an error of its own. A job that has not begun can be withdrawn. Not here: asyncio (``aio``).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from entidb.db.core import Core
from entidb.db.draft import Draft
from entidb.db.jobs import GROUP_MAX, Job
from entidb.db.local import Role, Writes, check_size, commit_local
from entidb.db.rows import OverlayRows, SnapshotRows
from entidb.db.uniqueness import refuse_taken
from entidb.db.writer import Writer
from entidb.errors import (
    DatabaseClosedError,
    StorageFullError,
    TransactionTooLargeError,
)
from entidb.events import Thread

#: Seconds after which a thread without work ends; the next job begins another.
_IDLE_S: Final = 5.0


class Staging(Draft):
    """What a job works on: the database as it will be when the jobs before it are committed.
    ``committed`` is what is there already, ``before`` what those jobs wrote."""

    def __init__(
        self, committed: SnapshotRows, before: Writes, new_id: Callable[[], bytes]
    ) -> None:
        super().__init__(OverlayRows(committed, before), new_id)
        self.committed = committed
        self.before = before


class Committer:
    """Thread-safe. The thread is a daemon's, and ends when there is nothing to do."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._jobs: deque[Job[Any]] = deque()
        #: Entered itself, and not by way of the condition, whose own lines an interrupt could leave
        #: with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, job: Job[Any]) -> None:
        """Raises ``DatabaseClosedError`` after ``close``."""
        with self._lock:
            if self._closed:
                raise DatabaseClosedError(f"{self._core.where} is closed; open it again to use it")
            if self._thread is None:
                name = "entidb-committer"
                args = (weakref.ref(self), self._lock, self._changed)
                thread = Thread(target=_run, args=args, name=name, daemon=True)
                thread.start()  # if there is none, nothing was begun
                self._thread = thread
            self._jobs.append(job)
            self._changed.notify_all()

    def withdraw(self, job: Job[Any]) -> bool:
        """Whether ``job`` had not begun, and never will."""
        with self._lock:
            try:
                self._jobs.remove(job)
            except ValueError:
                return False
            return True

    def close(self) -> None:
        """Take no more jobs, and wait until those that are here are over. Idempotent."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    # ------------------------------------------------------------ on its thread

    def _commit_waiting(self) -> list[Job[Any]]:
        """The jobs that are over; they are still to be told."""
        group: list[Job[Any]] = []
        alone = False
        try:
            # Jobs are taken when it is this thread's turn: until then they can be withdrawn,
            # however long another thread has its transaction open.
            with self._core.write("local") as writer:
                group = self._take()
                alone = True
                self._stage_all(writer, group)
                alone = False
        except BaseException as error:
            if not group:
                group = self._take()
            if len(group) > 1 and (alone or isinstance(error, StorageFullError)):
                self._commit_each(group)
            else:
                for job in group:
                    job.fail(error)
        return group

    def _commit_each(self, group: Sequence[Job[Any]]) -> None:
        """They could not be committed together: one of them is at fault, and the others go on."""
        for job in group:
            try:
                with self._core.write("local") as writer:
                    self._stage_all(writer, [job])
            except BaseException as error:
                job.fail(error)

    def _take(self) -> list[Job[Any]]:
        with self._lock:
            count = min(len(self._jobs), GROUP_MAX)
            return [self._jobs.popleft() for _ in range(count)]

    def _stage_all(self, writer: Writer, group: Sequence[Job[Any]]) -> None:
        core = self._core
        committed, before = SnapshotRows(writer.snapshot, writer.catalogue), dict[str, Any]()
        size = 0
        for place, job in enumerate(group):
            staging = Staging(committed, before, core._ids.new_bytes)
            try:
                job.error, job.value = None, job.work(staging)
                check_size(staging.writes, core.transaction_bytes_max)
                if writer.watcher is not None:
                    refuse_taken(writer, staging.writes, decides=core.role is Role.SERVER)
            except Exception as error:
                job.fail(error)
                continue
            size += _bytes_of(staging.writes)
            if place and size > core.transaction_bytes_max:
                raise TransactionTooLargeError("together they are more than one transaction")
            identity = job.transaction_id or core._ids.new_bytes()
            job.sequence = commit_local(
                writer, core.role, staging.writes, identity, core._tick(writer)
            )
            for name, ids in staging.writes.items():
                before.setdefault(name, {}).update(ids)


def _run(lost: weakref.ref[Committer], lock: threading.RLock, changed: threading.Condition) -> None:
    """While it waits or tells, the thread keeps nothing alive: a database that its owner has lost
    would stay open as long."""
    while True:
        with lock:
            committer = lost()
            idle = committer is not None and not committer._jobs and not committer._closed
            if idle:
                committer = None
                changed.wait(_IDLE_S)
                committer = lost()
            if committer is None:
                return
            if not committer._jobs:
                committer._thread = None
                return
        group = committer._commit_waiting()
        committer = None
        _tell(group)


def _tell(group: list[Job[Any]]) -> None:
    """Empties ``group``: what a job was to do may hold its database."""
    calls = [_let_go(job) for job in group]
    group.clear()
    for told in calls:
        told()


def _let_go(job: Job[Any]) -> Callable[[], None]:
    job.work = _over
    return job.told


def _over(staging: Any) -> Any:
    raise AssertionError("it was done")


def _bytes_of(writes: Writes) -> int:
    return sum(len(p) for ids in writes.values() for p in ids.values() if p is not None)


__all__ = ["Committer", "Job", "Staging"]
