"""What takes several steps is there whole or not at all, whoever else does the same, or dies."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entidb.errors import DatabaseLockedError, EntiDBError, StorageError
from entidb.storage import LmdbStorage, directories
from entidb.storage.partial import Partial, remove_dead
from entidb.testing.contracts import STUCK_SECONDS, read_all
from tests.storage.lmdb.test_lmdb_traps import ENVIRONMENT, run_python

CONTENT = {b"%04d" % n: b"v" * 300 for n in range(500)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStorage]:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as opened:
        opened.commit(CONTENT)
        yield opened


@contextlib.contextmanager
def somebody_making(where: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun to make something at ``where``, and then stands still."""
    code = """
        import sys
        from entidb.storage.partial import Partial
        with Partial(sys.argv[1], "backup") as partial:
            with open(partial.path, "wb") as file:
                file.write(b"half")
            print("begun", flush=True)
            sys.stdin.read()
    """
    made = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(where)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert made.stdout is not None
        assert made.stdout.readline().strip() == b"begun"
        yield made
    finally:
        made.kill()
        made.communicate(timeout=STUCK_SECONDS)


@pytest.mark.skipif(os.name != "posix", reason="no directory is synced there")
def test_what_could_not_be_made_durable_is_not_there_and_can_be_made_again(
    tmp_path: Path, store: LmdbStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, sync = tmp_path / "backup", directories.sync_directory

    def fails(descriptor: int) -> None:
        if where.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(directories, "sync_directory", fails)
    with pytest.raises(StorageError, match="input/output error"):
        store.backup(str(where))
    assert os.listdir(tmp_path) == ["db"]
    monkeypatch.undo()
    store.backup(str(where))
    check_backup(where)


def check_backup(path: Path) -> None:
    assert os.listdir(path) == ["data.mdb"]
    with contextlib.closing(LmdbStorage.open(path)) as copy:
        assert list(copy.verify()) == []
        assert read_all(copy) == CONTENT


def test_of_backups_to_one_place_at_once_one_wins_and_the_others_say_why(
    store: LmdbStorage, tmp_path: Path
) -> None:
    for n in range(10):
        said: list[str] = []

        def back_up(path: str = str(tmp_path / f"copy{n}"), said: list[str] = said) -> None:
            try:
                store.backup(path)
                said.append("done")
            except EntiDBError as error:
                said.append(str(error))

        threads = [threading.Thread(target=back_up) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(STUCK_SECONDS)
        assert said.count("done") == 1
        assert all("under way" in each or "exists" in each for each in said if each != "done")
        check_backup(tmp_path / f"copy{n}")
    assert sorted(os.listdir(tmp_path)) == [*(f"copy{n}" for n in range(10)), "db"]


def test_a_backup_that_another_process_is_making_is_left_to_it(
    store: LmdbStorage, tmp_path: Path
) -> None:
    with somebody_making(tmp_path / "copy") as other:
        with pytest.raises(DatabaseLockedError, match=f"under way in process {other.pid}"):
            store.backup(str(tmp_path / "copy"))
        store.backup(str(tmp_path / "another"))
        assert (tmp_path / "copy.entidb-partial" / "copy").read_bytes() == b"half"
    check_backup(tmp_path / "another")


@pytest.mark.parametrize("name", ["copy", "another"])
def test_what_a_killed_backup_left_is_removed_by_the_next_one_there(
    store: LmdbStorage, tmp_path: Path, name: str
) -> None:
    with somebody_making(tmp_path / "copy"):
        pass
    assert (tmp_path / "copy.entidb-partial").exists()
    store.backup(str(tmp_path / name))
    check_backup(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == sorted(["db", name])


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX tells whether a process lives")
def test_what_dead_processes_of_an_older_version_left_is_removed_and_nothing_else(
    store: LmdbStorage, tmp_path: Path
) -> None:
    dead = run_python("import os; print(os.getpid())")
    for name in (f"copy.partial-{dead}", f"copy.partial-{os.getpid()}", f"mine.partial-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(b"half")
    (tmp_path / f"mine.partial-{dead}" / "thesis.tex").write_bytes(b"precious")
    (tmp_path / f"file.partial-{dead}").write_bytes(b"precious")
    (tmp_path / "file.entidb-partial").write_bytes(b"precious")
    store.backup(str(tmp_path / "copy"))
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["copy", f"copy.partial-{os.getpid()}", "db", "file.entidb-partial",
         f"file.partial-{dead}", f"mine.partial-{dead}"]
    )  # fmt: skip


def test_a_backup_does_not_replace_what_appeared_meanwhile(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store._copy_to

    def copy_and_make(directory: str, check: Callable[[], None]) -> None:
        real(directory, check)
        (tmp_path / "copy").mkdir()

    monkeypatch.setattr(store, "_copy_to", copy_and_make)
    with pytest.raises(StorageError, match="exists"):
        store.backup(str(tmp_path / "copy"))
    assert os.listdir(tmp_path / "copy") == []
    assert sorted(os.listdir(tmp_path)) == ["copy", "db"]


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o640)
    with Partial(str(tmp_path / "file"), "export") as partial:
        Path(partial.path).write_bytes(b"new")
        partial.finish()
    assert (tmp_path / "file").read_bytes() == b"new"
    if sys.platform != "win32":
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_given_up_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with Partial(str(tmp_path / "file"), "export") as partial:
        Path(partial.path).write_bytes(b"half")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_cleaning_up_a_place_that_is_missing_does_nothing(tmp_path: Path) -> None:
    remove_dead(str(tmp_path / "missing"))


def _without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("entidb.storage.locks._write_start", full)


def test_what_finds_no_room_to_begin_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_room(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        Partial(str(tmp_path / "file"), "export")
    assert os.listdir(tmp_path) == []


def test_what_dead_processes_left_is_removed_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with somebody_making(tmp_path / "dead"):
        pass  # It is killed.
    with somebody_making(tmp_path / "alive"):
        _without_room(monkeypatch)
        remove_dead(str(tmp_path))
        assert os.listdir(tmp_path) == ["alive.entidb-partial"]
        assert (tmp_path / "alive.entidb-partial" / "alive").read_bytes() == b"half"
