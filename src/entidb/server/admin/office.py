"""What all of administration shares: the server, the audit log, the tasks. One for each server.

What has to be done now and then is done with the server's own housekeeping.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol, TypeVar

from msgspec import Struct

from entidb.db import Database
from entidb.db.images import ImageRow
from entidb.db.writer import Writer
from entidb.errors import EntiDBError, PermissionDeniedError, ServerError, StorageError
from entidb.protocol import ErrorResponse
from entidb.server.admin.audit import AuditLog, Journal
from entidb.server.admin.callers import Caller
from entidb.server.admin.summary import Summaries
from entidb.server.admin.tasks import Tasks
from entidb.server.auth import Authenticator, Grants
from entidb.server.chores import do_each
from entidb.server.config import ServerConfig, check_db_id
from entidb.server.control import Control
from entidb.server.place import ServerPlace
from entidb.server.pulse import Pulse
from entidb.server.registry import Registry
from entidb.server.segments.files import KeptFiles, KeptImage
from entidb.types import Clock
from entidb.version import VERSION

logger = logging.getLogger("entidb.server")


class OpenStore(Protocol):
    """A database that is open."""

    @property
    def database(self) -> Database: ...
    def check(self) -> None: ...


S_co = TypeVar("S_co", bound=OpenStore, covariant=True)


class Databases(Protocol[S_co]):
    """What is needed of ``stores``."""

    def opened(self) -> dict[str, float]: ...
    def looking(self, db_id: str) -> AbstractContextManager[S_co | None]: ...
    def using(self, db_id: str, *, create: bool) -> AbstractContextManager[S_co]: ...
    def lasting(self, db_id: str) -> AbstractContextManager[S_co]: ...
    def make(self, db_id: str) -> None: ...
    def closed(self, db_id: str, wait_s: float) -> AbstractContextManager[None]: ...
    @property
    def elsewhere(self) -> Callable[[str, float], AbstractContextManager[None]]: ...


class AdminFront(Protocol):
    """What is needed of ``front``."""

    @property
    def control(self) -> Control: ...
    def authenticate(self, token: str | None) -> Grants: ...
    def explain(self, error: Exception, rid: str) -> ErrorResponse: ...


class DroppedImages(Protocol):
    """Copies of what is in a database, for the first sync of devices."""

    def drop(self, db_id: str) -> None: ...
    def resting(self, db_id: str) -> AbstractContextManager[None]: ...
    def renamed(self, db_id: str, to: str) -> None: ...
    def left(self, db_id: str) -> list[str]: ...
    def files(self, db_id: str) -> KeptFiles: ...
    def is_true(self, view: Writer, row: ImageRow, image: KeptImage) -> bool: ...


class Served(Protocol):
    """What is needed of a ``SyncServer``, which knows nothing of administration."""

    office: object

    @property
    def config(self) -> ServerConfig: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def journal(self) -> str | os.PathLike[str] | Journal | None: ...
    @property
    def place(self) -> ServerPlace: ...
    @property
    def stores(self) -> Databases[OpenStore]: ...
    @property
    def front(self) -> AdminFront: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def authenticator(self) -> Authenticator: ...
    @property
    def images(self) -> DroppedImages: ...
    @property
    def chores(self) -> list[Callable[[], None]]: ...
    @property
    def at_end(self) -> list[Callable[[], None]]: ...
    def reload(self) -> str: ...


class NodeRow(Struct, omit_defaults=True):
    """A process of the server. Times are milliseconds since 1970; ``seen_ms`` is when it last said
    that it lives, ``address`` where it serves, if it has said so."""

    name: str
    host: str
    process: int
    version: str
    began_ms: int
    seen_ms: int
    on_duty: bool = False
    address: str = ""


def row_here(name: str, began_ms: int, seen_ms: int, *, on_duty: bool = True) -> NodeRow:
    """Of a process of this machine, whose name begins with its number."""
    process = int(name.partition("-")[0])
    return NodeRow(name, socket.gethostname(), process, VERSION, began_ms, seen_ms, on_duty)


class OtherWorkers(Protocol):
    """The other processes of this server."""

    def on_duty(self) -> bool:
        """Whether this process does what only one of them may do."""
        ...

    def forward(
        self, caller: Caller, method: str, path: str, query: Mapping[str, str], body: bytes
    ) -> tuple[int, bytes] | None:
        """The answer of the process that is on duty; None: that is this one. Raises
        ``ServerBusyError``."""
        ...

    def gather(self) -> None:
        """Have them write down what they have noted of devices and refused logins."""
        ...

    def drop_images(self) -> None:
        """Have them remove what was dropped of images (``DroppedImages``) from their disks."""
        ...

    def opened(self) -> dict[str, float]:
        """The databases that they have open, with the monotonic time of the last use."""
        ...

    def reasons(self) -> set[str]:
        """Why they should not be given work."""
        ...

    def reload(self) -> None:
        """Have them read the keys of tokens again."""
        ...

    def count(self) -> int | None:
        """How many there are with this one, without waiting; None: this server has one
        process."""
        ...

    def rows(self) -> list[NodeRow]:
        """All of them, this one too; empty: this server has one process. Raises
        ``ServerBusyError``."""
        ...


class NoOthers:
    """The ``OtherWorkers`` of a server that is one process."""

    def on_duty(self) -> bool:
        return True

    def forward(
        self, caller: Caller, method: str, path: str, query: Mapping[str, str], body: bytes
    ) -> tuple[int, bytes] | None:
        return None

    def gather(self) -> None:
        return None

    def drop_images(self) -> None:
        return None

    def opened(self) -> dict[str, float]:
        return {}

    def reasons(self) -> set[str]:
        return set()

    def reload(self) -> None:
        return None

    def count(self) -> int | None:
        return None

    def rows(self) -> list[NodeRow]:
        return []


class Office:
    """Opened by ``opening``. Thread-safe."""

    def __init__(self, server: Served) -> None:
        self.server: Final = server
        self.clock: Final = server.clock
        self.place: Final = server.place
        self.stores: Final[Databases[OpenStore]] = server.stores
        self.control: Final = server.front.control
        self.registry: Final = server.registry
        self.audit: Final = AuditLog(server.journal, server.clock)
        self.tasks: Final = Tasks(server.clock)
        self.others: OtherWorkers = NoOthers()
        #: Databases whose backups are too old, and when the oldest of the newest was made, in
        #: milliseconds since 1970; as of the last housekeeping.
        self.late_backups: list[str] = []
        self.oldest_backup_ms: int | None = None
        self.opened_ms: Final = server.clock.now_ms()
        self.summaries: Final = Summaries()
        #: What the server did lately, where it shows a console.
        self.pulse: Pulse | None = None
        #: One change of databases at a time, such as a rename and a delete of the same.
        self.changing: Final = threading.Lock()
        #: Called with each housekeeping, by rooms that have something to do then.
        self.chores: Final[list[Callable[[], None]]] = [self.audit.flush]
        self.at_end: Final[list[Callable[[], None]]] = []
        server.chores.append(self._do_chores)
        server.at_end.append(self._close)

    @property
    def on_files(self) -> bool:
        """Whether the databases are in files."""
        return self.place.root is not None

    @property
    def root(self) -> Path:
        """The directory of the databases. Raises ``ServerError`` (not_on_disk) where they are not
        in files."""
        if self.place.root is None:
            raise ServerError(
                f"this server keeps its databases in {self.place.where}, and this is done with "
                "files",
                code="not_on_disk",
            )
        return self.place.root

    def nodes(self) -> list[NodeRow]:
        """The processes of this server, in the order in which they began."""
        now_ms = self.clock.now_ms()
        return self.others.rows() or [row_here(str(os.getpid()), self.opened_ms, now_ms)]

    def opened(self) -> dict[str, float]:
        """The databases that are open in any process of this server, with the monotonic time of
        their last use."""
        found = self.others.opened()
        for name, used_at in self.stores.opened().items():
            found[name] = max(used_at, found.get(name, used_at))
        return found

    def require(self, db_id: str) -> None:
        """Raises ``PermissionDeniedError`` (unknown_database) for a database that is not there,
        ``InvalidNameError``, and ``ServerError`` (not_on_disk) for a server in memory."""
        check_db_id(db_id)
        if not self.place.holds(db_id):
            raise unknown(db_id)

    def change(
        self, caller: Caller, action: str, db_id: str | None = None, **details: str
    ) -> AbstractContextManager[None]:
        """A change inside the block: it is not made if it cannot be written down, and what came
        of it is written down. Raises ``StorageError`` for one that was made, and could not be
        written down any more; it says so."""
        return self._change("done", caller, action, db_id, details)

    def begin(
        self, caller: Caller, action: str, db_id: str, **details: str
    ) -> AbstractContextManager[None]:
        """As ``change``, for a task that begins inside the block: what becomes of it, it says
        itself."""
        return self._change("begun", caller, action, db_id, details)

    @contextmanager
    def _change(
        self, what: str, caller: Caller, action: str, db_id: str | None, details: dict[str, str]
    ) -> Iterator[None]:
        self.audit.check()
        try:
            yield
        except BaseException as error:
            result = error.code if isinstance(error, EntiDBError) else "internal_error"
            try:
                self.audit.write(
                    caller.who, caller.where, action, database=db_id, result=result, **details
                )
            except StorageError as unwritten:
                logger.error("%s of %s, which failed: %s", action, db_id or "all", unwritten)
            raise
        self._write_done(what, caller, action, db_id, details)

    def write_done(self, caller: Caller, action: str, db_id: str | None, **details: str) -> None:
        """Write down what was done. Raises ``StorageError`` that says that it was."""
        self._write_done("done", caller, action, db_id, details)

    def _write_done(
        self, what: str, caller: Caller, action: str, db_id: str | None, details: dict[str, str]
    ) -> None:
        try:
            self.audit.write(
                caller.who, caller.where, action, database=db_id, result="done", **details
            )
        except StorageError as error:
            said = f"this was {what} ({action}), and cannot be written down: {error}"
            raise type(error)(said, code=error.code) from error

    def _do_chores(self) -> None:
        do_each(self.chores)

    def _close(self) -> None:
        for end in self.at_end:
            end()
        self.tasks.close()
        self.audit.flush()


def unknown(db_id: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"there is no database {db_id!r} on this server", code="unknown_database"
    )
