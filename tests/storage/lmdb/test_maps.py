"""How much of the address space a store takes, and what the limits of a process do to it."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import lmdb
import pytest

from entidb.errors import DatabaseClosedError, StorageError, StorageFullError
from entidb.storage import LmdbStorage
from entidb.storage.disk_errors import disk_error, short_write_error
from entidb.testing.contracts import read_all
from tests.storage.lmdb.test_lmdb_traps import run_python

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")


def test_hundreds_of_stores_can_be_open_under_a_limit_of_address_space(tmp_path: Path) -> None:
    code = """
        import os, resource, sys
        from entidb.storage import LmdbStorage
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        many = min(400, hard // 8)
        stores = [LmdbStorage.open(os.path.join(sys.argv[1], str(n))) for n in range(many)]
        for store in stores[:20]:
            store.commit({b"%d" % n: os.urandom(10_000) for n in range(400)})
        for store in stores[:20]:
            with store.snapshot() as snapshot:
                assert len(snapshot.scan(b"", b"z")) == 400
            assert list(store.verify()) == []
        for store in stores:
            store.commit({b"a": b"1"})
            store.close()
        print(many)
    """
    assert int(run_python(code, str(tmp_path))) > 100


def test_a_thousand_stores_fit_where_address_space_has_no_limit(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        assert store.info().map_bytes * 1000 < 1 << 47
        # Room enough for nobody to have to wait while somebody reads.
        assert store.info().map_bytes > 1 << 30


def test_a_map_that_the_system_does_not_let_grow_is_an_error_and_the_store_goes_on(
    tmp_path: Path,
) -> None:
    code = """
        import os, resource, sys
        from entidb.errors import StorageFullError
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1], map_bytes=1 << 20)
        store.commit({b"a": b"1"})
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), used + (30 << 20)))
        for n in range(100):
            try:
                store.commit({b"%d" % m: bytes(5000) for m in range(n * 200, n * 200 + 200)})
            except StorageFullError as error:
                print(error)
                break
        with store.snapshot() as snapshot:
            assert len(snapshot.scan_keys(b"", b"z")) == n * 200 + 1
        store.commit({b"0": None})
        store.close()
        with LmdbStorage.open(sys.argv[1]).snapshot() as snapshot:
            print(len(snapshot.scan_keys(b"", b"z")) == n * 200)
    """
    said, same = run_python(code, str(tmp_path / "db")).splitlines()
    assert "RLIMIT_AS" in said and "nothing was changed" in said
    assert same == "True"


class ShrinkingSystem:
    """An environment whose address space somebody takes while its map grows."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def set_mapsize(self, size: int) -> None:
        raise lmdb.MemoryError("Cannot allocate memory")


