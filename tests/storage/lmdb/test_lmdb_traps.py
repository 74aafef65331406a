"""One test or more for each trap of LMDB that the store closes (docs: the list of traps)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

import entidb.storage
from entidb.errors import (
    CommitUnknownError,
    CorruptionError,
    DatabaseClosedError,
    DatabaseLockedError,
    FormatError,
    StorageError,
    StorageFullError,
)
from entidb.storage import LmdbStorage
from entidb.testing.contracts import STUCK_SECONDS, read_all

SMALL = 1 << 20
#: For processes the tests start: the package under test, wherever it was imported from.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(entidb.storage.__file__).parents[2])}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStorage]:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as opened:
        yield opened


@contextlib.contextmanager
def busy_readers(store: LmdbStorage, keys: list[bytes]) -> Iterator[list[str]]:
    """Four threads that read without a pause; what they raised is in the list afterwards."""
    done = threading.Event()
    faults: list[str] = []

    def read() -> None:
        while not done.is_set():
            try:
                with store.snapshot() as snapshot:
                    snapshot.get_many(keys)
                    snapshot.scan(b"", b"\xff", limit=100)
            except DatabaseClosedError:
                return
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield faults
    finally:
        done.set()
        for thread in threads:
            thread.join(STUCK_SECONDS)
        if any(thread.is_alive() for thread in threads):
            faults.append("a reader is stuck")


def within_bounds(work: Any) -> None:
    """Run ``work`` in a thread; fail if it hangs, raise what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STUCK_SECONDS)
    assert not thread.is_alive(), "stuck"
    if raised:
        raise raised[0]


