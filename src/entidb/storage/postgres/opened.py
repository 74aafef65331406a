"""What a store shares with its snapshots, turn and rights: which it is, and whether it is open."""

from __future__ import annotations

from entidb.errors import DatabaseClosedError, StorageError
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.node import Lease


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
        #: Snapshots that are open, by identity.
        self.readers: set[int] = set()

    def check_open(self) -> None:
        if self.closed:
            raise DatabaseClosedError(f"{self.path} is closed; open it again to use it")

    def failure(self, error: Exception, doing: str) -> StorageError:
        """Ours for what psycopg raised; a server that was demoted is not asked again."""
        self.node.note(error)
        return storage_error(error, doing)


__all__ = ["Opened"]
