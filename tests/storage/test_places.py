"""Places where a store cannot be, and room that is missing while it is copied: said, no harm."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import entidb.server
from entidb.errors import FormatError, StorageError
from entidb.storage import LmdbStorage
from entidb.testing.contracts import read_all
from tests.storage.lmdb.test_lmdb_traps import small_disk


def test_a_place_where_nothing_can_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FormatError):
        LmdbStorage.open(tmp_path / "file" / "db")
    with pytest.raises(StorageError):
        LmdbStorage.open("/proc/self/db")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_backup_into_a_directory_that_is_missing_is_an_error_and_the_store_goes_on(
    tmp_path: Path,
) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"a": b"1"})
        with pytest.raises(StorageError):
            store.backup(str(tmp_path / "missing" / "backup"))
        with pytest.raises(StorageError, match="exists"):
            store.backup(str(tmp_path))
        store.commit({b"b": b"2"})
        assert read_all(store) == {b"a": b"1", b"b": b"2"}
    assert sorted(os.listdir(tmp_path)) == ["db"]


def test_compacting_without_room_for_the_copy_changes_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "3m"):
        with contextlib.closing(LmdbStorage.open(disk / "db")) as store:
            content = {b"%03d" % n: os.urandom(3000) for n in range(500)}
            store.commit(content)
            with pytest.raises(StorageError):
                store.compact()
            assert read_all(store) == content
            assert sorted(os.listdir(disk / "db"))[0] == "data.mdb"
            store.commit({b"000": None})
            assert list(store.verify()) == []
        with contextlib.closing(LmdbStorage.open(disk / "db")) as store:
            assert len(read_all(store)) == 499


@pytest.mark.parametrize("key", [b"", b"k" * 512])
def test_a_key_that_cannot_be_stored_says_what_keys_are(tmp_path: Path, key: bytes) -> None:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        with pytest.raises(StorageError, match="keys have 1 to 511 bytes"):
            store.commit({b"a": b"1", key: b"2"})
        assert read_all(store) == {}


def test_closing_twice_and_reading_afterwards_are_told_apart(tmp_path: Path) -> None:
    store = LmdbStorage.open(tmp_path / "db")
    store.close()
    store.close()
    for use in (store.compact, lambda: store.commit({b"a": b"1"}), store.snapshot):
        with pytest.raises(Exception, match="closed"):
            use()


def test_the_server_package_lists_its_names_and_refuses_others() -> None:
    assert {"SyncServer", "ServerConfig", "serve"} <= set(dir(entidb.server))
    with pytest.raises(AttributeError, match="no_such_thing"):
        entidb.server.no_such_thing  # noqa: B018


_CLOSED_STREAMS = """
import json, os, sys
from entidb.storage import LmdbStorage
before = [LmdbStorage.open(sys.argv[1] + "/a")]
for number in map(int, sys.argv[3:]):
    os.close(number)
stores = [LmdbStorage.open(f"{sys.argv[1]}/{name}") for name in "bc"]
low = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
for number in range(3):  # what an extension, or the C library, prints when all is lost
    try:
        os.write(number, b"x" * 5000)
    except OSError:
        pass  # of what was open for reading alone
null = os.open(os.devnull, os.O_RDWR)
for number in range(3):  # what a program does that becomes a daemon late
    os.dup2(null, number)
for each in (*before, *stores):
    each.commit({b"k": b"2"})
found = [[list(each.verify()), each.snapshot().get(b"k") == b"2"] for each in (*before, *stores)]
for each in (*before, *stores):
    each.close()
with open(sys.argv[2], "w") as file:
    json.dump([low, found], file)
"""


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("closed", ["2", "1", "0", "1 2", "0 2", "0 1 2"])
def test_no_file_of_a_store_gets_the_number_of_a_standard_stream(
    tmp_path: Path, closed: str
) -> None:
    """Whatever was printed by a program with a closed standard stream went into the data file, or
    the file went out of the store's hands when the program gave the stream a place again."""
    for name in "abc":
        with contextlib.closing(LmdbStorage.open(tmp_path / name)) as store:
            store.commit({b"k": b"1"})
    said = tmp_path / "said"
    words = [sys.executable, "-c", _CLOSED_STREAMS, str(tmp_path), str(said), *closed.split()]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    low, found = json.loads(said.read_text())
    assert not any(str(tmp_path) in each for each in low), low
    assert found == [[[], True]] * 3
    for name in "abc":
        with contextlib.closing(LmdbStorage.open(tmp_path / name)) as store:
            assert read_all(store) == {b"k": b"2"} and list(store.verify()) == []
