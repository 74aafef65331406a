"""A segment: an immutable file with entities of one collection, which any language can read.

    EntiDB-segment   the magic, 14 bytes
    version          2 bytes, big-endian: 1
    length           4 bytes, big-endian: bytes of the header that follows
    header           a map in CBOR (``SegmentHeader``); unknown keys are ignored
    body             to the end of the file: ``packing`` of the columns, one after another

The columns are those of ``PullColumns``, row by row and big-endian: ids (16 bytes each), heads (32:
version, device, timestamp), sizes (4), and the values. There are no tombstones, and nothing that
only a server needs. A segment is named by the SHA-256 of the whole file, and the same rows make the
same file again.

Pure functions without I/O. Where segments lie, and who may have which, is for the server.
"""

from __future__ import annotations

import array
import io
import itertools
import operator
import struct
import sys
from collections.abc import Iterator
from typing import Annotated, Final

from msgspec import Meta, Struct, ValidationError, convert

from entidb import cbor, packing
from entidb.collector import paused
from entidb.errors import CborDecodeError, InvalidNameError, SyncCodecError
from entidb.protocol.columns import (
    COLUMN_HEAD_BYTES,
    TOMBSTONE_SIZE,
    ColumnRows,
    column_rows,
    cut_column,
)
from entidb.protocol.limits import LIMITS, Uint
from entidb.protocol.messages import SEGMENT_ROWS_MAX, Id, Name, PullColumns
from entidb.types import ID_BYTES, check_name

MAGIC: Final = b"EntiDB-segment"
VERSION: Final = 1
#: Unpacked columns of a segment at most; one entity alone may be larger, up to what a message may
#: be.
SEGMENT_BYTES_MAX: Final = 8 * 1024 * 1024
#: What a row takes beside its value.
ROW_BYTES: Final = ID_BYTES + COLUMN_HEAD_BYTES + 4
#: Bytes of a header at most, magic, version and length included.
HEADER_BYTES_MAX: Final = 4096
_FIXED: Final = struct.Struct(f">{len(MAGIC)}sHI")
#: In ``SegmentHeader.packing``, beside the encodings of ``packing``.
PLAIN: Final = "none"


class SegmentHeader(Struct, frozen=True, kw_only=True):
    """What a segment says of itself: so many ``rows`` of ``collection``, from the id ``first`` to
    the id ``last``; ``size`` bytes of columns, packed with ``packing``."""

    collection: Name
    rows: Annotated[int, Meta(ge=1, le=SEGMENT_ROWS_MAX)]
    first: Id
    last: Id
    packing: Annotated[str, Meta(min_length=1, max_length=32)]
    size: Uint


class SegmentColumns(Struct, frozen=True):
    """The rows of a segment in columns, as those of ``PullColumns``."""

    ids: bytes
    heads: bytes
    sizes: bytes
    values: bytes

    @property
    def rows(self) -> int:
        return len(self.ids) // ID_BYTES


def encode_segment(collection: str, columns: SegmentColumns, packed_with: str) -> bytes:
    """The file. ``columns`` hold their promises (``decode_segment`` checks them): ids ascend,
    there are 1 to ``SEGMENT_ROWS_MAX`` rows of at most ``SEGMENT_BYTES_MAX`` together, or one row
    alone. ``packed_with`` is one of ``packing.ENCODINGS``, or ``none``."""
    body = b"".join((columns.ids, columns.heads, columns.sizes, columns.values))
    header = cbor.encode_message(
        {
            "collection": collection,
            "rows": columns.rows,
            "first": columns.ids[:ID_BYTES],
            "last": columns.ids[-ID_BYTES:],
            "packing": packed_with,
            "size": len(body),
        }
    )
    packed = body if packed_with == PLAIN else packing.compress(packed_with, body)
    return _FIXED.pack(MAGIC, VERSION, len(header)) + header + packed


def decode_header(data: bytes) -> tuple[SegmentHeader, int]:
    """The header of a segment of which ``data`` is the beginning, ``HEADER_BYTES_MAX`` bytes or
    more if it has so many; and where its body begins. Raises ``SyncCodecError``."""
    if len(data) < _FIXED.size:
        raise SyncCodecError(f"this is no segment: it has {len(data)} bytes")
    magic, version, length = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise SyncCodecError("this is no segment: it begins with other bytes")
    if version != VERSION:
        raise SyncCodecError(f"this segment is of version {version}, and this program reads 1")
    begin = _FIXED.size + length
    if begin > HEADER_BYTES_MAX or begin > len(data):
        raise SyncCodecError("the header of this segment is cut off, or too long")
    try:
        raw = cbor.decode(data[_FIXED.size : begin])
        header = convert(raw, SegmentHeader, builtin_types=(bytes,), strict=True)
        check_name(header.collection)
    except (CborDecodeError, ValidationError, InvalidNameError) as error:
        raise SyncCodecError(f"the header of this segment cannot be read: {error}") from error
    _check_header(header)
    return header, begin


class UnknownPackingError(SyncCodecError):
    """A segment that may be as good as any, and that this program has no package to unpack."""


def _check_header(header: SegmentHeader) -> None:
    least = ROW_BYTES * header.rows
    most = SEGMENT_BYTES_MAX if header.rows > 1 else LIMITS.message_bytes_max
    if not least <= header.size <= most:
        raise SyncCodecError(f"a segment of {header.rows} rows does not have {header.size} bytes")
    if header.first > header.last or (header.rows == 1) != (header.first == header.last):
        raise SyncCodecError(f"a segment of {header.rows} rows does not have these ids at its ends")
    if header.packing not in (PLAIN, *packing.ENCODINGS):
        with_extra = ': pip install "entidb[zstd]"' if header.packing == "zstd" else ""
        raise UnknownPackingError(f"this program cannot unpack {header.packing!r:.40}{with_extra}")


