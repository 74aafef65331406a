"""The seats of the processes of one server: a file for each, locked as long as its process lives,
and beside it what that process leaves for the others.

    DIR/entidb-workers/4711-1f2e.seat      locked by a process that serves
    DIR/entidb-workers/4711-1f2e.sock      where it is asked (``talk``)
    DIR/entidb-workers/4711-1f2e.counts    what it has counted, as of a moment ago (``counted``)
    DIR/entidb-workers/chair               locked by the one that does what only one may do
    DIR/entidb-workers/shop.entidb.closed  locked by the one that keeps a database closed
    DIR/entidb-workers/shop.entidb.purged  when its old tombstones were looked for

Not here: who may have a seat (``family``).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from typing import Final

from entidb.storage.directories import make_folder, open_file
from entidb.storage.locks import FileLock, HeldError

#: In the data directory; no database is called so.
FOLDER: Final = "entidb-workers"
SEAT: Final = ".seat"
SOCKET: Final = ".sock"
CLOSED: Final = ".closed"
COUNTS: Final = ".counts"
_PURGED: Final = ".purged"
_CHAIR: Final = "chair"
_TRIES: Final = 20
_TRY_S: Final = 0.005


def clear_seats(root: str) -> None:
    """Remove what an earlier family has left. The data directory is this process's alone."""
    shutil.rmtree(os.path.join(root, FOLDER), ignore_errors=True)


class Seats:
    """The folder of one server, as one of its processes sees it."""

    def __init__(self, root: str, name: str = "") -> None:
        """Takes a seat, by ``name`` if there is one. Raises ``OSError``."""
        self.folder: Final = os.path.join(root, FOLDER)
        with contextlib.suppress(FileExistsError):
            make_folder(self.folder, root)
        self._like = os.stat(self.folder)
        self.name: Final = name or f"{os.getpid()}-{secrets.token_hex(4)}"
        self._seat = self._take(self.path(self.name, SEAT))
        self._chair: FileLock | None = None

    def _take(self, path: str) -> FileLock:
        """Another process may look at the lock in this very moment."""
        for _ in range(_TRIES):
            with contextlib.suppress(HeldError):
                return FileLock.take(path, self._like)
            time.sleep(_TRY_S)
        return FileLock.take(path, self._like)

    def path(self, name: str, suffix: str) -> str:
        return os.path.join(self.folder, name + suffix)

    def others(self) -> list[str]:
        """The names of the other processes."""
        return [name for name in self._names() if name != self.name and self._is_held(name, SEAT)]

    def gone(self) -> list[str]:
        """The names of processes that have ended and left something."""
        return [
            name for name in self._names() if name != self.name and not self._is_held(name, SEAT)
        ]

    def clear(self, name: str) -> None:
        """Remove what a process has left that has ended."""
        for suffix in (SOCKET, COUNTS, SEAT):
            with contextlib.suppress(OSError):
                os.unlink(self.path(name, suffix))

    def _names(self) -> list[str]:
        found = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(each.removesuffix(SEAT) for each in found if each.endswith(SEAT))

    def _is_held(self, name: str, suffix: str) -> bool:
        try:
            lock = FileLock.look(self.path(name, suffix))
        except (HeldError, OSError):
            return True
        if lock is not None:
            lock.release()
        return False

    # ------------------------------------------------------------ what one has alone

    def take_chair(self) -> bool:
        """Have the chair, if nobody has it; whether this process has it."""
        if self._chair is None:
            try:
                self._chair = FileLock.take(self.path(_CHAIR, ""), self._like)
            except HeldError:
                return False
            self._chair.write(self.name.encode())
        return True

    def give_chair(self) -> None:
        """Idempotent."""
        chair, self._chair = self._chair, None
        if chair is not None:
            chair.release()

    def chairman(self) -> str | None:
        """The name of the process that has the chair; None if nobody has."""
        if self._chair is not None:
            return self.name
        try:
            with open(self.path(_CHAIR, ""), "rb", opener=open_file) as file:
                name = file.read().partition(b"\n")[2].decode("ascii", "replace")
        except OSError:
            return None
        return name if name and self._is_held(_CHAIR, "") else None

    def keep_closed(self, directory: str) -> FileLock:
        """Say that the database in ``directory`` is not to be opened, until ``let_open``. Raises
        ``HeldError`` if it is kept closed already, ``OSError``."""
        return self._take(self.path(directory, CLOSED))

    def let_open(self, directory: str, lock: FileLock) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path(directory, CLOSED))
        lock.release()

    def is_kept_closed(self, directory: str) -> bool:
        return os.path.exists(self.path(directory, CLOSED)) and self._is_held(directory, CLOSED)

    def is_first(self, directory: str, every_s: float) -> bool:
        """Whether no process has asked this for the database within ``every_s``."""
        try:
            lock = FileLock.take(self.path(directory, _PURGED), self._like)
        except HeldError:
            return False
        try:
            asked_at = lock.found.partition(b"\n")[2].strip()
            now = time.monotonic()
            first = not asked_at or now - float(asked_at) >= every_s
            lock.write(str(now).encode() if first else asked_at)
            return first
        finally:
            lock.release()

    def leave(self) -> None:
        """Idempotent. What was counted stays, for those who are left."""
        self.give_chair()
        with contextlib.suppress(OSError):
            os.unlink(self.path(self.name, SOCKET))
        self._seat.release()


__all__ = ["CLOSED", "COUNTS", "FOLDER", "SEAT", "SOCKET", "Seats", "clear_seats"]
