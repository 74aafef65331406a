"""Two databases on disk with a bit of everything in them, for flipping bits in: a server and a
device of it with clean, changed, held, discarded and local entities.
"""

from __future__ import annotations

import random
import uuid
from pathlib import Path
from typing import Any

from entidb.db import Database, Role
from entidb.errors import SyncError
from entidb.protocol import (
    LIMITS,
    HandshakeRequest,
    PullRequest,
    PushRequest,
    SyncRequest,
    SyncResponse,
)
from entidb.server.hooks import Grant
from entidb.server.service import DatabaseService
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from entidb.sync.transport import BaseTransport
from tests.support import FakeClock

DB_ID = "shop"
GRANT = Grant("tester", True, True)
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord")


class Wire(BaseTransport):
    """From an engine straight into a service."""

    def __init__(self, service: DatabaseService) -> None:
        super().__init__()
        self._service = service

    def _exchange(self, request: SyncRequest) -> SyncResponse:
        if isinstance(request, HandshakeRequest):
            return self._service.handshake(request)
        if isinstance(request, PullRequest):
            return self._service.pull(request, GRANT)
        assert isinstance(request, PushRequest)
        (answer,) = self._service.push_many([(request, GRANT)])
        if isinstance(answer, SyncError):
            raise answer
        return answer


def service_on(database: Database) -> DatabaseService:
    return DatabaseService(database, db_id=DB_ID, limits=LIMITS)


def engine_on(database: Database, transport: BaseTransport) -> SyncEngine:
    config = SyncConfig(
        db_id=DB_ID,
        policies={"held": "manual", "kept": "client_wins"},
        push_operations_max=20,
        pull_operations_max=50,
        retry=RetryConfig.none(),
    )
    return SyncEngine(config, transport, database, random_source=random.Random(1))


def build(root: Path, seed: int) -> tuple[Path, Path]:
    """The directories of the server's and the device's database, both closed."""
    source = random.Random(seed)
    options: dict[str, Any] = {"clock": FakeClock(), "entropy": random.Random(seed).randbytes}
    server_path, device_path = root / "server", root / "device"
    with (
        Database.open(server_path, role=Role.SERVER, **options) as server,
        Database.open(device_path, **options) as device,
    ):
        service = service_on(server)
        with Database.in_memory(**options) as other:
            mine, theirs = engine_on(device, Wire(service)), engine_on(other, Wire(service))
            ids = _fill(other, source)
            theirs.sync()
            mine.sync()
            _change(other, ids, source, 30)
            theirs.sync()
            _change(device, ids, source, 30)
            mine.sync()
            # Some of what is pending stands in the way of what the other one changed meanwhile.
            _change(device, ids, source, 40)
    return server_path, device_path


def _fill(database: Database, source: random.Random) -> list[tuple[str, uuid.UUID]]:
    ids = []
    for _ in range(60):
        with database.transaction() as tx:
            for _ in range(source.randrange(1, 8)):
                name = source.choice(("notes", "held", "kept"))
                ids.append((name, tx.collection(name).add(_value(source))))
    return ids


def _change(
    database: Database, ids: list[tuple[str, uuid.UUID]], source: random.Random, transactions: int
) -> None:
    local = database.collection("drafts", local=True)
    for _ in range(transactions):
        with database.transaction() as tx:
            for name, entity_id in source.sample(ids, 3):
                if source.random() < 0.2:
                    tx.collection(name).discard(entity_id)
                else:
                    tx.collection(name)[entity_id] = _value(source)
        local[uuid.UUID(int=source.getrandbits(128))] = _value(source)


def _value(source: random.Random) -> dict[str, Any]:
    value: dict[str, Any] = {
        "title": " ".join(source.choices(_WORDS, k=3)),
        "rank": source.randrange(1000),
    }
    if source.random() < 0.05:
        value["scan"] = source.randbytes(source.randrange(3000, 12000))
    return value
