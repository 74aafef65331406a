"""Backups of databases that are served: made under load, verified, kept in number, put back."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.errors import (
    ConfigError,
    CorruptionError,
    HistoryChangedError,
    PermissionDeniedError,
    StorageError,
    StorageFullError,
)
from entidb.protocol import HandshakeResponse
from entidb.server import ServerConfig, SyncServer
from entidb.server.admin import backups, care, databases
from entidb.server.admin import checking as checking_room
from entidb.server.admin.callers import Caller
from entidb.server.admin.checking import Found, check
from entidb.server.admin.office import Office
from entidb.server.admin.opening import office_of
from entidb.server.admin.readiness import Readiness
from entidb.server.admin.tasks import Task
from entidb.storage.partial import Partial
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine
from tests.server.support import ManualClock, handshake, push
from tests.waiting import until

ROOT = Caller("root", "test")
SHOPKEEPER = Caller("ada", "test", frozenset(["shop"]))
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX")


class Place:
    def __init__(self, root: Path, **settings: Any) -> None:
        self.clock = ManualClock()
        self.backups = root / "backups"
        named = {"backup_dir": self.backups, "backup_keep": 2, **settings}
        self.config = ServerConfig(data_dir=root / "data", insecure_no_auth=True, **named)
        self.root = root / "data"
        self.server = SyncServer(self.config, clock=self.clock)
        self.office: Office = office_of(self.server)

    def history(self, db_id: str = "shop") -> bytes:
        found = self.server.handle("/v1/handshake", None, handshake(db_id))
        assert isinstance(found, HandshakeResponse), found
        return found.history

    def push(self, *numbers: int) -> None:
        self.server.handle("/v1/push", None, push(self.history(), *numbers))

    def over(self, task: Task) -> Task:
        found = self.office.tasks.wait(task.id, 60)
        assert found is not None
        return found

    def backup(self) -> str:
        self.clock.advance(1)
        task = self.over(backups.backup(self.office, ROOT, "shop"))
        assert task.state == "done", task.error
        return str(task.result["backup"])

    def ids(self) -> list[str]:
        return [each.id for each in backups.rows(self.office, ROOT)]

    def restore(self, identity: str) -> Task:
        return self.over(backups.restore(self.office, ROOT, "shop", identity, "shop"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked in this process, which takes no second to start."""
    monkeypatch.setattr(backups, "check", lambda path, go_on: checking_room._look(path))
    monkeypatch.setattr(care, "check", lambda path, go_on: checking_room._look(path))


# ---------------------------------------------------------------- made


@pytest.mark.slow
def test_a_backup_is_verified_and_says_what_is_in_it(place: Place):
    place.push(1, 2, 3)
    identity = place.backup()
    (row,) = backups.rows(place.office, ROOT)
    assert (row.id, row.database, row.head, row.entities) == (identity, "shop", 3, 3)
    assert row.faults == []
    assert row.made_ms == place.clock.now_ms()
    with Database.open(place.backups / "shop.entidb" / identity, read_only=True) as copy:
        assert copy.verify() == []


@POSIX
@pytest.mark.parametrize("where", ["backups", "of/the/shops", "./backups/"])
def test_backups_go_to_a_directory_that_is_not_there_yet_and_is_named_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, where: str
):
    monkeypatch.chdir(tmp_path)
    config = ServerConfig(data_dir="data", backup_dir=where, insecure_no_auth=True)
    with SyncServer(config, clock=ManualClock()) as server:
        office = office_of(server)
        databases.create(office, ROOT, "shop")
        task = office.tasks.wait(backups.backup(office, ROOT, "shop").id, 60)
        assert task is not None
        assert (task.state, task.error) == ("done", None)
        assert [each.faults for each in backups.rows(office, ROOT)] == [[]]


