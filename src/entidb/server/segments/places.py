"""The directories in which images of a server's databases stand: which there are, and from which of
them the files of a database are still to be removed.

A server has several where its nodes are given different ones, or where the setting was changed. All
of them are in one record of the server, so that an erasure can say where bytes may still be, and a
node that was away removes them when it is back:

    note   files of a database come into the directory of this process
    owe    they go, from all directories that have them
    pay    those that are owed here are gone
    left   the directories that still owe
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from msgspec import Struct, ValidationError, json

from entidb.errors import StorageError
from entidb.server.config import ServerConfig, db_id_of, directory_name
from entidb.server.records import IMAGES, Records
from entidb.server.segments.files import FolderFiles, directory_id
from entidb.types import Clock, Entropy

logger = logging.getLogger("entidb.server")

#: Below the data directory; no database is called so.
FOLDER: Final = "entidb-segments"
#: A directory that nobody has used for so long is forgotten; one in use says so once a day.
_KEPT_MS: Final = 365 * 24 * 3_600_000
_SAID_MS: Final = 24 * 3_600_000
_PLACES_MAX: Final = 1000


class KnownPlace(Struct):
    """A directory: on which host, where there, and when it was used last, in milliseconds since
    1970."""

    host: str
    path: str
    used_ms: int


class PlacesRecord(Struct):
    """The record. Directories by their ids; which of them have files of a database, and which
    are to remove them, by its name."""

    places: dict[str, KnownPlace] = {}
    holds: dict[str, list[str]] = {}
    owed: dict[str, list[str]] = {}


class ImagePlaces:
    """Thread-safe. Without records there is one directory, and nothing is noted."""

    def __init__(
        self, config: ServerConfig, records: Records | None, clock: Clock, entropy: Entropy
    ) -> None:
        #: Where the folders of all databases are; None: nowhere on a disk.
        self.root = _root_of(config)
        #: Inside a data directory, with which it moves.
        self._inside = None if config.directory is None else Path(config.directory) / FOLDER
        #: Whether there may be nodes with another directory.
        self._may_differ = config.address is not None
        self._records = records if self.root is not None or self._may_differ else None
        self._clock, self._entropy = clock, entropy
        self._here: bytes | None = None
        #: When this process said last that it uses the directory.
        self._noted_ms: int | None = None

    def folder(self, db_id: str) -> Path | None:
        return None if self.root is None else self.root / directory_name(db_id)

    def identity(self) -> bytes:
        """What ``ImageRows.place`` says of images that are made here. Raises ``OSError``."""
        if not self._may_differ or self.root is None:
            return b""
        if self._here is None:
            self._here = directory_id(self.root, self._entropy(16))
        return self._here

    def _key(self) -> str | None:
        """Of this directory in the record: its id; for a server in files its path, or just
        ``FOLDER``."""
        if self.root is None:
            return None
        if self._may_differ:
            return self.identity().hex()
        return FOLDER if self.root == self._inside else os.path.abspath(self.root)

    # ------------------------------------------------------------ the record

    def note(self, db_id: str | None = None) -> None:
        """Before files of ``db_id`` are put here; without a name, what is here already. Raises
        ``OSError``, ``StorageError``."""
        now, key = self._clock.now_ms(), self._key()
        if self._records is None or key is None or self.root is None:
            return
        names = [] if db_id is None else [db_id]
        if self._noted_ms is None or not 0 <= now - self._noted_ms < _SAID_MS:
            names += [name for each in _entries(self.root) if (name := db_id_of(each)) is not None]
            self._noted_ms = now
        if not names:
            return
        mine = KnownPlace(socket.gethostname(), os.path.abspath(self.root), now)

        def add(page: PlacesRecord) -> None:
            known = page.places.get(key)
            if known is None or now - known.used_ms >= _SAID_MS:
                page.places[key] = mine
                _forget(page, now)
            for name in names:
                _add(page.holds, name, [key])

        self._change(add)

    def owe(self, db_id: str) -> None:
        """Every directory owes the files of ``db_id`` from now on. Raises as ``note``, and so do
        those that follow."""
        self._change(lambda page: _add(page.owed, db_id, page.holds.get(db_id, [])))

    def renamed(self, db_id: str, to: str) -> None:
        """The database has another name, and its files have not."""
        self._change(lambda page: _add(page.holds, to, page.holds.get(db_id, [])))

    def owed_here(self) -> list[str]:
        """Databases whose files are to go from this directory."""
        if self._records is None or self.root is None or not self.root.is_dir():
            return []
        page, key = self._read(self._records.read(IMAGES)), self._key()
        return [db_id for db_id, places in page.owed.items() if key in places]

    def pay(self, db_id: str, *, emptied: bool) -> None:
        """This directory does not have what it owed any more; and where the others are directories
        of the same machine, neither do they. ``emptied``: nor anything else of ``db_id``."""
        gone = [key for key in [self._key()] if key is not None]
        if not self._may_differ and self._records is not None:
            for key in self._read(self._records.read(IMAGES)).owed.get(db_id, ()):
                place = self._inside if key == FOLDER else Path(key)
                if key not in gone and place is not None and place.is_dir():
                    FolderFiles(place / directory_name(db_id)).sweep([])
                    gone.append(key)

        def pay(page: PlacesRecord) -> None:
            _take(page.owed, db_id, gone)
            if emptied:
                _take(page.holds, db_id, gone)

        self._change(pay)

    def left(self, db_id: str) -> list[str]:
        """The directories that owe, as ``HOST:PATH``."""
        if self._records is None:
            return []
        page = self._read(self._records.read(IMAGES))
        known = [page.places.get(key) for key in page.owed.get(db_id, ())]
        return sorted(f"{each.host}:{each.path}" for each in known if each is not None)

    def _change(self, change: Callable[[PlacesRecord], None]) -> None:
        records = self._records
        if records is None:
            return

        def make(content: bytes | None) -> bytes | None:
            page = self._read(content)
            before = json.encode(page)
            change(page)
            after = json.encode(page)
            return None if after == before else after

        records.change(IMAGES, make, lambda mark: None)

    def _read(self, content: bytes | None) -> PlacesRecord:
        if content is None:
            return PlacesRecord()
        try:
            return json.decode(content, type=PlacesRecord)
        except (ValidationError, ValueError) as error:
            assert self._records is not None
            raise StorageError(
                f"{self._records.where(IMAGES)} does not say in which directories images stand: "
                f"{error}; remove it, and by hand what images other directories have"
            ) from error


def _entries(root: Path) -> list[str]:
    return os.listdir(root) if root.is_dir() else []


def _add(of: dict[str, list[str]], db_id: str, keys: list[str]) -> None:
    known = of.get(db_id, [])
    new = [key for key in keys if key not in known]
    if new:
        of[db_id] = known + new


def _take(of: dict[str, list[str]], db_id: str, gone: Collection[str]) -> None:
    rest = [key for key in of.get(db_id, ()) if key not in gone]
    if rest:
        of[db_id] = rest
    else:
        of.pop(db_id, None)


def _forget(page: PlacesRecord, now: int) -> None:
    """Directories that nobody uses any more."""
    newest = sorted(page.places, key=lambda key: -page.places[key].used_ms)
    for key in newest:
        if now - page.places[key].used_ms > _KEPT_MS or key in newest[_PLACES_MAX:]:
            del page.places[key]
    for of in (page.holds, page.owed):
        for db_id in list(of):
            _take(of, db_id, set(of[db_id]) - page.places.keys())


def _root_of(config: ServerConfig) -> Path | None:
    if config.segments_dir is not None:
        return Path(config.segments_dir)
    return None if config.directory is None else Path(config.directory) / FOLDER


__all__ = ["FOLDER", "ImagePlaces"]
