"""Four threads that read beside one that writes, and fails, all the time."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.errors import CborEncodeError, TransactionTooLargeError
from entidb.storage import LmdbStorage, MemoryStorage
from tests.support import WatchedStorage, uid

READERS = 4
WAIT_S = 120.0


@pytest.fixture(params=["memory", "lmdb"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    inner = LmdbStorage.open(tmp_path) if request.param == "lmdb" else MemoryStorage()
    made = Database(WatchedStorage(inner), transaction_bytes_max=1 << 20)
    with contextlib.closing(made):
        yield made


def put_pair(db: Database, value: Any, then: Callable[[], object] = lambda: None) -> None:
    """The same in two collections, in one transaction, and then something that may raise."""
    with db.transaction() as tx:
        tx.collection("left")[uid(1)] = value
        tx.collection("right")[uid(1)] = value
        then()


class Mine(Exception):
    pass


def raise_mine() -> None:
    raise Mine


def fail_on_disk(db: Database) -> None:
    storage = db.storage
    assert isinstance(storage, WatchedStorage)
    storage.fail_next(error=OSError(5, "Input/output error"))
    put_pair(db, "never")


FAILURES: dict[str, tuple[type[BaseException], Callable[[Database], None]]] = {
    "its own error": (Mine, lambda db: put_pair(db, "never", raise_mine)),
    "a value that cannot be": (CborEncodeError, lambda db: put_pair(db, object())),
    "too much": (TransactionTooLargeError, lambda db: put_pair(db, "x" * (1 << 20))),
    "the disk": (OSError, fail_on_disk),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_four_readers_beside_a_writer_that_raises_see_only_what_was_committed(
    db: Database, kind: str
):
    error, fail = FAILURES[kind]
    put_pair(db, 0)
    done, faults = threading.Event(), list[str]()
    reads = [0] * READERS

    def read(which: int) -> None:
        newest = 0
        try:
            while not done.is_set():
                with db.snapshot() as snapshot:
                    left, right = (snapshot.collection(n).get(uid(1)) for n in ("left", "right"))
                if left != right or not isinstance(left, int) or left < newest:
                    faults.append(f"{left!r} {right!r} after {newest!r}")
                    return
                newest = left
                reads[which] += 1
        except Exception as unexpected:
            faults.append(repr(unexpected))

    threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        for turn in itertools.count(1):
            with pytest.raises(error):
                fail(db)
            put_pair(db, turn)
            if faults or (turn >= 50 and all(reads)):
                break
            assert turn < 100_000, "a reader never gets its turn"
    finally:
        done.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert faults == []
    assert db.collection("left")[uid(1)] == db.collection("right")[uid(1)] == turn
    assert db.verify() == []
