"""Where databases come from: the data directory of a server, which is one server's alone, and the
databases in it; or memory.

Not here: which of them are open (``stores``).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from entidb.db import Database, Role
from entidb.errors import ConfigError, DatabaseLockedError, PermissionDeniedError
from entidb.server.allocator import large_pieces_apart
from entidb.server.checks import Checks
from entidb.server.config import ServerConfig, db_id_of, directory_name
from entidb.storage.directories import is_at, make_directory
from entidb.storage.locks import FileLock, HeldError
from entidb.storage.opening import holds_store

#: Locked by the server of a data directory; no database is called so.
SERVER_LOCK: Final = "entidb-server.lock"

#: Opens the database of that name, making it if it is not there and the second argument says so;
#: else ``PermissionDeniedError``, code ``unknown_database``.
OpenDatabase = Callable[[str, bool], Database]


class DataDirectory:
    """``config.data_dir``, for one server: made if missing, and locked as long as it is served.
    Several processes that work for one server would share this object's lock."""

    def __init__(self, root: str, locks: list[FileLock]) -> None:
        self._lock_path = os.path.join(root, SERVER_LOCK)
        self._locks = locks

    @classmethod
    def take(cls, config: ServerConfig) -> DataDirectory:
        """Raises ``ConfigError`` for a place that cannot be made or written, and
        ``DatabaseLockedError`` if another server has it, in this process or in another."""
        root = _root(config)
        try:
            make_directory(root)
            try:
                return cls._lock(root)
            except HeldError as error:
                if error.holder != str(os.getpid()):
                    raise
            # A server without references may still wait for the collector.
            gc.collect()
            return cls._lock(root)
        except HeldError as error:
            raise _served(root, error.holder) from error
        except OSError as error:
            raise _unusable(root, error) from error

    @classmethod
    def _lock(cls, root: str) -> DataDirectory:
        locks = [FileLock.take(os.path.join(root, SERVER_LOCK), os.stat(root))]
        try:
            if sys.platform != "win32":
                # A lock file can be deleted, so the directory itself is locked too.
                locks.append(FileLock(os.open(root, os.O_RDONLY)))
        except BaseException:
            locks[0].release()
            raise
        return cls(root, locks)

    def release(self) -> None:
        """Idempotent. Leaves no lock file behind; a killed process does, which does no harm."""
        with contextlib.suppress(OSError):
            if self._locks[0].descriptor >= 0 and is_at(self._lock_path, self._locks[0].descriptor):
                os.unlink(self._lock_path)
        for lock in self._locks:
            lock.release()


def _root(config: ServerConfig) -> str:
    assert config.data_dir is not None
    root = os.path.abspath(config.data_dir)
    if holds_store(root):
        raise ConfigError(
            f"{root} is itself a database, and a server keeps databases in directories below its "
            "own: name an empty directory, or the one above"
        )
    return root


def _served(root: str, holder: str) -> DatabaseLockedError:
    if holder == str(os.getpid()):
        return DatabaseLockedError(
            f"{root} is served by another server in this process; close that one first, or give "
            "another directory"
        )
    process = f"process {holder}" if holder else "another process"
    return DatabaseLockedError(
        f"{root} is served by {process} already; stop that server, or give another directory"
    )


def _unusable(root: str, error: OSError) -> ConfigError:
    what = "cannot be used" if os.path.isdir(root) else "cannot be made"
    return ConfigError(
        f"data_dir {what}: {root}: {error.strerror}; give a directory that the user of the server "
        "may write to"
    )


def on_disk(config: ServerConfig, **options: Any) -> OpenDatabase:
    """Databases in directories below ``config.data_dir``."""
    root = Path(_root(config))
    checks = Checks()

    def open_database(db_id: str, create: bool) -> Database:
        path = root / directory_name(db_id)
        if not create and not path.is_dir():
            raise unknown_database()
        checks.require(path)
        with large_pieces_apart():
            return Database.open(path, create=create, role=Role.SERVER, **options)

    return open_database


def in_memory(**options: Any) -> OpenDatabase:
    """Databases that are gone with the server."""

    def open_database(db_id: str, create: bool) -> Database:
        if not create:
            raise unknown_database()
        return Database.in_memory(role=Role.SERVER, **options)

    return open_database


def list_databases(data_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the databases below ``data_dir``, in order; empty if there is no such place."""
    root = Path(data_dir)
    found = (db_id_of(entry.name) for entry in root.iterdir()) if root.is_dir() else ()
    return sorted(name for name in found if name is not None)


def unknown_database() -> PermissionDeniedError:
    return PermissionDeniedError("there is no such database", code="unknown_database")
