"""Opening only to read makes and changes no file, and goes where nothing can be written."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.errors import (
    DatabaseLockedError,
    FormatError,
    StorageError,
    TransactionError,
)
from entidb.storage import LmdbStorage
from tests.cli.support import document, done
from tests.storage.lmdb.test_lmdb_traps import run_killed, run_python

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no shared locks")

State = dict[str, tuple[bytes, int, int]]


def state(path: Path) -> State:
    """Names, contents, times and permissions of everything in the directory."""
    return {
        each.name: (each.read_bytes(), each.stat().st_mtime_ns, stat.S_IMODE(each.stat().st_mode))
        for each in path.iterdir()
    }


@pytest.fixture
def backup(open_path: Path) -> Path:
    with Database.open(open_path / "db", role=Role.SERVER) as database:
        database.collection("notes").add({"n": 1})
        database.backup(open_path / "backup")
    return open_path / "backup"


@posix
def test_reading_a_backup_leaves_it_a_backup(backup: Path) -> None:
    before = state(backup)
    with Database.open(backup, read_only=True) as database:
        history = database.history
        assert [each["n"] for each in database.collection("notes").values()] == [1]
        assert [event.kind for event in database.changes()] == ["put"]
        assert database.verify() == []
    assert state(backup) == before
    with Database.open(backup) as database:
        assert database.history != history


@posix
@pytest.mark.parametrize(
    "words",
    [("inspect",), ("verify",), ("list",), ("list", "notes"), ("status",), ("pending",),
     ("conflicts",), ("export", "notes")],
    ids=" ".join,
)  # fmt: skip
def test_commands_that_only_look_make_and_change_nothing(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    with Database.open(tmp_path / "db") as database:
        database.collection("notes").add({"n": 1})
        database.backup(tmp_path / "backup")
    for path in (tmp_path / "backup", tmp_path / "db"):
        before = state(path)
        done(words[0], path, *words[1:])
        assert state(path) == before


@posix
def test_a_backup_of_a_backup_is_one_too(backup: Path, tmp_path: Path) -> None:
    before = state(backup)
    done("backup", backup, tmp_path / "second")
    assert state(backup) == before
    assert document(done("inspect", tmp_path / "second", "--json"))["role"] == "server"
    assert os.listdir(tmp_path / "second") == ["data.mdb"]


def test_what_would_write_is_refused(backup: Path) -> None:
    with Database.open(backup, read_only=True) as database:
        writes: list[Callable[[], object]] = [
            lambda: database.collection("notes").add({"n": 2}),
            database.transaction,
            database.compact,
            lambda: database.declare_local("other"),
        ]
        for write in writes:
            with pytest.raises(TransactionError, match="opened only to read"):
                write()
        assert len(database.collection("notes")) == 1
    with contextlib.closing(LmdbStorage.open(backup, read_only=True)) as store:
        with pytest.raises(StorageError, match="opened only to read"):
            store.commit({b"a": b"1"})
        with pytest.raises(StorageError, match="opened only to read"):
            store.compact()


def test_nothing_is_made_where_nothing_is(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FormatError, match="no database"):
            Database.open(path, read_only=True)
    assert os.listdir(tmp_path) == []


@posix
def test_readers_share_and_keep_those_who_would_write_out(backup: Path) -> None:
    code = """
        import sys
        from entidb.db import Database
        from entidb.errors import DatabaseLockedError
        for read_only in (True, False):
            try:
                with Database.open(sys.argv[1], read_only=read_only) as database:
                    print(len(database.collection("notes")))
            except DatabaseLockedError as error:
                print(error)
    """
    with Database.open(backup, read_only=True):
        said = run_python(code, str(backup)).splitlines()
        assert said[0] == "1"
        assert "is open in" in said[1]
        with pytest.raises(DatabaseLockedError, match="already open in this process"):
            Database.open(backup, read_only=True)
    with Database.open(backup):
        assert run_python(code, str(backup)).splitlines() == ["1", "1"]


@posix
def test_what_a_killed_process_left_can_be_read_as_it_is(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from entidb.db import Database
        database = Database.open(sys.argv[1])
        database.collection("notes").add({"n": 1})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_killed(code, tmp_path / "db")
    before = state(tmp_path / "db")
    with Database.open(tmp_path / "db", read_only=True) as database:
        assert len(database.collection("notes")) == 1
    assert state(tmp_path / "db") == before


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root becomes somebody else"
)
def test_files_that_may_not_be_written_can_be_read(backup: Path) -> None:
    backup.chmod(0o755)
    (backup / "data.mdb").chmod(0o444)
    code = """
        import os, resource, sys
        from entidb.db import Database
        from entidb.errors import StorageError
        from entidb.storage import LmdbStorage
        os.setgroups([])
        os.setgid(4711)
        os.setuid(4711)
        with Database.open(sys.argv[1], read_only=True) as database:
            print(len(database.collection("notes")), database.verify())
        try:
            Database.open(sys.argv[1])
        except StorageError as error:
            print(error)
    """
    read, refused = run_python(code, str(backup)).splitlines()
    assert read == "1 []"
    assert "may not" in refused or "ermission" in refused
