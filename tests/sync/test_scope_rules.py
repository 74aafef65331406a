"""What a device synchronises: R31."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db.adopt import adopt_step
from entidb.errors import ScopeError, SyncStateError, TransportError, UpgradeRequiredError
from entidb.protocol import PullRequest, PushRequest, SyncRequest
from entidb.server.hooks import Grant
from entidb.sync import BatchLimits
from entidb.sync.apply.seam import Look
from tests.support import Device, World, assert_in_step, assert_sound, lose, uid


def names(device: Device) -> list[str]:
    return [name for push in device.wire.pushes() for name in push.collections]


# ---------------------------------------------------------------- local collections


def test_r31_a_local_collection_is_never_in_the_outbox_or_on_the_server() -> None:
    world = World()
    a = world.device()
    local = a.db.collection("drafts", local=True)
    local[uid(1)] = "private"
    assert a.pending == 0
    a.sync()
    assert world.server.collections() == []
    assert local[uid(1)] == "private"


def test_r31_of_a_mixed_transaction_the_synchronised_part_travels() -> None:
    world = World()
    a, b = world.device(), world.device()
    a.db.declare_local("drafts")
    commits = a.storage.commits
    a.put(("drafts", 1, "private"), ("notes", 1, "public"))
    assert a.storage.commits == commits + 1
    a.sync()
    b.sync()
    assert b.db.collections() == ["notes"]
    assert a.values("drafts") == {1: "private"}
    assert_in_step(world, a, b)


def test_r31_a_local_collection_is_not_pulled() -> None:
    world = World()
    a = world.device()
    a.db.declare_local("drafts")
    a.put(("drafts", 1, "mine"))
    world.put(("drafts", 1, "theirs"), ("notes", 1, "x"))
    a.sync()
    assert a.values("drafts") == {1: "mine"}
    assert a.values() == {1: "x"}
    assert_sound(a.db)


def test_r31_a_withdrawn_mixed_transaction_keeps_its_local_part() -> None:
    world = World()
    a = world.device()
    a.db.declare_local("drafts")
    a.put(("drafts", 1, "private"), ("notes", 1, "mine"))
    world.put(("notes", 1, "theirs"))
    a.sync()
    assert (a.values("drafts"), a.values()) == ({1: "private"}, {1: "theirs"})
    assert_in_step(world, a)


def test_r31_a_collection_with_pending_changes_cannot_turn_local() -> None:
    a = World().device()
    a.put(("notes", 1, "x"))
    with pytest.raises(ScopeError) as caught:
        a.db.declare_local("notes")
    assert caught.value.code == "scope_pending"
    a.sync()
    a.db.declare_local("notes")
    a.put(("notes", 2, "private"))
    assert a.pending == 0


def test_r31_what_was_local_is_pushed_when_it_no_longer_is() -> None:
    world = World()
    a = world.device()
    a.db.declare_local("drafts")
    a.put(("drafts", 1, "x"), ("drafts", 2, "x"))
    a.sync()
    a.db.declare_local("drafts", False)
    a.settle()
    assert world.values("drafts") == {1: "x", 2: "x"}
    assert_in_step(world, a)


def test_r31_a_collection_that_is_local_on_the_server_stays_there() -> None:
    world = World()
    world.server.declare_local("secrets")
    world.put(("secrets", 1, "key"), ("notes", 1, "x"))
    a = world.device()
    a.sync()
    assert a.db.collections() == ["notes"]
    assert_in_step(world, a)


# ---------------------------------------------------------------- a list of names


def scoped(**config: Any) -> tuple[World, Device]:
    world = World()
    world.put(("notes", 1, "x"), ("tasks", 1, "x"))
    world.put(("notes", 2, "x"), ("other", 2, "x"))
    return world, world.device(collections=("notes",), **config)


def test_r31_only_what_is_in_scope_is_pulled_and_the_cursor_moves_over_everything() -> None:
    world, a = scoped()
    world.put(("other", 9, "the tail is out of scope"))
    a.sync()
    assert a.db.collections() == ["notes"]
    assert a.state.cursor == world.server.sequence
    assert a.sync().requests == 1
    world.put(("other", 10, "and again"))
    a.sync()
    assert a.state.cursor == world.server.sequence
    assert_sound(a.db)


def test_r31_what_is_out_of_scope_is_kept_locally_and_not_pushed() -> None:
    world, a = scoped()
    a.sync()
    a.put(("notes", 5, "mine"), ("other", 5, "mine"))
    a.sync()
    assert names(a) == ["notes"]
    assert a.values("other") == {5: "mine"}
    assert_sound(a.db, world.server)


def test_r31_the_scope_is_remembered() -> None:
    _, a = scoped()
    a.sync()
    a.restart()
    assert a.db.scope == frozenset({"notes"})


@pytest.mark.parametrize("page", [1, 2, 5000])
def test_r31_widening_pulls_from_the_beginning_and_pushes_what_is_there(page: int) -> None:
    world, a = scoped(pull_operations_max=page)
    a.sync()
    a.put(("tasks", 7, "mine"))
    a.put(("tasks", 8, "mine"), ("tasks", 9, "mine"))
    world.put(("notes", 1, "changed"), ("tasks", 3, "x"))
    a.db.set_scope(["notes", "tasks"])
    a.settle()
    assert world.values("tasks") == {1: "x", 3: "x", 7: "mine", 8: "mine", 9: "mine"}
    assert a.values("tasks") == world.values("tasks")
    assert a.values() == world.values()
    groups = [
        {op.entity_id[-1] for op in t.operations} for p in a.wire.pushes() for t in p.transactions
    ]
    assert groups == [{7}, {8, 9}]
    assert_sound(a.db, world.server)


@pytest.mark.parametrize("policy", ["client_wins", "server_wins"])
@pytest.mark.parametrize("page", [1, 5000])
def test_r31_widening_meets_what_the_server_has_as_conflicts(page: int, policy: str) -> None:
    world, a = scoped(pull_operations_max=page, default_policy=policy)
    a.sync()
    a.put(("tasks", 1, "mine"))
    a.db.set_scope(["notes", "tasks"])
    result = a.sync()
    a.settle()
    assert [r.conflict.kind for r in result.conflicts] == ["create/create"]
    assert world.values("tasks") == {1: "mine" if policy == "client_wins" else "x"}
    assert a.values("tasks") == world.values("tasks")
    assert_sound(a.db, world.server)


@pytest.mark.parametrize("page", [1, 5000])
def test_r31_widening_to_all_brings_collections_nobody_named(page: int) -> None:
    world, a = scoped(pull_operations_max=page)
    a.sync()
    a.put(("tasks", 7, "mine"), ("notes", 7, "mine"))
    world.put(("notes", 1, "changed"))
    a.restart(collections=None)
    a.db.set_scope(None)
    a.settle()
    assert world.values("tasks") == {1: "x", 7: "mine"}
    assert_in_step(world, a)


def test_r31_a_widening_killed_at_every_request_goes_on() -> None:
    for at in range(1, 60):
        world, a = scoped(pull_operations_max=1)
        a.sync()
        a.put(("tasks", 7, "mine"))
        for n in range(4):
            world.put(("tasks", 10 + n, "x"), ("notes", 10 + n, "x"))
        a.restart(collections=None)
        a.db.set_scope(["notes", "tasks"])
        a.wire.before = lambda request, a=a, at=at: (  # type: ignore[misc]
            lose(type(request))(request) if len(a.wire.requests) == at else None
        )
        try:
            a.sync()
        except TransportError:
            a.restart()
        else:
            break
        world.put(("tasks", 20, "meanwhile"), ("notes", 20, "meanwhile"))
        a.settle()
        a.sync()
        assert a.values("tasks") == world.values("tasks")
        assert a.values() == world.values()
        assert_sound(a.db, world.server)
    assert at > 8


@pytest.mark.parametrize("page", [1, 5000])
@pytest.mark.parametrize("wider", [["notes", "tasks"], None])
def test_r31_what_is_pushed_in_a_widening_that_waits_for_a_newer_program_stays(
    wider: list[str] | None, page: int
) -> None:
    """R33 lets a program push that is too old to pull, also when some of a widening is staged."""
    for at in range(1, 12):
        world, a = scoped(pull_operations_max=page)
        a.sync()
        world.put(("tasks", 2, "x"), ("notes", 2, "x"))
        a.put(("tasks", 7, "mine"), ("notes", 7, "mine"))
        a.restart(collections=None)
        a.db.set_scope(wider)
        before = len(a.wire.pulls())

        def refuse(request: SyncRequest, a: Device = a, last: int = before + at) -> None:
            if isinstance(request, PullRequest) and len(a.wire.pulls()) >= last:
                raise UpgradeRequiredError("too old")

        a.wire.before = refuse
        try:
            a.sync()
        except UpgradeRequiredError:
            assert world.values("tasks") == {1: "x", 2: "x", 7: "mine"}
        else:
            break
        a.put(("tasks", 7, "again"), ("tasks", 8, "mine"))
        with pytest.raises(UpgradeRequiredError):
            a.sync()
        a.restart()
        a.wire.before = lambda request: None
        a.sync()
        assert a.values("tasks") == world.values("tasks") == {1: "x", 2: "x", 7: "again", 8: "mine"}
        assert a.values() == world.values()
        assert_sound(a.db, world.server)
    assert at > 1


@pytest.mark.parametrize("kind", [PullRequest, PushRequest])
@pytest.mark.parametrize("wider", [["notes", "tasks"], None])
def test_r31_widening_while_an_answer_is_on_its_way_is_not_forgotten(
    kind: type, wider: list[str] | None
) -> None:
    world, a = scoped()
    a.sync()
    a.restart(collections=None)
    world.put(("notes", 3, "x"))
    a.put(("notes", 4, "mine"))
    once = [True]

    def widen(request: SyncRequest) -> None:
        if isinstance(request, kind) and once:
            once.clear()
            a.db.set_scope(wider)

    a.wire.after = widen
    with contextlib.suppress(SyncStateError):
        a.sync()
    a.settle()
    a.sync()
    assert a.values("tasks") == {1: "x"}
    assert a.values() == world.values()
    assert_sound(a.db, world.server)


def test_r31_widening_during_a_first_sync_is_not_forgotten() -> None:
    _world, a = scoped()
    once = [True]

    def widen(request: SyncRequest) -> None:
        if isinstance(request, PullRequest) and once:
            once.clear()
            a.db.set_scope(["notes", "tasks"])

    a.wire.after = widen
    with contextlib.suppress(SyncStateError):
        a.sync()
    a.sync()
    assert a.values("tasks") == {1: "x"}
    assert_sound(a.db)


def test_r31_a_widening_below_the_floor_resets() -> None:
    from entidb.db import purge_tombstones

    world, a = scoped()
    a.sync()
    world.put(("notes", 1, None), ("tasks", 1, None))
    purge_tombstones(world.server, 1000)
    a.db.set_scope(["notes", "tasks"])
    a.settle()
    assert (a.values(), a.values("tasks")) == ({2: "x"}, {})
    assert_sound(a.db)


# ---------------------------------------------------------------- narrowing


def test_r31_narrowing_is_refused_while_something_is_pending() -> None:
    a = World().device()
    a.put(("tasks", 1, "mine"))
    with pytest.raises(ScopeError) as caught:
        a.db.set_scope(["notes"])
    assert caught.value.code == "scope_pending"
    assert a.db.scope is None
    a.sync()
    a.db.set_scope(["notes"])
    assert a.db.scope == frozenset({"notes"})


def test_r31_narrowing_keeps_the_data_and_widening_again_catches_up() -> None:
    world = World()
    a = world.device()
    world.put(("notes", 1, "x"), ("tasks", 1, "x"), ("tasks", 2, "x"))
    a.sync()
    a.db.set_scope(["notes"])
    a.sync()
    assert a.values("tasks") == {1: "x", 2: "x"}
    world.put(("tasks", 1, "changed"), ("tasks", 2, None), ("tasks", 3, "new"))
    a.sync()
    assert a.values("tasks") == {1: "x", 2: "x"}
    a.db.set_scope(None)
    a.settle()
    assert a.values("tasks") == {1: "changed", 3: "new"}
    assert_in_step(world, a)


def test_r31_changes_made_outside_the_scope_are_pushed_after_widening() -> None:
    world = World()
    a = world.device(default_policy="client_wins")
    world.put(("tasks", 1, "x"), ("tasks", 2, "x"))
    a.sync()
    a.db.set_scope(["notes"])
    a.put(("tasks", 1, "mine"), ("tasks", 3, "mine"))
    a.db.set_scope(["notes", "tasks"])
    a.settle()
    assert world.values("tasks") == {1: "mine", 2: "x", 3: "mine"}
    assert a.values("tasks") == world.values("tasks")
    assert_sound(a.db, world.server)


def test_r31_changing_the_scope_during_a_staged_pull_forgets_the_stage() -> None:
    world = World()
    for n in range(10):
        world.put(("notes", n, "x"), ("tasks", n, "x"))
    a = world.device(pull_operations_max=2)
    a.wire.after = lose(PullRequest, times=1)
    with pytest.raises(TransportError):
        a.sync()
    a.sync()
    world.put(("notes", 1, "y"), ("tasks", 1, "y"))
    a.db.set_scope(["notes"])
    a.sync()
    a.db.set_scope(None)
    a.sync()
    assert_in_step(world, a)


# ---------------------------------------------------------------- permissions


def test_r31_a_token_for_one_collection_shows_that_one_only() -> None:
    world = World()
    world.put(("notes", 1, "x"), ("secrets", 1, "canary"))
    a = world.device()
    a.wire.grant = Grant("someone", True, True, frozenset({"notes"}))
    a.sync()
    assert a.db.collections() == ["notes"]
    assert a.state.cursor == 1


def test_r31_writing_what_the_token_does_not_grant_is_withdrawn() -> None:
    world = World()
    a = world.device()
    a.wire.grant = Grant("someone", True, True, frozenset({"notes"}))
    a.put(("notes", 1, "x"), ("secrets", 1, "x"))
    a.put(("notes", 2, "x"))
    a.sync()
    assert [gone.code for gone in a.engine.discarded()] == ["forbidden"]
    assert world.values() == {2: "x"}
    assert world.server.collections() == ["notes"]
    assert_in_step(world, a)


def test_r31_a_scope_widened_between_a_pull_and_the_push_after_it_is_still_pulled() -> None:
    world = World()
    world.put(("other", 9, "theirs"))
    a = world.device(collections=("notes",))
    a.sync()
    a.put(("notes", 1, "mine"))
    a.sync()
    a.sync()  # the pull confirms the device's own commit, and nothing is stored yet (R10)
    a.db.set_scope(["notes", "other"])
    a.put(("notes", 2, "mine"))
    assert a.engine.applier.prepare(BatchLimits()) is not None
    assert a.state.uncovered == ["other"]
    a.sync()
    assert a.values("other") == {9: "theirs"}
    assert_in_step(world, a)


# ---------------------------------------------------------------- scopes that change in a cycle


def test_r31_a_scope_narrowed_while_a_widening_pulls_changes_leaves_no_table_behind() -> None:
    world = World()
    a = world.device()
    a.db.declare_local("drafts")
    world.put(("notes", 1, "x"))
    a.sync()
    a.db.declare_local("drafts", False)

    def during_pulls(request: SyncRequest) -> None:
        if isinstance(request, PullRequest) and len(a.wire.pulls()) == before + 1:
            world.put(("notes", 2, "y"))
        if isinstance(request, PullRequest) and len(a.wire.pulls()) == before + 2:
            # "drafts" has come in; what changed in the others since is on its way.
            a.db.declare_local("drafts")

    before = len(a.wire.pulls())
    a.wire.after = during_pulls
    with contextlib.suppress(SyncStateError):
        a.sync()
    a.settle()
    assert_sound(a.db, world.server)


def widen_after_looking(device: Device, names: list[str]) -> None:
    """Another thread widens the scope when the cycle has just looked for what to make pending."""
    look = device.engine.applier.look
    once = [True]

    def look_and_widen() -> Look:
        found = look()
        if once:
            once.clear()
            device.db.set_scope(names)
        return found

    device.engine.applier.look = look_and_widen  # type: ignore[method-assign]


def test_r31_what_was_written_outside_a_scope_survives_a_first_pull_that_brings_the_same() -> None:
    world = World()
    world.put(("tasks", 1, "theirs"))
    a = world.device(collections=("notes",))
    a.put(("tasks", 1, "mine"))
    widen_after_looking(a, ["notes", "tasks"])
    with contextlib.suppress(SyncStateError):
        a.sync()
    a.settle()
    mine = [payload for gone in a.engine.discarded() for _, _, payload in gone.operations]
    assert a.values("tasks") == {1: "mine"} or mine, "R4: it is gone without a trace"


def test_r31_widening_before_a_pull_of_a_cycle_meets_what_the_server_has_as_a_conflict() -> None:
    world = World()
    a = world.device(collections=("notes",))
    a.sync()
    world.put(("tasks", 1, "theirs"), ("notes", 1, "x"))
    a.sync()
    a.put(("tasks", 1, "mine"))
    widen_after_looking(a, ["notes", "tasks"])
    results = []
    with contextlib.suppress(SyncStateError):
        results.append(a.sync())
    results.append(a.sync())
    met = [resolved.conflict.kind for result in results for resolved in result.conflicts]
    assert met == ["create/create"]
    assert world.values("tasks") == {1: "theirs"}


# ---------------------------------------------------------------- another history outside the scope


def out_of_scope_in_a_reset(policy: str, *more: str) -> tuple[World, Device]:
    """A device that took in another history while "tasks", and ``more``, were not in its scope:
    its row of tasks 1 is of the last version of the lost one, and that of the server with the
    same version is somebody else's."""
    world = World()
    a = world.device(default_policy=policy)
    for name in ("tasks", "notes", *more):
        world.put((name, 1, "old"))
    backup = world.backup_server()
    world.put(("tasks", 1, "lost"))
    a.sync()
    a.db.set_scope(["notes"])
    world.open_server(backup)
    world.put(("tasks", 1, "theirs"))
    world.put(("notes", 2, "theirs"))
    a.engine.reset("server")
    a.sync()
    assert a.values("tasks") == {1: "lost"}
    assert a.state.foreign_names == [*more, "tasks"]
    return world, a


