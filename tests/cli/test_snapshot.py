"""``entidb snapshot``: a server's database in one file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entidb import packing
from entidb.cli.exits import Exit
from entidb.db import Database, Role
from entidb.db.verifying import verify
from entidb.errors import StorageFullError
from entidb.protocol import decode_segment, segment_rows
from entidb.protocol.archives import Archive
from entidb.server import ServerConfig, SyncServer, serving
from entidb.storage import LmdbStorage
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine
from entidb.sync.beginning import begin_from
from tests.cli.support import document, done, entidb, failed


@pytest.fixture
def server(tmp_path: Path) -> Path:
    path = tmp_path / "shop.entidb"
    with Database.open(path, role=Role.SERVER) as database:
        with database.transaction() as tx:
            for number in range(300):
                tx.collection("notes")[uuid.UUID(int=number)] = {"number": number}
            tx.collection("lists")[uuid.UUID(int=1)] = ["a"]
        with database.transaction() as tx:
            del tx.collection("notes")[uuid.UUID(int=7)]
    return path


def test_a_snapshot_holds_every_entity_of_the_database(server: Path, tmp_path: Path):
    target = tmp_path / "shop.snapshot"
    said = done("snapshot", server, target)
    assert said.startswith(f"wrote 300 entities as of commit 2 to {target} (")
    found: dict[tuple[str, bytes], bytes | None] = {}
    with target.open("rb") as file, Database.open(server, read_only=True) as database:
        archive = Archive(file)
        assert archive.manifest.history == database.history
        assert archive.manifest.head == 2
        for segment in archive.manifest.segments:
            header, columns = decode_segment(archive.segment(segment))
            rows = segment_rows(columns)
            found.update(
                {
                    (header.collection, entity_id): payload
                    for entity_id, payload in zip(rows.ids, rows.payloads, strict=True)
                }
            )
        there = {
            (name, entity_id): payload
            for name in ("notes", "lists")
            for entity_id, payload in database.collection(name).payloads()
        }
    assert found == there
    assert os.listdir(tmp_path) == sorted(os.listdir(tmp_path))
    assert not list(tmp_path.glob("*partial*"))


def test_the_same_commit_makes_the_same_segments(server: Path, tmp_path: Path):
    first = document(done("snapshot", server, tmp_path / "1", "--json"))
    second = document(done("snapshot", server, tmp_path / "2", "--json"))
    assert (first["head"], first["entities"], first["bytes"]) == (2, 300, second["bytes"])
    with (tmp_path / "1").open("rb") as one, (tmp_path / "2").open("rb") as two:
        assert Archive(one).manifest.segments == Archive(two).manifest.segments


def test_a_snapshot_never_writes_over_anything(server: Path, tmp_path: Path):
    (tmp_path / "there").write_text("mine")
    failed(entidb("snapshot", server, tmp_path / "there"), Exit.USAGE, "exists")
    assert (tmp_path / "there").read_text() == "mine"


def test_a_device_has_no_snapshot(tmp_path: Path):
    with Database.open(tmp_path / "device") as database:
        database.collection("notes").add(1)
    said = failed(entidb("snapshot", tmp_path / "device", tmp_path / "file"), Exit.USAGE, "usage")
    assert "is a device" in said
    assert not (tmp_path / "file").exists()


def test_a_place_that_cannot_be_written_is_said(server: Path, tmp_path: Path):
    result = entidb("snapshot", server, tmp_path / "missing" / "file")
    said = failed(result, Exit.STORAGE, "storage_error")
    assert f"writing {tmp_path / 'missing' / 'file'}: " in said
    assert "partial" not in said


def test_a_snapshot_removes_what_a_killed_one_left(server: Path, tmp_path: Path):
    dead = tmp_path / "old.tar.entidb-partial"
    (dead / "segments").mkdir(parents=True)
    done("snapshot", server, tmp_path / "new.tar")
    assert not dead.exists()


def test_a_device_begins_with_a_snapshot_and_syncs_the_rest(server: Path, tmp_path: Path):
    target = tmp_path / "shop.snapshot"
    done("snapshot", server, target)
    with Database.open(server, role=Role.SERVER) as database:
        database.collection("notes")[uuid.UUID(int=9)] = {"number": "later"}
    said = done("init", tmp_path / "device", "--from", target)
    begun = tmp_path / "device"
    assert said == f"{begun} begins with 300 entities as of commit 2; sync it for the rest\n"
    with Database.open(begun) as device:
        assert verify(device) == []
        assert len(device.collection("notes")) == 299
        assert uuid.UUID(int=7) not in device.collection("notes")
        with SyncServer(_OPEN, open_database=_opens(server)) as real:
            transport = HttpTransport("http://localhost", client=LoopbackClient(real))
            with SyncEngine(SyncConfig(db_id="shop"), transport, device) as engine:
                result = engine.sync()
        assert (result.pulled, result.reset) == (1, False)
        assert device.collection("notes")[uuid.UUID(int=9)] == {"number": "later"}
    again = failed(entidb("init", begun, "--from", target), Exit.USAGE, "exists")
    assert "cannot begin with a snapshot" in again


_OPEN = ServerConfig(data_dir=None, insecure_no_auth=True)


def _opens(path: Path) -> Callable[[str, bool], Database]:
    return lambda db_id, create: Database.open(path, role=Role.SERVER)


def test_what_was_written_before_a_snapshot_is_pending_on_top(server: Path, tmp_path: Path):
    target = tmp_path / "shop.snapshot"
    done("snapshot", server, target)
    with Database.open(tmp_path / "device") as device, target.open("rb") as file:
        device.collection("notes")[uuid.UUID(int=5)] = {"number": "mine"}
        begun = begin_from(device, file, default_policy="client_wins", prove="all")
        assert (begun.manifest.entities, begun.report.withdrawn) == (300, [])
        assert device.collection("notes")[uuid.UUID(int=5)] == {"number": "mine"}
        assert device.collection("notes").info(uuid.UUID(int=5)).pending
        assert device.collection("notes")[uuid.UUID(int=6)] == {"number": 6}
        assert verify(device) == []


@pytest.mark.parametrize("again", [True, False], ids=["full", "broken"])
def test_what_a_disk_says_while_a_device_begins_is_not_hidden_by_what_follows_it(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
):
    """A store that was closed by its error said of itself that it was closed, and no more."""
    target = tmp_path / "shop.snapshot"
    done("snapshot", server, target)
    with Database.open(tmp_path / "device") as device, target.open("rb") as file:
        device.collection("notes")[uuid.UUID(int=5)] = {"number": "mine"}
        store = device.storage
        assert isinstance(store, LmdbStorage)
        commit = store.commit
        commits: list[int] = []

        def failing(*given: Any, **options: Any) -> int:
            commits.append(1)
            if len(commits) < 3:
                return commit(*given, **options)
            if not again:
                store.close()
            raise StorageFullError("the disk is full")

        monkeypatch.setattr(LmdbStorage, "commit", lambda self, *a, **o: failing(*a, **o))
        with pytest.raises(StorageFullError, match="the disk is full"):
            begin_from(device, file)
        monkeypatch.undo()
    with Database.open(tmp_path / "device") as device, target.open("rb") as file:
        begin_from(device, file, default_policy="client_wins")
        assert len(device.collection("notes")) == 299
        assert device.collection("notes")[uuid.UUID(int=5)] == {"number": "mine"}
        assert verify(device) == []


def _with_a_change_of_its_own(path: Path) -> None:
    with Database.open(path) as device:
        device.collection("notes")[uuid.UUID(int=5)] = {"number": 5, "mine": True}


def _note(path: Path) -> object:
    with Database.open(path, create=False) as device:
        return device.collection("notes")[uuid.UUID(int=5)]


def test_what_a_snapshot_takes_the_place_of_is_said(server: Path, tmp_path: Path):
    target, path = tmp_path / "shop.snapshot", tmp_path / "device"
    done("snapshot", server, target)
    _with_a_change_of_its_own(path)
    said = done("init", path, "--from", target)
    assert "withdrawn" in said
    assert "entidb discarded" in said
    assert _note(path) == {"number": 5}
    [entry] = document(done("discarded", path, "--json"))["operations"]
    assert entry["value"] == {"number": 5, "mine": True}


def test_the_policy_of_the_program_decides_where_a_snapshot_meets_changes(
    server: Path, tmp_path: Path
):
    target = tmp_path / "shop.snapshot"
    done("snapshot", server, target)
    kept, held = tmp_path / "kept", tmp_path / "held"
    for path in (kept, held):
        _with_a_change_of_its_own(path)
    said = document(done("init", kept, "--from", target, "--policy", "client_wins", "--json"))
    assert (said["withdrawn"], said["unresolved"], said["overruled"]) == ([], [], 1)
    assert _note(kept) == {"number": 5, "mine": True}
    assert "1 conflict held" in done("init", held, "--from", target, "--policy", "notes=manual")
    assert _note(held) == {"number": 5, "mine": True}
    new = tmp_path / "new"
    alone = failed(entidb("init", new, "--policy", "merge"), Exit.USAGE, "usage")
    assert "--from" in alone
    none = entidb("init", new, "--from", target, "--policy", "nonsense")
    assert "'nonsense'" in failed(none, Exit.USAGE, "invalid_config")
    assert not new.exists()


def test_a_damaged_snapshot_leaves_a_database_that_was_there_as_it_was(
    server: Path, tmp_path: Path
):
    target, path = tmp_path / "shop.snapshot", tmp_path / "device"
    done("snapshot", server, target)
    target.write_bytes(target.read_bytes()[:2000])
    _with_a_change_of_its_own(path)
    said = failed(entidb("init", path, "--from", target), Exit.USAGE, "usage")
    assert f"The database in {path} is as it was" in said
    assert _note(path) == {"number": 5, "mine": True}


def test_a_device_of_a_snapshot_that_meets_another_database_is_told_so(
    server: Path, tmp_path: Path
):
    target, path = tmp_path / "shop.snapshot", tmp_path / "device"
    done("snapshot", server, target)
    done("init", path, "--from", target)
    (tmp_path / "servers").mkdir()
    with serving(ServerConfig(data_dir=tmp_path / "servers", insecure_no_auth=True)) as url:
        missing = failed(entidb("sync", path, url, "--db", "cafe"), Exit.HISTORY, "history_changed")
        assert "no database 'cafe'" in missing
        assert "`entidb reset --keep device`" in missing
        with Database.in_memory() as other:
            other.collection("notes").add({"number": 1})
            with SyncEngine(SyncConfig(db_id="cafe"), url, other) as engine:
                engine.sync()
        said = failed(entidb("sync", path, url, "--db", "cafe"), Exit.HISTORY, "other_snapshot")
        assert "'cafe'" in said
    with Database.open(path, create=False) as device:
        assert len(device.collection("notes")) == 299


def test_a_file_that_is_no_snapshot_leaves_an_empty_database(server: Path, tmp_path: Path):
    target = tmp_path / "shop.snapshot"
    done("snapshot", server, target)
    data = target.read_bytes()
    cut = data[: data.index(b"EntiDB-segment") + 40]
    for number, bad in enumerate((b"", b"x" * 2000, cut, cut + bytes(len(data) - len(cut)))):
        target.write_bytes(bad)
        path = tmp_path / f"device{number}"
        said = failed(entidb("init", path, "--from", target), Exit.USAGE, "usage")
        assert str(target) in said
        with Database.open(path) as device:
            assert verify(device) == []
            assert not any(map(len, map(device.collection, device.collections())))
            assert device.read_head().sequence == 0
    target.write_bytes(data)
    done("init", tmp_path / "device3", "--from", target)


@pytest.mark.skipif("zstd" not in packing.ENCODINGS, reason="needs the extra zstd")
def test_a_snapshot_that_this_program_cannot_unpack_says_what_is_missing(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "shop.snapshot"
    done("snapshot", server, target)
    monkeypatch.setattr(packing, "ENCODINGS", ("gzip",))
    said = failed(entidb("init", tmp_path / "device", "--from", target), Exit.USAGE, "usage")
    assert 'pip install "entidb[zstd]"' in said and "is empty" in said
    assert "anew" not in said  # there is nothing wrong with the file
    monkeypatch.undo()
    done("init", tmp_path / "device", "--from", target)


def test_a_snapshot_that_is_not_there_is_said(tmp_path: Path):
    result = entidb("init", tmp_path / "device", "--from", tmp_path / "missing")
    assert "missing" in failed(result, Exit.NOT_FOUND, "no_file")
    assert not (tmp_path / "device").exists()
    result = entidb("init", tmp_path / "device", "--from", tmp_path)
    assert "is a directory" in failed(result, Exit.USAGE, "usage")
    assert not (tmp_path / "device").exists()


@pytest.mark.parametrize("words", [("copy", "{tmp}/none", "{tmp}/new"), ("renew", "{tmp}/none")])
def test_a_database_that_is_not_there_is_not_found(words: tuple[str, ...], tmp_path: Path):
    result = entidb(*(word.format(tmp=tmp_path) for word in words))
    assert f"{tmp_path}/none" in failed(result, Exit.NOT_FOUND, "no_database")
    assert list(tmp_path.iterdir()) == []
