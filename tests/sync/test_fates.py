"""What became of a transaction, as a value; and waiting until that is known."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from entidb import AsyncSyncEngine, Database, SyncConfig, SyncEngine
from entidb.errors import ConfigError, SyncStateError, TransportError
from entidb.protocol import PushRequest, SyncRequest, SyncResponse
from entidb.server import Refusal, SyncServer
from entidb.sync import HttpTransport, LoopbackClient, MockTransport, RetryConfig, SyncState
from entidb.sync.fates import TRANSACTIONS_MAX, Answers, Fate, FateState, trim
from tests.support import World

WAIT_S = 60.0
CONFIG = SyncConfig(db_id="shop", retry=RetryConfig.none(), interval_s=3600.0)


def loopback(server: SyncServer) -> HttpTransport:
    return HttpTransport("http://localhost", client=LoopbackClient(server))


def write(db: Database, value: Any = "x") -> Any:
    with db.transaction() as tx:
        tx.collection("notes").add(value)
    return tx


# ---------------------------------------------------------------- what became of it


def test_a_transaction_is_pending_and_then_accepted_as_a_version():
    world = World()
    a = world.device()
    world.put(("notes", 1, "before"))
    tx = write(a.db)
    assert a.engine.fate(tx) == Fate(tx.sequence, FateState.PENDING)
    assert not a.engine.fate(tx).decided
    a.sync()
    assert a.engine.fate(tx) == Fate(tx.sequence, FateState.ACCEPTED, world.server.sequence)
    assert a.engine.fate(tx.sequence).accepted


def test_of_many_in_one_push_each_has_its_own_version():
    world = World()
    a = world.device()
    several = [write(a.db, n) for n in range(5)]
    a.sync()
    assert [a.engine.fate(tx).version for tx in several] == [1, 2, 3, 4, 5]


def test_one_that_the_server_refuses_is_discarded_with_its_code():
    world = World(validate=lambda context, tx: Refusal("too_dear", "not this"))
    a = world.device()
    tx = write(a.db)
    a.sync()
    fate = a.engine.fate(tx)
    assert (fate.state, fate.code, fate.message) == (FateState.DISCARDED, "too_dear", "not this")
    assert fate.decided and not fate.accepted


def test_one_in_conflict_waits_for_a_person_and_is_accepted_after_that():
    world = World()
    a, b = world.device(default_policy="manual"), world.device()
    for device in (b, a):
        device.put(("notes", 1, f"of {device.seed}"))
    sequence = a.db.sequence
    b.sync()
    a.sync()
    assert a.engine.fate(sequence) == Fate(sequence, FateState.CONFLICT)
    (conflict,) = a.engine.conflicts()
    a.engine.resolve(conflict, "mine")
    assert a.engine.fate(sequence).state is FateState.PENDING
    a.sync()
    assert a.engine.fate(sequence).accepted


def test_what_is_not_remembered_is_settled_and_nothing_is_made_up():
    world = World()
    a = world.device()
    tx = write(a.db)
    a.sync()
    a.restart()
    assert a.engine.fate(tx.sequence) == Fate(tx.sequence, FateState.SETTLED)
    a.db.declare_local("drafts")
    with a.db.transaction() as local:
        local.collection("drafts").add("mine alone")
    assert a.engine.fate(local).state is FateState.SETTLED


def test_what_was_never_committed_has_no_fate():
    a = World().device()
    with a.db.transaction() as nothing:
        pass
    for given in (nothing, 0, -1, a.db.sequence + 1, True, "1", a.db):
        with pytest.raises(ConfigError):
            a.engine.fate(given)  # type: ignore[arg-type]


def test_a_transaction_of_an_asyncio_program_is_one_too():
    server, db = SyncServer.in_memory(), Database.in_memory()

    async def main() -> tuple[Fate, Fate, Fate]:
        async with db.aio as aio, AsyncSyncEngine(CONFIG, loopback(server), db) as engine:
            async with aio.transaction() as tx:
                tx["notes"].add("x")
            before = await engine.fate(tx)
            after = await engine.accepted(tx, WAIT_S)
            return before, after, engine.engine.fate(tx)

    with server, db:
        before, after, same = asyncio.run(main())
    assert before == Fate(1, FateState.PENDING)
    assert after == same == Fate(1, FateState.ACCEPTED, 1)


def test_only_the_newest_verdicts_are_remembered():
    answers: Answers = Answers()
    half = TRANSACTIONS_MAX // 2
    for first in range(5):
        answers.append(([*range(first * half, (first + 1) * half)], []))
    trim(answers)
    assert [sequences[0] for sequences, _ in answers] == [3 * half, 4 * half]
    answers.append(([*range(3 * TRANSACTIONS_MAX)], []))
    trim(answers)
    assert len(answers) == 1


# ---------------------------------------------------------------- waiting


def test_without_a_background_run_waiting_is_a_sync():
    world = World()
    a = world.device()
    tx = write(a.db)
    assert a.engine.accepted(tx).version == 1
    assert a.engine.synced()
    assert len(a.wire.pushes()) == 1
    write(a.db)
    assert a.engine.synced()

    def lost(request: SyncRequest) -> None:
        raise TransportError("lost")

    a.wire.before = lost
    write(a.db)
    with pytest.raises(TransportError):
        a.engine.synced()


def test_in_the_background_a_verdict_comes_as_soon_as_there_is_one():
    server, db = SyncServer.in_memory(), Database.in_memory()
    with server, db, SyncEngine(CONFIG, loopback(server), db) as engine:
        engine.start()
        for version in (1, 2, 3):
            assert engine.accepted(write(db), WAIT_S).version == version
        assert engine.synced(WAIT_S)


def test_a_wait_ends_with_its_time_and_with_the_background_run():
    def away(request: SyncRequest) -> SyncResponse:
        raise TransportError("away")

    with Database.in_memory() as db, SyncEngine(CONFIG, MockTransport(away), db) as engine:
        engine.start()
        tx = write(db)
        assert engine.accepted(tx, 0.05).state is FateState.PENDING
        assert not engine.synced(0.0)

        def stop() -> None:
            while not engine._waiting:  # where nothing runs in the background it would sync
                time.sleep(0.001)
            engine.stop()

        threading.Thread(target=stop, daemon=True).start()
        assert not engine.synced()


def test_waiting_where_it_would_wait_for_itself_is_an_error():
    server, db = SyncServer.in_memory(), Database.in_memory()
    with server, db, SyncEngine(CONFIG, loopback(server), db) as engine:
        write(db)

        def wait(old: SyncState, new: SyncState) -> None:
            engine.synced()

        engine.on_state(wait)
        with pytest.raises(SyncStateError, match="would never end"):
            engine.sync()
        with db.transaction(), pytest.raises(SyncStateError, match="would never end"):
            engine.synced()


def test_a_transaction_that_comes_later_is_not_waited_for():
    world = World()
    a = world.device()
    write(a.db)

    def once_more(request: SyncRequest) -> None:
        if isinstance(request, PushRequest):
            a.wire.after = lambda request: None
            write(a.db)

    a.wire.after = once_more
    assert a.engine.synced()
    assert a.db.read_head().ready == 1


# ---------------------------------------------------------------- asyncio


def test_in_asyncio_it_is_the_same_and_cancelling_ends_the_wait():
    async def main() -> None:
        with SyncServer.in_memory() as server, Database.in_memory() as db:
            async with AsyncSyncEngine(CONFIG, loopback(server), db) as engine:
                assert (await engine.accepted(write(db))).version == 1
                engine.start()
                with pytest.raises(SyncStateError):
                    engine.start()
                assert (await engine.accepted(write(db), WAIT_S)).version == 2
                assert await engine.synced(WAIT_S)
                assert (await engine.fate(1)).accepted

    asyncio.run(main())


def test_cancelling_ends_a_wait_in_asyncio():
    def away(request: SyncRequest) -> SyncResponse:
        raise TransportError("away")

    async def main() -> None:
        with Database.in_memory() as db:
            async with AsyncSyncEngine(CONFIG, MockTransport(away), db) as engine:
                engine.start()
                write(db)
                waiting = asyncio.create_task(engine.synced())
                await asyncio.sleep(0.05)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(waiting, WAIT_S)

    asyncio.run(main())


def test_the_asyncio_engine_can_do_all_that_the_blocking_one_can():
    with Database.in_memory() as one, Database.in_memory() as other:
        blocking = SyncEngine(CONFIG, "http://localhost:1", one)
        asyncio_one = AsyncSyncEngine(CONFIG, "http://localhost:1", other)
        names = {name for name in dir(blocking) if not name.startswith("_")}
        assert {"sync", "start", "accepted", "on_conflict", "recommit", "reset"} <= names
        assert names <= set(dir(asyncio_one))
        blocking.close()
        asyncio_one.engine.close()