@pytest.mark.parametrize("policy", ["server_wins", "client_wins"])
def test_r29_what_a_reset_did_not_cover_is_compared_by_bytes_when_the_scope_widens(
    policy: str,
) -> None:
    world, a = out_of_scope_in_a_reset(policy)
    a.db.set_scope(None)
    a.put(("tasks", 1, "mine"))
    result = a.sync()
    (resolved,) = result.conflicts
    assert (resolved.conflict.base, resolved.conflict.remote) == ("lost", "theirs")
    a.settle()
    assert world.values("tasks") == {1: "theirs" if policy == "server_wins" else "mine"}
    assert len(a.engine.discarded()) == (policy == "server_wins")
    assert a.state.foreign_names == []
    assert_in_step(world, a)


def test_r29_what_a_reset_did_not_cover_is_replaced_though_it_seems_newer() -> None:
    world, a = out_of_scope_in_a_reset("server_wins")
    a.db.set_scope(None)
    a.sync()
    assert a.values("tasks") == {1: "theirs"}
    assert_in_step(world, a)


def test_r29_nothing_is_pushed_that_is_built_on_another_history() -> None:
    world, a = out_of_scope_in_a_reset("server_wins")
    a.db.set_scope(None)
    a.put(("tasks", 1, "mine"))
    # As between the pull and the push of a cycle that knew nothing of it.
    assert a.engine.applier.prepare(BatchLimits(100, 10_000)) is None
    a.settle()
    assert world.values("tasks") == {1: "theirs"}


