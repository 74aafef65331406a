"""Entities and feed stand on pages of their own, so that both leave full pages behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entidb import cbor
from entidb.db import Database, Role, purge_tombstones
from entidb.db.records import (
    FEED,
    META_FORMAT,
    NO_ID,
    READY,
    SPACED,
    end_of,
    feed_key,
    is_spacer,
    sequence_key,
)
from entidb.errors import FormatError
from entidb.storage import LmdbStorage, MemoryStorage
from entidb.storage.lmdb.spacers import half_page, spacers
from entidb.storage.regions import spacers_of
from tests.support import FakeClock

BODY = {"title": "x" * 150}
PAYLOAD = cbor.encode(BODY)
PAGE = 4096


def without_spacers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LmdbStorage, "spacers", lambda self, regions: ({}, {}))


def opened(path: Path, **options: Any) -> Database:
    return Database.open(path, clock=FakeClock(), **options)


def filled(db: Database, rounds: int = 40, transactions: int = 50) -> Database:
    """Transactions of one new entity each, many of them in one storage commit."""
    for _ in range(rounds):
        with db.write("local") as writer:
            for _ in range(transactions):
                db.commit_writes(writer, {"notes": {db.new_id().bytes: PAYLOAD}})
    return db


def emptied(db: Database) -> Database:
    """The outbox without its rows, oldest first, as settling leaves it."""
    while True:
        with db.storage.snapshot() as snapshot:
            keys = snapshot.scan_keys(READY, end_of(READY), limit=70)
        if not keys:
            return db
        db.storage.commit(dict.fromkeys(keys))


def used(db: Database) -> int:
    return db.storage.info().used_bytes


def test_new_databases_leave_full_pages_behind(tmp_path, monkeypatch):
    with filled(opened(tmp_path / "with")) as ours:
        without_spacers(monkeypatch)
        with filled(opened(tmp_path / "without")) as before:
            assert used(ours) < 0.9 * used(before)


def test_they_still_do_after_the_outbox_was_emptied_again_and_again(tmp_path, monkeypatch):
    with opened(tmp_path / "with") as ours:
        for _ in range(4):
            emptied(filled(ours, rounds=10))
        without_spacers(monkeypatch)
        with opened(tmp_path / "without") as before:
            for _ in range(4):
                emptied(filled(before, rounds=10))
            assert used(ours) < 0.9 * used(before)


def removed(db: Database, keep: int) -> Database:
    """All entities but the last ``keep``, tombstones and feed rows included."""
    ids = [entity_id.bytes for entity_id in db.collection("notes")]
    for start in range(0, len(ids) - keep, 50):
        with db.write("local") as writer:
            db.commit_writes(writer, {"notes": dict.fromkeys(ids[start : start + 50])})
    purge_tombstones(db, db.sequence)
    return emptied(db)


@pytest.mark.parametrize("keep", [50, 0])
def test_entities_that_leave_in_great_numbers_leave_no_harm(keep, tmp_path, monkeypatch):
    """The store may then bring spacers to where others grow."""
    with opened(tmp_path / "with", role=Role.SERVER) as ours:
        filled(removed(filled(ours), keep))
        assert list(ours.verify()) == []
        without_spacers(monkeypatch)
        with opened(tmp_path / "without", role=Role.SERVER) as before:
            filled(removed(filled(before), keep))
            assert used(ours) <= used(before)


def test_the_first_rows_begin_pages_and_those_they_become_fill_a_part(tmp_path):
    storage = LmdbStorage.open(tmp_path / "store")
    half = half_page(stat_of(storage)["psize"])
    first, rows = storage.spacers(SPACED)
    kinds = len({key[:1] for key in rows})
    storage.commit(first)
    assert stat_of(storage)["leaf_pages"] == kinds
    storage.commit(rows)
    stat = stat_of(storage)
    assert (stat["leaf_pages"], stat["overflow_pages"]) == (kinds, 0)
    assert set(first) < set(rows) and not any(rows.values())
    # LMDB joins a page with another when less than a quarter of it is taken. Beside its key a row
    # takes 14 bytes.
    for kind in {key[:1] for key in rows}:
        assert 2 * half * 0.4 < sum(len(key) + 14 for key in rows if key[:1] == kind) < 2 * half
    storage.close()


def stat_of(storage: LmdbStorage) -> dict[str, int]:
    with storage.snapshot() as snapshot:
        stat: dict[str, int] = snapshot._reader.txn.stat()
        return stat


def test_half_a_page_is_all_that_stays_in_the_tree(tmp_path):
    storage = LmdbStorage.open(tmp_path / "store")
    half = half_page(stat_of(storage)["psize"])
    storage.commit({b"a": bytes(half - 1), b"b": bytes(half - 1)})
    stat = stat_of(storage)
    assert (stat["leaf_pages"], stat["overflow_pages"]) == (1, 0)
    storage.commit({b"a": bytes(half)})
    assert stat_of(storage)["overflow_pages"] == 1
    storage.close()


def test_they_are_between_the_kinds_they_keep_apart():
    first, rows = spacers(SPACED, PAGE)
    assert all(map(is_spacer, rows)) and all(map(is_spacer, first))
    kinds = sorted({key[:1] for key in rows})
    assert kinds[0] < b"a" and kinds[1] == FEED and b"f" < kinds[2] < b"h"
    assert max(key for key in rows if key[:1] == FEED) < sequence_key(FEED, 1)
    assert not is_spacer(feed_key(1, 0, NO_ID)) and not is_spacer(META_FORMAT)


def test_a_store_without_pages_has_none():
    storage = MemoryStorage()
    assert spacers_of(storage, SPACED) == ({}, {})
    with Database(storage, clock=FakeClock()), storage.snapshot() as snapshot:
        assert snapshot.scan_keys(b"", b"\xff") == [b"mformat", b"midentity"]


def test_who_dies_between_spacers_and_identity_finds_an_empty_store(tmp_path):
    storage = LmdbStorage.open(tmp_path / "db")
    first, rows = storage.spacers(SPACED)
    storage.commit(first)
    storage.close()
    with pytest.raises(FormatError, match="holds no EntiDB database"):
        Database.open(tmp_path / "db", create=False)
    with opened(tmp_path / "db") as db, db.storage.snapshot() as snapshot:
        assert snapshot.get_many(list(rows)) == list(rows.values())
        assert list(db.verify()) == []


def test_a_store_that_only_begins_like_one_is_left_alone(tmp_path):
    storage = LmdbStorage.open(tmp_path / "db")
    first, _ = storage.spacers(SPACED)
    storage.commit(first | {b"somebody": b"else"})
    storage.close()
    with pytest.raises(FormatError, match="another program"):
        opened(tmp_path / "db")


def test_nobody_sees_them(tmp_path):
    with opened(tmp_path / "db") as db:
        notes = db.collection("notes")
        assert list(db.changes()) == [] and list(db.changes(-1)) == []
        assert list(db.verify()) == []
        note = notes.add(BODY)
        assert [event.entity_id for event in db.changes()] == [note]
        assert dict(notes.items()) == {note: BODY}
        assert list(db.verify()) == []
        db.compact()
        db.backup(tmp_path / "copy")
    with opened(tmp_path / "copy") as copy:
        assert dict(copy.collection("notes").items()) == {note: BODY}
        assert list(copy.verify()) == []


def test_a_database_from_before_gets_none_and_works(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        without_spacers(patch)
        filled(opened(tmp_path / "db"), rounds=2).close()
    with opened(tmp_path / "db") as db:
        filled(db, rounds=2)
        assert list(db.verify()) == [] and len(db.collection("notes")) == 200
        with db.storage.snapshot() as snapshot:
            assert not any(map(is_spacer, snapshot.scan_keys(b"", b"\xff")))
