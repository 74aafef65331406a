"""Records that are gone: a cycle that notices says so, and nothing wrong is sent or stored."""

from __future__ import annotations

import pytest

from entidb.db.catalogue import empty_catalogue
from entidb.db.records import BASE, ENTITY, READY, end_of, sequence_key
from entidb.errors import CorruptionError, EntiDBError, TransportError
from entidb.protocol import PullRequest, PushRequest
from entidb.storage import Storage
from entidb.sync.apply import batch
from tests.support import Device, World, assert_in_step, lose


def lose_records(storage: Storage, prefix: bytes, last: int = 1) -> None:
    """The last records whose keys begin with ``prefix``, as a bad disk might."""
    with storage.snapshot() as snapshot:
        keys = snapshot.scan_keys(prefix, end_of(prefix), limit=last, reverse=True)
    assert keys
    storage.commit(dict.fromkeys(keys))


def dirty() -> tuple[World, Device]:
    """A device with one entity that was changed on both sides."""
    world = World()
    a = world.device(default_policy="client_wins")
    world.put(("notes", 1, "old"))
    a.sync()
    a.put(("notes", 1, "mine"))
    return world, a


#: What is gone, whether the server has changed the entity too, and whether that can be survived.
LOSSES = [
    ("row", ENTITY, False, False),
    ("outbox", READY, False, False),
    ("outbox", READY, True, False),
    ("base", BASE, False, True),
    ("base", BASE, True, False),
]


@pytest.mark.parametrize(("what", "prefix", "conflict", "survived"), LOSSES)
def test_a_device_that_misses_a_record_of_its_pending_work_sends_nothing_made_up(
    what: str, prefix: bytes, conflict: bool, survived: bool
) -> None:
    world, a = dirty()
    if conflict:
        world.put(("notes", 1, "theirs"))
    lose_records(a.storage.inner, prefix)
    a.restart()
    assert a.db.verify(), what
    before = world.values()
    if survived:
        a.sync()
        assert world.values() in (before, {1: "mine"})
    else:
        with pytest.raises(CorruptionError, match="verify"):
            a.sync()
        assert world.values() == before
    assert world.server.verify() == []


def test_nothing_is_sent_without_the_transaction_it_was_built_on() -> None:
    """A damaged page can hide rows while those behind them are sound."""
    world, a = dirty()
    a.put(("notes", 1, "built on mine"))
    with a.storage.inner.snapshot() as snapshot:
        first, _ = snapshot.scan_keys(READY, end_of(READY))
    a.storage.inner.commit({first: None})
    a.restart()
    with pytest.raises(CorruptionError, match="should hold 2 transactions, 1 are found"):
        a.sync()
    assert world.values() == {1: "old"} and world.server.verify() == []


def test_a_transaction_nobody_counted_is_damage_too() -> None:
    world, a = dirty()
    with a.storage.inner.snapshot() as snapshot:
        [(_, row)] = snapshot.scan(READY, end_of(READY))
    a.storage.inner.commit({sequence_key(READY, 1): row})
    a.restart()
    with pytest.raises(CorruptionError, match="should hold 1 transactions, 2 are found"):
        a.sync()
    assert world.values() == {1: "old"}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_what_was_in_flight_is_not_sent_again_without_a_part_of_it(lost: int) -> None:
    world, a = dirty()
    for value in ("two", "three"):
        a.put(("notes", 1, value))
    a.wire.before = lose(PushRequest)
    with pytest.raises(TransportError):
        a.sync()
    with a.storage.inner.snapshot() as snapshot:
        keys = snapshot.scan_keys(READY, end_of(READY))
    assert len(keys) == 3
    a.storage.inner.commit({keys[lost]: None})
    a.restart()
    for _ in range(2):
        with pytest.raises(CorruptionError, match="were sent before are missing"):
            a.sync()
    assert world.values() == {1: "old"} and world.server.verify() == []


def test_an_outbox_is_counted_a_stretch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_COUNTED_ROWS", 2)
    world = World()
    a = world.device()
    for number in range(1, 6):
        a.put(("notes", number, "new"))
    lose_records(a.storage.inner, READY)
    with pytest.raises(CorruptionError, match="should hold 5 transactions, 4 are found"):
        a.sync()
    for rows in (1, 2, 3, 4, 5, 6):
        monkeypatch.setattr(batch, "_COUNTED_ROWS", rows)
        b = world.device()
        for number in range(1, 6):
            b.put(("notes", 10 * rows + number, "new"))
        b.sync()
        assert len(world.values()) == 5 * rows


def test_a_server_whose_feed_names_a_row_that_is_gone_sends_no_page() -> None:
    world = World()
    world.put(("notes", 1, "one"))
    world.put(("notes", 2, "two"))
    lose_records(world.server_storage.inner, ENTITY)
    world.restart_server()
    a = world.device()
    with pytest.raises(EntiDBError) as caught:
        a.sync()
    assert caught.value.code == "corrupt_record"
    assert "was not sent" in str(caught.value)
    assert a.values() == {}
    assert world.server.verify()


def test_a_server_whose_row_is_older_than_its_feed_sends_no_page() -> None:
    world = World()
    world.put(("notes", 1, "one"))
    inner = world.server_storage.inner
    with inner.snapshot() as snapshot:
        [(key, old)] = snapshot.scan(ENTITY, end_of(ENTITY))
    world.put(("notes", 1, "two"))
    inner.commit({key: old})
    world.restart_server()
    a = world.device()
    with pytest.raises(EntiDBError) as caught:
        a.sync()
    assert caught.value.code == "corrupt_record"
    assert a.values() == {}


def test_a_device_goes_on_after_its_server_was_put_in_order_again() -> None:
    world = World()
    world.put(("notes", 1, "one"))
    sound = world.server_storage.inner.copy()  # type: ignore[attr-defined]
    lose_records(world.server_storage.inner, ENTITY)
    world.restart_server()
    a = world.device()
    a.put(("notes", 2, "mine"))
    with pytest.raises(EntiDBError):
        a.sync()
    assert [type(request) for request in a.wire.requests][-1] is PullRequest
    world.open_server(sound)
    a.settle()
    assert_in_step(world, a)


def test_a_pending_row_that_is_gone_and_comes_back_with_a_pull_is_damage():
    world, a = dirty()
    world.put(("notes", 1, "theirs"))
    lose_records(a.storage.inner, ENTITY)
    a.restart()
    with pytest.raises(CorruptionError):
        a.sync()


def test_a_catalogue_that_does_not_know_what_is_pending_is_damage():
    """A damaged page can lead to an older catalogue, sound in itself."""
    _world, a = dirty()
    with a.db.write() as writer:
        writer.set_catalogue(empty_catalogue())
    a.restart()
    with pytest.raises(CorruptionError, match=r"collection number 1.*run verify"):
        a.sync()
