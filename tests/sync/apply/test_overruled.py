"""What a policy, a person or a reset decides against is kept (R4): who, when, what won; and what
becomes of it."""

from __future__ import annotations

from typing import Any

import pytest

from entidb.cbor import encode
from entidb.db import OverruledValue
from entidb.db.fields import Side, lost_fields, with_field
from entidb.errors import ConflictError, StorageFullError
from entidb.server import Refusal
from entidb.sync import Conflict, ConflictResolution, Merge
from entidb.sync.conflict import overruled_by
from entidb.sync.merging import merge
from tests.support import DAY_MS, Device, World, assert_in_step, assert_sound, uid

BASE = {"text": "", "prio": 1, "size": {"w": 1, "h": 1}}


def met(
    policy: Any, mine: Any, theirs: Any, base: Any = BASE, **config: Any
) -> tuple[World, Device]:
    """Note 1 was changed here to ``mine`` and on the server to ``theirs``, and synchronised."""
    world = World()
    a = world.device(default_policy=policy, **config)
    if base is not None:
        world.put(("notes", 1, base))
    a.sync()
    a.put(("notes", 1, mine))
    world.put(("notes", 1, theirs))
    a.settle()
    return world, a


def kept(device: Device) -> list[tuple[str, tuple[str, ...], Any, Any]]:
    return [(v.side, v.path, v.value, v.won) for v in device.engine.overruled()]


def with_text(text: str, **more: Any) -> dict[str, Any]:
    return {**BASE, "text": text, **more}


# ---------------------------------------------------------------- what is kept


def test_the_local_text_that_a_merge_decides_against_is_kept_with_whose_it_was_and_what_won():
    world, a = met("merge", with_text("mine"), with_text("theirs"))
    (value,) = a.engine.overruled()
    assert (value.collection, value.entity_id, value.path) == ("notes", uid(1), ("text",))
    assert (value.value, value.won, value.code) == ("mine", "theirs", "overruled")
    assert (value.side, value.device_id, value.version) == ("local", a.db.device_id, 0)
    assert (value.lost_to_device, value.lost_to_version) == (world.server.device_id, 2)
    assert value.decided_by == "policy"
    assert value.at_ms == world.clock.ms
    assert a.engine.discarded() == []
    assert "mine" in value.explain() and "theirs" in value.explain()
    assert_in_step(world, a)


@pytest.mark.parametrize("policy", ["client_wins", "last_write_wins"])
def test_the_servers_value_that_the_device_overrules_is_kept_with_the_fields_that_changed(
    policy: str,
):
    world = World()
    a = world.device(default_policy=policy)
    world.put(("notes", 1, BASE))
    a.sync()
    world.put(("notes", 1, with_text("theirs")))
    world.clock.ms += 1000
    a.clock.ms += 1000
    a.put(("notes", 1, with_text("mine", prio=2)))
    a.settle()
    (value,) = a.engine.overruled()
    assert (value.side, value.path, value.value) == ("remote", (), with_text("theirs"))
    assert value.fields() == [(("text",), encode("theirs"), encode("mine"))]
    assert (value.device_id, value.version) == (world.server.device_id, 2)
    assert (value.lost_to_device, value.lost_to_version) == (a.db.device_id, 0)
    assert_in_step(world, a)


def test_a_merge_with_another_fallback_keeps_the_servers_field():
    _, a = met(Merge("client_wins"), with_text("mine"), with_text("theirs", prio=2))
    assert kept(a) == [("remote", ("text",), "theirs", "mine")]


def test_a_field_of_a_nested_map_is_named_by_its_whole_path():
    mine, theirs = {**BASE, "size": {"w": 2, "h": 1}}, {**BASE, "size": {"w": 3, "h": 5}}
    _, a = met("merge", mine, theirs)
    assert kept(a) == [("local", ("size", "w"), 2, 3)]
    assert a.values()[1]["size"] == {"w": 3, "h": 5}


