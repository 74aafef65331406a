"""Whether a closed store can be opened without harm: LMDB stops the process where a page is not
what it must be.

A file that was closed here, and is untouched since, is what it was then. Any other is read once
before it is mapped, and what was found is remembered as long as the file is the same.

Not here: what is looked for in the file (``closed_file``, ``headers``, ``pages``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from entidb.errors import FormatError
from entidb.storage.directories import make_directory
from entidb.storage.lmdb.closed_file import write_headers_again
from entidb.storage.lmdb.failures import storage_error
from entidb.storage.lmdb.folder import TEMPORARY
from entidb.storage.lmdb.headers import UNREADABLE, Headers, header_fault, read_headers
from entidb.storage.lmdb.layout import open_to_read
from entidb.storage.lmdb.left import DATA, LOCK, is_closed
from entidb.storage.lmdb.pages import closed_file_faults, damaged_file
from entidb.storage.lmdb.place import Place, take_place
from entidb.storage.lmdb.readers import LMDB_LOCK
from entidb.storage.lmdb.turn import CLAIM, TURN

#: Left by sync engines and servers that had the database before its data file was lost.
CLAIMS: Final = tuple(CLAIM + name for name in ("engine", "background", "segments", "indexes"))
#: Files that were looked at and not opened since, as they were then, and their faults.
_LOOKED: Final[dict[str, tuple[tuple[int, ...], list[str]]]] = {}
_LOOKED_MAX: Final = 4096
_FAULTS_KEPT: Final = 10


def check_directory(where: str, create: bool) -> None:
    """Make the directory, or refuse one that holds something else."""
    try:
        if not _is_there(where):
            if not create:
                raise FormatError(f"there is no database at {where}; check the path")
            make_directory(where)
            return
        names = set(os.listdir(where))
    except NotADirectoryError as error:
        raise FormatError(
            f"{where} is a file and not a database directory; it was not touched"
        ) from error
    except OSError as error:
        raise storage_error(error, f"opening {where}") from error
    if DATA in names:
        return
    others = names - {LMDB_LOCK, LOCK, TURN, TEMPORARY, *CLAIMS}
    below = sorted(name for name in others if os.path.isfile(os.path.join(where, name, DATA)))
    if below and not create:
        raise FormatError(
            f"{where} is no database, and has some in it: name one of them, such as "
            f"{os.path.join(where, below[0])}"
        )
    if others and not create:
        raise FormatError(f"{where} holds no database, but other things; check the path")
    if others:
        raise FormatError(
            f"{where} holds other things ({', '.join(sorted(others)[:3])}) and no database; it "
            "was not touched. Choose an empty or a new directory"
        )
    if not create:
        raise FormatError(f"there is no database in {where}; check the path")


def closed_faults(where: str) -> list[str]:
    """As ``LmdbStorage.closed_faults``, of an absolute path."""
    data = os.path.join(where, DATA)
    if not os.path.exists(data):
        return []
    try:
        place = take_place(where, read_only=True, alone=True)
    except OSError as error:
        raise storage_error(error, f"checking {where}") from error
    try:
        faults = closed_file_faults(data)
        if not faults:
            place.leave_as_found()
        return faults
    except OSError as error:
        raise storage_error(error, f"checking {where}") from error
    finally:
        place.release()


def doubtful_bytes(where: str) -> int:
    """As ``LmdbStorage.doubtful_bytes``, of an absolute path."""
    data = os.path.join(where, DATA)
    try:
        known = _LOOKED.get(data)
        if known is not None and known[0] == _state_of(data):
            return 0
        return 0 if _is_closed(where, data) else os.path.getsize(data)
    except OSError:
        return 0


def _is_closed(where: str, data: str) -> bool:
    descriptor = open_to_read(data)
    try:
        return is_closed(where, read_headers(descriptor).raw)
    except UNREADABLE:
        return False
    finally:
        os.close(descriptor)


def check_closed(place: Place, headers: Headers, salvage: bool, read_only: bool) -> None:
    """Raise ``CorruptionError`` unless LMDB can use the data file without harm: it stops the
    process where a page is not what it must be.

    The file that was closed here, untouched since, is what it was then. Any other is looked at, and
    brought onto the disk as it is read: the process that had it open may have been killed after a
    write that failed and before the sync that has to follow."""
    left = place.left
    with place.data_file() as descriptor:
        fault = header_fault(descriptor, headers, 0 if left is None else left.transaction)
    if fault is not None:
        raise damaged_file(place.data_path, [fault])
    if place.is_as_left(headers.raw) or salvage:
        return
    faults = known_faults(place.data_path)
    if faults:
        raise damaged_file(place.data_path, faults)
    # From now on it can change within a tick of the system's clock.
    _LOOKED.pop(place.data_path, None)
    if not read_only:
        with place.data_file() as descriptor:
            write_headers_again(descriptor, place.data_path)


def known_faults(data: str, rest: Callable[[], None] | None = None) -> list[str]:
    """As ``closed_file_faults``. A file is read once, and a damaged one not at each try to open
    it."""
    file = _state_of(data)
    known = _LOOKED.get(data)
    if known is not None and known[0] == file:
        return known[1]
    _LOOKED.pop(data, None)
    faults = closed_file_faults(data, rest)
    if len(_LOOKED) < _LOOKED_MAX and _state_of(data) == file:
        _LOOKED[data] = (file, faults[:_FAULTS_KEPT])
    return faults


def _state_of(data: str) -> tuple[int, ...]:
    found = os.stat(data)
    return found.st_ino, found.st_dev, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_there(path: str) -> bool:
    """Unlike ``os.path.lexists``, which also takes what may not be looked at for missing."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True
