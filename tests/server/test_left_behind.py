"""What a process leaves behind that is killed in the middle of a backup, a restore, a verification
or a copy: the next one finds the databases as they were before, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.server import ServerConfig, SyncServer
from entidb.server.admin import backups
from entidb.server.admin.opening import office_of
from entidb.server.admin.tasks import Task
from entidb.server.place import TakesIn
from entidb.storage.opening import open_shelf
from tests.server.test_backups import ROOT
from tests.storage.postgres_cluster import Cluster
from tests.storage.test_postgres_sharing import own_database

pytestmark = pytest.mark.process

#: Far above what a busy machine takes: each of these starts processes of its own.
WAIT_S = 300.0
#: Does what is asked in a server, and is killed when it comes to ``at``.
_KILLED = """
import importlib, json, os, signal, sys
from entidb.db import copy_database
from entidb.server import ServerConfig, SyncServer
from entidb.server.admin import backups, care
from entidb.server.admin.callers import Caller
from entidb.server.admin.opening import office_of

given = json.loads(sys.argv[1])
module, _, path = given["at"].partition(":")
owner, names = importlib.import_module(module), path.split(".")
for name in names[:-1]:
    owner = getattr(owner, name)
setattr(owner, names[-1], lambda *a, **b: os.kill(os.getpid(), signal.SIGKILL))
root = Caller("root", "test")
if given["do"] == "copy":
    copy_database(given["source"], given["config"]["data_dir"] + "#copied")
server = SyncServer(ServerConfig(**given["config"]))
office = office_of(server)
task = {
    "backup": lambda: backups.backup(office, root, "shop"),
    "restore": lambda: backups.restore(office, root, "shop", given["backup"], "shop"),
    "remove": lambda: backups.remove(
        backups._folder(office, "shop"), given["backup"]
    ),
    "verify": lambda: care.verify(office, root, "shop"),
}[given["do"]]()
print(office.tasks.wait(task.id, 300))
"""

FILES = [
    ("backup", "entidb.server.admin.backups:check"),
    ("backup", "entidb.server.admin.backups:_about"),
    ("backup", "entidb.storage.partial:Partial.finish"),
    ("restore", "entidb.server.admin.backups:check"),
    ("restore", "entidb.storage.partial:Partial.finish"),
    ("verify", "entidb.server.admin.care:check"),
]
POSTGRES = [
    ("restore", "entidb.storage.postgres.arriving:Arriving.finish"),
    ("restore", "entidb.storage.postgres.shelf:Shelf.replace"),
    ("verify", "entidb.server.admin.care:check"),
    ("copy", "entidb.storage.postgres.arriving:Arriving.finish"),
]


class Site:
    """A server's place with one database and one backup of it."""

    def __init__(self, root: Path, data_dir: str) -> None:
        self.backups, self.temporary = root / "backups", root / "temporary"
        self.temporary.mkdir()
        self.given = {
            "data_dir": data_dir,
            "insecure_no_auth": True,
            "backup_dir": str(self.backups),
        }
        self.config = ServerConfig(**self.given)  # type: ignore[arg-type]
        self.key = uuid.uuid4()
        with SyncServer(self.config) as server:
            server.database("shop").collection("notes")[self.key] = {"v": "before"}
            self.backup = str(self.done(server, backups.backup).result["backup"])
            server.database("shop").collection("notes")[self.key] = {"v": "after"}

    def done(self, server: SyncServer, ask: Any, *more: str) -> Task:
        office = office_of(server)
        found = office.tasks.wait(ask(office, ROOT, "shop", *more).id, WAIT_S)
        assert found is not None and found.state == "done", found
        return found

    def value(self, server: SyncServer) -> Any:
        with server.stores.using("shop", create=False) as store:
            return store.database.collection("notes")[self.key]["v"]

    def killed(self, do: str, at: str, **more: str) -> None:
        asked = {"do": do, "at": at, "config": self.given, "backup": self.backup, **more}
        process = subprocess.run(
            [sys.executable, "-c", _KILLED, json.dumps(asked)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            timeout=WAIT_S,
        )
        assert process.returncode == -signal.SIGKILL, (process.stdout, process.stderr)

    def is_as_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(self.temporary))
        with SyncServer(self.config) as server:
            office_of(server)
            assert server.place.names() == ["shop"]
            assert self.value(server) == "after"
            server.housekeep()
            assert server.place.aside() == []
            assert list(self.temporary.iterdir()) == []
            assert sorted(path.name for path in (self.backups / "shop.entidb").iterdir()) == [
                self.backup,
                f"{self.backup}.json",
            ]
            # And all goes on.
            newer = self.done(server, backups.backup).result["backup"]
            self.done(server, backups.restore, str(newer), "shop")
            assert self.value(server) == "after"