def test_a_removal_that_loses_is_kept_as_one():
    mine = {k: v for k, v in BASE.items() if k != "text"}
    _, a = met("merge", mine, with_text("theirs"))
    (value,) = a.engine.overruled()
    assert (value.path, value.payload, value.won) == (("text",), None, "theirs")


def test_different_fields_and_equal_values_lose_nothing():
    _, a = met("merge", with_text("same", prio=2), with_text("same", size={"w": 9, "h": 1}))
    assert kept(a) == []


@pytest.mark.parametrize("policy", ["client_wins", "merge"])
def test_a_side_that_wrote_the_base_again_has_lost_nothing(policy: str):
    world = World()
    a = world.device(default_policy=policy)
    world.put(("notes", 1, BASE))
    a.sync()
    a.put(("notes", 1, with_text("mine")))
    world.put(("notes", 1, with_text("for a moment")))
    world.put(("notes", 1, BASE))
    a.settle()
    assert (kept(a), a.values()[1]["text"]) == ([], "mine")


def test_counters_and_sets_combine_and_lose_nothing():
    policy = Merge(counters=["n"], sets=["s"])
    _, a = met(policy, {"n": 4, "s": [1, 2]}, {"n": 4, "s": [1, 3]}, base={"n": 5, "s": [1]})
    assert (a.values()[1], kept(a)) == ({"n": 3, "s": [1, 3, 2]}, [])


@pytest.mark.parametrize(
    ("mine", "theirs", "lost"),
    [
        (with_text("mine"), None, ("remote", (), None, with_text("mine"))),
        (None, with_text("theirs"), ("remote", (), with_text("theirs"), None)),
    ],
)
def test_a_deletion_against_a_change_is_kept_whichever_lost(mine: Any, theirs: Any, lost: Any):
    world, a = met("client_wins", mine, theirs)
    assert kept(a) == [lost]
    assert a.engine.overruled()[0].fields() == [
        ((), theirs and encode(theirs), mine and encode(mine))
    ]
    assert_in_step(world, a)


def test_of_two_that_create_the_same_entity_the_one_that_loses_is_kept():
    _, a = met("merge", {"text": "mine", "x": 1}, {"text": "theirs", "y": 1}, base=None)
    assert kept(a) == [("local", ("text",), "mine", "theirs")]


def test_a_function_whose_answer_is_neither_side_keeps_both():
    def third(conflict: Conflict) -> ConflictResolution:
        return ConflictResolution.merge({**conflict.remote, "text": "a third"})

    _, a = met(third, with_text("mine", prio=2), with_text("theirs", size={"w": 7, "h": 1}))
    assert kept(a) == [
        ("local", ("prio",), 2, 1),
        ("local", ("text",), "mine", "a third"),
        ("remote", ("text",), "theirs", "a third"),
    ]


def test_a_function_as_fallback_that_makes_a_third_value_of_a_field_keeps_both():
    def longer(conflict: Conflict) -> ConflictResolution:
        return ConflictResolution.merge(conflict.local + " | " + conflict.remote)

    _, a = met(Merge(longer), with_text("mine"), with_text("theirs"))
    assert kept(a) == [
        ("local", ("text",), "mine", "mine | theirs"),
        ("remote", ("text",), "theirs", "mine | theirs"),
    ]


def test_what_is_withdrawn_whole_is_in_the_discarded_list_and_nowhere_else():
    _, a = met("server_wins", with_text("mine"), with_text("theirs"))
    assert (len(a.engine.discarded()), kept(a)) == (1, [])


def test_each_transaction_of_a_chain_keeps_what_it_lost():
    world = World()
    a = world.device(default_policy="merge")
    world.put(("notes", 1, BASE))
    a.sync()
    a.put(("notes", 1, with_text("first")))
    a.put(("notes", 1, with_text("first", prio=2)))
    a.put(("notes", 1, with_text("third", prio=2)))
    world.put(("notes", 1, with_text("theirs")))
    a.settle()
    assert kept(a) == [
        ("local", ("text",), "first", "theirs"),
        ("local", ("text",), "third", "theirs"),
    ]
    assert a.values()[1] == with_text("theirs", prio=2)


