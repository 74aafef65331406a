"""The database for asyncio: reads are direct, writes are awaited on one thread for all tasks."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from entidb import AsyncDatabase, Database, F, cbor
from entidb.db import AsyncTransaction, Role
from entidb.errors import (
    CommitUnknownError,
    ConfigError,
    DatabaseClosedError,
    QueryError,
    StorageFullError,
    TransactionConflictError,
    TransactionError,
    TransactionTooLargeError,
    ValueTypeError,
)
from entidb.storage import MemoryStorage
from tests.support import FakeClock, uid

WAIT_S = 60.0


class Gated(MemoryStorage):
    """Commits stand still while the gate is closed, and fail as they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.commits = 0
        self.errors: list[BaseException | None] = []

    def commit(self, batch: Mapping[bytes, bytes | None], after: int | None = None) -> int:
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        error = self.errors.pop(0) if self.errors else None
        if isinstance(error, StorageFullError):
            raise error
        self.commits += 1
        mark = super().commit(batch, after)
        if error is not None:
            raise error
        return mark


@pytest.fixture
def storage() -> Gated:
    return Gated()


@pytest.fixture
def plain(storage: Gated) -> Iterator[Database]:
    database = Database(storage, clock=FakeClock(), busy_timeout_s=WAIT_S)
    yield database
    storage.gate.set()
    database.close()


Program = Callable[[AsyncDatabase], Awaitable[Any]]


def on(database: Database, program: Program) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(WAIT_S):
            return await program(database.aio)

    return asyncio.run(main())


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.001)


@dataclass
class Item:
    name: str
    price: int = 0


# ---------------------------------------------------------------- reading and writing


def test_each_write_is_awaited_and_there_when_it_returns(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        stock = db.collection("stock", Item)
        tea = await stock.add(Item("tea", 3))
        assert stock[tea] == Item("tea", 3)
        await stock.put(tea, Item("tea", 4))
        await stock.patch(tea, price=5)
        assert stock.get(tea) == Item("tea", 5)
        assert await stock.get_or_add(tea, Item("x")) == Item("tea", 5)
        assert await stock.get_or_add(uid(1), Item("cup")) == Item("cup")
        await stock.put_many({uid(2): Item("b"), uid(3): Item("c")})
        assert len(stock) == 4
        await stock.delete(uid(2))
        assert await stock.discard(uid(3)) and not await stock.discard(uid(3))
        assert await stock.pop(uid(1)) == Item("cup")
        assert await stock.pop(uid(1), None) is None
        await stock.clear()
        assert not stock and db.collections() == ["stock"]

    on(plain, program)
    assert not plain.verify()


def test_queries_read_at_once_and_their_delete_is_awaited(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        stock = db.collection("stock", Item)
        await stock.put_many((uid(n), Item("tea", n)) for n in range(1, 6))
        assert [item.price for item in stock.where(F.price > 3).values()] == [4, 5]
        assert await stock.where(F.price > 3).order_by("-price").limit(1).delete() == 1
        assert await stock.where(name="tea").delete() == 4

    on(plain, program)
    assert len(plain["stock"]) == 0


def test_what_a_typed_write_does_not_know_survives_it(plain: Database) -> None:
    plain["stock"][uid(1)] = {"name": "tea", "price": 1, "newer": True}

    async def program(db: AsyncDatabase) -> None:
        await db.collection("stock", Item).put(uid(1), Item("tea", 2))
        async with db.transaction() as tx:
            tx.collection("stock", Item)[uid(1)] = Item("tea", 3)

    on(plain, program)
    assert plain["stock"][uid(1)] == {"name": "tea", "price": 3, "newer": True}


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda stock: stock.add("no item"), ValueTypeError),
        (lambda stock: stock.put("no id", Item("x")), ValueTypeError),
        (lambda stock: stock.delete(uid(9)), KeyError),
        (lambda stock: stock.patch(uid(9), price=1), KeyError),
        (lambda stock: stock.pop(uid(9)), KeyError),
        (lambda stock: stock.put_many([uid(1)]), ValueTypeError),
        (lambda stock: stock.put_many(None), ValueTypeError),
    ],
)
def test_a_write_that_cannot_be_raises_where_it_is_awaited(
    plain: Database, write: Any, error: Any
) -> None:
    async def program(db: AsyncDatabase) -> None:
        with pytest.raises(error):
            await write(db.collection("stock", Item))
        assert db.sequence == 0

    on(plain, program)