def run_python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=STUCK_SECONDS,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_killed(code: str, path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    done = subprocess.run(command, check=False, timeout=STUCK_SECONDS, env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL


# ---------------------------------------------------------------- 1: aborting beside readers


def test_a_batch_that_fails_inside_its_transaction_ends_beside_busy_readers(
    store: LmdbStorage,
) -> None:
    def write_badly() -> None:
        with store._gate.turns.hold():
            store._write([(b"a", b"1"), (b"k" * 512, b"2")], [], None)

    keys = [b"%03d" % n for n in range(100)]
    store.commit(dict.fromkeys(keys, b"x"))
    with busy_readers(store, keys) as faults:
        for _ in range(20):
            # Past our own checks, so that LMDB itself refuses in the middle of the batch.
            with pytest.raises(lmdb.BadValsizeError):
                within_bounds(write_badly)
            store.commit({b"new": b"1"})
    assert faults == []
    assert b"a" not in read_all(store)


# ---------------------------------------------------------------- 2: growing the map


def test_the_map_grows_beside_busy_readers(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", map_bytes=SMALL)) as store:
        keys = [b"%05d" % n for n in range(100)]
        store.commit(dict.fromkeys(keys, b"x"))
        with busy_readers(store, keys) as faults:
            for n in range(20):
                batch = {b"big%d-%d" % (n, m): os.urandom(5000) for m in range(100)}
                within_bounds(lambda batch=batch: store.commit(batch))
        assert faults == []
        assert store.info().map_bytes >= 16 * SMALL
        assert store.info().records == 2100
        assert list(store.verify()) == []


def test_one_batch_may_be_many_times_the_map(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", map_bytes=SMALL)) as store:
        store.commit({b"big": bytes(20 * SMALL)})
        assert read_all(store) == {b"big": bytes(20 * SMALL)}


def test_a_long_snapshot_while_the_map_must_grow_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with contextlib.closing(LmdbStorage.open(path, map_bytes=SMALL, drain_seconds=0.2)) as store:
        store.commit({b"a": b"1"})
        with store.snapshot() as long:
            with pytest.raises(StorageFullError, match="Close snapshots"):
                store.commit({b"big": bytes(4 * SMALL)})
            assert long.scan(b"", b"\xff") == [(b"a", b"1")]
            assert read_all(store) == {b"a": b"1"}
        store.commit({b"big": bytes(4 * SMALL)})
        assert len(read_all(store)) == 2


def test_a_map_at_its_limit_is_an_error_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entidb.storage.lmdb.open_file.MAP_BYTES_MAX", 2 * SMALL)
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", map_bytes=SMALL)) as store:
        with pytest.raises(StorageFullError, match="nothing was changed"):
            store.commit({b"big": bytes(4 * SMALL)})
        store.commit({b"a": b"1"})
        assert read_all(store) == {b"a": b"1"}


def test_a_smaller_map_is_taken_where_the_system_gives_no_large_one(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from entidb.storage import LmdbStorage
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        print(store.info().map_bytes)
    """
    assert SMALL < int(run_python(code, str(tmp_path / "db"))) < 4 << 30


# ---------------------------------------------------------------- 3: readers


def test_opening_clears_the_slots_of_killed_readers(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        snapshot = store.snapshot()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "db"
    run_killed(code, path)
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert store._file.env.reader_check() == 0
        assert "no active readers" in store._file.env.readers()


def test_too_many_snapshots_are_an_error_and_the_store_goes_on(store: LmdbStorage) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(510):
            stack.enter_context(store.snapshot())
        with pytest.raises(StorageError, match="too many open snapshots"):
            [stack.enter_context(store.snapshot()) for _ in range(4)]
    assert store.info().readers == 0


def test_compacting_gives_room_back_beside_busy_readers(store: LmdbStorage) -> None:
    records: dict[bytes, bytes] = {b"%04d" % n: os.urandom(4000) for n in range(1000)}
    store.commit(records)
    store.commit(dict.fromkeys(sorted(records)[10:]))
    before = store.info().file_bytes
    with busy_readers(store, sorted(records)[:10]) as faults:
        within_bounds(store.compact)
    assert faults == []
    assert store.info().file_bytes < before / 10
    assert len(read_all(store)) == 10
    assert not list(Path(store.path).glob(".entidb*"))


def test_compacting_under_a_long_snapshot_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", drain_seconds=0.1)) as store:
        store.commit({b"a": b"1"})
        with store.snapshot() as snapshot:
            with pytest.raises(StorageError, match="stay open"):
                store.compact()
            assert snapshot.get(b"a") == b"1"
        assert not list(tmp_path.glob("db/.entidb*"))


def test_what_a_crash_left_of_a_compaction_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "db"
    LmdbStorage.open(path).close()
    (path / ".entidb-new").mkdir()
    (path / ".entidb-new" / "data.mdb").write_bytes(b"half")
    LmdbStorage.open(path).close()
    assert not (path / ".entidb-new").exists()


# ---------------------------------------------------------------- 5: fork


def test_a_forked_child_is_refused_and_the_parent_is_not_disturbed(tmp_path: Path) -> None:
    code = """
        import os, sys
        from entidb.errors import DatabaseForkedError
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        snapshot = store.snapshot()
        slots = store._file.env.readers()
        child = os.fork()
        if child == 0:
            refused = 0
            for use in (store.snapshot, lambda: store.commit({b"a": b"2"}),
                        lambda: snapshot.get(b"a"), lambda: snapshot.scan(b"", b"z"),
                        store.info, store.compact):
                try:
                    use()
                except DatabaseForkedError:
                    refused += 1
            snapshot.close()
            store.close()
            del snapshot, store
            sys.exit(refused)  # the whole way out, so that everything is freed
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert store._file.env.readers() == slots, "the child cleared the parent's reader slot"
        store.commit({b"a": b"3"})
        assert snapshot.get(b"a") == b"1"
        store.close()
        LmdbStorage.open(sys.argv[1]).close()
    """
    assert run_python(code, str(tmp_path / "db")) == "6"


def test_a_forked_child_does_not_keep_the_database_locked(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent closes its end
            os._exit(0)
        store.close()
        LmdbStorage.open(sys.argv[1]).close()
        print("opened")
    """
    assert run_python(code, str(tmp_path / "db")) == "opened"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells what is open")
def test_nothing_of_the_file_stays_open_in_a_child_nor_of_one_that_was_replaced(
    tmp_path: Path,
) -> None:
    code = """
        import os, sys
        from entidb.storage import LmdbStorage

        def links():
            found = []
            for number in os.listdir("/proc/self/fd"):
                try:
                    found.append(os.readlink(f"/proc/self/fd/{number}"))
                except OSError:
                    pass
            return [each for each in found if "data.mdb" in each]

        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        store.compact()
        store.commit({b"a": b"2"})
        print([each for each in links() if "deleted" in each], len(links()) > 0, end=" ")
        store.close()
        print(links(), end=" ", flush=True)
        store = LmdbStorage.open(sys.argv[1])
        if (child := os.fork()) == 0:
            # LMDB's own it keeps, and never uses.
            print(len(links()), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    """
    assert run_python(code, str(tmp_path / "db")) == "[] True [] 2"


# ---------------------------------------------------------------- 6: one at a time


def test_opening_twice_in_one_process_is_refused(store: LmdbStorage) -> None:
    with pytest.raises(DatabaseLockedError, match="already open in this process"):
        LmdbStorage.open(store.path)
    store.commit({b"a": b"1"})
    assert read_all(store) == {b"a": b"1"}


def test_whoever_needs_it_alone_is_refused_and_told_who_has_it(store: LmdbStorage) -> None:
    code = """
        import sys
        from entidb.errors import DatabaseLockedError
        from entidb.storage import LmdbStorage
        try:
            LmdbStorage.open(sys.argv[1], salvage=True)
        except DatabaseLockedError as error:
            print(error)
    """
    assert f"is open in process {os.getpid()}; close it there" in run_python(code, store.path)


def test_a_killed_process_leaves_nothing_to_clean_up(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "db"
    run_killed(code, path)
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == {b"a": b"1"}


# ---------------------------------------------------------------- 8: damaged and foreign files


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """The data file of a closed store with branch, leaf and overflow pages."""
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"%04d" % n: b"v" * 300 for n in range(500)})
        store.commit({b"big": b"b" * 50_000})
    return tmp_path / "db" / "data.mdb"


@pytest.mark.parametrize("pages", [0, 0.001, 0.01, 0.5, 1, 1.001, 1.5, 2, 3, 10, -1, -0.5])
def test_a_truncated_file_is_refused_and_not_touched(closed: Path, pages: float) -> None:
    whole = closed.read_bytes()
    size = int(pages * 4096) if pages >= 0 else len(whole) + int(pages * 4096)
    closed.write_bytes(whole[:size])
    with pytest.raises(FormatError) as raised:
        LmdbStorage.open(closed.parent)
    assert raised.value.code == ("truncated" if size == 0 or size >= 24 else "not_a_database")
    assert closed.read_bytes() == whole[:size]


def test_a_file_that_lacks_only_unused_pages_at_its_end_opens(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with contextlib.closing(LmdbStorage.open(path)) as store:
        store.commit({b"a": b"1"})
        store.commit({b"big": bytes(400_000)})
        store.commit({b"big": None})
        for _ in range(6):
            store.commit({b"a": b"2"})
    # The last pages of the file are free now; the tree lies in front of them.
    os.truncate(path / "data.mdb", 20 * 4096)
    with contextlib.closing(LmdbStorage.open(path)) as store:
        assert read_all(store) == {b"a": b"2"}
        store.commit({b"big": bytes(500_000)})
        assert list(store.verify()) == []


@pytest.mark.parametrize("content", [b"x", b"SQLite format 3\0" * 1000, bytes(8192)])
def test_a_foreign_file_is_refused_and_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.mdb"
    path.write_bytes(content)
    with pytest.raises(FormatError) as raised:
        LmdbStorage.open(tmp_path)
    assert raised.value.code == "not_a_database"
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["data.mdb"]


@pytest.mark.parametrize(("offset", "what"), [(16, "header"), (20, "format"), (40, "page size")])
def test_a_damaged_header_is_refused(closed: Path, offset: int, what: str) -> None:
    raw = bytearray(closed.read_bytes())
    raw[offset] ^= 0xFF
    closed.write_bytes(raw)
    with pytest.raises(FormatError, match=what):
        LmdbStorage.open(closed.parent)


def test_a_directory_with_other_things_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(FormatError, match="holiday"):
        LmdbStorage.open(tmp_path)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(FormatError, match="is a file"):
        LmdbStorage.open(path)


def test_opening_without_create_makes_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FormatError, match="no database"):
            LmdbStorage.open(path, create=False)
    assert os.listdir(tmp_path) == []


def test_a_flipped_bit_is_never_returned(closed: Path) -> None:
    raw = bytearray(closed.read_bytes())
    raw[raw.index(b"0123" + b"v" * 300) + 100] ^= 0x04
    # Older copies of the page may hold the record too; the flip must reach the live one.
    while (again := raw.find(b"0123" + b"v" * 300)) >= 0:
        raw[again + 100] ^= 0x04
    closed.write_bytes(raw)
    with contextlib.closing(LmdbStorage.open(closed.parent)) as store:
        with store.snapshot() as snapshot:
            for read in (
                lambda: snapshot.get(b"0123"),
                lambda: snapshot.get_many([b"0122", b"0123"]),
                lambda: snapshot.get_many([b"0123", b"none"]),
                lambda: snapshot.get_many([b"%04d" % n for n in range(100, 150)]),
                lambda: snapshot.scan(b"0122", b"0125"),
                lambda: snapshot.pick(b"0122", b"0125", 3, lambda _: []),
                lambda: snapshot.pick(b"0122", b"0125", 3, lambda _: [0]),
                lambda: snapshot.scan_keys(b"0122", b"0125", proved=True),
            ):
                with pytest.raises(CorruptionError, match=b"0123".hex()):
                    read()
            assert snapshot.get(b"0122") == b"v" * 300
        assert list(store.verify()) == [f"record {b'0123'.hex()}: checksum does not match"]


def test_a_flipped_bit_in_a_key_without_a_value_is_found_when_keys_are_proved(
    tmp_path: Path,
) -> None:
    keys = [b"key-%04d" % n for n in range(100)]
    with contextlib.closing(LmdbStorage.open(tmp_path)) as store:
        store.commit(dict.fromkeys(keys, b""))
    path = tmp_path / "data.mdb"
    path.write_bytes(path.read_bytes().replace(keys[50], b"key-0058"))
    with (
        contextlib.closing(LmdbStorage.open(tmp_path, salvage=True)) as store,
        store.snapshot() as snapshot,
    ):
        assert snapshot.scan_keys(b"k", b"l", limit=50, proved=True) == keys[:50]
        with pytest.raises(CorruptionError, match=b"key-0058".hex()):
            snapshot.scan_keys(b"k", b"l", proved=True)


def test_a_value_under_another_key_is_noticed(store: LmdbStorage) -> None:
    store.commit({b"a": b"1"})
    with store._file.env.begin(write=True) as txn:
        txn.put(b"b", txn.get(b"a"))
    with store.snapshot() as snapshot, pytest.raises(CorruptionError):
        snapshot.get(b"b")


# ---------------------------------------------------------------- 9: a commit that fails


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "entidb-test", str(path)],
        capture_output=True,
        check=False,
    )
    if not made or made.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_changes_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "2m"):
        with contextlib.closing(LmdbStorage.open(disk / "db")) as store:
            store.commit({b"a": b"1"})
            for _ in range(3):
                with pytest.raises(StorageFullError):
                    store.commit({b"%d" % n: os.urandom(3000) for n in range(1000)})
                assert read_all(store) == {b"a": b"1"}
                store.commit({b"a": b"1", b"b": b"2"})
                store.commit({b"b": None})
            assert list(store.verify()) == []
        with contextlib.closing(LmdbStorage.open(disk / "db")) as store:
            assert read_all(store) == {b"a": b"1"}


def test_a_backup_without_room_leaves_nothing_behind(tmp_path: Path, store: LmdbStorage) -> None:
    store.commit({b"%d" % n: os.urandom(3000) for n in range(1000)})
    disk = tmp_path / "disk"
    with small_disk(disk, "1m"):
        with pytest.raises(StorageError):
            store.backup(str(disk / "backup"))
        assert os.listdir(disk) == []


def test_a_file_size_limit_changes_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    code = """
        import os, resource, sys
        from entidb.errors import StorageError
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            store.commit({b"%d" % n: os.urandom(3000) for n in range(1000)})
        except StorageError as error:
            print(error.code)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.commit({b"b": b"2"})
        with store.snapshot() as snapshot:
            print(snapshot.scan_keys(b"", b"z"))
    """
    code_raised, keys = run_python(code, str(tmp_path / "db")).splitlines()
    assert code_raised in ("storage_full", "storage_error")
    assert keys == "[b'a', b'b']"


def test_a_file_size_limit_that_lets_nothing_be_made_is_named(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from entidb.errors import StorageFullError
        from entidb.storage import LmdbStorage
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            LmdbStorage.open(sys.argv[1])
        except StorageFullError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        LmdbStorage.open(sys.argv[1]).close()
        print("made")
    """
    said, made = run_python(code, str(tmp_path / "db")).splitlines()
    assert "1024 bytes (ulimit -f, RLIMIT_FSIZE)" in said and "disk is full" not in said
    assert made == "made"


class FailingCommit:
    """An environment whose next commit fails: after the fact, or instead of it."""

    def __init__(self, env: Any, *, commits: bool) -> None:
        self._env, self._commits = env, commits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def begin(self, write: bool = False) -> Any:
        outer, txn = self, self._env.begin(write=write)

        class Failing:
            def __getattr__(self, name: str) -> Any:
                return getattr(txn, name)

            def commit(self) -> None:
                txn.commit() if outer._commits else txn.abort()
                raise lmdb.Error("mdb_txn_commit: Input/output error")

        return Failing()


def test_a_failed_commit_that_is_there_after_all_returns(store: LmdbStorage) -> None:
    store._file.env = FailingCommit(store._file.env, commits=True)
    store.commit({b"a": b"1"})
    assert read_all(store) == {b"a": b"1"}


def test_a_failed_commit_that_is_not_there_raises_and_the_store_goes_on(
    store: LmdbStorage,
) -> None:
    store._file.env = FailingCommit(store._file.env, commits=False)
    with pytest.raises(StorageError, match="nothing was changed") as raised:
        store.commit({b"a": b"1"})
    assert not isinstance(raised.value, CommitUnknownError)
    assert isinstance(raised.value.__cause__, lmdb.Error)
    store.commit({b"b": b"1"})
    assert read_all(store) == {b"b": b"1"}


def test_a_failed_commit_beside_a_long_snapshot_ends(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", drain_seconds=0.1)) as store:
        store.commit({b"a": b"1"})
        snapshot = store.snapshot()
        store._file.env = FailingCommit(store._file.env, commits=False)
        with pytest.raises(StorageError):
            store.commit({b"a": b"2"})
        with pytest.raises(StorageError, match="take a new snapshot"):
            snapshot.get(b"a")
        snapshot.close()
        assert read_all(store) == {b"a": b"1"}
        assert store.info().readers == 0


def test_a_commit_whose_outcome_stays_unknown_closes_the_store(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError(5, "Input/output error")

    store._file.env = FailingCommit(store._file.env, commits=True)
    monkeypatch.setattr(store._file, "_open", broken)
    with pytest.raises(CommitUnknownError, match="open it again"):
        store.commit({b"a": b"1"})
    with pytest.raises(DatabaseClosedError):
        store.snapshot()
    with contextlib.closing(LmdbStorage.open(store.path)) as again:
        assert read_all(again) == {b"a": b"1"}


def test_a_backup_that_a_disk_stops_is_no_commit_whose_outcome_is_unknown(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails from the commit to the copy on: what was made is removed in any case."""
    store.commit({b"a": b"1"})
    opened = LmdbStorage.open

    def open_failing(path: str, **options: Any) -> LmdbStorage:
        made = opened(path, **options)

        def broken() -> None:
            raise OSError(28, "No space left on device")

        made._file.env = FailingCommit(made._file.env, commits=True)
        monkeypatch.setattr(made._file, "_open", broken)
        return made

    monkeypatch.setattr(LmdbStorage, "open", open_failing)
    with pytest.raises(StorageError, match="nothing was made") as raised:
        store.backup(str(tmp_path / "backup"), [(b"b", b"2")])
    assert raised.value.code == "storage_error"
    assert "open it again" not in str(raised.value)
    assert not (tmp_path / "backup").exists() and read_all(store) == {b"a": b"1"}


# ---------------------------------------------------------------- 10: modes; closing


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
            store.commit({b"a": b"1"})
            store.backup(str(tmp_path / "backup"))
            for folder in ("db", "backup"):
                assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
                modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / folder).iterdir()}
                assert modes == {0o600}
    finally:
        os.umask(old)


