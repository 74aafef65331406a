"""A server that lies, against the real engine: nothing is lost, nothing goes on for ever, and
an honest server finds the device in good order afterwards."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from entidb.db import Database, dump
from entidb.errors import EntiDBError, HistoryChangedError, ServerError, StorageFullError
from entidb.server import SyncServer
from entidb.sync import (
    HttpTransport,
    LoopbackClient,
    RetryConfig,
    SyncConfig,
    SyncEngine,
    pulling,
    room,
)
from entidb.testing.fuzz import LIES, GarblingServer, hostile_server, wired
from tests.hostile.support import (
    ATTEMPTS,
    CYCLES,
    Victim,
    accepted,
    honest_server,
    waited_s,
)
from tests.support import DB_ID, FakeClock, Wire, World, uid

PAGES = 30
#: Of one attempt: a handshake, a batch to settle, and in each round all resets and a push.
REQUESTS_MAX = 2 + 5 * (pulling.RESETS_MAX * 2 * PAGES + 20)
#: A ``Retry-After`` counts for an hour at most, the backoff for a minute.
WAIT_MAX_S = CYCLES * ATTEMPTS * (3600 + 60)


@pytest.fixture(autouse=True)
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "PAGES_MAX", PAGES)


def a_world() -> World:
    world = World()
    for number in range(50):
        world.put(("notes", 5000 + number, {"from": "the server"}), ("other", number, number))
    return world


def survives(lie: str | None, *, seed: int, settled: bool, deaf: bool, over_http: bool) -> None:
    world = a_world()
    honest = honest_server(world)
    victim = Victim(seed)
    if settled:
        victim.recover(honest)
        world.put(("notes", 7000, "new since"))
    victim.db.collection("drafts")[uid(1)] = "mine alone"
    victim.write(1, 2)
    liar = hostile_server(seed, honest, lie=lie, deaf=deaf)
    victim.suffer(wired(liar) if over_http else liar)
    assert liar.told, "the lie was never told"
    assert liar.asked <= CYCLES * ATTEMPTS * REQUESTS_MAX
    assert waited_s(victim.clock) <= WAIT_MAX_S
    assert victim.lost(world) == []
    assert victim.db.verify() == []

    victim.write(3)  # it is still a database
    victim.recover(honest)
    assert victim.lost(world) == []
    assert victim.db.verify() == []
    victim.take_the_servers_side(honest)
    assert list(dump(victim.db)) == list(dump(world.server))
    assert [*victim.db.collection("drafts").values()] == ["mine alone"]
    assert victim.db.verify() == [] and world.server.verify() == []


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_new_device_survives_a_lie(lie: str) -> None:
    survives(lie, seed=1, settled=False, deaf=False, over_http=True)


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_device_that_has_synchronised_survives_a_lie(lie: str) -> None:
    survives(lie, seed=2, settled=True, deaf=False, over_http=True)


@pytest.mark.parametrize("lie", sorted(LIES))
def test_the_applier_itself_sees_through_what_no_decoder_has_checked(lie: str) -> None:
    survives(lie, seed=3, settled=True, deaf=False, over_http=False)


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_lie_by_a_server_that_stores_nothing_is_survived(lie: str) -> None:
    survives(lie, seed=4, settled=True, deaf=True, over_http=True)


@pytest.mark.parametrize("seed", range(40))
def test_a_different_lie_with_every_answer_is_survived(seed: int) -> None:
    choice = random.Random(seed)
    survives(
        None,
        seed=seed,
        settled=choice.random() < 0.5,
        deaf=choice.random() < 0.5,
        over_http=choice.random() < 0.7,
    )


@pytest.mark.parametrize("seed", range(15))
def test_answers_garbled_on_the_wire_are_survived(seed: int) -> None:
    clock = FakeClock()
    victim = Victim(seed)
    with SyncServer.in_memory(clock=clock) as server:
        with server.database(DB_ID).transaction() as tx:
            for number in range(30):
                tx.collection("notes")[uid(5000 + number)] = {"n": number}
        garbling = GarblingServer(server, seed)
        victim.write(1, 2)
        for link in (garbling, server):
            transport = HttpTransport("http://localhost", client=LoopbackClient(link), clock=clock)
            config = SyncConfig(db_id=DB_ID, retry=RetryConfig(attempts_max=3))
            with SyncEngine(config, transport, victim.db, clock=victim.clock) as engine:
                for _ in range(4):
                    try:
                        engine.sync()
                    except HistoryChangedError:
                        engine.reset("device")
                    except EntiDBError:
                        assert link is garbling, "the honest server is not believed"
            assert waited_s(victim.clock) <= 4 * WAIT_MAX_S
            assert victim.db.verify() == []
        assert not victim.db.read_head().ready
        taken = accepted(server.database(DB_ID))
        assert [i.hex() for i in victim.ledger if i not in taken] == []


def test_what_a_server_says_of_a_refusal_is_kept_short() -> None:
    world = a_world()
    victim = Victim(9)
    victim.write(*range(10))
    loud = hostile_server(9, honest_server(world), lie="rejected_loudly", deaf=True)
    victim.suffer(loud)
    with victim.engine(loud) as engine:
        discarded = engine.discarded()
    assert len(discarded) == 40
    assert all(len(one.code) <= 100 and len(one.message) <= 1200 for one in discarded)


def test_a_stamp_at_the_end_of_time_does_not_stop_the_clock_of_this_device() -> None:
    world = a_world()
    victim = Victim(9)
    victim.suffer(wired(hostile_server(9, honest_server(world), lie="late")))
    victim.write(1)
    stamps = [transaction.timestamp for transaction in victim.pending()]
    assert stamps and max(stamps) >> 16 <= victim.clock.now_ms() + 1


def test_endless_pages_end_the_cycle_and_the_next_one_goes_on_from_there() -> None:
    """The bound is a pause and not an end: an honest server with that much is pulled in parts."""
    world = World()
    for number in range(PAGES * 3):
        world.put(("notes", number, number))
    victim = Victim(9, attempts_max=1, pull_operations_max=1)
    with victim.engine(wired(honest_server(world))) as engine:
        for _ in range(2):
            with pytest.raises(ServerError, match="pages"):
                engine.sync()
        engine.sync()
    assert list(dump(victim.db)) == list(dump(world.server))


def test_a_pull_stops_at_its_bytes_and_goes_on_from_there_when_it_may_take_more() -> None:
    world = World()
    for number in range(PAGES // 2):
        world.put(("notes", 100 + number, "x" * 1000))
    victim = Victim(9, attempts_max=1, pull_operations_max=1, staged_bytes_max=5000)
    victim.write(1)
    with victim.engine(wired(honest_server(world))) as engine:
        for _ in range(2):
            with pytest.raises(StorageFullError, match="staged_bytes_max") as caught:
                engine.sync()
            assert caught.value.code == "pull_too_large"
        stage = engine.applier.stage()
        assert stage is not None and 0 < stage.size <= 5000
        assert engine.status().pending > 0
        assert uid(100) not in victim.db.collection("notes")
    assert victim.db.verify() == []
    cursor = stage.full_cursor
    victim.config |= {"staged_bytes_max": 1 << 30}
    with victim.engine(wired(honest_server(world))) as engine:
        engine.sync()
    assert cursor > 0
    assert list(dump(victim.db)) == list(dump(world.server))


def test_a_pull_leaves_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10_000]
    monkeypatch.setattr(room, "STAGED_BYTES_SMALL", 4000)
    monkeypatch.setattr(room, "_free_bytes", lambda path: free[0])
    world = World()
    for number in range(PAGES // 2):
        world.put(("notes", number, "x" * 100_000))
    config = SyncConfig(db_id=DB_ID, pull_operations_max=1, retry=RetryConfig.none())
    with Database.open(tmp_path / "device") as db:
        with SyncEngine(config, Wire(world), db) as engine:
            with pytest.raises(StorageFullError, match="left on the disk"):
                engine.sync()
            assert "notes" not in db.collections() or not len(db.collection("notes"))
            free[0] = 10 << 20
            engine.sync()
        assert list(dump(db)) == list(dump(world.server))
