"""Transactions, snapshots, and the counts that go with them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from entidb.db import Database, Role, Transaction, catalogue, local
from entidb.errors import (
    CborEncodeError,
    CommitUnknownError,
    DatabaseClosedError,
    ScopeError,
    StorageError,
    TransactionError,
    TransactionTooLargeError,
    ValueTypeError,
)
from entidb.storage import MemoryStorage
from tests.support import FakeClock, WatchedStorage, uid


@pytest.fixture
def storage() -> WatchedStorage:
    return WatchedStorage(MemoryStorage())


@pytest.fixture
def db(storage: WatchedStorage) -> Iterator[Database]:
    with Database(storage, clock=FakeClock(), busy_timeout_s=0.05) as opened:
        yield opened


# ---------------------------------------------------------------- commit and abort


def test_a_transaction_commits_when_its_block_ends(db: Database, storage: WatchedStorage) -> None:
    commits = storage.commits
    with db.transaction() as tx:
        tx.collection("notes")[uid(1)] = "a"
        tx["other"][uid(2)] = "b"
        assert db.collection("notes").get(uid(1)) is None
    assert (db.collection("notes")[uid(1)], db.collection("other")[uid(2)]) == ("a", "b")
    assert storage.commits == commits + 1
    assert tx.sequence == db.sequence == 1


def test_an_exception_in_the_block_aborts(db: Database, storage: WatchedStorage) -> None:
    commits = storage.commits
    with pytest.raises(ZeroDivisionError), db.transaction() as tx:
        tx.collection("notes").update({uid(1): 1 // len(tx.collection("notes"))})
    assert (len(db.collection("notes")), storage.commits) == (0, commits)
    db.collection("notes")[uid(1)] = "the lock is free"


def test_commit_and_abort_by_hand(db: Database) -> None:
    tx = db.transaction()
    tx.collection("notes")[uid(1)] = "a"
    assert tx.commit() == 1
    tx = db.transaction()
    tx.collection("notes")[uid(1)] = "b"
    tx.abort()
    tx.abort()
    assert db.collection("notes")[uid(1)] == "a"


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_using_a_transaction_after_its_end_is_an_error(db: Database, end: str) -> None:
    tx = db.transaction()
    notes = tx.collection("notes")
    notes[uid(1)] = "a"
    getattr(tx, end)()
    for use in (
        lambda: notes[uid(1)],
        lambda: notes.__setitem__(uid(1), "b"),
        lambda: list(notes),
        lambda: len(notes),
        lambda: tx.collection("notes"),
        lambda: tx.commit(),
    ):
        with pytest.raises(TransactionError, match="over"):
            use()
    assert db.sequence == (end == "commit")


def test_an_iteration_that_outlives_its_transaction_is_an_error(db: Database) -> None:
    db.collection("notes").put_many({uid(n): n for n in range(2000)})
    with db.transaction() as tx:
        iterator = iter(tx.collection("notes"))
        next(iterator)
    with pytest.raises(DatabaseClosedError):
        list(iterator)


def test_a_second_transaction_in_one_thread_is_an_error_and_the_first_goes_on(
    db: Database,
) -> None:
    with db.transaction() as tx:
        tx.collection("notes")[uid(1)] = "a"
        with pytest.raises(TransactionError, match="already open"):
            db.transaction()
        with pytest.raises(TransactionError):
            db.collection("notes")[uid(2)] = "b"
        with pytest.raises(TransactionError):
            db.close()
    assert list(db.collection("notes")) == [uid(1)]


def test_another_thread_waits_and_gives_up_with_a_reason(db: Database) -> None:
    caught: list[TransactionError] = []

    def other() -> None:
        try:
            db.collection("notes")[uid(2)] = "b"
        except TransactionError as error:
            caught.append(error)

    with db.transaction():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
    assert [error.code for error in caught] == ["busy"]
    other()
    assert db.collection("notes")[uid(2)] == "b"


def test_threads_that_write_do_not_lose_each_others_work() -> None:
    with Database.in_memory() as db:
        notes = db.collection("notes")
        notes[uid(0)] = 0

        def count() -> None:
            for _ in range(100):
                with db.transaction() as tx:
                    tx.collection("notes")[uid(0)] = tx.collection("notes")[uid(0)] + 1

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (notes[uid(0)], db.sequence) == (400, 401)
        assert db.verify() == []


def test_an_empty_transaction_leaves_no_trace(db: Database, storage: WatchedStorage) -> None:
    commits = storage.commits
    with db.transaction() as tx:
        assert len(tx.collection("notes")) == 0
    assert (tx.sequence, db.sequence, storage.commits) == (0, 0, commits)


def test_what_is_created_and_deleted_in_one_transaction_leaves_no_trace(
    db: Database, storage: WatchedStorage
) -> None:
    commits = storage.commits
    with db.transaction() as tx:
        made = tx.collection("notes").add("short life")
        del tx.collection("notes")[made]
        assert made not in tx.collection("notes")
    assert (tx.sequence, storage.commits, db.collections()) == (0, commits, [])
    with db.transaction() as tx:
        del tx.collection("notes")[tx.collection("notes").add("short life")]
        tx.collection("notes")[uid(1)] = "stays"
    assert list(db.collection("notes")) == [uid(1)]
    assert len(list(db.changes())) == 1
    assert db.verify() == []


def test_deleting_what_is_missing_is_a_key_error_that_can_be_caught_inside(
    db: Database,
) -> None:
    with db.transaction() as tx:
        notes = tx.collection("notes")
        with pytest.raises(KeyError):
            del notes[uid(1)]
        notes[uid(1)] = "a"
        del notes[uid(1)]
        with pytest.raises(KeyError):
            del notes[uid(1)]
        notes[uid(2)] = "b"
    assert list(db.collection("notes")) == [uid(2)]


def test_a_wrong_value_leaves_the_rest_of_the_transaction_alone(db: Database) -> None:
    with db.transaction() as tx:
        tx.collection("notes")[uid(1)] = "a"
        with pytest.raises(ValueTypeError):
            tx.collection("notes", int)[uid(2)] = "b"  # type: ignore[assignment]
    assert list(db.collection("notes")) == [uid(1)]


def test_a_transaction_over_the_limit_is_refused_at_commit() -> None:
    with Database.in_memory(transaction_bytes_max=1000) as db:
        with db.transaction() as tx:
            tx.collection("notes")[uid(1)] = "x" * 900
        with pytest.raises(TransactionTooLargeError, match="1000"), db.transaction() as tx:
            tx.collection("notes").put_many({uid(2): "x" * 400, uid(3): "x" * 500})
        assert list(db.collection("notes")) == [uid(1)]
        with pytest.raises(TransactionTooLargeError):
            db.collection("notes").put_many({uid(n): 0 for n in range(20)})
        db.collection("notes")[uid(4)] = "the lock is free"


def test_a_commit_that_fails_changes_nothing_and_frees_the_lock(
    db: Database, storage: WatchedStorage
) -> None:
    db.collection("notes")[uid(1)] = "a"
    storage.fail_next(error=StorageError("disk"))
    with pytest.raises(StorageError), db.transaction() as tx:
        tx.collection("new").put_many({uid(1): "b", uid(2): "b"})
    assert (db.collection("notes")[uid(1)], db.collections()) == ("a", ["notes"])
    db.collection("notes")[uid(1)] = "c"
    assert db.sequence == 2
    assert db.verify() == []


def test_too_many_collections_are_refused(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "COLLECTIONS_MAX", 20)
    with db.transaction() as tx:
        for n in range(20):
            tx.collection(f"c{n}")[uid(1)] = n
    with pytest.raises(ScopeError) as caught:
        db.collection("one more")[uid(1)] = 1
    assert caught.value.code == "too_many_collections"
    assert len(db.collections()) == 20
    db.collection("c5")[uid(1)] = "still works"


def test_local_collections_do_not_count_against_those_that_synchronise(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "COLLECTIONS_MAX", 5)
    for n in range(5):
        db.declare_local(f"local{n}")
        db.collection(f"c{n}")[uid(1)] = n
        db.collection(f"local{n}")[uid(1)] = n
    with pytest.raises(ScopeError, match="are local"):
        db.declare_local("one more")
    with pytest.raises(ScopeError, match="synchronise"):
        db.collection("one more")[uid(1)] = 1
    assert len(db.collections()) == 10


def test_thousands_of_collections_in_one_transaction_are_linear_work(db: Database) -> None:
    copies = 0
    original = catalogue.Catalogue.copy

    def copy(self: catalogue.Catalogue) -> catalogue.Catalogue:
        nonlocal copies
        copies += 1
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue.Catalogue, "copy", copy)
        with db.transaction() as tx:
            for n in range(2048):
                tx.collection(f"c{n}")[uid(1)] = n
    assert copies == 1
    assert len(db.collections()) == 2048
    assert db.verify() == []


def write_to(tx: Transaction, collections: int) -> None:
    for n in range(collections):
        tx.collection(f"c{n}")[uid(1)] = n
    tx.commit()


def test_a_transaction_writes_to_a_bounded_number_of_collections(db: Database) -> None:
    tx = db.transaction()
    with tx, pytest.raises(TransactionTooLargeError, match="2048"):
        write_to(tx, 2049)
    assert (db.collections(), db.sequence) == ([], 0)


def test_a_scope_names_a_bounded_number_of_collections(db: Database) -> None:
    with pytest.raises(ScopeError) as caught:
        db.set_scope([f"c{n}" for n in range(4097)])
    assert caught.value.code == "too_many_collections"
    assert db.scope is None


# ---------------------------------------------------------------- reading inside


def test_reads_inside_see_own_writes_in_order(db: Database) -> None:
    notes = db.collection("notes")
    notes.put_many({uid(n): n for n in range(0, 10, 2)})
    with db.transaction() as tx:
        mine = tx.collection("notes")
        mine[uid(3)] = 3
        mine[uid(4)] = "changed"
        del mine[uid(6)]
        mine[uid(9)] = 9
        del mine[uid(9)]
        mine[uid(11)] = 11
        expected = {0: 0, 2: 2, 3: 3, 4: "changed", 8: 8, 11: 11}
        assert {i.int: v for i, v in mine.items()} == expected
        assert [i.int for i, _ in mine.range(reverse=True)] == sorted(expected, reverse=True)
        assert [i.int for i, _ in mine.range(uid(3), uid(9))] == [3, 4, 8]
        assert (len(mine), uid(6) in mine, uid(3) in mine) == (6, False, True)
        assert mine.get_many([uid(3), uid(6), uid(8)]) == {uid(3): 3, uid(8): 8}
    assert {i.int: v for i, v in notes.items()} == expected
    assert len(notes) == 6


def test_writing_while_iterating_inside_does_not_disturb_the_iteration(db: Database) -> None:
    db.collection("notes").put_many({uid(n): n for n in range(100)})
    with db.transaction() as tx:
        notes = tx.collection("notes")
        for entity_id, value in notes.items():
            del notes[entity_id]
            notes[uid(1000 + value)] = value
        assert [i.int for i in notes] == list(range(1000, 1100))
    assert len(db.collection("notes")) == 100
    assert db.verify() == []


# ---------------------------------------------------------------- snapshots


def test_a_snapshot_never_changes(db: Database) -> None:
    notes = db.collection("notes")
    notes.put_many({uid(n): "old" for n in range(5)})
    with db.snapshot() as snapshot:
        notes[uid(0)] = "new"
        del notes[uid(1)]
        db.collection("later")[uid(1)] = "x"
        view = snapshot.collection("notes")
        assert [value for _, value in view.items()] == ["old"] * 5
        assert (len(view), uid(1) in view, snapshot.sequence) == (5, True, 1)
        assert snapshot.collections() == ["notes"]
        assert len(snapshot.collection("later")) == 0
    assert len(notes) == 4


def test_a_snapshot_cannot_be_written_to_and_not_be_read_after_closing(db: Database) -> None:
    db.collection("notes")[uid(1)] = "a"
    snapshot = db.snapshot()
    view = snapshot.collection("notes")
    with pytest.raises(TypeError):
        view[uid(1)] = "b"  # type: ignore[index]
    snapshot.close()
    snapshot.close()
    with pytest.raises(DatabaseClosedError):
        view[uid(1)]


# ---------------------------------------------------------------- failed commits (R17)


def test_r17_a_collection_whose_first_commit_failed_is_not_known(
    db: Database, storage: WatchedStorage
) -> None:
    db.collection("a")[uid(1)] = "known"
    storage.fail_next(error=StorageError("no"))
    with pytest.raises(StorageError):
        db.collection("b")[uid(2)] = "lost"
    assert db.collections() == ["a"]
    db.collection("b")[uid(2)] = "again"
    assert (db.collections(), db.collection("b")[uid(2)]) == (["a", "b"], "again")
    assert (len(db.collection("b")), db.sequence, db.verify()) == (1, 2, [])


def test_r17_a_collection_of_a_commit_that_failed_after_all_was_done_keeps_its_number(
    db: Database, storage: WatchedStorage
) -> None:
    db.collection("a")[uid(1)] = "known"
    storage.fail_next(after=True, error=CommitUnknownError("who knows"))
    with pytest.raises(CommitUnknownError):
        db.collection("b")[uid(2)] = "there"
    db.collection("c")[uid(3)] = "next"
    assert db.collections() == ["a", "b", "c"]
    assert (db.collection("b")[uid(2)], db.collection("c")[uid(3)]) == ("there", "next")
    assert (db.sequence, db.verify()) == (3, [])


# ---------------------------------------------------------------- in columns


@pytest.mark.parametrize("deleted", [False, True], ids=["only new", "and a delete of nothing"])
@pytest.mark.parametrize("there", [False, True], ids=["all new", "one is there"])
def test_a_batch_written_in_columns_is_what_it_is_one_by_one(
    monkeypatch: pytest.MonkeyPatch, deleted: bool, there: bool
) -> None:
    found = []
    for one_by_one in (False, True):
        if one_by_one:
            monkeypatch.setattr(local, "_in_columns", lambda groups: [])
        storage = MemoryStorage()
        db = Database(storage, clock=FakeClock(), entropy=random.Random(1).randbytes)
        db.declare_local("drafts")
        if there:
            db.collection("notes")[uid(7)] = "before"
        with db.transaction() as tx:
            for number in range(30, 0, -1):
                for name in ("notes", "drafts", "lists"):
                    tx[name][uid(number)] = {"n": number, "of": name}
            tx["notes"].add("added")
            if deleted:
                tx.writes["notes"][uid(50).bytes] = None
        with db.view() as view:
            pending = view.pending(tx.sequence)
        assert pending is not None
        assert len(pending.operations) == 61
        assert (len(db.collection("notes")), len(db.collection("drafts"))) == (31, 30)
        assert db.verify() == []
        with storage.snapshot() as snapshot:
            found.append(snapshot.scan(b"", b"\xff"))
    assert found[0] == found[1]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("name", ["notes", "drafts"])
@pytest.mark.parametrize("before", [None, "x"])
def test_one_entity_alone_is_stored_as_by_a_transaction(
    role: Role, name: str, before: str | None
) -> None:
    found = []
    for with_block in (False, True):
        storage = MemoryStorage()
        entropy = random.Random(1).randbytes
        db = Database(storage, role=role, clock=FakeClock(), entropy=entropy)
        db.declare_local("drafts")
        if before is not None:
            with db.transaction() as tx:
                tx[name][uid(1)] = before
        if with_block:
            with db.transaction() as tx:
                tx[name][uid(1)] = "set"
            with db.transaction() as tx:
                added = tx[name].add("added")
        else:
            db.collection(name)[uid(1)] = "set"
            added = db.collection(name).add("added")
        assert dict(db.collection(name).items()) == {uid(1): "set", added: "added"}
        assert db.verify() == []
        with storage.snapshot() as snapshot:
            found.append(snapshot.scan(b"", b"\xff"))
    assert found[0] == found[1]


def test_one_entity_alone_is_refused_as_in_a_transaction(storage: WatchedStorage) -> None:
    db = Database(storage, clock=FakeClock(), busy_timeout_s=0.05, transaction_bytes_max=100)
    notes, commits = db.collection("notes"), storage.commits
    with pytest.raises(TransactionTooLargeError):
        notes.add("x" * 100)
    with pytest.raises(ValueTypeError, match=r"uuid\.UUID"):
        notes["1"] = "x"  # type: ignore[index]
    with pytest.raises(CborEncodeError, match="cannot be None"):
        notes.add(None)
    with db.transaction() as tx:
        with pytest.raises(TransactionError, match="already open in this thread"):
            notes.add("x")
        refused: list[str] = []

        def add() -> None:
            try:
                notes.add("y")
            except TransactionError as error:
                refused.append(error.code)

        thread = threading.Thread(target=add)
        thread.start()
        thread.join()
        tx["notes"][uid(1)] = "of the transaction"
    assert (refused, storage.commits, len(notes)) == (["busy"], commits + 1, 1)
    notes[uid(2)] = "the turn is free"
    db.close()
    with pytest.raises(DatabaseClosedError):
        notes[uid(3)] = "x"


def test_a_collection_to_which_nothing_is_written_leaves_nothing(db: Database) -> None:
    """What the sync engine stages may name one."""
    with db.write() as writer:
        assert db.commit_writes(writer, {"notes": {}}) == 0
    assert (db.collections(), db.sequence) == ([], 0)
    db.declare_local("drafts")
    with db.write() as writer:
        sequence = db.commit_writes(writer, {"notes": {}, "drafts": {uid(1).bytes: b"\x01"}})
        assert sequence == 1
    assert (db.read_head().ready, db.collections(), db.verify()) == (0, ["drafts"], [])


def test_only_local_entities_in_a_batch_leave_no_outbox(db: Database) -> None:
    db.declare_local("drafts")
    db.collection("drafts").put_many({uid(n): n for n in range(100)})
    assert (db.read_head().ready, len(db.collection("drafts")), db.verify()) == (0, 100, [])
    assert len(list(db.changes())) == 100


# ---------------------------------------------------------------- on a server


def test_on_a_server_a_commit_is_a_version_and_there_is_no_outbox() -> None:
    with Database.in_memory(role=Role.SERVER) as db:
        db.collection("notes")[uid(1)] = "a"
        db.collection("notes")[uid(1)] = "b"
        [event] = db.changes()
        assert (event.sequence, event.version) == (2, 2)
        assert (db.read_head().ready, db.verify()) == (0, [])
