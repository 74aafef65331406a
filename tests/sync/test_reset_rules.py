"""When the past is gone, and when it is another: R28 to R30."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from entidb.db import dump, purge_tombstones
from entidb.errors import HistoryChangedError, TransportError
from entidb.protocol import PullRequest, PushRequest, SyncRequest
from entidb.storage import MemoryStorage
from tests.support import Crash, Device, World, assert_in_step, lose


def purge(world: World) -> None:
    purge_tombstones(world.server, world.server.sequence)


def purged_world(*, pages: int = 1, **config: Any) -> tuple[World, Device]:
    """A device below the floor: notes 1 to 3 were deleted and purged behind its back, note 4 has
    changed, note 5 is as it was, note 6 is new."""
    world = World()
    config = {"pull_operations_max": 2 if pages > 1 else 5000} | config
    a = world.device(**config)
    world.put(*[("notes", n, "old") for n in range(1, 4)])
    for n in (4, 5):
        world.put(("notes", n, "old"))
    a.sync()
    world.put(*[("notes", n, None) for n in range(1, 4)])
    world.put(("notes", 4, "new"))
    world.put(("notes", 6, "new"))
    purge(world)
    a.wire.requests.clear()
    return world, a


BOTH = pytest.mark.parametrize("pages", [1, 3])


# ---------------------------------------------------------------- the server's side


def test_r28_purging_forgets_tombstones_ids_and_moves_the_floor() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"))
    a.put(("notes", 1, None), ("notes", 2, "stays"))
    a.sync()
    records = world.server.storage.info().records
    assert purge_tombstones(world.server, 2) == 1
    # The tombstone, its feed row, the two ids; the floor and nothing else came.
    assert world.server.storage.info().records == records - 4 + 1
    assert world.values() == {2: "stays"}
    assert world.server.verify() == []


def test_r28_purging_up_to_a_sequence_keeps_what_is_newer() -> None:
    world = World()
    world.put(("notes", 1, "x"), ("notes", 2, "x"))
    world.put(("notes", 1, None))
    world.put(("notes", 2, None))
    assert purge_tombstones(world.server, 2) == 1
    assert purge_tombstones(world.server, 2) == 0
    assert purge_tombstones(world.server, 1000) == 1
    assert world.server.verify() == []


def test_r28_a_cursor_at_the_floor_needs_no_reset() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "x"))
    world.put(("notes", 1, None))
    a.sync()
    purge(world)
    world.put(("notes", 2, "y"))
    assert not a.sync().reset
    assert_in_step(world, a)


# ---------------------------------------------------------------- the device's side


@BOTH
def test_r28_clean_entities_the_server_no_longer_has_are_removed(pages: int) -> None:
    world, a = purged_world(pages=pages)
    result = a.sync()
    assert result.reset
    assert a.values() == {4: "new", 5: "old", 6: "new"}
    assert_in_step(world, a)


@pytest.mark.parametrize("policy", ["client_wins", "server_wins"])
@BOTH
def test_r28_an_update_of_a_purged_entity_is_a_conflict_with_deleted(
    pages: int, policy: str
) -> None:
    world, a = purged_world(pages=pages, default_policy=policy)
    a.put(("notes", 1, "mine"))
    result = a.sync()
    [resolved] = result.conflicts
    assert resolved.conflict.kind == "update/delete"
    assert resolved.conflict.base == "old"
    a.settle()
    assert (1 in world.values()) == (policy == "client_wins")
    assert len(a.engine.discarded()) == (policy == "server_wins")
    assert_in_step(world, a)


@BOTH
def test_r28_deleting_a_purged_entity_is_no_conflict_and_done(pages: int) -> None:
    world, a = purged_world(pages=pages)
    a.put(("notes", 1, None))
    result = a.sync()
    assert (result.conflicts, len(result.done)) == ([], 1)
    assert a.pending == 0
    assert_in_step(world, a)


@BOTH
def test_r28_a_new_entity_survives_the_reset_and_is_pushed(pages: int) -> None:
    world, a = purged_world(pages=pages)
    a.put(("notes", 50, "mine"), ("fresh", 1, "mine"))
    result = a.sync()
    assert (result.conflicts, result.withdrawn, result.pushed) == ([], [], 1)
    assert world.values()[50] == "mine"
    assert_in_step(world, a)


@BOTH
def test_r28_creating_the_id_of_a_purged_entity_again_is_pushed(pages: int) -> None:
    world, a = purged_world(pages=pages, default_policy="client_wins")
    a.put(("notes", 1, None))
    a.put(("notes", 1, "born again"))
    a.settle()
    assert world.values()[1] == "born again"
    assert_in_step(world, a)


@BOTH
def test_r28_every_kind_of_pending_work_survives_a_reset_together(pages: int) -> None:
    world, a = purged_world(pages=pages, default_policy="client_wins")
    a.put(("notes", 1, "revived"), ("notes", 4, "mine"), ("notes", 5, "mine"))
    a.put(("notes", 5, None), ("notes", 60, "made"))
    a.put(("notes", 60, "changed"), ("fresh", 7, "x"))
    a.settle()
    assert world.values() == {1: "revived", 4: "mine", 6: "new", 60: "changed"}
    assert a.engine.discarded() == []
    assert_in_step(world, a)


@BOTH
def test_r28_what_is_held_stays_held_over_a_reset(pages: int) -> None:
    world = World()
    a = world.device(default_policy="manual", pull_operations_max=2 if pages > 1 else 5000)
    for n in range(1, 6):
        world.put(("notes", n, "old"))
    a.sync()
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.sync()
    world.put(("notes", 3, None))
    purge(world)
    a.sync()
    assert a.values() == {1: "mine", 2: "mine", 4: "old", 5: "old"}
    [conflict] = a.engine.conflicts()
    a.engine.resolve(conflict, "mine")
    a.settle()
    assert world.values()[1] == "mine"
    assert_in_step(world, a)


@pytest.mark.parametrize("floor", [1, 2])
def test_r28_a_floor_that_moves_during_a_pull_of_everything_begins_it_anew(floor: int) -> None:
    world = World()
    for n in range(6):
        world.put(("notes", n, "x"))
    a = world.device(pull_operations_max=2)

    def move(request: SyncRequest) -> None:
        if isinstance(request, PullRequest) and request.cursor == 4:
            purge_tombstones(world.server, floor)

    a.wire.before = move
    a.sync()
    assert [request.cursor for request in a.wire.pulls()] == [0, 2, 4, 0, 2, 4]
    assert_in_step(world, a)


def test_r28_a_device_that_never_pulled_anything_resets_too() -> None:
    # Its cursor is 0, because the server was empty; that is no first sync.
    world = World()
    a, b = world.device(), world.device()
    a.sync()
    a.put(("notes", 1, "x"))
    a.sync()
    assert a.state.cursor == 0
    b.sync()
    b.put(("notes", 1, None), ("notes", 2, "y"))
    b.sync()
    purge(world)
    a.sync()
    assert a.values() == {2: "y"}
    assert_in_step(world, a, b)


@pytest.mark.parametrize("when", range(1, 3))
def test_r28_a_floor_that_moves_while_staging_starts_the_reset_over(when: int) -> None:
    world, a = purged_world(pages=3)
    world.put(*[("more", n, "x") for n in range(6)])
    world.put(("more", 100, "x"))
    a.put(("notes", 70, "pending"))
    done: list[int] = []

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PullRequest) and len(a.wire.pulls()) == when + 2 and not done:
            done.append(1)
            world.put(("notes", 5, None), ("more", 3, None))
            purge(world)

    a.wire.before = hook
    a.sync()
    assert done
    assert 5 not in a.values()
    a.settle()
    assert_in_step(world, a)


def test_r28_a_floor_that_keeps_moving_ends_the_cycle_and_the_next_goes_on() -> None:
    world, a = purged_world(pages=3)

    def hook(request: SyncRequest) -> None:
        if isinstance(request, PullRequest):
            world.put(("notes", 90, "x"))
            world.put(("notes", 90, None))
            purge(world)

    a.wire.before = hook
    with pytest.raises(Exception, match="floor"):
        a.sync()
    assert len(a.wire.requests) < 30
    a.wire.before = lambda request: None
    a.sync()
    assert_in_step(world, a)


def test_r28_a_hundred_idle_cycles_after_a_reset_make_one_reset() -> None:
    _world, a = purged_world(pages=3)
    assert a.sync().reset
    requests = len(a.wire.requests)
    assert not any(a.sync().reset for _ in range(100))
    assert len(a.wire.requests) == requests + 100
    assert sum(request.full and request.cursor == 0 for request in a.wire.pulls()) == 1


def test_r28_a_push_from_below_the_floor_conflicts_unless_it_is_known() -> None:
    world = World()
    a = world.device(default_policy="client_wins")
    world.put(("notes", 9, "x"))
    a.sync()
    a.put(("notes", 1, "known"))
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    # The id is remembered, because its version is above the floor.
    world.put(("notes", 9, None))
    purge_tombstones(world.server, 1)
    a.restart()
    result = a.sync()
    assert (result.pushed, result.conflicts) == (1, [])
    assert_in_step(world, a)


def test_r28_what_was_accepted_and_forgotten_is_recognised_by_its_bytes() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 9, "x"))
    a.sync()
    a.put(("notes", 1, "mine"), ("notes", 2, "mine"))
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    world.put(("notes", 9, None))
    purge(world)
    a.restart()
    result = a.sync()
    assert (result.conflicts, result.withdrawn, len(result.done)) == ([], [], 1)
    assert a.pending == 0
    assert_in_step(world, a)


def test_r28_a_delete_does_not_come_back_from_a_device_that_was_away() -> None:
    world = World()
    a, b, c = world.device(), world.device(default_policy="client_wins"), world.device()
    for n in range(5):
        world.put(("notes", n, "old"))
    for device in (a, b, c):
        device.sync()
    b.put(("other", 1, "something else"))
    a.put(*[("notes", n, None) for n in range(5)])
    a.sync()
    purge(world)
    for device in (b, c, a, b, c):
        device.sync()
    assert world.values() == {}
    assert_in_step(world, a, b, c)


def test_r28_the_view_is_one_state_or_the_other_during_a_reset() -> None:
    _world, a = purged_world(pages=3)
    seen: list[dict[int, Any]] = []
    a.wire.before = lambda request: seen.append(a.values())
    a.sync()
    before = {1: "old", 2: "old", 3: "old", 4: "old", 5: "old"}
    after = {4: "new", 5: "old", 6: "new"}
    assert before in seen
    assert all(view in (before, after) for view in seen)


def test_r28_observers_get_one_reset_event_and_the_feed_says_it_too() -> None:
    _world, a = purged_world(pages=3)
    cursor = a.db.sequence
    events: list[Any] = []
    a.db.observe(lambda commit: events.extend(commit.events))
    a.sync()
    assert [(event.kind, event.collection) for event in events] == [("reset", "notes")]
    assert ("reset", "notes") in [(e.kind, e.collection) for e in a.db.changes(cursor)]


def test_r28_a_replaced_table_is_emptied_after_the_cycle() -> None:
    world, a = purged_world(pages=3)
    a.sync()
    with a.db.view() as view:
        assert view.catalogue.garbage == ()
    assert_in_step(world, a)


def test_r28_a_killed_reset_still_orders_by_the_right_clock() -> None:
    # The clamp of R27 needs the server's time, which came with a page from before the crash.
    world = World()
    a = world.device(default_policy="last_write_wins", pull_operations_max=2)
    for n in range(1, 6):
        world.put(("notes", n, "old"))
    a.sync()
    world.put(("notes", 1, "theirs"), ("notes", 5, None))
    purge(world)
    a.clock.ms += 1000
    world.clock.ms += 2000
    a.put(("notes", 1, "mine, and later"))

    def die() -> Any:
        raise Crash

    a.engine.applier.publish = die  # type: ignore[method-assign]
    with pytest.raises(Crash):
        a.sync()
    a.restart()
    a.settle()
    assert world.values()[1] == "mine, and later"
    assert_in_step(world, a)


# ---------------------------------------------------------------- R29


def restored_world(**config: Any) -> tuple[World, Device, MemoryStorage]:
    """A server restored from a backup. Since it was made, the device saw note 2 change, note 3
    go, and notes 4 and 5 come in one transaction."""
    world = World()
    a = world.device(**config)
    for n in range(1, 4):
        world.put(("notes", n, "old"))
    a.sync()
    backup = world.backup_server()
    a.put(("notes", 2, "changed"))
    a.put(("notes", 3, None))
    a.put(("notes", 4, "made"), ("notes", 5, "made"))
    a.sync()
    a.sync()
    world.open_server(backup)
    return world, a, backup


def test_r29_another_history_is_an_error_that_changes_nothing() -> None:
    world, a, _ = restored_world()
    a.put(("notes", 9, "pending"))
    before = list(dump(a.db))
    commits = (a.storage.commits, world.server_storage.commits)
    for _ in range(2):
        with pytest.raises(HistoryChangedError):
            a.sync()
    a.restart()
    with pytest.raises(HistoryChangedError):
        a.sync()
    assert list(dump(a.db)) == before
    assert (0, world.server_storage.commits) == (a.storage.commits, commits[1])
    assert a.pending == 1


@pytest.mark.parametrize("page", [2, 5000])
def test_r29_keep_server_takes_the_servers_state(page: int) -> None:
    world, a, _ = restored_world(pull_operations_max=page)
    with pytest.raises(HistoryChangedError):
        a.sync()
    a.engine.reset("server")
    a.sync()
    assert a.values() == {1: "old", 2: "old", 3: "old"}
    assert_in_step(world, a)


@pytest.mark.parametrize("page", [2, 5000])
def test_r29_keep_device_commits_again_what_the_server_lost(page: int) -> None:
    world, a, _ = restored_world(pull_operations_max=page)
    with pytest.raises(HistoryChangedError):
        a.sync()
    a.engine.reset("device")
    a.settle()
    assert world.values() == {1: "old", 2: "changed", 4: "made", 5: "made"}
    assert_in_step(world, a)


def test_r29_keep_device_groups_as_the_transactions_were() -> None:
    _world, a, _ = restored_world()
    a.engine.reset("device")
    a.sync()
    groups = [
        {operation.entity_id[-1] for operation in transaction.operations}
        for push in a.wire.pushes()
        for transaction in push.transactions
    ]
    assert groups[-3:] == [{2}, {3}, {4, 5}]


def test_r29_a_server_restored_twice_is_noticed_twice() -> None:
    world, a, _ = restored_world()
    a.engine.reset("server")
    a.sync()
    world.put(("notes", 40, "only here"))
    a.sync()
    world.open_server(world.backup_server())
    with pytest.raises(HistoryChangedError):
        a.sync()
    a.engine.reset("device")
    a.settle()
    assert world.values()[40] == "only here"
    assert_in_step(world, a)


@pytest.mark.parametrize("keep", ["server", "device"])
def test_r29_pending_work_survives_the_reset(keep: str) -> None:
    world, a, _ = restored_world(default_policy="client_wins")
    a.put(("notes", 1, "mine"), ("notes", 9, "new"))
    a.engine.reset(keep)
    a.settle()
    assert world.values()[1] == "mine"
    assert world.values()[9] == "new"
    assert_in_step(world, a)


@pytest.mark.parametrize("keep", ["server", "device"])
def test_r29_a_reset_is_remembered_over_a_crash(keep: str) -> None:
    world, a, _ = restored_world(pull_operations_max=2)
    a.engine.reset(keep)
    a.wire.after = lose(PullRequest, times=9)
    with pytest.raises(TransportError):
        a.sync()
    a.restart()
    a.settle()
    assert (world.values().get(4) == "made") == (keep == "device")
    assert_in_step(world, a)


def test_r29_three_devices_agree_after_one_kept_its_side() -> None:
    world = World()
    a, b, c = world.device(), world.device(), world.device()
    for n in range(6):
        world.put(("notes", n, "old"))
    for device in (a, b, c):
        device.sync()
    backup = world.backup_server()
    a.put(("notes", 1, "a"), ("notes", 10, "a"))
    a.sync()
    b.sync()
    world.open_server(backup)
    world.put(("notes", 2, "after the restore"))
    a.engine.reset("device")
    b.engine.reset("device")
    c.engine.reset("server")
    for device in (a, b, c, a, b, c):
        device.settle()
    assert world.values()[1] == "a"
    assert world.values()[10] == "a"
    assert_in_step(world, a, b, c)


def test_r29_files_put_back_by_hand_are_noticed_by_the_cursor() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "x"))
    inner = world.server_storage.inner
    assert isinstance(inner, MemoryStorage)
    old = inner.copy()
    world.put(("notes", 2, "x"))
    a.sync()
    world.open_server(old)
    with pytest.raises(HistoryChangedError):
        a.sync()


# ---------------------------------------------------------------- R30


def test_r30_a_restored_device_goes_on_from_where_it_was() -> None:
    world = World()
    a = world.device(default_policy="client_wins")
    world.put(("notes", 1, "old"))
    a.sync()
    a.put(("notes", 1, "mine"))
    a.put(("notes", 2, "mine"))
    restored = a.copy()
    a.sync()
    world.put(("notes", 1, "later"))
    a.sync()
    result = restored.sync()
    assert result.withdrawn == []
    restored.settle()
    a.sync()
    assert_in_step(world, a, restored)


def test_r30_two_copies_of_a_device_push_one_transaction_once() -> None:
    world = World()
    a = world.device()
    a.put(("notes", 1, "x"), ("notes", 2, "x"))
    twin = a.copy()
    sequence = world.server.sequence
    a.sync()
    twin.sync()
    assert world.server.sequence == sequence + 1
    assert_in_step(world, a, twin)


def copies_in_flight(
    first: Callable[[Device], None], **config: Any
) -> tuple[World, Device, Device]:
    """Two copies of a device with the same batch in flight that never reached the server."""
    world = World()
    a = world.device(**config)
    world.put(("notes", 1, "old"))
    a.sync()
    first(a)
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    twin = a.copy()
    a.restart()
    return world, a, twin


def test_r30_copies_with_a_batch_in_flight_push_it_once() -> None:
    def work(a: Device) -> None:
        a.put(("notes", 1, "one"))
        a.put(("notes", 1, "two"), ("notes", 2, "two"))

    world, a, twin = copies_in_flight(work)
    a.sync()
    world.put(("notes", 1, "later"))
    twin.sync()
    a.sync()
    assert world.values() == {1: "later", 2: "two"}
    assert_in_step(world, a, twin)


def test_r30_a_copy_may_have_settled_the_first_of_two_by_its_bytes() -> None:
    # The original: its first transaction was done already (R24), only the second was accepted.
    # The copy then hears "conflict" for the first and "accepted" for the second of a chain.
    def work(a: Device) -> None:
        a.put(("notes", 1, "same"))
        a.put(("notes", 1, "second"))

    world, a, twin = copies_in_flight(work)
    world.put(("notes", 1, "same"))
    a.restart()
    first = a.sync()
    assert (len(first.done), first.pushed) == (1, 1)
    twin.settle()
    assert world.values() == {1: "second"}
    assert_in_step(world, a, twin)


def test_r30_a_copy_may_have_merged_the_second_of_three() -> None:
    # The copy hears "conflict, superseded, conflict" for one entity's chain of three.
    def work(a: Device) -> None:
        a.put(("notes", 1, {"n": 1}))
        a.put(("notes", 1, {"n": 2}), ("notes", 3, "x"))

    world, a, twin = copies_in_flight(work, default_policy="client_wins")
    world.put(("notes", 1, {"n": 1}))
    world.put(("notes", 3, "theirs"))
    a.sync()
    twin.put(("notes", 1, {"n": 3}))
    twin.settle()
    a.sync()
    assert world.values()[1] == {"n": 3}
    assert_in_step(world, a, twin)


def test_r30_superseded_content_is_replaced_by_what_was_accepted() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, {"n": 0}))
    a.sync()
    a.put(("notes", 1, {"n": 1}))
    world.put(("notes", 1, {"n": 0, "theirs": True}))
    twin = a.copy(default_policy="client_wins")
    a.restart(default_policy="merge")
    a.sync()
    assert world.values() == {1: {"n": 1, "theirs": True}}
    twin.wire.before = lambda request: None
    result = twin.sync()
    assert (result.pushed, result.superseded) == (0, 1)
    assert twin.pending == 0
    assert_in_step(world, a, twin)
