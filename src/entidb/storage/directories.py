"""Files and directories: whose they are, who may read them, and that they survive a power cut.

Not here: who is using them (``locks``), and files that take several steps to make (``partial``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from typing import Final

from entidb.errors import DatabaseMovedError, FormatError, StorageError

NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
#: Files on their way to the database in this directory, in a directory of their own.
FETCHED: Final = ".entidb-segments"
#: Windows makes other bytes of the ends of lines in what is not opened so.
_BINARY: Final = getattr(os, "O_BINARY", 0)
#: Opening a named pipe waits for its other end, and a terminal may become that of the process.
_AT_ONCE: Final = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
#: What the system says of what cannot be opened like a file.
_NO_FILE: Final = frozenset((errno.ENXIO, errno.ENODEV, errno.EISDIR))
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def absolute(path: str | os.PathLike[str]) -> str:
    """As ``os.path.abspath``. Raises ``StorageError`` where the current directory is gone."""
    try:
        return os.path.abspath(os.fspath(path))
    except OSError as error:
        raise StorageError(
            f"{os.fspath(path)} begins in the current directory, and the directory in which this "
            "process runs is gone: change to one that is there, or give the whole path"
        ) from error


def occupy_standard_numbers() -> None:
    """Make the three lowest numbers of this process lead somewhere, where one of its standard
    streams was closed, as daemons do. The next file opened would get that number, and whatever is
    printed there, or made that number later (``dup2``), would end up in it, or in its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            try:
                made = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            except OSError:  # a directory of its own (chroot) that has no such device
                return
            if made > number:  # somebody else's thread has taken it meanwhile
                os.close(made)


def open_file(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """``os.open`` of a file: never waits for what stands in its place. Raises ``FormatError``
    where that is none, and ``OSError``."""
    try:
        descriptor = os.open(path, flags | _AT_ONCE | _BINARY, mode)
    except OSError as error:
        if error.errno in _NO_FILE:
            with contextlib.suppress(OSError):
                check_file(path, os.stat(path))
        raise
    try:
        check_file(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_file(path: str | os.PathLike[str], found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(found.st_mode)), "something")
        raise FormatError(
            f"{os.fspath(path)} is {kind}, and has to be a file; it was not touched. Check the "
            "path, or put it away"
        )


def is_at(path: str, descriptor: int) -> bool:
    """Whether ``path`` names the file that ``descriptor`` has open."""
    return sys.platform == "win32" or is_still_at(path, os.fstat(descriptor))


def is_still_at(path: str, file: os.stat_result) -> bool:
    """Whether ``path`` names ``file``, which is open."""
    if sys.platform == "win32":
        return True
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, file)


class KnownDirectory:
    """The directory at a path, of which it is noticed when another one stands there, or none: it
    was moved, replaced or unmounted, and what belongs into it must not be made elsewhere."""

    __slots__ = ("_found", "path")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute(path)
        #: None until it is there.
        self._found = self._look()

    def _look(self) -> os.stat_result | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.stat(self.path)
        return None

    def check(self) -> None:
        """Raises ``DatabaseMovedError`` if the path leads to something else by now."""
        try:
            found = self._look()
        except OSError:
            return  # It cannot be looked at, which proves nothing.
        if self._found is None:
            self._found = found
        elif found is None or not os.path.samestat(found, self._found):
            now = "nothing stands there" if found is None else "another directory stands there"
            raise DatabaseMovedError(
                f"{self.path} is not the directory that this server began with: it was moved, "
                f"replaced or unmounted, and {now} now. Nothing was written there; put it back, or "
                "start the server again"
            )


def give_owner(descriptor: int, like: os.stat_result) -> None:
    """Give a new file or directory the owner of ``like``: what an administrator makes in a
    service's directory is the service's. A user who may not give files away keeps this one."""
    if sys.platform == "win32":
        return
    mine = os.fstat(descriptor)
    if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid):
        for uid in (like.st_uid, -1):
            with contextlib.suppress(OSError):
                os.fchown(descriptor, uid, like.st_gid)
                break


def give_files(folder: str, like: os.stat_result) -> None:
    """``give_owner`` of a new directory and of the files in it."""
    if sys.platform == "win32":
        return
    for path in (*(entry.path for entry in os.scandir(folder)), folder):
        made = os.open(path, os.O_RDONLY | NO_FOLLOW)
        try:
            give_owner(made, like)
        finally:
            os.close(made)


