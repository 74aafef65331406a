"""Administration of a running server: who may, what is done, and that it is written down."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import (
    ConfigError,
    EntiDBError,
    InvalidNameError,
    PermissionDeniedError,
    ServerBusyError,
    ServerError,
    StorageError,
    StorageFullError,
)
from entidb.protocol import ErrorResponse, HandshakeResponse, PushResponse
from entidb.server import Grants, ServerConfig, SyncServer, mint_token, serving
from entidb.server.admin import access, audit, care, databases, fleet
from entidb.server.admin.asking import PREFIX
from entidb.server.admin.audit import AUDIT_FILE, AuditLog
from entidb.server.admin.callers import Caller, caller_of
from entidb.server.admin.local import SOCKET, LocalRequest, ask
from entidb.server.admin.office import Office
from entidb.server.admin.openapi import document
from entidb.server.admin.opening import office_of
from entidb.server.admin.routes import ROUTES, answer
from entidb.server.auth import everything
from entidb.server.directory import ASIDE
from entidb.server.records import FileRecords
from tests.server.support import DEVICE, NOW_MS, SECRET, Client, ManualClock, handshake, pull, push
from tests.server.test_control import on_a_full_disk

ROOT = Caller("root", "test")
SHOPKEEPER = Caller("ada", "test", frozenset(["shop"]))
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX")
DAY_S = 24 * 3600


class Place:
    """A server with databases in a directory, and its office."""

    def __init__(self, root: Path) -> None:
        self.clock = ManualClock()
        self.config = ServerConfig(
            data_dir=root / "data", backup_dir=root / "backups", insecure_no_auth=True
        )
        self.root = root / "data"
        self.server = SyncServer(self.config, clock=self.clock)
        self.office: Office = office_of(self.server)

    def history(self, db_id: str = "shop") -> bytes:
        found = self.server.handle("/v1/handshake", None, handshake(db_id))
        assert isinstance(found, HandshakeResponse), found
        return found.history

    def push(self, history: bytes, *numbers: int, db_id: str = "shop") -> Any:
        return self.server.handle("/v1/push", None, push(history, *numbers, db_id=db_id))

    def log(self) -> list[tuple[str, str | None, str]]:
        found = reversed(self.office.audit.newest(1000))
        return [(each.action, each.database, each.result) for each in found]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.server.close()


# ---------------------------------------------------------------- who may


def grants(**claims: Any) -> Grants:
    return Grants("ada", {}, claims)


@pytest.mark.parametrize("claim", [None, False, 1, "true", "shop", {}, [], [1], {"shop": True}, 0])
def test_only_a_claim_that_says_so_makes_an_administrator(claim: Any):
    with pytest.raises(PermissionDeniedError):
        caller_of(grants(admin=claim), "here", open_to_all=False)


def test_a_claim_makes_an_administrator_of_everything_or_of_some_databases():
    assert caller_of(grants(admin=True), "here", open_to_all=False).databases is None
    some = caller_of(grants(admin=["shop"]), "here", open_to_all=False)
    some.check("shop")
    with pytest.raises(PermissionDeniedError):
        some.check("catalog")
    with pytest.raises(PermissionDeniedError):
        some.check_all()
    assert caller_of(grants(), "here", open_to_all=True).databases is None


def test_who_administers_one_database_sees_and_changes_no_other(place: Place):
    for name in ("shop", "catalog"):
        databases.create(place.office, ROOT, name)
    databases.freeze(place.office, ROOT, "catalog", "secret plans")
    access.revoke(place.office, ROOT, "subject", "eve", "catalog")
    access.revoke(place.office, ROOT, "subject", "eve")
    office = place.office
    assert [each.name for each in databases.rows(office, SHOPKEEPER)] == ["shop"]
    assert access.revoked(office, SHOPKEEPER) == []
    forbidden: list[Any] = [
        lambda: databases.row(office, SHOPKEEPER, "catalog"),
        lambda: databases.create(office, SHOPKEEPER, "new"),
        lambda: databases.freeze(office, SHOPKEEPER, "catalog"),
        lambda: databases.thaw(office, SHOPKEEPER, "catalog"),
        lambda: databases.rename(office, SHOPKEEPER, "catalog", "shop"),
        lambda: databases.rename(office, SHOPKEEPER, "shop", "catalog2"),
        lambda: databases.delete(office, SHOPKEEPER, "catalog", "catalog"),
        lambda: access.devices(office, SHOPKEEPER, "catalog"),
        lambda: access.revoke(office, SHOPKEEPER, "subject", "bob"),
        lambda: access.revoke(office, SHOPKEEPER, "subject", "bob", "catalog"),
        lambda: access.allow(office, SHOPKEEPER, "subject", "eve"),
        lambda: access.keys(office, SHOPKEEPER),
        lambda: access.reload(office, SHOPKEEPER),
    ]
    before = place.log()
    for each in forbidden:
        with pytest.raises(PermissionDeniedError):
            each()
    assert place.log() == before
    status, data = answer(office, SHOPKEEPER, "GET", PREFIX + "audit", {}, b"")
    assert status == 200
    assert {each["database"] for each in json.loads(data)} == {"shop"}
    access.revoke(office, SHOPKEEPER, "subject", "bob", "shop")
    assert [each.name for each in access.revoked(office, SHOPKEEPER)] == ["bob"]


def test_a_deleted_database_is_taken_back_by_whom_it_belongs_to(place: Place):
    for name in ("shop", "catalog"):
        databases.create(place.office, ROOT, name)
        databases.delete(place.office, ROOT, name, name)
    (mine,) = databases.all_aside(place.office, SHOPKEEPER)
    assert mine.name == "shop"
    (other,) = [each for each in databases.all_aside(place.office, ROOT) if each.name != "shop"]
    with pytest.raises(PermissionDeniedError):
        databases.take_back(place.office, SHOPKEEPER, other.id)


# ---------------------------------------------------------------- databases


def test_the_list_says_what_is_known_of_open_and_of_closed_databases(place: Place):
    history = place.history()
    place.push(history, 1, 2, 3)
    row = databases.row(place.office, ROOT, "shop")
    assert (row.name, row.open, row.entities, row.head, row.floor) == ("shop", True, 3, 3, 0)
    assert row.bytes > 1000
    assert row.used_ms == NOW_MS
    place.clock.advance(1000)
    place.server.housekeep()
    (row,) = databases.rows(place.office, ROOT)
    assert (row.open, row.entities, row.head, row.used_ms) == (False, 3, 3, NOW_MS)


def test_the_list_knows_a_database_that_was_opened_a_moment_ago(place: Place):
    place.push(place.history(), 1, 2, 3)
    (row,) = databases.rows(place.office, ROOT)
    assert (row.open, row.entities, row.head) == (True, 3, 3)


def test_housekeeping_remembers_the_figures_of_what_was_used(place: Place):
    place.push(place.history(), 1, 2)
    place.server.housekeep()
    place.clock.advance(1000)
    place.server.housekeep()
    (row,) = databases.rows(place.office, ROOT)
    assert (row.open, row.entities, row.head) == (False, 2, 2)


def test_a_database_is_made_where_devices_may_make_none(tmp_path: Path):
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, create_databases=False)
    with SyncServer(config) as server:
        answer = server.handle("/v1/handshake", None, handshake())
        assert isinstance(answer, ErrorResponse)
        databases.create(office_of(server), ROOT, "shop")
        answer = server.handle("/v1/handshake", None, handshake())
        assert isinstance(answer, HandshakeResponse)
        with pytest.raises(ConfigError) as caught:
            databases.create(office_of(server), ROOT, "shop")
        assert caught.value.code == "exists"


@pytest.mark.parametrize("name", ["", "../shop", "a/b", "-x", ".hidden", "x" * 101, "é"])
def test_a_name_that_is_none_touches_nothing(place: Place, name: str):
    databases.create(place.office, ROOT, "shop")
    office = place.office
    for call in (
        lambda: databases.create(office, ROOT, name),
        lambda: databases.row(office, ROOT, name),
        lambda: databases.freeze(office, ROOT, name),
        lambda: databases.rename(office, ROOT, "shop", name),
        lambda: databases.delete(office, ROOT, name, name),
        lambda: access.devices(office, ROOT, name),
        lambda: access.revoke(office, ROOT, "subject", "ada", name),
    ):
        with pytest.raises(InvalidNameError):
            call()
    assert [each.name for each in databases.rows(office, ROOT)] == ["shop"]


def test_a_frozen_database_takes_no_pushes_and_says_who_froze_it(place: Place):
    history = place.history()
    row = databases.freeze(place.office, ROOT, "shop", "moving house")
    assert row.frozen is not None
    assert (row.frozen.by, row.frozen.reason) == ("root", "moving house")
    refused = place.push(history, 1)
    assert isinstance(refused, ErrorResponse)
    assert refused.details == {"reason": "frozen"}
    assert databases.thaw(place.office, ROOT, "shop").frozen is None
    assert isinstance(place.push(history, 1), PushResponse)
    assert place.log() == [("freeze", "shop", "done"), ("thaw", "shop", "done")]


def test_a_renamed_database_has_its_data_its_devices_and_its_state(place: Place):
    history = place.history()
    place.push(history, 1)
    place.office.registry.heard(handshake(), Grants("ada", {}), code=None)
    databases.freeze(place.office, ROOT, "shop")
    row = databases.rename(place.office, ROOT, "shop", "Store")
    assert row.frozen is not None
    assert row.devices == 1
    assert place.history("Store") == history
    gone = place.push(history, 2)
    assert isinstance(gone, ErrorResponse)
    assert gone.code == "history_changed"
    databases.create(place.office, ROOT, "shop")
    with pytest.raises(ConfigError, match="already"):
        databases.rename(place.office, ROOT, "shop", "Store")


def test_a_renamed_database_is_shown_as_it_is_and_not_as_it_was_looked_at_last(place: Place):
    history = place.history()
    place.push(history, 1)
    assert databases.row(place.office, ROOT, "shop").entities == 1
    place.push(history, 2)
    place.push(history, 3)
    row = databases.rename(place.office, ROOT, "shop", "store")
    assert (row.open, row.entities, row.head) == (False, 3, 3)
    assert [each.entities for each in databases.rows(place.office, ROOT)] == [3]


def test_a_deleted_database_can_be_taken_back_for_a_day(place: Place):
    history = place.history()
    place.push(history, 1)
    with pytest.raises(ConfigError) as caught:
        databases.delete(place.office, ROOT, "shop", "shpo")
    assert caught.value.code == "not_confirmed"
    assert place.history() == history
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    assert databases.rows(place.office, ROOT) == []
    place.clock.advance(DAY_S - 1)
    place.server.housekeep()
    row = databases.take_back(place.office, ROOT, aside.id)
    assert (row.entities, row.head) == (1, 1)
    assert place.history() == history
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    place.clock.advance(DAY_S)
    place.server.housekeep()
    assert databases.all_aside(place.office, ROOT) == []
    assert list((place.root / ASIDE).iterdir()) == []
    with pytest.raises(PermissionDeniedError) as unknown:
        databases.take_back(place.office, ROOT, aside.id)
    assert unknown.value.code == "unknown_database"


def frozen_and_revoked(place: Place) -> tuple[set[str], list[str | None]]:
    decided = place.office.control.decided
    return set(decided.frozen), [each.db_id for each in decided.revoked]


def test_what_is_decided_about_a_database_is_taken_back_with_it(place: Place):
    place.history()
    databases.freeze(place.office, ROOT, "shop", "moving")
    access.revoke(place.office, ROOT, "subject", "eve", "shop")
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    assert frozen_and_revoked(place) == ({aside.id}, [aside.id])
    row = databases.take_back(place.office, ROOT, aside.id)
    assert row.frozen is not None
    assert frozen_and_revoked(place) == ({"shop"}, ["shop"])
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    place.clock.advance(DAY_S)
    place.server.housekeep()
    assert frozen_and_revoked(place) == (set(), [])


def test_the_devices_of_a_deleted_database_are_taken_back_with_it(place: Place):
    history = place.history()
    for number in (1, 2):
        answer = place.push(history, number)
        place.server.registry.heard(
            push(history, number), everything(None), code=None, answer=answer
        )
        if number == 1:  # the second one is noted when it is deleted
            place.server.registry.flush()
    before = access.devices(place.office, ROOT, "shop", 10)
    assert before[0].device.accepted == 2
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    assert fleet.devices(place.office, ROOT).total == 0
    # One of the same name meets devices of its own.
    place.history()
    other = databases.delete(place.office, ROOT, "shop", "shop")
    databases.take_back(place.office, ROOT, aside.id)
    assert access.devices(place.office, ROOT, "shop", 10) == before
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    assert aside.id != other.id
    kept = set(place.root.glob("*.devices"))
    assert kept
    place.clock.advance(DAY_S)
    place.server.housekeep()
    assert not set(place.root.glob("*.devices")), "they go for good with it"


def test_a_database_that_cannot_be_moved_with_what_is_decided_is_not_moved(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    history = place.history()
    databases.freeze(place.office, ROOT, "shop", "moving")
    access.revoke(place.office, ROOT, "subject", "eve", "shop")
    with monkeypatch.context() as full:
        full.setattr(FileRecords, "change", on_a_full_disk)
        with pytest.raises(StorageFullError):
            databases.rename(place.office, ROOT, "shop", "store")
        assert [each.name for each in databases.rows(place.office, ROOT)] == ["shop"]
        # Who wants room gets it: what was decided stays with the name.
        aside = databases.delete(place.office, ROOT, "shop", "shop")
        databases.take_back(place.office, ROOT, aside.id)
    assert frozen_and_revoked(place) == ({"shop"}, ["shop"])
    assert place.history() == history


def test_a_rename_that_fails_leaves_the_devices_where_they_are(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    history = place.history()
    place.office.registry.heard(handshake(), Grants("ada", {}), code=None)

    def fails(db_id: str, to: str) -> None:
        raise OSError("the disk does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(place.office.place, "rename", fails)
        with pytest.raises(OSError, match="does not answer"):
            databases.rename(place.office, ROOT, "shop", "store")
    assert [each.subject for each in place.office.registry.devices("shop")] == ["ada"]
    assert place.history() == history
    assert databases.rename(place.office, ROOT, "shop", "store").devices == 1


@pytest.mark.parametrize("identity", ["", "..", "../shop.entidb", "shop.entidb.1", "shop.entidb"])
def test_only_what_was_deleted_is_taken_back(place: Place, identity: str):
    place.history()
    with pytest.raises(PermissionDeniedError):
        databases.take_back(place.office, ROOT, identity)


def test_what_was_made_or_taken_back_and_cannot_be_looked_at_is_said_to_be_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    def full(*given: object, **named: object) -> None:
        raise StorageFullError("the disk is full")

    history = place.history()
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    with monkeypatch.context() as broken:
        broken.setattr(place.server.stores, "using", full)
        broken.setattr(place.server.stores, "looking", full)
        assert databases.take_back(place.office, ROOT, aside.id).name == "shop"
        assert databases.create(place.office, ROOT, "store").name == "store"
        with pytest.raises(StorageFullError):
            databases.row(place.office, ROOT, "shop")
    assert place.history() == history
    assert databases.all_aside(place.office, ROOT) == []


def test_a_taken_back_database_does_not_replace_another(place: Place):
    place.history()
    aside = databases.delete(place.office, ROOT, "shop", "shop")
    place.history()
    with pytest.raises(ConfigError) as caught:
        databases.take_back(place.office, ROOT, aside.id)
    assert caught.value.code == "exists"
    assert len(databases.all_aside(place.office, ROOT)) == 1


def test_a_link_that_was_deleted_leaves_what_it_leads_to(place: Place, tmp_path: Path):
    place.history()
    place.clock.advance(1000)
    place.server.housekeep()
    elsewhere = tmp_path / "elsewhere"
    (place.root / "shop.entidb").rename(elsewhere)
    (place.root / "shop.entidb").symlink_to(elsewhere)
    databases.delete(place.office, ROOT, "shop", "shop")
    place.clock.advance(DAY_S)
    place.server.housekeep()
    assert databases.all_aside(place.office, ROOT) == []
    assert (elsewhere / "data.mdb").exists()


def test_a_database_in_use_is_not_taken_away(place: Place, monkeypatch: pytest.MonkeyPatch):
    place.history()
    monkeypatch.setattr(databases, "WAIT_S", 0.0)
    with place.server.stores.using("shop", create=False), pytest.raises(ServerBusyError):
        databases.delete(place.office, ROOT, "shop", "shop")
    assert place.history()
    place.server.database("shop")
    with pytest.raises(ServerBusyError):
        databases.rename(place.office, ROOT, "shop", "store")
    assert place.log()[-1] == ("rename", "shop", "busy")


def test_nobody_opens_a_database_that_is_kept_closed(place: Place):
    place.history()
    with place.server.stores.closed("shop", 1.0):
        refused = place.push(b"h" * 16, 1)
        assert isinstance(refused, ErrorResponse)
        assert refused.code == "busy"
        with pytest.raises(ServerBusyError), place.server.stores.closed("shop", 1.0):
            pass
        assert place.history("another")
    assert place.history()


def test_a_server_in_memory_has_no_files_to_rename():
    with SyncServer.in_memory() as server:
        server.database("shop")
        office = office_of(server)
        assert [each.name for each in databases.rows(office, ROOT)] == ["shop"]
        with pytest.raises(ServerError) as caught:
            databases.rename(office, ROOT, "shop", "store")
        assert caught.value.code == "not_on_disk"


# ---------------------------------------------------------------- devices and keys


def test_a_device_shows_how_far_it_is_behind_and_whether_it_is_revoked(place: Place):
    history = place.history()
    place.push(history, 1, 2, 3)
    registry = place.office.registry
    registry.heard(pull(history, cursor=1), Grants("ada", {}, {"jti": "t1"}), code="busy")
    registry.pulled(pull(history, cursor=1), 1)
    (row,) = access.devices(place.office, ROOT, "shop")
    assert (row.device.device_id, row.device.subject, row.behind) == (DEVICE.hex(), "ada", 2)
    assert (row.device.error, row.revoked) == ("busy", False)
    for kind, name in (("device", DEVICE.hex()), ("subject", "ada"), ("token", "t1")):
        access.revoke(place.office, ROOT, kind, name)  # type: ignore[arg-type]
        assert access.devices(place.office, ROOT, "shop")[0].revoked
        assert access.allow(place.office, ROOT, kind, name)  # type: ignore[arg-type]
    assert not access.devices(place.office, ROOT, "shop")[0].revoked


@pytest.mark.parametrize("name", ["", "aa", "G" * 32, "AA" * 16, "aa" * 17])
def test_what_is_no_device_id_is_not_revoked(place: Place, name: str):
    with pytest.raises(ConfigError):
        access.revoke(place.office, ROOT, "device", name)
    assert access.revoked(place.office, ROOT) == []


def test_keys_are_listed_without_the_keys(tmp_path: Path):
    (tmp_path / "keys").mkdir(mode=0o700)
    (tmp_path / "keys" / "one.secret").write_bytes(SECRET)
    (tmp_path / "keys" / "one.ends").write_text("2040-01-01")
    with SyncServer(ServerConfig(data_dir=None, jwt_keys=tmp_path / "keys")) as server:
        office = office_of(server)
        (row,) = access.keys(office, ROOT)
        assert (row.kid, row.algorithm, row.ends) == ("one", "HS256", 2208988800.0)
        (tmp_path / "keys" / "two.secret").write_bytes(SECRET + b"2")
        assert [each.kid for each in access.reload(office, ROOT)] == ["one", "two"]
        _, data = answer(office, ROOT, "GET", PREFIX + "keys", {}, b"")
        assert SECRET not in data


# ---------------------------------------------------------------- the audit log


def log_of(root: Path | None, **limits: int) -> AuditLog:
    return AuditLog(root, ManualClock())


def test_a_line_says_who_did_what_when_and_from_where(tmp_path: Path):
    log = log_of(tmp_path)
    log.write("ada", "10.0.0.7", "revoke", database="shop", kind="subject", name="eve\n\x1b[31m")
    (line,) = (tmp_path / AUDIT_FILE).read_bytes().splitlines()
    assert json.loads(line) == {
        "time_ms": NOW_MS,
        "who": "ada",
        "where": "10.0.0.7",
        "action": "revoke",
        "database": "shop",
        "details": {"kind": "subject", "name": "eve\n\x1b[31m"},
    }
    assert b"\x1b" not in line
    assert log.newest(10)[0].result == "done"


@POSIX
def test_only_its_owner_may_read_the_log_and_a_link_is_not_written_through(tmp_path: Path):
    before = os.umask(0)
    try:
        log_of(tmp_path).write("ada", "here", "create")
    finally:
        os.umask(before)
    path = tmp_path / AUDIT_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(tmp_path / "elsewhere")
    path.symlink_to("elsewhere")
    size = (tmp_path / "elsewhere").stat().st_size
    with pytest.raises(StorageError):
        log_of(tmp_path).write("ada", "here", "create")
    assert (tmp_path / "elsewhere").stat().st_size == size


@POSIX
def test_what_cannot_be_written_down_is_not_done(place: Place):
    place.history()
    (place.root / AUDIT_FILE).symlink_to("elsewhere")
    with pytest.raises(StorageError, match="audit"):
        databases.delete(place.office, ROOT, "shop", "shop")
    assert place.history()


@POSIX
def test_a_log_that_cannot_be_read_is_not_said_to_be_empty(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    place.history()
    databases.freeze(place.office, ROOT, "shop")

    def refused(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(audit, "open_file", refused)
    status, said = ask_for(place, "GET", "audit")
    assert (status, said["code"]) == (500, "storage_error")
    assert f"{place.root / AUDIT_FILE}: no permission; check owner" in said["message"]


@POSIX
def test_what_was_done_and_is_not_written_down_is_said_to_be_done(
    place: Place, monkeypatch: pytest.MonkeyPatch
):
    """The disk fails between the look at the log and its line."""
    place.history()

    def full(self: object, *args: object, **more: object) -> None:
        raise StorageFullError("writing the audit log: the disk is full")

    monkeypatch.setattr(AuditLog, "write", full)
    with pytest.raises(
        StorageFullError, match=r"this was done \(freeze\), and cannot be"
    ) as raised:
        databases.freeze(place.office, ROOT, "shop")
    assert raised.value.code == "storage_full"
    assert place.office.control.is_frozen("shop")
    # Of a task it is not known yet what becomes of it.
    with pytest.raises(StorageFullError, match=r"this was begun \(verify\), and cannot be"):
        care.verify(place.office, ROOT, "shop")
    assert [task.kind for task in place.office.tasks.all()] == ["verify"]


@POSIX
def test_why_something_was_not_done_is_not_hidden_by_a_log_that_cannot_be_written(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    place.history()

    def full(self: object, *args: object, **more: object) -> None:
        raise StorageFullError("writing the audit log: the disk is full")

    monkeypatch.setattr(AuditLog, "write", full)
    with pytest.raises(PermissionDeniedError, match="no database"):
        databases.delete(place.office, ROOT, "nosuch", "nosuch")
    assert "delete of nosuch, which failed" in caplog.text


def test_a_large_log_is_put_aside_and_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audit, "FILE_BYTES_MAX", 2000)
    log = log_of(tmp_path)
    for number in range(100):
        log.write("ada", "here", "create", database=str(number))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert (
        names
        == sorted([AUDIT_FILE, *(f"{AUDIT_FILE}.{n}" for n in range(1, audit.FILES_KEPT + 1))])
        or AUDIT_FILE not in names
    )
    found = [each.database for each in log.newest(20)]
    assert found == [str(number) for number in range(99, 79, -1)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2200 * 5


def test_a_line_that_is_cut_short_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    log = log_of(tmp_path)
    log.write("ada", "here", "create")
    with (tmp_path / AUDIT_FILE).open("ab") as file:
        file.write(b'{"time_ms": 7\n')
    log.write("ada", "here", "delete")
    assert [each.action for each in log.newest(10)] == ["delete", "create"]
    assert "not of an audit log" in caplog.text


def test_a_line_for_which_there_is_no_room_is_not_written_down_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A disk that becomes full takes a part of what is written, and says so by a number."""
    log = log_of(tmp_path)
    log.write("ada", "here", "create")
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(StorageError, match="audit log"):
            log.write("ada", "here", "freeze")
    log.write("ada", "here", "delete")
    assert [each.action for each in log.newest(10)] == ["delete", "create"]
    assert "not of an audit log" in caplog.text


