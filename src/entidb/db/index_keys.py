"""Keys of indexes: what ``i`` and ``j`` begin with, and what one is made of (``records``)."""

from __future__ import annotations

from struct import Struct as Packer
from typing import Final

from entidb.db.records import INDEX, INDEX_COUNT, NOT_ONE, unreadable
from entidb.storage.base import KEY_BYTES_MAX
from entidb.types import ID_BYTES

#: Fields of places from, and up to (None: to the end).
Span = tuple[bytes, bytes | None]

_INDEX = Packer(">cII")
#: In an index of ``each`` member the place of an entity whose field is no list but text, of which
#: ``contains`` asks too. Before all members.
WHOLE_TEXT: Final = b"\x02"
#: What of an entity's fields has room in a key; the rest of it is cut.
INDEXED_BYTES_MAX: Final = KEY_BYTES_MAX - _INDEX.size - ID_BYTES


def index_prefix(index: int, table: int) -> bytes:
    """What the places of a table's entities in an index begin with."""
    return _INDEX.pack(INDEX, index, table)


def index_count_key(index: int, table: int) -> bytes:
    return _INDEX.pack(INDEX_COUNT, index, table)


def split_index_key(key: bytes) -> tuple[int, int, bytes, bytes]:
    """(index, table, fields, entity_id)"""
    try:
        _, index, table = _INDEX.unpack_from(key)
    except NOT_ONE as error:
        raise unreadable("a key of an index", key) from error
    return index, table, key[_INDEX.size : -ID_BYTES], key[-ID_BYTES:]
