"""Ordered bytes with one writer and snapshot readers: the seam and its two backends.

``base`` holds the promises, ``memory`` the backend to read first, ``lmdb`` the one on disk, which
``opening`` loads when the first store on disk is opened. Nothing here knows of entities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from entidb.lazy import lazy_names
from entidb.storage.base import Batch, Snapshot, Storage, StorageInfo
from entidb.storage.memory import MemoryStorage
from entidb.storage.opening import open_storage

if TYPE_CHECKING:
    from entidb.storage.lmdb import LmdbStorage

#: Loads LMDB, which a program without a store on disk does not need.
_HOMES: Final = {"entidb.storage.lmdb": ("LmdbStorage",)}
_HOME_OF, __getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())

__all__ = [
    "Batch",
    "LmdbStorage",
    "MemoryStorage",
    "Snapshot",
    "Storage",
    "StorageInfo",
    "open_storage",
]