def test_the_servers_side_loses_once_to_a_whole_chain():
    world = World()
    a = world.device(default_policy=Merge("client_wins"))
    world.put(("notes", 1, BASE))
    a.sync()
    for text in ("first", "second", "third"):
        a.put(("notes", 1, with_text(text)))
    world.put(("notes", 1, with_text("theirs")))
    a.settle()
    assert kept(a) == [("remote", ("text",), "theirs", "first")]


def test_a_deletion_in_the_middle_of_a_chain_that_loses_is_kept():
    world = World()
    a = world.device(default_policy="merge")
    world.put(("notes", 1, BASE))
    a.sync()
    a.put(("notes", 1, None))
    a.put(("notes", 1, {"text": "again", "new": 1}))
    world.put(("notes", 1, with_text("theirs")))
    a.settle()
    assert kept(a) == [
        ("local", (), None, with_text("theirs")),
        ("local", ("text",), "again", "theirs"),
    ]


def test_the_servers_side_has_lost_nothing_where_the_transaction_is_withdrawn_after_all():
    world = World()
    a = world.device(policies={"notes": "client_wins", "others": "server_wins"})
    world.put(("notes", 1, BASE), ("others", 2, BASE))
    a.sync()
    a.put(("notes", 1, with_text("mine")), ("others", 2, with_text("mine")))
    world.put(("notes", 1, with_text("theirs")), ("others", 2, with_text("theirs")))
    a.settle()
    assert (len(a.engine.discarded()), kept(a)) == (1, [])
    assert a.values()[1]["text"] == "theirs"


def test_large_entities_are_kept_by_field():
    mine, theirs = with_text("mine", big="x" * 9000), with_text("theirs", big="y" * 9000)
    _, a = met("client_wins", mine, theirs)
    assert [(side, path) for side, path, _, _ in kept(a)] == [
        ("remote", ("big",)),
        ("remote", ("text",)),
    ]


# ---------------------------------------------------------------- persons and resets


def open_conflict() -> tuple[World, Device]:
    world = World()
    a = world.device(default_policy="manual")
    world.put(("notes", 1, BASE))
    a.sync()
    a.put(("notes", 1, with_text("mine")))
    world.put(("notes", 1, with_text("theirs")))
    a.sync()
    assert kept(a) == []
    return world, a


def test_a_person_who_keeps_their_side_does_not_lose_the_other():
    _, a = open_conflict()
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    (value,) = a.engine.overruled()
    assert (value.decided_by, value.side, value.value["text"]) == ("person", "remote", "theirs")


def test_a_person_who_writes_a_value_of_their_own_keeps_both_sides():
    _, a = open_conflict()
    report = a.engine.resolve(a.engine.conflicts()[0], value=with_text("both"))
    assert report.overruled == 2
    assert kept(a) == [
        ("local", ("text",), "mine", "both"),
        ("remote", ("text",), "theirs", "both"),
    ]


def test_a_person_who_takes_what_the_view_has_by_then_overrules_only_the_server():
    _, a = open_conflict()
    seen = a.engine.conflicts()[0]
    a.put(("notes", 1, with_text("later")))
    a.engine.resolve(seen, value=with_text("later"))
    assert kept(a) == [("remote", ("text",), "theirs", "later")]


