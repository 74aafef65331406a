"""The whole road over real HTTP: ten thousand entities, two devices, one server."""

from __future__ import annotations

from pathlib import Path

from entidb.db import Database, Role, dump
from entidb.server import ServerConfig, serving
from entidb.sync import SyncConfig, SyncEngine

ENTITIES = 10_000


def test_ten_thousand_entities_are_the_same_on_two_devices_and_the_server(tmp_path: Path) -> None:
    settings = ServerConfig(data_dir=str(tmp_path / "server"), insecure_no_auth=True)
    config = SyncConfig(db_id="shop", push_operations_max=1500, pull_operations_max=1500)
    with (
        Database.open(tmp_path / "a") as one,
        Database.open(tmp_path / "b") as two,
        serving(settings) as url,
    ):
        for start in range(0, ENTITIES, 100):
            with one.transaction() as tx:
                for n in range(start, start + 100):
                    tx.collection("goods").add({"n": n, "name": f"article {n}"})
        with SyncEngine(config, url, one) as first, SyncEngine(config, url, two) as second:
            assert first.sync().pushed_operations == ENTITIES
            assert second.sync().pulled == ENTITIES
            first.sync()
            requests = first.sync().requests
        assert requests == 1
        dumps = [list(dump(one)), list(dump(two))]
        assert [one.verify(), two.verify()] == [[], []]
    (stored,) = (tmp_path / "server").glob("**/data.mdb")
    with Database.open(stored.parent, role=Role.SERVER) as server:
        dumps.append(list(dump(server)))
        assert server.verify() == []
    assert len(dumps[0]) == ENTITIES
    assert dumps[0] == dumps[1] == dumps[2]
