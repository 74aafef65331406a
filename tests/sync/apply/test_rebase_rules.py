"""Putting pending transactions on top of pulled state: R23 to R27."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from entidb.errors import ConflictError, TransportError
from entidb.protocol import PushRequest
from entidb.sync import Conflict, ConflictResolution, Merge
from entidb.types import timestamp_from_ms
from tests.support import Device, World, assert_in_step, assert_sound, lose, uid

KEEP = ConflictResolution.keep_local()
THEIRS = ConflictResolution.accept_remote()
SKIP = ConflictResolution.skip()


def start(policy: Any = "server_wins", *, entities: int = 3, **config: Any) -> tuple[World, Device]:
    """A device that has notes 1, 2, 3 as the server has them."""
    world = World()
    for n in range(1, entities + 1):
        world.put(("notes", n, {"n": 0}))
    a = world.device(default_policy=policy, **config)
    a.sync()
    return world, a


def asked(answer: ConflictResolution) -> tuple[list[Conflict], Callable[[Conflict], Any]]:
    """A policy that always answers the same, and the conflicts it was asked about."""
    conflicts: list[Conflict] = []

    def policy(conflict: Conflict) -> ConflictResolution:
        conflicts.append(conflict)
        return answer

    return conflicts, policy


# ---------------------------------------------------------------- R23


def test_r23_a_change_to_a_clean_entity_is_taken() -> None:
    world, a = start()
    world.put(("notes", 1, {"n": 1}), ("notes", 2, None))
    result = a.sync()
    assert (result.pulled, result.conflicts) == (2, [])
    assert a.values() == {1: {"n": 1}, 3: {"n": 0}}
    assert_in_step(world, a)


def test_r23_a_conflict_has_three_values_with_versions_devices_and_times() -> None:
    conflicts, policy = asked(KEEP)
    world, a = start(policy)
    b = world.device()
    b.sync()
    world.clock.ms += 100
    b.clock.ms += 5
    b.put(("notes", 2, {"n": "b"}))
    b.sync()
    a.clock.ms += 7
    made = a.put(("notes", 2, {"n": "a"}))
    a.sync()
    [conflict] = conflicts
    assert (conflict.base, conflict.local, conflict.remote) == ({"n": 0}, {"n": "a"}, {"n": "b"})
    assert (conflict.base_version, conflict.remote_version) == (2, 4)
    assert conflict.base_device == world.server.device_id
    assert conflict.local_device == a.db.device_id
    assert conflict.remote_device == b.db.device_id
    assert conflict.local_timestamp == timestamp_from_ms(a.clock.ms)
    assert conflict.remote_timestamp == timestamp_from_ms(b.clock.ms)
    assert conflict.transaction_id == made.bytes
    assert conflict.kind == "update/update"


@pytest.mark.parametrize(
    ("mine", "theirs", "kind"),
    [
        ((1, {"n": 1}), (1, {"n": 2}), "update/update"),
        ((1, {"n": 1}), (1, None), "update/delete"),
        ((1, None), (1, {"n": 2}), "delete/update"),
        ((9, {"n": 1}), (9, {"n": 2}), "create/create"),
    ],
)
@pytest.mark.parametrize("answer", [KEEP, THEIRS], ids=["keep_local", "accept_remote"])
def test_r23_each_kind_of_conflict_can_go_either_way(
    mine: tuple[int, Any], theirs: tuple[int, Any], kind: str, answer: ConflictResolution
) -> None:
    conflicts, policy = asked(answer)
    world, a = start(policy)
    world.put(("notes", *theirs))
    a.put(("notes", *mine))
    a.sync()
    number, expected = mine if answer is KEEP else theirs
    assert [conflict.kind for conflict in conflicts] == [kind]
    assert world.values().get(number) == expected
    assert len(a.engine.discarded()) == (answer is THEIRS)
    assert_in_step(world, a)


def test_r23_an_own_later_change_is_no_conflict_with_the_earlier() -> None:
    world, a = start()
    for n in range(4):
        a.put(("notes", 1, {"n": n}))
        result = a.sync()
        assert result.conflicts == []
    assert_in_step(world, a)


# ---------------------------------------------------------------- R24


@pytest.mark.parametrize("value", [{"n": "same"}, None], ids=["same bytes", "both deleted"])
def test_r24_the_same_change_on_both_sides_is_done(value: Any) -> None:
    world, a = start()
    world.put(("notes", 1, value))
    made = a.put(("notes", 1, value))
    result = a.sync()
    assert (result.conflicts, result.done) == ([], [made.bytes])
    assert (a.pending, a.engine.discarded()) == (0, [])
    assert_in_step(world, a)


def test_r24_of_a_transaction_only_the_equal_operation_is_done() -> None:
    world, a = start()
    world.put(("notes", 1, {"n": "same"}))
    a.put(("notes", 1, {"n": "same"}), ("notes", 2, {"n": "mine"}))
    result = a.sync()
    assert (result.conflicts, result.done, result.pushed) == ([], [], 1)
    assert world.values()[2] == {"n": "mine"}
    assert_in_step(world, a)


@pytest.mark.parametrize("value", [{"n": "same"}, None], ids=["same bytes", "both deleted"])
@pytest.mark.parametrize("policy", ["server_wins", "client_wins", "manual", "merge"])
def test_r24_several_operations_that_come_to_what_the_server_has_are_done(
    policy: str, value: Any
) -> None:
    world, a = start(policy)
    world.put(("notes", 1, value))
    a.put(("notes", 1, {"n": "first"}))
    a.put(("notes", 1, {"n": "second"}))
    a.put(("notes", 1, value))
    result = a.sync()
    assert (result.conflicts, result.unresolved, len(result.done)) == ([], [], 3)
    assert (a.pending, a.engine.discarded()) == (0, [])
    assert_in_step(world, a)


def test_r24_what_comes_after_the_first_equal_operation_is_no_conflict() -> None:
    world, a = start()
    world.put(("notes", 1, {"n": "same"}))
    a.put(("notes", 1, {"n": "same"}))
    a.put(("notes", 1, {"n": "last"}))
    result = a.sync()
    assert (result.conflicts, len(result.done), result.pushed) == ([], 1, 1)
    assert world.values()[1] == {"n": "last"}
    assert_in_step(world, a)


def test_r24_somebody_elses_bytes_in_the_middle_of_a_chain_are_a_conflict() -> None:
    world, a = start("client_wins")
    world.put(("notes", 1, None))
    a.put(("notes", 1, {"n": "first"}))
    a.put(("notes", 1, None))
    a.put(("notes", 1, {"n": "last"}))
    result = a.sync()
    assert (len(result.conflicts), result.pushed) == (1, 3)
    assert world.values()[1] == {"n": "last"}
    assert_in_step(world, a)


def test_r24_deleting_what_was_deleted_and_made_again_elsewhere_is_a_conflict() -> None:
    world, a = start("client_wins")
    world.put(("notes", 1, None))
    world.put(("notes", 1, {"n": "again"}))
    a.put(("notes", 1, None))
    assert len(a.sync().conflicts) == 1
    assert_in_step(world, a)


# ---------------------------------------------------------------- R25: accept_remote


def test_r25_accept_remote_withdraws_the_whole_transaction() -> None:
    world, a = start()
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": 1}), ("notes", 2, None), ("notes", 9, {"n": 1}))
    a.sync()
    assert a.values() == {1: {"n": "theirs"}, 2: {"n": 0}, 3: {"n": 0}}
    assert_in_step(world, a)


def test_r25_accept_remote_takes_later_transactions_along_and_theirs() -> None:
    world, a = start(entities=6)
    world.put(("notes", 1, {"n": "theirs"}))
    first = a.put(("notes", 1, {"n": 1}), ("notes", 2, {"n": 1}))
    second = a.put(("notes", 2, {"n": 2}), ("notes", 3, {"n": 2}))
    third = a.put(("notes", 3, {"n": 3}))
    other = a.put(("notes", 5, {"n": 4}))
    a.sync()
    gone = a.engine.discarded()
    assert [g.id for g in gone] == [first, second, third]
    assert [g.code for g in gone] == ["conflict", "depends", "depends"]
    assert other.bytes not in [g.transaction_id for g in gone]
    assert world.values()[5] == {"n": 4}
    assert_in_step(world, a)


def test_r25_accept_remote_leaves_what_came_before_on_the_other_entities() -> None:
    world, a = start()
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 2, {"n": "earlier"}))
    a.put(("notes", 1, {"n": 1}), ("notes", 2, {"n": "later"}))
    a.sync()
    assert a.values()[2] == {"n": "earlier"}
    assert len(a.engine.discarded()) == 1
    assert_in_step(world, a)


def test_r25_a_withdrawal_in_one_page_decides_only_once_about_each_transaction() -> None:
    _conflicts, policy = asked(THEIRS)
    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}), ("notes", 2, {"n": "theirs"}))
    a.put(("notes", 1, {"n": 1}), ("notes", 2, {"n": 1}))
    a.sync()
    assert len(a.engine.discarded()) == 1
    assert a.values()[2] == {"n": "theirs"}
    assert_in_step(world, a)


# ---------------------------------------------------------------- R25: keep_local


def test_r25_keep_local_keeps_every_transaction_of_the_chain() -> None:
    world, a = start("client_wins")
    world.put(("notes", 1, {"n": "theirs"}), ("notes", 2, {"n": "theirs"}))
    a.put(("notes", 1, {"n": 1}), ("notes", 2, {"n": 1}))
    a.put(("notes", 1, {"n": 2}), ("notes", 3, {"n": 2}))
    a.put(("notes", 1, None))
    result = a.sync()
    assert result.pushed == 3
    assert world.values() == {2: {"n": 1}, 3: {"n": 2}}
    assert_in_step(world, a)


def test_r25_one_entity_lost_and_one_kept_in_a_transaction_is_lost_whole() -> None:
    world = World()
    world.put(("notes", 1, "x"), ("tasks", 1, "x"))
    a = world.device(policies={"notes": "client_wins", "tasks": "server_wins"})
    a.sync()
    world.put(("notes", 1, "theirs"), ("tasks", 1, "theirs"))
    a.put(("notes", 1, "mine"), ("tasks", 1, "mine"))
    a.sync()
    assert (a.values(), a.values("tasks")) == ({1: "theirs"}, {1: "theirs"})
    assert len(a.engine.discarded()) == 1
    assert_in_step(world, a)


# ---------------------------------------------------------------- R25: merge


def test_r25_merge_rebases_each_operation_in_turn() -> None:
    world, a = start(Merge(counters=("n",)))
    world.put(("notes", 1, {"n": 100, "theirs": True}))
    a.put(("notes", 1, {"n": 1}))
    a.put(("notes", 1, {"n": 3, "mine": True}))
    a.put(("notes", 1, {"n": 6, "mine": False}))
    a.sync()
    pushed = [
        transaction.operations[0].payload
        for push in a.wire.pushes()
        for transaction in push.transactions
    ]
    values = [a.db.collection("notes")._codec.decode(p) for p in pushed if p is not None]
    assert [value["n"] for value in values] == [101, 103, 106]
    assert world.values()[1] == {"n": 106, "theirs": True, "mine": False}
    assert_in_step(world, a)


def test_r25_merge_of_several_entities_in_one_transaction() -> None:
    world, a = start("merge")
    world.put(("notes", 1, {"n": 0, "theirs": 1}), ("notes", 2, {"n": 0, "theirs": 2}))
    a.put(("notes", 1, {"n": 0, "mine": 1}), ("notes", 2, {"n": 0, "mine": 2}))
    a.sync()
    assert world.values()[1] == {"n": 0, "theirs": 1, "mine": 1}
    assert world.values()[2] == {"n": 0, "theirs": 2, "mine": 2}
    assert_in_step(world, a)


def test_r25_a_merge_that_gives_the_remote_value_is_done() -> None:
    _, policy = asked(ConflictResolution.merge({"n": "theirs"}))
    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}))
    result = a.sync()
    assert (len(result.done), result.pushed, a.pending) == (1, 0, 0)
    assert_in_step(world, a)


def test_r25_a_merge_may_delete() -> None:
    _, policy = asked(ConflictResolution.merge(None))
    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}))
    a.sync()
    assert 1 not in world.values()
    assert_in_step(world, a)


def test_r25_skip_in_the_middle_of_a_merged_chain_holds_the_chain() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        return SKIP if conflict.local == {"n": 2} else ConflictResolution.merge({"n": "merged"})

    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}))
    for n in (1, 2, 3):
        a.put(("notes", 1, {"n": n}))
    result = a.sync()
    assert (len(result.unresolved), result.pushed) == (1, 0)
    assert a.values()[1] == {"n": 3}
    assert_sound(a.db)


# ---------------------------------------------------------------- R25: skip, hold, resolve


def held(policy: Any = "manual") -> tuple[World, Device]:
    """Note 1 is in conflict; notes 2 and 4 depend on it; note 3 does not."""
    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}), ("notes", 2, {"n": "mine"}))
    a.put(("notes", 2, {"n": "later"}), ("notes", 4, {"n": "later"}))
    a.put(("notes", 3, {"n": "other"}))
    a.sync()
    return world, a


def test_r25_a_newest_operation_that_loses_in_a_merged_chain_is_kept_in_discarded() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        # Merges, but lets the server keep what only the newest operation changed.
        if conflict.local == {"n": 2} and conflict.base == {"n": 1}:
            return THEIRS
        return ConflictResolution.merge({"n": conflict.local["n"] + conflict.remote["n"]})

    world, a = start(policy)
    a.put(("notes", 1, {"n": 1}))
    a.put(("notes", 1, {"n": 2}), ("notes", 2, {"n": 9}))
    world.put(("notes", 1, {"n": 10}))
    result = a.sync()
    assert [w.code for w in result.withdrawn] == ["conflict"]
    assert a.values() == {1: {"n": 11}, 2: {"n": 0}, 3: {"n": 0}}
    (lost,) = a.engine.discarded()
    assert [value for _, _, value in lost.values()] == [{"n": 2}, {"n": 9}]
    assert_in_step(world, a)


def test_r25_what_is_held_stays_in_the_view_and_the_rest_goes_on() -> None:
    world, a = held()
    status = a.engine.status()
    assert (status.held, status.conflicts, status.pending) == (2, 1, 0)
    assert a.values() == {
        1: {"n": "mine"},
        2: {"n": "later"},
        3: {"n": "other"},
        4: {"n": "later"},
    }
    assert world.values() == {1: {"n": "theirs"}, 2: {"n": 0}, 3: {"n": "other"}}
    assert a.sync().requests == 1
    assert_sound(a.db)


def test_r25_new_work_on_a_held_entity_is_held_too_and_other_work_is_not() -> None:
    world, a = held()
    a.put(("notes", 4, {"n": "even later"}), ("notes", 8, {"n": "with it"}))
    a.put(("notes", 9, {"n": "free"}))
    a.put(("notes", 8, {"n": "on top"}))
    a.sync()
    assert a.engine.status().held == 4
    assert 8 not in world.values() and world.values()[9] == {"n": "free"}
    assert_sound(a.db)
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    a.settle()
    assert world.values()[8] == {"n": "on top"}
    assert_in_step(world, a)


def test_r25_resolving_mine_pushes_everything_that_waited() -> None:
    world, a = held()
    [conflict] = a.engine.conflicts()
    assert conflict.remote == {"n": "theirs"} and conflict.base == {"n": 0}
    report = a.engine.resolve(conflict, "mine")
    assert len(report.resolved) == 1
    assert a.engine.status().held == 0
    a.sync()
    assert world.values()[1] == {"n": "mine"} and world.values()[4] == {"n": "later"}
    assert_in_step(world, a)


def test_r25_resolving_theirs_withdraws_what_depends_on_it() -> None:
    world, a = held()
    a.engine.resolve(a.engine.conflicts()[0], "theirs")
    assert [gone.code for gone in a.engine.discarded()] == ["conflict", "depends"]
    assert a.values() == {1: {"n": "theirs"}, 2: {"n": 0}, 3: {"n": "other"}}
    a.sync()
    assert_in_step(world, a)


@pytest.mark.parametrize("value", [{"n": "third"}, None])
def test_r25_resolving_with_a_value_pushes_that(value: Any) -> None:
    world, a = held()
    a.engine.resolve(a.engine.conflicts()[0], value=value)
    assert a.values().get(1) == value
    a.settle()
    assert world.values().get(1) == value
    assert world.values()[4] == {"n": "later"}
    assert_in_step(world, a)


def test_r25_resolving_to_what_the_server_has_is_in_step_again() -> None:
    world, a = held()
    a.engine.resolve(a.engine.conflicts()[0], value={"n": "theirs"})
    a.settle()
    assert_in_step(world, a)


def test_r25_a_conflict_can_be_resolved_once_and_skip_is_no_resolution() -> None:
    _, a = held()
    [conflict] = a.engine.conflicts()
    with pytest.raises(ConflictError) as caught:
        a.engine.resolve(conflict, SKIP)
    assert caught.value.code == "conflict_skipped"
    a.engine.resolve(conflict, "mine")
    with pytest.raises(ConflictError) as caught:
        a.engine.resolve(conflict, "mine")
    assert caught.value.code == "conflict_gone"


def test_r25_a_held_conflict_that_gets_a_newer_remote_is_one_conflict_with_the_old_base() -> None:
    world, a = held()
    [old] = a.engine.conflicts()
    world.put(("notes", 1, {"n": "newer"}))
    a.sync()
    [conflict] = a.engine.conflicts()
    assert (conflict.base, conflict.remote) == ({"n": 0}, {"n": "newer"})
    with pytest.raises(ConflictError) as caught:
        a.engine.resolve(old, "mine")
    assert caught.value.code == "conflict_changed"
    a.engine.resolve(conflict, "mine")
    a.settle()
    assert world.values()[1] == {"n": "mine"}
    assert_in_step(world, a)


def test_r25_a_held_conflict_ends_when_the_server_comes_to_the_same() -> None:
    world, a = held()
    world.put(("notes", 1, {"n": "mine"}))
    a.settle()
    assert a.engine.conflicts() == []
    assert a.engine.status().held == 0
    assert world.values()[4] == {"n": "later"}
    assert_in_step(world, a)


def test_r25_of_two_conflicts_of_a_transaction_both_have_to_be_resolved() -> None:
    world, a = start("manual")
    world.put(("notes", 1, {"n": "theirs"}), ("notes", 2, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}), ("notes", 2, {"n": "mine"}))
    a.sync()
    first, second = a.engine.conflicts()
    a.engine.resolve(first, "mine")
    assert a.sync().pushed == 0
    assert a.engine.status().held == 1
    a.engine.resolve(second, value={"n": "both"})
    a.settle()
    assert (world.values()[1], world.values()[2]) == ({"n": "mine"}, {"n": "both"})
    assert_in_step(world, a)


def test_r25_theirs_on_one_of_two_conflicts_ends_both() -> None:
    world, a = start("manual")
    world.put(("notes", 1, {"n": "theirs"}), ("notes", 2, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}), ("notes", 2, {"n": "mine"}))
    a.sync()
    a.engine.resolve(a.engine.conflicts()[0], "theirs")
    assert a.engine.conflicts() == []
    assert_in_step(world, a)


def test_r25_a_ready_transaction_becomes_held_when_its_other_entity_conflicts() -> None:
    world, a = held()
    world.put(("notes", 9, {"n": "theirs"}))
    a.put(("notes", 9, {"n": "mine"}), ("notes", 10, {"n": "mine"}))
    a.put(("notes", 10, {"n": "later"}))
    a.sync()
    assert a.engine.status().held == 4
    assert len(a.engine.conflicts()) == 2
    a.engine.resolve(a.engine.conflicts()[0], "theirs")
    assert_sound(a.db)
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    a.settle()
    assert world.values()[10] == {"n": "later"}
    assert_in_step(world, a)


def test_r25_what_is_held_survives_a_restart() -> None:
    world, a = held()
    a.restart()
    [conflict] = a.engine.conflicts()
    a.sync()
    a.engine.resolve(conflict, "mine")
    a.settle()
    assert_in_step(world, a)


def test_r25_conflicts_are_reported_once_and_listed_until_resolved() -> None:
    world, a = start("manual")
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}))
    assert len(a.sync().unresolved) == 1
    for _ in range(3):
        assert a.sync().unresolved == []
        assert len(a.engine.conflicts()) == 1


# ---------------------------------------------------------------- R26


@pytest.mark.parametrize("answer", [ValueError("broken"), None, "mine", 7])
def test_r26_a_policy_that_raises_or_answers_nonsense_holds_and_says_why(answer: Any) -> None:
    def policy(conflict: Conflict) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}))
    a.put(("notes", 2, {"n": "other"}))
    result = a.sync()
    [conflict] = a.engine.conflicts()
    assert conflict.error is not None and "Error" in conflict.error
    assert [c.error for c in result.unresolved] == [conflict.error]
    assert world.values()[2] == {"n": "other"}
    assert_sound(a.db)
    a.engine.resolve(conflict, "mine")
    a.settle()
    assert_in_step(world, a)


def test_r26_a_policy_that_changes_what_it_was_given_changes_nothing() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        value = conflict.remote
        value["n"] = "spoiled"
        return KEEP

    world, a = start(policy)
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}))
    a.sync()
    assert world.values()[1] == {"n": "mine"}
    assert_in_step(world, a)


# ---------------------------------------------------------------- R27


def two_devices_write(a_ms: int, b_ms: int) -> tuple[World, Device, Device]:
    world, a = start("last_write_wins")
    b = world.device(default_policy="last_write_wins")
    b.sync()
    a.clock.ms += a_ms
    b.clock.ms += b_ms
    world.clock.ms += 60_000
    a.put(("notes", 1, {"n": "a"}))
    b.put(("notes", 1, {"n": "b"}))
    return world, a, b


@pytest.mark.parametrize(("a_ms", "b_ms", "winner"), [(10, 20, "b"), (20, 10, "a")])
@pytest.mark.parametrize("a_first", [True, False])
def test_r27_the_later_write_wins_whoever_syncs_first(
    a_ms: int, b_ms: int, winner: str, a_first: bool
) -> None:
    world, a, b = two_devices_write(a_ms, b_ms)
    for device in (a, b, a) if a_first else (b, a, b):
        device.settle()
    assert world.values()[1] == {"n": winner}
    assert_in_step(world, a, b)


def test_r27_a_clock_from_the_future_does_not_win_for_ever() -> None:
    year = 365 * 24 * 3600 * 1000
    world, a, b = two_devices_write(10 * year, 0)
    a.sync()
    world.clock.ms += 1000
    b.clock.ms = world.clock.ms
    b.put(("notes", 1, {"n": "later"}))
    world.clock.ms += 1000
    b.settle()
    a.sync()
    assert world.values()[1] == {"n": "later"}
    assert_in_step(world, a, b)


def test_r27_a_future_clock_is_clamped_on_the_device_as_on_the_server() -> None:
    conflicts, policy = asked(KEEP)
    world, a = start(policy)
    a.clock.ms += 10**12
    world.put(("notes", 1, {"n": "theirs"}))
    a.put(("notes", 1, {"n": "mine"}))
    a.sync()
    assert conflicts[0].local_timestamp == timestamp_from_ms(world.clock.ms) | 0xFFFF
    b = world.device()
    b.sync()
    stamps = [{e.entity_id: e.timestamp for e in d.db.changes()} for d in (a, b)]
    assert stamps[0][uid(1)] == stamps[1][uid(1)] == timestamp_from_ms(world.clock.ms) | 0xFFFF


def test_r27_an_answer_that_was_lost_gives_the_same_timestamp_again() -> None:
    world, a = start()
    a.clock.ms += 10**12
    a.put(("notes", 1, {"n": "mine"}))
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    a.restart()
    a.sync()
    b = world.device()
    b.sync()
    stamps = [{e.entity_id: e.timestamp for e in d.db.changes()} for d in (a, b)]
    assert stamps[0][uid(1)] == stamps[1][uid(1)]


def test_r27_what_was_written_after_reading_the_other_is_later() -> None:
    # The clock is a hybrid one: a device whose clock is slow still writes "after" what it saw.
    world, a = start("last_write_wins")
    b = world.device(default_policy="last_write_wins")
    b.sync()
    world.clock.ms += 100_000
    a.clock.ms += 50_000
    a.put(("notes", 1, {"n": "a"}))
    a.sync()
    b.sync()
    b.put(("notes", 1, {"n": "b, after a"}))
    stamps = {e.entity_id: e.timestamp for e in b.db.changes()}
    assert stamps[uid(1)] > timestamp_from_ms(a.clock.ms)