def test_writes_go_through_to_the_disk_and_never_through_the_map(store: LmdbStorage) -> None:
    flags = store._file.env.flags()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["writemap"]
    assert not flags["map_async"]


def test_closing_beside_busy_readers_ends_them_cleanly(tmp_path: Path) -> None:
    for n in range(5):
        store = LmdbStorage.open(tmp_path / str(n))
        keys = [b"%03d" % n for n in range(100)]
        store.commit(dict.fromkeys(keys, b"x"))
        with busy_readers(store, keys) as faults:
            within_bounds(store.close)
        assert faults == []
        LmdbStorage.open(store.path).close()


def test_a_backup_beside_a_writer_is_one_state(tmp_path: Path, store: LmdbStorage) -> None:
    keys = [b"%04d" % n for n in range(500)]
    store.commit(dict.fromkeys(keys, b"0"))
    done = threading.Event()

    def write() -> None:
        n = 0
        while not done.is_set():
            n += 1
            store.commit(dict.fromkeys(keys, b"%d" % n))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        for n in range(3):
            store.backup(str(tmp_path / f"backup{n}"))
    finally:
        done.set()
        writer.join(STUCK_SECONDS)
    for n in range(3):
        with contextlib.closing(LmdbStorage.open(tmp_path / f"backup{n}")) as copy:
            assert len(set(read_all(copy).values())) == 1
            assert copy.info().records == 500
