"""A file is looked at before LMDB uses it, unless it was closed and is untouched since."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.errors import CommitUnknownError, CorruptionError, StorageError
from entidb.storage import LmdbStorage
from entidb.storage.lmdb import closed_file, headers, place
from entidb.storage.lmdb.pages import closed_file_faults
from entidb.storage.locks import FileLock
from entidb.testing.contracts import read_all
from tests.storage.lmdb.test_damaged_pages import Image
from tests.storage.lmdb.test_lmdb_traps import FailingCommit, run_killed, run_python

PAGE = 4096


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    path = tmp_path / "db"
    with contextlib.closing(LmdbStorage.open(path)) as store:
        store.commit({b"%04d" % n: b"v" * 300 for n in range(500)})
    return path


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were looked at."""
    looked: list[str] = []
    real = closed_file_faults

    def look(path: str, rest: Callable[[], None] | None = None) -> list[str]:
        looked.append(path)
        return real(path, rest)

    monkeypatch.setattr("entidb.storage.lmdb.doubt.closed_file_faults", look)
    return looked


def misdirect(path: Path, seed: int = 1) -> None:
    """A branch page's bytes in the place of a leaf's, as a disk that writes to the wrong place
    leaves them. LMDB ends the process over it."""
    data = path / "data.mdb"
    image = Image(bytearray(data.read_bytes()))
    branch, leaf = image.root * PAGE, image.child(seed % len(image.nodes(image.root))) * PAGE
    image.raw[leaf : leaf + PAGE] = image.raw[branch : branch + PAGE]
    data.write_bytes(image.raw)


def test_a_store_that_was_closed_is_opened_without_reading_its_pages(
    closed: Path, looks: list[str]
) -> None:
    for n in range(3):
        with contextlib.closing(LmdbStorage.open(closed)) as store:
            store.commit({b"new": b"%d" % n})
    assert looks == []


def test_the_headers_of_a_store_that_was_closed_are_looked_at_once(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bytes] = []
    real = headers.parsed_header

    def look(raw: bytes) -> headers.Header:
        looked.append(raw)
        return real(raw)

    for module in (headers, closed_file):
        monkeypatch.setattr(module, "parsed_header", look)
    with contextlib.closing(LmdbStorage.open(closed)):
        assert len(looked) == 2


