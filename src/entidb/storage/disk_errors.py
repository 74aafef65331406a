"""What the system says when a file cannot be written or read, in words that say what to do next.

Not here: what LMDB itself finds wrong (``lmdb/failures``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from typing import Final

from entidb.errors import StorageError, StorageFullError

#: Errors that mean "no room": what to do about each.
_FULL: Final = {
    errno.ENOSPC: "the disk is full; free space and try again",
    errno.EDQUOT: "the disk quota is used up; free space, or ask for more",
    errno.EFBIG: "the file may not become larger: the file system has a limit; move the database "
    "to another one",
}
_OTHERS: Final = {
    errno.EIO: "the disk reports an input/output error; look into the system's log, and check it",
    errno.EROFS: "the file system is read-only; make it writable",
    errno.EACCES: "no permission; check owner and mode of the directory and the files in it",
    errno.EPERM: "not permitted; check owner and mode of the directory and the files in it",
    errno.ENOENT: "something that belongs to it is gone, or a directory on the way; check the path",
    errno.ENOTDIR: "a file stands where a directory has to be; check the path",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.EMFILE: "this process has too many files open; raise its limit (ulimit -n), or open "
    "fewer databases",
    errno.ENFILE: "the system has too many files open; close some",
    errno.ENOMEM: "the system gives this process no more memory or address space (ulimit -v); "
    "raise the limit, or open fewer databases",
    errno.EBUSY: "it is in use; try again",
    errno.ENOLCK: "the file system knows no locks; use a local disk",
    errno.ESTALE: "the network file system lost the file; use a local disk",
}
#: What another path, or other rights there, would change.
_ABOUT_PLACE: Final = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )
)
#: A write that stopped so near to the limit of file sizes was stopped by it.
_NEAR_BYTES: Final = 2**18
_PROBE_BYTES: Final = 2**16


def is_full(code: int) -> bool:
    """Whether the system's error ``code`` says that something has no room left."""
    return code in _FULL


def is_about_place(code: int) -> bool:
    """Whether the system's error ``code`` is about the path that was given, so that another one,
    or other rights, are what helps."""
    return code in _ABOUT_PLACE


def disk_error(code: int, doing: str) -> StorageError:
    """The error for what the system calls ``code``, met while ``doing`` something."""
    if code in _FULL:
        limit = file_size_limit() if code == errno.EFBIG else None
        hint = _FULL[code] if limit is None else _limit_hint(limit)
        return StorageFullError(f"{doing}: {hint}")
    return StorageError(f"{doing}: {_OTHERS.get(code) or os.strerror(code).lower()}")


def said_of(error: BaseException, doing: str) -> str:
    """What ``error``, met while ``doing`` something, says to a person: where, and what to do. One
    of ours says so itself."""
    if not isinstance(error, OSError):
        return f"{doing}: {error}"
    if isinstance(error.filename, str | bytes):
        doing = f"{doing} ({os.fsdecode(error.filename)})"
    return f"{doing}: {error}" if error.errno is None else str(disk_error(error.errno, doing))


def short_write_error(directory: str, data_bytes: int, doing: str) -> StorageError:
    """The error for a write that stopped half-way in a file of ``data_bytes``, which says nothing
    of what stopped it: the limits are asked, and then the disk, with a small file."""
    limit = file_size_limit()
    if limit is not None and data_bytes + _NEAR_BYTES > limit:
        return StorageFullError(f"{doing}: {_limit_hint(limit)}")
    with contextlib.suppress(OSError):
        room = os.statvfs(directory)
        if room.f_bavail * room.f_frsize < 2**20:
            return disk_error(errno.ENOSPC, doing)
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            left = memoryview(bytes(_PROBE_BYTES))
            while left:
                left = left[file.write(left) or 0 :]
            os.fsync(file.fileno())
    except OSError as error:
        return disk_error(error.errno or errno.EIO, doing)
    return disk_error(errno.EIO, doing)


def file_size_limit() -> int | None:
    """Bytes that a file written by this process may have (RLIMIT_FSIZE); None: no limit."""
    return _limit("RLIMIT_FSIZE")


def address_space_limit() -> int | None:
    """Bytes of address space that this process may have; None: more than will be used."""
    if sys.maxsize < 2**32:
        return 2**31
    return _limit("RLIMIT_AS")


def _limit(name: str) -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    found: int = resource.getrlimit(getattr(resource, name))[0]
    return None if found == resource.RLIM_INFINITY else found


def _limit_hint(limit: int) -> str:
    return (
        f"a file of this process may have {limit} bytes (ulimit -f, RLIMIT_FSIZE), and the "
        "database has reached that; raise the limit and try again"
    )