def test_refused_logins_are_counted_and_not_written_one_by_one(tmp_path: Path):
    log = log_of(tmp_path)
    for number in range(10_000):
        log.refused(None, f"10.0.{number % 7}.1", "unauthorized")
    for number in range(5_000):
        log.refused("ada", f"address {number}", "revoked")
    assert not (tmp_path / AUDIT_FILE).exists()
    log.flush()
    found = log.newest(10_000)
    assert len(found) <= 1002
    assert sum(each.count or 0 for each in found) == 15_000
    assert sum(each.count or 0 for each in found if each.result == "revoked") == 5_000
    log.flush()
    assert len(log.newest(10_000)) == len(found)


# ---------------------------------------------------------------- asked by address


def ask_for(place: Place, method: str, path: str, body: Any = None, **query: str) -> Any:
    raw = b"" if body is None else json.dumps(body).encode()
    status, data = answer(place.office, ROOT, method, PREFIX + path, query, raw)
    return status, json.loads(data)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "nothing", None, 404, "not_found"),
        ("GET", "databases/a/b/c", None, 404, "not_found"),
        ("PUT", "databases", None, 405, "method_not_allowed"),
        ("GET", "databases/gone", None, 404, "unknown_database"),
        ("GET", "databases/..%2Fx", None, 400, "invalid_name"),
        ("POST", "databases", {"name": 7}, 400, "invalid_message"),
        ("POST", "databases", {}, 400, "invalid_message"),
        ("POST", "databases", [], 400, "invalid_message"),
        ("POST", "databases", {"name": "shop", "nmae": 1}, 400, "invalid_message"),
        ("POST", "revoked", {"kind": "person", "name": "x"}, 400, "invalid_message"),
        ("POST", "revoked", {"kind": "device", "name": "x"}, 400, "invalid_config"),
        ("DELETE", "databases/shop", {"confirm": "x"}, 400, "not_confirmed"),
        ("GET", "tasks/7", None, 404, "not_found"),
        ("GET", "tasks/x", None, 404, "not_found"),
        ("POST", "deleted/x/undelete", None, 404, "unknown_database"),
    ],
)
def test_what_cannot_be_done_has_a_status_and_a_code(
    place: Place, method: str, path: str, body: Any, status: int, code: str
):
    place.history()
    found, said = ask_for(place, method, path, body)
    assert (found, said["code"]) == (status, code)
    assert said["message"]