def test_a_map_that_was_lost_while_it_grew_is_mapped_again(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", map_bytes=MIB)) as store:
        store.commit({b"a": b"1"})
        before = store._file.env
        store._file.env = ShrinkingSystem(before)
        store.commit({b"big": bytes(3 * MIB)})
        assert store._file.env is not before
        assert len(read_all(store)) == 2


def test_a_durable_commit_returns_even_if_the_map_is_lost_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    store = LmdbStorage.open(tmp_path / "db", map_bytes=MIB)
    store._file.env = ShrinkingSystem(store._file.env)
    monkeypatch.setattr(store._file, "_open", broken)
    store.commit({b"%04d" % n: bytes(400) for n in range(1200)})
    with pytest.raises(DatabaseClosedError):
        store.snapshot()
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as again:
        assert len(read_all(again)) == 1200


def test_the_map_grows_before_it_is_full_while_nobody_reads(tmp_path: Path) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db", map_bytes=MIB)) as store:
        for n in range(128):
            store.commit({b"%04d" % n: bytes(4500)})
        assert store.info().map_bytes == 4 * MIB
        with store.snapshot() as reader:
            for n in range(128, 200):
                store.commit({b"%04d" % n: bytes(4500)})
            assert len(reader.scan_keys(b"", b"z")) == 128
        assert store.info().map_bytes == 4 * MIB
        assert len(read_all(store)) == 200


def test_growing_early_beside_readers_disturbs_none_of_them(tmp_path: Path) -> None:
    faults: list[str] = []
    done = threading.Event()

    def read(store: LmdbStorage) -> None:
        while not done.is_set():
            try:
                with store.snapshot() as snapshot:
                    snapshot.scan(b"", b"z", limit=50)
            except Exception as error:
                faults.append(repr(error))

    with contextlib.closing(LmdbStorage.open(tmp_path / "db", map_bytes=MIB)) as store:
        threads = [threading.Thread(target=read, args=(store,), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for n in range(8):
            store.commit({b"%d-%04d" % (n, m): bytes(300) for m in range(1500)})
        done.set()
        for thread in threads:
            thread.join()
        assert faults == []
        assert store.info().records == 12_000


# ---------------------------------------------------------------- limits that are named


@pytest.mark.parametrize("limit", [MIB, MIB + 1000, 2 * MIB - 4096])
def test_a_limit_of_file_sizes_is_called_that(tmp_path: Path, limit: int) -> None:
    code = """
        import os, resource, sys
        from entidb.errors import StorageFullError
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        store.commit({b"a": b"1"})
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
        for batch in ({b"%d" % n: os.urandom(3000) for n in range(1000)}, {b"b": bytes(4 << 20)}):
            try:
                store.commit(batch)
            except StorageFullError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.commit({b"b": b"2"})
        store.close()
    """
    said = run_python(code, str(tmp_path / "db"), str(limit)).splitlines()
    assert len(said) == 2
    for line in said:
        assert f"may have {limit} bytes (ulimit -f, RLIMIT_FSIZE)" in line
        assert "nothing was changed" in line
        assert "mdb" not in line and "nput/output" not in line
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        assert read_all(store) == {b"a": b"1", b"b": b"2"}


@pytest.mark.parametrize(
    ("code", "full", "says"),
    [
        (errno.ENOSPC, True, "disk is full"),
        (errno.EDQUOT, True, "quota"),
        (errno.EFBIG, True, "larger"),
        (errno.EIO, False, "input/output error"),
        (errno.EROFS, False, "read-only"),
        (errno.EMFILE, False, "ulimit -n"),
        (errno.ENOMEM, False, "ulimit -v"),
        (errno.EXDEV, False, "cross-device"),
    ],
)
def test_what_the_system_says_is_said_with_what_to_do(code: int, full: bool, says: str) -> None:
    error = disk_error(code, "writing /db")
    assert isinstance(error, StorageFullError) == full
    assert str(error).startswith("writing /db: ") and says in str(error)


def test_a_write_that_stopped_for_no_known_reason_is_found_out_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "input/output" in str(short_write_error(str(tmp_path), 0, "writing"))

    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("entidb.storage.disk_errors.os.fsync", full)
    assert "quota" in str(short_write_error(str(tmp_path), 0, "writing"))
    assert os.listdir(tmp_path) == []


def test_too_many_open_files_are_called_that(tmp_path: Path) -> None:
    code = """
        import os, resource, sys
        from entidb.errors import StorageError
        from entidb.storage import LmdbStorage
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        stores = []
        try:
            for n in range(100):
                stores.append(LmdbStorage.open(os.path.join(sys.argv[1], str(n))))
        except StorageError as error:
            print(error)
        stores.pop().close()
        stores[0].commit({b"a": b"1"})
    """
    assert "ulimit -n" in run_python(code, str(tmp_path))


def test_an_error_of_opening_names_no_library(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "lock.mdb").mkdir()
    with pytest.raises(StorageError) as raised:
        LmdbStorage.open(tmp_path / "db")
    assert "mdb_" not in str(raised.value) and "Errno" not in str(raised.value)
