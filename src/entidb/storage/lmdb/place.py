"""Where a store stands: its directory, whose files they are, and that nobody else uses them.

A path can come to mean another thing than what is open: somebody deletes a lock file, or moves the
directory and puts a copy in its place. So two files are locked, ``entidb.lock`` and the data file
itself, and the data file is known by its number in the file system (its inode), which is compared
before something is written. What is made or replaced in the directory is reached through the open
directory and not through its path.

On Windows a file or directory that is open cannot be deleted, moved or replaced, so there one lock
is enough and nothing is compared.

Not here: what has to be true of the data file (``closed_file``), and the locks themselves
(``locks``).
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import time
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from entidb.errors import DatabaseLockedError, DatabaseMovedError, StorageError
from entidb.storage.directories import (
    NO_FOLLOW,
    give_as,
    give_owner,
    is_at,
    sync_directory,
    sync_path,
)
from entidb.storage.lmdb.closed_file import check_data_file
from entidb.storage.lmdb.headers import Headers
from entidb.storage.locks import BINARY, NOTE_BYTES_MAX, TRIES, FileLock, HeldError, written_holder

DATA: Final = "data.mdb"
LMDB_LOCK: Final = "lock.mdb"
LOCK: Final = "entidb.lock"
TEMPORARY: Final = ".entidb-new"
#: Longer than a tick of the clock that file systems take their times from; some count in seconds.
_TICK_S: Final = 0.05
_COARSE_TICK_S: Final = 3.0


@dataclass(frozen=True)
class Left:
    """What closing a store left: its newest commit, and what tells its data file from others:
    number, size, times and checksum of the headers."""

    transaction: int
    file: tuple[int, ...]


def is_closed(path: str, headers: bytes) -> bool:
    """As ``Place.is_as_left``, of the directory at ``path``, without taking it: a hint. Raises
    ``OSError``."""
    left = None
    with contextlib.suppress(FileNotFoundError), open(os.path.join(path, LOCK), "rb") as file:
        left = _read_left(file.read(NOTE_BYTES_MAX))
    return left is not None and left.file == _signature(os.stat(os.path.join(path, DATA)), headers)


def _signature(found: os.stat_result, headers: bytes) -> tuple[int, ...]:
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return found.st_ino, found.st_size, *times, zlib.crc32(headers)


def _left_line(left: Left) -> bytes:
    return f"closed {left.transaction} {' '.join(map(str, left.file))} .\n".encode()


def _read_left(raw: bytes) -> Left | None:
    _, _, note = raw.partition(b"\n")
    fields = note.split()
    if len(fields) != 8 or fields[0] != b"closed" or fields[-1] != b".":
        return None
    if not all(field.isdigit() for field in fields[1:-1]):
        return None
    transaction, *file = map(int, fields[1:-1])
    return Left(transaction, tuple(file))


class Place:
    """A store's directory, in use by this object alone; or, ``read_only``, by several processes
    of which none changes or makes anything."""

    def __init__(self, path: str, read_only: bool = False) -> None:
        """Raises ``DatabaseLockedError``, ``FormatError`` (as ``check_data_file``), ``OSError``."""
        self.path = path
        self.read_only = read_only and sys.platform != "win32"
        self.data_path = os.path.join(path, DATA)
        #: File and line of the program that opened it.
        self.opened_at = _caller()
        #: What its data file said when it was taken; None if there was none.
        self.headers: Headers | None = None
        #: What stood in the lock file since the store was last closed; None if it was not closed,
        #: or by a version that leaves nothing.
        self.left: Left | None = None
        self._data: FileLock | None = None
        self._lock: FileLock | None = None
        self._identity: tuple[int, int] | None = None
        #: The directory as it was last seen, and as it stands if nothing in it has changed.
        self._seen: tuple[int, int, int] | None = None
        self._seen_at = 0.0
        self._settled: tuple[int, int, int] | None = None
        self._folder = -1 if sys.platform == "win32" else os.open(path, os.O_RDONLY)
        try:
            if find_here(path) is not None:
                raise HeldError("")  # LMDB opens a file once in a process, for reading too.
            if os.path.exists(self.data_path):
                # First, because it makes nothing where somebody else is at work, or where
                # something else stands.
                self._take_data()
            lock = os.path.join(path, LOCK)
            self._lock = (
                FileLock.read(lock) if self.read_only else FileLock.take(lock, self._like())
            )
            if self._lock is not None:
                self.left = _read_left(self._lock.found)
            # Whoever had that lock may have written until he gave it back.
            if os.path.exists(self.data_path):
                self._take_data()
        except HeldError as error:
            self.release()
            raise DatabaseLockedError(self._held_by(error.holder)) from error
        except BaseException:
            self.release()
            raise
        _PLACES.add(self)

    def _take_data(self) -> None:
        """Lock the data file that stands here now, and know from now on which one it is and what
        it says. Raises as the constructor."""
        if sys.platform != "win32" and self._data is None:
            self._hold_data()
        with self.data_file() as descriptor:
            if self.headers is None or not self.headers.are_in(descriptor):
                self.headers = check_data_file(descriptor, self.data_path)

    def _hold_data(self) -> None:
        for _ in range(TRIES):
            try:
                kind = os.O_RDONLY if self.read_only else os.O_RDWR
                held = FileLock(os.open(self.data_path, kind), shared=self.read_only)
            except HeldError as error:
                raise DatabaseLockedError(self._held_by(error.holder)) from error
            if is_at(self.data_path, held.descriptor):
                self._know(held)
                return
            held.release()
        raise StorageError(f"{self.data_path} is replaced again and again; see by whom")

    def _know(self, held: FileLock) -> None:
        before, self._data = self._data, held
        found = os.fstat(held.descriptor)
        self._identity = (found.st_ino, found.st_dev)
        self._settled = self._seen = None
        if before is not None:
            before.release()

    def check(self) -> None:
        """Raise ``DatabaseMovedError`` if the path no longer leads to the file that is open. Cheap
        enough to precede every commit.

        The directory is looked at, and the file only when the directory has changed: where a
        file's times have been read, some systems write them anew with every commit."""
        if self._identity is None:
            return
        try:
            here = os.stat(self.path)
            seen = (here.st_mtime_ns, here.st_ino, here.st_dev)
            if seen != self._settled:
                self._check_data(seen)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._moved("nothing stands there any more") from error
        except OSError:
            return  # It cannot be looked at, which proves nothing: a process may give up rights.

    def _check_data(self, seen: tuple[int, int, int]) -> None:
        found = os.stat(self.data_path)
        if (found.st_ino, found.st_dev) != self._identity:
            raise self._moved("another database stands there now")
        # Two changes within one tick of the system's clock leave the same time behind.
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        elif now - self._seen_at > (_TICK_S if seen[0] % 1_000_000_000 else _COARSE_TICK_S):
            self._settled = seen

    def _moved(self, what: str) -> DatabaseMovedError:
        return DatabaseMovedError(
            f"{self.path} is not the database that is open: {what}. It was moved, deleted or "
            "replaced since it was opened; nothing was written to either. Put it back, or close "
            "this one and open the path again"
        )

    def make_lock_table(self) -> None:
        """LMDB's file, before LMDB makes it with an owner of its own."""
        path = os.path.join(self.path, LMDB_LOCK)
        # Only a new one is opened: closing it would take LMDB's record locks away.
        with contextlib.suppress(FileExistsError):
            made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
            try:
                give_as(made, self._like())
            finally:
                os.close(made)

    @contextlib.contextmanager
    def data_file(self) -> Iterator[int]:
        """A descriptor of the data file that is locked, whatever the path leads to."""
        if self._data is not None:
            yield self._data.descriptor
            return
        descriptor = os.open(self.data_path, os.O_RDWR | BINARY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def data_bytes(self) -> int:
        """The size of the data file."""
        if self._data is None:
            return os.path.getsize(self.data_path)
        return os.fstat(self._data.descriptor).st_size

    # ---- what the last one left

    def is_as_left(self, headers: bytes) -> bool:
        """Whether the data file is the very one that was closed last, untouched since. What a
        disk changes by itself does not show here."""
        return self.left is not None and self.left.file == self._signature(headers)

    def leave(self, headers: Headers) -> None:
        """Note that the data file is well as it is now. To be called when nobody has it mapped.

        Where the file's own times are too coarse to show a later change, or are not ours to set,
        nothing is noted and the next one looks for himself."""
        if self._lock is None or self._data is None:
            return
        with contextlib.suppress(OSError):
            if self.is_as_left(headers.raw):
                # Nothing was written: whoever copies what has changed need not copy this.
                self.leave_as_found()
                return
            found = os.fstat(self._data.descriptor)
            # A time that no later write leaves behind, however soon it comes: those are of the
            # system's clock, which ticks.
            times = (found.st_atime_ns, found.st_mtime_ns + 1)
            os.utime(self._data.descriptor, ns=times)
            if os.fstat(self._data.descriptor).st_mtime_ns == times[1]:
                left = Left(headers.transaction, self._signature(headers.raw))
                self._lock.write(_left_line(left))

    def leave_as_found(self) -> None:
        """Note again what the last one left: nothing was changed."""
        if self._lock is not None and not self.read_only:
            _, _, note = self._lock.found.partition(b"\n")
            with contextlib.suppress(OSError):
                self._lock.write(note)

    def _signature(self, headers: bytes) -> tuple[int, ...]:
        return () if self._data is None else _signature(os.fstat(self._data.descriptor), headers)

    # ---- replacing the data file

    def make_temporary(self) -> str:
        """An empty directory inside this one; its path."""
        self.remove_temporary()
        os.mkdir(self._at(TEMPORARY), 0o700, dir_fd=self._dir_fd())
        return os.path.join(self.path, TEMPORARY)

    def remove_temporary(self) -> None:
        shutil.rmtree(self._at(TEMPORARY), ignore_errors=True, dir_fd=self._dir_fd())

    def swap(self) -> None:
        """Put the data file of the temporary directory in the place of the present one, durably,
        with owner and permissions of the old one; the lock goes over without a gap. Nobody may
        have either of them mapped."""
        self.check()
        new, old = self._at(TEMPORARY, DATA), self._at(DATA)
        if sys.platform == "win32":
            sync_path(new)
            os.replace(new, old)
            return
        held = FileLock(os.open(new, os.O_RDWR, dir_fd=self._folder))
        try:
            give_as(held.descriptor, self._like())
            os.fsync(held.descriptor)
            os.replace(new, old, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except BaseException:
            held.release()
            raise
        self._know(held)
        sync_directory(self._folder)

    def _at(self, *names: str) -> str:
        """The name of something in the directory, as the functions with ``dir_fd`` want it."""
        return os.path.join(*names) if self._folder >= 0 else os.path.join(self.path, *names)

    def _dir_fd(self) -> int | None:
        return self._folder if self._folder >= 0 else None

    def give(self, copy: str) -> None:
        """Give the directory ``copy`` and the data file in it to whoever has this one."""
        if sys.platform == "win32":
            return
        for path in (os.path.join(copy, DATA), copy):
            made = os.open(path, os.O_RDONLY | NO_FOLLOW)
            try:
                give_owner(made, self._like())
            finally:
                os.close(made)

    def folder_stat(self) -> os.stat_result:
        return os.stat(self.path) if self._folder < 0 else os.fstat(self._folder)

    def _like(self) -> os.stat_result:
        """Whose files these are."""
        if self._data is not None:
            return os.fstat(self._data.descriptor)
        return os.stat(self.path)

    # ---- the end

    def release(self) -> None:
        """Idempotent; every step of it too."""
        if self._data is not None:
            self._data.release()
        if self._lock is not None:
            self._lock.release()
        self._close_folder()

    def forget(self) -> None:
        """In a forked child: the locks are the parent's."""
        if self._data is not None:
            self._data.forget()
        if self._lock is not None:
            self._lock.forget()
        self._close_folder()

    def _close_folder(self) -> None:
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)
        _PLACES.discard(self)

    def _held_by(self, holder: str) -> str:
        here = find_here(self.path)
        if here is not None:
            return (
                f"{self.path} is already open in this process, since {here.opened_at}: use that "
                "object, or end it with close() or a `with` block before opening again. If no "
                "name is left for it, the traceback of the last uncaught exception keeps it "
                "(sys.last_value, sys.last_traceback), until the next one"
            )
        holder = holder or written_holder(os.path.join(self.path, LOCK))
        process = f"process {holder}" if holder else "another process"
        return (
            f"{self.path} is open in {process}; close it there, or reach it through a server "
            "that runs in that process"
        )


_PLACES: weakref.WeakSet[Place] = weakref.WeakSet()


def find_here(path: str) -> Place | None:
    """The open place of this process in the directory at ``path``."""
    with contextlib.suppress(OSError):
        here = os.stat(path)
        for place in list(_PLACES):
            if os.path.samestat(here, place.folder_stat()):
                return place
    return None


def take_place(path: str, read_only: bool = False) -> Place:
    """The directory at ``path``, for the caller. Raises as ``Place``."""
    try:
        return Place(path, read_only)
    except DatabaseLockedError:
        if find_here(path) is None:
            raise
    # An object that nobody refers to any more may still wait for the collector.
    gc.collect()
    return Place(path, read_only)


def _caller() -> str:
    """File and line of the innermost frame that is not EntiDB's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith("entidb."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
