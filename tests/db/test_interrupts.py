"""Ctrl-C at every line: it ends the work and not the database.

Each test does one thing to a database over and over, and raises ``KeyboardInterrupt`` at the first
line of the core it comes through, then at the second, and so on. After each: no part of it is left
locked, ``close()`` returns, and the database holds all of the transaction or nothing of it.

The database is closed while the interrupt is on its way out, which keeps alive what it passed
through, and used again after somebody caught it, which does not.
"""

from __future__ import annotations

import dis
import faulthandler
import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import lmdb
import pytest

import entidb
from entidb.db import Database
from entidb.errors import (
    DatabaseClosedError,
    StorageError,
    TransactionError,
    TransactionTooLargeError,
)
from entidb.storage import LmdbStorage, MemoryStorage
from entidb.types import TRANSACTION_BYTES_MAX
from tests.support import uid

SOURCE = str(Path(entidb.__file__).parent)
#: Far beyond the whole test; it only ends what would hang for good.
STUCK_SECONDS = 120.0

_PUSH_EXC_INFO = dis.opmap["PUSH_EXC_INFO"]

Work = Callable[[Database], object]


#: Every line is one try; on PostgreSQL, where each try has a database of its own and takes tens of
#: milliseconds, some of them.
ON_POSTGRES = os.environ.get("ENTIDB_TEST_STORE") == "postgres"
STRIDE = 11 if ON_POSTGRES else 1


class Interrupter:
    """Calls ``what`` at line number ``at`` of the core, counted from the beginning of the block."""

    def __init__(self, at: int, what: Callable[[], None]) -> None:
        self.at = at
        self.what = what
        self.count = 0
        self.where = ""

    def __enter__(self) -> Interrupter:
        # The collector could come at any line, and end objects of earlier databases within it:
        # an interrupt in there leaves Python 3.11 with a wrong exception in the line as well.
        gc.disable()
        self._before = sys.gettrace()  # what measures coverage wants to go on
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._before)
        gc.enable()

    def _enter_frame(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        # Where an exception arrives, a signal is not looked for, and what a trace function raises
        # there leaves Python 3.11 with a wrong "exception that is being handled".
        arriving = frame.f_code.co_code[frame.f_lasti] == _PUSH_EXC_INFO
        if event == "line" and not arriving and not (ON_POSTGRES and _is_leaving(frame)):
            self.count += 1
            if self.count == self.at:
                code = frame.f_code
                self.where = f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}"
                sys.settrace(None)
                self.what()
        return self._line


def _is_leaving(frame: FrameType) -> bool:
    """Whether this line is a ``with`` that is left normally: Python looks for a signal before that
    and when ``__exit__`` has been called, which for a lock is when it was given back. Only the
    store in PostgreSQL has such locks; without it every line is tried."""
    code, at, nones = frame.f_code, frame.f_lasti, 0
    while (name := dis.opname[code.co_code[at]]) in ("SWAP", "NOP", "POP_EXCEPT", "LOAD_CONST"):
        if name == "LOAD_CONST":
            if code.co_consts[code.co_code[at + 1]] is not None:
                return False
            nones += 1
        at += 2
    return nones == 3 and name in ("PRECALL", "CALL")


def interrupt() -> None:
    raise KeyboardInterrupt


def commit(db: Database) -> None:
    with db.transaction() as tx:
        tx.collection("notes")[uid(1)] = "new"
        tx.collection("other")[uid(2)] = "new"
        del tx.collection("notes")[uid(3)]


def commit_by_hand(db: Database) -> None:
    tx = db.transaction()
    tx.collection("notes")[uid(1)] = "new"
    tx.collection("other")[uid(2)] = "new"
    del tx.collection("notes")[uid(3)]
    tx.commit()


def write(db: Database) -> None:
    with db.write() as writer:
        writes = {"notes": {uid(1).bytes: b"cnew", uid(3).bytes: None}}
        db.commit_writes(writer, {**writes, "other": {uid(2).bytes: b"cnew"}})


def write_one(db: Database) -> None:
    db.collection("notes")[uid(1)] = "new"


