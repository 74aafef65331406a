"""Rows of entities as they are put into a table that no reader sees (R20), many at a time: made of
what came from a server, and as they will be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from operator import add
from typing import Final, overload

from entidb.db.records import ENTITY_HEAD, REMOTE, pack_entity
from entidb.types import ID_BYTES

#: Flags, and the sequence of a row that came with a bulk publication.
_BEGIN: Final = pack_entity(REMOTE, 0, 0, bytes(ID_BYTES), 0)[:9]


def rows_of_columns(
    versions: Iterable[int],
    devices: Iterable[bytes],
    timestamps: Iterable[int],
    payloads: Iterable[bytes | None],
    *,
    gone: bool,
) -> list[bytes | None]:
    """Of a page; None for a tombstone, of which there are some if ``gone``."""
    heads = map(pack_entity, repeat(REMOTE), repeat(0), versions, devices, timestamps)
    if gone:
        pairs = zip(heads, payloads, strict=True)
        return [None if payload is None else head + payload for head, payload in pairs]
    return list(map(add, heads, payloads))


def rows_of_segment(written: Iterable[bytes], payloads: Iterable[bytes]) -> list[bytes]:
    """``written`` are version (8 bytes, big-endian), device (16) and timestamp (8) of each in one
    piece. They stand in a row as they do there, so nothing is taken apart: were either to change,
    this would do so."""
    return list(map(add, map(add, repeat(_BEGIN), written), payloads))


class ValuesOfRows(Sequence[bytes]):
    """The values in rows that are no tombstones, cut out where somebody looks: of many rows a few
    at a time, which stay in the processor's cache."""

    def __init__(self, rows: Sequence[bytes]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        if isinstance(at, slice):
            return [row[ENTITY_HEAD:] for row in self._rows[at]]
        return self._rows[at][ENTITY_HEAD:]

    def __iter__(self) -> Iterator[bytes]:
        return iter([row[ENTITY_HEAD:] for row in self._rows])


def bytes_of_values(rows: Sequence[bytes]) -> int:
    """Of rows that are no tombstones."""
    return sum(map(len, rows)) - ENTITY_HEAD * len(rows)


__all__ = ["ValuesOfRows", "bytes_of_values", "rows_of_columns", "rows_of_segment"]
