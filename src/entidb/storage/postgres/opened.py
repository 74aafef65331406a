"""What a store shares with its snapshots, turn and rights: which it is, and whether it is open."""

from __future__ import annotations

from collections import deque
from typing import Final

from entidb.errors import DatabaseClosedError, DatabaseMovedError, StorageError
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.node import Lease

#: Firsts that are remembered, and bytes of a value that is read before anybody asks for it.
_FIRSTS: Final = 4
_FIRST_BYTES_MAX: Final = 4096


class AskedFirst:
    """Which key snapshots are mostly asked for first: its value comes with their mark, in the same
    round trip and of the same state. A guess, which costs nothing but room on the line."""

    def __init__(self) -> None:
        self.key: bytes | None = None
        self._seen: deque[bytes] = deque(maxlen=_FIRSTS)

    def saw(self, key: bytes, size: int) -> None:
        """What a snapshot was asked for first, and was not prepared for; the bytes of its value."""
        if key in self._seen and size <= _FIRST_BYTES_MAX:
            self.key = key
        self._seen.append(key)

    def came(self, size: int) -> None:
        if size > _FIRST_BYTES_MAX:
            self.key = None


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
        self.first = AskedFirst()
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
