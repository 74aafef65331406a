"""A clock that was wrong once, on a device or on the server, and was put right (R27)."""

from __future__ import annotations

import pytest

from entidb.db.maintenance import CLOCK_MARK_MS, clock_mark_ms, mark_clock, sequence_at
from entidb.db.records import CLOCK_MARK, end_of
from entidb.errors import TransportError
from entidb.protocol import PushRequest
from entidb.types import ms_from_timestamp, timestamp_from_ms
from tests.support import DAY_MS, Device, World, assert_in_step, lose

CENTURY_MS = 75 * 365 * DAY_MS


def move(world: World, *devices: Device, ms: int = 1000) -> None:
    """Time goes on for everybody, those whose clock is wrong included."""
    world.clock.ms += ms
    for device in devices:
        device.clock.ms += ms


def ahead_ms(device: Device) -> int:
    return ms_from_timestamp(device.db.read_head().timestamp) - device.world.clock.ms


def two(policy: str = "last_write_wins") -> tuple[World, Device, Device]:
    world = World()
    return world, world.device(default_policy=policy), world.device(default_policy=policy)


@pytest.mark.parametrize("shift", [CENTURY_MS, DAY_MS, 5000])
def test_r27_after_one_write_in_the_future_the_later_write_wins_again(shift: int) -> None:
    world, a, b = two()
    a.clock.ms += shift
    a.put(("notes", 1, "a in the future"))
    a.sync()
    b.sync()
    a.clock.ms -= shift
    for turn in range(3):
        move(world, a, b)
        a.put(("notes", 1, f"a older {turn}"))
        move(world, a, b)
        b.put(("notes", 1, f"b newer {turn}"))
        move(world, a, b)
        for device in (b, a, b, a):
            device.sync()
        assert a.values() == b.values() == {1: f"b newer {turn}"}
        assert ahead_ms(a) <= 0
    assert_in_step(world, a, b)


def test_r27_what_waits_with_a_time_from_the_future_gets_that_of_the_server() -> None:
    world, a, b = two()
    a.sync()
    a.clock.ms += CENTURY_MS
    a.put(("notes", 1, "x"), ("notes", 2, "x"))
    a.put(("notes", 2, "y"))
    a.clock.ms -= CENTURY_MS
    move(world, a, b)
    a.put(("notes", 3, "z"))
    assert ahead_ms(a) > DAY_MS
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    latest = timestamp_from_ms(world.clock.ms) | 0xFFFF
    pending = list(a.engine.applier.pending())
    assert [transaction.timestamp <= latest for transaction in pending] == [True] * 3
    assert [event.timestamp <= latest for event in a.db.changes()] == [True] * len(pending)
    a.settle()
    assert ahead_ms(a) <= 0
    b.sync()
    assert_in_step(world, a, b)


def test_r27_what_is_in_flight_stays_as_it_was_sent() -> None:
    world, a, _ = two()
    a.clock.ms += CENTURY_MS
    a.put(("notes", 1, "x"))
    a.wire.after = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    first = a.wire.pushes()[0]
    a.clock.ms -= CENTURY_MS
    a.put(("notes", 2, "y"))
    a.settle()
    assert a.wire.pushes()[1].transactions == first.transactions
    assert ahead_ms(a) <= 0
    assert_in_step(world, a)


def test_r27_what_is_held_does_not_keep_the_clock_ahead() -> None:
    world, a, _ = two("manual")
    world.put(("notes", 1, "old"))
    a.sync()
    a.clock.ms += CENTURY_MS
    a.put(("notes", 1, "mine"))
    world.put(("notes", 1, "theirs"))
    a.sync()
    assert len(a.engine.conflicts()) == 1
    a.clock.ms -= CENTURY_MS
    move(world, a)
    a.put(("notes", 2, "by itself"))
    a.sync()
    a.put(("notes", 3, "and another"))
    a.sync()
    assert ahead_ms(a) <= 1000
    assert world.values()[3] == "and another"
    assert a.db.verify() == []


def test_r27_a_clock_in_step_costs_no_commit_more() -> None:
    world, a, b = two()
    counts = []
    for device in (a, b):
        device.sync()
        device.clock.ms += 400 if device is b else 0
        device.put(("notes", 1 if device is a else 2, "x"))
        before = device.storage.commits
        device.sync()
        counts.append(device.storage.commits - before)
    assert counts[0] <= counts[1] <= counts[0] + 1
    assert world.values() == {1: "x", 2: "x"}


def test_r27_a_slow_device_still_writes_after_what_it_has_seen() -> None:
    world, a, b = two()
    b.clock.ms -= DAY_MS
    a.put(("notes", 1, "seen"))
    a.sync()
    b.sync()
    b.put(("notes", 1, "after it"))
    seen = b.db.changes()
    assert [event.timestamp for event in seen][-1] > timestamp_from_ms(world.clock.ms) - 1
    b.sync()
    a.sync()
    assert a.values() == {1: "after it"}


# ---------------------------------------------------------------- the server's own clock


def test_r27_a_mark_of_the_server_from_the_future_wins_for_nobody() -> None:
    world, a, _ = two()
    world.clock.ms += CENTURY_MS
    world.put(("notes", 1, "written in 2100"))
    world.clock.ms -= CENTURY_MS
    world.put(("notes", 2, "written now"))
    latest = timestamp_from_ms(world.clock.ms) | 0xFFFF
    stamps = [event.timestamp for event in world.server.changes()]
    assert stamps[0] > latest
    assert stamps[1] <= latest
    a.sync()
    a.put(("notes", 1, "changed since"))
    a.sync()
    assert world.values()[1] == "changed since"
    assert [event.timestamp for event in world.server.changes()][-1] <= latest
    assert_in_step(world, a)


def test_r27_small_steps_back_of_the_servers_clock_change_no_order() -> None:
    world, _, _ = two()
    world.put(("notes", 1, "x"))
    world.clock.ms -= 5000
    world.put(("notes", 2, "x"))
    first, second = [event.timestamp for event in world.server.changes()]
    assert second > first


def test_r28_a_clock_that_was_in_2100_does_not_stop_retention() -> None:
    world, _, _ = two()

    def mark() -> None:
        with world.server.write() as writer:
            mark_clock(writer)

    world.put(("notes", 1, "x"))
    mark()
    world.clock.ms += CENTURY_MS
    world.put(("notes", 2, "x"))
    mark()
    world.clock.ms -= CENTURY_MS
    world.put(("notes", 1, None))
    mark()
    with world.server.storage.snapshot() as snapshot:
        marks = snapshot.scan_keys(CLOCK_MARK, end_of(CLOCK_MARK))
        assert [int.from_bytes(key[1:], "big") <= world.clock.ms for key in marks] == [True]
    world.clock.ms += CLOCK_MARK_MS
    world.put(("notes", 3, "x"))
    mark()
    assert sequence_at(world.server, world.clock.ms) == 4
    assert sequence_at(world.server, world.clock.ms - 1) >= 1


@pytest.mark.parametrize("retention_ms", [90 * DAY_MS, 3_600_000, 600_000, 1000, 0])
def test_r28_marks_are_fine_enough_for_the_retention(retention_ms: int) -> None:
    apart = clock_mark_ms(retention_ms)
    assert 1 <= apart <= CLOCK_MARK_MS
    assert apart <= max(1, retention_ms / 24)
