"""What an administrator makes in a service's directory can be opened by the service."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entidb.db import Database, Role
from entidb.db.replica import ImageSegment
from entidb.errors import StorageError
from entidb.server import ServerConfig, SyncServer
from entidb.server.admin import backups, databases
from entidb.server.admin.callers import Caller
from entidb.server.admin.opening import office_of
from entidb.storage.directories import give_owner, open_file, restrict
from entidb.storage.lmdb.folder import Folder
from entidb.storage.locks import FileLock
from entidb.storage.partial import Partial
from entidb.sync.segment_files import SegmentFiles
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


# ---- what root leaves behind


def everything(place: Path) -> dict[str, int]:
    return {str(each.relative_to(place)): each.stat().st_uid for each in place.rglob("*")}


@as_root
def test_what_root_leaves_when_it_is_killed_is_the_services_to_remove(
    restored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(restored.parent, SERVICE, SERVICE)
    Partial(str(restored.parent / "backup"), "backup").note("since then")  # and never ended
    monkeypatch.setattr(Folder, "remove_temporary", lambda self: None)
    compact(restored)
    monkeypatch.undo()
    found = everything(restored.parent)
    left = {name: uid for name, uid in found.items() if name.startswith(("backup", "db"))}
    assert set(left) >= {
        "db/.entidb-new",
        "backup.entidb-partial",
        "backup.entidb-partial/lock",
        "backup.entidb-partial/note",
    }
    assert set(left.values()) == {SERVICE}


@as_root
def test_what_a_server_of_root_keeps_beside_the_databases_is_the_services(tmp_path: Path) -> None:
    os.chown(tmp_path, SERVICE, SERVICE)
    config = ServerConfig(
        data_dir=tmp_path / "data", backup_dir=tmp_path / "backups", insecure_no_auth=True
    )
    with SyncServer(config) as server:
        office, root = office_of(server), Caller("root", "local")
        databases.create(office, root, "shop")
        databases.freeze(office, root, "shop")
        made = office.tasks.wait(backups.backup(office, root, "shop").id, 60)
        assert made is not None and made.state == "done"
        identity = str(made.result["backup"])
        done_again = office.tasks.wait(
            backups.restore(office, root, "shop", identity, "shop").id, 60
        )
        assert done_again is not None and done_again.state == "done"
    found = everything(tmp_path)
    assert {name for name in found if name.endswith((".json", ".log"))} >= {
        "data/entidb-control.json",
        "data/entidb-audit.log",
    }
    assert set(found.values()) == {SERVICE}


@as_root
def test_what_root_restores_belongs_to_the_server_whoever_made_the_backup(tmp_path: Path) -> None:
    with Database.open(tmp_path / "first", role=Role.SERVER) as database:
        database.backup(tmp_path / "backup")
    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", SERVICE, SERVICE)
    done("restore", str(tmp_path / "backup"), str(tmp_path / "data"), "shop")
    assert set(everything(tmp_path / "data").values()) == {SERVICE}


@as_root
def test_a_secret_that_root_makes_for_a_service_can_be_read_by_it(tmp_path: Path) -> None:
    os.chown(tmp_path, SERVICE, SERVICE)
    done("secret", "--out", str(tmp_path / "secret"))
    words = ["token", "--secret-file", str(tmp_path / "secret"), "--database", "shop"]
    words += ["--subject", "ada"]
    for _ in range(2):  # the second replaces the first
        done(*words, "--out", str(tmp_path / "token"))
        assert everything(tmp_path) == dict.fromkeys(("secret", "token"), SERVICE)
        os.chown(tmp_path, 0, 0)
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o600}


@as_root
def test_a_file_that_root_writes_for_a_service_is_the_services(
    restored: Path, tmp_path: Path
) -> None:
    os.chown(tmp_path, SERVICE, SERVICE)
    with Database.open(tmp_path / "shop", role=Role.SERVER) as database:
        database.collection("notes").add({"n": 1})
    done("snapshot", str(tmp_path / "shop"), str(tmp_path / "snapshot"))
    done("export", str(restored), "notes", "--output", str(tmp_path / "rows"))
    assert {(tmp_path / name).stat().st_uid for name in ("snapshot", "rows")} == {SERVICE}


def test_a_file_that_may_not_be_opened_is_named(
    restored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a lock file that root has made with an older EntiDB."""

    def refuse(path: str, *rest: object) -> int:
        if path.endswith("entidb.lock"):
            raise PermissionError(13, "Permission denied", path)
        return open_file(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("entidb.storage.directories.open_file", refuse)
    with pytest.raises(StorageError, match=r"opening .*/db \(.*/db/entidb\.lock\): no permission"):
        Database.open(restored)


@as_root
def test_segments_that_root_fetched_for_a_service_can_be_gone_on_with(restored: Path) -> None:
    segment = ImageSegment(bytes(32), "notes", 8, 1, bytes(16), bytes(16))
    SegmentFiles(str(restored)).append(segment, 0, b"half")
    assert set(everything(restored).values()) == {SERVICE}
    assert SegmentFiles(str(restored)).size(segment) == 4


def test_what_cannot_be_removed_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database.open(tmp_path / "db") as database:
        (tmp_path / "db" / ".entidb-new").write_text("of somebody else")
        with pytest.raises(StorageError, match=r"db/\.entidb-new is in the way.*[Rr]emove it"):
            database.compact()
        database.collection("notes").add({"n": 1})
        (tmp_path / "copy.entidb-partial").mkdir()

        def refuse(path: str, *like: os.stat_result) -> FileLock:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(FileLock, "take", refuse)
        monkeypatch.setattr(FileLock, "silently", refuse)
        monkeypatch.setattr(os, "rmdir", refuse_to_remove)
        with pytest.raises(StorageError, match=r"copy\.entidb-partial is in the way.*[Rr]emove it"):
            database.backup(tmp_path / "copy")
        monkeypatch.undo()


def refuse_to_remove(path: str) -> None:
    raise PermissionError(13, "Permission denied", path)
