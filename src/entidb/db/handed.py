"""Transactions that are decided and wait to be stored, and how they come into that line without
their threads.

A transaction that has read nothing can be decided before it is its turn. Its thread stands in line
with an errand: whoever ends the turn before does it, which puts the transaction behind those that
wait to be stored. So its thread is woken once, when it is durable, and not for its turn as well.

An errand may be done twice, by one who was interrupted in it. A thread that gives up may find that
it was done meanwhile: the transaction is stored or withdrawn, whichever comes first.

Not here: storing (``sharing``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, Final

from entidb.db.jobs import GROUP_MAX, Job
from entidb.db.local import Writes
from entidb.storage.turns import Turn, ring

_STORED: Final = "stored"
_WITHDRAWN: Final = "withdrawn"


class Shared(Job[None]):
    """A transaction that is decided and waits to be stored. ``failures``: how many there had been
    when it read what was on its way; None if it has read nothing of that."""

    def __init__(self, writes: Writes, transaction_id: bytes, failures: int | None) -> None:
        self.bell = threading.Lock()
        self.bell.acquire()
        super().__init__(_nothing, partial(ring, self.bell), transaction_id)
        self.writes = writes
        self.failures = failures
        #: Whether it was handed over without its turn: then what is unique was not looked at.
        self.handed = False
        #: Set before it is taken off the line.
        self.over = False
        #: The one to wake next: one at a time, because they all need the interpreter.
        self.next: Shared | None = None
        #: What becomes of it; the first entry counts.
        self._fate: dict[int, str] = {}

    def is_stored(self) -> bool:
        """Asked by the thread that stores: whether it is, not withdrawn. From now on it is."""
        return self._fate.setdefault(0, _STORED) is _STORED

    def withdraw(self) -> bool:
        """Whether it never will be stored."""
        return self._fate.setdefault(0, _WITHDRAWN) is _WITHDRAWN

    def tell_next(self) -> None:
        """Its thread does this when it is awake. May be repeated."""
        if self.next is not None:
            self.next.told()


def tell(group: Sequence[Shared]) -> None:
    """Wake the threads of those that are over: here the first, and each the one behind it. Who has
    given up wakes nobody."""
    waiting = [job for job in group if job.is_stored()]
    for one, after in pairwise(waiting):
        one.next = after
    for one in waiting[:1]:
        one.told()


def do_errands(line: list[Turn]) -> bool:
    """For who has the first turn in ``line``: the errands of those that follow, as far as they have
    one; whether there was any."""
    done = False
    for _ in range(GROUP_MAX):
        if len(line) < 2 or (errand := (turn := line[1]).errand) is None:
            break
        errand()
        done = turn.served = True
        with suppress(ValueError):  # it has given up
            line.remove(turn)
    return done


def _nothing(staging: Any) -> None:
    return


__all__ = ["Shared", "do_errands", "tell"]
