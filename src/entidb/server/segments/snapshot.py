"""A database's image in one file, for devices that begin from it (``protocol.archives``)."""

from __future__ import annotations

import os
from pathlib import Path

from entidb import packing
from entidb.db import Database
from entidb.db.maintenance import read_floor
from entidb.db.terms import newest_term
from entidb.errors import StorageError
from entidb.protocol import Manifest, SegmentInfo
from entidb.protocol.archives import write_archive
from entidb.server.hooks import Grant
from entidb.server.segments.building import take
from entidb.server.segments.files import FolderFiles
from entidb.server.segments.manifests import manifest_of, no_manifest
from entidb.storage.directories import absolute
from entidb.storage.disk_errors import disk_error
from entidb.storage.partial import Partial, remove_dead

_ALL = Grant("snapshot", read=True, write=False)


def write_snapshot(database: Database, target: str | os.PathLike[str]) -> Manifest:
    """Write ``target``, whole or not at all, from one snapshot of a server's database; until it is
    there it needs twice its room. What it holds is in the manifest. Raises ``DatabaseLockedError``
    where another snapshot to that place is under way, and ``StorageError``, code ``exists`` where
    there is something."""
    where = absolute(target)
    _check_new(where)
    try:
        remove_dead(os.path.dirname(where))  # which is as much as the database
        return _write(database, where)
    except OSError as error:
        raise disk_error(error.errno or 0, f"writing {where}") from error


def _write(database: Database, where: str) -> Manifest:
    with Partial(where, "snapshot") as partial:
        files = FolderFiles(Path(partial.path).parent / "segments")
        with database.view() as view:
            floor, term = read_floor(view), newest_term(view.snapshot)
            image = take(view, files, bytes(16), packing.ENCODINGS[0], _nothing, _nothing)
        none = no_manifest(image.history, image.head, floor, database.clock.now_ms(), _ALL)
        manifest = manifest_of(image, image.collections, none, 0, term)

        def read(segment: SegmentInfo) -> bytes:
            file = files.open(segment.sha256)
            assert file is not None, "it was put there"
            try:
                return file.read(0, segment.bytes)
            finally:
                file.close()

        with open(partial.path, "wb") as file:
            write_archive(file, manifest, read)
            file.flush()
            os.fsync(file.fileno())
        # Meanwhile another snapshot to the same place may have come to its end.
        _check_new(where)
        partial.finish()
    return manifest


def _check_new(where: str) -> None:
    if os.path.lexists(where):
        raise StorageError(f"{where} exists already; name a new file", code="exists")


def _nothing() -> None:
    return None


__all__ = ["write_snapshot"]
