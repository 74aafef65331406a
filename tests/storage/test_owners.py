"""What an administrator makes in a service's directory can be opened by the service."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.server import ServerConfig, SyncServer
from entidb.storage.directories import give_owner, restrict
from tests.cli.support import done

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="files have no owner that counts")
as_root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root makes files for others"
)
SERVICE = 4711


def owners(path: Path) -> dict[str, tuple[int, int]]:
    found = {".": path.stat(), **{each.name: each.stat() for each in path.iterdir()}}
    return {name: (each.st_uid, each.st_gid) for name, each in found.items()}


def give_to_service(path: Path) -> None:
    for each in (path, *path.iterdir()):
        os.chown(each, SERVICE, SERVICE)


@pytest.fixture
def restored(tmp_path: Path) -> Path:
    """A backup that was put in place for a service: one file, and the directory."""
    with Database.open(tmp_path / "first") as database:
        database.collection("notes").add({"n": 1})
        database.backup(tmp_path / "db")
    give_to_service(tmp_path / "db")
    return tmp_path / "db"


def compact(path: Path) -> None:
    with Database.open(path) as database:
        database.compact()


def read(path: Path) -> None:
    with Database.open(path) as database:
        assert len(database.collection("notes")) == 1


def write(path: Path) -> None:
    with Database.open(path) as database:
        database.collection("notes").add({"n": 2})


@as_root
@pytest.mark.parametrize("use", [compact, read, write])
def test_whatever_root_does_the_files_stay_their_owners(
    restored: Path, use: Callable[[Path], None]
) -> None:
    use(restored)
    assert set(owners(restored).values()) == {(SERVICE, SERVICE)}
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in restored.iterdir()}
    assert set(modes.values()) == {0o600}


@as_root
@pytest.mark.parametrize("command", ["inspect", "verify", "compact"])
def test_the_command_line_leaves_the_files_their_owner(restored: Path, command: str) -> None:
    done(command, str(restored))
    assert set(owners(restored).values()) == {(SERVICE, SERVICE)}


@as_root
def test_what_root_makes_in_a_services_directory_is_the_services(tmp_path: Path) -> None:
    give_to_service(tmp_path)
    Database.open(tmp_path / "some" / "db").close()
    assert set(owners(tmp_path / "some").values()) == {(SERVICE, SERVICE)}
    assert set(owners(tmp_path / "some" / "db").values()) == {(SERVICE, SERVICE)}
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with SyncServer(config) as server:
        server.database("shop")
    assert set(owners(tmp_path / "data").values()) == {(SERVICE, SERVICE)}
    assert set(owners(tmp_path / "data" / "shop.entidb").values()) == {(SERVICE, SERVICE)}


@as_root
def test_a_backup_belongs_to_whoever_has_the_original(restored: Path, tmp_path: Path) -> None:
    with Database.open(restored) as database:
        database.backup(tmp_path / "copy")
    assert owners(tmp_path / "copy") == dict.fromkeys((".", "data.mdb"), (SERVICE, SERVICE))


@as_root
def test_an_export_that_replaces_a_file_leaves_it_its_owner(restored: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"")
    os.chown(tmp_path / "old", SERVICE, SERVICE)
    for name in ("old", "new"):
        done("export", str(restored), "notes", "--output", str(tmp_path / name))
    assert (tmp_path / "old").stat().st_uid == SERVICE
    assert (tmp_path / "new").stat().st_uid == 0
    assert b'"n"' in (tmp_path / "old").read_bytes()


def test_who_may_not_give_a_file_away_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def fchown(descriptor: int, uid: int, gid: int) -> None:
        asked.append((uid, gid))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", fchown)
    with (tmp_path / "file").open("wb") as file:
        mine = os.fstat(file.fileno())
        give_owner(file.fileno(), mine)
        assert asked == []
        values = list(mine)
        values[4] = values[5] = SERVICE  # st_uid, st_gid
        give_owner(file.fileno(), os.stat_result(values))
    assert asked == [(SERVICE, SERVICE), (-1, SERVICE)]


def test_a_file_of_somebody_else_keeps_its_permissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    path.chmod(0o640)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: SERVICE)
        restrict(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    restrict(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
