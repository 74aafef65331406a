"""A power that a store may have beside the promises of ``base``: it stores less when it knows where
regions of keys begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from entidb.storage.base import Storage


@runtime_checkable
class RegionStorage(Storage, Protocol):
    """A store that wants to know the regions before it holds anything."""

    def spacers(self, regions: Sequence[bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """Rows that keep what grows before each of ``regions`` (prefixes of keys that nothing else
        uses) apart from what grows behind it: those to commit first of all, and those to put over
        them with the next commit. Every key is one of the prefixes and 16 bytes more."""
        ...


def spacers_of(
    storage: Storage, regions: Sequence[bytes]
) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """What ``storage`` answers to ``RegionStorage.spacers``; no rows if it has no use for them."""
    return storage.spacers(regions) if isinstance(storage, RegionStorage) else ({}, {})


__all__ = ["RegionStorage", "spacers_of"]
