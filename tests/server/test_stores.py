"""Many databases: opened once, closed when idle, reopened after an error, made only if allowed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import Database, Role
from entidb.errors import (
    DatabaseLockedError,
    PermissionDeniedError,
    ProtocolError,
    ServerBusyError,
    StorageError,
)
from entidb.protocol import PushResponse, SyncResponse, Verdict
from entidb.server import Grant, ServerConfig
from entidb.server.directory import list_databases, on_disk
from entidb.server.stores import Store, Stores
from entidb.storage.disk_errors import disk_error
from tests.server.support import ManualClock, number_id, push

GRANT = Grant(subject="ada", read=True, write=True)
DAY_S = 24 * 3600


class Opener:
    """Opens from the disk and counts."""

    def __init__(self, config: ServerConfig, clock: ManualClock) -> None:
        self._open = on_disk(config, clock=clock)
        self.opened: list[str] = []

    def __call__(self, db_id: str, create: bool) -> Database:
        self.opened.append(db_id)
        return self._open(db_id, create)


class Place:
    """Stores in a directory, and what they stand on."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.config = ServerConfig(data_dir=path, insecure_no_auth=True, **settings)
        self.clock = ManualClock()
        self.opener = Opener(self.config, self.clock)
        self.stores = Stores(self.config, clock=self.clock, open_database=self.opener)

    def use(self, db_id: str = "shop", *, create: bool = True) -> Store:
        return self.stores.use(db_id, create=create)

    def touch(self, db_id: str) -> None:
        self.stores.release(self.use(db_id))


@pytest.fixture
def place(tmp_path: Path):
    made = Place(tmp_path / "data", databases_open_max=2)
    yield made
    made.stores.close()


def pushed(store: Store, *numbers: int, **fields: Any) -> PushResponse:
    history = store.database.history
    assert history is not None
    (answer,) = store.service.push_many([(push(history, *numbers, **fields), GRANT)])
    assert isinstance(answer, PushResponse)
    return answer


def test_a_database_that_many_ask_for_at_once_is_opened_once(place: Place):
    start = threading.Barrier(8)

    def ask(_: int) -> Store:
        start.wait()
        return place.use()

    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(ask, range(8)))
    assert len({id(store) for store in stores}) == 1
    assert place.opener.opened == ["shop"]
    assert stores[0].users == 8


def test_an_open_database_is_found_without_waiting(place: Place):
    assert place.stores.try_use("shop") is None
    store = place.use()
    assert place.stores.try_use("shop") is store


def test_a_database_is_a_directory_of_its_own_on_the_server(place: Place, tmp_path: Path):
    place.touch("shop")
    place.touch("Shop")
    assert list_databases(tmp_path / "data") == ["Shop", "shop"]
    assert place.use().database.role is Role.SERVER


def test_what_is_no_database_is_not_listed(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("")
    assert list_databases(tmp_path) == []
    assert list_databases(tmp_path / "missing") == []


@pytest.mark.parametrize("db_id", ["../shop", "..", "a/b", "", "x" * 101, ".x"])
def test_a_name_that_leads_elsewhere_is_said_to_be_no_name(place: Place, db_id: str):
    with pytest.raises(ProtocolError, match="is no name for a database") as caught:
        place.use(db_id)
    assert caught.value.code == "invalid_message"
    assert place.opener.opened == []


def test_reading_does_not_make_a_database(place: Place, tmp_path: Path):
    with pytest.raises(PermissionDeniedError) as caught:
        place.use(create=False)
    assert caught.value.code == "unknown_database"
    assert not (tmp_path / "data").exists()


def test_a_server_that_makes_no_databases_serves_those_that_are_there(tmp_path: Path):
    first = Place(tmp_path)
    first.touch("shop")
    first.stores.close()
    place = Place(tmp_path, create_databases=False)
    assert place.use("shop").db_id == "shop"
    with pytest.raises(PermissionDeniedError):
        place.use("other")
    place.stores.close()


def test_an_idle_database_is_closed_and_one_in_use_is_not(place: Place):
    place.touch("idle")
    busy = place.use("busy")
    place.clock.advance(301)
    place.stores.housekeep()
    assert place.stores.open_count == 1
    assert place.stores.try_use("busy") is busy


def test_a_database_that_is_asked_for_again_is_not_idle(place: Place):
    place.touch("shop")
    place.clock.advance(200)
    place.touch("shop")
    place.clock.advance(200)
    place.stores.housekeep()
    assert place.stores.open_count == 1


def test_the_least_recently_used_database_makes_room(place: Place):
    for name in ("one", "two", "one"):
        place.touch(name)
        place.clock.advance(1)
    place.touch("three")
    assert place.stores.try_use("two") is None
    assert place.stores.try_use("one") is not None


def test_a_database_in_use_never_makes_room(place: Place):
    one, _ = place.use("one"), place.use("two")
    with pytest.raises(ServerBusyError) as caught:
        place.use("three")
    assert caught.value.retry_after is not None
    place.stores.release(one)
    assert place.use("three").db_id == "three"


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_where_open_files_run_out_the_least_recently_used_makes_room(tmp_path: Path):
    import resource

    place = Place(tmp_path)
    place.touch("d0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Whatever number below the limit is free is taken, but for those of some databases.
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 16, hard))
    files = []
    with contextlib.suppress(OSError):
        while True:
            files.append(os.open(os.devnull, os.O_RDONLY))
    for _ in range(min(12, len(files))):
        os.close(files.pop())
    try:
        for _ in range(2):
            for number in range(8):
                place.touch(f"d{number}")
        assert 1 <= place.stores.open_count < 8
        with place.stores.using("d7", create=False) as store:
            assert store.database.read_head().sequence == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            os.close(file)
        place.stores.close()


