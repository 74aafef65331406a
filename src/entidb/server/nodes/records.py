"""What a server keeps beside its databases, where those are in PostgreSQL: records and the lines of
the audit log, for all nodes.

Not here: the statements (``storage.postgres.sharing``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from entidb.errors import StorageError
from entidb.server.config import is_db_id
from entidb.server.records import Make, Wrote
from entidb.server.watched import Mark

if TYPE_CHECKING:
    from entidb.storage.postgres.sharing import SharedTables

#: Lines of the audit log that are kept, about.
LINES_KEPT: Final = 200_000


class NodeRecords:
    """``Records`` and ``Journal`` at an address. Thread-safe. Connects with the first use; also in
    a process that was forked since."""

    far: Final = True

    def __init__(self, address: str) -> None:
        self._address: Final = address
        self._lock = threading.Lock()
        self._sharing: SharedTables | None = None
        self._process = os.getpid()
        self._closed = False

    @property
    def sharing(self) -> SharedTables:
        """Raises ``StorageError``, also after ``close``; ``FormatError``."""
        from entidb.storage.postgres.sharing import SharedTables

        with self._lock:
            if self._closed:
                raise StorageError("this server is closed")
            if self._sharing is None or self._process != os.getpid():
                self._process = os.getpid()
                self._sharing = SharedTables(self._address)
            return self._sharing

    def rest(self) -> None:
        """Hold no connection until the next use."""
        with self._lock:
            sharing, self._sharing = self._sharing, None
        if sharing is not None and self._process == os.getpid():
            sharing.close()

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self.rest()

    # ------------------------------------------------------------ records

    def where(self, name: str) -> str:
        return f"the record {name} in {self.sharing.where}"

    def read(self, name: str) -> bytes | None:
        return self.sharing.read(name)

    def mark(self, name: str) -> Mark:
        return (self.sharing.revision(name),)

    def change(self, name: str, make: Make, wrote: Wrote) -> None:
        self.sharing.change(name, make, lambda revision: wrote((revision,)))

    def rename(self, name: str, to: str | None) -> None:
        self.sharing.rename(name, to)

    def has_database(self, db_id: str) -> bool:
        return is_db_id(db_id) and self.sharing.has_store(db_id)

    # ------------------------------------------------------------ the audit log

    def check(self) -> None:
        self.sharing.check()

    def append(self, lines: list[bytes]) -> None:
        self.sharing.append(lines)

    def newest(self) -> Iterator[bytes]:
        return self.sharing.newest()


__all__ = ["LINES_KEPT", "NodeRecords"]
