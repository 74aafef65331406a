"""The engine as a program holds it: listeners, background, closing, and moves between states."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import Database
from entidb.errors import (
    ConfigError,
    DatabaseClosedError,
    DatabaseLockedError,
    ProtocolError,
    ServerError,
    SyncStateError,
    TransportError,
    VersionMismatchError,
)
from entidb.protocol import HandshakeRequest, HandshakeResponse, SyncRequest, SyncResponse
from entidb.server import SyncServer
from entidb.sync import (
    TRANSITIONS,
    AsyncSyncEngine,
    HttpResponse,
    HttpTransport,
    LoopbackClient,
    MockTransport,
    RetryConfig,
    SyncConfig,
    SyncEngine,
    SyncState,
)
from entidb.sync.state import check_move
from tests.support import World, assert_in_step, lose, uid
from tests.waiting import until

WAIT_S = 60.0
CONFIG = SyncConfig(db_id="shop", retry=RetryConfig.none(), interval_s=3600.0)


def loopback(server: SyncServer) -> HttpTransport:
    return HttpTransport("http://localhost", client=LoopbackClient(server))


class Until:
    """Wakes when the engine has come to a state so many times."""

    def __init__(self, engine: SyncEngine, state: SyncState) -> None:
        self._seen = threading.Semaphore(0)
        engine.on_state(lambda old, new: self._seen.release() if new is state else None)

    def wait(self) -> None:
        assert self._seen.acquire(timeout=WAIT_S)


# ---------------------------------------------------------------- states


@pytest.mark.parametrize(("old", "new"), list(itertools.product(SyncState, SyncState)))
def test_a_move_between_states_is_in_the_table_or_an_error(old: SyncState, new: SyncState) -> None:
    if new is old or new in TRANSITIONS[old]:
        check_move(old, new)
    else:
        with pytest.raises(SyncStateError, match=f"from {old.value} to {new.value}"):
            check_move(old, new)


def test_listeners_hear_every_move_and_all_progress_until_they_have_enough() -> None:
    world = World()
    world.put(*[("notes", n, "x") for n in range(3)])
    a = world.device()
    a.put(("notes", 10, "mine"))
    moves: list[str] = []
    told: list[tuple[SyncState, int]] = []
    no_moves = a.engine.on_state(lambda old, new: moves.append(new.value))
    no_progress = a.engine.on_progress(lambda step: told.append((step.state, step.operations)))
    a.sync()
    assert moves == ["connecting", "pulling", "pushing", "synced"]
    assert (SyncState.PULLING, 3) in told and (SyncState.PUSHING, 1) in told
    heard = (len(moves), len(told))
    no_moves()
    no_progress()
    world.put(("notes", 20, "y"))
    a.sync()
    assert (len(moves), len(told)) == heard
    assert_in_step(world, a)


# ---------------------------------------------------------------- one at a time, and closed


def test_a_second_cycle_at_the_same_time_is_refused_and_the_first_goes_on() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    refused: list[SyncStateError] = []

    def meanwhile(request: SyncRequest) -> None:
        thread = threading.Thread(target=sync_too)
        thread.start()
        thread.join(WAIT_S)

    def sync_too() -> None:
        with pytest.raises(SyncStateError) as caught:
            a.engine.sync()
        refused.append(caught.value)

    a.wire.before = meanwhile
    a.sync()
    assert len(refused) == 3
    assert_in_step(world, a)


def test_a_closed_engine_refuses_to_sync_and_leaves_the_database_to_another() -> None:
    world = World()
    a = world.device()
    a.engine.close()
    a.engine.close()
    with pytest.raises(DatabaseClosedError):
        a.engine.sync()
    with SyncEngine(CONFIG, MockTransport([]), a.db), pytest.raises(DatabaseLockedError):
        SyncEngine(CONFIG, MockTransport([]), a.db)


def test_an_engine_that_could_not_be_made_leaves_the_database_to_another() -> None:
    with Database.in_memory() as db:
        with pytest.raises(ConfigError):
            SyncEngine(CONFIG, "ftp://nowhere", db)
        SyncEngine(CONFIG, MockTransport([]), db).close()


def test_a_reset_has_to_name_a_side() -> None:
    a = World().device()
    with pytest.raises(ConfigError, match="server"):
        a.engine.reset("neither")


# ---------------------------------------------------------------- in the background


def test_a_background_engine_syncs_at_once_when_woken_and_not_after_stop() -> None:
    with SyncServer.in_memory() as server, Database.in_memory() as db:
        there = server.database("shop").collection("notes")
        with SyncEngine(CONFIG, loopback(server), db) as engine:
            synced = Until(engine, SyncState.SYNCED)
            db.collection("notes")[uid(1)] = "one"
            engine.start()
            with pytest.raises(SyncStateError, match="already"):
                engine.start()
            synced.wait()
            assert there[uid(1)] == "one"
            db.collection("notes")[uid(2)] = "two"
            engine.wake()
            synced.wait()
            assert there[uid(2)] == "two"
            engine.stop()
            db.collection("notes")[uid(3)] = "three"
            engine.wake()
            assert uid(3) not in there
            engine.start()
            synced.wait()
            assert there[uid(3)] == "three"


def test_a_background_engine_shows_an_error_and_goes_on_at_its_next_turn() -> None:
    server = SyncServer.in_memory()
    with server, Database.in_memory() as db:
        away = [True]

        class Client(LoopbackClient):
            def request(self, *arguments: Any) -> HttpResponse:
                if away[0]:
                    raise TransportError("no network here")
                return super().request(*arguments)

        transport = HttpTransport("http://localhost", client=Client(server))
        with SyncEngine(CONFIG, transport, db) as engine:
            failed, synced = Until(engine, SyncState.ERROR), Until(engine, SyncState.SYNCED)
            db.collection("notes")[uid(1)] = "one"
            engine.start()
            failed.wait()
            away[0] = False
            engine.wake()
            synced.wait()
            assert engine.status().pending == 0
            assert engine.stats.failures == 1


def test_closing_ends_a_background_engine_that_waits_to_try_again() -> None:
    with Database.in_memory() as db:
        config = SyncConfig(db_id="shop", retry=RetryConfig(delay_initial_s=60.0, jitter=False))
        transport = MockTransport(lambda request: _raise(TransportError("no network")))
        engine = SyncEngine(config, transport, db)
        waiting = Until(engine, SyncState.RETRY_WAIT)
        engine.start()
        waiting.wait()
        engine.close()
        assert engine.status().next_retry_s is None


def test_a_background_engine_says_when_it_tries_again_after_it_gave_up_for_a_while() -> None:
    with Database.in_memory() as db:
        config = SyncConfig(db_id="shop", retry=RetryConfig(attempts_max=1, delay_initial_s=60.0))
        transport = MockTransport(lambda request: _raise(ServerError("502")))
        with SyncEngine(config, transport, db) as engine:
            engine.start()
            until(lambda: engine.status().next_retry_s is not None)
            status = engine.status()
            assert status.state is SyncState.ERROR and 0 < (status.next_retry_s or 0) <= 60
            engine.stop()
            assert engine.status().next_retry_s is None


def _raise(error: Exception) -> SyncResponse:
    raise error


def test_an_asyncio_engine_shows_errors_goes_on_by_its_interval_and_can_decide() -> None:
    async def main() -> None:
        server = SyncServer.in_memory()
        away = [True]

        class Client(LoopbackClient):
            def request(self, *arguments: Any) -> HttpResponse:
                if away[0]:
                    raise TransportError("no network here")
                return super().request(*arguments)

        config = SyncConfig(
            db_id="shop", retry=RetryConfig.none(), interval_s=0.01, default_policy="manual"
        )
        db = Database.in_memory()
        db.collection("notes")[uid(1)] = "mine"
        server.database("shop").collection("notes")[uid(1)] = "theirs"
        transport = HttpTransport("http://localhost", client=Client(server))
        async with AsyncSyncEngine(config, transport, db) as engine:
            running = asyncio.create_task(engine.run())
            while (await engine.status()).last_error_code != "transport_error":
                await asyncio.sleep(0.001)
            away[0] = False
            while not (found := await engine.conflicts()):
                await asyncio.sleep(0.001)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert engine.state in (SyncState.SYNCED, SyncState.IDLE)
            await engine.resolve(found[0], "theirs")
            assert [gone.code for gone in await engine.discarded()] == ["conflict"]
        assert db.collection("notes")[uid(1)] == "theirs"
        server.close()

    asyncio.run(main())


# ---------------------------------------------------------------- a server that is not what it was


def answered(world: World, change: Callable[[SyncResponse], SyncResponse]) -> None:
    answer = world.answer

    def changed(request: SyncRequest, grant: Any) -> SyncResponse:
        return change(answer(request, grant))

    world.answer = changed  # type: ignore[method-assign]


def test_a_server_of_another_major_version_ends_the_cycle_and_nothing_is_sent() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    answered(
        world,
        lambda response: (
            replace(response, major=2) if isinstance(response, HandshakeResponse) else response
        ),
    )
    with pytest.raises(VersionMismatchError, match="update the older side"):
        a.sync()
    assert [type(request) for request in a.wire.requests] == [HandshakeRequest]
    assert a.pending == 1


def test_an_answer_larger_than_the_limit_is_refused_whatever_client_brought_it() -> None:
    class Client:
        def request(self, *arguments: Any) -> HttpResponse:
            return HttpResponse(200, {"content-type": "application/cbor"}, bytes(5000))

        def close(self) -> None:
            pass

    config = SyncConfig(db_id="shop", response_bytes_max=4096, retry=RetryConfig.none())
    transport = HttpTransport("http://localhost", client=Client(), config=config)
    with Database.in_memory() as db, SyncEngine(config, transport, db) as engine:
        with pytest.raises(ProtocolError) as caught:
            engine.sync()
        assert caught.value.code == "too_large"


def test_an_outbox_can_be_looked_at_oldest_first_with_what_is_held() -> None:
    world = World()
    a = world.device(default_policy="manual")
    world.put(("notes", 2, "theirs"))
    for n in (1, 2, 3):
        a.put(("notes", n, "mine"))
    a.wire.before = lose(HandshakeRequest)
    with pytest.raises(TransportError):
        a.sync()
    assert [t.held for t in a.engine.applier.pending()] == [False] * 3
    a.sync()
    a.put(("notes", 4, "mine"))
    a.put(("notes", 2, "mine again"))
    a.put(("notes", 5, "mine"))
    left = list(a.engine.applier.pending())
    assert [t.sequence for t in left] == sorted(t.sequence for t in left)
    assert [t.held for t in left] == [True, False, True, False]


def test_a_listeners_bug_does_not_end_the_background_engine() -> None:
    world = World()
    a = world.device()
    told: list[threading.ExceptHookArgs] = []
    shown: list[str] = []
    failed, again = threading.Event(), threading.Event()

    def listener(old: SyncState, new: SyncState) -> None:
        if new is SyncState.PULLING and failed.is_set():
            shown.append(str(a.engine.status().last_error))
        if new is SyncState.SYNCED:
            if failed.is_set():
                again.set()
            else:
                failed.set()
                raise ZeroDivisionError("a bug of the application")

    a.engine.on_state(listener)
    hook, threading.excepthook = threading.excepthook, told.append
    try:
        a.engine.start()
        assert failed.wait(60)
        for _ in range(6000):
            a.engine.wake()
            if again.wait(0.01):
                break
        assert again.is_set()
    finally:
        a.engine.stop()
        threading.excepthook = hook
    assert "ZeroDivisionError" in shown[0]
    assert [type(args.exc_value) for args in told] == [ZeroDivisionError]
