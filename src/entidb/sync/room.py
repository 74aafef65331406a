"""How much one pull may bring: a server whose pages never end must not fill a device's disk."""

from __future__ import annotations

import shutil
from typing import Final

from entidb.errors import StorageError, StorageFullError
from entidb.protocol import PullResponse, operations_count, payload_bytes
from entidb.storage import Storage

#: Bytes of one pull before it is complete: more than the first sync of any device's database.
STAGED_BYTES_MAX: Final = 16 << 30
#: Up to here a pull goes on without a look at the disk.
STAGED_BYTES_SMALL: Final = 64 << 20
#: A pull may bring this many times what is still free: three quarters of what was free before it.
STAGED_SHARE: Final = 3
#: What a row takes beside its value, about.
ROW_BYTES: Final = 64
#: How much of a segment is proved: each value, or a sample of them.
PROVE_ALL: Final = "all"
PROVE_SAMPLE: Final = "sample"


def staged_bytes(response: PullResponse) -> int:
    """About what a page takes when it is staged."""
    return payload_bytes(response) + ROW_BYTES * operations_count(response)


def check_room(storage: Storage, size: int, staged_bytes_max: int) -> None:
    """Raises ``StorageFullError`` (pull_too_large) unless a pull may take ``size`` bytes in all;
    what was staged before stays, and the next pull goes on from there."""
    if size > staged_bytes_max:
        raise StorageFullError(
            f"the server sends more than staged_bytes_max ({staged_bytes_max} bytes) in one pull; "
            "what arrived is kept out of sight, so raise the setting to go on from there",
            code="pull_too_large",
        )
    if size <= STAGED_BYTES_SMALL:
        return  # a disk without room for that raises by itself
    info = storage.info()
    if info.path is None:
        return
    room = _free_bytes(info.path) + max(0, info.file_bytes - info.used_bytes)
    if size > STAGED_SHARE * room:
        raise StorageFullError(
            f"the server sends {size} bytes in one pull and goes on, with {room} left on the "
            "disk; what arrived is kept out of sight, so free space to go on from there",
            code="pull_too_large",
        )


def _free_bytes(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        raise StorageError(f"how full the disk of {path} is cannot be read") from error


__all__ = [
    "PROVE_ALL",
    "PROVE_SAMPLE",
    "ROW_BYTES",
    "STAGED_BYTES_MAX",
    "check_room",
    "staged_bytes",
]
