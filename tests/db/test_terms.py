"""Terms: in which opening of its files a server's database made a commit (R29)."""

from __future__ import annotations

import random

import pytest

from entidb import Database
from entidb.db import Role, maintenance
from entidb.db import terms as terms_module
from entidb.db.records import TERM, end_of, sequence_key, sequence_of
from entidb.db.terms import newest_term, term_at
from entidb.db.verifying import verify
from entidb.storage import MemoryStorage
from tests.support import uid


def server(storage: MemoryStorage, seed: int = 1) -> Database:
    return Database(storage, role=Role.SERVER, entropy=random.Random(seed).randbytes)


def put(database: Database, *numbers: int) -> None:
    for number in numbers:
        database.collection("notes")[uid(number)] = number


def begun(database: Database) -> list[int]:
    with database.storage.snapshot() as snapshot:
        return [sequence_of(key) for key in snapshot.scan_keys(TERM, end_of(TERM))]


def test_a_term_begins_with_the_first_commit_after_an_opening_and_not_with_the_next() -> None:
    storage = MemoryStorage()
    first = server(storage)
    assert begun(first) == []
    put(first, 1, 2)
    assert begun(first) == [1]
    again = server(storage, seed=2)
    assert begun(again) == [1], "an opening alone writes nothing"
    put(again, 3, 4)
    assert begun(again) == [1, 3]
    with again.storage.snapshot() as snapshot:
        newest = newest_term(snapshot)
        assert newest is not None and newest.first == 3 and len(newest.name) == 8
        assert term_at(snapshot, 2) != newest == term_at(snapshot, 3) == term_at(snapshot, 99)
        assert term_at(snapshot, 0) is None
    assert verify(again) == []


def test_processes_that_have_the_files_open_together_need_one_term() -> None:
    storage = MemoryStorage()
    put(server(storage), 1)
    one, two = server(storage.another(), seed=2), server(storage.another(), seed=3)
    put(two, 2)
    put(one, 3)
    put(two, 4)
    assert begun(one) == [1, 2], "the other has begun it since this one opened the files"
    late = server(storage.another(), seed=4)
    # It cannot know that the files were open all the while: it begins one, and no other.
    put(late, 5, 6)
    put(one, 7)
    put(late, 8)
    assert begun(late) == [1, 2, 5]


def test_a_commit_that_takes_no_number_begins_none() -> None:
    database = server(MemoryStorage())
    with database.write() as writer:
        writer.put(b"mcolumns", b"\xa0")
    assert begun(database) == []


def test_a_device_begins_none() -> None:
    device = Database.in_memory()
    put(device, 1)
    assert begun(device) == []


def test_only_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms_module, "TERMS_KEPT", 3)
    storage = MemoryStorage()
    for n in range(1, 7):
        put(server(storage, seed=n), n)
    database = server(storage)
    maintenance.purge_tombstones(database, 2)
    assert begun(database) == [4, 5, 6]


def test_verify_finds_a_term_that_cannot_be() -> None:
    database = server(MemoryStorage())
    put(database, 1)
    with database.write() as writer:
        writer.put(sequence_key(TERM, 9), bytes(8))
        writer.put(sequence_key(TERM, 1), b"short")
    assert verify(database) == [
        "the term that begins with commit 1 has 5 bytes",
        "a term begins with commit 9, beyond the head",
    ]