class UnpackedSegment(Struct, frozen=True):
    """A segment that holds what the module says of it: its ids, and the rest as it is there."""

    header: SegmentHeader
    ids: list[bytes]
    newest_version: int
    newest_timestamp: int
    _body: bytes
    _sizes: array.array[int]

    def heads(self) -> list[bytes]:
        """Version, device and timestamp of each row, in one piece."""
        rows, size = len(self.ids), COLUMN_HEAD_BYTES
        return cut_column(
            memoryview(self._body)[self._heads_at() :][: size * rows], f"{size}s", size
        )

    def payloads(self) -> Iterator[bytes]:
        """One cut after the other, without a step of Python for each, nor all of them at once."""
        body = io.BytesIO(self._body)
        body.seek(ROW_BYTES * len(self.ids))
        return map(body.read, self._sizes)

    def sample(self, first: int, step: int) -> list[bytes]:
        """Every so many values."""
        body, rows = self._body, len(self.ids)
        begins = itertools.accumulate(self._sizes, initial=ROW_BYTES * rows)
        some = itertools.islice(begins, first, rows, step)
        sizes = self._sizes[first::step]
        return [body[begin : begin + size] for begin, size in zip(some, sizes, strict=True)]

    def version(self, at: int) -> int:
        begin = self._heads_at() + COLUMN_HEAD_BYTES * at
        return int.from_bytes(self._body[begin : begin + 8])

    def columns(self) -> SegmentColumns:
        body, rows = self._body, len(self.ids)
        heads, values = self._heads_at(), ROW_BYTES * rows
        sizes = heads + COLUMN_HEAD_BYTES * rows
        return SegmentColumns(body[:heads], body[heads:sizes], body[sizes:values], body[values:])

    def _heads_at(self) -> int:
        return ID_BYTES * len(self.ids)


def unpack_segment(data: bytes) -> UnpackedSegment:
    """A segment, whole; all that the module says of it holds afterwards.

    Raises ``SyncCodecError`` for anything else, having taken no more memory than the largest
    segment does. Values are not looked into: they are cut as their sizes say, and none is empty.
    Whether the file has the SHA-256 by which it was asked for is for the caller.
    """
    header, begin = decode_header(data)
    body = data[begin:]
    if header.packing != PLAIN:
        body = packing.decompress(header.packing, body, header.size, "the segment", _too_large)
    if len(body) != header.size:
        raise SyncCodecError(f"the segment has {len(body)} bytes and says {header.size}")
    with paused():
        return _checked(header, body)


def decode_segment(data: bytes) -> tuple[SegmentHeader, SegmentColumns]:
    """As ``unpack_segment``: the header, and the columns as they are there."""
    unpacked = unpack_segment(data)
    return unpacked.header, unpacked.columns()


def _too_large(limit: int) -> SyncCodecError:
    return SyncCodecError(f"the segment has more than the {limit} bytes that it says")


def _checked(header: SegmentHeader, body: bytes) -> UnpackedSegment:
    view, rows = memoryview(body), header.rows
    ends = ID_BYTES * rows, (ID_BYTES + COLUMN_HEAD_BYTES) * rows, ROW_BYTES * rows
    ids: list[bytes] = cut_column(view[: ends[0]], f"{ID_BYTES}s", ID_BYTES)
    if (ids[0], ids[-1]) != (header.first, header.last):
        raise SyncCodecError("the segment has other ids at its ends than its header says")
    if not all(map(operator.lt, ids, itertools.islice(ids, 1, None))):
        raise SyncCodecError("the ids of the segment do not ascend, or one comes twice")
    sizes = _numbers("I", view[ends[1] : ends[2]])
    assert sizes.itemsize == 4, "every platform of CPython has ints of 32 bits"
    least, most = min(sizes), max(sizes)
    if least == 0 or most == TOMBSTONE_SIZE:
        raise SyncCodecError("a segment has no entity without a value")
    if sum(sizes) != len(body) - ends[2]:
        raise SyncCodecError("the values of the segment are not as long as their sizes together")
    heads = _numbers("Q", view[ends[0] : ends[1]])
    versions, times = heads[:: COLUMN_HEAD_BYTES // 8], heads[3 :: COLUMN_HEAD_BYTES // 8]
    if min(versions) < 1:
        raise SyncCodecError("an entity of the segment has version 0")
    return UnpackedSegment(header, ids, max(versions), max(times), body, sizes)


def _numbers(kind: str, column: memoryview) -> array.array[int]:
    numbers = array.array(kind)
    numbers.frombytes(column)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def segment_rows(columns: SegmentColumns) -> ColumnRows:
    """The rows of columns that ``decode_segment`` has accepted, one list for each field."""
    indexes = bytes(2 * columns.rows)
    return column_rows(
        PullColumns(
            ids=columns.ids,
            heads=columns.heads,
            sizes=columns.sizes,
            values=columns.values,
            indexes=indexes,
        )
    )


__all__ = [
    "HEADER_BYTES_MAX",
    "MAGIC",
    "PLAIN",
    "ROW_BYTES",
    "SEGMENT_BYTES_MAX",
    "VERSION",
    "SegmentColumns",
    "SegmentHeader",
    "UnknownPackingError",
    "UnpackedSegment",
    "decode_header",
    "decode_segment",
    "encode_segment",
    "segment_rows",
    "unpack_segment",
]