@pytest.mark.parametrize("mine", [with_text("lost"), None])
def test_a_reset_keeps_what_this_device_wrote_where_the_server_went_on_further(mine: Any):
    world = World()
    a = world.device()
    world.put(*[("notes", n, BASE) for n in range(1, 4)])
    a.sync()
    backup = world.backup_server()
    a.put(("notes", 1, mine))
    a.settle()
    world.put(("notes", 2, with_text("of another device")))
    a.sync()
    world.open_server(backup)
    for count in range(5):  # so that its versions are beyond those that were lost
        world.put(("notes", 1, with_text("new")), ("notes", 3, with_text(f"new {count}")))
    world.put(("notes", 2, with_text("new")))
    a.engine.reset("device")
    a.settle()
    assert world.values()[1] == with_text("new")
    (value,) = a.engine.overruled()
    assert (value.entity_id, value.side, value.value) == (uid(1), "local", mine)
    assert (value.won, value.decided_by) == (with_text("new"), "reset")
    assert "a reset: the server had a newer one" in value.explain()
    a.engine.recommit(value)
    a.settle()
    assert world.values().get(1) == mine
    assert_in_step(world, a)


def test_a_reset_that_keeps_the_device_keeps_what_the_server_has_instead():
    world = World()
    a = world.device()
    world.put(("notes", 1, BASE), ("notes", 2, BASE), ("notes", 3, BASE))
    a.sync()
    backup = world.backup_server()
    world.put(("notes", 3, None))
    world.put(("notes", 1, with_text("lost")), ("notes", 2, with_text("lost")))
    a.sync()
    a.put(("notes", 2, with_text("pending")))
    world.open_server(backup)
    world.put(("notes", 1, with_text("new")), ("notes", 2, with_text("new")))
    a.engine.reset("device")
    a.settle()
    assert {n: value["text"] for n, value in world.values().items()} == {1: "lost", 2: "pending"}
    found = sorted(a.engine.overruled(), key=lambda value: value.id_bytes)
    assert [value.decided_by for value in found] == ["reset"] * 3
    assert [value.value["text"] for value in found] == ["new", "new", ""]
    assert_in_step(world, a)


def test_a_conflict_that_is_open_at_a_reset_is_against_what_the_server_has_now():
    world = World()
    a = world.device(default_policy="manual")
    world.put(("notes", 1, BASE))
    a.sync()
    backup = world.backup_server()
    a.put(("notes", 1, with_text("mine")))
    world.put(("notes", 2, "x"))
    world.put(("notes", 1, with_text("lost with the history")))
    a.sync()
    seen = a.engine.conflicts()[0]
    world.open_server(backup)
    world.put(("notes", 1, with_text("of the new history")))
    a.engine.reset("device")
    a.sync()
    (conflict,) = a.engine.conflicts()
    assert conflict.remote["text"] == "of the new history"
    assert [(v.decided_by, v.value["text"]) for v in a.engine.overruled()] == [
        ("reset", "lost with the history")
    ]
    with pytest.raises(ConflictError) as caught:
        a.engine.resolve(seen, "theirs")
    assert caught.value.code == "conflict_changed"
    a.engine.resolve(conflict, "theirs")
    assert a.values()[1]["text"] == "of the new history"
    assert_sound(a.db)


# ---------------------------------------------------------------- what becomes of it


def test_a_field_is_written_back_on_what_is_there_now_and_leaves_the_list():
    world, a = met("merge", with_text("mine"), with_text("theirs"))
    world.put(("notes", 1, with_text("theirs", prio=5)))
    a.sync()
    (value,) = a.engine.overruled()
    assert a.engine.recommit(value) == a.db.sequence
    assert a.values()[1] == with_text("mine", prio=5)
    assert a.engine.overruled() == []
    a.settle()
    assert_in_step(world, a)


def test_of_an_overruled_entity_only_the_fields_that_changed_are_written_back():
    world, a = met("client_wins", with_text("mine"), with_text("theirs", new=1))
    world.put(("notes", 1, with_text("mine", prio=5)))
    a.sync()
    a.engine.recommit(a.engine.overruled()[0])
    assert a.values()[1] == with_text("theirs", prio=5, new=1)