def test_an_error_of_our_own_says_nothing_of_the_inside(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(databases, "rows", fails)
    status, said = ask_for(place, "GET", "databases")
    assert (status, said["code"]) == (500, "internal")
    assert "secret" not in said["message"]
    assert "secret inside" in caplog.text


@pytest.mark.parametrize("limit", ["0", "-1", "x", "10001", "1e3"])
def test_a_limit_is_a_number_within_bounds(place: Place, limit: str):
    assert ask_for(place, "GET", "audit", limit=limit)[0] == 400


def test_the_document_describes_the_routes_and_no_others():
    found = document()
    described = {(method.upper(), path) for path, each in found["paths"].items() for method in each}
    assert described == {(route.method, PREFIX + route.path) for route in ROUTES}
    operations = [each for place in found["paths"].values() for each in place.values()]
    assert len({each["operationId"] for each in operations}) == len(operations)
    schemas = found["components"]["schemas"]
    for reference in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found)):
        assert reference in schemas
    for (_, path), operation in zip(
        ((m, p) for p, each in found["paths"].items() for m in each), operations, strict=True
    ):
        named = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
        assert named == set(re.findall(r"\{(\w+)\}", path))


def test_every_answer_is_of_the_shape_that_the_document_says(place: Place):
    """Each route that needs no more than what is here is asked, and its answer decoded."""
    import msgspec

    place.push(place.history(), 1)
    place.office.registry.heard(handshake(), Grants("ada", {}), code=None)
    bodies: dict[tuple[str, str], Any] = {
        ("POST", "databases"): {"name": "new"},
        ("POST", "databases/{name}/freeze"): {"reason": "x"},
        ("POST", "databases/{name}/rename"): {"to": "store"},
        ("POST", "databases/{name}/erase/preview"): {"collections": {"notes": {"name": "ada"}}},
        ("DELETE", "databases/{name}"): {"confirm": "store"},
        ("POST", "revoked"): {"kind": "subject", "name": "eve"},
        ("DELETE", "revoked"): {"kind": "subject", "name": "eve"},
    }
    name, seen = "shop", 0
    routes = sorted(ROUTES, key=lambda each: (each.method == "DELETE", "rename" in each.path))
    for route in routes:
        if "{id}" in route.path or route.path.endswith(("/restore", "/erase")):
            continue
        name = "store" if route.method == "DELETE" else "shop"
        path = route.path.replace("{name}", name)
        query = {"collection": "notes"} if "collection" in route.texts else {}
        body = bodies.get((route.method, route.path))
        status, said = ask_for(place, route.method, path, body, **query)
        assert status == 200, (route.path, said)
        msgspec.convert(said, route.gives)
        for task in place.office.tasks.all():
            place.office.tasks.wait(task.id, 60)
        seen += 1
    assert seen >= 14


