"""Removing a store that is closed, and nothing else that stands in its directory."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Final

from entidb.storage.directories import FETCHED, sync_path
from entidb.storage.lmdb.doubt import CLAIMS
from entidb.storage.lmdb.failures import storage_error
from entidb.storage.lmdb.folder import TEMPORARY
from entidb.storage.lmdb.left import DATA, LOCK
from entidb.storage.lmdb.place import take_place
from entidb.storage.lmdb.readers import LMDB_LOCK
from entidb.storage.lmdb.turn import TURN

#: What a store has beside its data and its lock: LMDB's readers, whose turn it is, other rights.
_OTHERS: Final = (LMDB_LOCK, TURN, *CLAIMS)


def remove_store(path: str) -> None:
    """Remove the files of the store in ``path``, its data first and durably, and the directory if
    nothing else stands there. Raises ``DatabaseLockedError`` if somebody has it open (nothing is
    removed), ``StorageError``."""
    try:
        place = take_place(path, alone=True)
        try:
            os.unlink(os.path.join(path, DATA))
            sync_path(path)
            for name in os.listdir(path):
                if name in _OTHERS:
                    os.unlink(os.path.join(path, name))
            for name in (TEMPORARY, FETCHED):
                shutil.rmtree(os.path.join(path, name), ignore_errors=True)
        finally:
            place.release()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, LOCK))
        # What else stands there is not the store's, and stays.
        if not os.listdir(path):
            os.rmdir(path)
    except OSError as error:
        raise storage_error(error, f"removing the database in {path}") from error


__all__ = ["remove_store"]
