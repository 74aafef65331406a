"""The place of databases that is a directory: the data directory of a server, which is one server's
alone, and the databases in it.

Not here: which of them are open (``stores``).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from entidb.db import Database, Role
from entidb.errors import ConfigError, DatabaseLockedError, StorageError
from entidb.server.allocator import large_pieces_apart
from entidb.server.beside import check_folder
from entidb.server.checks import FileChecks
from entidb.server.config import ServerConfig, db_id_of, directory_name
from entidb.server.place import ASIDE_MS, Aside, exists, unknown_database
from entidb.server.workers.family import Family, is_alive, name_of
from entidb.server.workers.seats import clear_seats
from entidb.storage.directories import (
    KnownDirectory,
    absolute,
    is_at,
    make_directory,
    move,
    occupy_standard_numbers,
    open_file,
)
from entidb.storage.disk_errors import disk_error, is_about_place
from entidb.storage.locks import NOTE_BYTES_MAX, FileLock, HeldError, written_holder
from entidb.storage.opening import holds_store, wants_room
from entidb.storage.partial import remove_dead

logger = logging.getLogger("entidb.server")

#: Where copies are that are being verified, in the data directory; no database is called so.
CHECKED: Final = "entidb-checked"
#: Locked by the server of a data directory; no database is called so.
SERVER_LOCK: Final = "entidb-server.lock"
#: Where databases wait that were deleted, in the data directory; no database is called so.
ASIDE: Final = "entidb-deleted"
_ASIDE_NAME: Final = re.compile(r"(.+\.entidb)\.([0-9]{1,15})")
#: Seconds to wait where it is not known whose the directory is, and where it is another family's.
_JOIN_S: Final = 2.0
_STRANGERS_S: Final = 0.3
#: For workers to end whose parent was killed.
_ORPHANS_S: Final = 10.0
_LOOK_S: Final = 0.02

#: Opens the database of that name, making it if it is not there and the second argument says so;
#: else ``PermissionDeniedError``, code ``unknown_database``.
OpenDatabase = Callable[[str, bool], Database]


def open_with_room(
    open_database: OpenDatabase, db_id: str, create: bool, make_room: Callable[[], bool]
) -> Database:
    """What ``open_database`` opens; where the process has too many open files or too little memory
    for it, after ``make_room`` has closed others, as long as that says that it has."""
    while True:
        try:
            return open_database(db_id, create)
        except StorageError as error:
            if not wants_room(error) or not make_room():
                raise


class DataDirectory:
    """``config.data_dir``, for one server: made if missing, and locked as long as it is served. The
    processes of one family share the locks."""

    def __init__(self, root: str, locks: list[FileLock], family: Family | None = None) -> None:
        self._lock_path = os.path.join(root, SERVER_LOCK)
        self._locks = locks
        self._family = family

    @classmethod
    def take(cls, config: ServerConfig, family: Family | None = None) -> DataDirectory:
        """Raises ``ConfigError`` for a place that cannot be made or written, ``StorageError`` for a
        disk that is full or fails, and ``DatabaseLockedError`` if another server has it, in this
        process or in another."""
        root = _root(config)
        try:
            make_directory(root)
            check_folder("backup_dir", config.backup_dir)
            check_folder("segments_dir", config.segments_dir)
            if family is not None:
                return cls._join(root, family)
            _wait_for_orphans(root)
            try:
                return cls._lock(root)
            except HeldError as error:
                if error.holder != str(os.getpid()):
                    raise
            # A server without references may still wait for the collector.
            gc.collect()
            return cls._lock(root)
        except HeldError as error:
            parent = next(iter(_note_in(root)), "")
            holder = parent.partition(".")[0] if is_alive(parent) else error.holder
            raise _served(root, holder) from error
        except OSError as error:
            raise _unusable(root, error) from error

    @classmethod
    def _lock(cls, root: str) -> DataDirectory:
        occupy_standard_numbers()  # the first thing of a server
        locks = [FileLock.take(os.path.join(root, SERVER_LOCK), os.stat(root))]
        try:
            if sys.platform != "win32":
                # A lock file can be deleted, so the directory itself is locked too.
                locks.append(FileLock(os.open(root, os.O_RDONLY)))
        except BaseException:
            locks[0].release()
            raise
        return cls(root, locks)

    @classmethod
    def _join(cls, root: str, family: Family) -> DataDirectory:
        """The first of a family takes the directory alone, writes down whose it is, and shares it;
        who comes next reads that. Raises ``HeldError``, ``OSError``."""
        _wait_for_orphans(root)
        began = time.monotonic()
        while True:
            try:
                return cls._found(root, family)
            except HeldError:
                try:
                    return cls._enter(root, family)
                except HeldError:
                    # Another one of the family may have it alone for a moment, as it comes or goes.
                    theirs = is_alive(next(iter(_note_in(root)), ""))
                    limit = _STRANGERS_S if theirs else _JOIN_S
                    if time.monotonic() - began >= limit:
                        raise
            time.sleep(_LOOK_S)

    @classmethod
    def _found(cls, root: str, family: Family) -> DataDirectory:
        found = cls._lock(root)
        try:
            clear_seats(root)
            found._locks[0].write(f"{family.name} {name_of(os.getpid())}\n".encode())
            for lock in found._locks:
                lock.share()
        except BaseException:
            found.release()
            raise
        found._family = family
        return found

    @classmethod
    def _enter(cls, root: str, family: Family) -> DataDirectory:
        path = os.path.join(root, SERVER_LOCK)
        locks = [FileLock.take(path, os.stat(root), shared=True)]
        try:
            note = _fields(locks[0].found)
            # Or the child of the process that came first, which may itself be one of the family.
            if family.name not in note[:2]:
                raise HeldError(written_holder(path))
            locks.append(FileLock(os.open(root, os.O_RDONLY), shared=True))
        except BaseException:
            for lock in locks:
                lock.release()
            raise
        return cls(root, locks, family)

    def release(self) -> None:
        """Idempotent. Leaves no lock file behind; a killed process does, which does no harm."""
        with contextlib.suppress(OSError):
            lock = self._locks[0]
            if lock.descriptor >= 0 and is_at(self._lock_path, lock.descriptor):
                # Others of the family may still have it.
                if self._family is None or lock.have_alone():
                    if self._family is not None:
                        clear_seats(os.path.dirname(self._lock_path))
                    os.unlink(self._lock_path)
        for lock in self._locks:
            lock.release()


def _wait_for_orphans(root: str) -> None:
    """The workers of a parent that was killed end in a moment: a server that is started again at
    once waits for them."""
    path = os.path.join(root, SERVER_LOCK)
    end = time.monotonic() + _ORPHANS_S
    while time.monotonic() < end:
        try:
            held = FileLock.look(path)
        except (HeldError, OSError):
            return  # had alone
        if held is None:
            return
        note = _fields(held.found)
        orphans = bool(note) and not is_alive(note[0]) and not held.have_alone()
        held.release()
        if not orphans:
            return
        time.sleep(_LOOK_S)


def _root(config: ServerConfig) -> str:
    assert config.data_dir is not None
    root = absolute(config.data_dir)
    if holds_store(root):
        raise ConfigError(
            f"{root} is itself a database, and a server keeps databases in directories below its "
            "own: name an empty directory, or the one above"
        )
    return root


def _note_in(root: str) -> list[str]:
    try:
        with open(os.path.join(root, SERVER_LOCK), "rb", opener=open_file) as file:
            return _fields(file.read(NOTE_BYTES_MAX))
    except OSError:
        return []


def _fields(found: bytes) -> list[str]:
    """Of what a lock file holds: the family, and its first process."""
    return found.partition(b"\n")[2].decode("ascii", "replace").split()


def _served(root: str, holder: str) -> DatabaseLockedError:
    if holder == str(os.getpid()):
        return DatabaseLockedError(
            f"{root} is served by another server in this process; close that one first, or give "
            "another directory"
        )
    process = f"process {holder}" if holder else "another process"
    return DatabaseLockedError(
        f"{root} is served by {process} already; stop that server, or give another directory. "
        "Processes that are to serve it together have one parent, and workers=N in their settings"
    )


def _unusable(root: str, error: OSError) -> ConfigError | StorageError:
    what = "cannot be used" if os.path.isdir(root) else "cannot be made"
    if not is_about_place(error.errno or 0):
        return disk_error(error.errno or errno.EIO, f"data_dir {what}: {root}")
    return ConfigError(
        f"data_dir {what}: {root}: {error.strerror}; give a directory that the user of the server "
        "may write to"
    )


def on_disk(config: ServerConfig, **options: Any) -> OpenDatabase:
    """Databases in directories below ``config.data_dir``; none is opened or made below another
    directory that stands there later."""
    root = Path(_root(config))
    known = KnownDirectory(root)
    checks = FileChecks()

    def open_database(db_id: str, create: bool) -> Database:
        known.check()
        path = root / directory_name(db_id)
        if not create and not path.is_dir():
            raise unknown_database()
        checks.require(path)
        with large_pieces_apart():
            return Database.open(path, create=create, role=Role.SERVER, **options)

    return open_database


def list_databases(data_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the databases below ``data_dir``, in order; empty if there is no such place."""
    root = Path(data_dir)
    found = (db_id_of(entry.name) for entry in root.iterdir()) if root.is_dir() else ()
    return sorted(name for name in found if name is not None)


