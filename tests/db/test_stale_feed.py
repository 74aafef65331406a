"""Feed rows of what has changed since: they may wait to be removed, and are no news."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import Database, Index, purge_tombstones
from entidb.db.maintenance import inspect
from entidb.db.overlay import STALE_FROM
from entidb.db.records import (
    ENTITY,
    ENTITY_HEAD,
    FEED,
    META_FORMAT,
    META_STALE,
    STALE,
    encode_format,
    end_of,
    feed_key,
    pack_u64,
    sequence_key,
    split_feed_key,
)
from entidb.errors import CorruptionError, StorageFullError
from entidb.protocol import expanded
from entidb.storage import MemoryStorage
from tests.server.test_pages import asked, watch_reads
from tests.server.test_service import op, push, tx, verdicts
from tests.support import GRANT, FakeClock, World, assert_in_step, assert_sound, uid

MAX = 20


def opened(most: int = MAX) -> Database:
    return Database(MemoryStorage(), clock=FakeClock(), stale_rows_max=most)


def write(database: Database, numbers: Iterable[int], value: Any = "x") -> None:
    """One transaction; None deletes."""
    with database.transaction() as transaction:
        for number in numbers:
            if value is None:
                del transaction.collection("notes")[uid(number)]
            else:
                transaction.collection("notes")[uid(number)] = value


def rows(database: Database, kind: bytes) -> list[bytes]:
    with database.storage.snapshot() as snapshot:
        return snapshot.scan_keys(kind, end_of(kind))


def feed(database: Database) -> list[tuple[int, int]]:
    """(commit, number of the entity) of each row of the feed, stale ones as well."""
    places = [split_feed_key(key) for key in rows(database, FEED)]
    return [(sequence, int.from_bytes(entity_id, "big")) for sequence, _, entity_id in places]


def everything(world: World) -> list[tuple[bytes, bytes]]:
    with world.server_storage.snapshot() as snapshot:
        return snapshot.scan(b"\0", b"\xff")


def waiting(database: Database) -> int:
    with database.view() as view:
        return view.stale_rows


def told(database: Database) -> list[tuple[int, int]]:
    """(commit, number of the entity) of what a reader of the feed is told."""
    return [(e.sequence, e.entity_id.int) for e in database.changes() if e.entity_id is not None]


# ---------------------------------------------------------------- when they wait, when they go


@pytest.mark.parametrize("count", [1, STALE_FROM - 1, STALE_FROM, MAX, MAX + 1])
def test_what_a_commit_leaves_stale_waits_if_it_is_neither_little_nor_too_much(count: int) -> None:
    database = opened()
    write(database, range(30))
    write(database, range(count), "y")
    waits = STALE_FROM <= count <= MAX
    assert waiting(database) == (count if waits else 0)
    assert rows(database, STALE) == ([sequence_key(STALE, 2)] if waits else [])
    assert len(feed(database)) == 30 + waiting(database)
    assert told(database) == [(1, n) for n in range(count, 30)] + [(2, n) for n in range(count)]
    assert_sound(database)


def test_those_that_wait_go_together_with_the_commit_that_would_be_one_too_many() -> None:
    database = opened()
    write(database, range(10))
    for n in range(2):
        write(database, range(10), n)
    assert (waiting(database), len(rows(database, STALE)), len(feed(database))) == (20, 2, 30)
    write(database, range(STALE_FROM - 1), "few")
    assert waiting(database) == 20
    write(database, range(STALE_FROM), "more")
    assert (waiting(database), rows(database, STALE)) == (0, [])
    assert feed(database) == [(3, n) for n in range(4, 10)] + [(5, n) for n in range(4)]
    assert told(database) == feed(database)
    write(database, range(5), "again")
    assert waiting(database) == 5
    assert_sound(database)


def test_none_waits_where_none_may() -> None:
    database = opened(0)
    write(database, range(10))
    write(database, range(10), "y")
    assert (waiting(database), feed(database)) == (0, [(2, n) for n in range(10)])
    with database.storage.snapshot() as snapshot:
        assert snapshot.get(META_STALE) is None


def test_deletions_leave_stale_rows_and_are_told_once() -> None:
    database = opened()
    write(database, range(6))
    write(database, range(6), None)
    assert waiting(database) == 6
    assert [(e.kind, e.sequence) for e in database.changes()] == [("delete", 2)] * 6
    assert_sound(database)


def test_what_changes_twice_in_one_commit_leaves_one_row() -> None:
    world = World()
    world.put(*[("notes", n, "x") for n in range(5)])
    writes = [tx(n, op(n, "y", base=1)) for n in range(5)]
    results = push(world, *writes, *[tx(10 + n, op(n, "z", base=1)) for n in range(5)])
    assert verdicts(results) == [0] * 10
    assert (waiting(world.server), len(feed(world.server))) == (5, 10)
    assert told(world.server) == [(7 + n, n) for n in range(5)]
    assert_sound(world.server)


def test_a_commit_that_fails_leaves_everything_where_it_was() -> None:
    world = World()
    world.put(*[("notes", n, "x") for n in range(5)])
    before = everything(world)
    world.server_storage.fail_next(error=StorageFullError("full"))
    with pytest.raises(StorageFullError):
        world.put(*[("notes", n, "y") for n in range(5)])
    assert everything(world) == before
    world.put(*[("notes", n, "y") for n in range(5)])
    assert waiting(world.server) == 5
    assert_sound(world.server)


# ---------------------------------------------------------------- who reads past them


@pytest.mark.parametrize("columns", [False, True], ids=["commits", "columns"])
@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_r19_pages_pass_over_stale_rows_and_move_on(limit: int, columns: bool) -> None:
    world = World()
    for value in "abc":
        world.put(*[("notes", n, value) for n in range(6)], ("notes", 10 + ord(value), value))
    assert waiting(world.server) == 12
    request = asked(world, limit=limit, columns=columns)
    found, more = [], True
    while more:
        page = expanded(world.service.pull(request, GRANT))
        found += [(c.version, o.entity_id[-1]) for c in page.commits for o in c.operations]
        assert page.cursor > request.cursor
        request, more = replace(request, cursor=page.cursor), page.has_more
    assert found == [(1, 107), (2, 108), *[(3, n) for n in range(6)], (3, 109)]
    assert request.cursor == 3


@pytest.mark.parametrize("columns", [False, True], ids=["commits", "columns"])
@pytest.mark.parametrize("version", [2, 9])
def test_a_feed_row_whose_entity_is_where_it_cannot_be_is_reported(
    version: int, columns: bool
) -> None:
    world = World()
    for n in range(3):
        world.put(("notes", n, "x"))
    with world.server_storage.snapshot() as snapshot:
        key, raw = snapshot.scan(ENTITY, end_of(ENTITY))[2]
    changed = raw[:9] + pack_u64(version) + raw[17:]
    assert len(raw) > ENTITY_HEAD
    world.server_storage.inner.commit({key: changed})
    request = asked(world, columns=columns)
    with pytest.raises(CorruptionError, match=f"commit 3 for {uid(2).hex} .* at {version};"):
        world.service.pull(request, GRANT)


def test_an_entity_is_read_once_however_often_it_stands_in_the_feed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    for value in range(8):
        world.put(*[("notes", n, value) for n in range(6)])
    assert len(feed(world.server)) == 48
    sizes = watch_reads(monkeypatch)
    assert told(world.server) == [(8, n) for n in range(6)]
    for columns in (False, True):
        page = expanded(world.service.pull(asked(world, columns=columns), GRANT))
        assert [commit.version for commit in page.commits] == [8]
    assert sizes == [6, 6, 6]


def test_a_page_reads_few_rows_at_a_time_where_stale_ones_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    large = "x" * 1000
    world.put(*[("notes", n, "x") for n in range(100)])
    world.put(*[("notes", n, large) for n in range(100)])
    sizes = watch_reads(monkeypatch)
    page = world.service.pull(asked(world, limit=100, bytes_max=20_000), GRANT)
    assert (page.commits, page.cursor, page.has_more) == ([], 1, True)
    assert sizes == [16, 19, 19, 19, 19, 8]


def test_devices_that_pull_many_changes_are_told_each_once_and_stay_in_step() -> None:
    world = World()
    a, b = world.device(), world.device()
    seen: list[Any] = []
    b.db.observe(lambda event: seen.extend((e.entity_id, e.value) for e in event.events))
    for value in range(4):
        a.put(*[("notes", n, value) for n in range(8)])
        a.settle()
        b.settle()
    assert waiting(world.server) == waiting(a.db) == waiting(b.db) == 24
    assert seen[-8:] == [(uid(n), 3) for n in range(8)]
    assert len(seen) == 8 * 4
    assert [e.value for e in b.db.changes()] == [3] * 8
    assert_in_step(world, a, b)


def test_the_feed_of_rows_of_several_kinds_is_read_past_stale_ones() -> None:
    world = World()
    a = world.device()
    a.put(*[("notes", n, "x") for n in range(8)])
    a.settle()
    a.put(*[("notes", n, "y") for n in range(5)])
    events = list(a.db.changes())
    assert [(e.entity_id, e.value) for e in events] == [
        *[(uid(n), "x") for n in range(5, 8)],
        *[(uid(n), "y") for n in range(5)],
    ]
    assert waiting(a.db) == 5


def test_r28_a_purge_leaves_no_stale_row_of_what_it_forgets() -> None:
    world = World()
    world.put(*[("notes", n, "x") for n in range(10)])
    world.put(*[("notes", n, "y") for n in range(5)])
    world.put(*[("notes", n, None) for n in range(5)])
    assert waiting(world.server) == 10
    assert purge_tombstones(world.server, 3) == 5
    assert (waiting(world.server), rows(world.server, STALE)) == (0, [])
    assert feed(world.server) == [(1, n) for n in range(5, 10)]
    a = world.device()
    a.settle()
    assert_in_step(world, a)


def test_r28_a_purge_of_part_of_the_past_leaves_none_either() -> None:
    world = World()
    world.put(*[("notes", n, "x") for n in range(10)])
    world.put(*[("notes", n, None) for n in range(5)])
    world.put(*[("notes", n, "y") for n in range(5, 10)])
    assert waiting(world.server) == 10
    assert purge_tombstones(world.server, 2) == 5
    a = world.device()
    a.settle()
    assert_in_step(world, a)


# ---------------------------------------------------------------- verify, and the format


def test_verify_knows_which_rows_may_be_stale() -> None:
    database = opened()
    write(database, range(5))
    write(database, range(5), "y")
    inner = database.storage
    assert isinstance(inner, MemoryStorage)
    listed = dict(inner.snapshot().scan(STALE, end_of(STALE)))
    ((key, raw),) = listed.items()
    current = feed_key(2, 1, uid(0).bytes)[1:]
    for change, faults in (
        ({key: None}, ["5 stale feed rows are counted, 0 are listed"]),
        ({META_STALE: pack_u64(4)}, ["4 stale feed rows are counted, 5 are listed"]),
        ({key: raw[28:], META_STALE: pack_u64(4)}, ["is stale"]),
        ({key: raw + current, META_STALE: pack_u64(6)}, ["is listed as stale"]),
        ({sequence_key(STALE, 1): raw}, ["listed as stale twice"]),
        ({key: raw[:-1]}, ["cannot be read", "has 139 bytes"]),
        ({feed_key(1, 1, uid(0).bytes): None}, ["1 feed rows that are listed", "not there"]),
    ):
        inner.commit(change)
        found = "\n".join(database.verify())
        assert all(fault in found for fault in faults), found
        back = {sequence_key(STALE, 1): None, key: raw, META_STALE: pack_u64(5)}
        inner.commit(back | {feed_key(1, 1, uid(0).bytes): b""})
        assert_sound(database)


def test_a_database_of_format_1_becomes_one_of_format_2_with_its_first_stale_rows(
    tmp_path: Path,
) -> None:
    with Database.open(tmp_path / "db") as database:
        write(database, range(5))
        first = encode_format()[:9] + b"\x01" + encode_format()[10:]
        database.storage.commit({META_FORMAT: first})
    with Database.open(tmp_path / "db") as database:
        write(database, range(3), "few")
        assert inspect(database)["format"] == 1
        write(database, range(5), "many")
        assert inspect(database)["format"] == 2
    with Database.open(tmp_path / "db") as database:
        assert (waiting(database), told(database)) == (5, [(3, n) for n in range(5)])
        assert_sound(database)


def test_what_has_an_index_stays_unreadable_for_those_who_know_none() -> None:
    """Stale rows need format 2, and an index 3, whichever comes first."""
    for first in ("index", "stale row"):
        database = opened()
        if first == "index":
            database.collection("notes", indexes=[Index("n")])
        write(database, range(STALE_FROM))
        write(database, range(STALE_FROM), "y")
        if first == "stale row":
            assert inspect(database)["format"] == 2
            database.collection("notes", indexes=[Index("n")])
            write(database, range(STALE_FROM), "z")
        assert waiting(database) > 0
        assert inspect(database)["format"] == 3