# ---------------------------------------------------------------- over the network


@pytest.fixture
def secret_config(tmp_path: Path) -> ServerConfig:
    (tmp_path / "secret").write_bytes(SECRET)
    return ServerConfig(data_dir=tmp_path / "data", jwt_secret_file=tmp_path / "secret")


def admin_token(**claims: Any) -> str:
    return mint_token(SECRET, subject="ada", databases={}, claims={"admin": True, **claims})


@pytest.mark.process
def test_an_administrator_over_the_network_needs_a_token_that_says_so(secret_config: ServerConfig):
    path = PREFIX + "databases"
    plain = mint_token(SECRET, subject="eve", databases={"*": "rw"})
    with SyncServer(secret_config) as server, serving(server) as url:
        for token, status in ((None, 401), ("rubbish", 401), (plain, 403), (admin_token(), 200)):
            with Client(url, token) as client:
                answer = client.request("GET", path)
                assert answer.status == status
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers["cache-control"] == "no-store"
        with Client(url, admin_token()) as client:
            made = client.request(
                "POST", path, b'{"name": "shop"}', content_type="application/json"
            )
            assert (made.status, json.loads(made.body)["name"]) == (200, "shop")
            # What a page of another origin may send without asking first.
            for other in ("text/plain", "application/x-www-form-urlencoded"):
                refused = client.request("POST", path, b'{"name": "x"}', content_type=other)
                assert refused.status == 415
            assert client.request("POST", path + "/shop/freeze").status == 415
            large = b'{"name": "' + b"x" * 70_000 + b'"}'
            assert (
                client.request("POST", path, large, content_type="application/json").status == 413
            )
            found = client.request("GET", PREFIX + "openapi.json")
            assert json.loads(found.body) == document()
        found_log = office_of(server).audit.newest(100)
    said = {(each.action, each.result, each.who, each.count) for each in found_log}
    assert ("login", "unauthorized", "", 2) in said
    assert ("login", "forbidden", "eve", 1) in said
    assert ("create", "done", "ada", None) in said
    assert {each.where for each in found_log} == {"127.0.0.1"}


