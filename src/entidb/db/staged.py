"""Rows of entities as they are put into a table that no reader sees (R20), many at a time: made of
what came from a server, and as they will be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import add
from typing import Final

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


def bytes_of_values(rows: Sequence[bytes]) -> int:
    """Of rows that are no tombstones."""
    return sum(map(len, rows)) - ENTITY_HEAD * len(rows)


__all__ = ["bytes_of_values", "rows_of_columns", "rows_of_segment"]
