"""Two versions of a program on two devices: the older one does not know a field of the newer."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support import World, uid


@dataclasses.dataclass
class Older:
    title: str


@dataclasses.dataclass
class Newer:
    title: str
    photos: list[str] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize("policy", ["server_wins", "client_wins", "last_write_wins", "merge"])
def test_an_older_program_does_not_erase_a_newer_ones_field_anywhere(policy: str):
    world = World()
    new, old = (world.device(default_policy=policy) for _ in range(2))
    new.db.collection("notes", Newer)[uid(1)] = Newer("crack", ["p1", "p2"])
    new.settle()
    old.settle()
    notes = old.db.collection("notes", Older)
    notes[uid(1)] = dataclasses.replace(notes[uid(1)], title="crack, checked")
    old.settle()
    new.settle()
    assert new.db.collection("notes", Newer)[uid(1)] == Newer("crack, checked", ["p1", "p2"])
    assert not new.pending and not old.pending


def test_what_both_change_at_once_is_merged_field_by_field():
    world = World()
    new, old = (world.device(default_policy="merge") for _ in range(2))
    newer, older = new.db.collection("notes", Newer), old.db.collection("notes", Older)
    newer[uid(1)] = Newer("t", ["p1"])
    new.settle()
    old.settle()
    older.patch(uid(1), title="t2")
    newer.patch(uid(1), photos=["p1", "p2"])
    for device in (old, new, old):
        device.settle()
    assert newer[uid(1)] == Newer("t2", ["p1", "p2"])
    assert old.db.collection("notes")[uid(1)] == {"title": "t2", "photos": ["p1", "p2"]}
