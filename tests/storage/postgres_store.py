"""PostgreSQL in the place of memory, for the suites of the layers above: what they assume of a
store, and no promise names, breaks here."""

from __future__ import annotations

import atexit
import contextlib
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import entidb.storage.memory
from entidb.errors import StorageError
from entidb.storage.base import StorageInfo
from entidb.storage.postgres import PostgresStorage
from entidb.storage.postgres.node import lease
from entidb.storage.postgres.snapshot import ABOVE_ALL
from tests.storage.postgres_cluster import cluster

#: Tests hold many snapshots at once.
_CONNECTIONS: Final = 60
_address = ""


class ScratchPostgres(PostgresStorage):
    """One that takes no address, as a ``MemoryStorage`` does."""

    supports_files = False
    shared = False

    def __init__(self) -> None:
        name = uuid.uuid4().hex
        opened = PostgresStorage.open(_address, name, connections_max=_CONNECTIONS)
        super().__init__(lease(_address, _CONNECTIONS), name, opened.opened.number)
        opened.close()

    def another(self) -> PostgresStorage:
        return PostgresStorage.open(_address, self.name, connections_max=_CONNECTIONS)

    def copy(self, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> ScratchPostgres:
        made = ScratchPostgres()
        with self.snapshot() as snapshot:
            rows = snapshot.scan(b"", ABOVE_ALL)
        made.commit(dict(rows) | dict(changes))
        return made

    def backup(self, path: str, changes: Iterable[tuple[bytes, bytes | None]] = ()) -> None:
        raise StorageError(f"a store in memory has no files to write to {path}; use copy()")

    def info(self) -> StorageInfo:
        return replace(super().info(), kind="memory", path=None, file_bytes=0)


def take_the_place_of_memory() -> None:
    """Every ``MemoryStorage`` made after this is a ``ScratchPostgres``, on a server that ends with
    this process."""
    global _address
    stack = contextlib.ExitStack()
    _address = stack.enter_context(cluster()).address
    atexit.register(stack.close)
    for module in (entidb.storage, entidb.storage.memory):
        module.MemoryStorage = ScratchPostgres  # type: ignore[attr-defined]