def test_an_overruled_entity_that_is_deleted_by_now_comes_back_whole():
    _, a = met("client_wins", None, with_text("theirs"))
    a.engine.recommit(a.engine.overruled()[0])
    assert a.values()[1] == with_text("theirs")


def test_a_deletion_that_lost_is_repeated():
    _, a = met("client_wins", with_text("mine"), None)
    a.engine.recommit(a.engine.overruled()[0])
    assert a.values() == {}


def test_a_field_of_an_entity_that_is_gone_has_no_place_and_stays_in_the_list():
    _, a = met("merge", with_text("mine"), with_text("theirs"))
    a.put(("notes", 1, None))
    before = a.storage.commits
    with pytest.raises(ConflictError, match="deleted") as caught:
        a.engine.recommit(a.engine.overruled()[0])
    assert caught.value.code == "overruled_place_gone"
    assert (len(a.engine.overruled()), a.storage.commits) == (1, before)


def test_what_a_withdrawn_transaction_takes_the_place_of_when_committed_again_is_kept():
    world, a = met("server_wins", with_text("mine"), with_text("theirs", prio=7))
    (entry,) = a.engine.discarded()
    world.put(("notes", 1, with_text("newer", prio=8)))
    a.sync()
    sequence = a.engine.recommit(entry)
    assert a.values()[1] == with_text("mine")
    assert sorted(kept(a)) == [
        ("remote", ("prio",), 8, 1),
        ("remote", ("text",), "newer", "mine"),
    ]
    value = a.engine.overruled()[0]
    assert (value.decided_by, value.transaction_id) == ("person", entry.transaction_id)
    assert (value.device_id, value.lost_to_device) == (world.server.device_id, a.db.device_id)
    assert sequence == a.db.sequence
    a.settle()
    assert world.values()[1] == with_text("mine")
    for value in a.engine.overruled():
        a.engine.recommit(value)
    a.settle()
    assert world.values()[1] == with_text("newer", prio=8)
    assert_in_step(world, a)


def test_what_this_device_wrote_itself_is_no_loss_when_it_commits_again():
    world, a = met("server_wins", with_text("mine"), with_text("theirs"))
    a.put(("notes", 1, with_text("again mine")))
    a.settle()
    a.engine.recommit(a.engine.discarded()[0])
    assert kept(a) == []
    a.settle()
    assert_in_step(world, a)


def test_a_deletion_that_is_committed_again_keeps_the_entity_that_another_device_wrote():
    _, a = met("server_wins", None, with_text("theirs"))
    a.engine.recommit(a.engine.discarded()[0])
    assert a.values() == {}
    assert kept(a) == [("remote", (), with_text("theirs"), None)]
    a.engine.recommit(a.engine.overruled()[0])
    assert a.values()[1] == with_text("theirs")


def test_a_deletion_by_another_device_that_is_committed_over_is_kept_and_can_be_repeated():
    world, a = met("server_wins", with_text("mine"), None)
    a.engine.recommit(a.engine.discarded()[0])
    assert a.values()[1] == with_text("mine")
    (value,) = a.engine.overruled()
    assert (value.side, value.path, value.value, value.won) == (
        "remote",
        (),
        None,
        with_text("mine"),
    )
    assert (value.device_id, value.version) == (world.server.device_id, 2)
    assert "deleted" in value.explain()
    a.settle()
    a.engine.recommit(value)
    assert a.values() == {}
    a.settle()
    assert_in_step(world, a)


def test_a_deletion_that_came_after_the_transaction_was_withdrawn_is_kept_too():
    world, a = met("server_wins", with_text("mine"), with_text("theirs"))
    world.put(("notes", 1, None))
    a.sync()
    a.engine.recommit(a.engine.discarded()[0])
    (value,) = a.engine.overruled()
    assert (value.value, value.won, value.version) == (None, with_text("mine"), 3)


