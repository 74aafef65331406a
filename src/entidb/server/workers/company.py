"""The processes that are one server, as each of them sees the others: of one parent on one machine,
with a folder in the data directory; or nodes of several machines (``nodes.company``).

Not here: what they tell each other, and what only one of them does (``team``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

from entidb.errors import ServerBusyError
from entidb.server.admin.office import NodeRow, row_here
from entidb.server.config import directory_name
from entidb.server.workers.seats import SEAT, SOCKET, Seats
from entidb.server.workers.talk import Answers, Ear, Leases, ask, asking
from entidb.storage.locks import HeldError

#: An answer that is not given because its process is gone: nothing was asked.
NOT_THERE: Final = (FileNotFoundError, ConnectionRefusedError)


class Company(Protocol):
    """Thread-safe. What may wait for others raises ``ServerBusyError`` where they cannot be
    found at the moment."""

    @property
    def name(self) -> str:
        """Of this process, among the others."""
        ...

    def neighbours(self) -> list[str]:
        """Those of the others that one address is shared with: a request reaches any of them, so
        that whoever is asked answers for all."""
        ...

    def listen(self, answers: Answers, leases: Leases, each_look: Callable[[], None]) -> None:
        """Answer what others ask, from now on. ``each_look`` is called twice a second where what
        they have decided is asked over a network."""
        ...

    def deafen(self) -> None:
        """Answer nothing any more. Idempotent."""
        ...

    def others(self) -> list[str]: ...

    def count(self) -> int:
        """How many there are with this one, as was known a moment ago: does not wait."""
        ...

    def rows(self, now_ms: int) -> list[NodeRow]:
        """All of them, in the order in which they began."""
        ...

    def ask(self, name: str, what: str, given: Any, timeout_s: float, kind: Any = Any) -> Any:
        """The answer of another one. Raises one of ``NOT_THERE`` if it is gone, another
        ``OSError`` if it does not answer in time, ``ServerBusyError`` with what it says
        instead."""
        ...

    def lease(
        self, name: str, what: str, given: Any, timeout_s: float
    ) -> AbstractContextManager[object]:
        """As ``ask``; what was asked for holds until the end of the block."""
        ...

    def take_chair(self) -> bool:
        """Have the chair, if nobody has it; whether this process has it."""
        ...

    def give_chair(self) -> None: ...

    def chairman(self) -> str | None:
        """The name of the process that has the chair; None if nobody has."""
        ...

    def keeping_closed(self, db_id: str) -> AbstractContextManager[None]:
        """In the block no process opens the database. Raises ``ServerBusyError`` if it is kept
        closed already."""
        ...

    def is_kept_closed(self, db_id: str) -> bool: ...

    def is_first(self, db_id: str, every_s: float) -> bool:
        """Whether no process has asked this for the database within ``every_s``."""
        ...

    def clear_up(self) -> None:
        """Remove what processes have left that are gone. For the one in the chair."""
        ...

    def leave(self) -> None:
        """Idempotent."""
        ...


class FolderCompany:
    """The processes of one family."""

    def __init__(self, root: str) -> None:
        """Raises ``OSError``."""
        self.seats: Final = Seats(root)
        self.name: Final = self.seats.name
        self._ear: Ear | None = None

    def listen(self, answers: Answers, leases: Leases, each_look: Callable[[], None]) -> None:
        self._ear = Ear(self.seats.folder, self.name + SOCKET, answers, leases)

    def deafen(self) -> None:
        ear, self._ear = self._ear, None
        if ear is not None:
            ear.close()

    def neighbours(self) -> list[str]:
        return self.others()

    def others(self) -> list[str]:
        return self.seats.others()

    def count(self) -> int:
        return 1 + len(self.seats.others())

    def rows(self, now_ms: int) -> list[NodeRow]:
        chairman = self.seats.chairman()
        found = []
        for name in (self.name, *self.seats.others()):
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                began = os.stat(self.seats.path(name, SEAT)).st_ctime_ns // 1_000_000
                found.append(row_here(name, began, now_ms, on_duty=name == chairman))
        return sorted(found, key=lambda each: (each.began_ms, each.process))

    def ask(self, name: str, what: str, given: Any, timeout_s: float, kind: Any = Any) -> Any:
        return ask(self.seats.folder, name + SOCKET, what, given, timeout_s, kind)

    def lease(
        self, name: str, what: str, given: Any, timeout_s: float
    ) -> AbstractContextManager[object]:
        return asking(self.seats.folder, name + SOCKET, what, given, timeout_s)

    def take_chair(self) -> bool:
        return self.seats.take_chair()

    def give_chair(self) -> None:
        self.seats.give_chair()

    def chairman(self) -> str | None:
        return self.seats.chairman()

    @contextmanager
    def keeping_closed(self, db_id: str) -> Iterator[None]:
        directory = directory_name(db_id)
        try:
            lock = self.seats.keep_closed(directory)
        except HeldError as error:
            raise ServerBusyError(f"database {db_id!r} is being looked after") from error
        try:
            yield
        finally:
            self.seats.let_open(directory, lock)

    def is_kept_closed(self, db_id: str) -> bool:
        return self.seats.is_kept_closed(directory_name(db_id))

    def is_first(self, db_id: str, every_s: float) -> bool:
        return self.seats.is_first(directory_name(db_id), every_s)

    def clear_up(self) -> None:
        for name in self.seats.gone():
            self.seats.clear(name)

    def leave(self) -> None:
        self.deafen()
        self.seats.leave()


__all__ = ["NOT_THERE", "Company", "FolderCompany"]
