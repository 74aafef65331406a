"""A copy of a store's file gives way to commits, and ends as it should whatever fails."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from entidb.errors import DatabaseClosedError, StorageError, StorageFullError
from entidb.storage import LmdbStorage
from entidb.storage.lmdb import copying
from tests.storage.lmdb.test_lmdb_traps import FailingCommit

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows copies without a pipe")

#: Several pieces, and one that is not full.
ROWS = {number.to_bytes(4, "big"): bytes([number % 251]) * 700 for number in range(2000)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStorage]:
    with_rows = LmdbStorage.open(tmp_path / "store")
    with_rows.commit(ROWS)
    yield with_rows
    with_rows.close()


def content(path: Path) -> dict[bytes, bytes]:
    copy = LmdbStorage.open(path)
    try:
        assert list(copy.verify()) == []
        with copy.snapshot() as snapshot:
            return dict(snapshot.scan(b"", b"\xff" * 8))
    finally:
        copy.close()


class Flushes:
    """Counts the pieces that are flushed, and lets somebody commit before each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
        self.count = 0
        self._before = before
        self._write = copying._write
        monkeypatch.setattr(copying, "_write", self._noted)
        monkeypatch.setattr(copying, "_flush", self._flush)

    def _noted(self, target: int, piece: bytearray) -> None:
        self._before()
        self._write(target, piece)

    def _flush(self, target: int) -> None:
        self.count += 1
        os.fsync(target)


