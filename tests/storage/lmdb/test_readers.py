"""LMDB's table of readers on a disk that is full: what is written through memory has its room."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import closing
from pathlib import Path

import pytest

from entidb.errors import StorageFullError
from entidb.storage.lmdb import LmdbStorage
from entidb.storage.lmdb.readers import LMDB_LOCK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files that keep some pages only")


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_every_page_of_the_table_of_readers_is_had_before_it_is_mapped(tmp_path: Path) -> None:
    with closing(LmdbStorage.open(tmp_path / "db")):
        table = tmp_path / "db" / LMDB_LOCK
        assert allocated(table) >= table.stat().st_size == 64 * 514


def test_a_table_of_which_only_some_pages_were_kept_gets_the_others(tmp_path: Path) -> None:
    LmdbStorage.open(tmp_path / "db").close()
    table = tmp_path / "db" / LMDB_LOCK
    size = table.stat().st_size
    os.truncate(table, 0)
    os.truncate(table, size)
    assert allocated(table) < size
    with closing(LmdbStorage.open(tmp_path / "db")):
        assert allocated(table) >= table.stat().st_size == size


def test_a_disk_without_room_for_the_table_is_said_to_be_full_and_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a SIGBUS: LMDB wrote through memory where the disk had no page."""
    LmdbStorage.open(tmp_path / "db").close()
    table = tmp_path / "db" / LMDB_LOCK
    table.unlink()
    really = os.write

    def full(descriptor: int, data: object) -> int:
        if table.exists() and os.path.samestat(os.fstat(descriptor), table.stat()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(descriptor, data)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageFullError, match="the disk is full; free space"):
        LmdbStorage.open(tmp_path / "db")
    assert not table.exists()
    monkeypatch.undo()
    LmdbStorage.open(tmp_path / "db").close()


@pytest.mark.parametrize("kept", [0, 4096])
def test_on_a_full_disk_a_table_does_that_has_its_first_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    LmdbStorage.open(tmp_path / "db").close()
    table = tmp_path / "db" / LMDB_LOCK
    size = table.stat().st_size
    os.truncate(table, kept)
    os.truncate(table, size)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    if kept:
        LmdbStorage.open(tmp_path / "db").close()
        return
    with pytest.raises(StorageFullError, match="the disk is full; free space"):
        LmdbStorage.open(tmp_path / "db")


def test_what_a_file_system_cannot_reserve_is_no_reason_not_to_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LmdbStorage.open(tmp_path / "db").close()
    table = tmp_path / "db" / LMDB_LOCK
    size = table.stat().st_size
    os.truncate(table, 0)
    os.truncate(table, size)

    def unable(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unable)
    LmdbStorage.open(tmp_path / "db").close()
