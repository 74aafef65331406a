"""A collection, cut into segments.

Where a segment ends depends on the ids and sizes near that place alone, and not on what comes
before: so that a change in one place leaves the segments elsewhere as they are, and their files.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast

from msgspec import Struct

from entidb.db.catalogue import CollectionInfo
from entidb.db.records import payloads_of, shown_fields
from entidb.db.rows import ids_of
from entidb.db.writer import Writer
from entidb.protocol import (
    SEGMENT_BYTES_MAX,
    SEGMENT_ROWS_MAX,
    SegmentColumns,
    column_heads,
    encode_segment,
)
from entidb.protocol.segments import ROW_BYTES
from entidb.types import ID_BYTES

#: Rows that are read at a time: few until it is known that they are small.
_READ_ROWS: Final = 16
_READ_ROWS_MAX: Final = 512
_READ_BYTES: Final = 1024 * 1024
#: Rows whose fields are packed in one step.
_PACK_ROWS: Final = 64


class Sizes(Struct, frozen=True):
    """Unpacked bytes that a segment has before it may end, and how many more on average then."""

    least: int = 1024 * 1024
    more: int = 2 * 1024 * 1024


SIZES: Final = Sizes()


class Segment(Struct, frozen=True):
    """A segment that was made: the file, its name, and what a manifest says of it."""

    sha256: bytes
    data: bytes
    rows: int
    first: bytes
    last: bytes


def cut(
    view: Writer,
    info: CollectionInfo,
    packing: str,
    pause: Callable[[], None],
    sizes: Sizes = SIZES,
) -> Iterator[Segment]:
    """The entities of a collection in segments, in the order of their ids; ``pause`` is called
    after every few hundred rows. The snapshot of ``view`` must stay open meanwhile."""
    rows = _Rows(info.name, packing, sizes)
    for ids, fields, payloads in _read(view, info):
        yield from rows.add(ids, fields, payloads)
        pause()
    if rows.ids:
        yield rows.finish()


def _read(
    view: Writer, info: CollectionInfo
) -> Iterator[tuple[Sequence[bytes], Sequence[Any], Sequence[bytes]]]:
    """Ids, fields (version, device and time of each, one after another) and values of the
    entities, without those that are deleted."""
    start, stop, limit = info.prefix, info.prefix + b"\xff" * ID_BYTES + b"\0", _READ_ROWS
    while found := view.snapshot.scan(start, stop, limit=limit):
        for at in range(0, len(found), _PACK_ROWS):
            part = found[at : at + _PACK_ROWS]
            payloads = payloads_of([raw for _, raw in part])
            if None in payloads:
                part = [row for row, value in zip(part, payloads, strict=True) if value is not None]
                payloads = list(filter(None, payloads))
            if part:
                ids = ids_of([key for key, _ in part])
                fields = shown_fields([raw for _, raw in part])
                yield ids, fields, cast("list[bytes]", payloads)
        if len(found) < limit:
            return
        start = found[-1][0] + b"\0"
        mean = sum([len(raw) for _, raw in found]) // len(found) + 1
        limit = max(_READ_ROWS, min(_READ_BYTES // mean, _READ_ROWS_MAX))


class _Rows:
    """The segment that is being put together."""

    def __init__(self, collection: str, packing: str, sizes: Sizes) -> None:
        self.ids: list[bytes] = []
        self._heads: list[bytes] = []
        self._values: list[bytes] = []
        self._size = 0
        self._collection = collection
        self._packing = packing
        self._least, self._more = sizes.least, sizes.more

    def add(
        self, ids: Sequence[bytes], fields: Sequence[Any], payloads: Sequence[bytes]
    ) -> Iterator[Segment]:
        begin = 0
        for at, (entity_id, payload) in enumerate(zip(ids, payloads, strict=True)):
            weight = ROW_BYTES + len(payload)
            held = len(self.ids) + at - begin
            if held and (self._size + weight > SEGMENT_BYTES_MAX or held == SEGMENT_ROWS_MAX):
                self._take(ids[begin:at], fields[3 * begin : 3 * at], payloads[begin:at])
                begin = at
                yield self.finish()
            self._size += weight
            if self._size >= self._least and zlib.crc32(entity_id) * self._more < weight << 32:
                end = at + 1
                self._take(ids[begin:end], fields[3 * begin : 3 * end], payloads[begin:end])
                begin = end
                yield self.finish()
        self._take(ids[begin:], fields[3 * begin :], payloads[begin:])

    def _take(self, ids: Sequence[bytes], fields: Sequence[Any], payloads: Sequence[bytes]) -> None:
        if ids:
            self.ids += ids
            self._heads.append(column_heads(fields))
            self._values += payloads

    def finish(self) -> Segment:
        """What there is, as a segment; the next one begins."""
        ids, heads, values = self.ids, self._heads, self._values
        self.ids, self._heads, self._values, self._size = [], [], [], 0
        sizes = struct.pack(f">{len(values)}I", *map(len, values))
        columns = SegmentColumns(b"".join(ids), b"".join(heads), sizes, b"".join(values))
        data = encode_segment(self._collection, columns, self._packing)
        return Segment(hashlib.sha256(data).digest(), data, len(ids), ids[0], ids[-1])


__all__ = ["SIZES", "Segment", "Sizes", "cut"]
