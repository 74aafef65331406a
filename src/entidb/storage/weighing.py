"""A power that a snapshot may have beside the promises of ``base``, where each question takes its
time: it says how much values take before it is asked for them, so that more of them can be had at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from entidb.storage.base import Snapshot


class WeighingSnapshot(Snapshot, Protocol):
    """A snapshot with that power."""

    def weigh(self, keys: Sequence[bytes]) -> int | None:
        """Bytes of the values at ``keys`` together, at most; None where that takes as long as to
        read them."""
        ...


def weighing(snapshot: Snapshot) -> Callable[[Sequence[bytes]], int | None] | None:
    """``WeighingSnapshot.weigh`` of ``snapshot``; None where a few values at a time are as fast as
    many."""
    return getattr(snapshot, "weigh", None)


__all__ = ["WeighingSnapshot", "weighing"]