def test_only_their_owner_may_read_backups(place: Place, quick: None):
    before = os.umask(0)
    try:
        place.push(1)
        place.backup()
    finally:
        os.umask(before)
    for path in place.backups.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_so_many_are_kept_as_is_configured(place: Place, quick: None):
    place.push(1)
    made = [place.backup() for _ in range(4)]
    assert place.ids() == [made[3], made[2]]
    names = {path.name for path in (place.backups / "shop.entidb").iterdir()}
    assert names == {f"{each}{end}" for each in made[2:] for end in ("", ".json")}


def test_nothing_else_in_the_place_of_backups_is_touched(place: Place, quick: None):
    folder = place.backups / "shop.entidb"
    folder.mkdir(parents=True)
    for name in ("notes.txt", "20200101T000000Z.json", "mine.json", "20200101T000000Z-x"):
        (folder / name).write_text("{}")
    (folder / "20190101T000000Z").mkdir()
    place.push(1)
    for _ in range(4):
        place.backup()
    for name in ("notes.txt", "20200101T000000Z.json", "mine.json", "20200101T000000Z-x"):
        assert (folder / name).exists()
    assert (folder / "20190101T000000Z").is_dir()


def test_two_backups_in_one_second_are_two(place: Place, quick: None):
    place.push(1)
    tasks = [backups.backup(place.office, ROOT, "shop") for _ in range(2)]
    made = [str(place.over(task).result["backup"]) for task in tasks]
    assert made[1] == made[0] + "-2"


def test_a_faulty_backup_fails_its_task_and_displaces_no_good_one(
    place: Place, monkeypatch: pytest.MonkeyPatch, quick: None
):
    place.push(1)
    good = [place.backup(), place.backup()]
    monkeypatch.setattr(backups, "check", lambda path, go_on: Found(["a record is damaged"]))
    for _ in range(3):
        place.clock.advance(1)
        task = place.over(backups.backup(place.office, ROOT, "shop"))
        assert task.state == "failed"
        assert "a record is damaged" in str(task.error)
    found = backups.rows(place.office, ROOT)
    assert [each.id for each in found if not each.faults] == good[::-1]
    (faulty,) = [each for each in found if each.faults]
    with pytest.raises(CorruptionError):
        backups.restore(place.office, ROOT, "shop", faulty.id, "shop")


def test_a_cancelled_backup_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.push(1)
    reached = threading.Event()

    def waits(path: str, go_on: Any) -> Found:
        while True:
            reached.set()
            go_on()

    monkeypatch.setattr(backups, "check", waits)
    task = backups.backup(place.office, ROOT, "shop")
    assert reached.wait(60)
    assert place.office.tasks.cancel(task.id)
    assert place.over(task).state == "cancelled"
    assert list((place.backups / "shop.entidb").iterdir()) == []


def test_without_a_place_for_backups_none_is_made(tmp_path: Path):
    made = Place(tmp_path, backup_dir=None)
    made.push(1)
    with pytest.raises(ConfigError, match="backup_dir"):
        backups.backup(made.office, ROOT, "shop")
    assert backups.rows(made.office, ROOT) == []
    made.server.close()


def test_who_administers_one_database_backs_up_and_restores_that_one(place: Place, quick: None):
    place.push(1)
    place.history("catalog")
    tasks = backups.backup_all(place.office, SHOPKEEPER)
    assert [each.database for each in tasks] == ["shop"]
    place.over(tasks[0])
    place.over(backups.backup(place.office, ROOT, "catalog"))
    (mine,) = backups.rows(place.office, SHOPKEEPER)
    assert mine.database == "shop"
    for call in (backups.backup, care.verify, care.compact, care.purge):
        with pytest.raises(PermissionDeniedError):
            call(place.office, SHOPKEEPER, "catalog")
    with pytest.raises(PermissionDeniedError):
        backups.restore(place.office, SHOPKEEPER, "catalog", mine.id, "catalog")


# ---------------------------------------------------------------- on a schedule