def test_r29_what_is_foreign_out_of_scope_or_gone_keeps_nothing_else_back() -> None:
    world, a = out_of_scope_in_a_reset("server_wins")
    with a.db.write() as writer:
        writer.set_sync_state(replace(writer.sync_state, foreign_names=["never made", "tasks"]))
    a.put(("notes", 3, "mine"))
    assert a.engine.applier.prepare(BatchLimits(100, 10_000)) is not None
    a.settle()
    assert world.values()[3] == "mine"


def test_r29_foreign_collections_are_named_in_order() -> None:
    _, a = out_of_scope_in_a_reset("server_wins", "lists")
    assert a.state.foreign_names == ["lists", "tasks"]


def test_r29_foreign_collections_are_remembered_over_another_reset_and_narrowing() -> None:
    world, a = out_of_scope_in_a_reset("server_wins")
    a.engine.reset("server")
    a.sync()
    assert a.state.foreign_names == ["tasks"]
    a.db.set_scope(["tasks"])
    assert a.state.foreign_names == ["tasks"]
    a.db.set_scope(["notes"])
    a.sync()
    assert a.state.foreign_names == ["tasks"]
    a.db.set_scope(["tasks"])
    a.sync()
    assert a.values("tasks") == {1: "theirs"}
    # "notes" was taken in from this history before it left the scope.
    assert a.state.foreign_names == []
    world.put(("notes", 1, "changed"))
    a.db.set_scope(None)
    a.sync()
    assert_in_step(world, a)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 2000])
def test_r31_what_was_one_transaction_becomes_pending_as_one_in_commits_of_any_size(rows: int):
    world = World()
    a = world.device(collections=("notes",))
    for first in (0, 3, 6):
        a.put(*[("tasks", first + n, f"of {first}") for n in range(3)])
    a.put(("tasks", 9, "alone"))
    a.db.set_scope(None)
    while adopt_step(a.db, rows=rows):
        pass
    pending = list(a.engine.applier.pending())
    assert [[op.entity_id[-1] for op in each.operations] for each in pending] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9],
    ]
    a.settle()
    assert_in_step(world, a)
