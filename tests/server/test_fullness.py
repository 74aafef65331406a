"""Quotas of what a database holds: what would go beyond them is refused, and nothing else."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from entidb.db import Database
from entidb.db.local import Role
from entidb.db.records import EntityRow
from entidb.errors import ConfigError, StorageFullError
from entidb.server import ServerConfig, SyncServer
from entidb.server.fullness import MEASURED_S, Fullness, Room, fullness_of
from entidb.storage import MemoryStorage
from entidb.sync import HttpTransport, LoopbackClient, RetryConfig, SyncConfig, SyncEngine
from tests.server.support import ManualClock
from tests.support import DB_ID, uid

Make = Callable[..., tuple[SyncServer, SyncEngine]]


@pytest.fixture
def make() -> Any:
    made: list[Any] = []

    def build(clock: ManualClock | None = None, **quota: Any) -> tuple[SyncServer, SyncEngine]:
        config = ServerConfig(data_dir=None, insecure_no_auth=True, **quota)
        server = SyncServer(config, clock=clock or ManualClock())
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        settings = SyncConfig(db_id=DB_ID, retry=RetryConfig.none())
        engine = SyncEngine(settings, transport, Database(MemoryStorage()))
        made.extend((engine, server))
        return server, engine

    yield build
    for each in made:
        each.close()


def put(engine: SyncEngine, *numbers: int, size: int = 1) -> None:
    """One transaction."""
    with engine.database.transaction() as tx:
        for number in numbers:
            tx.collection("notes")[uid(number)] = "x" * size


def on_server(server: SyncServer) -> set[int]:
    return {each.int for each, _ in server.database(DB_ID).collection("notes").items()}


def codes(engine: SyncEngine) -> list[str]:
    return [entry.code for entry in engine.discarded()]


def test_what_would_be_one_too_many_is_refused_and_the_rest_is_taken(make: Make) -> None:
    server, engine = make(database_entities_max=5)
    for number in range(1, 9):  # enough of them to be decided in columns, if they fitted
        put(engine, number)
    engine.sync()
    assert on_server(server) == {1, 2, 3, 4, 5}
    assert codes(engine) == ["over_quota"] * 3
    assert "5 entities" in engine.discarded()[0].message


def test_a_transaction_counts_whole(make: Make) -> None:
    server, engine = make(database_entities_max=3)
    put(engine, 1, 2)
    put(engine, 3, 4)
    put(engine, 5)
    engine.sync()
    assert on_server(server) == {1, 2, 5}
    assert codes(engine) == ["over_quota"]


def test_a_full_database_takes_changes_and_deletions(make: Make) -> None:
    server, engine = make(database_entities_max=2)
    put(engine, 1, 2)
    engine.sync()
    put(engine, 1, size=50)
    with engine.database.transaction() as tx:  # one goes, another comes
        del tx.collection("notes")[uid(2)]
        tx.collection("notes")[uid(3)] = "new"
    engine.sync()
    assert (on_server(server), codes(engine)) == ({1, 3}, [])
    put(engine, 4)
    engine.sync()
    (refused,) = engine.discarded()
    with engine.database.transaction() as tx:
        del tx.collection("notes")[uid(1)]
    engine.sync()
    engine.recommit(refused)
    engine.sync()
    assert (on_server(server), codes(engine)) == ({3, 4}, [])


def test_deleting_and_writing_again_is_not_counted_twice(make: Make) -> None:
    server, engine = make(database_entities_max=1)
    for _ in range(5):
        put(engine, 1)
        engine.sync()
        with engine.database.transaction() as tx:
            del tx.collection("notes")[uid(1)]
        engine.sync()
    put(engine, 2)
    engine.sync()
    assert (on_server(server), codes(engine)) == ({2}, [])


def test_bytes_are_measured_now_and_then_and_counted_in_between(make: Make) -> None:
    clock = ManualClock()
    server, engine = make(clock, database_bytes_max=40_000)
    for number in range(1, 30):
        put(engine, number, size=4000)
        engine.sync()
    full = on_server(server)
    assert 5 <= len(full) <= 10
    assert set(codes(engine)) == {"over_quota"}
    with engine.database.transaction() as tx:
        for number in full:
            del tx.collection("notes")[uid(number)]
    engine.sync()
    assert on_server(server) == set()
    put(engine, 99, size=4000)
    engine.sync()
    assert on_server(server) == {99}  # what was freed is room at once
    clock.ms += int(MEASURED_S * 1000)
    put(engine, 100, size=4000)
    engine.sync()
    assert on_server(server) == {99, 100}


def test_what_a_quota_counts_is_what_a_loop_counts(make: Make) -> None:
    """Any transactions, one by one and many at once, against a set in Python."""
    rng = random.Random(7)
    server, engine = make(database_entities_max=12)
    there: set[int] = set()
    for _ in range(150):
        waiting: list[dict[int, bool]] = []
        here = set(there)
        for _ in range(rng.choice((1, 6))):
            writes: dict[int, bool] = {}
            for number in rng.sample(range(1, 25), rng.choice((1, 1, 3))):
                writes[number] = number not in here or rng.random() < 0.4
            with engine.database.transaction() as tx:
                notes = tx.collection("notes")
                for number, keeps in writes.items():
                    if keeps:
                        notes[uid(number)] = "x" * rng.randint(1, 9)
                    else:
                        del notes[uid(number)]
            here = (here | {n for n, k in writes.items() if k}) - {
                n for n, k in writes.items() if not k
            }
            waiting.append(writes)
        engine.sync()
        refused: set[int] = set()
        for writes in waiting:
            after = (there | {n for n, k in writes.items() if k}) - {
                n for n, k in writes.items() if not k
            }
            conflicts = not refused.isdisjoint(writes)
            if conflicts or (len(after) > 12 and len(after) > len(there)):
                refused |= writes.keys()
            else:
                there = after
        engine.sync()
        assert on_server(server) == there
        for entry in engine.discarded():
            engine.prune(entry)


def test_without_a_quota_nothing_is_counted() -> None:
    config = ServerConfig(data_dir=None, insecure_no_auth=True)
    assert fullness_of(config, Database.in_memory(), ManualClock()) is None


def test_a_push_of_which_one_frees_room_gives_none_to_those_before_it() -> None:
    """As one by one: of a batch that is decided in columns each transaction has to fit."""
    was = EntityRow(0, 1, 1, bytes(16), 1, 0, b"x" * 20).encode()
    larger, smaller = (b"x" * 24, was), (b"x" * 10, was)
    room = Room(5, 3)
    assert not room.take_each([larger, smaller])
    assert (room.entities, room.size) == (5, 3)
    assert room.take_each([smaller, larger])
    assert (room.entities, room.size) == (5, 9)  # 3 + 10 - 4
    assert not Room(1, 100).take_each([(b"x", None), (b"y", None)])


def test_a_room_that_is_over_takes_what_makes_it_smaller() -> None:
    assert Room(-3, None).take([(None, None)]) is None
    assert Room(-3, -3).take([(b"x", None)]) == "database_entities_max"
    assert Room(None, -3).take([(b"x", None)]) == "database_bytes_max"


def test_what_fits_exactly_is_taken_and_counted() -> None:
    room = Room(1, 4)
    assert room.take([(b"xxxx", None)]) is None
    assert (room.entities, room.size) == (0, 0)
    assert room.take([(b"x", None)]) == "database_entities_max"
    assert Room(2, 3).take([(b"xxxx", None)]) == "database_bytes_max"


def test_a_value_takes_the_room_of_the_one_that_it_replaces() -> None:
    stored = EntityRow(0, 1, 1, bytes(16), 1, 0, b"xxx").encode()
    for payload, left in ((b"yyy", -3), (b"y", -1), (None, 0)):
        room = Room(-3, -3)
        assert room.take([(payload, stored)]) is None
        assert room.size == left
        assert room.entities == -3 + (payload is None)
    assert Room(-3, -3).take([(b"yyyy", stored)]) == "database_bytes_max"


def fullness_and_used(clock: ManualClock, **quota: Any) -> tuple[Fullness, Database, list[int]]:
    """With a store that says it uses as many bytes as are in the list."""
    database, used = Database.in_memory(role=Role.SERVER), [0]
    info = database.storage.info()
    database.storage.info = lambda: replace(info, used_bytes=used[0])  # type: ignore[method-assign]
    config = ServerConfig(data_dir=None, insecure_no_auth=True, **quota)
    fullness = fullness_of(config, database, clock)
    assert fullness is not None
    return fullness, database, used


def test_the_size_is_measured_once_a_minute_and_counted_in_between() -> None:
    clock = ManualClock()
    clock.ms = 0
    fullness, database, used = fullness_and_used(clock, database_bytes_max=1000)
    found: list[int | None] = []
    for at_s, uses in ((0, 100), (59.9, 700), (60, 300), (119.9, 0), (120, 0)):
        clock.ms, used[0] = int(at_s * 1000), uses
        found.append(pushed(fullness, database, (b"x" * 50, None)))
    assert found == [900, 850, 700, 650, 1000]
    assert fullness.fault("database_bytes_max") == (
        "over_quota",
        "the database is full: it may hold 1,000 bytes (database_bytes_max)",
    )


def test_all_pushes_of_one_commit_share_its_room() -> None:
    fullness, database, _ = fullness_and_used(ManualClock(), database_entities_max=2)
    with database.write() as writer:
        assert fullness.room(writer).take([(b"x", None)]) is None
        assert fullness.room(writer).take([(b"x", None), (b"y", None)]) == "database_entities_max"
        assert fullness.room(writer).entities == 1
    # Nothing of it was written, so the next commit begins with what is stored.
    with database.write() as writer:
        assert fullness.room(writer).entities == 2
    assert fullness.fault("database_entities_max")[1].endswith(
        "it may hold 2 entities (database_entities_max)"
    )


def test_a_deletion_that_was_not_stored_makes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit may find the disk full, again and again: then nothing of it counts."""
    fullness, database, used = fullness_and_used(ManualClock(), database_bytes_max=160)
    used[0] = 60
    stored = EntityRow(0, 1, 1, bytes(16), 1, 0, b"x" * 60).encode()
    found: list[int | None] = []
    for works, write in (
        (False, (None, stored)),
        (False, (None, stored)),
        (True, (None, stored)),
        (True, (b"x" * 90, None)),
        (False, (b"x" * 30, None)),
        (True, (b"x" * 30, None)),
        (True, (None, None)),
    ):
        with monkeypatch.context() as patch:
            if not works:
                patch.setattr(database.storage, "commit", no_room)
            with contextlib.suppress(StorageFullError):
                pushed(fullness, database, write, found)
    assert found == [100, 100, 100, 160, 70, 70, 40]


