"""Ordered bytes with one writer and snapshot readers: the seam and its backends.

``base`` holds the promises, ``memory`` the backend to read first, ``lmdb`` the one on disk, which
``opening`` loads when the first store on disk is opened, ``postgres`` the one on a PostgreSQL
server. Nothing here knows of entities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from entidb.lazy import lazy_names
from entidb.storage.base import Batch, Snapshot, Storage, StorageInfo
from entidb.storage.opening import open_storage

if TYPE_CHECKING:
    from entidb.storage.lmdb import LmdbStorage
    from entidb.storage.memory import MemoryStorage
    from entidb.storage.postgres import PostgresStorage

#: Loaded when they are used: a program needs one of them, or none.
_HOMES: Final = {
    "entidb.storage.lmdb": ("LmdbStorage",),
    "entidb.storage.memory": ("MemoryStorage",),
    "entidb.storage.postgres": ("PostgresStorage",),
}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

__all__ = [
    "Batch",
    "LmdbStorage",
    "MemoryStorage",
    "PostgresStorage",
    "Snapshot",
    "Storage",
    "StorageInfo",
    "open_storage",
]
