"""A database that several processes have open: what each believes, and what its observers hear."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.db.observers import CommitEvent
from entidb.storage import MemoryStorage
from tests.db.test_database import run_python

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="one process at a time there"
)
Pair = tuple[Database, Database]


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.002)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two databases on one store: as two processes have it, and at the pace of the test."""
    storage = MemoryStorage()
    with Database(storage) as one, Database(storage.another()) as two:
        yield one, two


# ---------------------------------------------------------------- what each believes


def test_each_process_builds_on_what_the_others_have_committed(pair: Pair) -> None:
    one, two = pair
    for n in range(10):
        one["notes"].add(n)
        two["notes"].add(n)
        two[f"only {n}"].add(n)
    assert one.sequence == two.sequence == 30
    assert len(one["notes"]) == len(two["notes"]) == 20
    assert one.collections() == two.collections()
    assert one.verify() == two.verify() == []
    assert one.device_id == two.device_id


def test_a_catalogue_that_another_has_changed_is_read_again(pair: Pair) -> None:
    one, two = pair
    one["notes"].add(1)
    two.declare_local("mine")
    with one.transaction() as tx:
        tx["notes"].add(2)
        tx["mine"].add(1)
    assert one.verify() == []
    assert one.collections() == ["mine", "notes"]
    one.set_scope(["notes"])
    assert two.scope == frozenset(["notes"])
    two["notes"].add(3)
    assert two.verify() == []


def test_a_moment_ends_with_a_commit_of_another(pair: Pair) -> None:
    one, two = pair
    moment = one.moment()
    assert moment.is_current()
    two["notes"].add(1)
    assert not moment.is_current()


def test_a_new_history_is_known_to_all(tmp_path: Path) -> None:
    storage = MemoryStorage()
    with (
        Database(storage, role=Role.SERVER) as one,
        Database(storage.another(), role=Role.SERVER) as two,
    ):
        assert one.history == two.history
        assert two.begin_history(5, 3_600_000)
        assert one.history == two.history


def test_a_transaction_waits_for_that_of_another_and_says_whose_it_is(pair: Pair) -> None:
    one, two = pair
    two._busy_timeout_s = 0.02
    with one.transaction() as tx:
        tx["notes"].add(1)
        with pytest.raises(Exception, match=r"(another|PostgreSQL) (opener|process)") as raised:
            two["notes"].add(2)
        assert getattr(raised.value, "code", None) == "busy"
    two["notes"].add(3)
    assert len(one["notes"]) == 2


def test_a_transaction_that_is_forgotten_holds_no_other_process_up(pair: Pair) -> None:
    one, two = pair
    tx = one.transaction()
    tx["notes"].add(1)
    del tx
    gc.collect()
    two["notes"].add(2)
    assert len(one["notes"]) == 1


# ---------------------------------------------------------------- observers


def heard(database: Database) -> list[tuple[int, str, list[object]]]:
    said: list[tuple[int, str, list[object]]] = []

    def observe(event: CommitEvent) -> None:
        said.append((event.sequence, event.origin, [each.value for each in event.events]))

    database.observe(observe)
    return said


def test_observers_hear_of_all_commits_once_and_in_their_order(pair: Pair) -> None:
    one, two = pair
    one["notes"].add("before")
    said = heard(one)
    two["notes"].add(2)
    two["notes"].add(3)
    one["notes"].add(4)
    two["notes"].add(5)
    one.hear_others()
    one.hear_others()
    one["notes"].add(6)
    assert said == [
        (2, "process", [2]),
        (3, "process", [3]),
        (4, "local", [4]),
        (5, "process", [5]),
        (6, "local", [6]),
    ]


def test_of_what_changed_twice_elsewhere_observers_hear_what_it_is(pair: Pair) -> None:
    one, two = pair
    said = heard(one)
    key = two["notes"].add("first")
    two["notes"][key] = "second"
    two["notes"].add("other")
    one.hear_others()
    assert said == [(2, "process", ["second"]), (3, "process", ["other"])]


def test_an_own_commit_under_way_is_not_told_as_anothers(pair: Pair) -> None:
    one, two = pair
    said = heard(one)
    commit = one.storage.commit

    def commit_and_look(batch: dict[bytes, bytes | None], after: int | None = None) -> int:
        mark = commit(batch, after)
        one.hear_others()  # as the thread that hears does between the two
        return mark

    two["notes"].add(1)
    one.storage.commit = commit_and_look  # type: ignore[method-assign,assignment]
    one["notes"].add(2)
    assert said == [(1, "process", [1]), (2, "local", [2])]


@pytest.mark.process
@linux
def test_an_observer_hears_of_another_process(tmp_path: Path) -> None:
    code = """
import sys
from entidb.db import Database
with Database.open(sys.argv[1]) as database:
    for n in range(5):
        database["notes"].add(n)
"""
    with Database.open(tmp_path / "db") as database:
        said = heard(database)
        run_python(code, tmp_path / "db")
        until(lambda: len(said) == 5)
        assert said == [(n + 1, "process", [n]) for n in range(5)]
        database["notes"].add(5)
        until(lambda: len(said) > 5)  # by the thread that hears, if that is about to end its turn
        assert said[5:] == [(6, "local", [5])]


def hearing_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "entidb-hearing"]


@linux
def test_the_thread_that_hears_is_there_while_somebody_listens(tmp_path: Path) -> None:
    with Database.open(tmp_path / "db") as database:
        until(lambda: hearing_threads() == [])  # those of tests before take a moment to end
        for _ in range(3):
            end = database.observe(lambda event: None)
            assert len(hearing_threads()) == 1
            end()
            until(lambda: hearing_threads() == [])
        database.observe(lambda event: None)
    until(lambda: hearing_threads() == [])


@linux
def test_the_thread_that_hears_keeps_no_database_alive(tmp_path: Path) -> None:
    database = Database.open(tmp_path / "db")
    database.observe(lambda event: None)
    gone = weakref.ref(database)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del database
        until(lambda: gc.collect() >= 0 and gone() is None and hearing_threads() == [])
    # Beside what tests before this one may have left to the collector.
    unclosed = [str(each.message) for each in said if "unclosed database" in str(each.message)]
    assert any(str(tmp_path) in each for each in unclosed), unclosed
    Database.open(tmp_path / "db").close()


def test_a_store_that_nobody_else_opens_needs_no_thread() -> None:
    with contextlib.closing(Database.in_memory()) as database:
        database.observe(lambda event: None)
        assert hearing_threads() == []