def open_or_make(path: str, like: os.stat_result) -> int:
    """A file that may be there, to be read, written and locked; one that is made is as ``like`` in
    owner and rights. Raises as ``open_file``."""
    flags = os.O_RDWR | NO_FOLLOW
    try:
        return open_file(path, flags)
    except FileNotFoundError:
        try:
            made = os.open(path, flags | _BINARY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another process has made it meanwhile
            return open_file(path, flags)
    try:
        give_as(made, like)
    except BaseException:
        os.close(made)
        raise
    return made


def give_as(descriptor: int, like: os.stat_result) -> None:
    """``give_owner``, and the permissions of ``like`` too if that is a file."""
    give_owner(descriptor, like)
    wanted = stat.S_IMODE(like.st_mode) & 0o666
    if (
        sys.platform != "win32"
        and stat.S_ISREG(like.st_mode)
        and stat.S_IMODE(os.fstat(descriptor).st_mode) != wanted
    ):
        os.fchmod(descriptor, wanted)


def share_as(made: str | os.PathLike[str] | int, above: str | os.PathLike[str]) -> None:
    """Who may read in the directory ``above`` may read ``made``, a file in it (its descriptor) or a
    directory; nobody else but the owner may, and nobody else may write."""
    if sys.platform == "win32":
        return
    like = os.stat(above)
    descriptor = made if isinstance(made, int) else os.open(made, os.O_RDONLY | NO_FOLLOW)
    try:
        give_owner(descriptor, like)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o700 | like.st_mode & 0o055)
        else:
            os.fchmod(descriptor, 0o600 | like.st_mode & 0o044)
    finally:
        if descriptor != made:
            os.close(descriptor)


def restrict(path: str) -> None:
    """Only the owner may read a file of his."""
    found = os.stat(path)
    if found.st_mode & 0o077 and (sys.platform == "win32" or found.st_uid == os.geteuid()):
        os.chmod(path, 0o600)


def make_folder(path: str, above: str | int) -> None:
    """Make the directory ``path``, for the owner of ``above`` alone, which is a directory too, by
    its path or its descriptor: what root leaves in a service's directory when it is killed must not
    stand in the service's way. Raises ``OSError``; ``FileExistsError`` where something is."""
    at = None if isinstance(above, str) else above
    os.mkdir(path, 0o700, dir_fd=at)
    if sys.platform == "win32":
        return
    with contextlib.suppress(FileNotFoundError):  # Another process may remove what is empty.
        made = os.open(path, os.O_RDONLY | NO_FOLLOW, dir_fd=at)
        try:
            give_owner(made, os.stat(above))
        finally:
            os.close(made)


def sync_path(path: str) -> None:
    """fsync a file, or a directory so that a rename in it is durable."""
    if sys.platform == "win32" and os.path.isdir(path):
        return  # Windows has no handle for it, and writes directory changes through.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        if os.path.isdir(path):
            sync_directory(descriptor)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: str, target: str, *, forget: bool = True) -> None:
    """Rename ``source``, durably; ``forget``: also in the directory that it leaves. Where this
    cannot be made durable the name is taken back, so that who is told of an error may try again;
    but not where something was at ``target``, which is no more."""
    replaces = os.path.lexists(target)
    os.replace(source, target)
    try:
        sync_path(os.path.dirname(target))
        if forget and os.path.dirname(source) != os.path.dirname(target):
            sync_path(os.path.dirname(source))
    except OSError:
        if not replaces:
            with contextlib.suppress(OSError):
                os.replace(target, source)
        raise


def make_directory(path: str) -> None:
    """Make the directory ``path`` and what is missing above it, each durable in the one above and
    with that one's owner; only he may use them. One that is there is left as it is."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path) or os.curdir
    if not os.path.lexists(above):
        make_directory(above)
    with contextlib.suppress(FileExistsError):  # Another process may make it at the same time.
        make_folder(path, above)
    sync_path(above)


def sync_names(path: str) -> None:
    """Make the names on the way to ``path`` durable: who made them may have died before he could.
    A directory that this process may not read cannot be synced by it, nor was it made by it."""
    while (above := os.path.dirname(path)) != path:
        with contextlib.suppress(PermissionError):
            sync_path(above)
        path = above


def sync_directory(descriptor: int) -> None:
    os.fsync(descriptor)
