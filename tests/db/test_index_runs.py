"""Indexes built from sorted runs: complete, counted, and never from what is not so any more."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from entidb import Index
from entidb.db import Database, index_builder, index_care, index_run
from entidb.db.index_care import build_step, declare
from entidb.db.index_pace import LEAST, STEP_S, Pace
from entidb.db.writer import Writer
from entidb.errors import StorageFullError
from entidb.storage import MemoryStorage
from tests.support import FakeClock, uid


def unbuilt(count: int, monkeypatch: pytest.MonkeyPatch, page: int = 8) -> Database:
    """A database with an index that is declared, and pages and runs that are small."""
    monkeypatch.setattr(index_run, "_PAGE_ROWS", page)
    monkeypatch.setattr(index_care, "FIRST_ROWS", 2 * page)
    monkeypatch.setattr(index_care, "ROWS_MIN", page)
    db = Database(MemoryStorage(), clock=FakeClock(), entropy=random.Random(1).randbytes)
    with db.transaction() as tx:
        for n in range(count):
            tx.collection("stock")[uid(n + 1)] = {"kind": (n * 7) % 10, "price": n}
    declare(db, "stock", [Index("kind")])
    return db


def found_by_kind(db: Database) -> list[list[int]]:
    stock = db.collection("stock")
    return [[i.int for i in stock.where(kind=kind).scan(False).ids()] for kind in range(10)]


def by_hand(db: Database) -> list[list[int]]:
    items = list(db.collection("stock").items())
    return [[i.int for i, value in items if value["kind"] == kind] for kind in range(10)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 40, 41])
@pytest.mark.parametrize("places", [1, 5, 1000])
def test_an_index_is_built_from_sorted_runs(
    count: int, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unbuilt(count, monkeypatch) as db:
        while build_step(db, places=places):
            pass
        assert found_by_kind(db) == by_hand(db)
        assert [(each.ready, each.done) for each in db.indexes()] == [(True, count)]
        assert db.verify() == []
        assert db.index_run is None


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_what_others_commit_while_an_index_is_built_from_runs_is_in_it(
    every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, steps = random.Random(every), 0
    with unbuilt(60, monkeypatch) as db:
        stock = db.collection("stock")
        while build_step(db, places=3):
            steps += 1
            if steps % every == 0 and steps < 90:
                stock[uid(rng.randrange(1, 80))] = {"kind": rng.randrange(10), "price": 0}
                stock.discard(uid(rng.randrange(1, 80)))
        assert found_by_kind(db) == by_hand(db)
        assert db.indexes()[0].done == len(stock)
        assert db.verify() == []


def heard_all(run: index_run.IndexRun) -> bool:
    return run.is_current


@contextlib.contextmanager
def not_heard(db: Database) -> Iterator[None]:
    """What is committed meanwhile comes from another process: its run is not this one's."""
    mine, db.index_run = db.index_run, None
    yield
    db.index_run = mine


def test_a_run_goes_on_past_commits_of_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    in_the_turn = index_care._build

    def build(*given: Any) -> int:
        looked.append(given)
        return in_the_turn(*given)

    monkeypatch.setattr(index_care, "_build", build)
    with unbuilt(60, monkeypatch) as db:
        stock, steps = db.collection("stock"), 0
        while build_step(db, places=3):
            steps += 1
            if steps < 40:
                stock[uid(steps)] = {"kind": steps % 10, "price": 0}  # another one, or as it was
                stock.discard(uid(61 - steps))
                db.collection("others").add({})
                with db.transaction() as tx:
                    for n in range(4):
                        tx.collection("stock").add({"kind": n, "price": -1})
        assert looked == []
        assert found_by_kind(db) == by_hand(db)
        assert db.indexes()[0].done == len(stock)
        assert db.verify() == []


