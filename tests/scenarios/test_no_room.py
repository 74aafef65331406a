"""A map or a disk that is full, on a device and on a server, and that both go on with more room."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entidb.db import Database, dump
from entidb.errors import ServerError, StorageFullError
from entidb.protocol import PushRequest, PushResponse
from entidb.server import ServerConfig, serving
from entidb.sync import RetryConfig, SyncConfig, SyncEngine, SyncState
from tests.server.support import Client, pull, push
from tests.storage.lmdb.test_lmdb_traps import small_disk
from tests.support import assert_sound, uid
from tests.waiting import until

MAP = 1 << 20
CONFIG = SyncConfig(db_id="shop", retry=RetryConfig.none(), pull_operations_max=50)
ROW = 2000


def fill(database: Database, first: int, count: int = 50) -> None:
    with database.transaction() as tx:
        for n in range(first, first + count):
            tx.collection("notes")[uid(n)] = os.urandom(ROW)


def fill_until_full(database: Database) -> int:
    """Transactions until there is no room; how many entities there are."""
    for n in range(0, 100_000, 50):
        try:
            fill(database, n)
        except StorageFullError:
            return n
    raise AssertionError("it never gets full")


#: A place for a database, and how to make room in it.
Place = tuple[Path, Callable[[], None]]


@contextlib.contextmanager
def full_map(path: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    patch.setattr("entidb.storage.lmdb.open_file.MAP_BYTES_MAX", 2 * MAP)
    patch.setattr("entidb.storage.lmdb.open_file.MAP_ROOM_BYTES", MAP // 2)
    yield path, lambda: patch.setattr("entidb.storage.lmdb.open_file.MAP_BYTES_MAX", 64 * MAP)


@contextlib.contextmanager
def full_disk(path: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    disk = path / "disk"
    with small_disk(disk, "12m"):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(9 << 20))
        yield disk, ballast.unlink


@pytest.fixture(params=[full_map, full_disk], ids=["map", "disk"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    with request.param(tmp_path, monkeypatch) as made:
        yield made


def test_a_device_without_room_refuses_what_does_not_fit_and_goes_on(place: Place):
    path, make_room = place
    with Database.open(path / "device") as db:
        there = fill_until_full(db)
        assert there >= 50
        for _ in range(3):
            before = list(dump(db))
            with pytest.raises(StorageFullError):
                fill(db, 1000, 400)
            assert list(dump(db)) == before
            assert db.read_head().ready == there // 50
        make_room()
        fill(db, 1000, 400)
        assert len(db.collection("notes")) == there + 400
        assert_sound(db)


@pytest.mark.process
def test_a_device_that_gets_full_in_a_pull_keeps_its_view_and_goes_on_when_there_is_room(
    place: Place, tmp_path: Path
):
    path, make_room = place
    config = ServerConfig(data_dir=None, insecure_no_auth=True, access_log=False)
    with serving(config) as url, Database.in_memory() as other:
        with SyncEngine(SyncConfig(db_id="shop"), url, other) as engine:
            for n in range(0, 2000, 50):
                fill(other, n)
            engine.sync()
        with Database.open(path / "device") as db, SyncEngine(CONFIG, url, db) as engine:
            db.collection("notes")[uid(5000)] = "mine"
            for _ in range(2):
                with pytest.raises(StorageFullError) as caught:
                    engine.sync()
                assert caught.value.code == "storage_full"
                assert engine.state is SyncState.ERROR
                assert engine.status().last_error_code == "storage_full"
                assert list(db.collection("notes").values()) == ["mine"]
                assert db.read_head().ready == 1
            make_room()
            engine.sync()
            assert engine.state is SyncState.SYNCED
            assert len(db.collection("notes")) == 2001
            assert_sound(db)


@pytest.mark.process
def test_a_server_without_room_says_so_and_takes_the_same_push_when_there_is(
    place: Place, tmp_path: Path
):
    path, make_room = place
    config = ServerConfig(data_dir=path / "server", insecure_no_auth=True, access_log=False)
    with serving(config) as url, Database.open(tmp_path / "device", map_bytes=64 * MAP) as db:
        with SyncEngine(CONFIG, url, db) as engine:
            taken = push_until_full(db, engine)
            pending = db.read_head().ready
            for _ in range(3):
                with pytest.raises(ServerError) as caught:
                    engine.sync()
                assert (caught.value.code, caught.value.retryable) == ("storage_full", True)
                assert db.read_head().ready == pending
            # Reading needs no room.
            with Database.in_memory() as reader, SyncEngine(CONFIG, url, reader) as other:
                other.sync()
                assert len(reader.collection("notes")) == taken
            make_room()
            until(lambda: synced(engine))
            assert db.read_head().ready == 0
        with Database.in_memory() as reader, SyncEngine(CONFIG, url, reader) as other:
            other.sync()
            assert list(dump(reader)) == list(dump(db))


def synced(engine: SyncEngine) -> bool:
    with contextlib.suppress(ServerError):  # storage_full: the server tries again in a moment
        engine.sync()
    return engine.state is SyncState.SYNCED


@pytest.mark.process
def test_pulls_go_on_while_many_push_to_a_server_without_room(place: Place) -> None:
    path, make_room = place
    config = ServerConfig(
        data_dir=path / "server", insecure_no_auth=True, access_log=False, create_databases=True
    )
    answers: Counter[tuple[str, int, bool]] = Counter()
    with serving(config) as url:
        with Client(url) as client:
            history, number = client.history(), 0
            client.send(push(history, 1)).message(PushResponse)

            def large(number: int) -> PushRequest:
                return push(history, number, value=os.urandom(100_000))

            number = 2
            while client.send(large(number)).status == 200:
                number += 1
        pushing, pulled = threading.Barrier(6), threading.Event()

        def pushes(first: int) -> None:
            with Client(url) as client:
                pushing.wait(60)
                while not pulled.is_set():
                    answer = client.send(large(first))
                    answers["push", answer.status, "retry-after" in answer.headers] += 1

        def pulls() -> None:
            with Client(url) as client:
                pushing.wait(60)
                end = time.monotonic() + 2
                for number in itertools.count():
                    if number >= 100 and time.monotonic() > end:
                        return
                    answers["pull", client.send(pull(history, limit=1)).status, False] += 1

        pushers = [threading.Thread(target=pushes, args=[1000 + n]) for n in range(4)]
        pullers = [threading.Thread(target=pulls) for _ in range(2)]
        for thread in (*pushers, *pullers):
            thread.start()
        for thread in pullers:
            thread.join()
        try:
            until(lambda: any(what == "push" for what, *_ in list(answers)))
        finally:
            pulled.set()
        for thread in pushers:
            thread.join()
        assert set(answers) == {("push", 507, True), ("pull", 200, False)}, answers
        make_room()
        with Client(url) as client:
            until(lambda: client.send(large(2000)).status == 200)


def push_until_full(db: Database, engine: SyncEngine) -> int:
    """How many entities the server took before it was full."""
    for n in range(0, 10_000, 50):
        fill(db, n)
        try:
            engine.sync()
        except ServerError:
            return n
    raise AssertionError("it never gets full")