# ---------------------------------------------------------------- the place


class DirectoryPlace:
    """``config.data_dir`` as the ``Place`` of databases. With ``locked`` no other server may
    have it."""

    waits: Final = False

    def __init__(
        self, config: ServerConfig, family: Family | None, *, locked: bool = True, **options: Any
    ) -> None:
        """Raises as ``DataDirectory.take``."""
        assert config.data_dir is not None
        self.root: Final = Path(absolute(config.data_dir))
        self._config, self._family, self._process = config, family, os.getpid()
        self._locked = DataDirectory.take(config, family) if locked else None
        try:
            self._known = KnownDirectory(self.root)
            if self._locked is not None:
                self.clear_left()
            self._open = on_disk(config, **options)
        except BaseException:
            self.close()
            raise

    @property
    def where(self) -> str:
        return str(self.root)

    def begin(self) -> None:
        if self._process != os.getpid() and self._locked is not None and self._family is not None:
            self._locked = DataDirectory.take(self._config, self._family)
        self._process = os.getpid()

    def open(self, db_id: str, create: bool) -> Database:
        return self._open(db_id, create)

    def names(self) -> list[str]:
        self._known.check()
        return list_databases(self.root)

    def holds(self, db_id: str) -> bool:
        return self.path_of(db_id).is_dir()

    def path_of(self, db_id: str) -> Path:
        """The directory of a database that may be there. Raises ``InvalidNameError``."""
        return self.root / directory_name(db_id)

    def sizes(self, only: str | None = None) -> dict[str, int]:
        names = self.names() if only is None else [only]
        return {name: _bytes_in(self.path_of(name)) for name in names}

    def rename(self, db_id: str, to: str) -> None:
        self._known.check()
        source, target = self.path_of(db_id), self.path_of(to)
        if os.path.lexists(target):
            raise exists(to)
        if not source.is_dir():
            raise unknown_database()
        move(str(source), str(target))

    def put_aside(self, db_id: str, now: int) -> Aside:
        self._known.check()
        if not self.holds(db_id):
            raise unknown_database()
        return put_aside(self.root, db_id, now)

    def aside(self) -> list[Aside]:
        found = []
        for path in _each_aside(self.root):
            parts = _ASIDE_NAME.fullmatch(path.name)
            name = None if parts is None else db_id_of(parts[1])
            if parts is not None and name is not None:
                at = int(parts[2])
                found.append(Aside(path.name, name, at, at + ASIDE_MS))
        return found

    def open_aside(self, aside: Aside) -> Database:
        return Database.open(self._path_of_aside(aside), read_only=True)

    def _path_of_aside(self, aside: Aside) -> Path:
        return self.root / ASIDE / aside.id

    def take_back(self, aside: Aside) -> None:
        self._known.check()
        target = self.path_of(aside.name)
        if os.path.lexists(target):
            raise exists(aside.name)
        move(str(self._path_of_aside(aside)), str(target))

    def remove(self, aside: Aside) -> None:
        self._known.check()
        path = self._path_of_aside(aside)
        if path.is_symlink():
            path.unlink()  # what it leads to is not this server's
        else:
            shutil.rmtree(path, ignore_errors=True)

    def clear_left(self) -> None:
        clear_left(self.root)

    def news(self) -> None:
        return None

    def check(self) -> str | None:
        try:
            self._known.check()
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"ready")
                file.flush()
                os.fsync(file.fileno())
        except (OSError, StorageError):
            return "storage"
        return None

    def close(self) -> None:
        if self._locked is not None:
            self._locked.release()


