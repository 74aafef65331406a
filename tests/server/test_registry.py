"""The registry of devices: what it knows, for how long, and that it costs and breaks nothing."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
from msgspec.structs import replace

from entidb.protocol import HandshakeResponse, PullRequest, PushResponse, PushResult, Verdict
from entidb.server import ServerConfig, SyncServer, mint_token, serving
from entidb.server.auth import Grants, Rights
from entidb.server.registry import About, Registry, client_text
from entidb.storage.partial import Partial
from tests.server.support import DEVICE, NOW_MS, SECRET, Client, ManualClock, handshake, pull, push

ADA = Grants("ada", {"*": Rights(read=True, write=True)}, {"jti": "t1"})
HISTORY = b"h" * 16
POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


def answer(*verdicts: Verdict) -> PushResponse:
    return PushResponse(
        results=[PushResult(each) for each in verdicts],
        collections=[],
        head=1,
        time=1,
    )


def asks(number: int) -> PullRequest:
    return replace(pull(HISTORY), device_id=number.to_bytes(16, "big"))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shop.entidb").mkdir()
    return tmp_path


def registry(root: Path | None, clock: ManualClock, **settings: int) -> Registry:
    return Registry(root, clock, retention_days=90, **settings)


def test_a_row_says_who_came_when_and_what_became_of_it(clock: ManualClock):
    book = registry(None, clock)
    book.heard(handshake(), ADA, code=None, client="entidb/0.4.0", bytes_in=10, bytes_out=20)
    clock.advance(5)
    verdicts = answer(Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.CONFLICT, Verdict.REJECTED)
    book.heard(push(HISTORY, 1), ADA, code=None, answer=verdicts, bytes_in=1, bytes_out=2)
    book.pulled(pull(HISTORY), 7)
    clock.advance(5)
    book.heard(pull(HISTORY), ADA, code="reset_required")
    (row,) = book.devices("shop")
    assert (row.device_id, row.subject, row.token) == (DEVICE.hex(), "ada", "t1")
    assert (row.client, row.schema) == ("entidb/0.4.0", None)
    assert (row.first_ms, row.last_ms) == (NOW_MS, NOW_MS + 10_000)
    assert (row.cursor, row.error, row.error_ms) == (7, "reset_required", NOW_MS + 10_000)
    assert (row.accepted, row.conflicts, row.rejected, row.superseded) == (2, 1, 1, 0)
    assert (row.requests, row.bytes_in, row.bytes_out) == (3, 11, 22)


def test_a_device_is_not_behind_what_it_wrote_itself_but_behind_what_others_wrote(
    clock: ManualClock,
):
    book = registry(None, clock)
    book.pulled(pull(HISTORY), 7)
    for versions, cursor in (((8, 0, 9), 9), ((10, 12, 13), 10), ((14,), 10)):
        results = [PushResult(Verdict.ACCEPTED if v else Verdict.CONFLICT, v) for v in versions]
        said = PushResponse(results=results, collections=[], head=versions[-1], time=NOW_MS)
        book.heard(push(HISTORY, 1), ADA, code=None, answer=said)
        (row,) = book.devices("shop")
        assert row.cursor == cursor
    book.pulled(pull(HISTORY), 3)  # it was put back
    assert book.devices("shop")[0].cursor == 3


def test_rows_of_another_database_are_others(clock: ManualClock):
    book = registry(None, clock)
    book.heard(handshake("shop"), ADA, code=None)
    assert book.devices("catalog") == []


def test_it_survives_a_restart_and_processes_add_up_what_they_counted(
    root: Path, clock: ManualClock
):
    one, other = registry(root, clock), registry(root, clock)
    for book in (one, other, one):
        clock.advance(1)
        book.heard(push(HISTORY, 1), ADA, code=None, answer=answer(Verdict.ACCEPTED), bytes_in=5)
        book.flush()
    one.heard(push(HISTORY, 2), ADA, code=None, client="x")  # not written yet
    (row,) = one.devices("shop")
    assert (row.requests, row.accepted, row.client) == (4, 3, "x")
    (row,) = registry(root, clock).devices("shop")
    assert (row.requests, row.accepted, row.bytes_in) == (3, 3, 15)
    assert (row.first_ms, row.last_ms) == (NOW_MS + 1000, NOW_MS + 3000)


def test_the_last_error_is_the_newest_of_all(root: Path, clock: ManualClock):
    one, other = registry(root, clock), registry(root, clock)
    one.heard(handshake(), ADA, code="busy")
    clock.advance(1)
    other.heard(handshake(), ADA, code=None)
    one.flush()
    other.flush()
    (row,) = one.devices("shop")
    assert (row.error, row.error_ms, row.last_ms) == ("busy", NOW_MS, NOW_MS + 1000)


def test_rows_are_bounded_and_those_not_seen_for_longest_go(root: Path, clock: ManualClock):
    book = registry(root, clock, devices_max=10)
    for number in range(100):
        clock.advance(1)
        book.heard(asks(number), ADA, code=None)
        assert len(book.devices("shop")) <= 10
        if number % 30 == 0:
            book.flush()
    found = {int(row.device_id, 16) for row in book.devices("shop")}
    assert found == set(range(90, 100))
    book.flush()
    assert len(registry(root, clock).devices("shop")) == 10


def test_a_device_is_forgotten_after_the_retention(root: Path, clock: ManualClock):
    book = registry(root, clock)
    book.heard(handshake(), ADA, code=None)
    book.flush()
    clock.advance(90 * 24 * 3600)
    assert len(book.devices("shop")) == 1
    clock.advance(1)
    assert book.devices("shop") == []


def test_a_row_of_a_clock_that_was_ahead_is_overtaken_by_what_comes_later(
    root: Path, clock: ManualClock
):
    book = registry(root, clock)
    clock.wrong_ms = 10 * 365 * 24 * 3600 * 1000
    book.heard(pull(HISTORY), ADA, code=None, client="old/1")
    book.heard(asks(7), ADA, code=None)
    book.flush()
    clock.wrong_ms = 0
    clock.advance(1)
    book.heard(pull(HISTORY), ADA, code=None, client="new/2")
    book.pulled(pull(HISTORY), 7)
    for _ in range(2):
        row = next(each for each in book.devices("shop") if each.device_id == DEVICE.hex())
        assert (row.client, row.cursor, row.requests) == ("new/2", 7, 2)
        assert row.last_ms == clock.now_ms()
        book.flush()
    # The other one does not come again, and is forgotten as any is.
    clock.advance(90 * 24 * 3600 + 1)
    assert book.devices("shop") == []


def test_nothing_is_written_for_a_database_that_is_not_there(tmp_path: Path, clock: ManualClock):
    book = registry(tmp_path, clock)
    for name in ("shop", "../shop", "a/b", ""):
        book.heard(handshake(name), ADA, code=None)
    book.flush()
    assert list(tmp_path.iterdir()) == []
    assert book.devices("shop") == []


def test_a_file_that_is_damaged_is_begun_anew(
    root: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    (root / "shop.entidb.devices").write_bytes(b"{cut")
    book = registry(root, clock)
    book.heard(handshake(), ADA, code=None)
    book.flush()
    assert "forgotten" in caplog.text
    assert len(registry(root, clock).devices("shop")) == 1


@POSIX
def test_only_its_owner_may_read_it_and_links_are_not_followed(root: Path, clock: ManualClock):
    book = registry(root, clock)
    book.heard(handshake(), ADA, code=None)
    book.flush()
    path = root / "shop.entidb.devices"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(root / "elsewhere")
    path.symlink_to("elsewhere")
    assert registry(root, clock).devices("shop") == []


def test_what_cannot_be_written_is_kept(
    root: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
):
    book = registry(root, clock)
    book.heard(handshake(), ADA, code=None)
    with Partial(str(root / "shop.entidb.devices"), "change"):
        book.flush()
        assert "not written" in caplog.text
        book.heard(handshake(), ADA, code=None)
    book.flush()
    (row,) = registry(root, clock).devices("shop")
    assert row.requests == 2


def test_what_was_known_of_a_closed_database_stays(root: Path, clock: ManualClock):
    book = registry(root, clock)
    book.note("shop", About(used_ms=NOW_MS, head=7, entities=3))
    assert book.about("shop") == About(used_ms=NOW_MS, head=7, entities=3)
    book.flush()
    again = registry(root, clock)
    again.heard(handshake(), ADA, code=None)
    again.flush()
    assert registry(root, clock).about("shop") == About(used_ms=NOW_MS, head=7, entities=3)


def test_rows_go_with_a_database_to_its_new_name(root: Path, clock: ManualClock):
    book = registry(root, clock)
    book.heard(handshake(), ADA, code=None)
    book.rename("shop", "store")
    (root / "shop.entidb").rename(root / "store.entidb")
    assert book.devices("shop") == []
    assert len(book.devices("store")) == 1
    book.rename("store", None)
    assert book.devices("store") == []


def test_what_a_client_calls_itself_steers_no_terminal():
    assert client_text("entidb/0.4.0") == "entidb/0.4.0"
    assert client_text("x\x1b[31m\n" + "y" * 200) == "x?[31m?" + "y" * 93
    assert client_text(None) is None


# ---------------------------------------------------------------- in a running server


@pytest.mark.process
def test_a_running_server_knows_its_devices_and_remembers_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "secret").write_bytes(SECRET)
    config = ServerConfig(data_dir=tmp_path / "data", jwt_secret_file=tmp_path / "secret")
    claims = {"jti": "its own"}
    token = mint_token(SECRET, subject="ada", databases=["shop"], claims=claims)
    other = mint_token(SECRET, subject="eve", databases=["catalog"])
    with caplog.at_level(logging.WARNING), SyncServer(config) as server, serving(server) as url:
        with Client(url, token) as client:
            agent = {"user_agent": "entidb/9"}
            history = client.send(handshake(), **agent).message(HandshakeResponse).history
            client.send(push(history, 1, 2), **agent)
            (row,) = server.registry.devices("shop")
            assert row.cursor == 2  # nobody else has written
            client.send(pull(history), **agent)
            client.send(pull(history, cursor=2), **agent)
            client.send(pull(b"x" * 16), **agent)
        with Client(url, other) as client:
            assert client.send(handshake("shop")).code == "forbidden"
        with Client(url, None) as client:
            assert client.send(handshake("shop")).code == "unauthorized"
    with SyncServer(config) as server:
        (row,) = server.registry.devices("shop")
        assert (row.subject, row.token, row.client) == ("ada", "its own", "entidb/9")
        assert (row.cursor, row.accepted, row.error) == (2, 2, "history_changed")
        assert row.requests == 5
        assert row.bytes_in > 500
        assert row.bytes_out > 500
    assert caplog.text == ""
