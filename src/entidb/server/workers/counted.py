"""What the processes of one server have counted, together: those that live are asked, and what the
others have left counts too, so that no counter goes back when a process ends.

Each process leaves its counts beside its seat now and then, and at its end. The process that has
the chair adds up those of the dead in one file, which also says whose they are.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

from msgspec import Struct, ValidationError, json

from entidb.server.metrics import Metrics, Series, lasting, summed
from entidb.server.workers.seats import COUNTS, SOCKET, Seats
from entidb.server.workers.talk import ask

_PAST: Final = "past"
#: Seconds that a process gets to say what it has counted.
_ASK_S: Final = 1.0
#: Names of dead processes that are remembered, so that none is added up twice.
_NAMES_MAX: Final = 1000


class Past(Struct):
    """What ``names`` have counted together, all of them dead."""

    names: list[str] = []
    series: list[Series] = []


class Counted:
    """Used from any thread."""

    def __init__(self, seats: Seats, metrics: Metrics) -> None:
        self._seats = seats
        self._metrics = metrics
        self._left: bytes | None = None

    def leave(self) -> None:
        """Leave what this process has counted for the others."""
        counts = json.encode(self._metrics.series())
        if counts != self._left:
            self._write(self._seats.path(self._seats.name, COUNTS), counts)
            self._left = counts

    def others(self) -> list[list[Series]]:
        """What all but this process have counted."""
        living, found = self._seats.others(), []
        silent = self._seats.gone()
        for name in living:
            try:
                found.append(
                    ask(self._seats.folder, name + SOCKET, "counts", None, _ASK_S, list[Series])
                )
            except (OSError, ValueError):
                silent.append(name)
        left = {name: self._read(name) for name in silent}
        # After the others: what was added up meanwhile is in there, and is not counted twice.
        past = self._past()
        found += [lasting(each) for name, each in left.items() if name not in past.names]
        return [*found, past.series]

    def add_up(self) -> None:
        """Add up what the dead have left, and remove it; done by the one who has the chair."""
        gone = self._seats.gone()
        if not gone:
            return
        past = self._past()
        fresh = [name for name in gone if name not in past.names]
        series = summed([past.series, *(lasting(self._read(name)) for name in fresh)])
        names = [*past.names, *fresh][-_NAMES_MAX:]
        self._write(self._seats.path(_PAST, ""), json.encode(Past(names, series)))
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
        with contextlib.suppress(FileNotFoundError):
            with open(temporary, "wb") as file:
                file.write(content)
            os.replace(temporary, path)


__all__ = ["Counted"]
