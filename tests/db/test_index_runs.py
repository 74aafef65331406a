"""Indexes built from sorted runs: complete, counted, and never from what is not so any more."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entidb import Index
from entidb.db import Database, index_builder, index_care, index_parts, index_run
from entidb.db.index_builder import IndexBuilder
from entidb.db.index_care import build_on, build_step, declare
from entidb.db.index_pace import LEAST, STEP_S, Pace
from entidb.db.index_parts import Parts
from entidb.db.index_run import IndexRun
from entidb.db.local import Role
from entidb.db.maintenance import purge_tombstones
from entidb.db.records import REMOTE, EntityRow, payload_of
from entidb.db.writer import Writer
from entidb.errors import StorageError, StorageFullError
from entidb.storage import MemoryStorage
from tests.support import FakeClock, uid


def unbuilt(
    count: int, monkeypatch: pytest.MonkeyPatch, page: int = 8, role: Role = Role.DEVICE
) -> Database:
    """A database with an index that is declared, and pages and runs that are small."""
    monkeypatch.setattr(index_run, "_PAGE_ROWS", page)
    monkeypatch.setattr(index_care, "FIRST_ROWS", 2 * page)
    monkeypatch.setattr(index_care, "ROWS_MIN", page)
    entropy = random.Random(1).randbytes
    db = Database(MemoryStorage(), role=role, clock=FakeClock(), entropy=entropy)
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
    return [[i.int for i, value in items if value.get("kind") == kind] for kind in range(10)]


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


@pytest.fixture(params=["this process", "another process"])
def whose(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def writing(db: Database, whose: str) -> Iterator[Database]:
    """The database of who commits while ``db`` builds."""
    if whose == "this process":
        yield db
        return
    assert isinstance(db.storage, MemoryStorage)
    entropy = random.Random(2).randbytes
    with Database(db.storage.another(), role=db.role, clock=FakeClock(), entropy=entropy) as other:
        yield other


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("at_once", [8, 8_192])
def test_what_is_committed_while_an_index_is_built_from_runs_is_in_it(
    every: int, at_once: int, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, steps = random.Random(every), 0
    ids = range(1, 80)
    monkeypatch.setattr(index_run, "_AT_ONCE", at_once)
    monkeypatch.setattr(index_run, "_FEED_ROWS", 2)
    with unbuilt(60, monkeypatch) as db, writing(db, whose) as other:
        stock, read = other.collection("stock"), IndexRun.read

        def commit() -> None:
            nonlocal steps
            steps += 1
            if steps % every == 0 and steps < 90:
                stock[uid(rng.choice(ids))] = {"kind": rng.randrange(10), "price": 0}
                stock.discard(uid(rng.choice(ids)))
                stock[uid(rng.choice(ids))] = {"price": 0}

        def disturbed(*given: Any) -> None:
            commit()
            read(*given)
            commit()

        monkeypatch.setattr(IndexRun, "read", disturbed)
        while build_step(db, places=3):
            commit()
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_run_goes_on_past_what_others_commit(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_care, "_build", lambda *given: pytest.fail("the run was ended"))
    with unbuilt(60, monkeypatch) as db, writing(db, whose) as other:
        stock, steps = other.collection("stock"), 0
        while build_step(db, places=3):
            steps += 1
            if steps < 40:
                stock[uid(steps)] = {"kind": steps % 10, "price": 0}  # another one, or as it was
                stock.discard(uid(61 - steps))
                other.collection("others").add({})
                with other.transaction() as tx:
                    for n in range(4):
                        tx.collection("stock").add({"kind": n, "price": -1})
        assert found_by_kind(db) == by_hand(db)
        assert db.indexes()[0].done == len(stock)
        assert db.verify() == []


def test_an_index_of_members_counts_each_entity_once_whatever_becomes_of_it(
    whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unbuilt(40, monkeypatch) as db, writing(db, whose) as other:
        tags: list[list[int]] = [[1, 2, 3], [], [4]]
        with db.transaction() as tx:
            for n in range(40):
                tx.collection("stock")[uid(n + 1)] = {"tags": tags[n % 3]}
        declare(db, "stock", [Index("tags", each=True)])
        rng, stock = random.Random(1), other.collection("stock")
        for _ in range(60):
            build_step(db, places=2)
            stock[uid(rng.randrange(1, 50))] = {"tags": rng.choice(tags)}
        db.wait_for_indexes()
        assert db.verify() == []
        assert db.indexes()[0].done == sum(1 for value in stock.values() if value["tags"])


def test_an_id_that_looks_like_the_end_of_one_and_the_beginning_of_the_next_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with unbuilt(40, monkeypatch) as db:
        monkeypatch.setattr(index_care, "FIRST_ROWS", 1_000)
        monkeypatch.setattr(index_run, "_PAGE_ROWS", 512)
        assert build_step(db, places=3)
        db.collection("stock")[uid(1 << 8)] = {"kind": 1, "price": 0}
        db.wait_for_indexes()
        assert db.indexes()[0].done == 41
        assert db.verify() == []


@pytest.mark.parametrize("fails", ["in the store", "before it"])
def test_a_run_does_not_believe_a_commit_that_failed(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unbuilt(60, monkeypatch) as db:
        stock = db.collection("stock")
        for _ in range(2):
            assert build_step(db, places=3)

        def refuse(*given: Any) -> int:
            raise StorageFullError("the disk is full")

        with monkeypatch.context() as patch:
            if fails == "in the store":
                patch.setattr(db.storage, "commit", refuse)
            else:
                patch.setattr(Writer, "finish_places", refuse)
            with pytest.raises(StorageFullError):
                stock.discard(uid(16))
        while build_step(db, places=3):
            pass
        assert uid(16) in stock
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_run_is_shorter_after_one_that_was_void_and_longer_after_one_that_came_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(index_run, "CHANGED_MAX", 3)
    with unbuilt(200, monkeypatch) as db:
        db.index_paces.rows = Pace(5)
        read = IndexRun.read

        def disturbed(self: IndexRun, *given: Any) -> None:
            read(self, *given)
            if self.is_read:
                lengths.append(self.rows)
                if len(lengths) < 3:
                    for n in range(len(lengths) * 5 - 4, len(lengths) * 5):
                        db.collection("stock")[uid(n)] = {"kind": 1, "price": 0}

        monkeypatch.setattr(IndexRun, "read", disturbed)
        while build_step(db, places=1000):
            pass
        assert lengths[:5] == [16, 8, 8, 128, 2048]
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


@pytest.mark.parametrize("times", [3, 9])
def test_a_run_learns_no_more_in_the_turn_than_others_may_wait_for(
    times: int, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_run, "_FEED_ROWS", 2)
    monkeypatch.setattr(index_care, "LEARNT_MAX", 10)
    learnt: list[int] = []
    with unbuilt(60, monkeypatch) as db, writing(db, whose) as other:
        take_note, make_ready = IndexRun._take_note, IndexRun.make_ready

        def note(self: IndexRun, entity_id: bytes) -> None:
            learnt[-1] += db.in_transaction
            take_note(self, entity_id)

        def commit_much(self: IndexRun, count: int) -> None:
            """Just before it takes the turn."""
            make_ready(self, count)
            if len(learnt) < times:
                with other.transaction() as tx:
                    for n in range(12):
                        tx.collection("stock")[uid(n + 1)] = {"kind": len(learnt), "price": 0}
            learnt.append(0)

        monkeypatch.setattr(IndexRun, "_take_note", note)
        monkeypatch.setattr(IndexRun, "make_ready", commit_much)
        voided = []
        while build_step(db, places=3):
            run = db.index_run
            if run is not None and run.is_void:
                voided.append(run)
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []
    assert set(learnt[: times - 1]) <= {0, 4}, "the rest of twelve is learnt before the next turn"
    assert bool(voided) is (times > 3), "no run waits for ever"


def test_a_run_is_void_where_what_it_should_learn_is_purged(
    whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unbuilt(60, monkeypatch, role=Role.SERVER) as db, writing(db, whose) as other:
        assert build_step(db, places=3)
        run = db.index_run
        other.collection("stock").discard(uid(16))
        other.collection("stock").discard(uid(3))
        assert purge_tombstones(other, other.read_head().sequence) == 2
        assert build_step(db, places=3)
        assert run is not None and run.is_void
        db.wait_for_indexes()
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_a_run_is_void_in_another_opening_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has read, and what it has written, may be lost there."""
    with unbuilt(60, monkeypatch) as db:
        assert build_step(db, places=3)
        run = db.index_run
        assert run is not None
        monkeypatch.setattr(index_run, "opening_of", lambda mark: 7)
        assert build_step(db, places=3)
        assert run.is_void
        db.wait_for_indexes()
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_all_runs_of_a_process_have_one_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_run, "_runs", weakref.WeakSet())
    monkeypatch.setattr(index_run, "_BYTES_MAX", 3_000)
    monkeypatch.setattr(index_run, "_BYTES_LEAST", 600)
    monkeypatch.setattr(index_parts, "_SORTED", 1)
    sizes = []
    with unbuilt(200, monkeypatch) as one, unbuilt(200, monkeypatch) as two:
        monkeypatch.setattr(index_care, "FIRST_ROWS", 1_000)
        for db in (one, two):
            assert build_step(db, places=1)
            assert db.index_run is not None
            sizes.append(db.index_run.size)
        assert 3_000 <= sizes[0] < 3_500
        assert 600 <= sizes[1] < 1_100
        for db in (one, two):
            db.wait_for_indexes()
            assert found_by_kind(db) == by_hand(db)
            assert db.verify() == []