@pytest.mark.process
def test_a_revoked_administrator_is_none(secret_config: ServerConfig):
    with SyncServer(secret_config) as server, serving(server) as url:
        with Client(url, admin_token(jti="t1")) as client:
            assert client.request("GET", PREFIX + "databases").status == 200
            access.revoke(office_of(server), ROOT, "token", "t1")
            assert client.request("GET", PREFIX + "databases").status == 403
        with Client(url, admin_token(jti="t2")) as client:
            assert client.request("GET", PREFIX + "databases").status == 200


@pytest.mark.process
def test_no_token_and_no_key_stands_in_the_audit_log(secret_config: ServerConfig, tmp_path: Path):
    token = admin_token()
    with SyncServer(secret_config) as server, serving(server) as url:
        with Client(url, token) as client:
            client.request("POST", PREFIX + "keys/reload", content_type="application/json")
        with Client(url, token + "x") as client:
            client.request("GET", PREFIX + "databases")
    written = (tmp_path / "data" / AUDIT_FILE).read_text()
    assert "reload" in written
    assert token.rpartition(".")[2] not in written
    assert SECRET.decode() not in written


@pytest.mark.process
def test_pages_of_others_get_nothing_from_a_server_without_tokens(tmp_path: Path):
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with serving(config) as url, Client(url) as client:
        path = PREFIX + "databases"
        assert client.request("GET", path).status == 200
        assert client.request("GET", path, origin="https://evil.example").status == 403
        assert client.request("GET", path, host="evil.example").status == 403


