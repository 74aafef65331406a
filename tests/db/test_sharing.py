"""Threads that commit at once: one storage commit for all of them, and each as if it were alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entidb import Index
from entidb.db import CommitEvent, Database, sharing
from entidb.db.catalogue import empty_catalogue
from entidb.db.handed import Shared, do_errands
from entidb.db.local import commit_local as commit_local_as_it_is
from entidb.db.sharing import Sharing
from entidb.errors import (
    CommitUnknownError,
    DatabaseClosedError,
    NotUniqueError,
    ScopeError,
    StorageError,
    StorageFullError,
    TransactionError,
    TransactionTooLargeError,
)
from entidb.storage import LmdbStorage, MemoryStorage
from entidb.storage.base import Batch
from entidb.storage.turns import Turn, Turns
from tests.support import uid

#: Far beyond what a busy machine takes; only what would hang for good comes to it.
WAIT_S = 60.0


class Gate:
    """Commits of a store stand still while it is closed, and fail as they are told."""

    def __init__(self, database: Database) -> None:
        self._commit = database.storage.commit
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Semaphore(0)
        self.commits = 0
        self.before: Callable[[Batch], None] = lambda batch: None
        self.after: Callable[[Batch], None] = lambda batch: None
        database.storage.commit = self.commit  # type: ignore[method-assign]

    def commit(self, batch: Batch, after: int | None = None) -> int:
        self.waiting.release()
        assert self.open.wait(WAIT_S)
        self.before(batch)
        mark = self._commit(batch, after)
        self.commits += 1
        self.after(batch)
        return mark

    def close(self) -> None:
        self.open.clear()

    def reached(self) -> None:
        """Returns when a commit stands at it."""
        assert self.waiting.acquire(timeout=WAIT_S)


class Worker(threading.Thread):
    """A thread whose error is looked at."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.value: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self._work()
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        self.join(WAIT_S)
        assert not self.is_alive()
        return self.error


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def db() -> Iterator[Database]:
    database = Database(MemoryStorage(), busy_timeout_s=WAIT_S)
    database["n"][uid(1)] = 0
    yield database
    database.close()


