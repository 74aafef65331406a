"""Grants are scope (R31): what happens on a device whose token grants other collections than
before, with nothing left out, nothing deleted by its absence, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from entidb.db import dump, purge_tombstones
from entidb.errors import PermissionDeniedError, SyncError, TransportError
from entidb.protocol import HandshakeResponse, PullRequest, PullResponse, PushRequest, SyncRequest
from entidb.server.hooks import Grant
from entidb.sync import ConflictResolution
from tests.support import GRANT, Crash, Device, World, assert_in_step, assert_sound, lose, uid


def granting(*names: str) -> Grant:
    return Grant("tester", True, True, frozenset(names))


NOTES, TASKS, NEITHER = granting("notes"), granting("tasks"), granting()


def filled_world(**config: Any) -> tuple[World, Device]:
    """A server with notes 1 to 3 and tasks 1 to 3, and a device that has never met it."""
    world = World()
    for n in range(1, 4):
        world.put(("notes", n, f"note {n}"))
        world.put(("tasks", n, f"task {n}"))
    return world, world.device(**config)


def sync(device: Device, grant: Grant) -> Any:
    device.wire.grant = grant
    return device.sync()


def sides(device: Device) -> dict[str, dict[int, Any]]:
    return {name: device.values(name) for name in ("notes", "tasks")}


def held_by(world: World, device: Device, *names: str) -> None:
    """The device has, byte for byte, what the server has of these collections, and no others."""
    due = [row for row in dump(world.server) if row[0] in names]
    assert list(dump(device.db)) == due
    assert_sound(device.db, world.server)


PAGES = pytest.mark.parametrize("pages", [{}, {"pull_operations_max": 1}], ids=["one", "several"])


# ---------------------------------------------------------------- what is said


def test_r31_handshake_and_pull_say_what_is_granted() -> None:
    _world, a = filled_world()
    sync(a, NOTES)
    said = [r for r in a.wire.responses if isinstance(r, HandshakeResponse | PullResponse)]
    assert len(said) > 1
    assert all(response.granted == ["notes"] for response in said)
    a.wire.responses.clear()
    sync(a, GRANT)
    assert a.wire.responses
    assert all(getattr(response, "granted", None) is None for response in a.wire.responses)


def test_r31_the_idle_answer_says_it_too() -> None:
    _world, a = filled_world()
    sync(a, GRANT)
    a.wire.responses.clear()
    sync(a, NOTES)
    assert sides(a) == {"notes": {n: f"note {n}" for n in range(1, 4)}, "tasks": {}}
    assert a.wire.responses[0].granted == ["notes"]  # type: ignore[union-attr]


def test_r31_the_same_grant_costs_nothing_more() -> None:
    _world, a = filled_world()
    sync(a, NOTES)
    commits, requests = a.storage.commits, len(a.wire.requests)
    for _ in range(5):
        sync(a, NOTES)
    assert a.storage.commits == commits
    assert len(a.wire.requests) == requests + 5


# ---------------------------------------------------------------- wider


@PAGES
def test_r31_a_wider_grant_brings_what_the_cursor_passed_over(pages: dict[str, int]) -> None:
    world, a = filled_world(**pages)
    sync(a, NOTES)
    held_by(world, a, "notes")
    sync(a, GRANT)
    assert_in_step(world, a)
    world.put(("tasks", 1, "changed"), ("notes", 1, "changed"))
    sync(a, GRANT)
    assert_in_step(world, a)


@PAGES
def test_r31_from_some_to_some_more(pages: dict[str, int]) -> None:
    world, a = filled_world(**pages)
    world.put(("secret", 1, "x"))
    sync(a, NOTES)
    sync(a, granting("notes", "tasks", "nothing of that name"))
    held_by(world, a, "notes", "tasks")


def test_r31_what_was_deleted_meanwhile_does_not_come_with_a_wider_grant() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    sync(a, NOTES)
    world.put(("tasks", 2, None))
    sync(a, NOTES)
    purge_tombstones(world.server, world.server.sequence - 1)
    sync(a, GRANT)
    assert set(a.values("tasks")) == {1, 3}
    assert_in_step(world, a)


def test_r31_a_write_to_what_is_not_granted_knows_nothing_of_what_is_there() -> None:
    # Built on "absent at the cursor" it would pass over the server's value when it is granted.
    world, a = filled_world(default_policy="server_wins")
    sync(a, NOTES)
    a.put(("tasks", 1, "written blindly"))
    result = sync(a, GRANT)
    assert [conflict.resolution.action.value for conflict in result.conflicts] == ["accept_remote"]
    assert world.values("tasks")[1] == "task 1"
    [discarded] = a.engine.applier.discarded()
    assert discarded.values() == [("tasks", uid(1), "written blindly")]
    assert_in_step(world, a)


# ---------------------------------------------------------------- narrower


@PAGES
def test_r31_a_narrower_grant_removes_what_is_gone_and_says_so(pages: dict[str, int]) -> None:
    world, a = filled_world(**pages)
    sync(a, GRANT)
    cursor = a.db.sequence
    events: list[Any] = []
    a.db.observe(lambda commit: events.extend(commit.events))
    sync(a, NOTES)
    held_by(world, a, "notes")
    assert [(event.kind, event.collection) for event in events] == [("reset", "tasks")]
    assert [(e.kind, e.collection) for e in a.db.changes(cursor)] == [("reset", "tasks")]
    assert len(a.db.collection("tasks")) == 0
    assert len(a.db.collection("notes")) == 3


def test_r31_a_narrower_grant_withdraws_what_is_pending_there_with_its_values() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    a.put(("tasks", 1, "mine"), ("notes", 1, "mine"))
    a.put(("notes", 1, "on top"))
    a.put(("notes", 2, "by itself"))
    a.put(("tasks", 2, None))
    result = sync(a, NOTES)
    assert [(each.code) for each in result.withdrawn] == ["forbidden", "depends", "forbidden"]
    assert "does not grant collection 'tasks'" in result.withdrawn[0].message
    assert world.values("notes") == {1: "note 1", 2: "by itself", 3: "note 3"}
    held_by(world, a, "notes")
    discarded = a.engine.applier.discarded()
    assert [each.values() for each in discarded] == [
        [("notes", uid(1), "mine"), ("tasks", uid(1), "mine")],
        [("notes", uid(1), "on top")],
        [("tasks", uid(2), None)],
    ]
    # Granted again, all of it can be committed again.
    sync(a, GRANT)
    for each in discarded:
        a.engine.applier.recommit(each)
    assert sync(a, GRANT).withdrawn == []
    assert world.values("tasks") == {1: "mine", 3: "task 3"}
    assert world.values("notes")[1] == "on top"
    assert_in_step(world, a)


def test_r31_an_open_conflict_in_what_is_gone_is_withdrawn_and_lets_go_of_the_rest() -> None:
    world, a = filled_world(default_policy="manual")
    sync(a, GRANT)
    world.put(("tasks", 1, "theirs"))
    a.put(("tasks", 1, "mine"), ("notes", 1, "mine"))
    a.put(("notes", 1, "later"))
    sync(a, GRANT)
    assert len(a.engine.conflicts()) == 1
    result = sync(a, NOTES)
    assert [each.code for each in result.withdrawn] == ["forbidden", "depends"]
    assert a.engine.conflicts() == []
    head = a.db.read_head()
    assert (head.ready, head.held, head.conflicts, head.discarded) == (0, 0, 0, 2)
    held_by(world, a, "notes")


def test_r31_what_was_in_flight_is_settled_before_a_narrower_grant_touches_it() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    a.put(("tasks", 1, "mine"))
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        sync(a, GRANT)
    a.restart()
    result = sync(a, NOTES)
    assert (result.pushed, result.withdrawn) == (1, [])
    assert world.values("tasks")[1] == "mine"
    held_by(world, a, "notes")


def test_r31_a_write_under_a_narrow_grant_is_withdrawn_and_stops_nothing() -> None:
    world, a = filled_world()
    sync(a, NOTES)
    a.put(("tasks", 9, "x"))
    a.put(("notes", 9, "y"))
    result = sync(a, NOTES)
    assert [each.code for each in result.withdrawn] == ["forbidden"]
    assert world.values("notes")[9] == "y"
    sync(a, NOTES)
    held_by(world, a, "notes")


def test_r31_nothing_granted_is_an_empty_device_that_gets_everything_back() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    sync(a, NEITHER)
    assert sides(a) == {"notes": {}, "tasks": {}}
    sync(a, GRANT)
    assert_in_step(world, a)


@PAGES
def test_r31_two_tokens_in_turn_on_one_device(pages: dict[str, int]) -> None:
    world, a = filled_world(**pages)
    for turn in range(6):
        world.put(("notes", 4, turn), ("tasks", 4, turn))
        name = ("notes", "tasks")[turn % 2]
        a.put((name, 5, turn))
        sync(a, granting(name))
        sync(a, granting(name))
        held_by(world, a, name)
    sync(a, GRANT)
    assert_in_step(world, a)


# ---------------------------------------------------------------- absence


@PAGES
def test_r28_a_reset_under_a_narrow_grant_deletes_nothing_outside_of_it(
    pages: dict[str, int],
) -> None:
    world, a = filled_world(**pages)
    sync(a, NOTES)
    a.put(("tasks", 7, "not pushed"))
    world.put(("notes", 1, None))
    purge_tombstones(world.server, world.server.sequence)
    result = sync(a, NOTES)
    assert result.reset
    assert [(each.code) for each in result.withdrawn] == ["forbidden"]
    held_by(world, a, "notes")
    sync(a, GRANT)
    assert_in_step(world, a)


def test_r28_a_reset_that_meets_a_narrower_grant_withdraws_with_the_true_reason() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    a.put(("tasks", 1, "offline"))
    world.put(("notes", 1, None))
    purge_tombstones(world.server, world.server.sequence)
    result = sync(a, NOTES)
    assert result.reset
    [withdrawn] = result.withdrawn
    assert (withdrawn.code, "grant" in withdrawn.message) == ("forbidden", True)
    sync(a, GRANT)
    [discarded] = a.engine.applier.discarded()
    a.engine.applier.recommit(discarded)
    sync(a, GRANT)
    assert world.values("tasks")[1] == "offline"
    assert_in_step(world, a)


@pytest.mark.parametrize("keep", ["server", "device"])
def test_r29_a_reset_to_another_history_under_alternating_grants(keep: str) -> None:
    world, a = filled_world()
    backup = world.backup_server()
    sync(a, NOTES)
    world.put(("notes", 4, "lost"), ("tasks", 4, "lost"))
    sync(a, NOTES)
    world.open_server(backup)
    world.put(("tasks", 1, "of the new history"))
    with pytest.raises(SyncError):
        sync(a, NOTES)
    a.engine.reset(keep=keep)
    sync(a, GRANT)
    a.settle()
    assert (4 in world.values("notes")) == (keep == "device")
    assert_in_step(world, a)


def test_r29_a_narrow_token_does_not_throw_away_what_a_reset_is_to_commit_again() -> None:
    world, a = filled_world()
    backup = world.backup_server()
    a.put(("tasks", 4, "only here"))
    sync(a, GRANT)
    sync(a, GRANT)
    world.open_server(backup)
    with pytest.raises(SyncError):
        sync(a, GRANT)
    a.engine.reset(keep="device")
    for _ in range(2):
        with pytest.raises(PermissionDeniedError, match="tasks"):
            sync(a, NOTES)
        assert a.values("tasks")[4] == "only here"
    sync(a, GRANT)
    a.settle()
    assert world.values("tasks")[4] == "only here"
    assert_in_step(world, a)


def test_r29_and_keep_server_is_the_other_way_out_of_that() -> None:
    world, a = filled_world()
    backup = world.backup_server()
    a.put(("tasks", 4, "only here"))
    sync(a, GRANT)
    world.open_server(backup)
    with pytest.raises(SyncError):
        sync(a, GRANT)
    a.engine.reset(keep="device")
    with pytest.raises(PermissionDeniedError):
        sync(a, NOTES)
    a.engine.reset(keep="server")
    sync(a, NOTES)
    held_by(world, a, "notes")


# ---------------------------------------------------------------- beside the person's own scope


def test_r31_local_collections_stay_whatever_is_granted() -> None:
    world, a = filled_world()
    a.db.declare_local("drafts")
    a.put(("drafts", 1, "mine alone"), ("notes", 9, "x"))
    sync(a, GRANT)
    sync(a, TASKS)
    assert a.values("drafts") == {1: "mine alone"}
    held_by(world, a, "tasks")


def test_r31_a_collection_outside_the_scope_stays_whatever_is_granted() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    a.db.set_scope(["notes"])
    sync(a, GRANT)
    sync(a, NOTES)
    assert len(a.values("tasks")) == 3, "narrowing by choice keeps the data"
    a.db.set_scope(["notes", "tasks"])
    sync(a, NOTES)
    assert a.values("tasks") == {}, "and in scope again it is the server's to say"
    sync(a, GRANT)
    assert_in_step(world, a)


def test_r31_a_wider_scope_under_a_narrow_grant_loses_nothing_that_was_written_outside() -> None:
    world, a = filled_world()
    a.db.set_scope(["notes"])
    a.put(("tasks", 8, "written outside the scope"))
    sync(a, NOTES)
    a.db.set_scope(["notes", "tasks"])
    result = sync(a, NOTES)
    assert [each.code for each in result.withdrawn] == ["forbidden"]
    [discarded] = a.engine.applier.discarded()
    assert discarded.values() == [("tasks", uid(8), "written outside the scope")]
    sync(a, GRANT)
    assert_in_step(world, a)


def test_r31_a_scope_given_from_the_first_day_and_grants_around_it() -> None:
    world, a = filled_world()
    world.put(("secret", 1, "x"))
    a.db.set_scope(["notes", "tasks"])
    for grant in (NOTES, TASKS, GRANT, NEITHER, granting("secret"), GRANT):
        sync(a, grant)
        names = {"notes", "tasks"} if grant.collections is None else grant.collections
        held_by(world, a, *({"notes", "tasks"} & names))


def test_r31_foreign_rows_of_a_collection_that_is_not_granted_stop_no_push() -> None:
    world, a = filled_world()
    sync(a, GRANT)
    a.db.set_scope(["notes"])
    world.open_server(world.backup_server())
    with pytest.raises(SyncError):
        sync(a, NOTES)
    a.engine.reset(keep="server")
    sync(a, NOTES)
    assert a.state.foreign_names == ["tasks"]
    a.db.set_scope(["notes", "tasks"])
    a.put(("notes", 1, "mine"))
    sync(a, NOTES)
    assert world.values("notes")[1] == "mine"
    assert a.state.foreign_names == []
    held_by(world, a, "notes")
    sync(a, GRANT)
    assert_in_step(world, a)


# ---------------------------------------------------------------- between two pages


def switch(device: Device, when: int, grant: Grant) -> None:
    """From the ``when``-th pull on the token is another."""
    seen = [0]

    def hook(request: SyncRequest) -> None:
        seen[0] += isinstance(request, PullRequest)
        if seen[0] == when:
            device.wire.grant = grant

    device.wire.before = hook


@pytest.mark.parametrize("when", range(1, 9))
@pytest.mark.parametrize("begin", [NOTES, GRANT, TASKS], ids=["notes", "all", "tasks"])
@pytest.mark.parametrize("then", [NOTES, GRANT, TASKS], ids=["notes", "all", "tasks"])
def test_r31_a_grant_that_changes_between_pages_of_a_pull(
    when: int, begin: Grant, then: Grant
) -> None:
    world, a = filled_world(pull_operations_max=1)
    switch(a, when, then)
    sync(a, begin)
    a.wire.before = lambda request: None
    now = a.wire.grant
    names = {"notes", "tasks"} if now.collections is None else now.collections
    sync(a, now)
    held_by(world, a, *names)
    sync(a, GRANT)
    assert_in_step(world, a)


@pytest.mark.parametrize("when", range(1, 7))
def test_r31_a_grant_that_changes_between_pages_of_changes(when: int) -> None:
    world, a = filled_world(pull_operations_max=1)
    sync(a, GRANT)
    for n in range(1, 4):
        world.put(("notes", n, "new"), ("tasks", n, "new"))
    switch(a, when, NOTES)
    sync(a, GRANT)
    a.wire.before = lambda request: None
    sync(a, NOTES)
    held_by(world, a, "notes")
    sync(a, GRANT)
    assert_in_step(world, a)


def test_r31_a_grant_that_never_stays_the_same_ends_the_cycle_and_the_next_goes_on() -> None:
    world, a = filled_world(pull_operations_max=1)
    turn = [0]

    def hook(request: SyncRequest) -> None:
        turn[0] += 1
        a.wire.grant = (NOTES, TASKS)[turn[0] % 2]

    a.wire.before = hook
    with pytest.raises(SyncError, match="grants"):
        sync(a, NOTES)
    assert len(a.wire.requests) < 20
    a.wire.before = lambda request: None
    sync(a, GRANT)
    assert_in_step(world, a)


# ---------------------------------------------------------------- dying


def died(device: Device, act: Callable[[], object], nth: int, after: bool) -> bool:
    device.storage.fail(nth, after=after)
    try:
        act()
    except Crash:
        device.restart()
        return True
    return False


@pytest.mark.parametrize("after", [False, True])
def test_r9_dying_around_any_commit_of_a_change_of_grants_changes_nothing(after: bool) -> None:
    for first, second in ((GRANT, NOTES), (NOTES, GRANT), (NOTES, TASKS)):
        nth, going = 1, True
        while going:
            world, a = filled_world(pull_operations_max=2)
            sync(a, first)
            a.put(("notes", 2, "mine"))
            a.wire.grant = second
            going = died(a, a.sync, nth, after)
            a.storage.fail_at = None
            sync(a, second)
            names = {"notes", "tasks"} if second.collections is None else second.collections
            held_by(world, a, *names)
            written = world.values("notes")[2] == "mine"
            listed = [each.code for each in a.engine.applier.discarded()]
            assert written or listed == ["forbidden"]
            sync(a, GRANT)
            assert_in_step(world, a)
            nth += 1
        assert nth > 2


# ---------------------------------------------------------------- a server that does not say


def test_r31_a_server_that_says_nothing_of_grants_grants_everything() -> None:
    # As those before 0.4.0.
    world, a = filled_world()
    sync(a, GRANT)
    assert a.state.granted is None
    assert_in_step(world, a)


def test_r31_a_decision_after_a_grant_is_taken_on_what_is_left() -> None:
    world, a = filled_world(default_policy="manual")
    sync(a, GRANT)
    world.put(("notes", 1, "theirs"))
    a.put(("notes", 1, "mine"))
    sync(a, GRANT)
    sync(a, NOTES)
    [conflict] = a.engine.conflicts()
    a.engine.resolve(conflict, ConflictResolution.keep_local())
    sync(a, NOTES)
    assert world.values("notes")[1] == "mine"
    held_by(world, a, "notes")
