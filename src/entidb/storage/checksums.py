"""What a store on disk keeps of a batch: a CRC-32 over key and value ends each value, because
neither LMDB nor a PostgreSQL without page checksums notices a flipped bit.
"""

from __future__ import annotations

import struct
from operator import add
from typing import Final, cast
from zlib import crc32

from entidb.errors import StorageError
from entidb.storage.base import KEY_BYTES_MAX, Batch

#: LMDB's own bound on a value is 4 GiB; this one leaves room for the checksum on any system.
_VALUE_BYTES_MAX: Final = 2**31 - 16
#: Records of a commit that are looked at without stepping through them in Python twice.
_FEW: Final = 16
#: CRC-32 of anything followed by its own CRC-32, little-endian: one call proves a record.
RESIDUE: Final = 0x2144DF1C
U32: Final = struct.Struct("<I")


def stage(batch: Batch) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """The batch in key order with its checksums, and the keys to delete. Everything a backend would
    refuse is refused here, where no transaction has to be aborted for it."""
    keys = sorted(batch)
    # All together are no longer than one may be, in most commits.
    if len(keys) > _FEW or len(b"".join(keys)) > KEY_BYTES_MAX or not all(keys[:1]):
        _check(keys, batch)
    pack = U32.pack
    if len(keys) <= _FEW:
        few: list[tuple[bytes, bytes]] = []
        deletes: list[bytes] = []
        for key in keys:
            value = batch[key]
            if value is None:
                deletes.append(key)
            elif len(value) > _VALUE_BYTES_MAX:
                raise _too_long()
            else:
                few.append((key, value + pack(crc32(value, crc32(key)))))
        return few, deletes
    try:
        return _with_checksums(keys, batch), []
    except TypeError:
        # Where some are to be deleted, which is not worth a look at each where none is.
        deletes = [key for key in keys if batch[key] is None]
        return _with_checksums([key for key in keys if batch[key] is not None], batch), deletes


def _with_checksums(keys: list[bytes], batch: Batch) -> list[tuple[bytes, bytes]]:
    """Raises ``TypeError`` if one of ``keys`` has no value."""
    values = cast("list[bytes]", list(map(batch.__getitem__, keys)))
    sums = map(U32.pack, map(crc32, values, map(crc32, keys)))
    return list(zip(keys, map(add, values, sums), strict=True))


def _check(keys: list[bytes], batch: Batch) -> None:
    longest = max(map(len, keys), default=1)
    if longest > KEY_BYTES_MAX or (keys and not keys[0]):
        raise StorageError(
            f"a key of {longest if keys[0] else 0} bytes cannot be stored; keys have 1 to "
            f"{KEY_BYTES_MAX} bytes"
        )
    if max(map(len, filter(None, batch.values())), default=0) > _VALUE_BYTES_MAX:
        raise _too_long()


def _too_long() -> StorageError:
    return StorageError(f"a value of over {_VALUE_BYTES_MAX} bytes cannot be stored; split it")
