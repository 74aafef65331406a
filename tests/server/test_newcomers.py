"""A quota of devices: who was there is served, who is new waits until there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.errors import ConfigError, PermissionDeniedError, SyncError
from entidb.protocol import ErrorResponse, HandshakeRequest, HandshakeResponse, PushRequest
from entidb.server import ServerConfig, SyncServer, mint_token, serving
from entidb.server.control import Kind, Revoked
from entidb.sync import HttpTransport, SyncConfig, SyncEngine
from entidb.sync.config import RetryConfig
from tests.server.support import SECRET, ManualClock

Serve = Callable[..., SyncServer]
_DAY_S = 24 * 3600.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def serve(tmp_path: Path, clock: ManualClock) -> Iterator[Serve]:
    """A server on the same directory each time, with quotas; the one before it is closed."""
    made: list[SyncServer] = []
    (tmp_path / "secret").write_bytes(SECRET)

    def build(**quotas: Any) -> SyncServer:
        for each in made:
            each.close()
        config = ServerConfig(
            data_dir=tmp_path / "data", jwt_secret_file=tmp_path / "secret", **quotas
        )
        made.append(SyncServer(config, clock=clock))
        return made[-1]

    yield build
    for each in made:
        each.close()


def token(subject: str = "ada") -> str:
    return mint_token(SECRET, subject=subject, databases=["shop", "catalog"])


def come(server: SyncServer, number: int, subject: str = "ada", db_id: str = "shop") -> str | None:
    """What a device is told when it shakes hands; None: that it is welcome."""
    request = HandshakeRequest(
        db_id=db_id, device_id=bytes([number]) * 16, history=None, cursor=0, major=1, minor=0
    )
    answer = server.handle("/v1/handshake", token(subject), request)
    if isinstance(answer, HandshakeResponse):
        return None
    assert isinstance(answer, ErrorResponse)
    assert answer.code == "forbidden"
    assert isinstance(answer.details["reason"], str)
    return answer.details["reason"]


def revoke(server: SyncServer, kind: Kind, name: str) -> None:
    server.front.control.revoke(Revoked(kind, name, since_ms=0, by="test", db_id="shop"))


# ---------------------------------------------------------------- who is let in


def test_one_more_than_a_database_may_have_is_refused_and_the_others_go_on(serve: Serve) -> None:
    server = serve(database_devices_max=2)
    assert [come(server, 1), come(server, 2, "eve")] == [None, None]
    assert come(server, 3) == "too_many_devices"
    assert [come(server, 1), come(server, 2, "eve")] == [None, None]
    assert come(server, 3, db_id="catalog") is None


def test_the_devices_of_one_subject_are_counted_in_each_database(serve: Serve) -> None:
    server = serve(subject_devices_max=1)
    assert come(server, 1) is None
    assert come(server, 2) == "too_many_devices"
    assert come(server, 2, "eve") is None
    assert come(server, 3, db_id="catalog") is None


def test_who_was_let_in_is_known_after_a_restart_and_who_was_not_is_not(serve: Serve) -> None:
    server = serve(database_devices_max=1)
    assert [come(server, 1), come(server, 2)] == [None, "too_many_devices"]
    # Killed, and not closed: nothing was written in the background.
    server.registry._books.clear()
    server = serve(database_devices_max=1)
    assert [come(server, 2), come(server, 1)] == ["too_many_devices", None]


def test_devices_of_before_there_was_a_quota_stay_and_nobody_new_comes(serve: Serve) -> None:
    server = serve(database_devices_max=9)
    assert [come(server, number) for number in (1, 2, 3)] == [None] * 3
    server = serve(database_devices_max=2)
    assert [come(server, number) for number in (1, 2, 3)] == [None] * 3
    assert come(server, 4) == "too_many_devices"


@pytest.mark.parametrize(("kind", "name"), [("device", "01" * 16), ("subject", "ada")])
def test_what_is_revoked_makes_room(serve: Serve, kind: Kind, name: str) -> None:
    server = serve(database_devices_max=1)
    assert [come(server, 1), come(server, 2, "eve")] == [None, "too_many_devices"]
    revoke(server, kind, name)
    assert [come(server, 2, "eve"), come(server, 1)] == [None, "revoked"]


def test_who_was_not_seen_for_long_makes_room(serve: Serve, clock: ManualClock) -> None:
    server = serve(database_devices_max=1, tombstone_retention_days=7)
    assert come(server, 1) is None
    clock.advance(6 * _DAY_S)
    assert come(server, 2) == "too_many_devices"
    clock.advance(2 * _DAY_S)
    assert [come(server, 2), come(server, 1)] == [None, "too_many_devices"]


def test_another_process_of_the_server_knows_who_was_let_in(serve: Serve, tmp_path: Path) -> None:
    server = serve(database_devices_max=2)
    assert come(server, 1) is None
    page = tmp_path / "data" / "shop.entidb.devices"
    written = page.read_bytes()
    assert come(server, 2) is None
    assert page.read_bytes() != written  # before the answer
    page.write_bytes(written.replace(b"01" * 16, b"07" * 16))
    # What this process knows is not asked again, and what another has written counts.
    assert [come(server, 1), come(server, 3), come(server, 4)] == [None, None, "too_many_devices"]


def test_a_server_in_memory_counts_too() -> None:
    with SyncServer.in_memory(database_devices_max=1, clock=ManualClock()) as server:
        assert [come(server, 1), come(server, 2)] == [None, "too_many_devices"]


def test_a_quota_is_a_whole_number() -> None:
    with pytest.raises(ConfigError, match="subject_devices_max is a whole number from 0 to 10000"):
        ServerConfig(data_dir=None, insecure_no_auth=True, subject_devices_max=10_001)


def test_a_push_of_who_is_not_let_in_is_told_to_come_again(serve: Serve) -> None:
    server = serve(database_devices_max=1)
    assert come(server, 1) is None
    request = PushRequest(
        db_id="shop",
        device_id=b"\x02" * 16,
        history=b"h" * 16,
        cursor=0,
        collections=["notes"],
        transactions=[],
    )
    answer = server.handle("/v1/push", token(), request)
    # Older devices withdraw what is in a push that is forbidden.
    assert isinstance(answer, ErrorResponse)
    assert (answer.code, answer.details) == ("busy", {"reason": "too_many_devices"})


# ---------------------------------------------------------------- over the network


@pytest.mark.process
def test_a_device_keeps_its_work_and_comes_in_when_there_is_room(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(database_devices_max=1)
    settings = SyncConfig(db_id="shop", retry=RetryConfig.none())
    with (
        serving(server) as url,
        Database.in_memory() as first,
        Database.in_memory() as second,
        HttpTransport(url, token=token()) as one,
        HttpTransport(url, token=token("eve")) as two,
        SyncEngine(settings, one, first) as ada,
        SyncEngine(settings, two, second) as eve,
    ):
        ada.sync()
        second.collection("notes").add("of eve")
        for _ in range(2):  # the second time it is not taken for one that was met
            with pytest.raises(PermissionDeniedError) as caught:
                eve.sync()
            assert caught.value.code == "too_many_devices"
            assert "database_devices_max" in str(caught.value)
        assert not caught.value.retryable
        assert eve.pause_s() == 3600
        assert [row.subject for row in server.registry.devices("shop")] == ["ada"]
        assert eve.status().pending == 1
        revoke(server, "device", first.device_id.hex())
        eve.sync()
        assert eve.status().pending == 0
        with pytest.raises(SyncError):
            ada.sync()
