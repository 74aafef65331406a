"""Work that is done in bounded commits: purging, sweeping, forgetting, and making much pending."""

from __future__ import annotations

from typing import Any

import pytest

from entidb.db import Database, Role, inspect, purge_tombstones, writer
from entidb.db.adopt import schedule_adoption
from entidb.db.pending import PendingTransaction, decode_pending
from entidb.db.records import META_ADOPT
from entidb.db.replica import Adopt, decode_record
from entidb.errors import ScopeError
from tests.support import World, assert_in_step, assert_sound, uid


def delete(database: Database, first: int, count: int) -> None:
    with database.transaction() as tx:
        for n in range(first, first + count):
            del tx.collection("notes")[uid(n)]


def test_twelve_thousand_tombstones_are_purged_whatever_commits_they_came_in():
    database = Database.in_memory(role=Role.SERVER)
    for first in range(0, 13_000, 1000):
        with database.transaction() as tx:
            for n in range(first, first + 1000):
                tx.collection("notes")[uid(n)] = n
    for first in range(0, 4000, 400):
        delete(database, first, 400)
    # One commit that is larger than any step of a purge; a step still ends between commits.
    delete(database, 4000, 8000)
    assert purge_tombstones(database, database.sequence) == 12_000
    assert len(database.collection("notes")) == 1000
    assert_sound(database)
    # What is left: rows, feed rows, a count, and what every database has.
    assert database.storage.info().records < 2 * 1000 + 20


def test_purging_part_of_the_past_leaves_the_rest():
    database = Database.in_memory(role=Role.SERVER)
    with database.transaction() as tx:
        for n in range(7000):
            tx.collection("notes")[uid(n)] = n
    delete(database, 0, 6000)
    between = database.sequence
    delete(database, 6000, 500)
    assert purge_tombstones(database, between) == 6000
    assert inspect(database)["floor"] == between
    assert purge_tombstones(database, database.sequence) == 500
    assert_sound(database)


