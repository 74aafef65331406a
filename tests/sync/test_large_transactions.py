"""A transaction with more operations than one value may have maps and lists: the limit of a value
is none of the records that EntiDB keeps of a transaction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.db.catalogue import Catalogue, decode_catalogue
from entidb.db.columns import column_order, keep_column_order
from entidb.server import SyncServer
from entidb.sync import HttpTransport, LoopbackClient, RetryConfig, SyncConfig, SyncEngine
from tests.support import assert_sound, uid

COUNT = 200


@pytest.fixture(autouse=True)
def small_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a value had at most 100 maps and lists: a real one of that size takes long."""
    for module in ("encoding", "weight"):
        monkeypatch.setattr(f"entidb.cbor.{module}.VALUE_CONTAINERS_MAX", COUNT // 2)


def engine(server: SyncServer, database: Database, policy: str) -> SyncEngine:
    config = SyncConfig(db_id="shop", retry=RetryConfig.none(), default_policy=policy)
    client = HttpTransport("http://localhost", client=LoopbackClient(server))
    return SyncEngine(config, client, database)


def edit_all(database: Database, value: int) -> None:
    with database.transaction() as tx:
        for number in range(COUNT):
            tx.collection("notes")[uid(number)] = value


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with SyncServer.in_memory(insecure_no_auth=True, create_databases=True) as made:
        yield made


def in_conflict(server: SyncServer, database: Database, policy: str) -> SyncEngine:
    """A device whose one transaction with ``COUNT`` operations meets one newer entity."""
    with Database.in_memory() as other, engine(server, other, "server_wins") as theirs:
        other.collection("notes")[uid(1)] = 1
        theirs.sync()
        device = engine(server, database, policy)
        device.sync()
        other.collection("notes")[uid(1)] = 2
        theirs.sync()
    edit_all(database, 3)
    device.sync()
    return device


def test_a_large_transaction_is_withdrawn_and_committed_again(server: SyncServer) -> None:
    with Database.in_memory() as db, in_conflict(server, db, "server_wins") as device:
        assert dict(db.collection("notes").items()) == {uid(1): 2}
        (discarded,) = device.discarded()
        assert len(discarded.operations) == COUNT
        device.recommit(discarded)
        assert len(db.collection("notes")) == COUNT
        device.sync()
        assert device.status().pending == 0
        assert_sound(db)


def test_a_large_transaction_in_conflict_is_resolved(server: SyncServer) -> None:
    with Database.in_memory() as db, in_conflict(server, db, "manual") as device:
        (conflict,) = device.conflicts()
        device.resolve(conflict, "theirs")
        assert len(device.discarded()) == 1
        assert_sound(db)


def test_a_device_with_a_large_transaction_is_left(server: SyncServer, tmp_path: Path) -> None:
    with Database.in_memory() as db, engine(server, db, "server_wins") as device:
        device.sync()
        edit_all(db, 1)
        assert device.logout("export", file=tmp_path / "left.ndjson") == 1
        assert (tmp_path / "left.ndjson").stat().st_size > COUNT


def test_many_collections_and_their_columns_are_remembered() -> None:
    rows = [(n + 1, f"c{n}", n + 1, False) for n in range(COUNT)]
    encoded = Catalogue(rows, COUNT + 1, None, ()).encode()
    assert len(decode_catalogue(encoded).by_name) == COUNT
    with Database.in_memory() as db:
        for number in range(COUNT):
            keep_column_order(db, f"c{number}", ["b", "a"])
        assert column_order(db, f"c{COUNT - 1}") == ["b", "a"]