def test_a_copy_is_written_at_once_while_nobody_commits(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes(monkeypatch, lambda: None)
    store.backup(str(tmp_path / "backup"))
    assert flushes.count == 0
    assert content(tmp_path / "backup") == ROWS


def test_while_others_commit_a_copy_is_flushed_in_pieces_and_is_one_state(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes(monkeypatch, lambda: store.commit({b"\xfe": b"later", b"\0" * 4: b"!"}))
    store.backup(str(tmp_path / "backup"))
    assert flushes.count >= len(b"".join(ROWS.values())) // copying.PIECE_BYTES
    assert content(tmp_path / "backup") == ROWS


def test_the_look_at_a_copy_rests_while_others_commit(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr("time.sleep", rests.append)
    store.backup(str(tmp_path / "quiet"))
    assert rests == []
    real = copying.copy_file

    def copy_file(env: Any, directory: str, *rest: Any) -> None:
        real(env, directory, *rest)
        rests.clear()

    marks = iter(range(1000))
    monkeypatch.setattr("entidb.storage.lmdb.store.copy_file", copy_file)
    monkeypatch.setattr(store, "mark", lambda: next(marks))
    store.backup(str(tmp_path / "busy"))
    assert len(rests) >= 10 and set(rests) == {copying._LET_GO_S}
    monkeypatch.undo()
    assert content(tmp_path / "busy") == ROWS


def test_the_look_at_a_copy_goes_on_where_the_database_is_closed_meanwhile() -> None:
    def mark() -> int:
        if marks:
            return marks.pop()
        raise DatabaseClosedError("it is closed")

    marks = [1]
    copying.resting(mark)()
    assert marks == []


def test_a_disk_that_is_full_in_mid_copy_ends_it_and_leaves_nothing(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pieces = copying._write, []

    def write(target: int, piece: bytearray) -> None:
        pieces.append(len(piece))
        if len(pieces) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, piece)

    monkeypatch.setattr(copying, "_write", write)
    with pytest.raises(StorageFullError):
        store.backup(str(tmp_path / "backup"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store"]
    assert not any(each.name == "entidb-copying" for each in threading.enumerate())
    monkeypatch.undo()
    store.backup(str(tmp_path / "backup"))
    assert content(tmp_path / "backup") == ROWS


def test_what_lmdb_cannot_read_is_told(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, env: Any) -> None:
            self._env = env

        def __getattr__(self, name: str) -> Any:
            return getattr(self._env, name)

        def copyfd(self, fd: int, compact: bool) -> None:
            os.write(fd, b"a part")
            raise lmdb.CorruptedError("a page that is none")

    monkeypatch.setattr(store._file, "env", Failing(store._file.env))
    with pytest.raises(StorageError):
        store.backup(str(tmp_path / "backup"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store"]


def test_without_a_thread_the_copy_is_made_in_one_go(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying._Filling, "start", start)
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    store.backup(str(tmp_path / "backup"))
    assert files is None or len(os.listdir("/proc/self/fd")) == files
    assert content(tmp_path / "backup") == ROWS


_CHILD = """
import os, signal, sys, time
from entidb.storage import LmdbStorage
from entidb.storage.lmdb import copying
from tests.storage.lmdb.test_lmdb_traps import FailingCommit
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
store = LmdbStorage.open(sys.argv[1])
real, pieces = copying._write, []
def write(target, piece):
    pieces.append(1)
    if sys.argv[3] == "fork" and len(pieces) == 2:
        if os.fork() == 0:
            time.sleep(60)  # and keeps the pipe open
            os._exit(0)
    if sys.argv[3] == "fail" and len(pieces) == 2:
        raise OSError(5, "the disk")
    real(target, piece)
copying._write = write
try:
    store.backup(sys.argv[2])
    print("made")
except Exception as error:
    print("told", error)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.process
@pytest.mark.parametrize(("how", "said"), [("fork", "made"), ("fail", "told")])
def test_neither_a_child_that_keeps_the_pipe_nor_the_signal_of_one_that_is_closed_stops_a_copy(
    store: LmdbStorage, tmp_path: Path, how: str, said: str
) -> None:
    store.close()
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "store"), str(tmp_path / "b"), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().decode().split()[0] == said
            assert process.wait(30) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Endless:
    """LMDB has something for the pipe for as long as somebody takes it: a copy of a large file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.given_up = threading.Event(), threading.Event()
        self._fallback = threading.Timer(60, self.given_up.set)
        self._fallback.start()
        outer = self

        def run(self: Any) -> None:
            try:
                while not outer.given_up.is_set():
                    os.write(self._writes, b"x" * 100)
                    outer.begun.set()
                    outer.given_up.wait(0.002)
            except BrokenPipeError as error:
                self.error = error
            finally:
                os.close(self._writes)

        monkeypatch.setattr(copying._Filling, "run", run)

    def end(self) -> None:
        self._fallback.cancel()
        self.given_up.set()


class Backup(threading.Thread):
    def __init__(self, store: LmdbStorage, path: Path) -> None:
        super().__init__(daemon=True)
        self._store, self._path = store, path
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._store.backup(str(self._path))
        except Exception as error:
            self.error = error


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endless]:
    made = Endless(monkeypatch)
    yield made
    made.end()


def test_a_commit_that_fails_does_not_wait_for_a_backup_and_nobody_waits_for_it(
    store: LmdbStorage, tmp_path: Path, endless: Endless, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has to be opened again to see what became of the commit. It was frozen until the
    backup had come to its end: for readers and for commits."""
    backup = Backup(store, tmp_path / "backup")
    assert endless.begun.wait(30)
    store._file.env = FailingCommit(store._file.env, commits=False)
    with pytest.raises(StorageError, match="nothing was changed"):
        store.commit({b"\xfe": b"later"})
    assert not endless.given_up.is_set(), "it did not wait"
    backup.join(30)
    assert isinstance(backup.error, StorageError) and "make it again" in str(backup.error)
    assert sorted(os.listdir(tmp_path)) == ["store"]
    monkeypatch.undo()
    store.commit({b"\xfe": b"later"})
    store.backup(str(tmp_path / "backup"))
    assert content(tmp_path / "backup") == {**ROWS, b"\xfe": b"later"}


def test_closing_a_store_does_not_wait_for_a_backup(
    store: LmdbStorage, tmp_path: Path, endless: Endless
) -> None:
    backup = Backup(store, tmp_path / "backup")
    assert endless.begun.wait(30)
    store.close()
    assert not endless.given_up.is_set(), "it did not wait"
    backup.join(30)
    assert isinstance(backup.error, StorageError)
    assert sorted(os.listdir(tmp_path)) == ["store"]
    assert content(tmp_path / "store") == ROWS