@pytest.mark.parametrize("together", [False, True])
def test_twelve_thousand_local_entities_become_pending_in_the_groups_they_were_written_in(
    together: bool,
):
    world = World()
    a = world.device()
    a.db.declare_local("notes")
    size = 6000 if together else 500
    for first in range(0, 12_000, size):
        with a.db.transaction() as tx:
            for n in range(first, first + size):
                tx.collection("notes")[uid(n)] = n
    a.sync()
    assert world.values() == {}
    a.db.declare_local("notes", False)
    a.settle()
    groups = [len(t.operations) for push in a.wire.pushes() for t in push.transactions]
    assert groups == [size] * (12_000 // size)
    assert_in_step(world, a)


def test_a_group_that_is_larger_than_a_transaction_may_be_is_divided():
    world = World()
    a = world.device()
    a.db.declare_local("notes")
    with a.db.transaction() as tx:
        for n in range(100):
            tx.collection("notes")[uid(n)] = "x" * 1000
    a.db.transaction_bytes_max = 20_000
    a.db.declare_local("notes", False)
    a.settle()
    groups = [len(t.operations) for push in a.wire.pushes() for t in push.transactions]
    assert sum(groups) == 100 and len(groups) > 5
    assert_in_step(world, a)


def test_what_was_local_and_is_changed_before_it_is_pending_is_pushed_once_as_it_is_now():
    world = World()
    a = world.device()
    a.db.declare_local("notes")
    a.put(("notes", 1, "old"), ("notes", 2, "old"), ("notes", 3, "old"))
    a.put(("notes", 4, "old"))
    a.put(("notes", 4, None))
    a.db.declare_local("notes", False)
    a.put(("notes", 1, "new"), ("notes", 2, None))
    a.settle()
    assert world.values() == {1: "new", 3: "old"}
    assert_in_step(world, a)


# ---------------------------------------------------------------- forgetting


def kinds(events: list[Any]) -> list[tuple[str, str]]:
    return [(event.kind, event.collection) for event in events]


def test_r31_forgetting_a_local_collection_empties_it_in_one_step():
    database = Database.in_memory()
    drafts = database.collection("drafts", local=True)
    with database.transaction() as tx:
        for n in range(6000):
            tx.collection("drafts")[uid(n)] = n
    cursor = database.sequence
    seen: list[Any] = []
    database.observe(lambda commit: seen.extend(commit.events))
    with database.snapshot() as before:
        database.forget("drafts")
        assert len(before.collection("drafts")) == 6000
    assert (len(drafts), list(drafts.items())) == (0, [])
    assert kinds(seen) == kinds(list(database.changes(cursor))) == [("reset", "drafts")]
    drafts[uid(1)] = "again"
    assert list(drafts.values()) == ["again"]
    assert_sound(database)
    # What was there goes when there is time for it, or at once with compact().
    database.compact()
    assert database.storage.info().records < 30
    assert list(drafts.values()) == ["again"]
    assert_sound(database)


def test_r31_what_a_narrowed_scope_left_behind_can_be_forgotten_and_comes_back_with_it():
    world = World()
    world.put(("notes", 1, "x"), ("tasks", 1, "x"))
    a = world.device()
    a.sync()
    a.db.set_scope(["notes"])
    assert a.values("tasks") == {1: "x"}
    a.db.forget("tasks")
    assert a.values("tasks") == {}
    a.sync()
    assert (a.values("tasks"), world.values("tasks")) == ({}, {1: "x"})
    a.db.set_scope(None)
    a.settle()
    assert a.values("tasks") == {1: "x"}
    assert_in_step(world, a)


def test_r31_a_collection_that_synchronises_is_not_forgotten():
    world = World()
    world.put(("notes", 1, "x"))
    a = world.device()
    a.sync()
    with pytest.raises(ScopeError, match="set_scope"):
        a.db.forget("notes")
    assert a.values() == {1: "x"}


def test_forgetting_what_never_was_does_nothing():
    database = Database.in_memory()
    sequence = database.sequence
    database.forget("nothing")
    assert (database.sequence, database.collections()) == (sequence, [])


def test_a_server_has_no_scope_and_does_not_take_back_what_was_local():
    server = Database.in_memory(role=Role.SERVER)
    server.declare_local("audit")
    server.collection("audit").add(1)
    with pytest.raises(ScopeError, match="no scope"):
        server.set_scope(["notes"])
    with pytest.raises(ScopeError, match="copy its entities"):
        server.declare_local("audit", False)
    assert len(server.collection("audit")) == 1


def test_declaring_what_is_so_already_is_no_commit():
    database = Database.in_memory()
    database.declare_local("drafts")
    sequence = database.sequence
    database.declare_local("drafts")
    database.declare_local("notes", False)
    database.set_scope(None)
    assert database.sequence == sequence


def test_a_database_and_its_collections_say_what_they_are():
    database = Database.in_memory()
    notes = database.collection("notes")
    assert repr(database) == "<Database 'memory' device>"
    assert repr(notes) == "<Collection 'notes'>"
    # Two handles are two keys of a dict, as any mapping that can change.
    assert len({notes, database.collection("notes")}) == 2
    assert notes == notes and notes != database.collection("notes")
    assert database.new_id() < database.new_id()


def test_verify_reads_a_large_pending_transaction_once(monkeypatch: pytest.MonkeyPatch):
    reads: list[bytes] = []

    def counting(key: bytes, raw: bytes) -> PendingTransaction:
        reads.append(key)
        return decode_pending(key, raw)

    with Database.in_memory() as db:
        with db.transaction() as tx:
            for number in range(500):
                tx.collection("notes")[uid(number)] = number
        monkeypatch.setattr(writer, "decode_pending", counting)
        assert db.verify() == []
    assert len(reads) == 1


def test_r29_what_a_reset_has_still_to_make_pending_is_compared_though_the_scope_widens():
    """Two of one collection, too: what the reset keeps, and what was there when it came back."""
    with Database.in_memory() as db:
        notes, tasks = db.collection("notes"), db.collection("tasks")
        notes[uid(1)], tasks[uid(1)] = "kept", "local"
        with db.write("local") as staged:
            infos = staged.catalogue.by_name
            old = [infos["notes"].number, infos["notes"].table]
            new = [infos["tasks"].number, infos["tasks"].table]
            schedule_adoption(staged, [new], compare=False)
            schedule_adoption(staged, [old], compare=True)
            schedule_adoption(staged, [old], compare=False)
            raw = staged.get(META_ADOPT)
        assert raw is not None
        sources = decode_record(Adopt, raw).sources
        assert sorted(sources) == sorted([[*new, 0], [*old, 1], [*old, 0]])
        assert [source[1] for source in sources] == sorted(source[1] for source in sources)
