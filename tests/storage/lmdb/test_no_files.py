"""What is no file stands where one of a database's has to be: opening says so, and never waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.errors import FormatError
from entidb.server.admin.audit import AUDIT_FILE, FileJournal
from entidb.server.records import CONTROL, FileRecords
from entidb.storage import LmdbStorage
from entidb.storage.directories import check_file, open_file
from entidb.storage.lmdb.readers import LMDB_LOCK

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")

FILES = ("data.mdb", "entidb.lock", "entidb.turn", LMDB_LOCK)
#: Looked at without being changed, a store needs no more than these.
TO_LOOK = FILES[:2]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        store.commit({b"a": b"1"})
    return tmp_path / "db"


def opened_elsewhere(path: Path, read_only: bool) -> str:
    """What another process is told, which can be ended when it waits."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from entidb.storage import LmdbStorage\n"
            "try: LmdbStorage.open(sys.argv[1], read_only=bool(int(sys.argv[2])))\n"
            "except Exception as error: print(type(error).__name__, error)",
            str(path),
            str(int(read_only)),
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("read_only", [False, True])
def test_a_named_pipe_in_place_of_a_file_is_refused_and_not_waited_for(
    store: Path, read_only: bool
) -> None:
    for name in TO_LOOK if read_only else FILES:
        copy = store.with_name(f"{name}-{read_only}")
        shutil.copytree(store, copy)
        (copy / name).unlink()
        os.mkfifo(copy / name)
        before = sorted(os.listdir(copy))
        said = opened_elsewhere(copy, read_only)
        assert said.startswith(f"FormatError {copy / name} is a named pipe"), (name, said)
        assert sorted(os.listdir(copy)) == before


@contextlib.contextmanager
def sockets() -> Iterator[tuple[Path, str]]:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{folder}/s")
        yield Path(folder, "s"), "a socket"


def test_directories_sockets_and_devices_are_named_too(store: Path) -> None:
    with sockets() as (path, words):
        places = [(path, words), (store, "a directory"), (Path(os.devnull), "a device")]
        for where, kind in places:
            with pytest.raises(FormatError, match=f"{where} is {kind}, and has to be a file"):
                os.close(open_file(where, os.O_RDWR))
            with pytest.raises(FormatError, match=kind):
                check_file(where, where.stat())


def test_a_file_is_opened_as_ever(store: Path) -> None:
    descriptor = open_file(store / "data.mdb", os.O_RDONLY)
    try:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        open_file(store / "missing", os.O_RDONLY)


def test_the_records_and_the_audit_log_of_a_server_wait_for_no_pipe(tmp_path: Path) -> None:
    records = FileRecords(tmp_path)
    os.mkfifo(records.where(CONTROL))
    with pytest.raises(FormatError, match="is a named pipe"):
        records.read("control")
    journal = FileJournal(tmp_path)
    os.mkfifo(tmp_path / AUDIT_FILE)
    assert list(journal.newest()) == []
    with pytest.raises(FormatError, match="is a named pipe"):
        journal.append([b"{}"])
