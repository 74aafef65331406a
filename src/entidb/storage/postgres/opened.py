"""What a store shares with its snapshots, turn and rights: which it is, and whether it is open."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Final

from entidb.errors import DatabaseClosedError, DatabaseMovedError, StorageError
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.fresh import Fresh
from entidb.storage.postgres.node import Lease
from entidb.storage.postgres.remembered import Remembered

#: Keys that come with the mark, and bytes of a value that does.
_OFTEN: Final = 8
_BYTES_MAX: Final = 1024
#: Keys that were asked for lately, and reads in which one that comes has to be of use.
_LATELY: Final = 16
_USELESS: Final = 64


class AskedOften:
    """Which keys snapshots are asked for again and again: their values come with the mark, in the
    same round trip and of the same state. A guess, which costs nothing but room on the line.
    Thread-safe."""

    def __init__(self) -> None:
        self.keys: tuple[bytes, ...] = ()
        self._lock = threading.Lock()
        #: Of those that come, in how many reads in a row nobody asked for it.
        self._unused: dict[bytes, int] = {}
        #: Others, in the order in which they were asked for.
        self._lately: dict[bytes, None] = {}

    def asked(self, key: bytes, size: int) -> None:
        """For a key that did not come with the mark; the bytes of its value."""
        with self._lock:
            if size > _BYTES_MAX:
                return
            if key in self._lately and len(self._unused) < _OFTEN:
                del self._lately[key]
                self._unused[key] = 0
                self.keys = tuple(self._unused)
                return
            self._lately.pop(key, None)
            self._lately[key] = None
            if len(self._lately) > _LATELY:
                del self._lately[next(iter(self._lately))]

    def ended(self, came: Mapping[bytes, int], used: Collection[bytes]) -> None:
        """A snapshot, with what came with its mark (the bytes of each), and what was asked for."""
        with self._lock:
            for key, size in came.items():
                if key in self._unused:
                    self._unused[key] = 0 if key in used else self._unused[key] + 1
                    if size > _BYTES_MAX or self._unused[key] >= _USELESS:
                        del self._unused[key]
                        self.keys = tuple(self._unused)


class Opened:
    """An open store, as its parts know it."""

    def __init__(self, lease: Lease, name: str, number: int) -> None:
        self.lease = lease
        self.node = lease.node
        self.name = name
        self.number = number
        self.closed = False
        #: For messages: the address without its password, and the name.
        self.path = f"{self.node.where}#{name}"
        self.often = AskedOften()
        self.fresh = Fresh()
        self.remembered = Remembered(self.node.memory)
        #: With another name it is another store (``shelf``): compared with the number each time.
        self.known_as = name.encode()
        #: Snapshots that are open, by identity.
        self.readers: set[int] = set()

    def check_open(self) -> None:
        if self.closed:
            raise DatabaseClosedError(f"{self.path} is closed; open it again to use it")

    def gone(self) -> DatabaseMovedError:
        """There is no such row any more."""
        return DatabaseMovedError(
            f"{self.path} was removed, or has another name now; nothing of it is read or written",
            code="store_gone",
        )

    def failure(self, error: Exception, doing: str) -> StorageError:
        """Ours for what psycopg raised; a server that was demoted is not asked again."""
        self.node.note(error)
        return storage_error(error, doing)


__all__ = ["Opened"]
