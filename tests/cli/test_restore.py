"""``entidb restore``: a backup in the place of a database of a server that does not run."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database, Role
from entidb.server import ServerConfig, SyncServer
from entidb.server.admin.checking import check
from entidb.storage import directories
from tests.cli.support import document, done, entidb, failed

pytestmark = pytest.mark.slow


def config(place: Path) -> ServerConfig:
    return ServerConfig(data_dir=place / "data", insecure_no_auth=True)


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """A backup with one entity, of a database that has two by now."""
    with SyncServer(config(tmp_path)) as server:
        notes = server.database("shop").collection("notes")
        notes[uuid.uuid4()] = {"n": 1}
        server.database("shop").backup(tmp_path / "backup")
        notes[uuid.uuid4()] = {"n": 2}
    return tmp_path / "backup"


def count(place: Path, name: str = "shop") -> int:
    with SyncServer(config(place)) as server:
        return len(server.database(name).collection("notes"))


def history(place: Path) -> bytes | None:
    with SyncServer(config(place)) as server:
        return server.database("shop").history


def test_the_backup_takes_the_place_and_the_server_begins_a_history(tmp_path: Path, backup: Path):
    before = history(tmp_path)
    said = done("restore", backup, tmp_path / "data", "shop")
    assert "1 entity" in said
    assert count(tmp_path) == 1
    assert history(tmp_path) != before
    assert backup.is_dir()
    (aside,) = (tmp_path / "data" / "entidb-deleted").iterdir()
    assert aside.name.startswith("shop.entidb.")
    assert (aside / "data.mdb").exists()


def test_a_database_that_is_not_there_is_made_of_a_backup(tmp_path: Path, backup: Path):
    found = document(done("restore", backup, tmp_path / "data", "Other", "--json"))
    assert (found["name"], found["entities"], found["aside"]) == ("Other", 1, None)
    assert count(tmp_path, "Other") == 1


def test_a_copy_made_in_another_way_begins_a_history_too(tmp_path: Path, backup: Path):
    before = history(tmp_path)
    (tmp_path / "data" / "shop.entidb").rename(tmp_path / "copied")
    done("restore", tmp_path / "copied", tmp_path / "data", "shop")
    assert count(tmp_path) == 2
    assert history(tmp_path) != before


def test_a_running_server_keeps_its_databases(tmp_path: Path, backup: Path):
    with SyncServer(config(tmp_path)):
        result = entidb("restore", backup, tmp_path / "data", "shop")
        assert "entidb admin restore" in failed(result, 8, "database_locked")
    assert count(tmp_path) == 2


def test_what_is_no_good_backup_replaces_nothing(tmp_path: Path, backup: Path):
    data = tmp_path / "data"
    failed(entidb("restore", tmp_path / "gone", data, "shop"), 3, "no_database")
    failed(entidb("restore", backup, data, "../shop"), 2, "invalid_name")
    with Database.open(tmp_path / "device", role=Role.DEVICE) as database:
        database.collection("notes")[uuid.uuid4()] = {"n": 1}
    failed(entidb("restore", tmp_path / "device", data, "shop"), 2, "usage")
    file = backup / "data.mdb"
    file.chmod(0o600)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"notes", b"nodes"))
    result = entidb("restore", backup, data, "shop")
    assert result.exit_code == 7, result.output
    assert count(tmp_path) == 2
    assert not [path for path in data.iterdir() if "partial" in path.name]


@pytest.mark.skipif(os.name != "posix", reason="POSIX")
@pytest.mark.parametrize("at", range(8))
def test_a_restore_that_the_disk_stops_leaves_the_database_in_its_place(
    tmp_path: Path, backup: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    """Each rename and each fsync of a directory that comes after the copy is checked."""
    steps = Steps(at)
    monkeypatch.setattr(os, "replace", steps.failing(os.replace))
    monkeypatch.setattr(os, "rename", steps.failing(os.rename))
    monkeypatch.setattr(directories, "sync_directory", steps.failing(directories.sync_directory))
    monkeypatch.setattr("entidb.server.admin.checking.check", steps.after(check))
    result = entidb("restore", backup, tmp_path / "data", "shop")
    monkeypatch.undo()
    if steps.count <= at:
        assert result.exit_code == 0, result.output
        return
    assert failed(result, 7, "storage_full").startswith(
        "error[storage_full]: restoring shop: the disk is full"
    )
    assert count(tmp_path) == 2
    assert not list((tmp_path / "data").glob("entidb-deleted/*"))
    done("restore", backup, tmp_path / "data", "shop")
    assert count(tmp_path) == 1


class Steps:
    """The step number ``at`` after the copy was checked finds the disk full, once."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = -1

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = function(*args)
            self.count = 0
            return found

        return call

    def failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if self.count >= 0:
                self.count += 1
                if self.count == self.at + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **named)

        return call


def test_a_backup_that_is_not_there_is_not_to_be_made(tmp_path: Path, backup: Path):
    said = failed(
        entidb("restore", tmp_path / "nosuch", tmp_path / "data", "shop"), 3, "no_database"
    )
    assert "there is no backup at" in said
    assert "init" not in said


def test_where_databases_are_below_one_of_them_is_to_be_named(tmp_path: Path, backup: Path):
    done("restore", backup, tmp_path / "data", "shop")
    for words in (
        ("snapshot", tmp_path / "data", tmp_path / "s.tar"),
        ("inspect", tmp_path / "data"),
    ):
        said = failed(entidb(*words), 7, "not_a_database")
        assert str(tmp_path / "data" / "shop.entidb") in said