def test_a_deletion_of_which_a_full_pull_has_brought_nothing_is_kept_too():
    _, a = met("server_wins", with_text("mine"), None)
    a.engine.reset("server")
    a.settle()
    a.engine.recommit(a.engine.discarded()[0])
    (value,) = a.engine.overruled()
    assert (value.value, value.won, value.version) == (None, with_text("mine"), 2)


def test_a_deletion_that_this_device_made_itself_is_no_loss_when_it_commits_again():
    world, a = met("server_wins", with_text("mine"), with_text("theirs"))
    a.put(("notes", 1, None))
    a.settle()
    a.engine.recommit(a.engine.discarded()[0])
    assert kept(a) == []
    a.settle()
    assert_in_step(world, a)


def test_an_entity_that_never_was_on_the_server_was_deleted_by_nobody():
    def refuse(context: Any, transaction: Any) -> Refusal:
        return Refusal("no", "not today")

    world = World(validate=refuse)
    a = world.device()
    a.put(("notes", 1, BASE))
    a.settle()
    a.engine.recommit(a.engine.discarded()[0])
    assert kept(a) == []


def test_what_another_device_wrote_under_a_pending_edit_is_kept_when_a_transaction_is_committed():
    world, a = met("server_wins", with_text("mine"), with_text("theirs", prio=7))
    a.put(("notes", 1, with_text("theirs", prio=8)))
    a.engine.recommit(a.engine.discarded()[0])
    assert kept(a) == [("remote", ("text",), "theirs", "mine")]
    a.settle()
    assert_in_step(world, a)


def test_what_another_device_has_written_since_is_kept_when_a_value_is_put_back():
    world, a = met("merge", with_text("mine"), with_text("theirs"))
    world.put(("notes", 1, with_text("newer", prio=5)))
    a.sync()
    a.engine.recommit(a.engine.overruled()[0])
    assert a.values()[1] == with_text("mine", prio=5)
    (value,) = a.engine.overruled()
    assert (value.side, value.path, value.value, value.won) == (
        "remote",
        ("text",),
        "newer",
        "mine",
    )
    assert (value.decided_by, value.device_id) == ("person", world.server.device_id)
    a.settle()
    a.engine.recommit(value)
    a.settle()
    assert (world.values()[1], kept(a)) == (with_text("newer", prio=5), [])


def test_a_deletion_that_came_since_is_kept_when_an_entity_is_put_back():
    world, a = met("client_wins", with_text("mine"), with_text("theirs"))
    world.put(("notes", 1, None))
    a.sync()
    a.engine.recommit(a.engine.overruled()[0])
    assert (a.values()[1], kept(a)) == (
        with_text("theirs"),
        [("remote", (), None, with_text("theirs"))],
    )


def test_what_this_device_wrote_itself_since_is_no_loss_when_a_value_is_put_back():
    _, a = met("merge", with_text("mine"), with_text("theirs"))
    a.put(("notes", 1, with_text("again mine")))
    a.engine.recommit(a.engine.overruled()[0])
    assert kept(a) == []


def test_where_nothing_is_to_be_kept_nothing_is_when_a_transaction_is_committed_again():
    _, a = met("server_wins", with_text("mine"), with_text("theirs"), overruled_max=0)
    a.engine.recommit(a.engine.discarded()[0])
    assert kept(a) == []


def test_what_is_not_kept_any_more_can_be_neither_written_back_nor_forgotten():
    _, a = met("merge", with_text("mine"), with_text("theirs"))
    (value,) = a.engine.overruled()
    assert a.engine.prune(value)
    assert not a.engine.prune(value)
    with pytest.raises(ConflictError) as caught:
        a.engine.recommit(value)
    assert caught.value.code == "discarded_gone"
    assert a.values()[1]["text"] == "theirs"


