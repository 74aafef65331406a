"""LMDB's table of readers, ``lock.mdb``: made before LMDB makes it, with room on the disk.

LMDB makes the file longer and writes to it through memory. A page of it for which a full disk has
no room is then a SIGBUS, which no program survives: so all pages are had before it is mapped.

Not here: what is in the table.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from entidb.storage.directories import NO_FOLLOW, check_file, give_as, open_file
from entidb.storage.disk_errors import is_full

LMDB_LOCK: Final = "lock.mdb"
#: Readers at once.
READERS_MAX: Final = 512
#: What LMDB makes of so many readers: a line of a processor's cache for each, and three before.
_TABLE_BYTES: Final = 64 * (READERS_MAX + 2)
_BLOCK_BYTES: Final = 512  # of ``st_blocks``, whatever the file system has


def make_table(path: str, like: os.stat_result, alone: bool) -> None:
    """Make the table at ``path``, whose owner and rights are those of ``like``. Of one that is
    there a file system may have kept only some pages; where this process is ``alone`` the others
    are had too, if there is room. Raises ``FormatError`` for what is no file, and ``OSError``; then
    none was made."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        _make(path, like)
        return
    check_file(path, found)
    # One that others use is not opened: closing it would take LMDB's record locks away.
    if alone and _allocated(found) < _TABLE_BYTES:
        _fill(path, found)


def _make(path: str, like: os.stat_result) -> None:
    try:
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
    except FileExistsError:  # another process has made it meanwhile
        return
    try:
        give_as(made, like)
        left = memoryview(bytes(_TABLE_BYTES))
        while left:
            left = left[os.write(made, left) :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(made)


def _fill(path: str, found: os.stat_result) -> None:
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is None:
        return
    descriptor = open_file(path, os.O_RDWR | NO_FOLLOW)
    try:
        allocate(descriptor, 0, _TABLE_BYTES)
    except OSError as error:
        # With its first page it does for some readers, and the database has to open on a full disk.
        if is_full(error.errno or 0) and not _allocated(found):
            raise
    finally:
        os.close(descriptor)


def _allocated(found: os.stat_result) -> int:
    """Bytes that the file has on the disk; where the system does not say, as many as it is long."""
    blocks: int | None = getattr(found, "st_blocks", None)
    return found.st_size if blocks is None else blocks * _BLOCK_BYTES


__all__ = ["LMDB_LOCK", "READERS_MAX", "make_table"]
