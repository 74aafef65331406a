"""What was in flight when a device went away, was accepted, deleted by somebody, and forgotten by
the server, does not come back with the device (R28)."""

from __future__ import annotations

from typing import Any

import pytest

from entidb.db import purge_tombstones
from entidb.errors import HistoryChangedError, TransportError
from entidb.protocol import PushRequest
from entidb.sync import ConflictResolution, Merge
from tests.support import Device, World, assert_in_step, lose, uid


def purge(world: World) -> None:
    purge_tombstones(world.server, world.server.sequence)


def gone_world(*, seen: bool = True, pages: int = 1, **config: Any) -> tuple[World, Device]:
    """A device whose creation of note 1 was accepted without its hearing of it; the note was
    deleted since, and the server has forgotten both."""
    world = World()
    f = world.device(**({"pull_operations_max": 2 if pages > 1 else 5000} | config))
    if seen:
        world.put(*[("notes", n, "old") for n in (7, 8, 9)])
    f.sync()
    f.put(("notes", 1, {"text": "f's"}))
    f.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        f.sync()
    assert world.values()[1] == {"text": "f's"}
    world.put(("notes", 1, None))
    world.put(("notes", 2, "newer"))
    purge(world)
    return world, f


PAGES = pytest.mark.parametrize("pages", [1, 3])
RESTART = pytest.mark.parametrize("restart", [False, True])


@PAGES
@RESTART
@pytest.mark.parametrize("seen", [True, False])
def test_r28_a_creation_that_was_in_flight_does_not_undo_its_deletion(
    pages: int, restart: bool, seen: bool
) -> None:
    world, f = gone_world(pages=pages, seen=seen)
    if restart:
        f.restart()
    result = f.sync()
    assert 1 not in world.values()
    [withdrawn] = result.withdrawn
    assert withdrawn.code == "conflict"
    [discarded] = f.engine.applier.discarded()
    assert discarded.values() == [("notes", uid(1), {"text": "f's"})]
    f.sync()
    assert f.state.unsettled == []
    assert_in_step(world, f)


def test_r28_what_was_written_on_top_of_it_goes_with_it() -> None:
    world, f = gone_world()
    f.put(("notes", 1, {"text": "later"}), ("notes", 3, "with it"))
    f.put(("notes", 4, "by itself"))
    result = f.sync()
    assert [each.code for each in result.withdrawn] == ["conflict", "conflict"]
    assert world.values() == {2: "newer", 4: "by itself", 7: "old", 8: "old", 9: "old"}
    assert_in_step(world, f)


@pytest.mark.parametrize("policy", ["client_wins", Merge("client_wins")])
def test_r28_a_policy_may_bring_it_back_and_is_asked_whole(policy: Any) -> None:
    world, f = gone_world(default_policy=policy)
    [resolved] = f.sync().conflicts
    conflict = resolved.conflict
    assert (conflict.base, conflict.local, conflict.remote) == (None, {"text": "f's"}, None)
    f.settle()
    assert world.values()[1] == {"text": "f's"}
    assert_in_step(world, f)


@pytest.mark.parametrize(
    "policy", ["server_wins", Merge("server_wins"), Merge("server_wins", counters=["n"])]
)
def test_r28_and_a_merge_does_not_take_absence_for_nothing_changed(policy: Any) -> None:
    world, f = gone_world(default_policy=policy)
    f.sync()
    assert 1 not in world.values()
    assert len(f.engine.applier.discarded()) == 1
    assert_in_step(world, f)


def test_r28_or_a_person_decides() -> None:
    world, f = gone_world(default_policy="manual")
    f.sync()
    [conflict] = f.engine.conflicts()
    assert 1 not in world.values()
    f.engine.resolve(conflict, ConflictResolution.accept_remote())
    f.settle()
    assert 1 not in world.values()
    assert_in_step(world, f)


def test_r28_what_was_never_in_flight_is_no_conflict() -> None:
    world = World()
    f = world.device()
    world.put(*[("notes", n, "old") for n in (7, 8, 9)])
    f.sync()
    f.put(("notes", 1, "offline for a year"))
    world.put(("notes", 8, None))
    purge(world)
    result = f.sync()
    assert result.reset
    assert (result.conflicts, result.withdrawn) == ([], [])
    assert world.values()[1] == "offline for a year"
    assert_in_step(world, f)


