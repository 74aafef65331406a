"""What a server keeps beside its databases, for all of its processes: small records, each of which
is read and written whole. In files of the data directory; or where the databases are, for nodes
that have no directory in common (``nodes``).

Not here: what is in a record (``control``, ``registry``, ``segments.places``), and the audit log
(``admin.audit``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from entidb.server.config import directory_name, is_db_id
from entidb.server.watched import Mark, mark_of
from entidb.storage.directories import (
    NO_FOLLOW,
    KnownDirectory,
    give_owner,
    move,
    open_file,
    sync_path,
)
from entidb.storage.partial import Partial

#: The record of what an administrator has decided, and its file; no database is called so.
CONTROL: Final = "control"
CONTROL_FILE: Final = "entidb-control.json"
#: The record of the directories in which images stand, and its file; no database is called so.
IMAGES: Final = "images"
IMAGES_FILE: Final = "entidb-images.json"
#: Bytes of a record.
BYTES_MAX: Final = 64 * 2**20
_FILES: Final = {CONTROL: CONTROL_FILE, IMAGES: IMAGES_FILE}
_DEVICES: Final = "devices/"
_SUFFIX: Final = ".devices"

#: The new content of a record, from what is there; None: it stays as it is.
Make = Callable[[bytes | None], bytes | None]
Wrote = Callable[[Mark], None]


def devices_of(db_id: str) -> str:
    """The name of the record of the devices of a database."""
    return _DEVICES + db_id


class Records(Protocol):
    """Thread-safe. Methods raise ``OSError`` or ``StorageError``."""

    @property
    def far(self) -> bool:
        """Whether it is asked over a network: then no event loop asks it."""
        ...

    def where(self, name: str) -> str:
        """Where a record is, for messages."""
        ...

    def read(self, name: str) -> bytes | None:
        """None if it is not there. What is larger than ``BYTES_MAX`` is cut beyond one byte
        more."""
        ...

    def mark(self, name: str) -> Mark:
        """Another one when the record has changed."""
        ...

    def change(self, name: str, make: Make, wrote: Wrote) -> None:
        """No other process changes it from when it is read until it is written, durably; ``wrote``
        is told its mark then. Raises ``DatabaseLockedError`` too, if another process keeps it for
        long."""
        ...

    def rename(self, name: str, to: str | None) -> None:
        """None: it is gone."""
        ...

    def has_database(self, db_id: str) -> bool:
        """What is noted of a database that is not there is not kept."""
        ...


class FileRecords:
    """Files of the directory ``root``, for their owner alone."""

    far: Final = False

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._known: Final = KnownDirectory(root)
        self.root: Final = Path(self._known.path)

    def where(self, name: str) -> str:
        return str(self._path(name))

    def _path(self, name: str) -> Path:
        if name in _FILES:
            return self.root / _FILES[name]
        return self.root / (directory_name(name.removeprefix(_DEVICES)) + _SUFFIX)

    def read(self, name: str) -> bytes | None:
        self._known.check()
        try:
            descriptor = open_file(self._path(name), os.O_RDONLY | NO_FOLLOW)
        except FileNotFoundError:
            return None
        with open(descriptor, "rb") as file:
            return file.read(BYTES_MAX + 1)

    def mark(self, name: str) -> Mark:
        return mark_of(self._path(name))

    def change(self, name: str, make: Make, wrote: Wrote) -> None:
        self._known.check()
        path = self._path(name)
        with Partial(str(path), "change") as partial:
            content = make(self.read(name))
            if content is None:
                return
            descriptor = os.open(partial.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                give_owner(descriptor, os.stat(self.root))  # root may have started the server once
                file.write(content)
            if name in _FILES:
                sync_path(partial.path)
            partial.finish()
            wrote(mark_of(path))

    def rename(self, name: str, to: str | None) -> None:
        self._known.check()
        path = self._path(name)
        if to is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            move(str(path), str(self._path(to)))

    def has_database(self, db_id: str) -> bool:
        return is_db_id(db_id) and (self.root / directory_name(db_id)).is_dir()


def as_records(place: str | os.PathLike[str] | Records | None) -> Records | None:
    """The records of a directory; None in memory."""
    return FileRecords(place) if isinstance(place, str | os.PathLike) else place


__all__ = [
    "BYTES_MAX",
    "CONTROL",
    "CONTROL_FILE",
    "IMAGES",
    "IMAGES_FILE",
    "FileRecords",
    "Make",
    "Records",
    "Wrote",
    "as_records",
    "devices_of",
]
