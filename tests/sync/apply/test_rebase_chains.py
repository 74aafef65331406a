"""Several pending operations on one entity: which are done, merged, relinked, held, let go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db.records import BASE, READY, end_of
from entidb.errors import CorruptionError, HistoryChangedError, TransportError
from entidb.protocol import PushRequest, SyncRequest
from entidb.storage import MemoryStorage
from entidb.sync import Conflict, ConflictResolution, Merge
from entidb.types import timestamp_from_ms
from tests.planted import BUGS, planted
from tests.support import Device, World, assert_in_step, assert_sound, lose, uid

KEEP = ConflictResolution.keep_local()
THEIRS = ConflictResolution.accept_remote()
SKIP = ConflictResolution.skip()
Policy = Callable[[Conflict], ConflictResolution]


def start(policy: Any, **config: Any) -> tuple[World, Device]:
    """A device that has notes 1, 2, 3 as the server has them."""
    world = World()
    for n in (1, 2, 3):
        world.put(("notes", n, 0))
    a = world.device(default_policy=policy, **config)
    a.sync()
    # Nothing that is written a little later on the device is in the server's future (R27).
    world.clock.ms += 10_000
    return world, a


def noting(policy: Policy) -> tuple[list[Conflict], Policy]:
    """``policy``, and the conflicts it is asked about."""
    conflicts: list[Conflict] = []

    def noted(conflict: Conflict) -> ConflictResolution:
        conflicts.append(conflict)
        return policy(conflict)

    return conflicts, noted


def before_first_push(device: Device, work: Callable[[], object]) -> None:
    """Do ``work`` when the device sends its next push, before the server sees it."""
    left = [work]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest) and left:
            left.pop()()

    device.wire.before = hook


def pushed_values(device: Device) -> list[Any]:
    """What the device has pushed, one value for each operation."""
    codec = device.notes._codec
    return [
        None if op.payload is None else codec.decode(op.payload)
        for push in device.wire.pushes()
        for transaction in push.transactions
        for op in transaction.operations
    ]


# ---------------------------------------------------------------- what the server has already (R24)


def test_r24_the_newest_operation_does_not_end_a_chain_whose_transactions_wrote_more() -> None:
    conflicts, policy = noting(lambda conflict: KEEP)
    world, a = start(policy)
    world.put(("notes", 1, "same"))
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "same"), ("notes", 2, "with it"))
    result = a.sync()
    assert (len(conflicts), result.done, result.pushed) == (1, [], 2)
    assert_in_step(world, a)


def test_r24_what_a_copy_of_this_device_pushed_is_done_in_the_middle_of_a_chain() -> None:
    conflicts, policy = noting(lambda conflict: KEEP)
    world, a = start(policy)
    first = a.put(("notes", 1, "first"))
    a.clock.ms += 10
    second = a.put(("notes", 1, "second"))
    copy = a.copy()
    a.clock.ms += 10
    a.put(("notes", 1, "third"))
    copy.sync()
    result = a.sync()
    assert (conflicts, result.done, result.pushed) == ([], [first.bytes, second.bytes], 1)
    assert world.values()[1] == "third"
    assert_in_step(world, a)


def three(device: Device) -> None:
    for value in ("first", "second", "third"):
        device.clock.ms += 10
        device.put(("notes", 1, value))


def test_r24_equal_bytes_of_another_device_at_the_same_time_are_a_conflict() -> None:
    conflicts, policy = noting(lambda conflict: KEEP)
    world, a = start(policy)
    b = world.device()
    b.sync()
    three(a)
    b.clock.ms = a.clock.ms - 10
    b.put(("notes", 1, "second"))
    b.sync()
    stamps = {t.timestamp for t in a.engine.applier.pending()}
    result = a.sync()
    assert conflicts[0].remote_timestamp in stamps
    assert (len(conflicts), result.done) == (1, [])


def test_r24_equal_bytes_of_another_transaction_of_a_copy_are_a_conflict() -> None:
    conflicts, policy = noting(lambda conflict: KEEP)
    _world, a = start(policy)
    copy = a.copy()
    three(a)
    copy.clock.ms += 1000
    copy.put(("notes", 1, "second"))
    copy.sync()
    result = a.sync()
    assert conflicts[0].remote_device == a.db.device_id
    assert (len(conflicts), result.done) == (1, [])


def test_r24_a_held_conflict_ends_when_the_server_comes_to_its_first_operation() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"))
    a.sync()
    assert a.engine.status().held == 2
    world.put(("notes", 1, "first"))
    result = a.sync()
    status = a.engine.status()
    assert (len(result.done), status.held, status.conflicts) == (1, 0, 0)
    a.settle()
    assert world.values()[1] == "second"
    assert_in_step(world, a)


def test_r23_a_newer_version_with_the_bytes_of_the_old_one_is_a_conflict() -> None:
    conflicts, policy = noting(lambda conflict: THEIRS)
    world, a = start(policy)
    world.put(("notes", 1, 0))
    a.put(("notes", 1, "mine"))
    a.sync()
    assert [(c.base, c.local, c.remote) for c in conflicts] == [(0, "mine", 0)]
    assert_in_step(world, a)


COUNTER = Merge(counters=("n",))


def test_r24_two_sides_that_count_to_the_same_number_count_twice() -> None:
    world = World()
    world.put(("notes", 1, {"n": 5}))
    a = world.device(default_policy=COUNTER)
    a.sync()
    world.put(("notes", 1, {"n": 4}))
    a.put(("notes", 1, {"n": 4}))
    result = a.sync()
    assert (result.done, len(result.conflicts)) == ([], 1)
    assert world.values() == {1: {"n": 3}}
    assert_in_step(world, a)


@pytest.mark.parametrize(("number", "value"), [(1, None), (9, {"n": 4})], ids=["gone", "made"])
def test_r24_a_counter_made_or_deleted_alike_on_both_sides_is_done(number: int, value: Any) -> None:
    world = World()
    world.put(("notes", 1, {"n": 5}))
    a = world.device(default_policy=COUNTER)
    a.sync()
    world.put(("notes", number, value))
    made = a.put(("notes", number, value))
    result = a.sync()
    assert (result.done, result.conflicts) == ([made.bytes], [])
    assert_in_step(world, a)


# ---------------------------------------------------------------- merging in turn (R25)


def test_r25_a_policy_is_asked_once_about_a_single_operation() -> None:
    conflicts, policy = noting(lambda conflict: ConflictResolution.merge("merged"))
    world, a = start(policy)
    world.put(("notes", 1, 0))
    a.put(("notes", 1, "mine"))
    a.sync()
    assert len(conflicts) == 1
    assert world.values()[1] == "merged"
    assert_in_step(world, a)


def test_r25_in_turn_each_operation_is_shown_on_what_became_of_the_one_before() -> None:
    conflicts, policy = noting(lambda c: ConflictResolution.merge(f"{c.local} on {c.remote}"))
    world, a = start(policy)
    version = world.put(("notes", 1, "theirs"))
    a.clock.ms += 10
    first = a.put(("notes", 1, "first"))
    a.clock.ms += 10
    a.put(("notes", 1, "second"))
    a.sync()
    whole, one, two = conflicts
    assert (whole.base, whole.local, whole.remote) == (0, "second", "theirs")
    assert (one.base, one.local, one.remote) == (0, "first", "theirs")
    assert (two.base, two.local, two.remote) == ("first", "second", "first on theirs")
    assert {c.transaction_id for c in conflicts} == {first.bytes}
    assert (two.base_version, two.remote_version) == (version, version)
    assert two.base_device == two.remote_device == two.local_device == a.db.device_id
    assert two.base_timestamp == two.remote_timestamp == one.local_timestamp
    assert two.local_timestamp == timestamp_from_ms(a.clock.ms)
    assert world.values()[1] == "second on first on theirs"
    assert_in_step(world, a)


def test_r25_a_chain_on_bytes_that_are_the_same_again_stays_without_more_questions() -> None:
    conflicts, policy = noting(lambda conflict: ConflictResolution.merge("merged"))
    world, a = start(policy)
    world.put(("notes", 1, 0))
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"))
    result = a.sync()
    assert (len(conflicts), result.withdrawn) == (1, [])
    assert pushed_values(a) == ["first", "second"]
    assert_in_step(world, a)


def test_r25_an_operation_in_a_merged_chain_may_keep_its_own_value() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        return KEEP if conflict.base == 1 else ConflictResolution.merge("merged")

    world, a = start(policy)
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, 1))
    a.put(("notes", 1, 2))
    a.sync()
    assert pushed_values(a) == ["merged", 2]
    assert_in_step(world, a)


def test_r25_what_the_server_took_before_the_newest_operation_withdraws_nothing() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        return THEIRS if conflict.local == conflict.remote else ConflictResolution.merge(2)

    world, a = start(policy)
    world.put(("notes", 1, "theirs"))
    for value in (1, 2, 3):
        a.put(("notes", 1, value))
    result = a.sync()
    assert (result.withdrawn, pushed_values(a)) == ([], [2, 3])
    assert_in_step(world, a)


def test_r25_the_newest_of_three_that_loses_in_a_merged_chain_is_kept_in_discarded() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        if conflict.base == 2:
            return THEIRS
        return ConflictResolution.merge(f"{conflict.local} merged")

    world, a = start(policy)
    world.put(("notes", 1, "theirs"))
    for value in (1, 2, 3):
        a.put(("notes", 1, value))
    a.sync()
    assert pushed_values(a) == ["1 merged", "2 merged"]
    assert [value for gone in a.engine.discarded() for _, _, value in gone.values()] == [3]
    assert_in_step(world, a)


def test_r25_an_older_operation_that_loses_in_a_merged_chain_is_done() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        return THEIRS if conflict.local == 1 else ConflictResolution.merge("merged")

    world, a = start(policy)
    world.put(("notes", 1, "theirs"))
    first = a.put(("notes", 1, 1))
    a.put(("notes", 1, 2))
    result = a.sync()
    assert (result.withdrawn, result.done, pushed_values(a)) == ([], [first.bytes], ["merged"])
    assert_in_step(world, a)


def becoming(**answers: Any) -> Policy:
    """Merges a local value to the one named."""
    return lambda conflict: ConflictResolution.merge(answers[conflict.local])


def test_r25_a_first_operation_merged_into_the_remote_leaves_the_later_ones() -> None:
    world, a = start(becoming(first="theirs", second="second, too", third="third, too"))
    world.put(("notes", 1, "theirs"))
    three(a)
    result = a.sync()
    assert len(result.done) == 1
    assert pushed_values(a) == ["second, too", "third, too"]
    assert_in_step(world, a)


def test_r25_a_merge_that_comes_back_to_the_remote_value_is_pushed() -> None:
    world, a = start(becoming(first="between", second="theirs"))
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"))
    a.sync()
    assert pushed_values(a) == ["between", "theirs"]
    assert_in_step(world, a)


def test_r25_an_operation_merged_into_the_one_before_is_done() -> None:
    world, a = start(becoming(first="both", second="both"))
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "first"))
    second = a.put(("notes", 1, "second"))
    result = a.sync()
    assert (pushed_values(a), result.done) == (["both"], [second.bytes])
    assert_in_step(world, a)


def test_r25_a_chain_that_lost_its_middle_is_still_one_chain() -> None:
    def policy(conflict: Conflict) -> ConflictResolution:
        if conflict.remote == "theirs again":
            return THEIRS
        return ConflictResolution.merge("last" if conflict.local == "third" else "both")

    world, a = start(policy)
    world.put(("notes", 1, "theirs"))
    three(a)
    before_first_push(a, lambda: world.put(("notes", 1, "theirs again")))
    result = a.sync()
    assert len(result.done) == 1
    assert [w.code for w in result.withdrawn] == ["conflict", "conflict"]
    assert (a.values()[1], a.pending) == ("theirs again", 0)
    assert_in_step(world, a)


# ---------------------------------------------------------------- what stays below, what depends


def test_r25_one_id_in_two_collections_is_two_entities() -> None:
    conflicts, policy = noting(lambda conflict: KEEP)
    world = World()
    world.put(("notes", 1, 0), ("tasks", 1, 0))
    a = world.device(default_policy=policy)
    a.sync()
    world.put(("tasks", 1, "theirs"))
    a.put(("notes", 1, "my note"), ("tasks", 1, "my task"))
    a.sync()
    assert [(c.collection, c.local) for c in conflicts] == [("tasks", "my task")]
    assert (world.values(), world.values("tasks")) == ({1: "my note"}, {1: "my task"})
    assert_in_step(world, a)


def test_r25_what_is_withdrawn_together_is_told_oldest_first() -> None:
    world, a = start("server_wins")
    world.put(("notes", 3, "theirs"))
    first = a.put(("notes", 1, 1), ("notes", 2, 1), ("notes", 3, 1))
    second = a.put(("notes", 2, 2))
    third = a.put(("notes", 1, 3))
    result = a.sync()
    expected = [first.bytes, second.bytes, third.bytes]
    assert [w.transaction_id for w in result.withdrawn] == expected
    assert_in_step(world, a)


def test_r25_a_chain_begins_behind_what_was_accepted() -> None:
    conflicts, policy = noting(lambda conflict: THEIRS)
    world, a = start(policy, push_operations_max=1)
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"))
    a.wire.after = _after_first_push(lambda: world.put(("notes", 1, "theirs")))
    a.sync()
    assert [(c.base, c.local, c.remote) for c in conflicts] == [("first", "second", "theirs")]
    assert_in_step(world, a)


def _after_first_push(work: Callable[[], object]) -> Callable[[SyncRequest], None]:
    left = [work]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PushRequest) and left:
            left.pop()()

    return hook


def test_r25_new_work_on_what_stays_below_a_withdrawal_is_free() -> None:
    world, a = start("server_wins")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 2, "earlier"))
    a.put(("notes", 1, 1), ("notes", 2, "later"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    a.put(("notes", 2, "new"))
    assert a.engine.status().held == 0
    a.settle()
    assert world.values()[2] == "new"
    assert_in_step(world, a)


# ---------------------------------------------------------------- holding and letting go


def two_conflicts() -> tuple[World, Device]:
    """Note 1 and task 1 are in conflict: a transaction wrote note 1, a later one both."""
    world = World()
    world.put(("notes", 1, 0), ("tasks", 1, 0))
    a = world.device(default_policy="manual")
    a.sync()
    world.put(("notes", 1, "theirs"))
    world.put(("tasks", 1, "theirs"))
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"), ("tasks", 1, "second"))
    a.sync()
    assert (a.engine.status().held, a.engine.status().conflicts) == (2, 2)
    return world, a


def conflict_on(device: Device, collection: str) -> Conflict:
    [found] = [c for c in device.engine.conflicts() if c.collection == collection]
    return found


def test_r25_new_work_on_what_is_held_below_a_withdrawal_is_held() -> None:
    world, a = two_conflicts()
    a.engine.resolve(conflict_on(a, "tasks"), "theirs")
    assert (a.values(), a.engine.status().held) == ({1: "first"}, 1)
    a.put(("notes", 1, "new"))
    assert a.engine.status().held == 2
    assert a.sync().pushed == 0
    a.engine.resolve(conflict_on(a, "notes"), "mine")
    a.settle()
    assert world.values() == {1: "new"}
    assert_in_step(world, a)


def test_r25_an_entity_stays_held_while_the_newest_transaction_on_it_is() -> None:
    world, a = two_conflicts()
    a.engine.resolve(conflict_on(a, "notes"), "mine")
    assert a.engine.status().held == 1
    a.put(("notes", 1, "new"))
    assert a.engine.status().held == 2
    assert_sound(a.db)
    a.engine.resolve(conflict_on(a, "tasks"), "mine")
    a.settle()
    assert world.values() == {1: "new"}
    assert_in_step(world, a)


def test_r25_new_work_on_what_was_let_go_is_free() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    a.put(("notes", 1, "new"))
    assert a.engine.status().held == 0
    a.settle()
    assert world.values()[1] == "new"
    assert_in_step(world, a)


def test_r25_resolving_one_conflict_lets_nothing_go_that_depends_on_another() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"), ("notes", 3, "theirs"))
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.put(("notes", 2, "later"))
    a.put(("notes", 3, "mine"))
    a.sync()
    assert a.engine.status().held == 3
    first, third = a.engine.conflicts()
    a.engine.resolve(third, "mine")
    assert a.engine.status().held == 2
    a.engine.resolve(first, "mine")
    assert a.engine.status().held == 0
    a.settle()
    assert_in_step(world, a)


def test_r25_what_is_let_go_and_depends_on_what_is_held_by_the_same_page_stays_held() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 2, "older"), ("notes", 3, "older"))
    a.put(("notes", 1, "mine"), ("notes", 3, "newer"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    assert a.engine.status().held == 1
    world.put(("notes", 1, "mine"))
    world.put(("notes", 2, "theirs"))
    a.sync()
    status = a.engine.status()
    assert (status.held, status.conflicts) == (2, 1)
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    a.settle()
    assert world.values() == {1: "mine", 2: "older", 3: "newer"}
    assert_in_step(world, a)


def held_through_a_write() -> tuple[World, Device]:
    """Note 1 is in conflict, and holds a transaction that wrote notes 1 and 2; that one holds a
    later one on note 2."""
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.put(("notes", 2, "later"))
    a.sync()
    assert a.engine.status().held == 2
    return world, a


def test_r25_what_was_held_through_a_write_that_the_server_has_by_now_is_let_go() -> None:
    world, a = held_through_a_write()
    world.put(("notes", 2, "mine"))
    a.sync()
    status = a.engine.status()
    assert (status.held, status.pending, status.conflicts) == (1, 0, 1)
    assert world.values()[2] == "later"
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    a.settle()
    assert world.values() == {1: "mine", 2: "later", 3: 0}
    assert_in_step(world, a)


def test_r25_what_an_older_version_left_held_goes_with_the_last_conflict() -> None:
    world, a = held_through_a_write()
    world.put(("notes", 2, "mine"))
    with planted(BUGS["held-for-no-reason"]):
        a.sync()
    assert a.engine.status().held == 2
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    status = a.engine.status()
    assert (status.held, status.pending, status.conflicts) == (0, 2, 0)
    a.settle()
    assert world.values() == {1: "mine", 2: "later", 3: 0}
    assert_in_step(world, a)


def test_r25_a_policy_that_now_decides_ends_what_was_held_when_the_server_goes_on() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    a.restart(default_policy="client_wins")
    world.put(("notes", 1, "theirs again"))
    a.settle()
    status = a.engine.status()
    assert (status.held, status.conflicts, world.values()[1]) == (0, 0, "mine")
    assert_in_step(world, a)


def test_r25_a_value_from_a_person_becomes_the_newest_operation_of_a_chain() -> None:
    world, a = start("manual")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "first"))
    a.put(("notes", 1, "second"))
    a.sync()
    [conflict] = a.engine.conflicts()
    report = a.engine.resolve(conflict, value="third")
    assert [done.conflict for done in report.resolved] == [conflict]
    a.settle()
    assert pushed_values(a) == ["first", "third"]
    assert_in_step(world, a)


def test_r25_a_value_from_a_person_is_kept_while_another_conflict_holds_it() -> None:
    world, a = two_conflicts()
    a.engine.resolve(conflict_on(a, "notes"), value="chosen")
    a.restart()
    assert a.values() == {1: "chosen"}
    a.engine.resolve(conflict_on(a, "tasks"), "mine")
    a.settle()
    assert (world.values(), world.values("tasks")) == ({1: "chosen"}, {1: "second"})
    assert_in_step(world, a)


# ---------------------------------------------------------------- settling


def test_r18_what_went_with_a_refused_transaction_needs_no_pull() -> None:
    def validate(context: Any, transaction: Any) -> Any:
        from entidb.server.hooks import Refusal

        refused = any(op.value == "bad" for op in transaction.operations)
        return Refusal("bad", "no") if refused else None

    world = World(validate=validate)
    a = world.device()
    a.sync()
    a.put(("notes", 1, "bad"))
    a.put(("notes", 1, "on top"))
    result = a.sync()
    assert [w.code for w in result.withdrawn] == ["bad", "depends"]
    assert (len(a.engine.discarded()), a.pending, result.requests) == (2, 0, 2)
    assert_in_step(world, a)


# ---------------------------------------------------------------- records of conflicts


def test_r25_a_listed_conflict_says_after_a_restart_what_the_policy_was_asked() -> None:
    conflicts, policy = noting(lambda conflict: SKIP)
    world, a = start(policy)
    b = world.device()
    b.sync()
    b.clock.ms += 5
    b.put(("notes", 1, "theirs"))
    b.sync()
    world.clock.ms += 10_000
    a.clock.ms = world.clock.ms
    a.put(("notes", 1, "mine"))
    a.sync()
    a.restart()
    [asked], [listed] = conflicts, a.engine.conflicts()
    assert asked.base_device == world.server.device_id
    assert asked.remote_device == b.db.device_id
    assert asked.base_timestamp < asked.remote_timestamp < asked.local_timestamp
    assert replace(listed, local_device=asked.local_device) == asked


def test_r25_a_held_conflict_is_asked_again_with_the_base_it_had() -> None:
    conflicts, policy = noting(lambda conflict: SKIP)
    world, a = start(policy)
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    world.put(("notes", 1, "theirs again"))
    a.sync()
    first, again = conflicts
    assert (again.base, again.local, again.remote) == (0, "mine", "theirs again")
    assert (again.base_version, again.base_device) == (first.base_version, first.base_device)
    assert again.base_timestamp == first.base_timestamp
    assert a.engine.status().conflicts == 1


def test_r26_an_answer_that_is_no_resolution_is_named() -> None:
    world, a = start(lambda conflict: "mine")
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    a.sync()
    [conflict] = a.engine.conflicts()
    assert conflict.error is not None
    assert conflict.error.startswith("TypeError: the policy answered str")


# ---------------------------------------------------------------- superseded (R14, R18)


def superseded(
    answer: Policy, first: dict[int, Any], second: dict[int, Any]
) -> tuple[World, Device, list[Conflict]]:
    """The first of two transactions was accepted from a copy of this device, which had merged note
    1 with a change on the server, while this device waits for the answer to both."""
    conflicts, policy = noting(answer)
    world, a = start(policy)
    a.clock.ms += 10
    a.put(*[("notes", number, value) for number, value in first.items()])
    copy = a.copy(default_policy=lambda conflict: ConflictResolution.merge("merged"))
    a.clock.ms += 10
    a.put(*[("notes", number, value) for number, value in second.items()])
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    world.put(("notes", 1, "theirs"))
    assert copy.sync().pushed == 1
    return world, a, conflicts


def test_r18_work_on_top_of_superseded_content_is_a_conflict_with_the_base() -> None:
    world, a, conflicts = superseded(lambda conflict: KEEP, {1: "first"}, {1: "second"})
    [version, *_] = {op.version for op in _rows(a)}
    stamps = sorted(t.timestamp for t in a.engine.applier.pending())
    a.sync()
    on_base, on_accepted = conflicts
    assert (on_base.base, on_base.local, on_base.remote) == ("first", "second", 0)
    assert (on_base.base_version, on_base.remote_version) == (version, version)
    assert on_base.base_device == a.db.device_id != on_base.remote_device
    assert [on_base.base_timestamp, on_base.local_timestamp] == stamps
    assert (on_accepted.base, on_accepted.remote) == (0, "merged")
    assert world.values()[1] == "second"
    assert_in_step(world, a)


def _rows(device: Device) -> list[Any]:
    return [event for event in device.db.changes() if event.entity_id == uid(1)]


def test_r18_work_on_top_that_loses_with_superseded_content_is_withdrawn_once() -> None:
    world, a, conflicts = superseded(
        lambda conflict: THEIRS,
        {1: "first", 2: "first", 3: "first"},
        {1: "second", 2: "second"},
    )
    a.sync()
    assert len(conflicts) == 1
    assert [value for g in a.engine.discarded() for *_, value in g.values()] == ["second"] * 2
    assert world.values() == {1: "merged", 2: "first", 3: "first"}
    assert_in_step(world, a)


def test_r18_each_entity_of_a_superseded_transaction_is_settled() -> None:
    world, a, conflicts = superseded(
        lambda conflict: KEEP,
        {1: "first", 2: "first", 3: "first"},
        {1: "second", 3: "second"},
    )
    before = a.db.sequence
    a.sync()
    assert [c.entity_id.int for c in conflicts][:2] == [1, 3]
    assert (a.values()[2], a.db.sequence > before) == ("first", True)
    assert world.values() == {1: "second", 2: "first", 3: "second"}
    assert_in_step(world, a)


def test_r18_work_on_top_of_superseded_content_like_the_base_is_no_conflict_with_it() -> None:
    world, a, conflicts = superseded(
        lambda conflict: KEEP, {1: "first", 2: 0}, {1: "second", 2: "second"}
    )
    a.sync()
    [about_2] = [c for c in conflicts if c.entity_id == uid(2)]
    assert about_2.base_version < about_2.remote_version
    assert world.values() == {1: "second", 2: "second", 3: 0}
    assert_in_step(world, a)


def test_r18_work_on_top_of_superseded_content_can_be_held() -> None:
    world, a, _ = superseded(lambda conflict: SKIP, {1: "first"}, {1: "second"})
    a.sync()
    status = a.engine.status()
    assert (status.held, status.conflicts) == (1, 1)
    assert a.values()[1] == "second"
    assert_sound(a.db)
    a.engine.resolve(a.engine.conflicts()[0], "mine")
    a.settle()
    assert world.values()[1] == "second"
    assert_in_step(world, a)


@pytest.mark.parametrize("on_top", [False, True], ids=["newest", "with work on top"])
def test_r18_a_conflict_with_superseded_content_ends_where_what_is_on_top_was_accepted(
    on_top: bool,
) -> None:
    """A copy of the device has pushed both of its transactions, the first of them merged."""

    def merges_the_first(conflict: Conflict) -> ConflictResolution:
        return ConflictResolution.merge("merged" if conflict.local == "first" else "second")

    world, a = start(lambda conflict: SKIP)
    a.put(("notes", 1, "first"))
    a.clock.ms += 10
    a.put(("notes", 1, "second"))
    copy = a.copy(default_policy=merges_the_first)
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    world.put(("notes", 1, "theirs"))
    assert copy.sync().pushed == 2
    if on_top:
        a.clock.ms += 10
        a.put(("notes", 1, "third"))
    a.sync()
    status = a.engine.status()
    assert (status.held, status.conflicts, a.engine.conflicts()) == (0, 0, [])
    assert_sound(a.db)
    a.settle()
    assert world.values()[1] == ("third" if on_top else "second")
    assert_in_step(world, a)


@pytest.mark.parametrize("on_top", [False, True], ids=["newest", "with work on top"])
def test_r18_what_is_below_superseded_content_is_done(on_top: bool) -> None:
    # The copy had its first transaction settled by equal bytes (R24), and the second merged.
    world, a = start(lambda conflict: KEEP)
    a.put(("notes", 1, "same"))
    a.clock.ms += 10
    a.put(("notes", 1, "second"), ("notes", 3, "mine"))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    copy = a.copy(default_policy=lambda conflict: ConflictResolution.merge("merged"))
    world.put(("notes", 1, "same"))
    world.put(("notes", 3, "theirs"))
    copy.settle()
    assert world.values() == {1: "second", 2: 0, 3: "merged"}
    if on_top:
        a.put(("notes", 1, "third"))
    a.settle()
    assert (a.pending, a.engine.status().held, a.engine.discarded()) == (0, 0, [])
    assert world.values() == {1: "third" if on_top else "second", 2: 0, 3: "merged"}
    assert_in_step(world, a)


def twins_after_a_restore(policy: Any, start: Any, first: Any, second: Any) -> Any:
    """A device with two writes pending, and its twin, which had the first one accepted in a
    history that the server has lost: it knows of the second alone."""
    world = World()
    a = world.device(default_policy=policy)
    world.put(("notes", 1, start))
    a.sync()
    world.clock.ms += 10_000
    backup = world.backup_server()
    for value in (first, second):
        a.put(("notes", 1, value))
        a.clock.ms += 10
    twin = a.copy(push_operations_max=1)

    def only_the_first(request: SyncRequest) -> None:
        if len(twin.wire.pushes()) > 1:
            raise TransportError("lost on the way")

    twin.wire.before = only_the_first
    with pytest.raises(TransportError):
        twin.sync()
    twin.wire.before = lambda request: None
    assert [device.db.read_head().ready for device in (a, twin)] == [2, 1]
    world.open_server(backup)
    return world, a, twin


def take_the_server_side(*devices: Device) -> None:
    for device in devices:
        with pytest.raises(HistoryChangedError):
            device.sync()
        device.engine.reset("server")


@pytest.mark.parametrize("while_pushing", [True, False], ids=["while pushing", "before"])
@pytest.mark.parametrize(
    ("policy", "values", "end"),
    [
        ("merge", [{}, {"a": 1}, {"a": 1, "b": 1}, {"n": 1}], {"a": 1, "b": 1, "n": 1}),
        (Merge(counters=["stock"]), [{"stock": n} for n in (5, 4, 3, 9)], {"stock": 7}),
    ],
    ids=["fields", "counters"],
)
def test_r18_what_is_below_superseded_content_can_be_unknown_to_the_server(
    policy: Any, values: list[Any], end: Any, while_pushing: bool
) -> None:
    # The twin merges its write alone and pushes it under the id that the device's own has too.
    start_value, first, second, theirs = values
    world, a, twin = twins_after_a_restore(policy, start_value, first, second)
    world.put(("notes", 1, theirs))
    take_the_server_side(a, twin)
    if while_pushing:
        before_first_push(a, twin.settle)
    else:
        twin.settle()
    a.settle()
    twin.settle()
    assert (world.values(), a.engine.discarded()) == ({1: end}, [])
    assert_in_step(world, a)
    assert_in_step(world, twin)


def test_r18_what_waits_for_an_undecided_write_is_superseded_once() -> None:
    stock = [{"stock": n} for n in (5, 4, 3)]
    world, a, twin = twins_after_a_restore(Merge(counters=["stock"]), *stock)
    world.put(("notes", 1, {"stock": 9}))
    take_the_server_side(a, twin)
    before_first_push(a, twin.settle)
    result = a.sync()
    assert (result.pushed, result.superseded, result.incomplete) == (1, 1, False)
    assert a.db.read_head().ready == 0


# ---------------------------------------------------------------- what a merge leaves below


def written_and_written_back(policy: Any, *values: Any) -> tuple[World, Device]:
    """Two entities were changed to ``values`` and back, and somebody has deleted both. As a whole
    there is nothing to keep, so ``Merge`` merges; one step at a time there is."""
    world, a = start(policy)
    for value in (*values, 0):
        a.put(("notes", 1, value), ("notes", 2, value))
        a.clock.ms += 10
    world.put(("notes", 1, None))
    world.put(("notes", 2, None))
    return world, a


def in_steps(answers: dict[Any, ConflictResolution], alone: ConflictResolution) -> Policy:
    """Answers by local value; what was changed back is merged as a whole, and lost as a step.
    ``alone`` is the answer for "second" once it is the newest."""

    def policy(conflict: Conflict) -> ConflictResolution:
        step = conflict.base_version == conflict.remote_version
        if conflict.local == 0:
            return THEIRS if step else ConflictResolution.merge(None)
        return alone if conflict.local == "second" and not step else answers[conflict.local]

    return policy


def discarded_values(device: Device) -> list[list[tuple[int, Any]]]:
    return [[(key.int, v) for _, key, v in g.values()] for g in device.engine.discarded()]


def test_r3_what_a_withdrawn_merge_leaves_below_it_is_withdrawn_as_a_whole() -> None:
    world, a = written_and_written_back(Merge("server_wins"), "first")
    result = a.sync()
    assert discarded_values(a) == [[(1, "first"), (2, "first")], [(1, 0), (2, 0)]]
    assert (len(result.withdrawn), a.pending, world.values()) == (2, 0, {3: 0})
    assert_in_step(world, a)


MERGED = {
    "first": ConflictResolution.merge("first, merged"),
    "second": ConflictResolution.merge("second, merged"),
}


def test_r25_what_a_withdrawn_merge_leaves_below_it_is_merged() -> None:
    conflicts, noted = noting(in_steps(MERGED, MERGED["second"]))
    world, a = written_and_written_back(noted, "first", "second")
    a.sync()
    # The whole, its steps, and what is left when the newest is gone; then the other entity.
    first_entity = [0, "first", "second", 0, "second"]
    assert [c.local for c in conflicts] == [*first_entity, "second", "first", "second"]
    assert world.values() == {1: "second, merged", 2: "second, merged", 3: 0}
    assert discarded_values(a) == [[(1, 0), (2, 0)]]
    assert pushed_values(a) == ["first, merged"] * 2 + ["second, merged"] * 2
    assert_in_step(world, a)


def test_r25_what_a_withdrawn_merge_leaves_below_it_can_be_kept_as_it_was() -> None:
    world, a = written_and_written_back(in_steps(MERGED, KEEP), "first", "second")
    a.sync()
    assert discarded_values(a) == [[(1, 0), (2, 0)]]
    assert pushed_values(a) == ["first"] * 2 + ["second"] * 2
    assert_in_step(world, a)


def test_r25_a_conflict_that_was_open_is_closed_once_by_a_merge_that_withdraws() -> None:
    held = [SKIP]
    decided = in_steps(MERGED, KEEP)

    def policy(conflict: Conflict) -> ConflictResolution:
        return held[0] if held else decided(conflict)

    world, a = written_and_written_back(policy, "first", "second")
    a.sync()
    assert a.engine.status().conflicts == 2
    held.clear()
    for n in (1, 2):
        world.put(("notes", n, "again"))
        world.put(("notes", n, None))
    a.settle()
    assert world.values() == {1: "second", 2: "second", 3: 0}
    assert a.engine.status().conflicts == 0
    assert_in_step(world, a)


def test_r25_what_a_withdrawn_merge_leaves_below_it_can_be_held() -> None:
    _, a = written_and_written_back(in_steps(MERGED, SKIP), "first", "second")
    a.sync()
    status = a.engine.status()
    assert (status.held, status.conflicts, status.pending) == (2, 2, 0)
    assert a.values() == {1: "second", 2: "second", 3: 0}
    assert discarded_values(a) == [[(1, 0), (2, 0)]]
    assert_sound(a.db)


# ---------------------------------------------------------------- rows that are missing


@pytest.mark.parametrize("kind", [READY, BASE], ids=["outbox", "base"])
def test_a_missing_row_is_reported_and_nothing_is_decided_without_it(kind: bytes) -> None:
    world, a = start("client_wins")
    a.put(("notes", 1, "mine"))
    inner = a.storage.inner
    assert isinstance(inner, MemoryStorage)
    with inner.snapshot() as snapshot:
        [(key, _)] = snapshot.scan(kind, end_of(kind))
    inner.commit({key: None})
    world.put(("notes", 1, "theirs"))
    with pytest.raises(CorruptionError, match="verify"):
        a.sync()
    assert a.values()[1] == "mine"
