"""Ordered bytes with one writer and snapshot readers: the seam and its two backends.

``base`` holds the promises, ``memory`` the backend to read first, ``lmdb`` the one on disk.
Nothing here knows of entities.
"""

from __future__ import annotations

from entidb.storage.base import Batch, Snapshot, Storage, StorageInfo
from entidb.storage.lmdb import LmdbStorage
from entidb.storage.memory import MemoryStorage

__all__ = [
    "Batch",
    "LmdbStorage",
    "MemoryStorage",
    "Snapshot",
    "Storage",
    "StorageInfo",
]
