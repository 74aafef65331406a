"""``indexes``: what an index costs an entity where many come at once: in a push, for the server
that takes it and the device whose it is; in a first sync, in pages and in the rows of an image; and
in commits of thousands. And what it costs where it has nothing to do.

Device and server are in this process, whose processor time is counted; messages are encoded and
decoded, and there is no HTTP. With an index and without take turns.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, figure
from benchmarks.payloads import COLLECTION, ids, value
from benchmarks.world import World, load
from entidb import Index, cbor, protocol
from entidb.collector import paused
from entidb.db import Database, Role
from entidb.db.staged import rows_of_columns
from entidb.protocol import HandshakeRequest, PullRequest, PushRequest, SyncRequest, SyncResponse
from entidb.server import ServerConfig
from entidb.server.hooks import Grant
from entidb.server.service import DatabaseService
from entidb.sync import SyncConfig, SyncEngine
from entidb.sync.apply.image import CHUNK_ROWS
from entidb.sync.transport import BaseTransport

SIZES = (20_000,)
#: Text in no order, an integer in the order of ids, and a time, as text.
FIELDS = ("title", "n", "at")
COST = Target("value", most=1.5)
NOTHING = Target("ratio", most=1.03)
_US = 1e6
_DB = "indexes"
_GRANT = Grant("bench", True, True)
_DEVICE = bytes(16)
#: Declares what is to be there and returns microseconds an entity.
Measure = Callable[[str | None], float]


class Straight(BaseTransport):
    """Straight into the service, every message encoded and decoded. ``seconds`` are what the
    service took, of a processor."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        config = ServerConfig(data_dir="nowhere", insecure_no_auth=True)
        self._service = DatabaseService(database, db_id=_DB, limits=config.limits())
        self.seconds = 0.0

    def _exchange(self, request: SyncRequest) -> SyncResponse:
        body = protocol.encode(request)
        received: Any = protocol.decode_request(protocol.path_of(request), body)
        began = time.process_time()
        answer = self._answer(received)
        self.seconds += time.process_time() - began
        return protocol.decode_response(request, protocol.encode(answer))

    def _answer(self, request: HandshakeRequest | PullRequest | PushRequest) -> SyncResponse:
        if isinstance(request, HandshakeRequest):
            return self._service.handshake(request, _GRANT)
        if isinstance(request, PullRequest):
            return self._service.pull(request, _GRANT)
        (answer,) = self._service.push_many([(request, _GRANT)])
        if isinstance(answer, Exception):
            raise answer
        return answer


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        where = world.path("indexes")
        where.mkdir()
        pairs = [(key, cbor.encode(_entity(number))) for number, key in enumerate(ids(count))]
        for name, role in (("pending", Role.DEVICE), ("known", Role.SERVER)):
            with Database.open(where / name, role=role) as database:
                load(database, pairs)
        ways: dict[str, Measure] = {
            "push, server": partial(_push, where, count, False),
            "push, device": partial(_push, where, count, True),
            "first sync in pages": partial(_pages, where, count),
            "first sync, rows of an image": partial(_image, where, pairs),
            "commits of thousands": partial(_commits, where, pairs),
        }
        for way, measure in ways.items():
            yield from _figures(way, measure, count, rounds)
        shutil.rmtree(where)


def _entity(number: int) -> dict[str, Any]:
    day, minute = f"{number % 12 + 1:02}-{number % 28 + 1:02}", f"{number % 24:02}:{number % 60:02}"
    return {**value(number), "at": f"2026-{day}T{minute}:00.{number % 1_000_000:06}+00:00"}


def _figures(way: str, measure: Measure, count: int, rounds: int) -> Iterator[Figure]:
    costs: dict[str, list[float]] = {field: [] for field in FIELDS}
    bare, beside = [], []
    measure(None)  # what is done first pays for what is imported and made then
    for _ in range(rounds):
        # In turns, each with one that has no index just before it.
        for field, found in costs.items():
            without = measure(None)
            found.append(max(measure(field) - without, 1e-3))
        bare.append(measure(None))
        beside.append(measure("elsewhere"))
    yield figure("indexes", f"{way}: no index", count, "us/entity", bare)
    for field, found in costs.items():
        yield figure(
            "indexes", f"{way}: an index of {field}", count, "us/entity", found, target=COST
        )
    yield figure(
        "indexes",
        f"{way}: an index of another collection",
        count,
        "us/entity",
        beside,
        floors=bare,
        floor_is="no index",
        target=NOTHING,
    )


def _declare(database: Database, field: str | None) -> None:
    if field is not None:
        name = "others" if field == "elsewhere" else COLLECTION
        database.collection(name, indexes=[Index(field)])
        database.wait_for_indexes()


def _push(where: Path, count: int, device: bool, field: str | None) -> float:
    """Of the side that has the index."""
    shutil.copytree(where / "pending", where / "device")
    with (
        Database.open(where / "server", role=Role.SERVER) as theirs,
        Database.open(where / "device") as mine,
    ):
        _declare(mine if device else theirs, field)
        took, spent = _synced(theirs, mine)
        assert mine.read_head().ready == 0
    shutil.rmtree(where / "server")
    shutil.rmtree(where / "device")
    return (took - spent if device else spent) / count * _US


def _pages(where: Path, count: int, field: str | None) -> float:
    with (
        Database.open(where / "known", role=Role.SERVER) as theirs,
        Database.open(where / "device") as mine,
    ):
        _declare(mine, field)
        took, spent = _synced(theirs, mine)
        assert len(mine.collection(COLLECTION)) == count
    shutil.rmtree(where / "device")
    return (took - spent) / count * _US


def _synced(theirs: Database, mine: Database) -> tuple[float, float]:
    """Seconds of a processor that a cycle takes, and how many of them the server."""
    transport = Straight(theirs)
    with SyncEngine(SyncConfig(db_id=_DB, segments=False), transport, mine) as engine:
        gc.collect()
        began = time.process_time()
        engine.sync()
        return time.process_time() - began, transport.seconds


def _image(where: Path, pairs: Sequence[tuple[bytes, bytes]], field: str | None) -> float:
    """What a device does with the rows of an image once it has them (``StagesImages``)."""
    with Database.open(where / "device") as mine:
        _declare(mine, field)
        with mine.write() as writer:
            writer.collection(COLLECTION)
            table, catalogue = writer.catalogue.allocating()
            writer.set_catalogue(catalogue)
        gc.collect()
        began = time.process_time()
        for start in range(0, len(pairs), CHUNK_ROWS):
            keys, payloads = zip(*pairs[start : start + CHUNK_ROWS], strict=True)
            count = len(keys)
            with paused(), mine.write() as writer:
                writer.stage_entities(
                    [writer.catalogue.by_name[COLLECTION].standing_in(table)],
                    [0] * count,
                    keys,
                    rows_of_columns(
                        range(start + 1, start + 1 + count),
                        [_DEVICE] * count,
                        [1 << 40] * count,
                        payloads,
                        gone=False,
                    ),
                )
        took = time.process_time() - began
    shutil.rmtree(where / "device")
    return took / len(pairs) * _US


def _commits(where: Path, pairs: Sequence[tuple[bytes, bytes]], field: str | None) -> float:
    with Database.open(where / "device") as mine:
        _declare(mine, field)
        gc.collect()
        began = time.process_time()
        load(mine, pairs)
        took = time.process_time() - began
    shutil.rmtree(where / "device")
    return took / len(pairs) * _US