def clear_left(root: Path) -> None:
    """``ServerPlace.clear_left`` of a data directory."""
    shutil.rmtree(root / CHECKED, ignore_errors=True)  # what 0.6 has left
    for where in remove_dead(str(root), _take_back_for):
        logger.warning("what a process that was killed had begun to make for %s is gone", where)


def _take_back_for(where: str, note: str) -> None:
    """A restore was killed after the database was put aside, and before the copy took its place:
    what was aside is the database again. ``note`` is from when on that was done."""
    place = Path(where)
    if os.path.lexists(place) or not note.isdecimal():
        return
    aside = []
    for path in _each_aside(place.parent):
        parts = _ASIDE_NAME.fullmatch(path.name)
        if parts is not None and parts[1] == place.name and int(parts[2]) >= int(note):
            aside.append((int(parts[2]), path))
    if aside:
        move(str(min(aside)[1]), where)
        logger.warning("a restore of %s came to no end; it is again what it was before", where)


def _each_aside(root: Path) -> list[Path]:
    folder = root / ASIDE
    return list(folder.iterdir()) if folder.is_dir() else []


def put_aside(root: Path, db_id: str, now: int) -> Aside:
    """Move the directory of a closed database out of the way; ``now`` in milliseconds."""
    folder = root / ASIDE
    make_directory(str(folder))
    while os.path.lexists(folder / f"{directory_name(db_id)}.{now}"):
        now += 1
    target = folder / f"{directory_name(db_id)}.{now}"
    move(str(root / directory_name(db_id)), str(target))
    return Aside(target.name, db_id, now, now + ASIDE_MS)


@contextlib.contextmanager
def out_of_the_way(root: Path, db_id: str, now: int) -> Iterator[Aside | None]:
    """The database is put aside, if there is one, and comes back if what is to take its place does
    not: else a device would have an empty one made."""
    place = root / directory_name(db_id)
    try:
        yield put_aside(root, db_id, now) if os.path.lexists(place) else None
    except BaseException:
        try:
            _take_back_for(str(place), str(now))
        except OSError as error:
            logger.error("database %s stays put aside in %s: %s", db_id, root / ASIDE, error)
        raise


def _bytes_in(path: Path) -> int:
    try:
        return sum(each.stat().st_size for each in os.scandir(path) if each.is_file())
    except OSError:
        return 0  # deleted a moment ago