def commit_in_company(db: Database) -> None:
    db._sharing.warm = True  # as if other threads had committed a moment ago
    commit(db)


def write_one_in_company(db: Database) -> None:
    db._sharing.warm = True
    write_one(db)


def write_one_refused(db: Database) -> None:
    db.transaction_bytes_max = 10
    try:
        with pytest.raises(TransactionTooLargeError):
            db.collection("notes")[uid(1)] = "new"
    finally:
        db.transaction_bytes_max = TRANSACTION_BYTES_MAX


def commit_refused(db: Database) -> None:
    db.transaction_bytes_max = 10
    try:
        with pytest.raises(TransactionTooLargeError), db.transaction() as tx:
            tx.collection("notes")[uid(1)] = "new"
    finally:
        db.transaction_bytes_max = TRANSACTION_BYTES_MAX


def abort(db: Database) -> None:
    with pytest.raises(ZeroDivisionError), db.transaction() as tx:
        tx.collection("notes")[uid(1)] = 1 // len(tx.collection("other"))


def read(db: Database) -> None:
    assert db.collection("notes").get(uid(1)) == "old"
    assert len(db.collection("notes").get_many([uid(1), uid(9)])) == 1
    with db.snapshot() as snapshot:
        assert uid(3) in snapshot.collection("notes")


def iterate(db: Database) -> None:
    assert len(list(db.collection("notes").items())) == 6


WORKS: list[Work] = [
    commit,
    commit_by_hand,
    commit_refused,
    write,
    write_one,
    write_one_refused,
    commit_in_company,
    write_one_in_company,
    abort,
    read,
    iterate,
]
OLD = {uid(1): "old", uid(3): "old", **{uid(n): n for n in range(10, 14)}}
NEW = {**OLD, uid(1): "new"}
del NEW[uid(3)]
#: What a work that is done leaves in "notes" and "other".
DONE: dict[Work, tuple[dict[Any, Any], dict[Any, Any]]] = {
    **dict.fromkeys(WORKS, (NEW, {uid(2): "new"})),
    write_one: ({**OLD, uid(1): "new"}, {}),
    write_one_in_company: ({**OLD, uid(1): "new"}, {}),
}


Open = Callable[[], Database]


def content(db: Database) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return dict(db.collection("notes").items()), dict(db.collection("other").items())


