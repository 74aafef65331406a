"""What an administrator has decided holds at once, for every way to ask, and after a restart."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.errors import ConfigError, PermissionDeniedError, ServerBusyError, StorageFullError
from entidb.protocol import ErrorResponse, PullResponse, PushResponse, Verdict
from entidb.server import ServerConfig, SyncServer, mint_token, serving
from entidb.server.auth import Grants, Rights
from entidb.server.control import CONTROL_FILE, Control, Frozen, Revoked
from entidb.server.records import FileRecords
from entidb.sync import LoopbackClient, SyncConfig, SyncEngine
from entidb.sync.http import HttpTransport
from entidb.types import SystemClock
from tests.server.support import (
    DEVICE,
    NOW_MS,
    SECRET,
    Client,
    ManualClock,
    handshake,
    pull,
    push,
)

ADA = Grants("ada", {"*": Rights(read=True, write=True)}, {"jti": "t1"})
BOB = Grants("bob", {"*": Rights(read=True, write=True)}, {"jti": "t2"})
POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


def entry(kind: Any, name: str, **fields: Any) -> Revoked:
    return Revoked(kind=kind, name=name, since_ms=NOW_MS, by="root", **fields)


@pytest.fixture(params=["disk", "memory"])
def control(request: pytest.FixtureRequest, tmp_path: Path) -> Control:
    return Control(tmp_path if request.param == "disk" else None, ManualClock())


def refused(control: Control, who: Grants, db_id: str = "shop") -> bool:
    try:
        control.admit(who, handshake(db_id))
    except PermissionDeniedError as error:
        return (error.code, error.details) == ("forbidden", {"reason": "revoked"})
    return False


@pytest.mark.parametrize(
    ("kind", "name"), [("subject", "ada"), ("token", "t1"), ("device", DEVICE.hex())]
)
def test_who_is_revoked_is_refused_and_allowed_again(control: Control, kind: Any, name: str):
    assert not refused(control, ADA)
    control.revoke(entry(kind, name))
    assert refused(control, ADA)
    assert refused(control, BOB) is (kind == "device")
    assert control.allow(kind, name)
    assert not control.allow(kind, name)
    assert not refused(control, ADA)


def test_a_kind_is_not_taken_for_another(control: Control):
    control.revoke(entry("token", "ada"))
    control.revoke(entry("subject", "t1"))
    control.revoke(entry("device", "ada"))
    assert not refused(control, ADA)


def test_a_device_can_be_revoked_for_one_database(control: Control):
    control.revoke(entry("device", DEVICE.hex(), db_id="shop"))
    assert refused(control, ADA, "shop")
    assert not refused(control, ADA, "catalog")


def test_an_entry_ends_with_the_token_it_was_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("entidb.server.control.REVOKED_MAX", 2)
    clock = ManualClock()
    control = Control(tmp_path, clock)
    control.revoke(entry("token", "t1", until_ms=NOW_MS + 1000))
    assert refused(control, ADA)
    clock.advance(1)
    assert not refused(control, ADA)
    assert control.revoked() == []
    for name in ("eve", "mallory"):
        control.revoke(entry("subject", name))
    assert [each.name for each in control.decided.revoked] == ["eve", "mallory"]
    with pytest.raises(ConfigError, match="2 entries"):
        control.revoke(entry("subject", "trent"))


def test_a_clock_that_was_wrong_for_a_while_lets_nobody_in(tmp_path: Path):
    clock = ManualClock()
    control = Control(tmp_path, clock)
    control.revoke(entry("token", "t1", until_ms=NOW_MS + 1000))
    clock.advance(75 * 365 * 86400)
    control.revoke(entry("subject", "eve"))
    clock.advance(-75 * 365 * 86400)
    assert refused(control, ADA)
    assert refused(Control(tmp_path, clock), ADA)


def test_who_is_revoked_again_is_so_until_the_later_end(control: Control):
    control.revoke(entry("token", "t1", until_ms=NOW_MS + 1000))
    control.revoke(entry("token", "t1", until_ms=NOW_MS + 500))
    assert [each.until_ms for each in control.revoked()] == [NOW_MS + 1000]
    control.revoke(entry("token", "t1", until_ms=NOW_MS + 2000))
    assert [each.until_ms for each in control.revoked()] == [NOW_MS + 2000]
    control.revoke(entry("token", "t1"))
    control.revoke(entry("token", "t1", until_ms=NOW_MS + 9000))
    assert [each.until_ms for each in control.revoked()] == [None]


def test_who_is_revoked_twice_is_so_since_the_first_time(control: Control):
    control.revoke(entry("subject", "ada", reason="left"))
    control.revoke(Revoked(kind="subject", name="ada", since_ms=NOW_MS + 9, by="eve"))
    (kept,) = control.decided.revoked
    assert (kept.since_ms, kept.by, kept.reason) == (NOW_MS, "root", "left")


def test_a_frozen_database_is_read_and_takes_no_pushes(control: Control):
    assert control.freeze("shop", Frozen(NOW_MS, "root"))
    assert not control.freeze("shop", Frozen(NOW_MS, "eve"))
    control.admit(ADA, pull(b"h" * 16))
    control.admit(ADA, push(b"h" * 16, 1, db_id="catalog"))
    with pytest.raises(ServerBusyError) as caught:
        control.admit(ADA, push(b"h" * 16, 1))
    assert caught.value.details == {"reason": "frozen"}
    assert control.freeze("shop", None)
    control.admit(ADA, push(b"h" * 16, 1))


def test_what_is_decided_goes_with_a_database_to_its_new_name(control: Control):
    control.freeze("shop", Frozen(NOW_MS, "root"))
    control.revoke(entry("device", "aa", db_id="shop"))
    control.revoke(entry("device", "aa"))
    control.rename("shop", "store")
    assert set(control.decided.frozen) == {"store"}
    assert [each.db_id for each in control.decided.revoked] == ["store", None]
    control.rename("store", None)
    assert not control.decided.frozen
    assert [each.db_id for each in control.decided.revoked] == [None]


def test_what_is_decided_holds_for_both_names_while_a_database_moves(control: Control):
    control.freeze("shop", Frozen(NOW_MS, "root"))
    control.revoke(entry("device", "aa", db_id="shop"))
    for _ in range(2):
        control.carry("shop", "store")
        assert set(control.decided.frozen) == {"shop", "store"}
        assert [each.db_id for each in control.decided.revoked] == ["shop", "store"]
    control.rename("shop", None)
    assert set(control.decided.frozen) == {"store"}
    assert [each.db_id for each in control.decided.revoked] == ["store"]


# ---------------------------------------------------------------- the file


def test_on_a_full_disk_nothing_is_decided_and_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    control = Control(tmp_path, ManualClock())
    control.revoke(entry("subject", "ada"))
    monkeypatch.setattr(FileRecords, "change", on_a_full_disk)
    with pytest.raises(StorageFullError, match=CONTROL_FILE):
        control.revoke(entry("subject", "eve"))
    with pytest.raises(StorageFullError, match="the disk is full; free space"):
        control.freeze("shop", Frozen(NOW_MS, "root"))
    for each in (control, Control(tmp_path, ManualClock())):
        assert [entry.name for entry in each.decided.revoked] == ["ada"]
        assert not each.decided.frozen


def on_a_full_disk(*given: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_it_survives_a_restart_and_another_process_sees_it_within_a_second(tmp_path: Path):
    clock = ManualClock()
    one, other = Control(tmp_path, clock), Control(tmp_path, clock)
    one.revoke(entry("subject", "ada"))
    clock.advance(1)
    assert refused(other, ADA)
    assert refused(Control(tmp_path, clock), ADA)


def test_changes_of_two_processes_do_not_lose_each_other(tmp_path: Path):
    controls = [Control(tmp_path, SystemClock()) for _ in range(2)]

    def revoke(number: int) -> None:
        controls[number % 2].revoke(entry("subject", str(number)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(revoke, range(20)))
    found = Control(tmp_path, SystemClock()).decided.revoked
    assert sorted(int(each.name) for each in found) == list(range(20))
    assert [path.name for path in tmp_path.iterdir()] == [CONTROL_FILE]


@POSIX
def test_only_its_owner_may_read_it(tmp_path: Path):
    before = os.umask(0)
    try:
        Control(tmp_path, ManualClock()).revoke(entry("subject", "ada"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / CONTROL_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"revoked": 7}', b'{"version": 2}', b"\xff"]
)
def test_a_server_that_cannot_read_who_is_revoked_does_not_start(tmp_path: Path, content: bytes):
    (tmp_path / CONTROL_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="who is revoked"):
        SyncServer(ServerConfig(data_dir=tmp_path, insecure_no_auth=True))
    (tmp_path / CONTROL_FILE).unlink()
    SyncServer(ServerConfig(data_dir=tmp_path, insecure_no_auth=True)).close()


@POSIX
def test_a_link_in_its_place_is_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / CONTROL_FILE).symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        Control(tmp_path, ManualClock())


def test_a_file_that_is_damaged_while_it_is_served_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    clock = ManualClock()
    control = Control(tmp_path, clock)
    control.revoke(entry("subject", "ada"))
    (tmp_path / CONTROL_FILE).write_bytes(b"{")
    clock.advance(1)
    assert refused(control, ADA)
    assert "the last state stays" in caplog.text


# ---------------------------------------------------------------- through a server


def test_a_server_in_process_refuses_every_kind_of_request():
    with SyncServer.in_memory() as server:
        history = server.database("shop").history
        assert history is not None
        server.front.control.revoke(entry("device", DEVICE.hex()))
        for path, request in (
            ("/v1/handshake", handshake()),
            ("/v1/pull", pull(history)),
            ("/v1/push", push(history, 1)),
        ):
            answer = server.handle(path, None, request)
            assert isinstance(answer, ErrorResponse)
            assert (answer.code, answer.details) == ("forbidden", {"reason": "revoked"})
            assert not answer.retryable
        assert server.database("shop").read_head().sequence == 0


@pytest.mark.process
def test_a_kept_connection_and_a_checked_token_do_not_outlive_a_revocation(tmp_path: Path):
    (tmp_path / "secret").write_bytes(SECRET)
    config = ServerConfig(data_dir=tmp_path / "data", jwt_secret_file=tmp_path / "secret")
    token = mint_token(SECRET, subject="ada", databases=["shop"])
    with SyncServer(config) as server, serving(server) as url, Client(url, token) as client:
        history = client.history()
        assert client.send(push(history, 1)).status == 200
        # As another process would: this one reads it from the disk.
        Control(tmp_path / "data", SystemClock()).revoke(entry("subject", "ada"))
        began = time.monotonic()
        while (answer := client.send(pull(history))).status == 200:
            assert time.monotonic() - began < 10
            time.sleep(0.02)
        assert answer.error.details == {"reason": "revoked"}
        assert client.send(push(history, 2)).status == 403


def test_a_page_that_waited_for_its_turn_is_not_given_to_who_was_revoked_meanwhile():
    with SyncServer.in_memory() as server:
        server.database("shop").collection("notes")[uuid.uuid4()] = {"a": 1}
        front = server.front
        history = server.database("shop").history
        assert history is not None
        request = pull(history)
        grant = front.permit(request, ADA)
        with front.using(request, grant) as store:
            assert front.page(store, request, grant)
            front.control.revoke(entry("token", "t1"))
            with pytest.raises(PermissionDeniedError):
                front.page(store, request, grant)


# ---------------------------------------------------------------- at the device


class Pair:
    """A server and a device of it, in process."""

    def __init__(self, **settings: Any) -> None:
        self.server = SyncServer.in_memory()
        self.database = Database.in_memory()
        config = SyncConfig(db_id="shop", **settings)
        client = LoopbackClient(self.server)
        transport = HttpTransport("http://localhost", config=config, client=client)
        self.engine = SyncEngine(config, transport, self.database)
        self.notes = self.database.collection("notes")
        self.device = self.database.device_id.hex()

    def close(self) -> None:
        self.engine.close()
        self.database.close()
        self.server.close()


@pytest.fixture
def pair() -> Any:
    made = Pair()
    yield made
    made.close()


def test_a_revoked_device_keeps_its_work_says_so_and_goes_on_when_it_is_allowed_again(pair: Pair):
    pair.notes[uuid.uuid4()] = {"n": 1}
    pair.engine.sync()
    pair.server.front.control.revoke(entry("device", pair.device))
    pair.notes[uuid.uuid4()] = {"n": 2}
    with pytest.raises(PermissionDeniedError) as caught:
        pair.engine.sync()
    assert caught.value.code == "revoked"
    assert not caught.value.retryable
    status = pair.engine.status()
    assert (status.last_error_code, status.pending, status.discarded) == ("revoked", 1, 0)
    assert len(pair.notes) == 2
    pair.server.front.control.allow("device", pair.device)
    assert pair.engine.sync().pushed == 1
    assert pair.engine.status().pending == 0


def test_a_device_that_is_revoked_between_its_pull_and_its_push_withdraws_nothing(pair: Pair):
    pair.engine.sync()
    pair.notes[uuid.uuid4()] = {"n": 1}
    control, real = pair.server.front.control, pair.server.handle_http

    def handle(method: str, path: str, headers: Any, body: bytes) -> Any:
        if path in ("/v1/push", "/v1/sync"):
            control.revoke(entry("device", pair.device))
        answer = real(method, path, headers, body)
        control.allow("device", pair.device)
        return answer

    pair.server.handle_http = handle  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(PermissionDeniedError) as caught:
            pair.engine.sync()
        assert caught.value.code == "revoked"
    status = pair.engine.status()
    assert (status.pending, status.discarded) == (1, 0)


def test_a_revoked_device_does_not_ask_again_at_every_turn(pair: Pair):
    asked = []
    real = pair.server.handle_http

    def handle(method: str, path: str, headers: Any, body: bytes) -> Any:
        asked.append(path)
        return real(method, path, headers, body)

    pair.server.handle_http = handle  # type: ignore[method-assign]
    pair.engine.config = SyncConfig(db_id="shop", interval_s=0.01)
    pair.server.front.control.revoke(entry("device", pair.device))
    told = threading.Event()
    pair.engine.on_state(lambda old, new: told.set() if new.value == "error" else None)
    pair.engine.start()
    assert told.wait(30)
    time.sleep(0.3)
    assert len(asked) == 1
    pair.server.front.control.allow("device", pair.device)
    pair.engine.wake()
    deadline = time.monotonic() + 30
    while pair.engine.status().last_error_code is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair.engine.stop()


def test_a_push_to_a_frozen_database_waits_and_pulls_go_on(pair: Pair):
    pair.engine.sync()
    pair.server.front.control.freeze("shop", Frozen(NOW_MS, "root"))
    pair.server.database("shop").collection("notes")[uuid.uuid4()] = {"from": "server"}
    pair.notes[uuid.uuid4()] = {"from": "device"}
    began = time.monotonic()
    with pytest.raises(ServerBusyError) as caught:
        pair.engine.sync()
    assert caught.value.code == "frozen"
    assert time.monotonic() - began < 20  # it does not wait for the thaw inside ``sync``
    assert len(pair.notes) == 2
    assert pair.engine.status().pending == 1
    pair.server.front.control.freeze("shop", None)
    assert pair.engine.sync().pushed == 1


def test_a_pull_of_a_frozen_database_is_answered_over_and_over(pair: Pair):
    pair.server.front.control.freeze("shop", Frozen(NOW_MS, "root"))
    answer = pair.server.handle("/v1/handshake", None, handshake())
    history = getattr(answer, "history")  # noqa: B009
    assert isinstance(pair.server.handle("/v1/pull", None, pull(history)), PullResponse)
    pair.server.front.control.freeze("shop", None)
    pushed = pair.server.handle("/v1/push", None, push(history, 1))
    assert isinstance(pushed, PushResponse)
    assert pushed.results[0].verdict == Verdict.ACCEPTED
