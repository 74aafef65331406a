"""The audit log: who changed what, when, from where; and who was refused.

Lines of JSON, appended and never changed, readable for the owner alone. A file that has become
large is put aside, and a few of those are kept. Refused logins are counted and written in the
background, one line for many, so that no client fills a disk by knocking.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol

from msgspec import DecodeError, Struct, json

from entidb.errors import DatabaseLockedError, FormatError, StorageError
from entidb.storage.directories import (
    NO_FOLLOW,
    KnownDirectory,
    give_owner,
    move,
    open_file,
    sync_path,
)
from entidb.storage.disk_errors import disk_error
from entidb.storage.partial import Partial
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

AUDIT_FILE: Final = "entidb-audit.log"
#: Bytes of the newest file; beyond it the file is put aside. So many are kept.
FILE_BYTES_MAX: Final = 8 * 2**20
FILES_KEPT: Final = 4
#: Pairs of an address and a code that are counted at once; the rest counts as one.
_REFUSED_MAX: Final = 1000
_IN_MEMORY: Final = 1000
_TEXT_MAX: Final = 500
_BACKWARDS_BYTES: Final = 64 * 1024


class Entry(Struct, omit_defaults=True):
    """One line. ``time_ms`` is milliseconds since 1970, ``result`` is ``done`` or an error's
    code, ``database`` what it was about, if that is one."""

    time_ms: int
    who: str
    where: str
    action: str
    result: str = "done"
    database: str | None = None
    details: dict[str, str] = {}
    #: Of refused logins: how many there were since the line before.
    count: int | None = None


class Journal(Protocol):
    """Where the lines are, for all processes of a server. Methods raise ``StorageError``."""

    def check(self) -> None:
        """Raises if nothing can be written down."""
        ...

    def append(self, lines: list[bytes]) -> None:
        """Durable when it returns."""
        ...

    def newest(self) -> Iterator[bytes]:
        """Newest first."""
        ...


class AuditLog:
    """Thread-safe, also beside other processes. Without a place it keeps the newest lines."""

    def __init__(self, place: str | os.PathLike[str] | Journal | None, clock: Clock) -> None:
        self._journal = FileJournal(place) if isinstance(place, str | os.PathLike) else place
        self._clock = clock
        self._memory: deque[Entry] = deque(maxlen=_IN_MEMORY)
        self._lock = threading.Lock()
        self._refused: dict[tuple[str, str, str], Entry] = {}

    def check(self) -> None:
        """Raises ``StorageError`` if nothing can be written down: then nothing is to be done."""
        if self._journal is not None:
            self._journal.check()

    def write(
        self,
        who: str,
        where: str,
        action: str,
        *,
        database: str | None = None,
        result: str = "done",
        **details: str,
    ) -> None:
        """Durable when it returns. Raises ``StorageError``."""
        cut = {name: text[:_TEXT_MAX] for name, text in details.items() if text}
        self._append(
            [
                Entry(
                    time_ms=self._clock.now_ms(),
                    who=who[:_TEXT_MAX],
                    where=where[:_TEXT_MAX],
                    action=action,
                    result=result,
                    database=database,
                    details=cut,
                )
            ]
        )

    def refused(self, who: str | None, where: str | None, code: str) -> None:
        """Count a request that was refused for its token. Costs no writing; see ``flush``."""
        key = ((who or "")[:_TEXT_MAX], (where or "")[:_TEXT_MAX], code)
        with self._lock:
            if key not in self._refused and len(self._refused) >= _REFUSED_MAX:
                key = ("", "many addresses", code)
            entry = self._refused.get(key)
            if entry is None:
                now = self._clock.now_ms()
                entry = Entry(now, key[0], key[1], "login", result=code, count=0)
                self._refused[key] = entry
            entry.count = (entry.count or 0) + 1

    def flush(self) -> None:
        """Write down what was refused since the last time."""
        with self._lock:
            found, self._refused = list(self._refused.values()), {}
        if not found:
            return
        try:
            self._append(found)
        except StorageError as error:
            logger.error("%d refused logins are not written down: %s", len(found), error)

    def newest(self, limit: int) -> list[Entry]:
        """The newest lines, newest first. What cannot be read is passed over."""
        self.flush()
        journal = self._journal
        if journal is None:
            return list(self._memory)[: -limit - 1 : -1]
        found: list[Entry] = []
        for line in journal.newest():
            try:
                found.append(json.decode(line, type=Entry))
            except (DecodeError, ValueError):
                logger.warning("there is a line that is not of an audit log")
            if len(found) >= limit:
                break
        return found

    def _append(self, entries: list[Entry]) -> None:
        if self._journal is None:
            self._memory.extend(entries)
        else:
            self._journal.append([json.encode(entry) for entry in entries])


class FileJournal:
    """Files in a directory, readable for their owner alone."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._known: Final = KnownDirectory(root)
        self._path: Final = os.path.join(self._known.path, AUDIT_FILE)
        self._writing = threading.Lock()

    def check(self) -> None:
        os.close(self._open())

    def append(self, lines: list[bytes]) -> None:
        data = b"".join(line + b"\n" for line in lines)
        with self._writing:
            descriptor = self._open()
            try:
                size = os.fstat(descriptor).st_size
                if size and not _ends_with_line(self._path):
                    data = b"\n" + data
                # One write: lines of several processes do not mix.
                if os.write(descriptor, data) < len(data):
                    # What is there of it is cut short, and the next line begins behind it.
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
                if not size:  # The file may be new, and so its name.
                    sync_path(self._known.path)
            except OSError as error:
                raise self._unwritable(error) from error
            finally:
                os.close(descriptor)
            if size + len(data) > FILE_BYTES_MAX:
                self._put_aside()

    def newest(self) -> Iterator[bytes]:
        for path in (self._path, *(self._aside(n) for n in range(1, FILES_KEPT + 1))):
            yield from _backwards(path)

    def _open(self) -> int:
        self._known.check()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW
        try:
            descriptor = open_file(self._path, flags)
            try:
                found = os.fstat(descriptor)
                if not found.st_size:  # root may have started the server once
                    give_owner(descriptor, os.stat(self._known.path))
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StorageError:
        return disk_error(error.errno or errno.EIO, f"writing the audit log {self._path}")

    def _aside(self, number: int) -> str:
        return f"{self._path}.{number}"

    def _put_aside(self) -> None:
        try:
            with Partial(self._path, "rotation"):
                if os.stat(self._path).st_size <= FILE_BYTES_MAX:
                    return  # another process was quicker
                for number in range(FILES_KEPT, 1, -1):
                    if os.path.lexists(self._aside(number - 1)):
                        os.replace(self._aside(number - 1), self._aside(number))
                move(self._path, self._aside(1))
        except (OSError, StorageError, DatabaseLockedError) as error:
            logger.warning("the audit log is not put aside: %s", error)


def _ends_with_line(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _backwards(path: str) -> Iterator[bytes]:
    """The lines of a file from its end on."""
    try:
        descriptor = open_file(path, os.O_RDONLY | NO_FOLLOW)
    except FileNotFoundError:
        return  # fewer files than are kept
    except OSError as error:
        doing = f"reading the audit log {path}"
        raise disk_error(error.errno or errno.EIO, doing) from error
    except FormatError:
        return  # nothing of ours
    with open(descriptor, "rb") as file:
        at, rest = os.fstat(descriptor).st_size, b""
        while at:
            step = min(at, _BACKWARDS_BYTES)
            at -= step
            file.seek(at)
            lines = (file.read(step) + rest).split(b"\n")
            rest = lines[0] if at else b""
            yield from filter(None, reversed(lines[1:] if at else lines))