def no_room(batch: Any, after: Any = None) -> int:
    raise StorageFullError("no room")


def pushed(
    fullness: Fullness,
    database: Database,
    write: tuple[bytes | None, Any],
    found: list[int | None] | None = None,
) -> int | None:
    """One commit of a push with this write; the room that it had, which goes to ``found`` too."""
    with database.write() as writer:
        room = fullness.room(writer)
        left = room.size
        if found is not None:
            found.append(left)
        assert room.take([write]) is None
        writer.next_sequence()
        writer.put(b"mwritten", b"")
        fullness.note(writer)
    return left


def test_what_another_node_adds_counts_at_once_and_not_when_this_one_measures_again() -> None:
    clock = ManualClock()
    mine, database, used = fullness_and_used(clock, database_bytes_max=1000)
    config = ServerConfig(data_dir=None, insecure_no_auth=True, database_bytes_max=1000)
    other = fullness_of(config, database, clock)
    assert other is not None
    assert pushed(mine, database, (b"x" * 300, None)) == 1000
    used[0] = 300
    assert pushed(other, database, (b"x" * 300, None)) == 700
    assert pushed(mine, database, (b"x" * 300, None)) == 400
    assert pushed(other, database, (b"x" * 50, None)) == 100
    assert pushed(mine, database, (None, None)) == 50
    # Commits of programs say nothing of it, and it is measured once a minute.
    clock.ms += 60_000
    used[0] = 10
    assert pushed(mine, database, (b"x" * 40, None)) == 990
    assert pushed(mine, database, (None, None)) == 950


