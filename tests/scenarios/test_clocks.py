"""Clocks that are wrong by an hour and by ten years: only ``last_write_wins`` looks at them."""

from __future__ import annotations

from typing import Any

import pytest

from entidb.types import timestamp_from_ms
from tests.support import World, assert_in_step, uid

HOUR_MS = 3600 * 1000
TEN_YEARS_MS = 10 * 365 * 24 * HOUR_MS
OFFSETS = {
    "an hour fast": HOUR_MS,
    "an hour slow": -HOUR_MS,
    "ten years fast": TEN_YEARS_MS,
    "ten years slow": -TEN_YEARS_MS,
}
each_offset = pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)


@each_offset
@pytest.mark.parametrize("policy", ["server_wins", "client_wins", "merge"])
def test_a_wrong_clock_changes_nothing_where_time_decides_nothing(policy: str, offset: int):
    ends: list[Any] = []
    for wrong in (0, offset):
        world = World()
        world.put(("notes", 1, {"n": 0}))
        a, b = world.device(default_policy=policy), world.device(default_policy=policy)
        a.sync()
        b.sync()
        a.clock.ms += wrong
        a.put(("notes", 1, {"n": 0, "a": 1}), ("notes", 2, "a"))
        b.put(("notes", 1, {"n": 0, "b": 1}), ("notes", 3, "b"))
        for device in (a, b, a):
            device.settle()
        assert_in_step(world, a, b)
        lost = [[g.code for g in device.engine.discarded()] for device in (a, b)]
        ends.append((world.values(), world.server.sequence, lost))
    assert ends[0] == ends[1]


@each_offset
@pytest.mark.parametrize("on_server", [False, True], ids=["device", "server"])
def test_after_a_wrong_clock_is_set_right_later_writes_win_again(offset: int, on_server: bool):
    world = World()
    world.put(("notes", 1, "old"))
    a, b = (world.device(default_policy="last_write_wins") for _ in range(2))
    for device in (a, b):
        device.sync()
    wrong = world.clock if on_server else a.clock
    wrong.ms += offset
    a.put(("notes", 1, "a, with the wrong clock"))
    a.settle()
    b.settle()
    wrong.ms -= offset
    # Everybody's clock is right, and b writes after it has seen what a wrote; then a after b.
    for device, value in ((b, "b, later"), (a, "a, latest")):
        for clock in (world.clock, a.clock, b.clock):
            clock.ms += 60_000
        device.sync()
        device.put(("notes", 1, value))
        device.settle()
    b.sync()
    assert world.values() == {1: "a, latest"}
    assert (a.engine.discarded(), b.engine.discarded()) == ([], [])
    assert_in_step(world, a, b)


@each_offset
def test_of_two_writes_nobody_saw_the_clock_decides_and_the_loser_is_told(offset: int):
    world = World()
    world.put(("notes", 1, "old"))
    a, b = (world.device(default_policy="last_write_wins") for _ in range(2))
    for device in (a, b):
        device.sync()
        device.clock.ms += 60_000
    world.clock.ms += 120_000
    a.clock.ms += offset
    a.put(("notes", 1, "a"))
    b.put(("notes", 1, "b"))
    a.sync()
    b.settle()
    a.sync()
    winner, loser = ("a", b) if offset > 0 else ("b", a)
    assert world.values() == {1: winner}
    # a's write was on the server already when b's came over it, so a has nothing to list.
    assert len(b.engine.discarded()) == (loser is b)
    assert_in_step(world, a, b)


@each_offset
def test_no_timestamp_is_ever_later_than_the_servers_clock(offset: int):
    world = World()
    a, b = world.device(), world.device()
    a.sync()
    a.clock.ms += offset
    a.put(("notes", 1, "a"))
    a.sync()
    b.sync()
    [stamp] = {event.timestamp for event in b.db.changes() if event.entity_id == uid(1)}
    assert stamp <= timestamp_from_ms(world.clock.ms) | 0xFFFF
    assert_in_step(world, a, b)