def test_a_backup_is_made_when_it_is_due(tmp_path: Path, quick: None):
    place = Place(tmp_path, backup_every_s=3600.0)
    place.push(1)
    place.history("catalog")

    def keep_house() -> None:
        place.server.housekeep()
        for task in place.office.tasks.all():
            assert place.over(task).state == "done"

    keep_house()
    assert len(place.ids()) == 2
    place.clock.advance(3599)
    keep_house()
    assert len(place.ids()) == 2
    place.clock.advance(2)
    keep_house()
    assert len(place.ids()) == 4
    place.server.close()
    # What was made is known after a restart, too.
    again = Place(tmp_path, backup_every_s=3600.0)
    again.clock.ms = place.clock.ms
    again.server.housekeep()
    assert again.office.tasks.all() == []
    again.server.close()


def test_backups_of_a_clock_that_was_ahead_keep_no_other_from_being_made_and_kept(
    tmp_path: Path, quick: None
):
    place = Place(tmp_path, backup_every_s=3600.0)
    place.push(1)

    def keep_house() -> None:
        place.server.housekeep()
        for task in place.office.tasks.all():
            assert place.over(task).state == "done"

    place.clock.wrong_ms = 10 * 365 * 24 * 3600 * 1000
    for _ in range(2):
        keep_house()
        place.clock.advance(3601)
    wrong = place.ids()
    assert len(wrong) == 2
    place.clock.wrong_ms = 0
    keep_house()
    (first,) = set(place.ids()) - set(wrong)
    # Known for what it is, also after a restart.
    place.server.housekeep()
    assert place.office.oldest_backup_ms == place.clock.now_ms()
    place.clock.advance(3601)
    keep_house()
    assert len(place.ids()) == 2
    assert first in place.ids()
    assert not {*place.ids()} & {*wrong}
    place.server.close()


def test_a_backup_is_late_where_the_last_one_is_of_a_clock_that_was_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
):
    place = Place(tmp_path, backup_every_s=3600.0)
    place.push(1)
    place.clock.wrong_ms = 10 * 365 * 24 * 3600 * 1000
    place.server.housekeep()
    for task in place.office.tasks.all():
        assert place.over(task).state == "done"
    place.clock.wrong_ms = 0
    monkeypatch.setattr(backups, "check", lambda path, go_on: Found(["damaged"]))
    for _ in range(3):
        place.clock.advance(3000)
        place.server.housekeep()
        for task in place.office.tasks.all():
            place.over(task)
    assert len(place.office.tasks.all()) == 4
    assert place.office.late_backups == ["shop"]
    place.server.close()


def test_a_scheduled_backup_that_fails_is_not_tried_at_every_housekeeping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = Place(tmp_path, backup_every_s=3600.0)
    place.push(1)
    monkeypatch.setattr(backups, "check", lambda path, go_on: Found(["damaged"]))
    for _ in range(10):
        place.server.housekeep()
        for task in place.office.tasks.all():
            assert place.over(task).state == "failed"
        place.clock.advance(30)
    assert len(place.office.tasks.all()) == 1
    place.clock.advance(900)
    place.server.housekeep()
    assert len(place.office.tasks.all()) == 2
    place.server.close()


# ---------------------------------------------------------------- put back


def test_a_restored_database_has_the_state_of_its_backup_and_another_history(
    place: Place, quick: None
):
    place.push(1, 2)
    before = place.history()
    identity = place.backup()
    place.push(3)
    task = place.restore(identity)
    assert task.state == "done", task.error
    assert (task.result["head"], task.result["entities"]) == (2, 2)
    assert place.history() != before
    row = databases.row(place.office, ROOT, "shop")
    assert row.entities == 2
    # What was there can be taken back under another name.
    databases.rename(place.office, ROOT, "shop", "restored")
    assert databases.take_back(place.office, ROOT, task.result["aside"]).entities == 3