def test_items_are_not_assigned_where_nobody_could_wait_for_it(plain: Database) -> None:
    with pytest.raises(TypeError):
        plain.aio["stock"][uid(1)] = {}  # type: ignore[index]


def test_a_snapshot_does_not_change(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        notes = db["notes"]
        await notes.put(uid(1), 1)
        with db.snapshot() as snapshot:
            await notes.put(uid(1), 2)
            assert (snapshot[notes][uid(1)], notes[uid(1)]) == (1, 2)

    on(plain, program)


def test_a_collection_is_declared_local(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        await db.declare_local("drafts")
        await db.declare_local("drafts")
        await db.declare_local("nothing", False)
        await db["drafts"].add(1)

    on(plain, program)
    assert plain.read_head().ready == 0


# ---------------------------------------------------------------- several at once


def test_tasks_that_commit_at_once_share_a_commit_and_have_their_own_sequence(
    plain: Database, storage: Gated
) -> None:
    async def program(db: AsyncDatabase) -> list[int]:
        before, sequences = storage.commits, []

        async def write(number: int) -> None:
            async with db.transaction() as tx:
                tx["notes"][uid(number)] = number
            sequences.append(tx.sequence)

        storage.gate.clear()
        storage.reached.clear()
        first = asyncio.create_task(write(1))
        await until(storage.reached)
        others = [asyncio.create_task(write(number)) for number in range(2, 34)]
        await asyncio.sleep(0)
        storage.gate.set()
        await asyncio.gather(first, *others)
        assert storage.commits - before == 2
        return sequences

    assert sorted(on(plain, program)) == list(range(1, 34))
    assert list(plain["notes"].values()) == list(range(1, 34))
    assert [event.sequence for event in plain.changes()] == list(range(1, 34))
    assert not plain.verify()


async def at_once(db: AsyncDatabase, storage: Gated, *writes: Awaitable[Any]) -> list[Any]:
    """What becomes of ``writes``, which wait together for the commit before them."""
    storage.gate.clear()
    storage.reached.clear()
    first = asyncio.create_task(db["first"].add(0))
    await until(storage.reached)
    tasks = [asyncio.ensure_future(write) for write in writes]
    await asyncio.sleep(0)
    storage.gate.set()
    await first
    return list(await asyncio.gather(*tasks, return_exceptions=True))


def test_the_error_of_one_is_nobody_elses(plain: Database, storage: Gated) -> None:
    async def program(db: AsyncDatabase) -> list[Any]:
        notes = db["notes"]
        many = {uid(n): "x" * 1_000_000 for n in range(100, 118)}
        return await at_once(
            db, storage, notes.put(uid(1), 1), notes.delete(uid(9)), notes.put_many(many),
            notes.put(uid(2), 2), notes.discard(uid(1)),
        )  # fmt: skip

    found = on(plain, program)
    assert found[0] is None and found[3] is None and found[4] is True
    assert isinstance(found[1], KeyError)
    assert isinstance(found[2], TransactionTooLargeError)
    assert list(plain["notes"].values()) == [2]


def test_those_that_are_too_large_together_are_committed_one_by_one(
    plain: Database, storage: Gated
) -> None:
    async def program(db: AsyncDatabase) -> list[Any]:
        return await at_once(
            db, storage, *(db["notes"].put(uid(n), f"{n}" * 7_000_000) for n in range(1, 5))
        )

    assert on(plain, program) == [None] * 4
    assert len(plain["notes"]) == 4


def test_a_disk_that_is_full_for_all_may_have_room_for_each(
    plain: Database, storage: Gated
) -> None:
    async def program(db: AsyncDatabase) -> list[Any]:
        storage.errors = [None, StorageFullError("full"), None, StorageFullError("full"), None]
        return await at_once(db, storage, *(db["notes"].put(uid(n), n) for n in range(1, 4)))

    found = on(plain, program)
    assert isinstance(found[1], StorageFullError)
    assert list(plain["notes"].values()) == [1, 3]


def test_a_commit_that_is_open_is_open_for_all_and_not_tried_again(
    plain: Database, storage: Gated
) -> None:
    async def program(db: AsyncDatabase) -> list[Any]:
        storage.errors = [None, CommitUnknownError("open")]
        return await at_once(db, storage, *(db["notes"].add(n) for n in range(3)))

    assert [type(each) for each in on(plain, program)] == [CommitUnknownError] * 3
    assert len(plain["notes"]) == 3


# ---------------------------------------------------------------- transactions


async def raising(tx: AsyncTransaction) -> None:
    async with tx:
        del tx["notes"][uid(1)]
        raise RuntimeError("no")


async def doing(tx: AsyncTransaction, *actions: Callable[[AsyncTransaction], object]) -> None:
    async with tx:
        for action in actions:
            action(tx)


def test_a_transaction_is_committed_when_its_block_ends(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        notes = db["notes"]
        async with db.transaction() as tx:
            tx[notes][uid(1)] = 1
            tx[notes][uid(2)] = 2
            assert list(tx[notes].values()) == [1, 2] and not notes
        assert tx.sequence == db.sequence == 1
        tx = db.transaction()
        with pytest.raises(RuntimeError, match="no"):
            await raising(tx)
        assert tx.sequence == 0 and len(notes) == 2
        with pytest.raises(TransactionError, match="over"):
            tx[notes]

    on(plain, program)
    assert len({event.sequence for event in plain.changes()}) == 1


Reads: dict[str, Callable[[Any], object]] = {
    "an entity": lambda notes: notes[uid(1)],
    "get": lambda notes: notes.get(uid(1)),
    "get_many": lambda notes: notes.get_many([uid(1), uid(2)]),
    "whether it is there": lambda notes: uid(1) in notes,
    "info": lambda notes: notes.info(uid(1)),
    "all": lambda notes: list(notes.values()),
    "how many": lambda notes: len(notes),
    "a query": lambda notes: notes.where(F.n == 1).count(),
    "patch": lambda notes: notes.patch(uid(1), n=3),
}
Changes: dict[str, Callable[[Any], object]] = {
    "changed": lambda notes: notes.__setitem__(uid(1), {"n": 2}),
    "deleted": lambda notes: notes.__delitem__(uid(1)),
}


@pytest.mark.parametrize("change", Changes)
@pytest.mark.parametrize("read", Reads)
def test_what_was_read_and_changed_since_is_a_conflict(
    plain: Database, read: str, change: str
) -> None:
    plain["notes"][uid(1)] = {"n": 1}

    async def program(db: AsyncDatabase) -> None:
        tx = db.transaction()
        actions: list[Callable[[AsyncTransaction], object]] = [
            lambda tx: Reads[read](tx["notes"]),
            lambda tx: tx["other"].__setitem__(uid(1), 1),
            lambda tx: Changes[change](plain["notes"]),
        ]
        with pytest.raises(TransactionConflictError) as caught:
            await doing(tx, *actions)
        assert "'notes'" in str(caught.value) and caught.value.code == "transaction_conflict"
        assert not db["other"] and tx.sequence == 0

    on(plain, program)


@pytest.mark.parametrize("read", ["all", "how many", "a query", "get_many"])
def test_what_was_not_there_and_is_now_is_a_conflict(plain: Database, read: str) -> None:
    async def program(db: AsyncDatabase) -> None:
        actions: list[Callable[[AsyncTransaction], object]] = [
            lambda tx: Reads[read](tx["notes"]),
            lambda tx: tx["notes"].__setitem__(uid(3), {}),
            lambda tx: plain["notes"].__setitem__(uid(2), {"n": 1}),
        ]
        with pytest.raises(TransactionConflictError):
            await doing(db.transaction(), *actions)

    on(plain, program)


def test_what_was_not_read_is_no_conflict(plain: Database) -> None:
    plain["notes"][uid(1)] = {"n": 1}

    async def program(db: AsyncDatabase) -> None:
        async with db.transaction() as tx:
            tx["notes"][uid(1)] = {"n": 5}  # without looking
            assert tx["notes"][uid(1)] == {"n": 5}  # its own
            tx["notes"].get(uid(3))
            list(tx["quiet"].values())
            plain["notes"][uid(1)] = {"n": 2}
            plain["notes"][uid(2)] = {"n": 2}
        assert db["notes"][uid(1)] == {"n": 5}
        async with db.transaction() as tx:
            list(tx["notes"].values())  # writes nothing, and was one snapshot
            plain["notes"][uid(1)] = {"n": 3}
        assert tx.sequence == 0

    on(plain, program)


def test_those_in_one_commit_conflict_as_those_in_two(plain: Database, storage: Gated) -> None:
    async def program(db: AsyncDatabase) -> list[Any]:
        async def count(read: str) -> None:
            async with db.transaction() as tx:
                number = len(tx["notes"]) if read == "all" else tx["notes"].get(uid(1), 0)
                tx["notes"][uid(1)] = number + 1

        return await at_once(db, storage, count("all"), count("one"), count("all"))

    found = on(plain, program)
    assert found[0] is None
    assert [type(each) for each in found[1:]] == [TransactionConflictError] * 2
    assert plain["notes"][uid(1)] == 1


def test_run_begins_again_until_nobody_came_between(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        async def increment(tx: AsyncTransaction) -> int:
            counts = tx["counts"]
            number: int = counts.get(uid(1), 0)
            await asyncio.sleep(0)
            counts[uid(1)] = number + 1
            return number + 1

        found = await asyncio.gather(*(db.run(increment, attempts=99) for _ in range(25)))
        assert sorted(found) == list(range(1, 26))
        assert await db.run(lambda tx: tx["counts"][uid(1)]) == 25

    on(plain, program)
    assert plain["counts"][uid(1)] == 25


def test_run_gives_up_after_so_many_attempts(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> int:
        calls = 0

        def function(tx: AsyncTransaction) -> None:
            nonlocal calls
            calls += 1
            tx["notes"].get(uid(1))
            tx["notes"][uid(2)] = calls
            plain["notes"][uid(1)] = calls

        with pytest.raises(TransactionConflictError):
            await db.run(function, attempts=3)
        with pytest.raises(ConfigError, match="attempts"):
            await db.run(function, attempts=0)
        return calls

    assert on(plain, program) == 3
    assert uid(2) not in plain["notes"]


# ---------------------------------------------------------------- the loop goes on


def test_the_loop_goes_on_while_a_thread_holds_a_transaction_open(plain: Database) -> None:
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with plain.transaction() as tx:
            tx["notes"][uid(1)] = "thread"
            begun.set()
            assert done.wait(WAIT_S)

    async def program(db: AsyncDatabase) -> None:
        thread = threading.Thread(target=hold)
        thread.start()
        await until(begun)
        write = asyncio.create_task(db["notes"].put(uid(2), "task"))
        for _ in range(50):
            await asyncio.sleep(0)
            assert list(db["notes"]) == [] and not write.done()
        done.set()
        await write
        thread.join()
        assert list(db["notes"].values()) == ["thread", "task"]

    on(plain, program)


def test_a_write_that_waits_for_a_thread_is_cancelled_at_once(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        with plain.transaction():
            write = asyncio.create_task(db["notes"].add(1))
            await asyncio.sleep(0.01)
            began = time.monotonic()
            write.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await write
            assert time.monotonic() - began < WAIT_S / 2
        assert caught.value.sequence == 0  # type: ignore[attr-defined]
        await db["notes"].add(2)

    on(plain, program)
    assert list(plain["notes"].values()) == [2]


def test_a_thread_that_does_not_end_makes_the_write_raise() -> None:
    with Database.in_memory(clock=FakeClock(), busy_timeout_s=0.05) as plain:

        async def program(db: AsyncDatabase) -> None:
            with plain.transaction(), pytest.raises(TransactionError) as caught:
                await db["notes"].add(1)
            assert caught.value.code == "busy"
            await db["notes"].add(2)

        on(plain, program)


# ---------------------------------------------------------------- cancelling


class Steps:
    """Cancels a write at one step of its way."""

    def __init__(self, storage: Gated, step: str) -> None:
        self.storage = storage
        self.step = step

    async def run(self, db: AsyncDatabase, write: Callable[[], Awaitable[Any]]) -> Any:
        storage = self.storage
        if self.step == "in line":
            storage.gate.clear()
            storage.reached.clear()
            before = asyncio.create_task(db["before"].add(0))
            await until(storage.reached)
        elif self.step in ("in the commit", "twice in the commit"):
            storage.gate.clear()
            storage.reached.clear()
        task = asyncio.ensure_future(write())
        if self.step == "in the commit" or self.step == "twice in the commit":
            await until(storage.reached)
        elif self.step != "before it begins":
            await asyncio.sleep(0)
        task.cancel()
        if self.step == "twice in the commit":
            await asyncio.sleep(0.01)
            task.cancel()
            assert not task.done()
        await asyncio.sleep(0)
        storage.gate.set()
        if self.step == "in line":
            await before
        try:
            return await task
        except asyncio.CancelledError as error:
            return error


STEPS = ["before it begins", "in line", "at once", "in the commit", "twice in the commit"]


@pytest.mark.parametrize("how", ["add", "transaction", "run"])
@pytest.mark.parametrize("step", STEPS)
def test_a_write_that_is_cancelled_is_committed_or_not_and_says_which(
    plain: Database, storage: Gated, step: str, how: str
) -> None:
    async def program(db: AsyncDatabase) -> None:
        made: list[AsyncTransaction] = []

        async def transaction() -> None:
            async with db.transaction() as tx:
                made.append(tx)
                tx["notes"][uid(1)] = 1

        ways: dict[str, Callable[[], Awaitable[Any]]] = {
            "add": lambda: db["notes"].add(1),
            "transaction": transaction,
            "run": lambda: db.run(lambda tx: tx["notes"].__setitem__(uid(1), 1)),
        }
        error = await Steps(storage, step).run(db, ways[how])
        assert isinstance(error, asyncio.CancelledError)
        there = len(db["notes"])
        said = getattr(error, "sequence", 0)
        assert bool(said) == bool(there)
        assert there == (step in ("in the commit", "twice in the commit")) or step == "at once"
        if step != "before it begins":
            assert ("was committed" in error.__notes__[0]) == bool(there)
        if made:
            assert made[0].sequence == said
        # Whatever became of it, the next one goes on.
        await db["notes"].add(2)

    on(plain, program)
    assert not plain.verify()


def test_a_cancelled_commit_that_fails_says_that_nothing_was_committed(
    plain: Database, storage: Gated
) -> None:
    async def program(db: AsyncDatabase) -> None:
        for failure, said in ((StorageFullError("full"), 0), (CommitUnknownError("open"), None)):
            storage.errors = [failure]
            error = await Steps(storage, "in the commit").run(db, lambda: db["notes"].add(1))
            assert error.sequence == said

    on(plain, program)


def test_a_timeout_around_a_write_is_a_timeout(plain: Database, storage: Gated) -> None:
    async def program(db: AsyncDatabase) -> None:
        storage.gate.clear()
        storage.reached.clear()
        limit = asyncio.timeout(None)

        async def strike() -> None:
            await until(storage.reached)  # before that nothing would be committed
            limit.reschedule(asyncio.get_running_loop().time())

        def open_gate() -> None:
            while not limit.expired():
                time.sleep(0.005)
            storage.gate.set()

        striking = asyncio.create_task(strike())
        threading.Thread(target=open_gate, daemon=True).start()
        with pytest.raises(TimeoutError):
            async with limit:
                await db["notes"].add(1)
        await striking
        assert len(db["notes"]) == 1

    on(plain, program)


# ---------------------------------------------------------------- changes


def test_the_feed_gives_what_changed_and_then_what_changes(plain: Database) -> None:
    plain["notes"][uid(1)] = 1

    async def program(db: AsyncDatabase) -> None:
        changes, seen = db.changes(collections=["notes"]), []

        async def follow() -> None:
            async for event in changes:
                seen.append((event.sequence, event.kind, event.entity_id))

        task = asyncio.create_task(follow())
        while len(seen) < 1:
            await asyncio.sleep(0.001)
        await db["other"].add(1)
        await db["notes"].put(uid(2), 2)
        threading.Thread(target=lambda: plain["notes"].__delitem__(uid(1))).start()
        while len(seen) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert seen == [(1, "put", uid(1)), (3, "put", uid(2)), (4, "delete", uid(1))]
        assert changes.cursor == 4
        await db["notes"].put(uid(3), 3)
        async for event in db.changes(after=changes.cursor):
            assert event.entity_id == uid(3)
            break

    on(plain, program)
    assert plain._observers.listeners == []


@pytest.mark.parametrize("given", [{"after": "1"}, {"after": True}, {"collections": "notes"}])
def test_a_feed_that_cannot_be_is_refused(plain: Database, given: Any) -> None:
    with pytest.raises(ConfigError):
        plain.aio.changes(**given)


# ---------------------------------------------------------------- opening and closing


def test_a_database_is_opened_and_closed_without_the_loop(tmp_path: Path) -> None:
    async def main() -> uuid.UUID:
        plain = await Database.open_async(tmp_path / "db")
        async with plain.aio as db:
            made = await db["notes"].add("kept")
            assert "AsyncDatabase" in repr(db)
        await db.close()
        with pytest.raises(DatabaseClosedError):
            await db["notes"].add("late")
        return made

    made = asyncio.run(main())
    with Database.open(tmp_path / "db") as db:
        assert db["notes"][made] == "kept"


def test_closing_waits_for_what_is_being_committed(plain: Database, storage: Gated) -> None:
    async def program(db: AsyncDatabase) -> None:
        storage.gate.clear()
        storage.reached.clear()
        writes = [asyncio.create_task(db["notes"].add(n)) for n in range(3)]
        await until(storage.reached)
        closing = asyncio.create_task(db.close())
        await asyncio.sleep(0.01)
        assert not closing.done()
        storage.gate.set()
        await asyncio.gather(closing, *writes)

    on(plain, program)
    with pytest.raises(DatabaseClosedError):
        plain["notes"].add(1)


def test_a_writer_that_was_idle_begins_again(
    plain: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entidb.db.committer._IDLE_S", 0.01)

    async def program(db: AsyncDatabase) -> None:
        await db["notes"].add(1)
        while db._committer._thread is not None:
            await asyncio.sleep(0.005)
        await db["notes"].add(2)

    on(plain, program)
    assert len(plain["notes"]) == 2


def test_one_database_serves_two_loops_one_after_the_other(plain: Database) -> None:
    for number in range(2):
        on(plain, lambda db, n=number: db["notes"].put(uid(n + 1), n))  # type: ignore[misc]
    assert len(plain["notes"]) == 2 and plain.aio is plain.aio


def test_a_server_is_written_to_as_well() -> None:
    with Database.in_memory(role=Role.SERVER, clock=FakeClock()) as plain:
        on(plain, lambda db: db["notes"].put(uid(1), 1))
        assert plain["notes"].info(uid(1)).version == 1


def test_a_query_on_a_snapshot_still_deletes_nothing(plain: Database) -> None:
    async def program(db: AsyncDatabase) -> None:
        with db.snapshot() as snapshot, pytest.raises(QueryError):
            snapshot[db["notes"]].where().delete()

    on(plain, program)


def test_the_feed_finds_what_another_process_has_committed(tmp_path: Path) -> None:
    code = (
        "import sys; from entidb import Database; db = Database.open(sys.argv[1]); "
        "db['notes'].add('from elsewhere'); db.close()"
    )

    async def program(db: AsyncDatabase) -> Any:
        changes = db.changes().__aiter__()
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.02)
        command = [sys.executable, "-c", code, str(tmp_path / "db")]
        other = await asyncio.create_subprocess_exec(*command)
        assert await other.wait() == 0
        event = await waiting
        await changes.aclose()  # type: ignore[attr-defined]
        return cbor.decode(event.payload or b"")

    with Database.open(tmp_path / "db") as plain:
        assert on(plain, program) == "from elsewhere"
