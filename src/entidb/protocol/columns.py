"""A pulled page in columns: its operations without an object for each of them."""

from __future__ import annotations

import array
import io
import itertools
import struct
import sys
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from entidb.protocol.messages import PullColumns, PullCommit, PullOperation, PullResponse
from entidb.types import ID_BYTES

# --- columns ----------------------------------------------------------------------------------

#: In ``PullColumns.sizes``: there is no payload.
TOMBSTONE_SIZE: Final = 0xFFFFFFFF
COLUMN_HEAD_BYTES: Final = 32


class ColumnRows(Struct, frozen=True):
    """``PullColumns`` cut into rows, one list for each column."""

    ids: list[bytes]
    heads: list[bytes]
    payloads: list[bytes | None]
    indexes: tuple[int, ...]
    versions: list[int]
    timestamps: list[int]


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
    numbers = _u64s(columns.heads)
    return ColumnRows(
        _cut(columns.ids, _IDS, ID_BYTES),
        _cut(columns.heads, _HEADS, COLUMN_HEAD_BYTES),
        payloads,
        struct.unpack(f">{count}H", columns.indexes),
        numbers[::4].tolist(),
        numbers[3::4].tolist(),
    )


_AT_ONCE: Final = 64
_IDS: Final = struct.Struct(f"{ID_BYTES}s" * _AT_ONCE)
_HEADS: Final = struct.Struct(f"{COLUMN_HEAD_BYTES}s" * _AT_ONCE)


def _cut(column: bytes, many: struct.Struct, size: int) -> list[bytes]:
    """``column`` in pieces of ``size`` bytes; ``many`` cuts 64 of them in one step."""
    whole = len(column) - len(column) % many.size
    pieces: list[bytes] = list(
        itertools.chain.from_iterable(many.iter_unpack(memoryview(column)[:whole]))
    )
    pieces += [column[at : at + size] for at in range(whole, len(column), size)]
    return pieces


def column_versions(heads: bytes) -> list[int]:
    """The version in each of ``PullColumns.heads``."""
    return _u64s(heads)[::4].tolist()


def _u64s(column: bytes) -> array.array[int]:
    """Every eight bytes of ``column``, big-endian."""
    numbers = array.array("Q", column)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def expanded(response: PullResponse) -> PullResponse:
    """The same page with commits, whichever way it came."""
    if response.columns is None:
        return response
    rows = column_rows(response.columns)
    commits: list[PullCommit] = []
    operations: list[PullOperation] = []
    last = 0
    for version, head, timestamp, index, entity_id, payload in zip(
        rows.versions,
        rows.heads,
        rows.timestamps,
        rows.indexes,
        rows.ids,
        rows.payloads,
        strict=True,
    ):
        if version != last:
            operations = []
            commits.append(PullCommit(version, head[8:24], timestamp, operations))
            last = version
        operations.append(PullOperation(index, entity_id, payload))
    return replace(response, commits=commits, columns=None)
