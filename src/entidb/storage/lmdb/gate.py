"""The gate: a level that every reader looks at (one attribute) before it calls LMDB.

Python's LMDB makes aborting a write transaction wait until no thread is inside an LMDB call, and
growing the map, or closing, takes the ground from under every open snapshot. So the few things that
need readers out of the way move the gate first.

Not here: what is done behind a closed gate (``store``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

from entidb.errors import DatabaseClosedError, DatabaseForkedError, StorageError
from entidb.storage.lmdb.left import DATA
from entidb.storage.lmdb.resident import shed
from entidb.storage.turns import Turns

# Levels of the gate. Readers compare with these, so their order matters.
OPEN: Final = 0
DRAINING: Final = 1  # no new snapshots; open ones go on
FROZEN: Final = 2  # no call into LMDB
CLOSED: Final = 3
FORKED: Final = 4
#: Seconds a reader waits at the gate; longer than any drain, so that a drain ends first.
GATE_SECONDS: Final = 60.0
#: Seconds between two looks at the gate, or at who is still before it.
_GATE_LOOK_SECONDS: Final = 0.001
#: Rows read or written between two looks at how much of the file is resident.
SHED_EVERY_ROWS: Final = 20_000


class Reader(Struct, eq=False):
    """What the store knows of an open snapshot. ``busy`` is set around every call into LMDB:
    closing an environment under a thread that is inside one is a segmentation fault. It is taken
    back in an ``except`` clause and not in ``finally``, which an interrupt can keep from starting:
    a reader that stayed busy would be waited for without end."""

    busy: bool = False
    txn: Any = None


class Gate:
    """What a store and its snapshots share: who is inside LMDB, and who may enter it.

    Readers look at ``level`` before each call into LMDB; only the thread that has the turn moves
    it."""

    def __init__(self, path: str, drain_seconds: float) -> None:
        self.path = path
        self.turns = Turns()
        self.level = OPEN
        #: Open snapshots. Adding to a set and discarding from it is atomic; a lock would cost
        #: more than LMDB does.
        self.readers: set[Reader] = set()
        #: Rows read and written since it was looked how much of the file is resident.
        self.touched = 0
        #: Whether something came up that may come from a damaged page: then the next one looks.
        self.doubtful = False
        self._data_path = os.path.join(path, DATA)
        self._drain_seconds = drain_seconds
        #: Transactions of snapshots that were closed while LMDB was out of bounds.
        self._orphans: list[Any] = []

    def wait_for(self, level: int = DRAINING) -> None:
        """Wait until the gate is at ``level`` or lower; raise if it never will be."""
        deadline = time.monotonic() + GATE_SECONDS
        while self.level > level:
            if self.level == FORKED:
                raise DatabaseForkedError(
                    f"{self.path} was opened before this process was forked; open databases "
                    "after the fork, or start processes with the spawn method"
                )
            if self.level == CLOSED:
                raise DatabaseClosedError(f"{self.path} is closed; open it again")
            if self.turns.idle():
                # No thread holds it: an interrupt kept them from opening it.
                with self.turns.hold(0) as ours:
                    if ours:
                        self.find_open()
                continue
            time.sleep(_GATE_LOOK_SECONDS)
            if time.monotonic() > deadline:
                raise StorageError(f"{self.path} was busy for {GATE_SECONDS:g} s; try again")

    @contextlib.contextmanager
    def at(self, level: int) -> Iterator[None]:
        """Hold the gate at ``level``; only the thread that has the turn does this."""
        try:
            self.level = level
            yield
        finally:
            self._open()

    def _open(self) -> None:
        if self.level < CLOSED:
            self.level = OPEN
        while self._orphans:
            self._orphans.pop().abort()

    def find_open(self) -> None:
        """At the beginning of a turn: what the one before was kept from opening is opened; raise
        if the store is closed."""
        if self.level < CLOSED:
            self._open()
        else:
            self.wait_for()

    def drain(self) -> bool:
        """Wait for open snapshots to close, at most ``drain_seconds``; whether they have."""
        deadline = time.monotonic() + self._drain_seconds
        while self.readers:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_GATE_LOOK_SECONDS)
        return True

    def wait_until_idle(self) -> None:
        """With the gate frozen: wait until no thread is inside LMDB. Each leaves at the end of
        its call, so this takes as long as one page of a scan; a copy under way ends early."""
        while any(reader.busy for reader in list(self.readers)):
            time.sleep(0.0001)

    def check_wanted(self) -> None:
        """For who stays inside LMDB for long: raises where all have to leave. What a copy holds up
        is every commit and every reader, after one commit that failed."""
        if self.level >= FROZEN:
            raise StorageError(
                f"the copy of {self.path} was stopped: the database was closed meanwhile, or had "
                "to be opened again after a commit that failed; make it again"
            )

    def shed(self) -> None:
        """Give memory back that holds pages of the file. The map cannot move meanwhile: a reader
        of the caller is open and busy."""
        self.touched = 0
        shed(self._data_path)

    def end(self, reader: Reader) -> None:
        """May be repeated, and has to be when it was interrupted."""
        # In a forked child the transaction is the parent's, and is kept alive for good.
        if self.level == FORKED:
            return
        reader.busy = True
        if self.touched > SHED_EVERY_ROWS and self.level <= DRAINING:
            self.shed()
        txn = reader.txn
        if txn is not None:
            if self.level > DRAINING:
                # The thread that froze the gate ends it; waiting here could be waiting for this
                # very thread, because the collector closes forgotten snapshots wherever it runs.
                self._orphans.append(txn)
            else:
                txn.abort()
            reader.txn = None
        reader.busy = False
        self.readers.discard(reader)
