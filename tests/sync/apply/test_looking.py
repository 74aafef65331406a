"""One look at the disk for each step of a cycle, and none while nothing was committed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from entidb.errors import StorageError
from entidb.protocol import PullRequest
from entidb.storage import Snapshot
from entidb.sync.apply.look import look_at
from entidb.sync.apply.seam import Look
from tests.support import Device, World


class Looks:
    """How many snapshots of a device's store were taken."""

    def __init__(self, device: Device) -> None:
        self.count = 0
        self._snapshot: Callable[[], Snapshot] = device.storage.inner.snapshot
        device.storage.inner.snapshot = self.snapshot  # type: ignore[method-assign]

    def snapshot(self) -> Snapshot:
        self.count += 1
        return self._snapshot()

    def during(self, action: Callable[[], object]) -> int:
        before = self.count
        action()
        return self.count - before


@pytest.fixture
def device() -> Device:
    device = World().device()
    device.put(("notes", 1, "old"))
    device.settle()
    return device


def test_r10_a_cycle_with_nothing_to_do_looks_once_and_the_next_one_not_at_all(
    device: Device,
) -> None:
    looks = Looks(device)
    device.db.declare_local("elsewhere")
    assert looks.during(device.sync) == 1
    assert looks.during(device.sync) == 0
    assert device.sync().requests == 1


def test_a_pushed_change_takes_one_look_and_two_commits(device: Device) -> None:
    looks = Looks(device)
    device.put(("notes", 1, "new"))
    commits = device.storage.commits
    assert looks.during(device.sync) == 3
    assert device.storage.commits == commits + 2


def test_r8_what_is_committed_during_the_request_of_a_cycle_is_seen_by_its_next_step(
    device: Device,
) -> None:
    def commit_once(request: object) -> None:
        if isinstance(request, PullRequest):
            device.wire.after = lambda request: None
            device.put(("notes", 2, "meanwhile"))

    device.wire.after = commit_once
    device.sync()
    assert device.pending == 0
    assert device.world.values() == {1: "old", 2: "meanwhile"}


def test_r17_after_a_commit_that_failed_the_device_is_read_again(device: Device) -> None:
    before = device.engine.applier.look()
    assert device.engine.applier.look() is before
    device.storage.fail_next(after=True, error=StorageError("no"))
    with pytest.raises(StorageError):
        device.put(("notes", 2, "there all the same"))
    now = device.engine.applier.look()
    assert (before.ready, now.ready) == (0, 1)
    assert now.sequence == before.sequence + 1


def compared(device: Device) -> list[bool]:
    """Whether each look from now on was known before; each is compared with the store."""
    applier, known = device.engine.applier, list[bool]()
    look = applier.look

    def look_and_compare() -> Look:
        before = applier._look
        found = look()
        known.append(found is before)
        stored = look_at(device.db)
        assert replace(found, moment=stored.moment) == stored
        return found

    applier.look = look_and_compare  # type: ignore[method-assign]
    return known


def test_what_is_known_after_own_commits_is_what_the_store_holds(device: Device) -> None:
    known = compared(device)
    for turn in range(3):
        device.put(("notes", 1, f"mine {turn}"))
        device.sync()
        device.world.put(("notes", 1, f"theirs {turn}"), ("tasks", turn, "new"))
        device.put(("notes", 1, "at the same time"), ("notes", 2 + turn, "more"))
        device.sync()
        device.sync()
    # In each of those cycles once after what was committed outside of it, or twice.
    assert known.count(False) < known.count(True) / 2
    assert device.pending == 0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
def test_r17_after_a_commit_of_a_cycle_that_failed_nothing_is_known_of_it(
    device: Device, nth: int, after: bool
) -> None:
    known = compared(device)
    device.put(("notes", 1, "new"))
    device.storage.fail(nth, after=after, error=StorageError("no"))
    with pytest.raises(StorageError):
        device.sync()
    known.clear()
    device.engine.applier.look()
    assert known == [False]
    device.settle()
    assert device.world.values() == {1: "new"}
