"""Files and directories that take several steps to make, and appear whole or not at all.

They are made beside their place, in a directory whose name says what it is, under a lock that goes
with the process. So two who make the same thing at once do not spoil it for each other, and what a
dead process left behind is known for what it is: ``remove_dead`` removes it, which is called by the
next who makes something there, and by a server for its own directories.

Not here: what is made.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from typing import Final

from entidb.errors import CommitUnknownError, DatabaseLockedError, StorageError
from entidb.storage.directories import give_as, give_owner, make_folder, move, sync_path
from entidb.storage.locks import FileLock, HeldError

_SUFFIX: Final = ".entidb-partial"
_LOCK: Final = "lock"
_NOTE: Final = "note"
#: What EntiDB 0.3 called them: with the number of the process.
_OLD: Final = re.compile(r".+\.partial-([0-9]{1,9})")
_OLD_CONTENT: Final = frozenset(("data.mdb", "lock.mdb", "entidb.lock"))
#: Looks at a lock that another process has, and seconds between them. A process that only cleans up
#: has it briefly.
_LOOKS: Final = 10
_LOOK_SECONDS: Final = 0.05


class Partial:
    """What is being made for the place ``where``. ``path`` is where to make it; then ``finish``."""

    def __init__(self, where: str, what: str) -> None:
        """``what`` is the word for messages. Raises ``DatabaseLockedError`` if another process is
        making it, ``StorageError`` if another user's left what cannot be removed, ``OSError``."""
        self._where = where
        self._folder = f"{where}{_SUFFIX}"
        self.path = os.path.join(self._folder, os.path.basename(where))
        try:
            self._lock = _take(self._folder)
        except HeldError as error:
            process = f"process {error.holder}" if error.holder else "another process"
            raise DatabaseLockedError(
                f"another {what} to {where} is under way in {process}; wait for it, or name "
                "another place"
            ) from error
        try:
            _clear(self._folder)
        except BaseException:
            self._end()
            raise

    def note(self, text: str) -> None:
        """Leave a few words, durably, for who finds this after the process was killed."""
        path = os.path.join(self._folder, _NOTE)
        with open(path, "w", encoding="utf-8") as file:
            give_owner(file.fileno(), os.stat(self._folder))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_path(self._folder)

    def finish(self) -> None:
        """Move it to its place, durably. A file there is replaced, and its owner and permissions
        are kept; a new file is the directory's owner's. A directory is not replaced. After an error
        nothing new is in its place, unless a file was there."""
        try:
            _give_as(self.path, os.stat(self._where))
        except FileNotFoundError:
            if os.path.isfile(self.path):
                _give_as(self.path, os.stat(os.path.dirname(self._where) or os.curdir))
        move(self.path, self._where, forget=False)

    def _end(self) -> None:
        if sys.platform == "win32":  # where nothing is removed that is open
            self._lock.release()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._end()
        except BaseException:
            self._end()  # Ctrl-C; each step may be repeated.
            raise
        if isinstance(error, CommitUnknownError) and error.failed is not None:
            # Whether a commit to what was made here is there: it is not, and nothing else is.
            failed = error.failed
            raise type(failed)(f"{failed}; nothing was made", code=failed.code) from error


def _give_as(path: str, like: os.stat_result) -> None:
    if sys.platform == "win32":
        return  # Its files have no owner that counts.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        give_as(descriptor, like)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take(folder: str) -> FileLock:
    for look in range(_LOOKS):
        with contextlib.suppress(FileExistsError):
            make_folder(folder, os.path.dirname(folder) or os.curdir)
        try:
            return FileLock.take(os.path.join(folder, _LOCK), os.stat(folder))
        except FileNotFoundError:
            continue  # The process that had it is done, and has removed it.
        except HeldError:
            if look == _LOOKS - 1:
                raise
            time.sleep(_LOOK_SECONDS)
        except OSError as error:  # There is no room for it: then nothing of it stays.
            with contextlib.suppress(OSError, HeldError):
                _remove(folder, None)
            with contextlib.suppress(OSError):
                os.rmdir(folder)
            if isinstance(error, PermissionError) and os.path.isdir(folder):
                raise StorageError(
                    f"{folder} is in the way, and cannot be removed: somebody else's process left "
                    "it. Remove it as that user or as root, and try again; nothing was changed"
                ) from error
            raise
    raise HeldError("")


def _clear(folder: str) -> None:
    """Remove what a dead process left in a directory whose lock is ours."""
    for entry in list(os.scandir(folder)):
        if entry.name == _LOCK:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def is_being_made(where: str) -> bool:
    """Whether somebody is at it, or was killed there and nobody has removed it yet."""
    return os.path.lexists(f"{where}{_SUFFIX}")


#: Called with the place of what is removed, and the note that was left with it.
Removes = Callable[[str, str], None]


def remove_dead(folder: str, before: Removes | None = None) -> list[str]:
    """Remove what dead processes left unfinished in ``folder``, as far as this one may; for which
    places that was. Where everybody may write, others' things are left alone."""
    removed: list[str] = []
    with contextlib.suppress(OSError):
        shared = bool(os.stat(folder).st_mode & stat.S_ISVTX)
        for entry in list(os.scandir(folder)):
            with contextlib.suppress(OSError, HeldError):
                if not entry.is_dir(follow_symlinks=False):
                    continue
                if shared and entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                    continue
                if entry.name.endswith(_SUFFIX):
                    _remove(entry.path, before)
                    removed.append(entry.path.removesuffix(_SUFFIX))
                elif (old := _OLD.fullmatch(entry.name)) and _is_old_and_dead(entry.path, old[1]):
                    shutil.rmtree(entry.path)
                    removed.append(entry.path)
    return removed


def _remove(folder: str, before: Removes | None) -> None:
    held = os.path.join(folder, _LOCK)
    try:
        lock = FileLock.silently(held)  # Also on a disk that is full, which is when it matters.
    except FileNotFoundError:
        lock = FileLock.take(held, os.stat(folder))
    try:
        if before is not None:
            before(folder.removesuffix(_SUFFIX), _note_in(folder))
        if sys.platform == "win32":
            lock.release()
        shutil.rmtree(folder)
    finally:
        lock.release()


def _note_in(folder: str) -> str:
    try:
        with open(os.path.join(folder, _NOTE), encoding="utf-8", errors="replace") as file:
            return file.read(1000)
    except FileNotFoundError:
        return ""


def _is_old_and_dead(path: str, process: str) -> bool:
    """Whether this is the unfinished backup of a process of EntiDB 0.3 that is gone."""
    if sys.platform == "win32" or not _OLD_CONTENT.issuperset(os.listdir(path)):
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    return False