def test_a_restore_that_fails_at_its_last_step_leaves_the_database_as_it_was(
    place: Place, quick: None, monkeypatch: pytest.MonkeyPatch
):
    place.push(1)
    identity = place.backup()
    place.push(2)
    history = place.history()

    def fails(self: Partial) -> None:
        if self.path.endswith("shop.entidb"):
            raise OSError("the disk does not answer")
        finish(self)

    finish = Partial.finish
    with monkeypatch.context() as broken:
        broken.setattr(Partial, "finish", fails)
        assert place.restore(identity).state == "failed"
    assert place.history() == history
    assert databases.all_aside(place.office, ROOT) == []
    with place.server.stores.using("shop", create=False) as store:
        assert store.database.read_head().sequence == 2
    assert place.restore(identity).state == "done"


def test_a_restore_that_cannot_be_written_down_is_said_to_be_done(
    place: Place, quick: None, monkeypatch: pytest.MonkeyPatch
):
    place.push(1)
    identity = place.backup()
    place.push(2)
    write = place.office.audit.write

    def full(who: str, where: str, action: str, **details: Any) -> None:
        if action == "restored":
            raise StorageFullError("the disk is full")
        write(who, where, action, **details)

    with monkeypatch.context() as broken:
        broken.setattr(place.office.audit, "write", full)
        task = place.restore(identity)
    assert task.state == "failed"
    assert task.error == ("this was done (restored), and cannot be written down: the disk is full")
    assert databases.row(place.office, ROOT, "shop").entities == 1


def test_a_database_that_is_gone_is_restored(place: Place, quick: None):
    place.push(1)
    identity = place.backup()
    databases.delete(place.office, ROOT, "shop", "shop")
    assert place.restore(identity).result["aside"] is None
    assert databases.row(place.office, ROOT, "shop").entities == 1


@pytest.mark.parametrize(
    "identity", ["", "..", "../../data", "20260101T000000Z", "/etc", "x/../y", "a" * 300]
)
def test_only_a_backup_of_that_database_is_put_back(place: Place, identity: str):
    place.push(1)
    with pytest.raises(PermissionDeniedError) as caught:
        backups.restore(place.office, ROOT, "shop", identity, "shop")
    assert caught.value.code == "unknown_database"


def test_a_restore_asks_for_the_name(place: Place, quick: None):
    place.push(1)
    identity = place.backup()
    with pytest.raises(ConfigError) as caught:
        backups.restore(place.office, ROOT, "shop", identity, "shpo")
    assert caught.value.code == "not_confirmed"


def test_a_backup_that_was_damaged_since_replaces_nothing(place: Place, quick: None):
    place.push(1)
    history = place.history()
    identity = place.backup()
    data = place.backups / "shop.entidb" / identity / "data.mdb"
    content = bytearray(data.read_bytes())
    at = content.index(b"a value")
    content[at] ^= 1
    data.chmod(0o600)
    data.write_bytes(content)
    task = place.restore(identity)
    assert task.state == "failed"
    assert "damaged since" in str(task.error)
    assert place.history() == history
    assert sorted(path.name for path in place.root.iterdir() if "partial" in path.name) == []


@pytest.mark.slow
def test_a_backup_made_under_load_is_restored_and_every_device_recovers(tmp_path: Path):
    """R29: each device learns that the server's past is another, loses nothing, and goes on when
    its program has chosen a side."""
    place = Place(tmp_path)
    place.history()
    devices = [Device(place) for _ in range(4)]
    stop = threading.Event()

    def work(device: Device) -> None:
        while not stop.is_set():
            device.write()
            device.engine.sync()

    for device in devices:  # something is there before the backup
        device.write()
        device.engine.sync()
    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    task = backups.backup(place.office, ROOT, "shop")
    done = place.over(task)
    stop.set()
    for thread in threads:
        thread.join()
    assert done.state == "done", done.error
    for device in devices:
        device.engine.sync()
        device.write()  # pending while the server is put back
    restored = place.restore(str(done.result["backup"]))
    assert restored.state == "done", restored.error
    for device in devices:
        with pytest.raises(HistoryChangedError):
            device.engine.sync()
        assert device.engine.status().pending == 1
    for device in devices:
        device.engine.reset("device")
    for _ in range(3):
        for device in devices:
            device.engine.sync()
    server = place.server.database("shop").collection("notes")
    everything = {key for device in devices for key in device.wrote}
    assert {key for key, _ in server.items()} == everything
    for device in devices:
        assert {key for key, _ in device.notes.items()} == everything
        assert device.engine.status().pending == 0
        device.close()
    assert place.server.database("shop").verify() == []
    place.server.close()