def test_where_open_files_run_out_and_all_are_in_use_the_error_says_so(place: Place):
    used = place.use("a")

    def none_left(db_id: str, create: bool) -> Database:
        raise disk_error(errno.EMFILE, f"opening {db_id}") from OSError(errno.EMFILE, "")

    place.stores._open_database = none_left
    with pytest.raises(StorageError, match="too many files open"):
        place.touch("b")
    place.stores.release(used)
    with pytest.raises(StorageError, match="too many files open"):
        place.touch("b")
    assert place.stores.open_count == 0


def test_a_pinned_database_stays_open(place: Place):
    database = place.stores.pin("shop", create=True)
    for name in ("one", "two", "three"):
        place.touch(name)
    place.clock.advance(1000)
    place.stores.housekeep()
    assert place.stores.pin("shop", create=True) is database
    assert database.sequence == 0


class _BrokenError(StorageError):
    pass


def test_after_a_storage_error_the_database_is_opened_again(place: Place):
    before = place.use()
    pushed(before, 1)
    place.stores.release(before)
    with pytest.raises(_BrokenError), place.stores.using("shop", create=True):
        raise _BrokenError("the disk has gone")
    after = place.use()
    assert after is not before
    assert place.opener.opened == ["shop", "shop"]
    assert after.database.sequence == 1


def test_a_broken_database_waits_for_those_who_still_use_it(place: Place):
    store = place.use()
    with pytest.raises(_BrokenError), place.stores.using("shop", create=True):
        raise _BrokenError("the disk has gone")
    with pytest.raises(ServerBusyError):
        place.use()
    place.stores.release(store)
    assert place.use() is not store


def test_a_database_that_goes_away_while_it_is_opened_is_used_by_nobody(place: Place):
    def goes_away(db_id: str, head: int) -> None:
        raise StorageError("away")

    known, place.stores.on_open = place.stores.on_open, goes_away
    for _ in range(2):
        with pytest.raises(StorageError, match="away"):
            place.use()
    place.stores.on_open = known
    store = place.use()
    assert pushed(store, 1).head == 1
    place.stores.release(store)
    assert place.opener.opened == ["shop"] * 3


def test_a_group_that_fails_breaks_its_database_and_its_members_are_told(place: Place):
    store = place.use()
    storage: Any = store.database.storage
    real = storage.commit

    def failing(batch: object, after: int | None = None) -> None:
        raise _BrokenError("no")

    storage.commit = failing
    answers: list[SyncResponse | Exception] = []
    told = threading.Event()

    def done(answer: SyncResponse | Exception) -> None:
        answers.append(answer)
        told.set()

    assert store.database.history is not None
    store.committer.submit(push(store.database.history, 1), GRANT, done)
    assert told.wait(30)
    assert getattr(answers[0], "code", None) == "storage_error"
    storage.commit = real
    place.stores.release(store)
    after = place.use()
    assert after is not store
    assert after.database.sequence == 0