@pytest.fixture
def gate(db: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    # While it is closed nobody else waits for the turn of the store, however long that takes.
    monkeypatch.setattr(sharing, "HOLD_S", 10 * WAIT_S)
    made = Gate(db)
    yield made
    made.open.set()


def waiting(db: Database, count: int) -> bool:
    return len(db._sharing.jobs) == count


def held_back(db: Database, gate: Gate, *works: Callable[[], object]) -> list[Worker]:
    """The first of ``works`` is about to be stored, the others wait behind it, in order."""
    gate.close()
    db._sharing.warm = True  # as if others had been there a moment ago
    workers = []
    for place, work in enumerate(works):
        workers.append(Worker(work))
        if not place:
            gate.reached()
        until(partial(waiting, db, place + 1))
    return workers


def put(db: Database, number: int, value: Any) -> Callable[[], None]:
    return lambda: db["n"].__setitem__(uid(number), value)


def one_more(db: Database, number: int) -> Callable[[], int]:
    """Reads and writes in one transaction; its sequence."""

    def work() -> int:
        with db.transaction() as tx:
            tx["n"][uid(number)] = tx["n"][uid(number)] + 1
        return tx.sequence

    return work


# ---------------------------------------------------------------- together, and each for itself


def test_threads_that_commit_at_once_share_a_storage_commit_and_have_their_own_sequence(
    db: Database, gate: Gate
) -> None:
    before = db.sequence
    workers = held_back(db, gate, *[one_more(db, 1) for _ in range(5)])
    assert db["n"][uid(1)] == 0, "nothing is seen before it is stored"
    gate.open.set()
    assert [worker.end() for worker in workers] == [None] * 5
    assert [worker.value for worker in workers] == list(range(before + 1, before + 6))
    assert gate.commits == 2
    assert db["n"][uid(1)] == 5
    assert db.verify() == []


def test_a_commit_returns_when_it_is_stored_and_not_before(db: Database, gate: Gate) -> None:
    first, second = held_back(db, gate, put(db, 2, "a"), put(db, 3, "b"))
    time.sleep(0.1)
    assert first.is_alive() and second.is_alive()
    gate.open.set()
    assert (first.end(), second.end()) == (None, None)


def test_a_transaction_reads_all_that_was_decided_before_it(db: Database, gate: Gate) -> None:
    read: list[Any] = []

    def look() -> None:
        with db.transaction() as tx:
            notes = tx["n"]
            read.extend((notes[uid(1)], notes.get(uid(2)), len(notes), sorted(notes.values())))
            read.append([row["k"] for _, row in tx["rows"].where(k="tea")])
            read.append(uid(3) in notes)

    db["n"][uid(3)] = 3
    db.collection("rows", indexes=[Index("k")])
    db["rows"][uid(1)] = {"k": "milk"}
    db["rows"].where(k="milk").delete()
    works: list[Callable[[], object]] = [put(db, 1, 7), put(db, 2, 8)]
    works.append(lambda: db["n"].__delitem__(uid(3)))
    works.append(lambda: db["rows"].add({"k": "tea"}))
    workers = held_back(db, gate, *works)
    reader = Worker(look)
    assert reader.end() is None, "who writes nothing waits for no commit"
    assert read == [7, 8, 2, [7, 8], ["tea"], False]
    gate.open.set()
    assert [worker.end() for worker in workers] == [None] * 4


def test_a_block_that_waits_for_the_commit_before_it_is_no_deadlock(db: Database) -> None:
    began, stored = threading.Event(), threading.Event()

    def second() -> None:
        began.set()
        with db.transaction() as tx:
            assert stored.wait(WAIT_S)
            tx["n"][uid(3)] = "second"

    with db.transaction() as tx:
        tx["n"][uid(2)] = "first"
        worker = Worker(second)
        assert began.wait(WAIT_S)
        until(lambda: len(db._turns.line) == 2)
    stored.set()
    assert worker.end() is None
    assert (db["n"][uid(2)], db["n"][uid(3)]) == ("first", "second")


def test_what_raises_in_its_block_or_is_too_large_undoes_only_itself(
    db: Database, gate: Gate
) -> None:
    db.transaction_bytes_max = 10_000

    def breaks() -> None:
        with db.transaction() as tx:
            tx["n"][uid(2)] = "half"
            raise ZeroDivisionError

    workers = held_back(db, gate, put(db, 3, 1))
    broken, large = Worker(breaks), Worker(put(db, 4, "x" * 20_000))
    assert isinstance(broken.end(), ZeroDivisionError)
    assert isinstance(large.end(), TransactionTooLargeError)
    last = Worker(one_more(db, 1))
    gate.open.set()
    assert [worker.end() for worker in (*workers, last)] == [None, None]
    assert dict(db["n"]) == {uid(1): 1, uid(3): 1}


def test_a_typed_write_keeps_what_it_does_not_know_of_a_value_on_its_way(
    db: Database, gate: Gate
) -> None:
    from dataclasses import dataclass

    @dataclass
    class Note:
        text: str

    typed = db.collection("typed", Note)
    workers = held_back(
        db,
        gate,
        put(db, 2, 0),
        lambda: db["typed"].__setitem__(uid(1), {"text": "a", "colour": "red"}),
        lambda: typed.__setitem__(uid(1), Note("b")),
    )
    gate.open.set()
    assert [worker.end() for worker in workers] == [None] * 3
    assert db["typed"][uid(1)] == {"text": "b", "colour": "red"}


# ---------------------------------------------------------------- failures


def test_a_commit_that_fails_fails_for_all_in_it_and_for_what_has_read_it(
    db: Database, gate: Gate
) -> None:
    first = held_back(db, gate, put(db, 9, 9))
    together = [Worker(one_more(db, 1)), Worker(put(db, 2, 2))]
    until(lambda: len(db._sharing.jobs) == 3)
    failing = iter([None, StorageError("the disk is gone")])

    def before(batch: Batch) -> None:
        error = next(failing, None)
        if error is not None:
            # Those two are about to fail; one has read what they wrote, one has not.
            late.extend((Worker(one_more(db, 1)), Worker(put(db, 3, 3))))
            until(lambda: len(db._sharing.jobs) == 4)
            raise error

    late: list[Worker] = []
    gate.before = before
    gate.open.set()
    assert first[0].end() is None
    errors = [worker.end() for worker in together]
    assert [type(error) for error in errors] == [StorageError, StorageError]
    assert errors[0] is not errors[1], "each thread raises its own"
    assert isinstance(late[0].end(), StorageError)
    assert late[1].end() is None
    assert dict(db["n"]) == {uid(1): 0, uid(3): 3, uid(9): 9}
    assert one_more(db, 1)() and db["n"][uid(1)] == 1
    assert db.verify() == []


def test_a_disk_that_is_full_for_all_may_have_room_for_each(db: Database, gate: Gate) -> None:
    def before(batch: Batch) -> None:
        if any(value is not None and b"large" in value for value in batch.values()):
            raise StorageFullError("no room")

    gate.before = before
    workers = held_back(db, gate, put(db, 9, 0), put(db, 2, "large"), put(db, 3, "small"))
    gate.open.set()
    assert [type(worker.end()) for worker in workers] == [
        type(None),
        StorageFullError,
        type(None),
    ]
    assert dict(db["n"]) == {uid(1): 0, uid(3): "small", uid(9): 0}


def test_what_has_read_of_one_that_found_no_room_fails_with_it(db: Database, gate: Gate) -> None:
    def before(batch: Batch) -> None:
        if any(value is not None and b"large" in value for value in batch.values()):
            raise StorageFullError("no room")

    def copies() -> None:
        with db.transaction() as tx:
            tx["n"][uid(3)] = len(tx["n"][uid(2)])

    gate.before = before
    works = [put(db, 9, 0), put(db, 2, "large"), copies, put(db, 4, 4)]
    workers = held_back(db, gate, *works)
    gate.open.set()
    kinds = [type(worker.end()) for worker in workers]
    assert kinds == [type(None), StorageFullError, StorageFullError, type(None)]
    assert dict(db["n"]) == {uid(1): 0, uid(4): 4, uid(9): 0}


def test_one_that_cannot_be_staged_is_nobody_elses_error(
    db: Database, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = commit_local_as_it_is

    def commit_local(writer: Any, role: Any, writes: Any, *rest: Any) -> int:
        made = original(writer, role, writes, *rest)
        if "refused" in writes:
            raise ScopeError("no more collections")
        return made

    monkeypatch.setattr(sharing, "commit_local", commit_local)
    works = [put(db, 9, 0), put(db, 2, 2), lambda: db["refused"].add(1), put(db, 3, 3)]
    workers = held_back(db, gate, *works)
    gate.open.set()
    kinds = [type(worker.end()) for worker in workers]
    assert kinds == [type(None), type(None), ScopeError, type(None)]
    assert dict(db["n"]) == {uid(1): 0, uid(2): 2, uid(3): 3, uid(9): 0}
    assert db.collections() == ["n"]


def test_an_outcome_that_is_unknown_is_unknown_to_all_and_not_tried_again(
    db: Database, gate: Gate
) -> None:
    def after(batch: Batch) -> None:
        if gate.commits == 2:
            raise CommitUnknownError("the power is gone")

    gate.after = after
    workers = held_back(db, gate, put(db, 9, 0), one_more(db, 1), put(db, 2, 2))
    gate.open.set()
    kinds = [type(worker.end()) for worker in workers]
    assert kinds == [type(None), CommitUnknownError, CommitUnknownError]
    assert gate.commits == 2
    # It was stored, as it happens, and once.
    assert (db["n"][uid(1)], db["n"][uid(2)]) == (1, 2)


def test_what_is_unique_is_refused_to_one_and_nobody_builds_on_it(db: Database, gate: Gate) -> None:
    db.collection("users", indexes=[Index("email", unique=True)])
    db["users"][uid(1)] = {"email": "a"}
    db.wait_for_indexes()

    def both() -> None:
        with db.transaction() as tx:
            tx["n"][uid(3)] = tx["n"][uid(2)]
            tx["users"][uid(3)] = {"email": "a"}

    workers = held_back(db, gate, put(db, 9, 0), put(db, 2, 2))
    refused = Worker(lambda: db["users"].add({"email": "a"}))
    until(lambda: db._turns.line)
    gate.open.set()
    assert isinstance(refused.end(), NotUniqueError)
    assert [worker.end() for worker in workers] == [None, None]
    workers = held_back(db, gate, put(db, 9, 1), put(db, 2, 3))
    refused = Worker(both)
    until(lambda: db._turns.line)
    behind = Worker(one_more(db, 1))
    until(lambda: len(db._turns.line) == 2)
    gate.open.set()
    assert isinstance(refused.end(), NotUniqueError)
    assert [worker.end() for worker in (*workers, behind)] == [None] * 3
    assert dict(db["n"]) == {uid(1): 1, uid(2): 3, uid(9): 1}
    assert len(db["users"]) == 1


# ---------------------------------------------------------------- handed over by others


def test_who_ends_a_turn_hands_over_what_those_behind_have_decided(
    db: Database, gate: Gate
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with db.transaction() as tx:
            tx["n"][uid(1)] = tx["n"][uid(1)] + 1
            began.set()
            assert go_on.wait(WAIT_S)

    workers = [Worker(first)]
    assert began.wait(WAIT_S)
    for value in ("second", "third"):
        workers.append(Worker(put(db, 1, value)))
        until(lambda: len(db._turns.line) == len(workers))
    turns = db._turns.line[1:]
    gate.close()
    go_on.set()
    until(partial(waiting, db, 3))
    until(lambda: not db._turns.line)
    assert [turn.served for turn in turns] == [True, True]
    assert all(worker.is_alive() for worker in workers), "none of it is stored yet"
    before = db.sequence
    gate.open.set()
    assert [worker.end() for worker in workers] == [None] * 3
    assert (db["n"][uid(1)], db.sequence) == ("third", before + 3)
    assert gate.commits <= 2


def test_a_thread_that_waits_too_long_in_line_is_never_stored(db: Database) -> None:
    db._busy_timeout_s = 0.01
    with db.transaction() as tx:
        late = Worker(put(db, 2, "late"))
        error = late.end()
        assert isinstance(error, TransactionError) and error.code == "busy"
        assert len(db._turns.line) == 1
        tx["n"][uid(3)] = 3
    assert dict(db["n"]) == {uid(1): 0, uid(3): 3}


def test_a_thread_gives_up_or_is_stored_whichever_comes_first(db: Database, gate: Gate) -> None:
    workers = held_back(db, gate, put(db, 1, 1), put(db, 2, 2), one_more(db, 2), put(db, 3, 3))
    stored, given_up = db._sharing.jobs[:2]
    assert not stored.withdraw()
    assert given_up.withdraw()
    gate.open.set()
    errors = [worker.end() for worker in workers]
    assert [type(error) for error in errors] == [
        NoneType,
        TransactionError,
        TransactionError,
        NoneType,
    ]
    assert dict(db["n"]) == {uid(1): 1, uid(3): 3}, "who read what was given up fails with it"
    assert db.verify() == []


def test_what_became_unique_meanwhile_is_looked_at_when_it_is_stored(
    db: Database, gate: Gate
) -> None:
    db.collection("users", indexes=[Index("email", unique=True)])
    db["users"][uid(1)] = {"email": "a"}
    db.wait_for_indexes()

    def unaware() -> None:
        # As where another process has declared the index since.
        db._catalogue_cache = (b"", empty_catalogue(), -1)
        db["users"].add({"email": "a"})

    workers = held_back(db, gate, put(db, 2, 2), unaware)
    gate.open.set()
    assert [type(worker.end()) for worker in workers] == [NoneType, NotUniqueError]
    assert len(db["users"]) == 1
    assert db.verify() == []


def test_an_errand_that_was_interrupted_is_done_once(db: Database, gate: Gate) -> None:
    held_back(db, gate, put(db, 1, 1))
    job = Shared({"n": {uid(2).bytes: b"\x02"}}, b"t" * 16, None)
    interrupts = [KeyboardInterrupt]

    def errand() -> None:
        db._sharing._hand_over(job)
        if interrupts:
            raise interrupts.pop()

    line = [Turn(), Turn(errand=errand), Turn(), Turn(errand=errand)]
    with pytest.raises(KeyboardInterrupt):
        do_errands(line)
    assert len(line) == 4 and not line[1].served
    assert do_errands(line)
    assert [turn.errand for turn in line] == [None, None, errand], "up to one without an errand"
    assert db._sharing.jobs[1:] == [job]
    gate.open.set()
    until(lambda: job.over and not db._sharing.jobs)
    db._sharing._hand_over(job)
    assert db._sharing.jobs == [] and db["n"][uid(2)] == 2


# ---------------------------------------------------------------- observers


def test_observers_are_called_for_each_transaction_in_order_with_what_it_wrote(
    db: Database, gate: Gate
) -> None:
    calls: list[CommitEvent] = []
    db.observe(calls.append)
    before = db.sequence
    works = [put(db, 9, 0), *[one_more(db, 1) for _ in range(3)], put(db, 2, "b")]
    works += [lambda: db["n"].__delitem__(uid(2)), lambda: db["n"].discard(uid(77))]
    workers = held_back(db, gate, *works[:-1])
    nothing = Worker(works[-1])
    assert nothing.end() is None
    gate.open.set()
    assert [worker.end() for worker in workers] == [None] * 6
    until(lambda: len(calls) == 6)
    assert [call.sequence for call in calls] == list(range(before + 1, before + 7))
    told = [(e.kind, e.value, e.sequence) for call in calls for e in call.events]
    kinds = [("put", 0), ("put", 1), ("put", 2), ("put", 3), ("put", "b"), ("delete", None)]
    assert told == [(*kind, before + 1 + place) for place, kind in enumerate(kinds)]
    assert {call.origin for call in calls} == {"local"}
    assert gate.commits == 2


def test_an_observer_may_write_while_others_commit(db: Database) -> None:
    seen = threading.Semaphore(0)

    def observer(event: CommitEvent) -> None:
        if any(change.collection == "n" for change in event.events):
            db["log"].add(event.sequence)
            seen.release()

    def put_often(number: int) -> None:
        for value in range(20):
            put(db, number, value)()

    db.observe(observer)
    workers = [Worker(partial(put_often, n)) for n in range(10, 16)]
    assert [worker.end() for worker in workers] == [None] * 6
    for _ in range(120):
        assert seen.acquire(timeout=WAIT_S)
    assert len(db["log"]) == 120
    assert db.verify() == []


# ---------------------------------------------------------------- turns, and the end


def test_closing_waits_for_what_is_on_its_way(gate: Gate, db: Database) -> None:
    workers = held_back(db, gate, put(db, 9, 0), put(db, 2, 2))
    closing = Worker(db.close)
    until(lambda: db._turns.line)
    gate.open.set()
    assert [worker.end() for worker in (*workers, closing)] == [None] * 3
    assert gate.commits == 2
    with pytest.raises(DatabaseClosedError):
        db["n"][uid(3)] = 3
    assert not db._sharing.jobs


def test_what_needs_the_database_for_itself_waits_for_what_is_on_its_way(
    db: Database, gate: Gate
) -> None:
    workers = held_back(db, gate, put(db, 9, 0), put(db, 2, 2))
    declaring = Worker(lambda: db.declare_local("kept"))
    until(lambda: db._turns.line)
    gate.open.set()
    assert [worker.end() for worker in (*workers, declaring)] == [None] * 3
    assert gate.commits == 3
    assert db.verify() == []


def test_another_opener_comes_in_between_threads_that_commit_without_a_pause() -> None:
    storage = MemoryStorage()
    mine = Database(storage, busy_timeout_s=WAIT_S)
    other = Database(storage.another(), busy_timeout_s=WAIT_S)
    stop = threading.Event()

    def busy(number: int) -> int:
        done = 0
        while not stop.is_set():
            mine["n"][uid(number)] = done
            done += 1
        return done

    workers = [Worker(partial(busy, n)) for n in range(1, 5)]
    for number in range(20):
        other["n"][uid(100 + number)] = number
    stop.set()
    assert [worker.end() for worker in workers] == [None] * 4
    # And nobody has the turn when all is over.
    assert storage.turn.holder() == ""
    sequences = sum(worker.value for worker in workers) + 20
    assert mine.sequence == sequences
    assert mine.verify() == []
    mine.close()
    other.close()


def test_where_the_system_gives_no_thread_the_commit_is_made_all_the_same(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "Thread", Refused)
    db._sharing.warm = True
    db["n"][uid(2)] = 2
    assert db["n"][uid(2)] == 2


# ---------------------------------------------------------------- as if one after the other

#: What a thread does: reads an entity and adds to it; puts one; raises in its block.
Step = tuple[str, int]
STEPS = st.tuples(st.sampled_from(["add", "put", "break", "copy"]), st.integers(1, 3))


def run_threads(db: Database, programs: Sequence[Sequence[Step]]) -> list[str]:
    """What is wrong after each of ``programs`` was done by a thread of its own: every transaction
    has to have read what those of lower sequence left."""
    done: list[tuple[int, str, int, Any, Any]] = []
    start = threading.Barrier(len(programs))

    def program(name: int, steps: Sequence[Step]) -> None:
        start.wait(WAIT_S)
        for place, (what, number) in enumerate(steps):
            mark = f"{name}/{place}"
            if what == "put":
                db["n"][uid(number)] = [mark]
                continue
            try:
                with db.transaction() as tx:
                    was = tx["n"].get(uid(number))
                    target = number % 3 + 1 if what == "copy" else number
                    tx["n"][uid(target)] = made = [*(was or []), mark][-4:]
                    if what == "break":
                        raise ZeroDivisionError
            except ZeroDivisionError:
                continue
            done.append((tx.sequence, what, number, was, made))

    workers = [Worker(partial(program, n, s)) for n, s in enumerate(programs)]
    faults = [repr(error) for worker in workers if (error := worker.end())]
    return faults + compare(db, done)


def compare(db: Database, done: Sequence[tuple[int, str, int, Any, Any]]) -> list[str]:
    by_sequence = {entry[0]: entry for entry in done}
    if len(by_sequence) < len(done):
        return ["a sequence was given twice"]
    state: dict[int, Any] = {}
    faults = []
    for sequence, writes in db.told:  # type: ignore[attr-defined]
        if sequence in by_sequence:
            _, what, number, was, made = by_sequence.pop(sequence)
            if state.get(number) != was:
                faults.append(f"{sequence} read {was}, and there was {state.get(number)}")
            target = number % 3 + 1 if what == "copy" else number
            if writes != {target: made}:
                faults.append(f"observers were told {writes} of {sequence}, which wrote {made}")
        state.update(writes)
    faults += [f"nobody was told of {sequence}" for sequence in by_sequence]
    if {uid(number): value for number, value in state.items()} != dict(db["n"]):
        faults.append("what is there is not what was written last")
    return faults + db.verify()


def watched() -> Database:
    db = Database(MemoryStorage(), busy_timeout_s=WAIT_S)
    told: list[tuple[int, dict[int, Any]]] = []

    def observer(event: CommitEvent) -> None:
        told.append(
            (event.sequence, {e.entity_id.int if e.entity_id else 0: e.value for e in event.events})
        )

    db.observe(observer)
    db.told = told  # type: ignore[attr-defined]
    return db


@pytest.fixture(scope="module")
def hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(STEPS, min_size=1, max_size=8), min_size=2, max_size=5))
def test_threads_leave_what_they_would_leave_one_after_the_other(
    programs: list[list[Step]],
) -> None:
    with watched() as db:
        gate = Gate(db)
        gate.before = lambda batch: time.sleep(0)
        assert run_threads(db, programs) == []


def test_a_block_that_would_not_read_what_is_on_its_way_is_found() -> None:
    with watched() as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sharing, "ahead", lambda self: ({}, 0))
        patch.setattr(sharing, "HOLD_S", 10 * WAIT_S)
        gate = Gate(db)
        done: list[tuple[int, str, int, Any, Any]] = []

        def add(mark: str) -> None:
            with db.transaction() as tx:
                was = tx["n"].get(uid(1))
                tx["n"][uid(1)] = made = [*(was or []), mark]
            done.append((tx.sequence, "add", 1, was, made))

        workers = held_back(db, gate, lambda: add("a"), lambda: add("b"))
        gate.open.set()
        assert [worker.end() for worker in workers] == [None, None]
        assert any("read None" in fault for fault in compare(db, done))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_ledger_of_what_was_acknowledged_agrees_whatever_the_disk_does(
    where: str, tmp_path: Path
) -> None:
    """Every third storage commit fails before it is made; what was acknowledged is there once."""
    store = MemoryStorage() if where == "memory" else LmdbStorage.open(tmp_path / "db")
    db = Database(store, busy_timeout_s=WAIT_S)
    gate = Gate(db)
    tries = iter(range(10**9))

    def before(batch: Batch) -> None:
        if next(tries) % 3 == 2:
            raise StorageError("not now")

    db["n"][uid(1)] = 0
    gate.before = before

    def work(name: int) -> tuple[int, list[Any]]:
        counted, mine = 0, []
        for _ in range(40):
            with suppress(StorageError):
                mine.append(db["own"].add(name))
            try:
                one_more(db, 1)()
                counted += 1
            except StorageError:
                continue
        return counted, mine

    workers = [Worker(partial(work, n)) for n in range(6)]
    assert [worker.end() for worker in workers] == [None] * 6
    assert db["n"][uid(1)] == sum(worker.value[0] for worker in workers)
    acknowledged = [entity for worker in workers for entity in worker.value[1]]
    assert set(db["own"]) == set(acknowledged)
    assert len(set(acknowledged)) == len(acknowledged)
    assert db.verify() == []
    db.close()


class LineOfOthers(list[Turn]):
    """A line in which another thread does the errand of who has just come, and is gone, before
    that one looks."""

    def append(self, turn: Turn) -> None:
        super().append(turn)
        do_errands(self)
        self.pop(0)


def test_who_is_served_before_it_looks_need_not_be_in_line():
    turns, done = Turns(), []
    turns.line = LineOfOthers([Turn()])
    turn = Turn(errand=lambda: done.append(1))
    assert turns.take(turn, 0.1)
    assert turn.served and done == [1] and turns.line == []
