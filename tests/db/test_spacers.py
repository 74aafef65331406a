"""Entities and feed stand on pages of their own, so that both leave full pages behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from entidb import cbor
from entidb.db import Database, database
from entidb.db.records import FEED, READY, end_of, spacers
from entidb.storage import LmdbStorage, MemoryStorage
from entidb.storage.lmdb import LmdbSnapshot
from tests.support import FakeClock

BODY = {"title": "x" * 150}
PAYLOAD = cbor.encode(BODY)
#: With pages of 4096 bytes.
HALF_PAGE = 2026


def without_spacers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "spacers", lambda half_page_bytes: {})


def opened(path: Path) -> Database:
    return Database.open(path, clock=FakeClock())


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


def test_a_spacer_takes_half_a_page_and_begins_with_a_short_row(tmp_path):
    with opened(tmp_path / "db") as db, db.storage.snapshot() as snapshot:
        half = db.storage.info().half_page_bytes
        rows = spacers(half)
        assert snapshot.get_many(list(rows)) == list(rows.values())
        for (short, nothing), (long, zeros) in zip(*[iter(rows.items())] * 2, strict=True):
            assert short < long and not nothing
            assert len(long) + len(zeros) == half and not any(zeros)
        assert isinstance(snapshot, LmdbSnapshot)
        stat = snapshot._reader.txn.stat()
        assert stat["overflow_pages"] == 0 and stat["leaf_pages"] == len(rows) // 2


def test_one_byte_more_would_not_stay_in_the_tree(tmp_path):
    storage = LmdbStorage.open(tmp_path / "store")
    half = storage.info().half_page_bytes
    storage.commit({b"a": bytes(half - 1)})
    with storage.snapshot() as snapshot:
        assert snapshot._reader.txn.stat()["overflow_pages"] == 0
    storage.commit({b"a": bytes(half)})
    with storage.snapshot() as snapshot:
        assert snapshot._reader.txn.stat()["overflow_pages"] == 1
    storage.close()


def test_they_are_between_the_kinds_they_keep_apart():
    (first, _), (before_feed, last_of_feed), (behind_feed, _) = zip(
        *[iter(spacers(HALF_PAGE))] * 2, strict=True
    )
    assert first < b"a"
    assert b"e\xff" * 9 < before_feed < last_of_feed < FEED + (1).to_bytes(8, "big")
    assert FEED + b"\xff" * 28 < behind_feed < b"h"


def test_a_store_without_pages_has_none():
    assert spacers(0) == {}
    storage = MemoryStorage()
    with Database(storage, clock=FakeClock()), storage.snapshot() as snapshot:
        assert snapshot.scan_keys(b"", b"\xff") == [b"mformat", b"midentity"]


def test_nobody_sees_them(tmp_path):
    with opened(tmp_path / "db") as db:
        notes = db.collection("notes")
        assert list(db.changes()) == [] and list(db.verify()) == []
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
            assert snapshot.get_many(list(spacers(HALF_PAGE))) == [None] * 6