def test_what_a_node_measures_is_said_to_others_also_where_it_takes_nothing() -> None:
    clock = ManualClock()
    mine, database, used = fullness_and_used(clock, database_bytes_max=1000)
    config = ServerConfig(data_dir=None, insecure_no_auth=True, database_bytes_max=1000)
    other = fullness_of(config, database, clock)
    assert other is not None
    pushed(mine, database, (b"x" * 100, None))
    database.collection("notes").add({"n": 1})  # a program counts nothing
    used[0] = 1200
    with database.write() as writer:
        room = other.room(writer)
        assert room.take([(b"x", None)]) == "database_bytes_max"
        other.note(writer)
    with database.write() as writer:
        assert mine.room(writer).size == -200


def test_what_is_local_on_the_server_and_what_is_empty_does_not_count() -> None:
    fullness, database, _ = fullness_and_used(ManualClock(), database_entities_max=3)
    database.declare_local("own")
    with database.transaction() as tx:
        tx.collection("notes").add({"n": 1})
        tx.collection("own").add({"n": 1})
    with database.write() as writer:
        writer.collection("empty")
    with database.write() as writer:
        assert fullness.room(writer).entities == 2


@pytest.mark.parametrize("name", ["database_entities_max", "database_bytes_max"])
def test_a_quota_is_a_whole_number(name: str) -> None:
    wrong: dict[str, Any] = {name: -1}
    with pytest.raises(ConfigError, match=name):
        ServerConfig(data_dir=None, insecure_no_auth=True, **wrong)
