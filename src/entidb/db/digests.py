"""Digests over what the server has of a collection, on the server and on a device (R34).

Both read a range of a table in the order of its ids. Of an entity with pending changes its base
counts, since that is what the server has; a deleted one does not count. Nothing here decides which
ranges to compare, and nothing is changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from struct import Struct as Packer
from typing import Final

from entidb.db.catalogue import CollectionInfo
from entidb.db.entities import Entities
from entidb.db.records import (
    DIRTY,
    ENTITY_HEAD,
    TOMBSTONE,
    decode_entity,
    versions_of,
)
from entidb.types import ID_BYTES

#: Bytes of a digest: of SHA-256, the first ones.
DIGEST_BYTES: Final = 16
#: Rows that are read at a time: few until it is known that they are small.
_READ_ROWS: Final = 16
_READ_ROWS_MAX: Final = 512
_READ_BYTES: Final = 4 * 1024 * 1024
_LAST_ID: Final = b"\xff" * ID_BYTES
_HEAD = Packer(">QI").pack

#: An entity as the server has it: id, version, payload; None: it has none.
Settled = tuple[bytes, int, bytes | None]


class Digest:
    """The digest of entities that are added in the order of their ids."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.sha256()

    def add(self, entity_id: bytes, version: int, payload: bytes) -> None:
        self.count += 1
        self._hash.update(entity_id + _HEAD(version, len(payload)) + payload)

    def value(self) -> bytes:
        return self._hash.digest()[:DIGEST_BYTES]


def digest_of(entity_id: bytes, version: int, payload: bytes) -> bytes:
    """The digest of one entity alone."""
    digest = Digest()
    digest.add(entity_id, version, payload)
    return digest.value()


def settled(
    view: Entities, info: CollectionInfo, after: bytes | None, last: bytes = _LAST_ID
) -> Iterator[Settled]:
    """The rows of a collection beyond ``after`` (None: from the first) up to ``last``, as the
    server has them. The snapshot of ``view`` must stay open meanwhile."""
    start = info.prefix + (b"" if after is None else after + b"\x00")
    stop, limit = info.prefix + last + b"\x00", _READ_ROWS
    while rows := view.snapshot.scan(start, stop, limit=limit):
        for (key, raw), version in zip(rows, versions_of([raw for _, raw in rows]), strict=True):
            flags = raw[0]
            if flags & (DIRTY | TOMBSTONE):
                yield _unlike(view, info, key[-ID_BYTES:], raw)
            else:
                yield key[-ID_BYTES:], version, raw[ENTITY_HEAD:]
        if len(rows) < limit:
            return
        start = rows[-1][0] + b"\x00"
        mean = sum([len(raw) for _, raw in rows]) // len(rows) + 1
        limit = max(_READ_ROWS, min(_READ_BYTES // mean, _READ_ROWS_MAX))


def _unlike(view: Entities, info: CollectionInfo, entity_id: bytes, raw: bytes) -> Settled:
    """As ``settled``, of a row that is deleted here, or has pending changes."""
    row = decode_entity(raw)
    if not row.pending:
        return entity_id, row.version, None
    base = view.base((info.number, entity_id), row)
    return entity_id, base.version, base.payload


def blocks_between(
    rows: Iterator[Settled], lasts: Sequence[bytes], without: Collection[bytes] = ()
) -> list[tuple[int, bytes]]:
    """Of each block, which ends at one of ``lasts``, how many entities there are and their digest;
    those in ``without`` count nowhere. ``rows`` reach as far as the last of them."""
    blocks: list[tuple[int, bytes]] = []
    digest = Digest()
    for entity_id, version, payload in rows:
        while entity_id > lasts[len(blocks)]:
            blocks.append((digest.count, digest.value()))
            digest = Digest()
        if payload is not None and entity_id not in without:
            digest.add(entity_id, version, payload)
    while len(blocks) < len(lasts):
        blocks.append((digest.count, digest.value()))
        digest = Digest()
    return blocks


__all__ = ["DIGEST_BYTES", "Digest", "Settled", "blocks_between", "digest_of", "settled"]