class Device:
    def __init__(self, place: Place) -> None:
        self.database = Database.in_memory()
        config = SyncConfig(db_id="shop")
        client = LoopbackClient(place.server)
        transport = HttpTransport("http://localhost", config=config, client=client)
        self.engine = SyncEngine(config, transport, self.database)
        self.notes = self.database.collection("notes")
        self.wrote: list[uuid.UUID] = []

    def write(self) -> None:
        identity = uuid.uuid4()
        self.notes[identity] = {"n": len(self.wrote)}
        self.wrote.append(identity)

    def close(self) -> None:
        self.engine.close()
        self.database.close()


# ---------------------------------------------------------------- verify, compact, purge


@pytest.mark.slow
def test_a_check_in_a_process_of_its_own_finds_what_verify_finds(tmp_path: Path):
    with Database.open(tmp_path / "one") as database:
        database.collection("notes")[uuid.uuid4()] = {"text": "a value"}
        database.backup(tmp_path / "copy")
    found = check(str(tmp_path / "copy"), lambda: None)
    assert (found.faults, found.entities, found.role) == ([], 1, "device")
    data = tmp_path / "copy" / "data.mdb"
    data.chmod(0o600)
    data.write_bytes(data.read_bytes().replace(b"a value", b"another"))
    assert check(str(tmp_path / "copy"), lambda: None).faults
    data.write_bytes(data.read_bytes()[:5000])
    assert check(str(tmp_path / "copy"), lambda: None).faults


@pytest.mark.slow
def test_a_check_for_which_nothing_is_left_over_is_made_again_and_takes_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with Database.open(tmp_path / "one") as database:
        database.collection("notes").add({"n": 1})
        database.backup(tmp_path / "copy")
    commands: list[list[str]] = []
    real = subprocess.Popen

    def popen(command: list[str], **how: Any) -> Any:
        commands.append(command)
        return real(command, **how)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(checking_room, "_LOOK_S", 0.001)
    monkeypatch.setattr(checking_room, "_BEGIN_S", -1e9)
    assert check(str(tmp_path / "copy"), lambda: None).entities == 1
    assert [command[-1] for command in commands] == ["idle", "nice"]


@pytest.mark.parametrize(("share", "told"), [(-1.0, "w"), (1e9, "r")])
def test_a_check_is_told_whether_the_server_works_meanwhile(
    share: float, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Says what it was told first, in the place of what it has found.
    stands_in = tmp_path / "python"
    stands_in.write_text('#!/bin/sh\nprintf \'{"faults": ["%s"]}\' "$(head -c 1)"\n')
    stands_in.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(stands_in))
    monkeypatch.setattr(checking_room, "_AT_WORK", share)
    assert check(str(tmp_path), lambda: None).faults == [told]


def test_a_check_rests_while_the_server_works(monkeypatch: pytest.MonkeyPatch):
    heard, says = os.pipe()
    handlers: list[Any] = []
    rests: list[float] = []
    with os.fdopen(heard) as stdin, os.fdopen(says, "wb", 0) as server:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(handler))
        monkeypatch.setattr(signal, "setitimer", lambda *how: rests.clear())
        monkeypatch.setattr(checking_room, "_rest_for", rests.append)
        checking_room._rest_now_and_then()

        def rested() -> bool:
            rests.clear()
            handlers[0](signal.SIGPROF, None)
            return bool(rests)

        assert not rested()
        server.write(b"w")
        until(rested)
        server.write(b"r")
        until(lambda: not rested())
        server.write(b"w")
        until(rested)
        server.close()
        until(lambda: not rested())


