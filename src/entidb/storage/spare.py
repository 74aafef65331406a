"""A power that a store may have beside the promises of ``base``: it gives the disk back what it has
no use for, while it is open and others read and write.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from entidb.storage.base import Storage


@runtime_checkable
class SpareStorage(Storage, Protocol):
    """A store that keeps room which it does not use."""

    def give_back(self) -> bool:
        """Give a bounded part of it back; whether it is worth another look, now or later. Waits for
        nobody: where another opener, or another thread, has the turn, it does nothing. Killed at
        any moment, the store is as it was. Raises ``StorageError``, ``DatabaseClosedError``."""
        ...


def give_back(storage: Storage) -> bool:
    """What ``storage`` answers to ``SpareStorage.give_back``; False if it keeps no such room."""
    return isinstance(storage, SpareStorage) and storage.give_back()


__all__ = ["SpareStorage", "give_back"]