@pytest.mark.parametrize(("do", "at"), FILES)
def test_on_files_a_killed_operation_leaves_nothing(
    do: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, str(tmp_path / "data"))
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    site.killed(do, at)
    site_now = sorted(path.name for path in (tmp_path / "data").iterdir())
    left = set(site_now) - set(before) - {"entidb-server.lock"}
    assert left or do == "backup", "it was killed in the middle"
    with SyncServer(site.config):
        there = {path.name for path in (tmp_path / "data").iterdir()}
    assert there - set(before) <= {"entidb-deleted", "entidb-server.lock"}
    site.is_as_before(monkeypatch)


def test_a_backup_that_was_killed_after_it_was_verified_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, str(tmp_path / "data"))
    site.killed("backup", "entidb.server.admin.backups:_publish")
    with SyncServer(site.config) as server:
        office = office_of(server)
        assert len(backups.rows(office, ROOT)) == 1
        server.housekeep()
        newest, _ = backups.rows(office, ROOT)
    folder = site.backups / "shop.entidb"
    assert sorted(each.name for each in folder.iterdir()) == sorted(
        [site.backup, f"{site.backup}.json", newest.id, f"{newest.id}.json"]
    )
    with Database.open(folder / newest.id, read_only=True) as copy:
        assert copy.collection("notes")[site.key] == {"v": "after"}


def test_a_backup_that_was_being_removed_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, str(tmp_path / "data"))
    site.killed("remove", "pathlib:Path.unlink")
    folder = site.backups / "shop.entidb"
    assert not (folder / site.backup).exists()
    with SyncServer(site.config) as server:
        office_of(server)
        server.housekeep()
        assert list(folder.iterdir()) == []


@pytest.fixture
def address(postgres: Cluster) -> Iterator[str]:
    with own_database(postgres) as made:
        yield made


@pytest.mark.parametrize(("do", "at"), POSTGRES)
def test_on_postgresql_a_killed_operation_leaves_nothing(
    do: str, at: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, address)
    source = str(site.backups / "shop.entidb" / site.backup)
    with contextlib.closing(open_shelf(address)) as shelf:
        site.killed(do, at, source=source)
        assert len(shelf.names()) == (1 if do == "verify" else 2)
        with SyncServer(site.config) as server:
            office_of(server)
            server.housekeep()
            assert shelf.names() == ["shop"]
        site.is_as_before(monkeypatch)


def test_a_restore_that_is_under_way_is_left_alone(address: str, tmp_path: Path) -> None:
    site = Site(tmp_path, address)
    source = site.backups / "shop.entidb" / site.backup
    with SyncServer(site.config) as one, SyncServer(site.config) as other:
        place = one.place
        assert isinstance(place, TakesIn)

        def at(done: int, total: int) -> None:
            other.place.clear_left()

        with place.taken_in("shop", source, at) as take_the_place:
            other.place.clear_left()
            one.place.clear_left()
            aside = take_the_place(1)
        assert aside is not None
        assert site.value(other) == "before"
