"""What closing a store leaves in its lock file, by which the process that opens it next knows that
the data file is the very one that was closed.

Not here: who writes it, and when (``place``).
"""

from __future__ import annotations

import contextlib
import os
import zlib
from dataclasses import dataclass
from typing import Final

from entidb.storage.directories import open_file
from entidb.storage.locks import NOTE_BYTES_MAX

DATA: Final = "data.mdb"
LOCK: Final = "entidb.lock"


@dataclass(frozen=True)
class Left:
    """What closing a store left: its newest commit, and what identifies its data file: number,
    size, times and checksum of the headers."""

    transaction: int
    file: tuple[int, ...]


def is_closed(path: str, headers: bytes) -> bool:
    """As ``Place.is_as_left``, of the directory at ``path``, without taking it: a hint. Raises
    ``OSError``."""
    left, lock = None, os.path.join(path, LOCK)
    with contextlib.suppress(FileNotFoundError), open(lock, "rb", opener=open_file) as file:
        left = read_left(file.read(NOTE_BYTES_MAX))
    return left is not None and left.file == signature(os.stat(os.path.join(path, DATA)), headers)


def signature(found: os.stat_result, headers: bytes) -> tuple[int, ...]:
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return found.st_ino, found.st_size, *times, zlib.crc32(headers)


def left_line(left: Left) -> bytes:
    return f"closed {left.transaction} {' '.join(map(str, left.file))} .\n".encode()


def read_left(raw: bytes) -> Left | None:
    _, _, note = raw.partition(b"\n")
    fields = note.split()
    if len(fields) != 8 or fields[0] != b"closed" or fields[-1] != b".":
        return None
    if not all(field.isdigit() for field in fields[1:-1]):
        return None
    transaction, *file = map(int, fields[1:-1])
    return Left(transaction, tuple(file))