def test_it_is_counted_by_the_cycle_the_status_and_the_totals():
    world = World()
    a = world.device(default_policy="merge")
    world.put(*[("notes", n, BASE) for n in range(3)])
    a.sync()
    a.put(*[("notes", n, with_text("mine")) for n in range(3)])
    world.put(*[("notes", n, with_text("theirs")) for n in range(3)])
    assert a.sync().overruled == 3
    assert a.sync().overruled == 0
    assert (a.engine.status().overruled, a.engine.stats.overruled) == (3, 3)
    assert a.engine.status().discarded == 0


def many(count: int, **config: Any) -> tuple[World, Device]:
    world = World()
    a = world.device(default_policy="merge", **config)
    world.put(*[("notes", n, BASE) for n in range(count)])
    a.sync()
    clash(world, a, range(count))
    return world, a


def clash(world: World, a: Device, numbers: Any) -> None:
    world.clock.ms += 1
    a.put(*[("notes", n, with_text(f"mine {n} {world.clock.ms}")) for n in numbers])
    world.put(*[("notes", n, with_text(f"theirs {n} {world.clock.ms}")) for n in numbers])
    a.settle()


def names(a: Device) -> list[str]:
    return [value.value.split()[1] for value in a.engine.overruled()]


def test_many_in_one_commit_are_a_few_rows_and_each_can_be_forgotten_by_itself():
    _, a = many(450)
    rows = [key for key, _ in a.db.storage.snapshot().scan(b"l", b"m")]
    assert len(rows) == 3
    values = a.engine.overruled()
    assert [value.number for value in values] == list(range(1, 451))
    for value in (values[0], values[199], values[200], values[449]):
        assert a.engine.prune(value)
    assert [v.number for v in a.engine.overruled()] == [*range(2, 200), *range(202, 450)]
    assert a.engine.status().overruled == 446
    assert_sound(a.db)


def test_the_newest_are_kept_and_the_oldest_are_forgotten():
    world, a = many(5, overruled_max=7)
    clash(world, a, range(5))
    assert names(a) == ["3", "4", "0", "1", "2", "3", "4"]
    assert a.engine.status().overruled == 7
    assert_sound(a.db)


def test_a_smaller_number_is_enforced_by_the_next_cycle_and_then_costs_nothing():
    _, a = many(450)
    a.restart(overruled_max=3)
    a.sync()
    assert names(a) == ["447", "448", "449"]
    commits = a.storage.commits
    a.sync()
    assert a.storage.commits == commits


def test_none_are_kept_where_none_are_wanted():
    _, a = many(5, overruled_max=0)
    assert (kept(a), a.engine.status().overruled) == ([], 0)


def age(world: World, a: Device, days: int) -> None:
    world.clock.ms += days * DAY_MS
    a.clock.ms += days * DAY_MS


def test_what_is_too_old_is_forgotten_and_what_is_younger_stays():
    world, a = many(3, overruled_days=10)
    age(world, a, 6)
    clash(world, a, range(2))
    age(world, a, 5)
    world.put(("notes", 9, BASE))
    a.sync()
    assert names(a) == ["0", "1"]
    age(world, a, 9)
    world.put(("notes", 9, None))
    a.sync()
    assert names(a) == []
    assert_sound(a.db)


def test_one_wrong_clock_forgets_nothing():
    world, a = many(3, overruled_days=10)
    a.clock.ms += 1000 * DAY_MS
    world.put(("notes", 9, BASE))
    a.sync()
    assert len(kept(a)) == 3
    a.clock.ms -= 1000 * DAY_MS
    world.clock.ms += 1000 * DAY_MS
    world.put(("notes", 9, None))
    a.sync()
    assert len(kept(a)) == 3


def test_it_is_durable_with_the_decision_or_not_at_all():
    world = World()
    a = world.device(default_policy="merge")
    world.put(("notes", 1, BASE))
    a.sync()
    a.put(("notes", 1, with_text("mine")))
    world.put(("notes", 1, with_text("theirs")))
    a.storage.fail_next(error=StorageFullError("no room"))
    with pytest.raises(StorageFullError):
        a.sync()
    assert (kept(a), a.values()[1]["text"]) == ([], "mine")
    a.sync()
    a.restart()
    assert [value for _, _, value, _ in kept(a)] == ["mine"]