# ---------------------------------------------------------------- beside the server


@POSIX
@pytest.mark.process
def test_the_socket_is_for_the_owner_alone_and_goes_with_the_server(tmp_path: Path):
    data = tmp_path / "data"
    before = os.umask(0)
    try:
        with serving(ServerConfig(data_dir=data, insecure_no_auth=True)):
            mode = (data / SOCKET).lstat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            found = ask(str(data), LocalRequest("GET", PREFIX + "databases"))
            assert (found.status, bytes(found.body)) == (200, b"[]")
    finally:
        os.umask(before)
    assert not (data / SOCKET).exists()
    with pytest.raises(OSError):
        ask(str(data), LocalRequest("GET", PREFIX + "databases"))


@POSIX
@pytest.mark.process
def test_a_socket_of_a_dead_server_is_in_nobodys_way(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(data / SOCKET))
    with serving(ServerConfig(data_dir=data, insecure_no_auth=True)):
        assert ask(str(data), LocalRequest("GET", PREFIX + "tasks")).status == 200


@POSIX
@pytest.mark.process
def test_a_long_path_and_a_file_in_the_way_stop_no_server(tmp_path: Path):
    data = tmp_path / ("x" * 120) / "data"
    with serving(ServerConfig(data_dir=data, insecure_no_auth=True)):
        assert ask(str(data), LocalRequest("GET", PREFIX + "tasks")).status == 200
    (data / SOCKET).write_text("not a socket")
    with serving(ServerConfig(data_dir=data, insecure_no_auth=True)) as url, Client(url) as client:
        assert client.history()
    assert (data / SOCKET).read_text() == "not a socket"