def test_closing_finishes_what_is_queued(place: Place, tmp_path: Path):
    store = place.use()
    history = store.database.history
    assert history is not None
    answers: list[object] = []
    for number in range(1, 51):
        store.committer.submit(push(history, number), GRANT, answers.append)
    place.stores.close()
    assert [answer.results[0].verdict for answer in answers] == [Verdict.ACCEPTED] * 50  # type: ignore[attr-defined]
    reopened = Place(tmp_path / "data")
    assert reopened.use().database.sequence == 50
    reopened.stores.close()


def test_after_closing_nothing_is_opened(place: Place):
    place.stores.close()
    place.stores.close()
    with pytest.raises(ServerBusyError) as caught:
        place.use()
    assert caught.value.code == "shutting_down"


def test_a_second_server_on_the_same_directory_is_kept_out(place: Place, tmp_path: Path):
    place.touch("shop")
    other = Place(tmp_path / "data")
    with pytest.raises(DatabaseLockedError):
        other.use()
    other.stores.close()


# ---------------------------------------------------------------- tombstones


def deleted(place: Place) -> Store:
    """A database in which entity 1 was written and deleted, and the clock was looked at."""
    store = place.use()
    pushed(store, 1)
    pushed_delete = push(store.database.history or b"", 2, value=None, base=1)
    pushed_delete.transactions[0].operations[0] = type(pushed_delete.transactions[0].operations[0])(
        0, number_id(1), 1, None
    )
    (answer,) = store.service.push_many([(pushed_delete, GRANT)])
    assert isinstance(answer, PushResponse)
    assert answer.results[0].verdict == Verdict.ACCEPTED
    place.clock.advance(2 * 3600)
    place.stores.housekeep()
    place.stores.release(store)
    return store


def floor(store: Store) -> int:
    from entidb.db.maintenance import read_floor

    with store.database.view() as view:
        return read_floor(view)


def test_tombstones_are_purged_when_their_retention_is_over(tmp_path: Path):
    place = Place(tmp_path, idle_close_s=0.0)
    store = deleted(place)
    place.clock.advance(91 * DAY_S)
    place.stores.housekeep()
    assert floor(store) == 2
    place.stores.close()


def test_tombstones_are_kept_until_their_retention_is_over(tmp_path: Path):
    place = Place(tmp_path, idle_close_s=0.0)
    store = deleted(place)
    place.clock.advance(89 * DAY_S)
    place.stores.housekeep()
    assert floor(store) == 0
    place.stores.close()


def committed(store: Store, number: int) -> None:
    """As ``pushed``, by a device that is not behind the floor."""
    request = push(store.database.history or b"", number)
    (answer,) = store.service.push_many([(replace(request, cursor=number - 1), GRANT)])
    assert isinstance(answer, PushResponse)
    assert answer.results[0].verdict == Verdict.ACCEPTED


@pytest.mark.parametrize("retention_s", [1, 60, 600, 3000])
def test_a_retention_of_less_than_an_hour_is_kept(tmp_path: Path, retention_s: int):
    place = Place(tmp_path, idle_close_s=0.0, tombstone_retention_days=retention_s / DAY_S)
    store = place.use()
    for number in range(1, 30):
        committed(store, number)
        place.clock.advance(retention_s / 10)
        place.stores.housekeep()
    # What is older than the retention is gone, but for the distance of two looks; the rest stays.
    assert (10 if retention_s == 1 else 14) <= floor(store) <= 20
    for _ in range(2):  # the first look notes that nothing came after the last commit
        place.clock.advance(2 * retention_s)
        place.stores.housekeep()
    assert floor(store) == 29
    place.stores.release(store)
    place.stores.close()


def test_a_servers_clock_that_was_in_2100_does_not_stop_retention(tmp_path: Path):
    place = Place(tmp_path, idle_close_s=0.0)
    store = place.use()
    pushed(store, 1)
    place.clock.advance(75 * 365 * DAY_S)
    pushed(store, 2)
    place.clock.advance(-75 * 365 * DAY_S)
    for day in range(120):
        committed(store, 3 + day)
        place.clock.advance(DAY_S)
        place.stores.housekeep()
    assert 25 <= floor(store) <= 35
    place.stores.release(store)
    place.stores.close()


def test_housekeeping_does_not_keep_a_database_from_being_idle(place: Place):
    place.touch("shop")
    for _ in range(4):
        place.clock.advance(100)
        place.stores.housekeep()
    assert place.stores.open_count == 0