def check(db: Database, where: str, work: Work = commit) -> None:
    """All of ``work`` or nothing of it, nothing damaged, nothing locked."""
    assert content(db) in ((OLD, {}), DONE[work]), where
    assert db.verify() == [], where
    with db.transaction() as tx:
        tx.collection("notes")[uid(1)] = "newest"
    assert db.collection("notes")[uid(1)] == "newest", where


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A hang ends the process and shows where every thread stands, instead of hanging the suite."""
    gc.collect()
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["memory", "lmdb"])
def fresh(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Open]:
    """Each call makes a database of its own with ``OLD`` in it, and returns what opens it."""
    # Thousands of commits, and no power fails here: the disk need not be waited for.
    monkeypatch.setattr(lmdb, "open", partial(_open_without_sync, lmdb.open))
    first = Database.in_memory() if request.param == "memory" else Database.open(tmp_path / "0")
    first.collection("notes").put_many(OLD)
    if request.param == "memory":
        stored = first.storage
        assert isinstance(stored, MemoryStorage)
        return lambda: partial(lambda storage: Database(storage), stored.copy())
    first.close()
    numbers = count(1)

    def copy() -> Open:
        path = tmp_path / str(next(numbers))
        path.mkdir()
        shutil.copy(tmp_path / "0" / "data.mdb", path)
        return partial(Database.open, path, map_bytes=1 << 24)

    return copy


def _open_without_sync(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return real(*args, **{**options, "sync": False})


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException] | None]:
    """What was raised where Python can only print it: in the end of a forgotten object."""
    seen: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_type))
    return seen


@pytest.mark.parametrize("work", WORKS)
def test_an_interrupt_at_any_line_leaves_a_database_that_closes_and_holds_all_or_nothing(
    work: Work, fresh: Callable[[], Open], unraisable: list[type[BaseException] | None]
) -> None:
    for at in count(1, STRIDE):
        open_it = fresh()
        interrupter = Interrupter(at, interrupt)
        # The exception is on its way while the database is closed.
        with suppress(KeyboardInterrupt), open_it() as db, interrupter:
            work(db)
        with pytest.raises(DatabaseClosedError):
            db.transaction()
        if isinstance(db.storage, LmdbStorage):
            with open_it() as again:
                check(again, interrupter.where, work)
        if not interrupter.where:
            break
    assert at > 50
    assert set(unraisable) <= {KeyboardInterrupt}


@pytest.mark.parametrize("work", WORKS)
def test_after_an_interrupt_at_any_line_the_same_database_works_on(
    work: Work, fresh: Callable[[], Open], unraisable: list[type[BaseException] | None]
) -> None:
    for at in count(1, STRIDE):
        with fresh()() as db:
            # From now on it knows the newest head and catalogue, and must not trust them too far.
            db.declare_local("third")
            interrupter = Interrupter(at, interrupt)
            with suppress(KeyboardInterrupt), interrupter:
                work(db)
            in_another_thread(partial(add_third, db), interrupter.where)
            check(db, interrupter.where, work)
        if not interrupter.where:
            break
    assert set(unraisable) <= {KeyboardInterrupt}


def in_another_thread(work: Callable[[], object], where: str) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == [], where


@pytest.mark.parametrize("work", [commit, write, write_one, write_one_in_company])
def test_a_signal_handler_that_writes_or_closes_at_any_line_is_refused_or_obeyed(
    work: Work, fresh: Callable[[], Open]
) -> None:
    for at in count(1, STRIDE):
        for handler in (add_third, Database.close):
            open_it = fresh()
            with open_it() as db:
                interrupter = Interrupter(at, partial(refused_or_obeyed, handler, db))
                with suppress(DatabaseClosedError, TransactionError), interrupter:
                    work(db)
            if isinstance(db.storage, LmdbStorage):
                with open_it() as again:
                    check(again, interrupter.where, work)
        if not interrupter.where:
            break


def add_third(db: Database) -> None:
    db.collection("third").add("x")


def refused_or_obeyed(handler: Work, db: Database) -> None:
    with suppress(TransactionError, StorageError, DatabaseClosedError):
        handler(db)


# ---------------------------------------------------------------- closing by the rules


def test_closing_with_an_exception_on_its_way_aborts_and_does_not_hide_it(
    fresh: Callable[[], Open],
) -> None:
    open_it = fresh()
    db = open_it()
    tx = db.transaction()
    tx.collection("notes")[uid(1)] = "new"
    with pytest.raises(KeyboardInterrupt), db:
        raise KeyboardInterrupt
    with pytest.raises(TransactionError, match="aborted"):
        tx.commit()
    tx.abort()
    if isinstance(db.storage, LmdbStorage):
        with open_it() as again:
            check(again, "")


def test_a_transaction_that_nobody_can_end_any_more_is_over(fresh: Callable[[], Open]) -> None:
    with fresh()() as db:
        db.transaction().collection("notes")[uid(1)] = "new"
        in_another_thread(partial(add_third, db), "")
        check(db, "")


def test_looking_at_a_transaction_does_not_end_it(fresh: Callable[[], Open]) -> None:
    with fresh()() as db:
        tx = db.transaction()
        assert hasattr(tx, "__exit__")
        with pytest.raises(TransactionError, match="already open"):
            db.transaction()
        with pytest.raises(TransactionError, match="before the database"):
            db.close()
        tx.collection("notes")[uid(1)] = "new"
        assert tx.commit()
        with ExitStack() as stack:
            tx = stack.enter_context(db.transaction())
            gc.collect()
            with pytest.raises(TransactionError, match="already open"):
                db.transaction()
            tx.collection("notes")[uid(1)] = "newest"
        assert db.collection("notes")[uid(1)] == "newest"
