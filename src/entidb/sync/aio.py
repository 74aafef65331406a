"""The asyncio engine: the same cycles, without blocking the event loop.

A cycle is short bursts of storage commits and waiting for the network. Both run in a worker
thread, so that a slow disk never stalls the loop either; cancelling the task cancels the cycle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from entidb.db import Database, DiscardedTransaction, OverruledValue
from entidb.errors import EntiDBError, SyncCancelledError
from entidb.sync.applier import DatabaseApplier
from entidb.sync.config import SyncConfig
from entidb.sync.engine import SyncEngine
from entidb.sync.policies import Conflict, ConflictResolution
from entidb.sync.rebase import RebaseReport
from entidb.sync.state import SyncCycleResult, SyncState, SyncStats, SyncStatus
from entidb.sync.transport import SyncTransport


class AsyncSyncEngine:
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
        self._wake = asyncio.Event()

    async def sync(self) -> SyncCycleResult:
        """One cycle. If the task is cancelled the cycle ends at its next step, and only then does
        ``CancelledError`` go on: nothing runs on behind the caller's back (R9)."""
        running = asyncio.ensure_future(asyncio.to_thread(self.engine.sync))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self.engine.cancel()
            await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # Taken, so that it is not reported as never retrieved.
            raise

    async def run(self) -> None:
        """Sync now, and then every ``interval_s`` seconds or when woken, until cancelled. Errors
        do not end it; they show in ``status()``."""
        while True:
            self._wake.clear()
            try:
                await self.sync()
            except SyncCancelledError:
                raise
            except EntiDBError as error:
                # R9: a background engine goes on at its next turn.
                self.engine.note_error(error)
            try:
                await asyncio.wait_for(self._wake.wait(), self.engine.config.interval_s)
            except TimeoutError:
                continue

    def wake(self) -> None:
        """Let ``run()`` sync now. Call it on the event loop's thread."""
        self._wake.set()

    async def close(self) -> None:
        """End what is running and let another engine have the database. Idempotent."""
        await asyncio.to_thread(self.engine.close)

    @property
    def state(self) -> SyncState:
        return self.engine.state

    @property
    def stats(self) -> SyncStats:
        return self.engine.stats

    async def status(self) -> SyncStatus:
        return await asyncio.to_thread(self.engine.status)

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

    async def __aenter__(self) -> AsyncSyncEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