def test_r28_what_was_in_flight_and_is_still_there_is_done() -> None:
    world = World()
    f = world.device()
    world.put(("notes", 9, "old"))
    f.sync()
    f.put(("notes", 1, "f's"), ("notes", 3, "f's too"))
    f.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        f.sync()
    world.put(("notes", 9, None), ("notes", 3, "changed since"))
    purge(world)
    f.sync()
    assert world.values() == {1: "f's", 3: "changed since"}
    assert_in_step(world, f)


def test_r28_in_flight_above_the_floor_is_settled_as_ever() -> None:
    world = World()
    f = world.device()
    world.put(("notes", 9, "old"))
    f.sync()
    f.put(("notes", 1, "f's"))
    f.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        f.sync()
    world.put(("notes", 8, "between"))
    f.restart()
    result = f.sync()
    assert (result.pushed, result.conflicts) == (1, [])
    # And what is pending after that is no longer in doubt when a reset comes.
    f.put(("notes", 2, "later"))
    world.put(("notes", 8, None))
    purge(world)
    assert f.sync().withdrawn == []
    assert world.values()[2] == "later"
    assert_in_step(world, f)


@RESTART
def test_r28_a_reset_that_is_interrupted_remembers_it(restart: bool) -> None:
    world, f = gone_world(pages=3)
    pulls = [0]

    def cut(request: Any) -> None:
        pulls[0] += 1
        if pulls[0] > 3:
            raise TransportError("cut off")

    f.wire.before = cut
    with pytest.raises(TransportError):
        f.sync()
    f.wire.before = lambda request: None
    if restart:
        f.restart()
    f.settle()
    assert 1 not in world.values()
    assert_in_step(world, f)


def test_r29_another_history_that_has_forgotten_it_is_no_way_back_either() -> None:
    world, f = gone_world()
    world.open_server(world.backup_server())
    with pytest.raises(HistoryChangedError):
        f.sync()
    f.engine.reset(keep="server")
    f.settle()
    assert 1 not in world.values()
    assert len(f.engine.applier.discarded()) == 1
    assert_in_step(world, f)


def test_r29_a_history_that_remembers_ids_settles_what_was_in_flight() -> None:
    world = World()
    f = world.device()
    world.put(("notes", 9, "old"))
    f.sync()
    f.put(("notes", 1, "f's"))
    f.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        f.sync()
    world.put(("notes", 1, None))
    world.open_server(world.backup_server())
    with pytest.raises(HistoryChangedError):
        f.sync()
    f.engine.reset(keep="server")
    f.settle()
    assert 1 not in world.values()
    assert_in_step(world, f)


def test_r29_keeping_the_devices_side_brings_it_back_by_choice() -> None:
    world, f = gone_world()
    world.open_server(world.backup_server())
    with pytest.raises(HistoryChangedError):
        f.sync()
    f.engine.reset(keep="device")
    f.settle()
    assert world.values()[1] == {"text": "f's"}
    assert_in_step(world, f)


def test_r28_a_deletion_in_flight_of_what_is_gone_is_done() -> None:
    world, f = gone_world()
    f.put(("notes", 1, None))
    f.settle()
    assert 1 not in world.values()
    assert 1 not in f.values()
    assert_in_step(world, f)


def test_r28_what_is_written_after_another_conflict_withdrew_it_is_built_on_the_deletion() -> None:
    world = World()
    f = world.device()
    world.put(("notes", 7, "old"))
    f.sync()
    f.put(("notes", 7, "f's"), ("notes", 1, "f's"))
    f.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        f.sync()
    world.put(("notes", 7, "newer"))
    purge(world)
    world.put(("notes", 1, None))
    result = f.sync()
    assert [each.code for each in result.withdrawn] == ["conflict"]
    f.put(("notes", 1, "again"))
    result = f.sync()
    assert (result.pushed, result.conflicts) == (1, [])
    assert world.values() == {1: "again", 7: "newer"}
    assert_in_step(world, f)
