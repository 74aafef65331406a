"""What the processes of one server have counted, together: those that live are asked, and what the
others have left counts too, so that no counter goes back when a process ends.

Each process leaves its counts beside its seat now and then, at its end, and before it tells them:
what somebody has seen is not gone with whoever counted it. One process adds up those of the dead
in one file, which also says whose they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Final

from msgspec import Struct, ValidationError, json

from entidb.errors import ServerBusyError
from entidb.server.metrics import Metrics, Series, lasting, summed
from entidb.server.workers.seats import COUNTS, Seats

logger = logging.getLogger("entidb.server")

_PAST: Final = "past"
#: Names of dead processes that are remembered, so that none is added up twice.
_NAMES_MAX: Final = 1000


class Past(Struct):
    """What ``names`` have counted together, all of them dead."""

    names: list[str] = []
    series: list[Series] = []


class Counted:
    """Used from any thread."""

    def __init__(self, seats: Seats, metrics: Metrics, ask: Callable[[str], list[Series]]) -> None:
        """``ask`` is what another process answers that has told its counts; it raises ``OSError``,
        ``ValueError`` and ``ServerBusyError``."""
        self._seats = seats
        self._metrics = metrics
        self._ask = ask
        #: Held from counting to writing: what is left later is never less.
        self._lock = threading.Lock()
        self._left: bytes | None = None
        self._failed = ""

    def leave(self) -> list[Series]:
        """Leave what this process has counted for the others; what that is."""
        with self._lock:
            series = self._metrics.series()
            counts = json.encode(series)
            if counts != self._left:
                try:
                    self._write(self._seats.path(self._seats.name, COUNTS), counts)
                    self._left, self._failed = counts, ""
                except OSError as error:
                    # A full disk, for one. What was counted is told all the same.
                    if str(error) != self._failed:
                        logger.warning("counters are not kept for other processes: %s", error)
                    self._failed = str(error)
            return series

    def close(self) -> None:
        """Leave for the last time. Idempotent."""
        self.leave()
        self._seats.leave()

    def others(self) -> list[list[Series]]:
        """What all but this process have counted."""
        living, found = self._seats.others(), []
        silent = self._seats.gone()
        for name in living:
            try:
                found.append(self._ask(name))
            except (OSError, ValueError, ServerBusyError):
                silent.append(name)
        left = {name: self._read(name) for name in silent}
        # After the others: what was added up meanwhile is in there, and is not counted twice.
        past = self._past()
        found += [lasting(each) for name, each in left.items() if name not in past.names]
        return [*found, past.series]

    def add_up(self) -> None:
        """Add up what the dead have left, and remove it, if it is this process that does so: the
        one that has the chair among the seats."""
        gone = self._seats.gone() if self._seats.take_chair() else []
        if not gone:
            return
        past = self._past()
        fresh = [name for name in gone if name not in past.names]
        series = summed([past.series, *(lasting(self._read(name)) for name in fresh)])
        names = [*past.names, *fresh][-_NAMES_MAX:]
        try:
            self._write(self._seats.path(_PAST, ""), json.encode(Past(names, series)))
        except OSError:
            return  # they stay as they are, until there is room
        for name in gone:
            self._seats.clear(name)

    def _past(self) -> Past:
        try:
            with open(self._seats.path(_PAST, ""), "rb") as file:
                return json.decode(file.read(), type=Past)
        except (OSError, ValidationError, ValueError):
            return Past()  # nobody has died yet

    def _read(self, name: str) -> list[Series]:
        try:
            with open(self._seats.path(name, COUNTS), "rb") as file:
                return json.decode(file.read(), type=list[Series])
        except (OSError, ValidationError, ValueError):
            return []  # it was killed before it had counted anything, or was added up

    def _write(self, path: str, content: bytes) -> None:
        """Appears whole or not at all; a power cut ends the server, and its counters with it."""
        temporary = f"{path}.{self._seats.name}"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except FileNotFoundError:
            return  # the folder has gone with its server
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


__all__ = ["Counted"]
