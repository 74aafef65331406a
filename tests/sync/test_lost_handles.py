"""A program that loses its database, its engine or its server loses its locks with them."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from pathlib import Path

import pytest

from entidb import Database, F, Index
from entidb.server import ServerConfig, SyncServer
from entidb.sync import HttpTransport, LoopbackClient, SyncConfig, SyncEngine

WAIT_S = 60.0


def _use(place: Path, background: bool) -> list[weakref.ref[object]]:
    """Everything that remembers something of the store, used and lost."""
    database = Database.open(place / "device")
    server = SyncServer(ServerConfig(data_dir=place / "server", insecure_no_auth=True))
    transport = HttpTransport("http://127.0.0.1:1", client=LoopbackClient(server))
    engine = SyncEngine(SyncConfig(db_id="shop"), transport, database)
    goods = database.collection("goods", indexes=[Index("price")])
    goods.add({"price": 1})
    engine.sync()
    assert goods.where(F.price == 1).count() == 1
    if background:
        engine.start()
        assert engine.synced(WAIT_S)
        engine.stop()
    engine.status()
    return [weakref.ref(database), weakref.ref(engine), weakref.ref(server)]


@pytest.mark.parametrize("background", [False, True])
def test_what_a_program_lost_goes_and_its_locks_with_it(tmp_path: Path, background: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        lost = _use(tmp_path, background)
        end = time.monotonic() + WAIT_S
        while any(one() is not None for one in lost) and time.monotonic() < end:
            gc.collect()  # again: a thread that hears of others has the database for a moment
            time.sleep(0.01)
    assert [one() for one in lost] == [None, None, None]
    with Database.open(tmp_path / "device") as database:
        database.compact()