@pytest.mark.parametrize("fails", ["in the store", "before it"])
def test_a_run_does_not_believe_what_it_heard_of_a_commit_that_failed(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unbuilt(60, monkeypatch) as db:
        stock = db.collection("stock")
        for _ in range(2):
            assert build_step(db, places=3)
        run = db.index_run
        assert run is not None
        assert heard_all(run)

        def refuse(*given: Any) -> int:
            raise StorageFullError("the disk is full")

        with monkeypatch.context() as patch:
            if fails == "in the store":
                patch.setattr(db.storage, "commit", refuse)
            else:
                patch.setattr(Writer, "finish_places", refuse)
            with pytest.raises(StorageFullError):
                stock.discard(uid(16))
        assert not heard_all(run)
        while build_step(db, places=3):
            pass
        assert uid(16) in stock
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_run_is_shorter_after_one_that_others_made_void_and_longer_after_one_that_came_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    with unbuilt(200, monkeypatch) as db:
        db.index_paces.rows = Pace(5)
        prepare = index_care._prepare

        def disturbed(*given: Any) -> None:
            before = db.index_run
            prepare(*given)
            assert db.index_run is not None
            if db.index_run is not before:
                lengths.append(db.index_run.rows)
            if len(lengths) < 3:
                with not_heard(db):
                    db.collection("others").add({})

        monkeypatch.setattr(index_care, "_prepare", disturbed)
        while build_step(db, places=1000):
            pass
        assert lengths[:5] == [16, 8, 8, 32, 128]
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_build_goes_on_after_the_last_run_that_came_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with unbuilt(60, monkeypatch) as db:
        for _ in range(9):
            assert build_step(db, places=3)
        inner = db.storage
        assert isinstance(inner, MemoryStorage)
        with Database(inner.copy()) as again:
            assert 0 < again.indexes()[0].done < 60
            again.wait_for_indexes()
            assert found_by_kind(again) == by_hand(again)
            assert again.verify() == []


def test_a_run_that_is_ended_early_is_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with unbuilt(60, monkeypatch) as db:
        assert build_step(db, is_ended=lambda: True)
        assert db.indexes()[0].done == 8
        db.wait_for_indexes()
        assert found_by_kind(db) == by_hand(db)


@pytest.mark.parametrize("when", ["while it prepares", "after a part"])
def test_who_is_overtaken_by_another_process_writes_nothing_and_lets_it_build(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr("entidb.db.index_care.time.sleep", rests.append)
    monkeypatch.setattr(index_care, "REST_S", 0.01)
    with unbuilt(60, monkeypatch) as db:

        def others() -> None:
            """Another process builds a part; it has no run of this one, and its own is not here."""
            mine, db.index_run = db.index_run, None
            with db.write("local") as writer:
                info = writer.catalogue.by_name["stock"]
                make = index_care._buildable(db, writer)[0][2]
                index_care._build(writer, info, info.indexes[0], make, 5)
            db.index_run = mine

        if when == "after a part":
            assert build_step(db, places=3)
            others()
        else:
            prepare = index_care._prepare

            def overtaken(*given: Any) -> None:
                prepare(*given)
                monkeypatch.setattr(index_care, "_prepare", prepare)
                others()

            monkeypatch.setattr(index_care, "_prepare", overtaken)
        assert build_step(db, places=3)
        assert db.indexes()[0].done == 5
        assert rests and db.index_run is None
        rests.clear()
        while build_step(db, places=3):
            pass
        assert rests == []
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_run_is_not_counted_for_a_commit_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with unbuilt(60, monkeypatch) as db:
        build_step(db, places=3)
        with monkeypatch.context() as patch:
            patch.setattr(db.storage, "commit", _no_room)
            with pytest.raises(StorageFullError):
                build_step(db, places=3)
        while build_step(db, places=3):
            pass
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_build_goes_on_by_itself_when_the_disk_has_room_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    real = build_step

    def full_at_first(*arguments: Any, **named: Any) -> bool:
        tried.append(1)
        if len(tried) in (1, 3):
            raise StorageFullError("no room")
        return real(*arguments, **named)

    monkeypatch.setattr(index_builder, "_AGAIN_S", 0.01)
    with unbuilt(60, monkeypatch) as db:
        monkeypatch.setattr(index_builder, "build_step", full_at_first)
        db.build_indexes()
        until = time.monotonic() + 30
        while not all(each.ready for each in db.indexes()) and time.monotonic() < until:
            time.sleep(0.01)
        assert found_by_kind(db) == by_hand(db)


def _no_room(batch: Any, after: Any = None) -> int:
    raise StorageFullError("no room")


class FineClock(FakeClock):
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class SlowCommits(MemoryStorage):
    """Each commit takes a fixed time, and some more for each row."""

    def __init__(self, clock: FineClock) -> None:
        super().__init__()
        self.clock = clock
        self.flush_s = self.row_s = 0.0
        self.took_s: list[float] = []

    def commit(self, batch: Any, after: Any = None) -> int:
        seconds = self.flush_s + self.row_s * len(batch)
        self.took_s.append(seconds)
        self.clock.seconds += seconds
        return super().commit(batch, after)


@pytest.mark.parametrize("row_s", [0.000002, 0.000012])
@pytest.mark.parametrize("work", ["from runs", "in the turn", "emptying"])
def test_a_step_of_a_build_takes_no_longer_than_others_may_wait(
    row_s: float, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FineClock()
    storage = SlowCommits(clock)
    with Database(storage, clock=clock, entropy=random.Random(1).randbytes) as db:
        with db.transaction() as tx:
            for n in range(30_000):
                tx.collection("stock")[uid(n + 1)] = {"kind": n % 10}
        declare(db, "stock", [Index("kind")])
        if work == "emptying":
            db.wait_for_indexes()
            declare(db, "stock", [])
        storage.row_s = row_s
        storage.took_s.clear()
        if work == "in the turn":
            monkeypatch.setattr(index_run.IndexRun, "goes_on", lambda *given: False)
        while build_step(db):
            pass
        # And no shorter than that: else there would be more flushes than need be.
        steps = [seconds for seconds in storage.took_s if seconds > 10 * row_s]
        assert max(steps) <= 1.3 * STEP_S
        assert sorted(steps)[len(steps) // 2] >= min(0.6 * STEP_S, 1_900 * row_s)


def test_a_slow_flush_does_not_make_steps_smaller_without_end() -> None:
    pace = Pace(5_000)
    for _ in range(20):
        pace.took(pace.count, 0.2)
    assert pace.count == LEAST
    pace.took(3, 0.2)  # the last few of something
    for _ in range(20):
        pace.took(pace.count, 0.001)
    assert pace.count == 5_000