@pytest.mark.slow
def test_a_check_that_cannot_look_says_why_and_finds_no_fault(tmp_path: Path):
    said = r"could not be checked.*is open in process"
    with Database.open(tmp_path / "one"), pytest.raises(StorageError, match=said):
        check(str(tmp_path / "one"), lambda: None)


@pytest.mark.slow
def test_a_check_can_be_ended(tmp_path: Path):
    with Database.open(tmp_path / "one") as database:
        database.backup(tmp_path / "copy")

    class EndError(Exception):
        pass

    def ends() -> None:
        raise EndError

    with pytest.raises(EndError):
        check(str(tmp_path / "copy"), ends)


def test_a_database_is_verified_while_it_is_served(place: Place, quick: None):
    place.push(1, 2)
    task = place.over(care.verify(place.office, ROOT, "shop"))
    assert (task.state, task.result) == ("done", {"head": 2, "entities": 2})
    assert not list(place.root.glob("entidb-checked*"))


def test_faults_fail_the_task_that_verifies(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.push(1)
    monkeypatch.setattr(care, "check", lambda path, go_on: Found(["one", "two"]))
    task = place.over(care.verify(place.office, ROOT, "shop"))
    assert task.state == "failed"
    assert "2 faults: one" in str(task.error)


def test_a_database_is_compacted_while_it_is_served(place: Place):
    place.push(*range(1, 200))
    task = place.over(care.compact(place.office, ROOT, "shop"))
    assert task.state == "done", task.error
    assert task.result["after_bytes"] <= task.result["before_bytes"]
    place.push(500)


def test_a_purge_forgets_deletions_in_parts_that_can_be_cancelled(place: Place):
    place.push(*range(1, 10))
    history = place.history()
    place.server.handle("/v1/push", None, push(history, 20, value=None, base=0))
    notes = place.server.database("shop").collection("notes")
    for key, _ in list(notes.items())[:5]:
        del notes[key]
    task = place.over(care.purge(place.office, ROOT, "shop", 0.0))
    assert task.state == "done", task.error
    assert task.result["purged"] >= 5
    assert databases.row(place.office, ROOT, "shop").floor == task.result["floor"]
    with pytest.raises(ConfigError):
        care.purge(place.office, ROOT, "shop", -1.0)
    again = place.over(care.purge(place.office, ROOT, "shop"))
    assert again.result["purged"] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("backup_every_s", -1), ("backup_every_s", 60), ("backup_keep", 0), ("backup_keep", 1.5)],
)
def test_a_setting_of_backups_that_cannot_work_is_refused_by_name(name: str, value: Any):
    with pytest.raises(ConfigError, match=name):
        ServerConfig(data_dir=None, insecure_no_auth=True, **{name: value})


def test_backups_do_not_lie_among_the_databases(tmp_path: Path):
    with pytest.raises(ConfigError, match="backup_dir"):
        ServerConfig(data_dir=tmp_path, backup_dir=tmp_path, insecure_no_auth=True)


def test_a_backup_that_is_late_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
):
    place = Place(tmp_path, backup_every_s=3600.0)
    ready = Readiness(place.office)
    place.push(1)
    place.server.housekeep()
    for task in place.office.tasks.all():
        place.over(task)
    place.server.housekeep()
    assert ready.reasons() == ()
    assert place.office.oldest_backup_ms == backups.rows(place.office, ROOT)[0].made_ms
    monkeypatch.setattr(backups, "check", lambda path, go_on: Found(["damaged"]))
    for _ in range(3):
        place.clock.advance(3000)
        place.server.housekeep()
        for task in place.office.tasks.all():
            place.over(task)
    assert place.office.late_backups == ["shop"]
    assert ready.reasons() == ("backups",)
    place.server.close()
