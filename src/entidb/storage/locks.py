"""Locks on files, across processes and within this one; the system releases them when the process
ends, however it ends.

Locks are those of ``flock`` on POSIX, which belong to the open file. A record lock of ``fcntl`` is
lost when any descriptor of the file is closed, and LMDB closes some. On Windows a file that is open
cannot be deleted, moved or replaced.

Not here: what is locked, and what it means that another process has it.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from typing import Final

from entidb.errors import FormatError
from entidb.storage.directories import NO_FOLLOW, is_at, open_file, open_or_make
from entidb.types import Uncopied

#: A lock file that was replaced between opening and locking it is opened again.
TRIES: Final = 10
_BUSY: Final = frozenset((errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK))
#: More than process number and note take.
NOTE_BYTES_MAX: Final = 512
#: Windows would read and write line ends.
if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, shared: bool) -> None:
        # Far behind the process number, which others must be able to read. There is no shared kind.
        os.lseek(descriptor, 2**20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 2**20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    def _write_start(descriptor: int, content: bytes) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, content)

else:
    import fcntl

    def _lock(descriptor: int, shared: bool) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _write_start(descriptor: int, content: bytes) -> None:
        os.pwrite(descriptor, content, 0)


def _read_start(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, NOTE_BYTES_MAX)


class HeldError(Exception):
    """Another process has the lock. ``holder`` is its process number, empty when it is unknown.
    Never leaves EntiDB: the code that asked for the lock says what it means."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class FileLock(Uncopied):
    """An open file with a lock on it, across processes and within this one. The system releases
    it when the process ends, however it ends."""

    __slots__ = ("__weakref__", "_process", "descriptor", "found")

    def __init__(self, descriptor: int, *, shared: bool = False) -> None:
        """Takes over ``descriptor``; ``shared`` with others who only read. Raises ``HeldError``,
        or ``OSError`` where the file system knows no locks; the descriptor is closed then."""
        self._process = os.getpid()
        self.descriptor = descriptor
        #: What the file held before the process number was written into it.
        self.found = b""
        try:
            _lock(descriptor, shared)
        except OSError as error:
            held = HeldError(_system_holder(descriptor))
            self.forget()
            if error.errno in _BUSY:
                raise held from error
            raise
        _LOCKS.add(self)

    @classmethod
    def take(cls, path: str, like: os.stat_result, *, shared: bool = False) -> FileLock:
        """The lock of the file at ``path``, made if missing, with the process number in it unless
        it is ``shared``. Raises as the constructor."""
        for _ in range(TRIES):
            try:
                lock = cls(open_or_make(path, like), shared=shared)
            except HeldError as error:
                raise HeldError(error.holder or written_holder(path)) from error
            except FileNotFoundError:
                if not os.path.isdir(os.path.dirname(path)):
                    raise
                continue
            if is_at(path, lock.descriptor):
                lock.found = _read_start(lock.descriptor)
                if not shared:
                    try:
                        lock.write(b"")
                    except OSError:
                        lock.release()
                        raise
                return lock
            lock.release()
        raise OSError(errno.EAGAIN, "the file is replaced again and again", path)

    @classmethod
    def look(cls, path: str) -> FileLock | None:
        """A shared lock of the file at ``path``, which is not changed; None if there is none.
        Raises as the constructor."""
        try:
            descriptor = open_file(path, os.O_RDONLY | NO_FOLLOW)
        except FileNotFoundError:
            return None
        lock = cls(descriptor, shared=True)
        lock.found = _read_start(descriptor)
        return lock

    @classmethod
    def silently(cls, path: str) -> FileLock:
        """The lock of the file at ``path``, which is there; nothing is written into it, so that
        it can be had where there is no room. Raises as the constructor."""
        lock = cls(open_file(path, os.O_RDWR | NO_FOLLOW))
        if is_at(path, lock.descriptor):
            return lock
        lock.release()
        raise HeldError("")

    def write(self, note: bytes) -> None:
        """Write the process number, and ``note`` behind it for the process that takes the lock
        next."""
        os.ftruncate(self.descriptor, 0)
        _write_start(self.descriptor, f"{os.getpid()}\n".encode() + note)

    def share(self) -> None:
        """Let others have it too. Where another process may want it alone at the same time, it can
        be lost: ``HeldError``."""
        try:
            _lock(self.descriptor, True)
        except OSError as error:
            if error.errno in _BUSY:
                raise HeldError(_system_holder(self.descriptor)) from error
            raise

    def have_alone(self) -> bool:
        """Have it alone, if no other process has it; whether that is so. If not, it is not held at
        all: the system gives up the one lock before it asks for the other."""
        try:
            _lock(self.descriptor, False)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise
        return True

    def unlock(self) -> None:
        """Leave it to others, and keep the file open."""
        _unlock(self.descriptor)

    def read(self) -> bytes:
        """What the file holds now."""
        return _read_start(self.descriptor)

    def release(self) -> None:
        """Idempotent. Unlocked and not only closed: a child forked a moment ago still has the
        file open. In such a child it is only closed: the lock is the parent's."""
        if self.descriptor >= 0 and self._process == os.getpid():
            _unlock(self.descriptor)
        self.forget()

    def forget(self) -> None:
        """Close it; a lock that a parent process has too stays the parent's."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            self.release()


_LOCKS: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _after_fork() -> None:
    """A child keeps nothing locked after its parent has gone."""
    for lock in list(_LOCKS):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _system_holder(descriptor: int) -> str:
    """The number of the process that has the file locked, where the system tells it."""
    if sys.platform == "win32":
        return ""
    try:
        with open("/proc/locks", encoding="ascii") as lines:
            return next(iter(_find_locks(list(lines), _name_of(os.fstat(descriptor)))), "")
    except (OSError, ValueError):
        return ""


def _name_of(file: os.stat_result) -> str:
    return f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"


def system_holders(path: str) -> list[str]:
    """The numbers of the processes that have the file at ``path`` locked, where the system tells
    them; not this one's."""
    try:
        found = os.stat(path)
        with open("/proc/locks", encoding="ascii") as lines:
            pids = _find_locks(list(lines), _name_of(found))
    except (OSError, ValueError):
        return []
    return [pid for pid in dict.fromkeys(pids) if pid != str(os.getpid())]


def written_holder(path: str) -> str:
    """The process number in the lock file at ``path``."""
    try:
        with open(path, "rb", opener=open_file) as file:
            written = file.read(20).partition(b"\n")[0]
    except (OSError, FormatError):
        return ""
    return written.decode() if written.isdigit() else ""


def _find_locks(lines: list[str], wanted: str) -> list[str]:
    found = []
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 4711 fd:01:393218 0 EOF
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted:
            # Another container's has no number here.
            found.append(fields[4] if fields[4].isdigit() and fields[4] != "0" else "")
    return [pid for pid in found if pid]
