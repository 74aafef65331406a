"""Waiting for the commits of other processes: told by the system, or by looking."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import DatabaseClosedError
from entidb.storage import LmdbStorage, file_events
from entidb.storage.file_events import FileWatch, watch_file
from entidb.storage.lmdb import waiting
from entidb.testing.openers import ProcessOpener

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="nobody is told of writes there"
)

LONG_S = 30.0
THREAD = "entidb-file-events"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStorage]:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as made:
        made.commit({b"a": b"1"})
        yield made


@pytest.fixture
def other(store: LmdbStorage) -> Iterator[ProcessOpener]:
    with contextlib.closing(ProcessOpener("entidb.storage:open_storage", store.path)) as opener:
        yield opener


@pytest.fixture
def looks(store: LmdbStorage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each mark that was read by one who waits."""
    found: list[int] = []
    mark = store._file.mark

    def look() -> int:
        found.append(mark())
        return found[-1]

    monkeypatch.setattr(store._file, "mark", look)
    return found


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + LONG_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def queue_is_there() -> bool:
    return any(thread.name == THREAD for thread in threading.enumerate())


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The system refuses that call of inotify(7)."""
    real = file_events._library()

    class Library:
        def __getattr__(self, wanted: str) -> Any:
            return fail if wanted == name else getattr(real, wanted)

    def fail(*_: object) -> int:
        ctypes.set_errno(errno.EMFILE)
        return -1

    monkeypatch.setattr(file_events, "_library", Library)


def wait_for_commit(store: LmdbStorage, other: ProcessOpener, number: int) -> bool:
    mark = store.mark()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(store.wait, mark, LONG_S)
        time.sleep(0.05)
        other.commit({b"b": str(number).encode()})
        return waits.result(LONG_S)


def looks_all_the_time(store: LmdbStorage, looks: list[int]) -> bool:
    """Whoever is told looks nine times meanwhile, and whoever is not forty times at least."""
    del looks[:]
    assert not store.wait(store.mark(), 2.0)
    return len(looks) > 12


# ---------------------------------------------------------------- told


def test_who_waits_hardly_looks(store: LmdbStorage, looks: list[int]) -> None:
    assert not store.wait(store.mark(), 0.0)
    assert queue_is_there()
    assert not looks_all_the_time(store, looks)


def test_who_waits_is_woken_by_what_another_process_commits(
    store: LmdbStorage, other: ProcessOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_CHECK_SECONDS", LONG_S)
    for number in range(5):
        began = time.monotonic()
        assert wait_for_commit(store, other, number)
        assert time.monotonic() - began < LONG_S / 2


def test_all_who_wait_are_woken(
    store: LmdbStorage, other: ProcessOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_CHECK_SECONDS", LONG_S)
    mark = store.mark()
    with ThreadPoolExecutor(8) as pool:
        all_wait = [pool.submit(store.wait, mark, LONG_S) for _ in range(8)]
        time.sleep(0.1)
        began = time.monotonic()
        other.commit({b"b": b"2"})
        assert all(each.result(LONG_S) for each in all_wait)
        assert time.monotonic() - began < LONG_S / 2


def test_after_a_compaction_the_new_file_is_watched(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not store.wait(store.mark(), 0.0)
    before = store._waiting._watch
    store.compact()
    assert not store.wait(store.mark(), 0.0)
    assert store._waiting._watch is not before
    monkeypatch.setattr(waiting, "_CHECK_SECONDS", LONG_S)
    with contextlib.closing(ProcessOpener("entidb.storage:open_storage", store.path)) as opener:
        began = time.monotonic()
        assert wait_for_commit(store, opener, 1)
        assert time.monotonic() - began < LONG_S / 2


def test_closing_wakes_who_waits(store: LmdbStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_CHECK_SECONDS", LONG_S)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(store.wait, store.mark(), LONG_S)
        time.sleep(0.05)
        began = time.monotonic()
        store.close()
        with pytest.raises(DatabaseClosedError):
            waits.result(LONG_S)
        assert time.monotonic() - began < LONG_S / 2


def test_a_store_that_is_lost_goes_although_somebody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_CHECK_SECONDS", LONG_S)
    lost = LmdbStorage.open(tmp_path / "db")
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(lost.wait, lost.mark(), LONG_S)
        time.sleep(0.05)
        gone, began = weakref.ref(lost), time.monotonic()
        with pytest.warns(ResourceWarning, match="unclosed database"):
            del lost
        assert gone() is None
        with pytest.raises(DatabaseClosedError):
            waits.result(LONG_S)
        assert time.monotonic() - began < LONG_S / 2
    LmdbStorage.open(tmp_path / "db").close()


def test_one_queue_and_one_thread_serve_many_files_and_end_with_the_last(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(200)]  # more than a user has queues
    watches = []
    for path in paths:
        path.write_bytes(b"1")
        watch = watch_file(str(path))
        assert watch is not None
        watches.append(watch)
    assert [thread.name for thread in threading.enumerate()].count(THREAD) == 1
    news = [watch.next for watch in watches]
    paths[7].write_bytes(b"2")
    assert news[7].wait(LONG_S)
    assert not any(each.is_set() for at, each in enumerate(news) if at != 7)
    for watch in watches:
        watch.end()
        watch.end()
    until(lambda: not queue_is_there())
    again = watch_file(str(paths[0]))
    assert again is not None
    one = again.next
    paths[0].write_bytes(b"3")
    assert one.wait(LONG_S)
    again.end()


def test_a_file_watched_twice_stirs_both_until_each_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    one, two = watch_file(str(path)), watch_file(str(path))
    assert one is not None
    assert two is not None
    both = one.next, two.next
    path.write_bytes(b"2")
    assert all(each.wait(LONG_S) for each in both)
    one.end()
    news = two.next
    path.write_bytes(b"3")
    assert news.wait(LONG_S)
    two.end()


def test_a_queue_that_has_overflown_stirs_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    watch = watch_file(str(path))
    assert watch is not None
    queue = watch._queue
    overflown = file_events._EVENT.pack(file_events._OVERFLOWN, 0x4000, 0, 0)
    named = file_events._EVENT.pack(watch._number + 99, 2, 0, 16) + b"n" * 16
    assert queue._watched(file_events._numbers(named)) == []
    assert queue._watched(file_events._numbers(named + overflown)) == [watch]
    watch.end()


def test_a_forked_child_leaves_the_watches_of_its_parent(
    store: LmdbStorage, other: ProcessOpener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_CHECK_SECONDS", LONG_S)
    assert not store.wait(store.mark(), 0.0)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            store.close()
            (tmp_path / "own").write_bytes(b"1")
            own = watch_file(str(tmp_path / "own"))
            assert own is not None
            news = own.next
            (tmp_path / "own").write_bytes(b"2")
            code = 0 if news.wait(LONG_S) else 2
            own.end()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    began = time.monotonic()
    assert wait_for_commit(store, other, 1)
    assert time.monotonic() - began < LONG_S / 2


# ---------------------------------------------------------------- not told


@pytest.mark.parametrize("call", ["inotify_init1", "inotify_add_watch"])
def test_without_a_queue_of_the_system_who_waits_looks(
    store: LmdbStorage,
    other: ProcessOpener,
    looks: list[int],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    refuse(monkeypatch, call)
    assert wait_for_commit(store, other, 1)
    assert looks_all_the_time(store, looks)
    until(lambda: not queue_is_there())


def test_where_the_system_tells_of_nothing_that_happens_who_waits_looks_after_a_while(
    store: LmdbStorage, other: ProcessOpener, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a file that another machine writes."""
    deaf: list[FileWatch] = []

    def watch_nothing(path: str) -> FileWatch | None:
        watch = watch_file(path)
        assert watch is not None
        monkeypatch.setattr(watch, "stir", lambda: None)
        watch.stirred_at -= LONG_S
        deaf.append(watch)
        return watch

    monkeypatch.setattr(waiting, "watch_file", watch_nothing)
    for number in range(waiting._MISSED_MAX):
        assert store._waiting._missed == number
        assert wait_for_commit(store, other, number)
    assert store._waiting._watch is None
    assert looks_all_the_time(store, looks)
    assert len(deaf) == 1


def test_one_that_was_late_once_is_not_taken_for_deaf(
    store: LmdbStorage, other: ProcessOpener
) -> None:
    assert not store.wait(store.mark(), 0.0)
    watch = store._waiting._watch
    assert watch is not None
    for number in range(2 * waiting._MISSED_MAX):
        watch.stirred_at -= LONG_S
        store._waiting._note(watch, time.monotonic(), time.monotonic())
        assert store._waiting._missed == 1
        assert wait_for_commit(store, other, number)
        assert store._waiting._missed == 0
