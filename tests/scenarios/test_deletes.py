"""Deletions: against updates, behind the floor, and that they do not come back."""

from __future__ import annotations

from typing import Any

import pytest

from entidb.db import purge_tombstones
from entidb.errors import TransportError
from entidb.protocol import PushRequest
from entidb.sync import Conflict, ConflictResolution, Merge
from tests.support import Device, World, assert_in_step, lose

NEW: dict[str, Any] = {"text": "new"}


def raises(conflict: Conflict) -> ConflictResolution:
    raise ValueError("I do not know either")


#: What the one who syncs second, and so meets the conflict, makes of it.
POLICIES: dict[str, tuple[Any, str]] = {
    "server_wins": ("server_wins", "theirs"),
    "client_wins": ("client_wins", "mine"),
    "last_write_wins": ("last_write_wins", "later"),
    "merge": ("merge", "theirs"),
    "merge, else mine": (Merge("client_wins"), "mine"),
    "merge, else the later": (Merge("last_write_wins"), "later"),
    "merge, else a person": (Merge("manual"), "held"),
    "manual": ("manual", "held"),
    "a function": (lambda conflict: ConflictResolution.keep_local(), "mine"),
    "a function that raises": (raises, "held"),
}


@pytest.mark.parametrize("deleted_last", [False, True], ids=["update is later", "delete is later"])
@pytest.mark.parametrize("deleter_first", [False, True], ids=["update first", "delete first"])
@pytest.mark.parametrize("name", POLICIES)
def test_delete_against_update_ends_as_the_policy_says_whoever_comes_first(
    name: str, deleter_first: bool, deleted_last: bool
):
    policy, outcome = POLICIES[name]
    world = World()
    world.put(("notes", 1, {"text": "old"}))
    deleter, updater = (world.device(default_policy=policy) for _ in range(2))
    for device, later in ((deleter, deleted_last), (updater, not deleted_last)):
        device.sync()
        device.clock.ms += 2000 if later else 1000
    world.clock.ms += 10_000
    deleter.put(("notes", 1, None))
    updater.put(("notes", 1, NEW))
    first, second = (deleter, updater) if deleter_first else (updater, deleter)
    first.sync()
    result = second.sync()
    theirs, mine = ({}, {1: NEW}) if deleter_first else ({1: NEW}, {})
    kind = "update/delete" if deleter_first else "delete/update"
    if outcome == "held":
        [conflict] = second.engine.conflicts()
        assert (conflict.kind, second.values(), world.values()) == (kind, mine, theirs)
        second.engine.resolve(conflict, "mine")
        expected = mine
    else:
        assert [resolved.conflict.kind for resolved in result.conflicts] == [kind]
        second_is_later = deleted_last is not deleter_first
        wins = {"later": "mine" if second_is_later else "theirs"}.get(outcome, outcome)
        expected = mine if wins == "mine" else theirs
        assert len(second.engine.discarded()) == (wins == "theirs")
    for device in (second, first):
        device.settle()
    assert world.values() == expected
    assert_in_step(world, first, second)


# ---------------------------------------------------------------- behind the floor


def away(pages: int, policy: str) -> tuple[World, Device, Device]:
    """A device that was away while notes 1 to 4 were deleted and purged; and one that was not."""
    world = World()
    config: dict[str, Any] = {"pull_operations_max": 1} if pages > 1 else {}
    a = world.device(default_policy=policy, **config)
    b = world.device()
    world.put(*[("notes", n, {"text": "old"}) for n in range(1, 5)])
    world.put(("notes", 9, {"text": "stays"}))
    a.sync()
    b.sync()
    b.put(*[("notes", n, None) for n in range(1, 5)])
    b.sync()
    purge_tombstones(world.server, world.server.sequence)
    return world, a, b


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("policy", ["client_wins", "server_wins", "manual", "merge"])
def test_behind_the_floor_creates_updates_and_deletes_of_purged_ids_meet_a_deletion(
    policy: str, pages: int
):
    world, a, b = away(pages, policy)
    a.put(("notes", 1, None))
    a.put(("notes", 1, {"text": "created again"}))
    updated = a.put(("notes", 2, {"text": "updated"}))
    a.put(("notes", 3, None))
    a.put(("notes", 50, {"text": "all new"}))
    result = a.sync()
    assert result.reset
    # Both deleted it (R24), so making note 1 anew overwrites nobody, whatever the policy.
    kept = {1: {"text": "created again"}, 9: {"text": "stays"}, 50: {"text": "all new"}}
    mine = {2: {"text": "updated"}}
    if policy == "manual":
        assert (a.values(), world.values()) == (kept | mine, kept)
        [conflict] = a.engine.conflicts()
        assert (conflict.kind, conflict.remote) == ("update/delete", None)
        a.engine.resolve(conflict, "mine")
    a.settle()
    if policy in ("client_wins", "manual"):
        assert (world.values(), a.engine.discarded()) == (kept | mine, [])
    else:
        assert world.values() == kept
        assert [discarded.id for discarded in a.engine.discarded()] == [updated]
    assert not any(a.sync().reset for _ in range(3))
    b.settle()
    assert_in_step(world, a, b)


# ---------------------------------------------------------------- that they do not come back


@pytest.mark.parametrize("purged", [False, True])
@pytest.mark.parametrize("policy", ["server_wins", "client_wins"])
def test_a_delete_does_not_come_back_with_a_device_put_back_from_before_it(
    policy: str, purged: bool
):
    world = World()
    a, b = world.device(default_policy=policy), world.device(default_policy=policy)
    a.put(*[("notes", n, {"text": "old"}) for n in range(6)])
    a.sync()
    b.sync()
    old_a, old_b = a.copy(), b.copy()
    b.put(*[("notes", n, None) for n in range(5)])
    b.sync()
    a.sync()
    if purged:
        purge_tombstones(world.server, world.server.sequence)
    for device in (old_a, old_b):
        device.put(("other", device.seed, "something else"))
        for _ in range(2):
            device.sync()
        assert device.values() == {5: {"text": "old"}}
    for device in (a, b, old_a, old_b):
        device.sync()
    assert world.values() == {5: {"text": "old"}}
    assert_in_step(world, a, b, old_a, old_b)


def test_a_delete_whose_answer_was_lost_does_not_come_back():
    world = World()
    a, b = world.device(), world.device()
    a.put(("notes", 1, {"text": "old"}))
    a.sync()
    b.sync()
    a.put(("notes", 1, None))
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    assert world.values() == {}
    b.sync()
    a.restart()
    a.settle()
    for device in (b, a):
        device.sync()
    assert (world.values(), a.values(), b.values()) == ({}, {}, {})
    assert_in_step(world, a, b)
