"""Who holds a simulated device, and under whom each transaction was committed (R36).

What the device remembers of it is compared with what people did: a ledger says who has committed
what, and the server's side looks into it whenever something is accepted.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Final

from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledValue
from entidb.db.pending import decode_pending
from entidb.db.records import HELD, META_SYNC, READY
from entidb.protocol import PushRequest, PushResponse, Verdict
from entidb.storage.base import Batch
from entidb.testing.invariants import Checks
from entidb.testing.watch.model import sync_state

#: Who there is. Tokens of runs in which nobody changes are of the first.
PEOPLE: Final = ("a device", "ann", "ben")
_OUTBOX: Final = (READY[0], HELD[0])


class Authors:
    """By transaction id, who has committed it: several, where copies of a device have it."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._by: dict[bytes, set[str]] = {}

    def note(self, transaction_id: bytes, who: str) -> None:
        self._by.setdefault(transaction_id, {who})

    def check(self, request: PushRequest, answer: PushResponse, subject: str) -> None:
        """ATTRIBUTED: what the token of ``subject`` has brought in is that subject's."""
        for transaction, result in zip(request.transactions, answer.results, strict=True):
            known = self._by.get(transaction.transaction_id)
            if result.verdict == Verdict.ACCEPTED and known is not None:
                self._checks.that(
                    subject in known,
                    "ATTRIBUTED",
                    f"transaction {transaction.transaction_id.hex()[:8]} of {sorted(known)} was "
                    f"accepted from {subject!r}",
                )

    def check_listed(self, entry: DiscardedTransaction | OverruledValue, name: str) -> None:
        """ATTRIBUTED: what is listed as withdrawn or overruled names who committed it."""
        known = self._by.get(entry.transaction_id)
        if entry.subject is not None and known is not None:
            self._checks.that(
                entry.subject in known,
                "ATTRIBUTED",
                f"{name} lists {entry.transaction_id.hex()[:8]} of {sorted(known)} as "
                f"{entry.subject!r}'s",
            )


class Hands:
    """Of one device, over all of its processes."""

    def __init__(self, checks: Checks, ledger: Authors, name: str, rng: random.Random) -> None:
        self._checks, self._ledger, self._name, self._rng = checks, ledger, name, rng
        self.who = PEOPLE[0]
        #: What the device remembers; what the server has said last; whether somebody signs out.
        self.signed: str | None = None
        self.named: str | None = None
        self.leaving = False

    def on_commit(self, batch: Batch, records: Mapping[bytes, bytes]) -> None:
        """A commit of the device is stored."""
        if META_SYNC in batch:
            signed = sync_state(records).subject
            if signed != self.signed:
                due = self.leaving if signed is None else signed == self.named
                self._checks.that(
                    due,
                    "ATTRIBUTED",
                    f"{self._name} takes {signed!r} for who it is, after {self.signed!r}",
                )
            self.signed = signed
        for key, value in batch.items():
            if key[0] in _OUTBOX and value is not None:
                pending = decode_pending(key, value)
                self._ledger.note(pending.transaction_id, self.signed or self.who)

    def listed(self, entry: DiscardedTransaction | OverruledValue) -> None:
        """The device lists what was withdrawn or overruled."""
        self._ledger.check_listed(entry, self._name)

    def found(self, records: Mapping[bytes, bytes]) -> None:
        """This is what the device has now."""
        self.signed = sync_state(records).subject

    def another(self) -> str:
        return self.one_of(each for each in PEOPLE if each != self.who)

    def one_of(self, people: Iterable[str]) -> str:
        return self._rng.choice(sorted(people))

    def coin(self) -> bool:
        return self._rng.random() < 0.3

    def gone(self) -> None:
        """Whoever it was has signed out."""
        self.leaving = False
        self._checks.that(
            self.signed is None,
            "ATTRIBUTED",
            f"{self.signed!r} has signed out at {self._name}, which takes itself for theirs still",
        )


__all__ = ["PEOPLE", "Hands", "Authors"]
