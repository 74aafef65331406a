"""What a cache may believe: a moment is current until anything was committed, or tried to be."""

from __future__ import annotations

import pytest

from entidb.db import Database
from entidb.errors import StorageError
from entidb.storage import MemoryStorage
from entidb.storage.base import Batch
from tests.support import WatchedStorage


@pytest.fixture
def storage() -> WatchedStorage:
    return WatchedStorage(MemoryStorage())


@pytest.fixture
def database(storage: WatchedStorage) -> Database:
    return Database(storage)


def test_a_moment_is_current_until_somebody_commits(database: Database) -> None:
    moment = database.moment()
    assert moment.is_current()
    with database.view() as view:
        assert view.moment.is_current()
    assert moment.is_current()
    database.collection("notes").add("x")
    assert not moment.is_current()


def test_a_commit_of_nothing_leaves_a_moment_current(database: Database) -> None:
    moment = database.moment()
    with database.write() as writer:
        writer.get(b"x")
    assert moment.is_current()
    assert writer.moment.is_current()


@pytest.mark.parametrize("after", [False, True])
def test_r17_a_commit_that_fails_ends_a_moment_whether_it_was_done_or_not(
    database: Database, storage: WatchedStorage, after: bool
) -> None:
    moment = database.moment()
    storage.fail_next(after=after, error=StorageError("no"))
    with pytest.raises(StorageError), database.write() as writer:
        writer.put(b"x", b"y")
    assert not moment.is_current()
    assert not writer.moment.is_current()


def test_the_moment_of_a_writer_passes_its_own_commit_and_no_other(database: Database) -> None:
    with database.write() as writer:
        before = database.moment()
        writer.put(b"x", b"y")
    assert writer.moment.is_current()
    assert not before.is_current()
    with database.write() as other:
        other.put(b"x", b"z")
    assert not writer.moment.is_current()
    assert other.moment.is_current()


def test_what_is_read_while_a_commit_is_under_way_is_not_believed_after_it(
    database: Database, storage: WatchedStorage
) -> None:
    moments = []
    commit = storage.inner.commit

    def commit_and_look(batch: Batch, after: int | None = None) -> int:
        moments.append(database.moment())
        mark = commit(batch, after)
        # By now it is durable, and everybody reads it.
        moments.append(database.moment())
        return mark

    storage.inner.commit = commit_and_look  # type: ignore[method-assign]
    database.collection("notes").add("x")
    assert [moment.is_current() for moment in moments] == [False, True]
