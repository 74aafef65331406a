"""A database's name that is not the one it should be, on a device that knows another."""

from __future__ import annotations

from typing import Any

import pytest

from entidb import Database, SyncConfig, SyncEngine
from entidb.errors import ConfigError, HistoryChangedError, PermissionDeniedError
from entidb.server import ServerConfig, SyncServer
from entidb.sync import HttpTransport, LoopbackClient, RetryConfig
from tests.server.support import handshake, pull, push
from tests.support import uid


def sync(server: SyncServer, database: Database, db_id: str, reset: Any = None) -> None:
    transport = HttpTransport("http://localhost", client=LoopbackClient(server))
    config = SyncConfig(db_id=db_id, retry=RetryConfig.none())
    with SyncEngine(config, transport, database) as engine:
        if reset is not None:
            engine.reset(keep=reset)
        engine.sync()


@pytest.fixture
def device():
    made = Database.in_memory()
    made.collection("notes")[uid(1)] = "x"
    yield made
    made.close()


def test_a_device_of_one_database_is_not_a_device_of_another(device: Database) -> None:
    with SyncServer.in_memory() as server:
        sync(server, device, "shop")
        device.collection("notes")[uid(2)] = "y"
        for _ in range(2):
            with pytest.raises(ConfigError) as caught:
                sync(server, device, "shpo")
            assert "'shop'" in caught.value.message
            assert "'shpo'" in caught.value.message
            assert "reset" not in caught.value.message
            assert server.stores.open_count == 1, "nothing was asked of the server"
        sync(server, device, "shop")
        assert len(server.database("shop").collection("notes")) == 2


def test_a_database_that_is_gone_is_named_and_not_made_by_looking(device: Database) -> None:
    with SyncServer.in_memory() as server:
        sync(server, device, "shop")
    with SyncServer.in_memory() as server:
        for _ in range(2):
            with pytest.raises(HistoryChangedError, match="no database 'shop'"):
                sync(server, device, "shop")
            assert server.stores.open_count == 0
        sync(server, device, "shop", reset="device")
        assert dict(server.database("shop").collection("notes").items()) == {uid(1): "x"}


def test_no_message_that_names_a_history_makes_a_database() -> None:
    with SyncServer.in_memory() as server:
        known = bytes(range(16))
        for path, request in (
            ("/v1/pull", pull(known)),
            ("/v1/push", push(known, 1)),
            ("/v1/handshake", type(handshake())(**{**fields(handshake()), "history": known})),
        ):
            answer: Any = server.handle(path, None, request)
            assert (answer.code, answer.details) == ("history_changed", {})
            assert server.stores.open_count == 0
        server.handle("/v1/handshake", None, handshake())
        assert server.stores.open_count == 1


def fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


def test_a_server_that_makes_none_says_that_there_is_none(device: Database) -> None:
    with SyncServer.in_memory() as server:
        sync(server, device, "shop")
    config = ServerConfig(data_dir=None, insecure_no_auth=True, create_databases=False)
    with SyncServer(config) as server, pytest.raises(PermissionDeniedError, match="no such"):
        sync(server, device, "shop")
