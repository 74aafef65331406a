"""Shared by the tests of the core: real databases, the real service, and a wire of bytes.

``World`` has one server and makes devices; nothing in it does I/O, reads a clock or draws random
numbers, so a test is the same every time. What a single test needs stands in that test.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from entidb import protocol
from entidb.db import Database, Role, dump
from entidb.db.records import META_FORMAT, encode_format
from entidb.db.replica import ReplicaState
from entidb.errors import SyncError, TransportError, error_from_code
from entidb.protocol import (
    LIMITS,
    HandshakeRequest,
    Limits,
    PullRequest,
    PushRequest,
    SyncRequest,
    SyncResponse,
)
from entidb.server.hooks import Grant, ValidateHook
from entidb.server.service import DatabaseService
from entidb.storage import MemoryStorage, Snapshot, Storage
from entidb.storage.base import Batch, StorageInfo, StoreTurn
from entidb.storage.regions import spacers_of
from entidb.sync import RetryConfig, SyncConfig, SyncCycleResult, SyncEngine
from entidb.sync.transport import BaseTransport

DB_ID = "shop"
START_MS = 1_800_000_000_000
DAY_MS = 24 * 3600 * 1000
GRANT = Grant("tester", True, True)


def uid(number: int) -> uuid.UUID:
    return uuid.UUID(int=number)


class FakeClock:
    """Time that moves when a test says so, and by what somebody waits."""

    def __init__(self, now_ms: int = START_MS) -> None:
        self.ms = now_ms
        self.waits: list[float] = []

    def now_ms(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return self.ms / 1000

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.ms += int(seconds * 1000)
        return event.is_set()


class Crash(BaseException):
    """The process died here. Not an ``Exception``, so that nothing can survive it by accident."""


class WatchedStorage:
    """Counts commits, and dies (or fails) before or after one of them."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.commits = 0
        self.fail_at: int | None = None
        self.fail_after = False
        self.error: BaseException = Crash()

    def fail_next(self, *, after: bool = False, error: BaseException | None = None) -> None:
        self.fail(1, after=after, error=error)

    def fail(self, nth: int, *, after: bool = False, error: BaseException | None = None) -> None:
        """The ``nth`` commit from now raises ``error``, before it is done or after it."""
        self.fail_at, self.fail_after = self.commits + nth, after
        self.error = error or Crash()

    def commit(self, batch: Batch, after: int | None = None) -> int:
        if not batch:
            return self.inner.mark()
        self.commits += 1
        if self.commits == self.fail_at:
            if self.fail_after:
                self.inner.commit(batch, after)
            raise self.error
        return self.inner.commit(batch, after)

    @property
    def turn(self) -> StoreTurn:
        return self.inner.turn

    def claim(self, name: str) -> StoreTurn:
        return self.inner.claim(name)

    @property
    def shared(self) -> bool:
        return self.inner.shared

    def mark(self) -> int:
        return self.inner.mark()

    def wait(self, mark: int, timeout_s: float) -> bool:
        return self.inner.wait(mark, timeout_s)

    def snapshot(self) -> Snapshot:
        return self.inner.snapshot()

    def verify(self) -> Iterator[str]:
        return self.inner.verify()

    def compact(self) -> None:
        self.inner.compact()

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        self.inner.backup(path, changes)

    def info(self) -> StorageInfo:
        return self.inner.info()

    def spacers(self, regions: Sequence[bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        return spacers_of(self.inner, regions)

    def close(self) -> None:
        self.inner.close()


class Wire(BaseTransport):
    """Straight into the service, but every message is encoded and decoded on the way.

    ``before`` is called with a request the server has not seen, ``after`` with one it has
    answered; what they raise is what the device gets.
    """

    def __init__(self, world: World, grant: Grant = GRANT) -> None:
        super().__init__()
        self.world = world
        self.grant = grant
        self.requests: list[SyncRequest] = []
        self.responses: list[SyncResponse] = []
        self.before: Callable[[SyncRequest], object] = lambda request: None
        self.after: Callable[[SyncRequest], object] = lambda request: None

    def _exchange(self, request: SyncRequest) -> SyncResponse:
        self.requests.append(request)
        self.before(request)
        received = protocol.decode_request(protocol.path_of(request), protocol.encode(request))
        assert received == request
        try:
            answer = self.world.answer(received, self.grant)
        except TransportError:
            raise
        except SyncError as error:
            raise error_from_code(error.code, error.message) from error
        self.after(request)
        response = protocol.decode_response(request, protocol.encode(answer))
        self.responses.append(response)
        return response

    def pushes(self) -> list[PushRequest]:
        return [request for request in self.requests if isinstance(request, PushRequest)]

    def pulls(self) -> list[PullRequest]:
        return [request for request in self.requests if isinstance(request, PullRequest)]


def lose(kind: type, *, times: int = 1) -> Callable[[SyncRequest], None]:
    """A hook of ``Wire`` that loses the first messages of a kind."""
    left = [times]

    def hook(request: SyncRequest) -> None:
        if isinstance(request, kind) and left[0]:
            left[0] -= 1
            raise TransportError("lost on the way")

    return hook


class Device:
    """A device database with its engine; ``restart`` is what a crash leaves."""

    def __init__(self, world: World, storage: Storage, seed: int, **config: Any) -> None:
        self.world = world
        self.seed = seed
        self.config: dict[str, Any] = {"db_id": DB_ID, "retry": RetryConfig.none()} | config
        self.storage = WatchedStorage(storage)
        self.clock = FakeClock(world.clock.ms)
        self._open()

    def _open(self) -> None:
        self.db = Database(
            self.storage, clock=self.clock, entropy=random.Random(self.seed).randbytes
        )
        self.wire = Wire(self.world)
        self.engine = SyncEngine(
            SyncConfig(**self.config),
            self.wire,
            self.db,
            clock=self.clock,
            random_source=random.Random(self.seed),
        )

    def restart(self, **config: Any) -> None:
        """Forget everything that is not on disk."""
        self.seed += 1000
        self.config |= config
        self.storage = WatchedStorage(self.storage.inner)
        self._open()

    def copy(self, **config: Any) -> Device:
        """Another device with the same files (R30)."""
        inner = self.storage.inner
        assert isinstance(inner, MemoryStorage)
        return Device(self.world, inner.copy(), self.seed + 500, **(self.config | config))

    def sync(self) -> SyncCycleResult:
        return self.engine.sync()

    def settle(self, cycles: int = 10) -> None:
        """Sync until nothing is pending any more."""
        for _ in range(cycles):
            if not self.sync().incomplete and not self.db.read_head().ready:
                return
        raise AssertionError(f"still pending after {cycles} cycles")

    @property
    def notes(self) -> Any:
        return self.db.collection("notes")

    @property
    def state(self) -> ReplicaState:
        return self.engine.applier.state()

    @property
    def pending(self) -> int:
        return self.db.read_head().ready

    def put(self, *writes: tuple[str, int, Any]) -> uuid.UUID:
        """One transaction of (collection, id number, value or None to delete)."""
        with self.db.transaction() as tx:
            for name, number, value in writes:
                if value is None:
                    del tx.collection(name)[uid(number)]
                else:
                    tx.collection(name)[uid(number)] = value
        return tx.id

    def values(self, name: str = "notes") -> dict[int, Any]:
        return {i.int: value for i, value in self.db.collection(name).items()}


class World:
    """One server, one clock, and devices on demand."""

    def __init__(self, *, limits: Limits = LIMITS, validate: ValidateHook | None = None) -> None:
        self.clock = FakeClock()
        self.limits = limits
        self.validate = validate
        self._devices = self._servers = 0
        self.open_server(MemoryStorage())

    def open_server(self, storage: MemoryStorage) -> None:
        self._servers += 1
        self.server_storage = WatchedStorage(storage)
        self.server = Database(
            self.server_storage,
            role=Role.SERVER,
            clock=self.clock,
            entropy=random.Random(f"server {self._servers}").randbytes,
        )
        self.service = DatabaseService(
            self.server, db_id=DB_ID, limits=self.limits, validate=self.validate
        )

    def restart_server(self) -> None:
        inner = self.server_storage.inner
        assert isinstance(inner, MemoryStorage)
        self.open_server(inner)

    def backup_server(self) -> MemoryStorage:
        inner = self.server_storage.inner
        assert isinstance(inner, MemoryStorage)
        return inner.copy([(META_FORMAT, encode_format(backup=True))])

    def copy_files(self) -> MemoryStorage:
        """The server's files as a person copies them, who does not know of ``entidb backup``."""
        inner = self.server_storage.inner
        assert isinstance(inner, MemoryStorage)
        return inner.copy()

    def device(self, storage: Storage | None = None, **config: Any) -> Device:
        self._devices += 1
        return Device(self, storage or MemoryStorage(), self._devices, **config)

    def answer(self, request: SyncRequest, grant: Grant) -> SyncResponse:
        if isinstance(request, HandshakeRequest):
            return self.service.handshake(request, grant)
        if isinstance(request, PullRequest):
            idle = self.service.idle_pull(request, grant)
            response = self.service.pull(request, grant)
            assert idle is None or idle == response
            return response
        assert isinstance(request, PushRequest), "rounds are for the front"
        answer = self.service.push_many([(request, grant)])[0]
        if isinstance(answer, SyncError):
            raise answer
        return answer

    def put(self, *writes: tuple[str, int, Any]) -> int:
        """A program on the server writes (R11)."""
        with self.server.transaction() as tx:
            for name, number, value in writes:
                if value is None:
                    del tx.collection(name)[uid(number)]
                else:
                    tx.collection(name)[uid(number)] = value
        return tx.sequence

    def values(self, name: str = "notes") -> dict[int, Any]:
        return {i.int: value for i, value in self.server.collection(name).items()}


class Columns:
    """Whether what has a way in columns may take it, and how often it did. ``name`` is the method
    of ``owner`` that is that way, and says ``no`` where it cannot be gone."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, no: object) -> None:
        self.allowed, self.taken = True, 0
        way = getattr(owner, name)

        def watching(owner: Any, *rest: Any) -> Any:
            result = way(owner, *rest) if self.allowed else no
            self.taken += result is not no
            return result

        patch.setattr(owner, name, watching)

    def compare(self, life: Callable[[], list[Any]]) -> None:
        """``life`` is the same without columns; what it answers is compared step by step."""
        self.allowed = True
        with_columns = life()
        self.allowed = False
        taken = self.taken
        for step, expected in zip(with_columns, life(), strict=True):
            assert step == expected
        assert self.taken == taken


def assert_sound(*databases: Database) -> None:
    for database in databases:
        assert database.verify() == []


def assert_in_step(world: World, *devices: Device) -> None:
    """Everybody has, byte for byte, what the server has, and all files are sound."""
    expected = list(dump(world.server))
    for device in devices:
        assert list(dump(device.db)) == expected
    assert_sound(world.server, *[device.db for device in devices])
