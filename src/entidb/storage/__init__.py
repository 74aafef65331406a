"""Ordered bytes with one writer and snapshot readers: the seam and its two backends.

``base`` holds the promises, ``memory`` the backend to read first, ``lmdb`` the one on disk, which
``opening`` loads when the first store on disk is opened. Nothing here knows of entities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entidb.storage.base import Batch, Snapshot, Storage, StorageInfo
from entidb.storage.memory import MemoryStorage
from entidb.storage.opening import open_storage

if TYPE_CHECKING:
    from entidb.storage.lmdb import LmdbStorage


def __getattr__(name: str) -> Any:
    if name != "LmdbStorage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Only now: it loads LMDB, which a program without a store on disk does not need.
    from entidb.storage.lmdb import LmdbStorage

    globals()[name] = LmdbStorage
    return LmdbStorage


__all__ = [
    "Batch",
    "LmdbStorage",
    "MemoryStorage",
    "Snapshot",
    "Storage",
    "StorageInfo",
    "open_storage",
]