@given(st.lists(st.sampled_from(["clean", "pending", "deleted", "deletion pending"])))
def test_entities_are_read_in_columns_as_one_by_one(kinds: list[str]) -> None:
    page = []
    for n, kind in enumerate(kinds):
        payload = None if "delet" in kind else b"%d" % n
        pending = 7 if "pending" in kind else 0
        row = EntityRow(REMOTE * (n % 2), 5, 1, bytes(16), 9, pending, payload)
        page.append((b"e1234" + uid(n).bytes, row.encode()))
    there = [(key[5:], payload) for key, raw in page if (payload := payload_of(raw)) is not None]
    assert list(zip(*index_run._columns(page), strict=True)) == there


@given(
    st.lists(st.lists(st.binary(min_size=1, max_size=3), max_size=20), max_size=8),
    st.lists(st.integers(1, 9), min_size=1),
    st.integers(1, 40),
)
def test_places_come_out_of_their_parts_in_order_and_each_once(
    groups: list[list[bytes]], counts: list[int], stops: int
) -> None:
    places = sorted({one for group in groups for one in group})
    left = set(places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_parts, "_SORTED", 7)
        patch.setattr(index_parts, "_STOPS", stops)
        parts = Parts(b"i")
        for group in groups:
            parts.add([one for one in dict.fromkeys(group) if one in left])
            left -= set(group)
        parts.sort()
        found: list[bytes] = []
        at = 0
        while not parts.is_over:
            part = parts.make_ready(counts[at % len(counts)])
            assert parts.make_ready(1_000) == part, "as long as it was not taken"
            found += part
            was_last = parts.is_last
            parts.took()
            assert parts.is_over is was_last
            at += 1
    assert found == [b"i" + one for one in places]
    assert parts.size == 0


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
            with writing(db, "another process") as other:
                assert build_step(other, 5)

        if when == "after a part":
            assert build_step(db, places=3)
            others()
        else:
            read = IndexRun.read

            def overtaken(*given: Any) -> None:
                read(*given)
                monkeypatch.setattr(IndexRun, "read", read)
                others()

            monkeypatch.setattr(IndexRun, "read", overtaken)
        assert build_step(db, places=3)
        assert db.indexes()[0].done == 5
        assert rests and db.index_run is None
        rests.clear()
        while build_step(db, places=3):
            pass
        assert rests == []
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


