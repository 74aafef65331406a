"""A power that a snapshot may have beside the promises of ``base``: of the records in a range it
gives those that its caller picks, and makes nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from entidb.storage.base import Snapshot

#: Which of some values, in the order of their keys, are wanted. Each may have a few bytes more at
#: its end than was stored.
Picks = Callable[[Sequence[bytes]], Sequence[int]]
#: Records with their keys; and the key of the last that was looked at, None if there are no more.
Picked = tuple[list[tuple[bytes, bytes]], bytes | None]


class PickingSnapshot(Snapshot, Protocol):
    """A snapshot with that power."""

    def pick(self, start: bytes, stop: bytes, limit: int, picks: Picks) -> Picked:
        """Of the first ``limit`` records of a range those that ``picks`` wants. Every one of them
        is proved, as by ``scan``, which raises the same."""
        ...


def picking(snapshot: Snapshot) -> Callable[[bytes, bytes, int, Picks], Picked]:
    """``PickingSnapshot.pick`` of ``snapshot``, whatever it is."""
    own: Callable[[bytes, bytes, int, Picks], Picked] | None = getattr(snapshot, "pick", None)
    return partial(_pick, snapshot) if own is None else own


def _pick(snapshot: Snapshot, start: bytes, stop: bytes, limit: int, picks: Picks) -> Picked:
    page = snapshot.scan(start, stop, limit=limit)
    found = [page[at] for at in picks([value for _, value in page])]
    return found, page[-1][0] if len(page) == limit else None


__all__ = ["Picked", "Picks", "PickingSnapshot", "picking"]
