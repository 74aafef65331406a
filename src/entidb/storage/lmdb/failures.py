"""How LMDB's errors, and what the system says below it, leave this package.

Not here: the words for what the system says (``disk_errors``).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

import lmdb

from entidb.errors import CorruptionError, EntiDBError, FormatError, StorageError, StorageFullError
from entidb.storage.disk_errors import disk_error

#: How LMDB's errors leave this module; the first match counts. Others are the system's.
_ERRORS: Final[tuple[tuple[type[Exception], type[StorageError], str], ...]] = (
    (lmdb.MapFullError, StorageFullError, "the map is full; open with a larger map_bytes"),
    (lmdb.ReadersFullError, StorageError, "too many open snapshots; close them sooner"),
    (lmdb.CorruptedError, CorruptionError, "the file is damaged; restore a backup"),
    (lmdb.PageNotFoundError, CorruptionError, "the file is damaged; restore a backup"),
    (lmdb.InvalidError, FormatError, "not a database; check the path"),
    (lmdb.VersionMismatchError, FormatError, "another LMDB format; check the path"),
)
#: What LMDB's errors for what the system says are called where they carry no number.
_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (lmdb.DiskError, errno.ENOSPC),
    (lmdb.ReadonlyError, errno.EACCES),
    (lmdb.MemoryError, errno.ENOMEM),
)


def storage_error(error: Exception, doing: str) -> StorageError:
    """Ours for what LMDB or the system raised. Their words do not go with it: they stand in what
    it is raised from."""
    if isinstance(error, EntiDBError):
        kind_of = type(error) if isinstance(error, StorageError) else StorageError
        return kind_of(f"{doing}: {error}", code=error.code)
    for kind, ours, hint in _ERRORS:
        if isinstance(error, kind):
            return ours(f"{doing}: {hint}")
    code = code_of(error)
    name = getattr(error, "filename", None)
    if isinstance(name, str) and os.path.isabs(name) and name not in doing.split():
        doing = f"{doing} ({name})"
    if code:
        return disk_error(code, doing)
    return StorageError(
        f"{doing}: this failed inside LMDB; run verify, and report it if all is well"
    )


def code_of(error: Exception) -> int:
    """The system's number for ``error``, 0 if it has none."""
    number = getattr(error, "errno", None) or getattr(error, "code", None)
    if isinstance(number, int) and number > 0:
        return number
    return next((code for kind, code in _CODES if isinstance(error, kind)), 0)


@contextlib.contextmanager
def foreign_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except (OSError, lmdb.Error) as error:
        raise storage_error(error, doing) from error
