"""A database, or a whole server, copied between directories and PostgreSQL; and a new history for
what was put back. Without PostgreSQL the copies between directories are tried."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from entidb.db import Database, Role, copy_database
from entidb.errors import (
    ConfigError,
    CorruptionError,
    DatabaseLockedError,
    HistoryChangedError,
    StorageError,
    StorageFullError,
)
from entidb.server import ServerConfig, SyncServer, copy_server, renew, serving
from entidb.server.records import CONTROL, FileRecords
from entidb.storage import LmdbStorage, PostgresStorage
from entidb.storage.base import Storage
from entidb.storage.postgres.arriving import Arriving, arriving
from entidb.storage.postgres.sharing import SharedTables
from entidb.storage.postgres.shelf import Shelf
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine
from tests.cli.support import TIMEOUT_S, document, done, entidb, environment, failed
from tests.storage.postgres_cluster import Cluster

WAIT_S = 60.0
NAMES = ["Till-2", "shop"]

#: Makes a place that is not there yet: of one database, or with None of a whole server.
Makes = Callable[[str | None], str]


def new_address(request: pytest.FixtureRequest) -> str:
    """Of a PostgreSQL database of the test's own."""
    cluster: Cluster = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(cluster.address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return cluster.address.replace("///postgres?", f"///{name}?")


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    return new_address(request)


@pytest.fixture(params=["files", "postgres"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Makes:
    return _places(request, tmp_path / "from")


@pytest.fixture(params=["files", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Makes:
    return _places(request, tmp_path / "to")


def _places(request: pytest.FixtureRequest, folder: Path) -> Makes:
    if request.param == "files":
        folder.mkdir()
        return lambda name: str(folder / (name or "data"))
    own = new_address(request)
    return lambda name: own if name is None else f"{own}#{name}"


def store_at(place: str) -> Storage:
    address, mark, name = place.partition("#")
    if mark:
        return PostgresStorage.open(address, name, create=False)
    return LmdbStorage.open(place, create=False)


def fill(place: str) -> dict[str, Any]:
    """A database with something of each kind; what is in it."""
    address, mark, name = place.partition("#")
    storage = PostgresStorage.open(address, name) if mark else LmdbStorage.open(place)
    with Database(storage, role=Role.SERVER) as database:
        notes = database.collection("notes")
        ids = [uuid.UUID(int=number) for number in range(300)]
        notes.put_many({each: {"n": number} for number, each in enumerate(ids)})
        database.collection("photos")[ids[0]] = b"x" * 300_000
        for each in ids[::3]:
            del notes[each]
        return {"history": database.history, "notes": dict(notes.items())}


def content(place: str) -> dict[str, Any]:
    with Database(store_at(place), role=Role.SERVER, create=False) as database:
        assert database.verify() == []
        found = dict(database.collection("notes").items())
        return {"history": database.history, "notes": found}


# ---------------------------------------------------------------- one database


def test_a_copy_is_the_same_database_with_its_history(source: Makes, target: Makes) -> None:
    filled = fill(source("shop"))
    told: list[tuple[int, int]] = []
    copied = copy_database(source("shop"), target("other"), on_progress=lambda *at: told.append(at))
    assert copied.entities == {"notes": 200, "photos": 1}
    assert told[-1] == (copied.records, told[-1][1]) and told == sorted(told)
    assert content(target("other")) == content(source("shop")) == filled
    back = copy_database(target("other"), source("again"))
    assert back.digests == copied.digests and back.records == copied.records
    assert content(source("again")) == filled


def test_a_backup_that_is_copied_stays_one(target: Makes, tmp_path: Path) -> None:
    filled = fill(str(tmp_path / "shop"))
    with Database.open(tmp_path / "shop") as database:
        database.backup(tmp_path / "backup")
    copy_database(tmp_path / "backup", target("shop"))
    assert content(target("shop"))["history"] != filled["history"]


def test_what_exists_already_is_not_touched(source: Makes, target: Makes) -> None:
    fill(source("shop"))
    fill(target("shop"))
    before = content(target("shop"))
    with pytest.raises(StorageError, match="already") as raised:
        copy_database(source("shop"), target("shop"))
    assert raised.value.code == "exists"
    assert content(target("shop")) == before


_WRITES = """
import sys
from entidb.db import Database, Role
from tests.server.test_copying import store_at
with Database(store_at(sys.argv[1]), role=Role.SERVER) as database:
    print("open", flush=True)
    for line in sys.stdin:
        database.collection("notes").add("late")
        print("written", flush=True)
"""


class Writer:
    """Another process that has the database open, and writes when it is told to."""

    def __init__(self, place: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WRITES, place],
            env={**environment(), "PYTHONPATH": os.pathsep.join(["src", "."])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "open"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def write(self, *_: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        assert self._answer() == "written"

    def close(self) -> None:
        self._process.communicate(timeout=WAIT_S)


def test_a_source_that_is_written_to_is_refused_and_can_be_copied_as_it_was(
    source: Makes, tmp_path: Path
) -> None:
    filled = fill(source("shop"))
    with closing(Writer(source("shop"))) as writer:
        with pytest.raises(DatabaseLockedError, match="was written to while it was copied"):
            copy_database(source("shop"), str(tmp_path / "new"), on_progress=writer.write)
        with pytest.raises(StorageError):
            content(str(tmp_path / "new"))
        copied = copy_database(
            source("shop"), str(tmp_path / "new"), online=True, on_progress=writer.write
        )
    found = content(str(tmp_path / "new"))["notes"]
    assert len(found) == copied.entities["notes"] < len(content(source("shop"))["notes"])
    assert filled["notes"].items() <= found.items()


def test_what_does_not_keep_what_it_is_given_is_found_out(
    source: Makes, target: Makes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source("shop"))
    kind = PostgresStorage if "#" in target("shop") else LmdbStorage
    commit = kind.commit

    def forget(self: Any, batch: dict[bytes, bytes | None], after: int | None = None) -> int:
        kept = {key: value for key, value in batch.items() if value != b"c" + b"x" * 300_000}
        kept = {key: value for key, value in kept.items() if len(value or b"") < 300_000}
        return commit(self, kept, after)

    monkeypatch.setattr(kind, "commit", forget)
    with pytest.raises(CorruptionError, match="is not what was read"):
        copy_database(source("shop"), target("shop"))
    monkeypatch.undo()
    with pytest.raises(StorageError):
        content(target("shop"))


@pytest.mark.parametrize("where", ["source", "target"])
def test_an_address_without_a_name_is_no_place_of_one_database(where: str, tmp_path: Path) -> None:
    fill(str(tmp_path / "shop"))
    places = {"source": str(tmp_path / "shop"), "target": str(tmp_path / "new")}
    places[where] = "postgresql://me:secret@db.example/shops"
    with pytest.raises(ConfigError, match="names no store") as raised:
        copy_database(places["source"], places["target"])
    assert "secret" not in str(raised.value)


def test_a_directory_without_a_database_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        copy_database(tmp_path / "none", tmp_path / "new")
    assert not (tmp_path / "new").exists()


_KILLED = """
import os, signal, sys
from entidb.db import copy_database
def die(done, total):
    os.kill(os.getpid(), signal.SIGKILL)
copy_database(sys.argv[1], sys.argv[2], on_progress=die)
"""


def test_a_copy_that_is_killed_leaves_nothing_that_is_opened_and_the_next_one_works(
    target: Makes, tmp_path: Path
) -> None:
    filled = fill(str(tmp_path / "shop"))
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "shop"), target("shop")]
    ended = subprocess.run(command, env=environment(), timeout=TIMEOUT_S, check=False)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(StorageError):
        content(target("shop"))
    if "#" in target("shop"):
        until_free(target("shop"))
    copy_database(str(tmp_path / "shop"), target("shop"))
    assert content(target("shop")) == filled
    if "#" in target("shop"):
        with closing(Shelf(target("shop").partition("#")[0])) as shelf:
            assert shelf.names() == ["shop"]


def until_free(place: str) -> None:
    """PostgreSQL notices a moment later that a process is gone."""
    address, _, name = place.partition("#")
    end = time.monotonic() + WAIT_S
    while True:
        try:
            with arriving(address, [name]):
                return
        except DatabaseLockedError:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_two_copies_to_one_place_do_not_spoil_each_other(address: str, tmp_path: Path) -> None:
    fill(str(tmp_path / "shop"))
    with arriving(address, ["shop"]), pytest.raises(DatabaseLockedError, match="another copy"):
        copy_database(tmp_path / "shop", f"{address}#shop")
    copy_database(tmp_path / "shop", f"{address}#shop")


def test_a_name_that_is_given_away_meanwhile_is_not_taken_over(
    address: str, tmp_path: Path
) -> None:
    fill(str(tmp_path / "shop"))

    def make_it(done: int, total: int) -> None:
        PostgresStorage.open(address, "shop").close()

    with pytest.raises(StorageError, match="already") as raised:
        copy_database(tmp_path / "shop", f"{address}#shop", on_progress=make_it)
    assert raised.value.code == "exists"
    with closing(Shelf(address)) as shelf:
        assert shelf.names() == ["shop"]


# ---------------------------------------------------------------- a whole server


def config(place: str) -> ServerConfig:
    return ServerConfig(data_dir=place, insecure_no_auth=True)


#: What an administrator has decided: nobody is revoked, and nothing frozen.
DECIDED = b"{}"


def decide(place: str, content: bytes) -> None:
    if "://" in place:
        with closing(SharedTables(place)) as sharing:
            sharing.change(CONTROL, lambda _: content, lambda _: None)
    else:
        FileRecords(place).change(CONTROL, lambda _: content, lambda _: None)


def decided(place: str) -> bytes | None:
    if "://" in place:
        with closing(SharedTables(place)) as sharing:
            return sharing.read(CONTROL)
    return FileRecords(place).read(CONTROL)


class Device:
    """Of one server after the other, which has moved meanwhile."""

    def __init__(self) -> None:
        self.database = Database.in_memory()

    def sync(self, place: str, name: str) -> None:
        with (
            SyncServer(config(place)) as server,
            serving(server) as url,
            SyncEngine(SyncConfig(db_id=name), url, self.database) as engine,
        ):
            assert not engine.sync().incomplete

    def notes(self) -> dict[uuid.UUID, Any]:
        return dict(self.database.collection("notes").items())


def test_a_server_moves_there_and_back_and_its_devices_go_on_without_a_reset(
    source: Makes, target: Makes, tmp_path: Path
) -> None:
    devices = {name: Device() for name in NAMES}
    for name, device in devices.items():
        device.database.collection("notes").add({"from": name})
        device.sync(source(None), name)
    other = Device()
    decide(source(None), DECIDED)
    moved = copy_server(source(None), target(None))
    assert [each.entities for each in moved] == [{"notes": 1}] * 2
    for name, device in devices.items():
        device.database.collection("notes").add({"later": name})
        device.sync(target(None), name)
    other.sync(target(None), "shop")
    assert other.notes() == devices["shop"].notes()
    assert decided(target(None)) == DECIDED
    home = str(tmp_path / "home")
    copy_server(target(None), home)
    for name, device in devices.items():
        device.database.collection("notes").add({"last": name})
        device.sync(home, name)
        assert len(device.notes()) == 3
    other.sync(home, "shop")
    assert other.notes() == devices["shop"].notes()
    assert {"=till-2.entidb", "shop.entidb"} <= set(os.listdir(home))


def test_a_directory_that_is_served_is_refused(tmp_path: Path) -> None:
    with SyncServer(config(str(tmp_path / "data"))) as server:
        server.database("shop").collection("notes").add(1)
        with pytest.raises(DatabaseLockedError, match="is served by"):
            copy_server(tmp_path / "data", tmp_path / "new", online=True)
    assert not (tmp_path / "new").exists()
    copy_server(tmp_path / "data", tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_copy_to_a_full_disk_says_so_with_the_code_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database.open(tmp_path / "db") as db:
        db.collection("notes").add({"n": 1})

    def full(path: str, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr("entidb.storage.partial.os.mkdir", full)
    with pytest.raises(StorageFullError, match="the disk is full") as caught:
        copy_database(str(tmp_path / "db"), str(tmp_path / "copy"))
    assert caught.value.code == "storage_full"
    assert not (tmp_path / "copy").exists()


def test_all_databases_appear_together_or_none(source: Makes, target: Makes) -> None:
    with SyncServer(config(source(None))) as server:
        for name in NAMES:
            server.database(name).collection("notes").add(1)
    seen: list[str] = []

    def fail(name: str, done: int, total: int) -> None:
        seen.append(name)
        if name == NAMES[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_server(source(None), target(None), on_progress=fail)
    assert set(seen) == set(NAMES)
    with pytest.raises(ConfigError, match="no database"):
        copy_server(target(None), target("nowhere"))
    assert len(copy_server(source(None), target(None))) == 2


def test_what_an_administrator_decided_there_is_not_written_over(
    address: str, tmp_path: Path
) -> None:
    for place, name in ((str(tmp_path / "data"), "one"), (address, "two")):
        with SyncServer(config(place)) as server:
            server.database(name).collection("notes").add(1)
        decide(place, b'{"%s": []}' % name.encode())
    with pytest.raises(StorageError, match="decided something there already"):
        copy_server(tmp_path / "data", address)
    with closing(Shelf(address)) as shelf:
        assert shelf.names() == ["two"]


def test_a_copy_that_fails_at_its_last_step_leaves_no_notes_of_an_administrator(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what the source decides later could not be copied there any more."""
    place = str(tmp_path / "data")
    with SyncServer(config(place)) as server:
        server.database("one").collection("notes").add(1)
    decide(place, b'{"before": []}')

    def fails(self: Arriving) -> None:
        raise StorageError("somebody else was quicker", code="exists")

    with monkeypatch.context() as broken:
        broken.setattr(Arriving, "finish", fails)
        with pytest.raises(StorageError, match="quicker"):
            copy_server(place, address)
    assert decided(address) is None
    decide(place, b'{"after": []}')
    assert len(copy_server(place, address)) == 1
    assert decided(address) == b'{"after": []}'


# ---------------------------------------------------------------- a new history


def put_back(place: str, older: str) -> None:
    """What is at ``place`` becomes what is at ``older``, by means that are not ours: rows for rows,
    as from a dump, or files for files."""
    address, _, name = place.partition("#")
    with psycopg.connect(address) as connection:
        connection.execute(
            "WITH old AS (SELECT id, mark FROM entidb_store WHERE name = %s), "
            "new AS (SELECT id FROM entidb_store WHERE name = %s), "
            "gone AS (DELETE FROM entidb_kv USING new WHERE store = new.id), "
            "moved AS (UPDATE entidb_store s SET mark = old.mark FROM old, new "
            "WHERE s.id = new.id) SELECT 1",
            (older.partition("#")[2], name),
        )
        connection.execute(
            "INSERT INTO entidb_kv SELECT new.id, k, v FROM entidb_kv, entidb_store old, "
            "entidb_store new WHERE store = old.id AND old.name = %s AND new.name = %s",
            (older.partition("#")[2], name),
        )


def test_rows_that_were_put_back_begin_a_history_when_they_are_told_to(address: str) -> None:
    device, place = Device(), f"{address}#shop"
    device.database.collection("notes").add({"n": 1})
    device.sync(address, "shop")
    copy_database(place, f"{address}#dump@1")
    device.database.collection("notes").add({"n": 2})
    device.sync(address, "shop")
    put_back(place, f"{address}#dump@1")
    before = content(place)["history"]
    assert renew(address) == [f"{place.partition('#')[0].partition('?')[0]}#shop"]
    assert content(place)["history"] != before
    with pytest.raises(HistoryChangedError):
        device.sync(address, "shop")
    with (
        SyncServer(config(address)) as server,
        serving(server) as url,
        SyncEngine(SyncConfig(db_id="shop"), url, device.database) as engine,
    ):
        engine.reset(keep="device")
        engine.sync()
        assert len(server.database("shop").collection("notes")) == 2


def test_files_that_were_put_back_begin_a_history_too(tmp_path: Path) -> None:
    fill(str(tmp_path / "data" / "shop.entidb"))
    before = content(str(tmp_path / "data" / "shop.entidb"))["history"]
    assert renew(tmp_path / "data") == [str(tmp_path / "data" / "shop.entidb")]
    once = content(str(tmp_path / "data" / "shop.entidb"))["history"]
    assert once != before
    renew(tmp_path / "data" / "shop.entidb")
    assert content(str(tmp_path / "data" / "shop.entidb"))["history"] != once


def test_a_device_has_no_history_to_renew(tmp_path: Path) -> None:
    Database.open(tmp_path / "device").close()
    with pytest.raises(ConfigError, match="device"):
        renew(tmp_path / "device")
    with pytest.raises(ConfigError, match="no database"):
        renew(tmp_path)


# ---------------------------------------------------------------- the commands


def test_the_command_copies_one_database_and_says_what_it_has(tmp_path: Path) -> None:
    fill(str(tmp_path / "shop"))
    assert "201 entities" in done("copy", tmp_path / "shop", tmp_path / "new")
    failed(entidb("copy", tmp_path / "shop", tmp_path / "new"), 2, "exists")
    found = document(done("copy", tmp_path / "shop", tmp_path / "json", "--json"))
    ((one,),) = (found["databases"],)
    assert one["collections"]["notes"]["entities"] == 200
    assert one["target"] == str(tmp_path / "json")


def test_what_a_copy_of_a_device_has_counts_what_is_pending(tmp_path: Path) -> None:
    device = tmp_path / "device"
    with SyncServer.in_memory() as server, Database.open(device) as database:
        transport = HttpTransport("http://localhost", client=LoopbackClient(server))
        with SyncEngine(SyncConfig(db_id="shop"), transport, database) as engine:
            accepted = database["notes"].add({"n": 1})
            engine.sync()
            database["notes"].add({"n": 2})
            database["notes"].add({"n": 3})
            database["more"].add({"n": 4})
            del database["notes"][accepted]
    copied = copy_database(device, tmp_path / "copy")
    assert copied.entities == {"more": 1, "notes": 2}
    with Database.open(tmp_path / "copy") as copy:
        assert {name: len(copy[name]) for name in copied.entities} == copied.entities
    assert "(3 entities, " in done("copy", device, tmp_path / "again")


def test_the_command_copies_a_server_and_renews_it(tmp_path: Path) -> None:
    fill(str(tmp_path / "data" / "shop.entidb"))
    said = done("copy", tmp_path / "data", tmp_path / "new")
    assert said.startswith(f"copied {tmp_path / 'data' / 'shop.entidb'} to ")
    before = content(str(tmp_path / "new" / "shop.entidb"))["history"]
    assert "has a new history" in done("renew", tmp_path / "new")
    assert content(str(tmp_path / "new" / "shop.entidb"))["history"] != before
    assert document(done("renew", tmp_path / "new", "--json"))["databases"]
    failed(entidb("copy", tmp_path / "nothing", tmp_path / "x"), 3, "no_database")