@POSIX
@pytest.mark.process
@pytest.mark.parametrize("line", [b"", b"\n", b"{}\n", b"[]\n", b"\xff\n", b"GET / HTTP/1.1\r\n"])
def test_rubbish_on_the_socket_is_refused_and_the_next_is_answered(tmp_path: Path, line: bytes):
    data = tmp_path / "data"
    with serving(ServerConfig(data_dir=data, insecure_no_auth=True)):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(data / SOCKET))
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            said = connection.makefile("rb").readline()
        assert said == b"" or json.loads(said)["status"] == 400
        assert ask(str(data), LocalRequest("GET", PREFIX + "tasks")).status == 200


# ---------------------------------------------------------------- tasks


def test_tasks_run_one_at_a_time_and_can_be_cancelled(place: Place):
    tasks, running = place.office.tasks, []

    def body(progress: Any) -> dict[str, Any]:
        running.append(progress)
        while True:
            progress.at("counting", 1, 2)
            time.sleep(0.001)

    first = tasks.add("count", "ada", "shop", body)
    second = tasks.add("count", "ada", "shop", body)
    while (now := tasks.find(first.id)) is None or now.step != "counting":
        time.sleep(0.001)
    time.sleep(0.05)
    states = {each.id: each.state for each in tasks.all()}
    assert states == {first.id: "running", second.id: "waiting"}
    assert tasks.is_due("count", "shop")
    status, said = ask_for(place, "POST", f"tasks/{second.id}/cancel")
    assert (status, said) == (200, {"changed": True})
    assert tasks.cancel(first.id)
    found = tasks.wait(first.id, 30)
    assert found is not None
    assert (found.state, found.step, found.done, found.total) == ("cancelled", "counting", 1, 2)
    assert len(running) == 1
    assert not tasks.cancel(first.id)
    assert not tasks.is_due("count", "shop")