def test_verify_notices_a_count_that_is_wrong_and_a_row_that_cannot_be_read():
    _, a = many(2)
    ((key, raw),) = a.db.storage.snapshot().scan(b"l", b"m")
    inner = a.storage.inner
    inner.commit({key: raw[:-1]})
    assert any("overruled" in fault for fault in a.db.verify())
    inner.commit({key: None})
    assert any("2 overruled values are counted, 0 are listed" in f for f in a.db.verify())


# ---------------------------------------------------------------- the pure parts


@pytest.mark.parametrize(
    ("base", "side", "won", "lost"),
    [
        ({"a": 1}, {"a": 2}, {"a": 3}, [(("a",), 2, 3)]),
        ({"a": 1}, {"a": 1, "b": 1}, {"a": 1}, [(("b",), 1, None)]),
        ({"a": 1, "b": 1}, {"a": 1}, {"a": 1, "b": 2}, [(("b",), None, 2)]),
        ({"a": 1}, {"a": 1.0}, {"a": True}, [(("a",), 1.0, True)]),
        ({"a": None}, {"a": 1}, {"a": None}, [(("a",), 1, None)]),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, {}, [(("a",), {"b": 2}, None)]),
        ({}, {"a": {"b": 2, "c": 1}}, {"a": {"b": 3, "c": 1}}, [(("a", "b"), 2, 3)]),
        ([1], [1, 2], [1, 3], [((), [1, 2], [1, 3])]),
        ({"a": 1}, {"a": 2}, {"a": 2, "b": 1}, []),
        ({"a": 1}, {"a": 1}, {"a": 5}, []),
    ],
)
def test_what_a_side_lost_is_what_it_changed_and_the_outcome_has_not(
    base: Any, side: Any, won: Any, lost: list[Any]
):
    found = lost_fields(encode(base), encode(side), encode(won))
    assert [(path, payload) for path, payload, _ in found] == [
        (path, None if value is None else encode(value)) for path, value, _ in lost
    ]


def test_a_field_can_be_put_where_its_map_is_missing_and_not_where_there_is_none():
    assert with_field(encode({}), ("a", "b"), encode(1)) == encode({"a": {"b": 1}})
    assert with_field(encode({"a": {"b": 1}}), ("a", "b"), None) == encode({"a": {}})
    assert with_field(encode({"x": 1}), ("a", "b"), None) == encode({"x": 1})
    for value in (None, encode([1]), encode({"a": 1})):
        with pytest.raises(LookupError):
            with_field(value, ("a", "b"), encode(1))


def test_a_resolution_is_equal_to_one_that_says_nothing_of_what_it_overruled():
    conflict = Conflict(
        collection="notes",
        id_bytes=bytes(16),
        base_payload=encode({"t": 0}),
        local_payload=encode({"t": 1}),
        remote_payload=encode({"t": 2}),
    )
    answer = merge(conflict)
    plain = ConflictResolution.merge({"t": 2})
    assert (answer, hash(answer)) == (plain, hash(plain))
    assert answer != ConflictResolution.skip() and answer != "merge"
    # It says the same as a comparison of the values does.
    assert list(overruled_by(answer, conflict)) == list(overruled_by(plain, conflict))
    assert [each[0] for each in overruled_by(answer, conflict)] == [Side.LOCAL]
    assert not overruled_by(ConflictResolution.skip(), conflict)


def test_an_entry_of_the_list_is_a_value_of_its_own_kind():
    _, a = met("merge", with_text("mine"), with_text("theirs"))
    assert all(isinstance(value, OverruledValue) for value in a.engine.overruled())
