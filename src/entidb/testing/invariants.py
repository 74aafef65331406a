"""What must hold, by name, and how a checker says that it holds or that it does not.

Not here: the checkers themselves (``checkers`` for the server's side, ``watch`` for a device's).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, NoReturn

from entidb.db.records import payload_of

#: Every invariant: its name, and what it says.
INVARIANTS: Final[dict[str, str]] = {
    "NO-SILENT-LOSS": "a committed transaction is pending, on the server, or discarded, and what "
    "is decided against is kept",
    "LOCAL-DURABLE": "a device restarts with every commit it has acknowledged",
    "SERVER-DURABLE": "what an answer calls accepted is on the server's disk",
    "WHOLE": "no reader ever sees part of a transaction",
    "PREFIX": "a device's bases are the server's state at its cursor, byte for byte",
    "EXACTLY-ONCE": "a transaction id is in a history at most once",
    "NO-LOST-UPDATE": "an accepted operation was made on the version it replaces",
    "NO-FALSE-CONFLICT": "a conflict means that another transaction came between",
    "ORDER": "cursors do not go back, pages are exactly what is next, versions are used once",
    "FRESH": "no node answers from an older state than there was when it was asked",
    "HEARD": "a node that listens hears of every commit of the others",
    "LIVE": "a device that is told of news is not behind for long, and a hint starts one sync and "
    "changes nothing",
    "READ-YOUR-WRITES": "the view holds the device's own pending writes",
    "SURFACED-ONCE": "conflicts, refusals and withdrawals are reported once and listed",
    "RESET-KEEPS-OUTBOX": "a reset loses no pending transaction",
    "RESET-ENDS": "a device that has reset is above the floor",
    "NO-RESURRECTION": "what was deleted stays deleted",
    "CONVERGE": "quiet devices and their server hold the same bytes, and verify is clean",
    "DIGESTS": "quiet devices and their server agree by digest, what is damaged is found, and its "
    "repair loses nothing",
    "INDEXED": "each index is in step with its entities, and gives what a loop would",
    "UNIQUE": "no two entities of a server share what is unique; refusals for it have a reason",
    "QUOTA": "no push makes a database larger than it may be, refusals for it have a reason, and "
    "who was let in is never one too many",
    "LIVENESS": "without faults everything drains in a bounded number of requests",
    "SETTLE-FIRST": "what is sent is in flight on the device's disk before its first byte leaves",
    "PINNED": "the floor does not pass an image that a device may be on its way with",
    "PULL-FIRST": "a push beside a pull is decided if the pull brings nothing, and only then",
    "NO-POISON": "a transaction that always fails stops no other",
    "TAKEN": "what was done with an old program is pushed, and never refused for its age",
    "TENANT": "no byte of one database leaves in an answer for another",
    "LOCKED": "who is locked out is let in nowhere, and a frozen database takes no push",
    "ATTRIBUTED": "what is accepted was committed by who the token is for, who holds the device",
    "NO-EFFECT": "a request answered with an error changed nothing durable",
    "CLOCK": "nothing is later than the server's clock, nor earlier than what its writer had seen",
    "SAME-SEED": "one seed gives one trace",
}

#: Value of this key in a payload asks the validate hook to refuse, or to raise.
POISON: Final = b"poison"
GROUP_COLLECTION: Final = "pairs"
GROUP_SIZE: Final = 3


class Violation(BaseException):
    """An invariant does not hold. Not an ``Exception``: no code under test may catch it."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
        self.message = message


class Checks:
    """Counts what was checked, and raises when something does not hold."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def passed(self, invariant: str, times: int = 1) -> None:
        self.counts[invariant] += times

    def fail(self, invariant: str, message: str) -> NoReturn:
        assert invariant in INVARIANTS, invariant
        raise Violation(invariant, message)

    def that(self, holds: bool, invariant: str, message: str) -> None:
        self.counts[invariant] += 1
        if not holds:
            self.fail(invariant, message)


def group_is_whole(records: Mapping[bytes, bytes], prefix: bytes, entity_id: bytes) -> bool:
    """Every transaction on a group writes all its members with the same bytes, so that readers
    who see them differ have seen half of one."""
    seen = set()
    for member in range(GROUP_SIZE):
        raw = records.get(prefix + entity_id[:15] + bytes((member,)))
        seen.add(None if raw is None else payload_of(raw))
    return len(seen) == 1