def test_what_is_written_while_the_lock_is_waited_for_is_looked_at_again(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the data file itself is not locked: by an older version, or on Windows."""
    copy = closed.with_name("copy")
    shutil.copytree(closed, copy)
    with contextlib.closing(LmdbStorage.open(copy)) as store:
        for n in range(3):
            store.commit({b"new": b"%d" % n})
    real = FileLock.take

    def late(path: str, like: os.stat_result, *, shared: bool = False) -> FileLock:
        (closed / "data.mdb").write_bytes((copy / "data.mdb").read_bytes())
        return real(path, like, shared=shared)

    monkeypatch.setattr(FileLock, "take", late)
    taken = place.take_place(str(closed))
    try:
        assert taken.headers is not None and taken.headers.transaction == 4
    finally:
        taken.release()


def test_opening_and_closing_without_a_commit_leaves_the_file_as_it_was(
    closed: Path, looks: list[str]
) -> None:
    before = (closed / "data.mdb").stat()
    for _ in range(3):
        with contextlib.closing(LmdbStorage.open(closed)) as store:
            assert len(read_all(store)) == 500
    after = (closed / "data.mdb").stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert looks == []


def test_a_store_whose_process_was_killed_is_looked_at(closed: Path, looks: list[str]) -> None:
    code = """
        import os, signal, sys
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_killed(code, closed)
    for _ in range(2):
        LmdbStorage.open(closed).close()
    assert looks == [str(closed / "data.mdb")]


@pytest.mark.parametrize("change", ["lock file", "times", "copy", "content"])
def test_a_file_that_may_be_another_than_was_closed_is_looked_at(
    closed: Path, looks: list[str], change: str
) -> None:
    data = closed / "data.mdb"
    if change == "lock file":
        (closed / "entidb.lock").unlink()
    elif change == "times":
        os.utime(data)
    elif change == "copy":
        shutil.copytree(closed, closed.parent / "copy")
        closed = closed.parent / "copy"
    else:
        # At once, and with the old time: only the system's note of the change is left.
        times = data.stat()
        raw = data.read_bytes()
        data.write_bytes(raw)
        os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    with contextlib.closing(LmdbStorage.open(closed)) as store:
        assert len(read_all(store)) == 500
    assert looks == [str(closed / "data.mdb")]


def test_a_file_that_is_changed_within_a_tick_of_its_closing_is_looked_at(
    tmp_path: Path, looks: list[str]
) -> None:
    for n in range(20):
        path = tmp_path / str(n)
        with contextlib.closing(LmdbStorage.open(path)) as store:
            store.commit({b"a": b"1"})
        with (path / "data.mdb").open("r+b") as file:
            file.seek(3 * PAGE)
            file.write(b"")
            file.write(file.read(1) or b"\0")
        LmdbStorage.open(path).close()
    assert len(looks) == 20


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_page_is_refused_before_it_can_end_the_process(closed: Path, seed: int) -> None:
    misdirect(closed, seed)
    raw = (closed / "data.mdb").read_bytes()
    code = """
        import sys
        from entidb.errors import CorruptionError
        from entidb.storage import LmdbStorage
        for _ in range(2):
            try:
                store = LmdbStorage.open(sys.argv[1])
                with store.snapshot() as snapshot:
                    snapshot.scan(b"", b"\\xff")
            except CorruptionError as error:
                print(error)
    """
    said = run_python(code, str(closed)).splitlines()
    assert len(said) == 2
    assert all("it was not touched. Restore a backup" in line for line in said)
    assert (closed / "data.mdb").read_bytes() == raw


def test_a_damaged_file_is_read_once_until_it_is_another(closed: Path, looks: list[str]) -> None:
    sound = (closed / "data.mdb").read_bytes()
    misdirect(closed)
    for _ in range(3):
        with pytest.raises(CorruptionError, match="damaged"):
            LmdbStorage.open(closed)
    assert len(looks) == 1
    (closed / "data.mdb").write_bytes(sound)
    with contextlib.closing(LmdbStorage.open(closed)) as store:
        assert len(read_all(store)) == 500
    assert len(looks) == 2


def test_what_is_not_damaged_can_be_saved_and_the_file_stays_doubtful(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with Database.open(path) as db:
        notes = db.collection("notes")
        ids = [notes.add({"n": n, "text": "x" * 200}) for n in range(300)]
    image = Image(bytearray((path / "data.mdb").read_bytes()))
    at = image.nodes(image.child(2))[0]
    image.set(image.child(2), at + 6, 600)  # a key longer than keys are
    (path / "data.mdb").write_bytes(image.raw)
    for _ in range(2):
        with pytest.raises(CorruptionError, match="does not fit"):
            Database.open(path)
        with Database.open(path, salvage=True) as db:
            notes = db.collection("notes")
            assert notes[ids[-1]]["n"] == 299


def test_a_store_in_which_damage_was_met_is_looked_at_when_it_is_opened_again(
    closed: Path, looks: list[str]
) -> None:
    data = closed / "data.mdb"
    with contextlib.closing(LmdbStorage.open(closed)) as store:
        raw = data.read_bytes().replace(b"0123" + b"v" * 300, b"0123" + b"w" * 300)
        with data.open("r+b") as file:
            file.write(raw)
        with store.snapshot() as snapshot, pytest.raises(CorruptionError):
            snapshot.get(b"0123")
    LmdbStorage.open(closed).close()
    assert len(looks) == 1


def test_checking_a_closed_store_leaves_it_closed(closed: Path, looks: list[str]) -> None:
    assert LmdbStorage.closed_faults(closed) == []
    LmdbStorage.open(closed).close()
    assert len(looks) == 1


def test_a_number_that_went_back_after_closing_is_damage(closed: Path) -> None:
    """The newest header as a failed write would leave it, though it was there at the end."""
    with contextlib.closing(LmdbStorage.open(closed)) as store:
        for n in range(8):
            store.commit({b"new": b"%d" % n})
    data = closed / "data.mdb"
    raw = bytearray(data.read_bytes())
    numbers = [int.from_bytes(raw[at + 144 : at + 152], "little") for at in (0, PAGE)]
    newest = max(numbers)
    at = numbers.index(newest) * PAGE + 144
    raw[at : at + 8] = (newest - 2).to_bytes(8, "little")
    data.write_bytes(raw)
    with pytest.raises(CorruptionError, match="ends with commit"):
        LmdbStorage.open(closed)


# ---------------------------------------------------------------- after a commit that failed


def test_a_failed_commit_is_synced_whatever_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that was written and said it was not has to be off the disk before the next commit
    writes over its pages; so a sync that fails leaves the outcome open."""

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    for commits in (True, False):
        store = LmdbStorage.open(tmp_path / str(commits))
        store.commit({b"a": b"1"})
        store._file.env = FailingCommit(store._file.env, commits=commits)
        with monkeypatch.context() as patch:
            patch.setattr("entidb.storage.lmdb.closed_file.os.fsync", fail)
            with pytest.raises(CommitUnknownError, match="open it again"):
                store.commit({b"a": b"2"})
        with contextlib.closing(LmdbStorage.open(store.path)) as again:
            assert read_all(again) == {b"a": b"2" if commits else b"1"}


def test_a_store_that_was_not_closed_is_synced_before_it_is_used(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    (closed / "entidb.lock").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("entidb.storage.lmdb.closed_file.os.fsync", fail)
        with pytest.raises(StorageError):
            LmdbStorage.open(closed)
    LmdbStorage.open(closed).close()