WRITER = """
import random, sys
from entidb.db import Database
rng = random.Random(1)
with Database.open(sys.argv[1]) as db:
    stock = db.collection("stock")
    ids = list(stock.where().ids())
    print("here", flush=True)
    for n in range(60):
        with db.transaction() as tx:
            stock = tx.collection("stock")
            stock[rng.choice(ids)] = {"kind": n % 10}
            stock.discard(rng.choice(ids))
            stock.add({"kind": n % 10})
            stock[rng.choice(ids)] = {}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="one process at a time there")
def test_a_run_goes_on_past_what_a_real_process_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_care, "_build", lambda *given: pytest.fail("the run was ended"))
    with Database.open(tmp_path) as db:
        with db.transaction() as tx:
            for n in range(2_000):
                tx.collection("stock").add({"kind": n % 10})
        declare(db, "stock", [Index("kind")])
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"here\n"
            marks = set()
            while writer.poll() is None:
                build_step(db, places=5)
                marks.add(db.storage.mark())
        assert writer.returncode == 0
        db.wait_for_indexes()
        assert len(marks) > 20
        assert found_by_kind(db) == by_hand(db)
        assert db.verify() == []


def test_one_process_builds_and_the_others_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("entidb.db.index_care.time.sleep", rests.append)
    monkeypatch.setattr(index_care, "REST_S", 0.001)
    with unbuilt(60, monkeypatch) as db, writing(db, "another process") as other:
        assert build_on(db)
        mark = db.storage.mark()
        assert build_on(other)
        assert rests and db.storage.mark() == mark
        while build_on(db):
            pass
        assert not build_on(other)
        assert other.index_right.take(0) and not db.index_right.take(0)
        assert found_by_kind(other) == by_hand(other)
        assert db.verify() == []


@pytest.mark.parametrize("how", ["built", "failed", "out of time"])
def test_who_does_not_build_any_more_lets_others_build(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unbuilt(60, monkeypatch) as db, writing(db, "another process") as other:
        monkeypatch.setattr(IndexBuilder, "start", lambda self: None)
        with monkeypatch.context() as patch:
            if how == "failed":
                patch.setattr(db.storage, "commit", _no_room)
                with pytest.raises(StorageFullError):
                    db.wait_for_indexes()
            else:
                assert db.wait_for_indexes(0 if how == "out of time" else None) is (how == "built")
        assert other.index_right.take(0)
        other.wait_for_indexes()
        assert other.indexes()[0].ready and other.verify() == []


class NoRight:
    mine = False

    def take(self, timeout_s: float | None = None) -> bool:
        raise StorageError("no file can be made")

    def give_back(self) -> None:
        return


def test_an_index_is_built_where_the_right_to_build_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with unbuilt(60, monkeypatch) as db:
        monkeypatch.setattr(db, "index_right", NoRight())
        assert db.wait_for_indexes()
        assert found_by_kind(db) == by_hand(db)


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
        monkeypatch.setattr(index_care, "build_step", full_at_first)
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


@pytest.mark.parametrize(("flush_s", "row_s"), [(0, 0.000002), (0, 0.000012), (0.02, 0.000002)])
@pytest.mark.parametrize("work", ["from runs", "in the turn", "emptying"])
def test_a_step_of_a_build_takes_no_longer_than_others_may_wait(
    flush_s: float, row_s: float, work: str, monkeypatch: pytest.MonkeyPatch
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
        storage.flush_s, storage.row_s = flush_s, row_s
        storage.took_s.clear()
        if work == "in the turn":
            monkeypatch.setattr(index_run.IndexRun, "goes_on", lambda *given: False)
        while build_step(db):
            pass
        # And no shorter than that: else there would be more flushes than need be.
        steps = [each - flush_s for each in storage.took_s if each - flush_s > 10 * row_s]
        assert max(steps) <= 1.3 * STEP_S
        assert sorted(steps)[len(steps) // 2] >= min(0.6 * STEP_S, 1_900 * row_s)


def test_a_slow_flush_makes_steps_no_smaller_and_slow_places_do() -> None:
    pace = Pace(5_000)

    def steps(flush_s: float, each_s: float) -> int:
        counts = []
        for _ in range(200):
            counts.append(pace.count)
            pace.took(pace.count, flush_s + each_s * pace.count)
        return sorted(counts[-40:])[20]

    assert steps(0.2, 0) == 5_000
    pace.took(3, 0.9)  # the last few of something
    assert steps(0.002, 0.00001) == pytest.approx(STEP_S / 0.00001, rel=0.1)
    assert steps(0.1, 0.0001) <= 2 * LEAST
    assert steps(0, 0.000001) == 5_000
