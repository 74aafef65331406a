"""Thousands of collections: what fits, what is told of the rest, and that it stops nothing else."""

from __future__ import annotations

import pytest

from entidb.db import catalogue
from entidb.protocol import LIMITS, HandshakeResponse, PullRequest, PullResponse, Verdict
from entidb.server.pages import PAGE_NAMES_MAX, READ_ROWS_MAX
from entidb.types import COLLECTIONS_MAX
from tests.support import GRANT, Device, World, assert_in_step, uid


def fill(device: Device, prefix: str, count: int) -> None:
    with device.db.transaction() as tx:
        for number in range(count):
            tx.collection(f"{prefix}{number}")[uid(1)] = number


def test_two_devices_with_six_hundred_collections_each_get_all_of_them() -> None:
    world = World()
    a, b = world.device(), world.device()
    fill(a, "a", 600)
    fill(b, "b", 600)
    for device in (a, b, a):
        result = device.sync()
        assert (result.withdrawn, device.pending) == ([], 0)
    assert len(world.server.collections()) == 1200
    assert_in_step(world, a, b)


def test_local_collections_of_a_device_do_not_keep_others_out() -> None:
    world = World()
    a, b = world.device(), world.device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "COLLECTIONS_MAX", 50)
        for number in range(40):
            a.db.declare_local(f"local{number}")
            a.db.collection(f"local{number}")[uid(1)] = number
        fill(b, "b", 45)
        b.sync()
        a.sync()
        fill(a, "a", 5)
        a.sync()
    assert (len(world.server.collections()), a.pending) == (50, 0)


def test_r15_what_does_not_fit_gets_a_verdict_of_its_own_and_stops_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    a, b = world.device(), world.device()
    fill(b, "b", 28)
    b.sync()
    monkeypatch.setattr(catalogue, "COLLECTIONS_MAX", 30)
    for number in range(4):
        a.put((f"new{number}", 1, "v"), ("b1", 10 + number, "with it"))
    a.put(("b2", 7, "beside"))
    world.put(("b3", 9, "theirs"))
    result = a.sync()
    assert [gone.code for gone in result.withdrawn] == ["too_many_collections"] * 2
    assert "new2" in result.withdrawn[0].message
    assert [gone.values()[1] for gone in a.engine.discarded()] == [
        ("new2", uid(1), "v"),
        ("new3", uid(1), "v"),
    ]
    assert (result.pushed, a.pending, a.values("b3")) == (3, 0, world.values("b3"))
    assert world.values("b2") == {1: 2, 7: "beside"}


def test_a_device_that_is_full_of_its_own_pulls_what_the_server_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    a, b = world.device(), world.device()
    fill(b, "b", 20)
    b.sync()
    monkeypatch.setattr(catalogue, "COLLECTIONS_MAX", 25)
    fill(a, "a", 25)
    result = a.sync()
    assert result.pulled == 20
    assert [gone.code for gone in result.withdrawn] == ["too_many_collections"]
    assert (a.pending, a.values("b19")) == (0, {1: 19})
    world.put(("b19", 2, "later"))
    a.sync()
    assert a.values("b19") == {1: 19, 2: "later"}


def test_the_handshake_says_how_many_collections_a_database_holds() -> None:
    world = World()
    a = world.device()
    a.sync()
    welcome = next(r for r in a.wire.responses if isinstance(r, HandshakeResponse))
    assert welcome.limits.database_collections_max == COLLECTIONS_MAX > 60_000


@pytest.mark.parametrize("columns", [False, True])
def test_no_page_names_more_collections_than_a_device_takes(columns: bool) -> None:
    world = World()
    for first in range(0, 6000, 2000):
        with world.server.transaction() as tx:
            for number in range(first, first + 2000):
                tx.collection(f"c{number}")[uid(1)] = number
    cursor, names, pages = 0, set[str](), 0
    while True:
        answer = world.service.pull(
            PullRequest(
                db_id="shop",
                device_id=bytes(16),
                history=world.server.history or b"",
                cursor=cursor,
                limit=100_000,
                bytes_max=1 << 26,
                full=True,
                columns=columns,
            ),
            GRANT,
        )
        assert isinstance(answer, PullResponse)
        assert 0 < len(answer.collections) <= LIMITS.collections_max
        names.update(answer.collections)
        cursor, pages = answer.cursor, pages + 1
        if not answer.has_more:
            break
    assert (len(names), pages) == (6000, 3)
    assert LIMITS.collections_max > PAGE_NAMES_MAX + 2048 + READ_ROWS_MAX
    a = world.device()
    a.sync()
    assert_in_step(world, a)


def test_a_batch_names_no_more_collections_than_a_message_may() -> None:
    world = World()
    a = world.device()
    for first in range(0, 5000, 100):
        fill_from(a, first, 100)
    a.sync()
    assert max(len(push.collections) for push in a.wire.pushes()) <= LIMITS.collections_max
    assert len(a.wire.pushes()) > 1
    assert a.pending == 0
    assert all(
        result.verdict == Verdict.ACCEPTED
        for response in a.wire.responses
        for result in getattr(response, "results", [])
    )
    assert_in_step(world, a)


def fill_from(device: Device, first: int, count: int) -> None:
    with device.db.transaction() as tx:
        for number in range(first, first + count):
            tx.collection(f"c{number}")[uid(1)] = number
