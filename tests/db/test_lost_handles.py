"""A database that nobody refers to any more is closed; one that somebody does is named."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.errors import DatabaseLockedError, ValueTypeError
from entidb.sync import SyncConfig, SyncEngine
from tests.storage.lmdb.test_lmdb_traps import run_python


def just_open(path: Path) -> None:
    Database.open(path).collection("notes").add({"n": 1})


def with_a_snapshot(path: Path) -> None:
    database = Database.open(path)
    database.collection("notes").add({"n": 1})
    snapshot = database.snapshot()
    assert len(snapshot.collection("notes")) == 1


def in_a_transaction(path: Path) -> None:
    database = Database.open(path)
    database.collection("notes").add({"n": 1})
    database.transaction().collection("notes").add({"n": 2})


def in_a_cycle(path: Path) -> None:
    database = Database.open(path)
    database.collection("notes").add({"n": 1})
    kept: list[object] = [database, database.snapshot()]
    kept.append(kept)


def with_an_engine(path: Path) -> None:
    database = Database.open(path)
    database.collection("notes").add({"n": 1})
    SyncEngine(SyncConfig(db_id="shop"), "http://127.0.0.1:1", database)


def in_an_error(path: Path) -> None:
    try:
        database = Database.open(path)
        database.collection("notes").add({"n": 1})
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        kept = error
        assert kept.__traceback__ is not None


@pytest.mark.parametrize(
    "lose",
    [just_open, with_a_snapshot, in_a_transaction, in_a_cycle, with_an_engine, in_an_error],
)
def test_a_database_that_was_lost_can_be_opened_again(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    path = tmp_path / "db"
    # That it was lost is said when it is found, here or in ``open``.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        lose(path)
        database = Database.open(path)
    with database:
        assert len(database.collection("notes")) == 1
        database.collection("notes").add({"n": 3})
        assert database.verify() == []


def test_losing_a_database_is_warned_of_with_where_it_was_opened(tmp_path: Path) -> None:
    with pytest.warns(ResourceWarning, match=r"unclosed database .*db, opened at .*handles\.py:\d"):
        just_open(tmp_path / "db")


def test_closing_a_database_leaves_nothing_to_warn_of(tmp_path: Path) -> None:
    database = Database.open(tmp_path / "db")
    snapshot = database.snapshot()
    database.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del database, snapshot
        gc.collect()


def test_a_database_that_is_still_referred_to_is_named_by_its_place_in_the_program(
    tmp_path: Path,
) -> None:
    line = sys._getframe().f_lineno + 1
    with Database.open(tmp_path / "db") as database:
        with pytest.raises(DatabaseLockedError) as raised:
            Database.open(tmp_path / "db")
        assert f"already open in this process, since {__file__}:{line}" in str(raised.value)
        assert "close()" in str(raised.value)
        assert "`with`" in str(raised.value)
        database.collection("notes").add({"n": 1})


def test_an_exception_in_an_interactive_session_does_not_keep_a_database_for_ever(
    tmp_path: Path,
) -> None:
    code = """
        import code, contextlib, io, sys
        session = code.InteractiveInterpreter()
        def cell(text):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                session.runcode(compile(text, "<cell>", "exec"))
            return said.getvalue()
        cell("from entidb import Database")
        cell(f"def work():\\n    db = Database.open({sys.argv[1]!r})\\n    1 / 0")
        assert "ZeroDivisionError" in cell("work()")
        again = f"db = Database.open({sys.argv[1]!r})"
        said = cell(again)
        assert "since <cell>:2" in said and "traceback" in said, said
        said = cell(again)
        assert said == "", said
        cell("db.close()")
        print("opened")
    """
    assert run_python(code, str(tmp_path / "db")) == "opened"


def test_a_forked_child_that_loses_it_leaves_the_parents_alone(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no fork")
    code = """
        import gc, os, sys, warnings
        warnings.simplefilter("error")
        from entidb.db import Database
        from entidb.errors import DatabaseLockedError
        database = Database.open(sys.argv[1])
        child = os.fork()
        if child == 0:
            del database
            gc.collect()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        database.collection("notes").add({"n": 1})
        try:
            Database.open(sys.argv[1])
        except DatabaseLockedError:
            print("locked")
        database.close()
    """
    assert run_python(code, str(tmp_path / "db")) == "locked"


def test_a_database_that_a_coroutine_has_lost_can_be_opened_again_at_once(tmp_path: Path) -> None:
    """The thread that committed for it waits for more, and keeps nothing."""

    async def write() -> None:
        database = await Database.open_async(tmp_path / "db")
        await database.aio.collection("notes").add({"n": 1})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for count in range(1, 4):
            asyncio.run(write())
            with Database.open(tmp_path / "db") as database:
                assert len(database.collection("notes")) == count


# ---- copies of handles


def kept_by_a_device(tmp_path: Path) -> Iterator[object]:
    with Database.open(tmp_path / "db") as database:
        yield database
        with database.snapshot() as snapshot:
            yield snapshot
        yield database.storage
        with SyncEngine(SyncConfig(db_id="shop"), "http://127.0.0.1:9", database) as engine:
            yield engine


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied_so_that_no_copy_closes_what_the_original_has_open(
    tmp_path: Path, take: Callable[[object], object]
) -> None:
    for handle in kept_by_a_device(tmp_path):
        with pytest.raises(ValueTypeError, match="are not copied or pickled"):
            take(handle)
        with pytest.raises(ValueTypeError, match="are not copied or pickled"):
            take([handle] if take is not copy.copy else handle)
    with Database.open(tmp_path / "db") as database:
        gc.collect()
        database.collection("notes").add({"n": 1})
        assert database.verify() == []
