"""The asyncio engine: same cycles, and nothing runs on behind a cancelled task's back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from entidb import AsyncSyncEngine, Database, SyncConfig, SyncState, TransportError
from entidb.protocol import HandshakeRequest, SyncRequest, SyncResponse
from entidb.server import SyncServer
from entidb.sync import HttpTransport, LoopbackClient, MockTransport


def _engine(server: SyncServer, database: Database, **settings: Any) -> AsyncSyncEngine:
    transport = HttpTransport("http://localhost", client=LoopbackClient(server))
    return AsyncSyncEngine(SyncConfig(db_id="notes", **settings), transport, database)


def test_two_devices_sync_from_coroutines() -> None:
    async def main() -> None:
        server = SyncServer.in_memory()
        one, two = Database.in_memory(), Database.in_memory()
        made = one.collection("notes").add({"text": "hello"})
        async with _engine(server, one) as first, _engine(server, two) as second:
            assert (await first.sync()).pushed == 1
            assert (await second.sync()).pulled == 1
            assert second.state is SyncState.SYNCED
            assert (await second.status()).pending == 0
        assert two.collection("notes")[made] == {"text": "hello"}

    asyncio.run(main())


def test_cancelling_the_task_ends_the_cycle_before_it_goes_on() -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(request: SyncRequest) -> SyncResponse:
        assert isinstance(request, HandshakeRequest)
        asked.set()
        answer.wait(10)
        raise TransportError("the network went away")

    async def main() -> None:
        async with AsyncSyncEngine(
            SyncConfig(db_id="notes"), MockTransport(slow), Database.in_memory()
        ) as engine:
            task = asyncio.create_task(engine.sync())
            await asyncio.to_thread(asked.wait, 10)
            task.cancel()
            await asyncio.sleep(0)
            answer.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.state is SyncState.IDLE

    asyncio.run(main())


def test_running_in_the_background_goes_on_after_an_error_and_wakes() -> None:
    async def main() -> None:
        server = SyncServer.in_memory()
        database = Database.in_memory()
        async with _engine(server, database, interval_s=3600.0) as engine:
            running = asyncio.create_task(engine.run())
            while engine.stats.cycles < 1:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(database.collection("notes").add, {"text": "later"})
            engine.wake()
            while engine.stats.pushed < 1:
                await asyncio.sleep(0.001)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(main())
