"""A pulled page in columns: its operations without an object for each of them.

Columns are made of fields and cut into fields. What a store puts on its disk is its own affair,
also where some of it looks the same.
"""

from __future__ import annotations

import array
import functools
import io
import itertools
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from entidb.protocol.messages import PullColumns, PullCommit, PullOperation, PullResponse
from entidb.types import ID_BYTES

# --- columns ----------------------------------------------------------------------------------

#: In ``PullColumns.sizes``: there is no payload.
TOMBSTONE_SIZE: Final = 0xFFFFFFFF
COLUMN_HEAD_BYTES: Final = 32
#: Version, device and timestamp.
_HEAD: Final = "Q16sQ"
_FIELDS: Final = 3


class ColumnRows(Struct, frozen=True):
    """``PullColumns`` cut into rows, one list for each field."""

    ids: list[bytes]
    versions: list[int]
    devices: list[bytes]
    timestamps: list[int]
    payloads: list[bytes | None]
    indexes: tuple[int, ...]


def column_rows(columns: PullColumns) -> ColumnRows:
    """The rows of columns that ``decode`` has accepted."""
    values = columns.values
    count = len(columns.ids) // ID_BYTES
    sizes = struct.unpack(f">{count}I", columns.sizes)
    payloads: list[bytes | None]
    if TOMBSTONE_SIZE in sizes:
        ends = itertools.accumulate(0 if n == TOMBSTONE_SIZE else n for n in sizes)
        payloads = [
            None if n == TOMBSTONE_SIZE else values[end - n : end]
            for n, end in zip(sizes, ends, strict=True)
        ]
    else:
        # One cut after the other, without a step of Python for each.
        payloads = list(map(io.BytesIO(values).read, sizes))
    heads = cut_column(columns.heads, _HEAD, COLUMN_HEAD_BYTES)
    return ColumnRows(
        cut_column(columns.ids, f"{ID_BYTES}s", ID_BYTES),
        heads[::_FIELDS],
        heads[1::_FIELDS],
        heads[2::_FIELDS],
        payloads,
        struct.unpack(f">{count}H", columns.indexes),
    )


#: Rows that are packed or cut in one step.
_AT_ONCE: Final = 64


@functools.lru_cache(maxsize=4 * _AT_ONCE)
def _rows(count: int, row: str) -> struct.Struct:
    return struct.Struct(">" + row * count)


def column_heads(fields: Sequence[Any]) -> bytes:
    """``PullColumns.heads`` of version, device and timestamp of each row, one after another; of at
    most a hundred rows or so at a time."""
    return _rows(len(fields) // _FIELDS, _HEAD).pack(*fields)


def cut_column(column: bytes | memoryview, row: str, size: int) -> list[Any]:
    """The fields of ``column``, whose rows are like ``row`` and take ``size`` bytes."""
    rest = len(column) // size % _AT_ONCE
    whole = len(column) - rest * size
    many = _rows(_AT_ONCE, row).iter_unpack(memoryview(column)[:whole])
    fields = list(itertools.chain.from_iterable(many))
    fields += _rows(rest, row).unpack(memoryview(column)[whole:])
    return fields


def column_versions(heads: bytes) -> list[int]:
    """The version in each of ``PullColumns.heads``."""
    numbers = array.array("Q", heads)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers[:: COLUMN_HEAD_BYTES // 8].tolist()


def expanded(response: PullResponse) -> PullResponse:
    """The same page with commits, whichever way it came."""
    if response.columns is None:
        return response
    rows = column_rows(response.columns)
    commits: list[PullCommit] = []
    operations: list[PullOperation] = []
    last = 0
    for version, device, timestamp, index, entity_id, payload in zip(
        rows.versions,
        rows.devices,
        rows.timestamps,
        rows.indexes,
        rows.ids,
        rows.payloads,
        strict=True,
    ):
        if version != last:
            operations = []
            commits.append(PullCommit(version, device, timestamp, operations))
            last = version
        operations.append(PullOperation(index, entity_id, payload))
    return replace(response, commits=commits, columns=None)
