"""Where the databases of a server are: the seam between serving them and what they lie in.

A place lists databases, opens them, gives them other names and puts them aside. What is served is
the same whatever the place is. There are three: memory (here), a directory on a disk
(``directory``), and a PostgreSQL database that several nodes serve (``postgres``).

Not here: which databases are open (``stores``), and who may change them (``admin``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from msgspec import Struct

from entidb.db import Database, Role
from entidb.errors import (
    ConfigError,
    InvalidNameError,
    PermissionDeniedError,
    ProtocolError,
    ServerError,
)
from entidb.server.config import check_db_id
from entidb.server.news import MarkSource

#: For how long a database that was deleted can be taken back.
ASIDE_MS: Final = 24 * 3600 * 1000


class Aside(Struct):
    """A database that was deleted, or that a backup took the place of; gone for good at
    ``until_ms``."""

    id: str
    name: str
    deleted_ms: int
    until_ms: int


class ServerPlace(Protocol):
    """All methods may be called from any thread, and not from the event loop where ``waits``.
    A change is made on a database that is closed in this process (``stores.closed``); they raise
    ``StorageError`` or ``OSError`` where the place fails."""

    @property
    def where(self) -> str:
        """For messages and logs; never with a password."""
        ...

    @property
    def root(self) -> Path | None:
        """The directory, where it is one."""
        ...

    @property
    def waits(self) -> bool:
        """Whether every look at a database may wait for a network. Then nothing of it is done on
        the event loop, and several threads read."""
        ...

    def begin(self) -> None:
        """Called by who is going to serve; also in a process that was forked since this was
        made, which takes its own share. Raises ``DatabaseLockedError``, ``StorageError``."""
        ...

    def open(self, db_id: str, create: bool) -> Database:
        """Open a database, and make it if it is not there and ``create``; else
        ``PermissionDeniedError``, code ``unknown_database``."""
        ...

    def names(self) -> list[str]:
        """The databases, in order."""
        ...

    def holds(self, db_id: str) -> bool:
        """Whether there is this database."""
        ...

    def sizes(self, only: str | None = None) -> dict[str, int]:
        """About how many bytes each database takes, or the one that is named."""
        ...

    def rename(self, db_id: str, to: str) -> None:
        """Durable when it returns. Raises ``ConfigError`` (exists), ``PermissionDeniedError``
        (unknown_database)."""
        ...

    def put_aside(self, db_id: str, now: int) -> Aside:
        """Put a database out of the way; ``now`` in milliseconds. Raises as ``rename``."""
        ...

    def aside(self) -> list[Aside]:
        """What is put aside, in no order."""
        ...

    def open_aside(self, aside: Aside) -> Database:
        """Open it to read in it."""
        ...

    def take_back(self, aside: Aside) -> None:
        """Give it its name again. Raises as ``rename``."""
        ...

    def remove(self, aside: Aside) -> None:
        """Remove it for good."""
        ...

    def clear_left(self) -> None:
        """Remove what operations have left whose process was killed, unless another process is
        at it; a database that one of them had put aside, for what was to take its place, is taken
        back. Called at the start, and now and then."""
        ...

    def news(self) -> MarkSource | None:
        """What tells of commits of other nodes, for one thread; None where there are none, or
        where the processes hear of them by another way (``workers``)."""
        ...

    def check(self) -> str | None:
        """Why it cannot be written to at the moment, in one word for ``/readyz``: ``storage``."""
        ...

    def close(self) -> None:
        """Idempotent; after the databases."""
        ...


@runtime_checkable
class TakesIn(Protocol):
    """A place into which a backup comes record by record."""

    def taken_in(
        self, db_id: str, backup: Path, at: Callable[[int, int], None]
    ) -> AbstractContextManager[Callable[[int], Aside | None]]:
        """Copy the backup of a database in files here, under a name that no database has, and
        compare. What is given takes the place of the database ``db_id``, which is put aside in the
        same commit: it is called with the time in milliseconds, on a closed database. ``at`` is
        called with the records that are copied, and how many there are. Raises as
        ``copy_database``."""
        ...


class MemoryPlace:
    """Databases that are gone with the server, and of which nothing is known when they are
    closed."""

    where: Final = "memory"
    root: Final = None
    waits: Final = False

    def __init__(self, **options: Any) -> None:
        self._options = options

    def begin(self) -> None:
        return None

    def open(self, db_id: str, create: bool) -> Database:
        if not create:
            raise unknown_database()
        return Database.in_memory(role=Role.SERVER, **self._options)

    def names(self) -> list[str]:
        return []

    def holds(self, db_id: str) -> bool:
        raise _in_memory()

    def sizes(self, only: str | None = None) -> dict[str, int]:
        return {}

    def rename(self, db_id: str, to: str) -> None:
        raise _in_memory()

    def put_aside(self, db_id: str, now: int) -> Aside:
        raise _in_memory()

    def aside(self) -> list[Aside]:
        return []

    def open_aside(self, aside: Aside) -> Database:
        raise _in_memory()

    def take_back(self, aside: Aside) -> None:
        raise _in_memory()

    def remove(self, aside: Aside) -> None:
        raise _in_memory()

    def clear_left(self) -> None:
        return None

    def news(self) -> MarkSource | None:
        return None

    def check(self) -> str | None:
        return None

    def close(self) -> None:
        return None


def _in_memory() -> ServerError:
    return ServerError("this server keeps its databases in memory", code="not_on_disk")


def check_asked(db_id: str) -> None:
    """Raises ``ProtocolError`` for a name that no database can have."""
    try:
        check_db_id(db_id)
    except InvalidNameError as error:
        # Not "unknown", which sends people to look for a database: there can be none.
        raise ProtocolError(str(error)) from error


def unknown_database() -> PermissionDeniedError:
    return PermissionDeniedError("there is no such database", code="unknown_database")


def exists(db_id: str) -> ConfigError:
    return ConfigError(f"there is a database {db_id!r} already", code="exists")


__all__ = [
    "ASIDE_MS",
    "Aside",
    "MemoryPlace",
    "ServerPlace",
    "check_asked",
    "exists",
    "unknown_database",
]
