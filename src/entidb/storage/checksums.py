"""What a store on disk keeps of a batch: a CRC-32 over key and value ends each value, because
neither LMDB nor a PostgreSQL without page checksums notices a flipped bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from operator import add
from typing import Final, cast

from entidb.errors import StorageError
from entidb.storage.base import KEY_BYTES_MAX, Batch
from entidb.storage.crc import crc32

#: LMDB's own bound on a value is 4 GiB; this one leaves room for the checksum on any system.
_VALUE_BYTES_MAX: Final = 2**31 - 16
#: Records of a commit that are looked at without stepping through them in Python twice.
_FEW: Final = 16
#: CRC-32 of anything followed by its own CRC-32, little-endian: one call proves a record. Key and
#: value are put together for it: below half a KiB that takes a third less than going on from one
#: to the other, and a tenth more above.
RESIDUE: Final = 0x2144DF1C
U32: Final = struct.Struct("<I")


class ManyPuts:
    """Pairs of a key and a value with its checksum, in the order of their keys. They are made as
    they are asked for, each time anew: all at once would be the whole batch once more in memory."""

    __slots__ = ("_keys", "_values")

    def __init__(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        self._keys, self._values = keys, values

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        # Of most records the checksum of both put together takes a third less than one of each.
        sums = map(U32.pack, map(crc32, map(add, self._keys, self._values)))
        return zip(self._keys, map(add, self._values, sums), strict=True)


Puts = list[tuple[bytes, bytes]] | ManyPuts


def stage(batch: Batch) -> tuple[Puts, list[bytes]]:
    """The batch in key order with its checksums, and the keys to delete. Everything a backend would
    refuse is refused here, where no transaction has to be aborted for it."""
    keys = sorted(batch)
    if len(keys) > _FEW:
        return _many(keys, batch)
    # All together are no longer than one may be, in most commits.
    if len(b"".join(keys)) > KEY_BYTES_MAX or not all(keys[:1]):
        _check_keys(keys)
    pack = U32.pack
    few: list[tuple[bytes, bytes]] = []
    deletes: list[bytes] = []
    for key in keys:
        value = batch[key]
        if value is None:
            deletes.append(key)
        elif len(value) > _VALUE_BYTES_MAX:
            raise _too_long()
        else:
            few.append((key, value + pack(crc32(key + value))))
    return few, deletes


def _many(keys: list[bytes], batch: Batch) -> tuple[Puts, list[bytes]]:
    """``stage`` without stepping through the records in Python."""
    _check_keys(keys)
    deletes: list[bytes] = []
    there = list(map(batch.__getitem__, keys))
    values = cast("list[bytes]", there)
    try:
        longest = max(map(len, values))
    except TypeError:
        # Where some are to be deleted, which is not worth a look at each where none is.
        deletes = [key for key in keys if batch[key] is None]
        keys = [key for key in keys if batch[key] is not None]
        values = [value for value in there if value is not None]
        longest = max(map(len, values), default=0)
    if longest > _VALUE_BYTES_MAX:
        raise _too_long()
    return ManyPuts(keys, values), deletes


def _check_keys(keys: list[bytes]) -> None:
    longest = max(map(len, keys), default=1)
    if longest > KEY_BYTES_MAX or (keys and not keys[0]):
        raise StorageError(
            f"a key of {longest if keys[0] else 0} bytes cannot be stored; keys have 1 to "
            f"{KEY_BYTES_MAX} bytes"
        )


def _too_long() -> StorageError:
    return StorageError(f"a value of over {_VALUE_BYTES_MAX} bytes cannot be stored; split it")
