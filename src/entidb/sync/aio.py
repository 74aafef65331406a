"""The asyncio engine: the same cycles, without blocking the event loop.

A cycle is short bursts of storage commits and waiting for the network. Both run in a thread of
their own, so that a slow disk never stalls the loop either; cancelling the task cancels the cycle.
It is not one of the loop's pool, which others may have filled with work that waits for this.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from entidb.db import Database, DiscardedTransaction, OverruledValue
from entidb.errors import SyncStateError
from entidb.events import SafeEvent
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.report import RebaseReport
from entidb.sync.comparing import Comparing, Verification
from entidb.sync.config import SyncConfig
from entidb.sync.conflict import Conflict, ConflictResolution
from entidb.sync.engine import SyncEngine
from entidb.sync.exchange import Then
from entidb.sync.fates import Committed, Fate, Patience
from entidb.sync.interrupt import InterruptibleJob
from entidb.sync.listening import (
    ConflictListener,
    ProgressListener,
    RejectedListener,
    ResultListener,
    StateListener,
)
from entidb.sync.standing import EntityStatus
from entidb.sync.state import SyncCycleResult, SyncState, SyncStats, SyncStatus
from entidb.sync.transport import SyncTransport
from entidb.types import Uncopied

T = TypeVar("T")


class AsyncSyncEngine(Uncopied):
    """``SyncEngine`` for asyncio programs; arguments and errors are the same.

    ``engine`` is the blocking engine underneath, for listeners and everything else that does not
    wait. Listeners are called in the worker thread; use ``loop.call_soon_threadsafe`` in them.
    """

    def __init__(
        self,
        config: SyncConfig,
        transport: SyncTransport | str,
        applier: DatabaseApplier | Database,
        *,
        token: str | Callable[[bool], str] | None = None,
        **options: Any,
    ) -> None:
        self.engine = SyncEngine(config, transport, applier, token=token, **options)
        #: Whether ``run`` runs, and what ends it.
        self._running = False
        self._stop = SafeEvent()
        self._task: asyncio.Task[None] | None = None
        self.config = self.engine.config
        self.applier = self.engine.applier
        self.database = self.engine.database
        self.transport = self.engine.transport

    async def sync(self) -> SyncCycleResult:
        """One cycle. If the task is cancelled the cycle ends at its next step, a request that is
        under way within 100 ms, and only then does ``CancelledError`` go on: nothing runs on
        behind the caller's back, and the next cycle goes on from there (R9)."""
        return (await self._cycle(None)).result()

    async def verify_with_server(self, *, repair: bool = False) -> Verification:
        """One cycle, and a comparison with the server (R34); cancelled as ``sync``."""
        comparing = Comparing(self.engine.applier, repair=repair)
        (await self._cycle(None, comparing)).result()
        return comparing.result

    async def _cycle(
        self, stopped: threading.Event | None, then: Then | None = None
    ) -> InterruptibleJob[SyncCycleResult]:
        cancelled = SafeEvent()
        job: InterruptibleJob[SyncCycleResult]
        job = InterruptibleJob(
            lambda _: self.engine.run_cycle(cancelled, stopped, then), "entidb-aio-sync"
        )
        await self._ended(job, lambda: self.engine.cancel_cycle(cancelled))
        return job

    async def _ended(self, job: InterruptibleJob[T], cancel: Callable[[], None]) -> None:
        """Start ``job`` and wait for its end, also when cancelled, as often as that may be."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(over.set)

        job.start(tell)
        was_cancelled: asyncio.CancelledError | None = None
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError as error:
                was_cancelled = error
                cancel()
        if was_cancelled is not None:
            raise was_cancelled

    async def run(self) -> None:
        """Sync until the task is cancelled, or ``stop()`` or ``close()`` ends it: as
        ``SyncEngine.start`` does, on the same terms. Raises ``SyncStateError`` if it runs already.
        """
        if self._running:
            raise SyncStateError("this engine runs in the background already")
        self._running, self._stop = True, SafeEvent()
        stopped = self._stop
        job: InterruptibleJob[None] = InterruptibleJob(
            lambda _: self.engine.run_until(stopped), "entidb-aio-run"
        )
        try:
            await self._ended(job, self.stop)
        finally:
            self._running = False
        job.result()

    def wake(self) -> None:
        """Let ``run()`` sync now, or try again now where it waits to; see ``SyncEngine.wake``.
        From any thread."""
        self.engine.wake()

    def cancel(self) -> None:
        """As ``SyncEngine.cancel``. From any thread."""
        self.engine.cancel()

    def stop(self) -> None:
        """Let ``run()`` return, cancelling a cycle in progress. Returns at once. From any thread,
        a listener or an observer."""
        self._stop.set()
        self.engine.cancel()
        self.wake()

    async def close(self) -> None:
        """End what is running and let another engine have the database. Idempotent."""
        self.stop()
        job: InterruptibleJob[None] = InterruptibleJob(
            lambda _: self.engine.close(), "entidb-aio-close"
        )
        await self._ended(job, lambda: None)
        job.result()

    def start(self) -> None:
        """``run()`` as a task of the running loop, until ``stop()`` or ``close()``. Raises
        ``SyncStateError`` if it runs already."""
        if self._running or (self._task is not None and not self._task.done()):
            raise SyncStateError("this engine runs in the background already")
        self._task = asyncio.get_running_loop().create_task(self.run())

    @property
    def state(self) -> SyncState:
        return self.engine.state

    @property
    def closed(self) -> bool:
        return self.engine.closed

    # ------------------------------------------------------------ listeners, as SyncEngine's

    def on_state(self, listener: StateListener) -> Callable[[], None]:
        return self.engine.on_state(listener)

    def on_progress(self, listener: ProgressListener) -> Callable[[], None]:
        return self.engine.on_progress(listener)

    def on_result(self, listener: ResultListener) -> Callable[[], None]:
        return self.engine.on_result(listener)

    def on_conflict(self, listener: ConflictListener) -> Callable[[], None]:
        return self.engine.on_conflict(listener)

    def on_rejected(self, listener: RejectedListener) -> Callable[[], None]:
        return self.engine.on_rejected(listener)

    # ------------------------------------------------------------ waiting

    async def fate(self, transaction: Committed | int) -> Fate:
        return await asyncio.to_thread(self.engine.fate, transaction)

    async def accepted(self, transaction: Committed | int, timeout_s: float | None = None) -> Fate:
        """As ``SyncEngine.accepted``; cancelling the task ends the wait."""
        return await self._patient(
            lambda patience: self.engine.wait_accepted(patience, transaction, timeout_s)
        )

    async def synced(self, timeout_s: float | None = None) -> bool:
        """As ``SyncEngine.synced``; cancelling the task ends the wait."""
        return await self._patient(lambda patience: self.engine.wait_synced(patience, timeout_s))

    async def _patient(self, wait: Callable[[Patience], T]) -> T:
        # What was started begins on a thread of its own: until then nothing seems to run here.
        task, background = self._task, self.engine._background
        while task is not None and not task.done() and not background.is_running:
            await asyncio.sleep(0.001)
        patience = Patience()
        job: InterruptibleJob[T] = InterruptibleJob(lambda _: wait(patience), "entidb-aio-wait")

        def give_up() -> None:
            patience.give_up()
            if not self._running:
                self.engine.cancel()  # the sync that it does itself

        await self._ended(job, give_up)
        return job.result()

    # ------------------------------------------------------------ decisions, as SyncEngine's

    @property
    def stats(self) -> SyncStats:
        return self.engine.stats

    async def status(self) -> SyncStatus:
        return await asyncio.to_thread(self.engine.status)

    async def entity_status(self, collection: str, entity_id: uuid.UUID) -> EntityStatus:
        return await asyncio.to_thread(self.engine.entity_status, collection, entity_id)

    async def explain(self, collection: str, entity_id: uuid.UUID) -> str:
        return await asyncio.to_thread(self.engine.explain, collection, entity_id)

    async def conflicts(self) -> list[Conflict]:
        return await asyncio.to_thread(self.engine.conflicts)

    async def resolve(
        self, conflict: Conflict, choice: str | ConflictResolution | None = None, **value: Any
    ) -> RebaseReport:
        return await asyncio.to_thread(self.engine.resolve, conflict, choice, **value)

    async def discarded(self) -> list[DiscardedTransaction]:
        return await asyncio.to_thread(self.engine.discarded)

    async def overruled(self) -> list[OverruledValue]:
        return await asyncio.to_thread(self.engine.overruled)

    async def recommit(self, discarded: DiscardedTransaction | OverruledValue) -> int:
        return await asyncio.to_thread(self.engine.recommit, discarded)

    async def prune(self, discarded: DiscardedTransaction | OverruledValue) -> bool:
        return await asyncio.to_thread(self.engine.prune, discarded)

    async def reset(self, keep: str) -> None:
        await asyncio.to_thread(self.engine.reset, keep)

    async def logout(
        self,
        pending: str,
        *,
        file: str | os.PathLike[str] | None = None,
        subject: str | None = None,
    ) -> int:
        """As ``SyncEngine.logout``; ``run()`` returns."""
        self.stop()
        return await asyncio.to_thread(self.engine.logout, pending, file=file, subject=subject)

    async def take_over(self, subject: str) -> int:
        return await asyncio.to_thread(self.engine.take_over, subject)

    async def __aenter__(self) -> AsyncSyncEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