def test_a_task_that_fails_says_why_and_the_next_one_runs(place: Place):
    def fails(progress: Any) -> dict[str, Any]:
        raise StorageError("the disk is full")

    def breaks(progress: Any) -> dict[str, Any]:
        raise RuntimeError("a secret")

    def ends(progress: Any) -> dict[str, Any]:
        sys.exit(3)  # as a hook does that is called below a task

    one = place.office.tasks.add("x", "ada", None, fails)
    two = place.office.tasks.add("x", "ada", None, breaks)
    end = place.office.tasks.add("x", "ada", None, ends)
    three = place.office.tasks.add("x", "ada", None, lambda progress: {"n": 7})
    for task, state, error in (
        (one, "failed", "the disk is full"),
        (two, "failed", "internal error: RuntimeError"),
        (end, "failed", "internal error: SystemExit"),
        (three, "done", None),
    ):
        found = place.office.tasks.wait(task.id, 30)
        assert found is not None
        assert (found.state, found.error) == (state, error)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError(errno.EIO, "Input/output error", "/srv/shop.entidb/data.mdb"),
            "restore of shop (/srv/shop.entidb/data.mdb): the disk reports an input/output error",
        ),
        (OSError(errno.ENOSPC, "No space left"), "restore of shop: the disk is full; free space"),
        (TimeoutError("the socket was slow"), "restore of shop: the socket was slow"),
    ],
)
def test_a_task_that_the_system_stops_names_the_thing_and_no_number(
    place: Place, error: OSError, says: str
):
    def fails(progress: Any) -> dict[str, Any]:
        raise error

    task = place.office.tasks.add("restore", "ada", "shop", fails)
    found = place.office.tasks.wait(task.id, 30)
    assert found is not None and found.error is not None
    assert found.error.startswith(says) and "Errno" not in found.error


def test_a_server_that_ends_ends_its_tasks(tmp_path: Path):
    made = Place(tmp_path)
    started = []

    def body(progress: Any) -> dict[str, Any]:
        started.append(1)
        while True:
            progress.at("x")
            time.sleep(0.001)

    made.office.tasks.add("x", "ada", None, body)
    while not started:
        time.sleep(0.001)
    made.server.close()
    with pytest.raises(EntiDBError):
        made.office.tasks.add("x", "ada", None, body)


def test_a_name_in_an_address_is_decoded_once(tmp_path: Path):
    """What decodes twice gives an address a meaning that a proxy in front of it has not seen."""
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        client.send(handshake())
        assert client.request("GET", "/v1/admin/databases/shop").status == 200
        twice = client.request("GET", "/v1/admin/databases/%2573hop")
        assert (twice.status, json.loads(twice.body)["code"]) == (400, "invalid_name")
        assert client.request("GET", "/v1/admin/%256fverview").status == 404


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=5&limit=6", "names a parameter twice"),
        ("limt=5", "takes no parameter 'limt'"),
        ("since=5", "takes no parameter 'since'"),
    ],
)
def test_a_parameter_that_would_be_passed_over_is_refused(tmp_path: Path, query: str, said: str):
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        client.send(handshake())
        devices = "/v1/admin/databases/shop/devices"
        assert client.request("GET", f"{devices}?limit=5").status == 200
        refused = client.request("GET", f"{devices}?{query}")
        assert refused.status == 400 and said in json.loads(refused.body)["message"]
