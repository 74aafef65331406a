"""What became of a transaction, and waiting until that is known.

Where a transaction is is read from the database: in the outbox, held by a conflict, or withdrawn.
As which version the server has accepted it is written nowhere; an engine remembers that of the
newest ones that it has seen answered.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from msgspec import Struct

from entidb.db import Database, Transaction
from entidb.db.outbox import read_discarded
from entidb.db.records import READY, sequence_key
from entidb.db.subjects import sendable
from entidb.errors import ConfigError, SyncStateError
from entidb.protocol import PushResult, Verdict
from entidb.sync.attempts import Attempts
from entidb.sync.background import Background
from entidb.sync.interrupt import acting_thread
from entidb.sync.state import SyncCycleResult
from entidb.types import Clock, kind_name

#: Answers to pushes that are remembered: the sequences of a batch, and their verdicts.
Answers = deque[tuple[list[int], list[PushResult]]]
#: Verdicts that are kept from one sync to the next.
TRANSACTIONS_MAX: Final = 10_000


class FateState(StrEnum):
    """Where a transaction is."""

    #: In the outbox: nothing is decided.
    PENDING = "pending"
    #: Held: a conflict waits for a person, in this transaction or in one that it was built on.
    CONFLICT = "conflict"
    #: On the server, as ``version``.
    ACCEPTED = "accepted"
    #: The server has accepted this transaction with other content, as ``version`` (R14).
    SUPERSEDED = "superseded"
    #: Withdrawn (R4), for the reason in ``code`` and ``message``.
    DISCARDED = "discarded"
    #: Nothing of it waits for the server. It was accepted before this engine was made or too long
    #: ago to be remembered, the server had it already (R24), or it is of local collections only.
    SETTLED = "settled"


class Fate(Struct, frozen=True):
    """What became of the transaction of local commit ``sequence``."""

    sequence: int
    state: FateState
    version: int | None = None
    code: str | None = None
    message: str | None = None

    @property
    def decided(self) -> bool:
        """Whether there is an answer: everything but ``PENDING``."""
        return self.state is not FateState.PENDING

    @property
    def accepted(self) -> bool:
        return self.state is FateState.ACCEPTED


class Patience:
    """One wait that another thread can end."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.gone = False

    def give_up(self) -> None:
        self.gone = True
        self.event.set()


class Waiting:
    """The part of an engine that knows what became of transactions."""

    database: Database
    sync: Callable[[], SyncCycleResult]
    wake: Callable[[], None]
    _cycle_thread: int | None
    _answers: Answers
    _attempts: Attempts
    _background: Background
    _clock: Clock
    #: Set at the end of each sync, and of a background run.
    _waiting: list[threading.Event]

    def fate(self, transaction: Transaction | int) -> Fate:
        """What has become of a committed transaction until now; ``transaction`` is the object, or
        the sequence of its commit. Raises ``ConfigError`` for one that was never committed."""
        sequence = self._sequence_of(transaction)
        with self.database.view() as view:
            pending = view.pending(sequence)
            if pending is not None:
                state = FateState.CONFLICT if pending.held else FateState.PENDING
                return Fate(sequence, state)
            discarded = read_discarded(view.snapshot) if view.head.discarded else []
        for entry in discarded:
            if entry.sequence == sequence:
                return Fate(sequence, FateState.DISCARDED, None, entry.code, entry.message)
        return self._remembered(sequence)

    def _remembered(self, sequence: int) -> Fate:
        for sequences, results in reversed(list(self._answers)):
            if sequence in sequences:
                result = results[sequences.index(sequence)]
                if result.verdict == Verdict.ACCEPTED:
                    return Fate(sequence, FateState.ACCEPTED, result.version)
                if result.verdict == Verdict.SUPERSEDED:
                    return Fate(sequence, FateState.SUPERSEDED, result.version)
        return Fate(sequence, FateState.SETTLED)

    def accepted(self, transaction: Transaction | int, timeout_s: float | None = None) -> Fate:
        """Wait until there is an answer to a transaction, at most ``timeout_s`` seconds, and return
        its ``Fate``, which is still ``PENDING`` if that was too short.

        In the background the next cycle begins at once; without it this calls ``sync()``, and
        raises what that raises. Raises ``SyncStateError`` inside a cycle or a listener of one."""
        return self.wait_accepted(Patience(), transaction, timeout_s)

    def synced(self, timeout_s: float | None = None) -> bool:
        """Wait until everything that is committed now is decided, at most ``timeout_s`` seconds:
        accepted, withdrawn, or left to a person. Whether it is. As ``accepted`` in all else."""
        return self.wait_synced(Patience(), timeout_s)

    def wait_accepted(
        self, patience: Patience, transaction: Transaction | int, timeout_s: float | None
    ) -> Fate:
        """As ``accepted``, until ``patience`` gives up."""
        sequence = self._sequence_of(transaction)
        self._wait_until(lambda: self.fate(sequence).decided, patience, timeout_s)
        return self.fate(sequence)

    def wait_synced(self, patience: Patience, timeout_s: float | None) -> bool:
        """As ``synced``, until ``patience`` gives up."""
        sequence = self.database.sequence
        return self._wait_until(lambda: self._all_decided(sequence), patience, timeout_s)

    def _all_decided(self, sequence: int) -> bool:
        first, after = sequence_key(READY, 0), sequence_key(READY, sequence + 1)
        with self.database.view() as view:
            if not view.snapshot.scan_keys(first, after, limit=1):
                return True
            state = view.sync_state
            # What waits for another person to sign in is not decided by a sync of this one. Who is
            # there now, after somebody left or the program was started again, the server says.
            return (
                bool(state.others)
                and self._attempts.connection.knows(state.subject)
                and not sendable(view, state, sequence)
            )

    def _wait_until(
        self, holds: Callable[[], bool], patience: Patience, timeout_s: float | None
    ) -> bool:
        if holds():
            return True
        here = acting_thread()
        if here in (self._cycle_thread, self._background.thread) or self.database.in_transaction:
            raise SyncStateError(
                "waiting for a sync inside one, or inside a transaction, would never end: wait in "
                "another thread"
            )
        if not self._background.is_running:
            self.sync()
            return holds()
        began = self._clock.monotonic()
        self._waiting.append(patience.event)
        try:
            self.wake()
            while not holds() and not patience.gone and self._background.is_running:
                passed = self._clock.monotonic() - began
                left = 3600.0 if timeout_s is None else timeout_s - passed
                if left <= 0:
                    break
                self._clock.wait(patience.event, left)
                patience.event.clear()
        finally:
            self._waiting.remove(patience.event)
        return holds()

    def _sequence_of(self, transaction: Transaction | int) -> int:
        given = transaction.sequence if isinstance(transaction, Transaction) else transaction
        if isinstance(given, bool) or not isinstance(given, int):
            raise ConfigError(f"give a transaction or its sequence, not {kind_name(transaction)}")
        if not 0 < given <= self.database.sequence:
            raise ConfigError(
                f"{given} is no sequence of a commit here: a transaction has one when it was "
                "committed with something in it"
            )
        return given


def trim(answers: Answers) -> None:
    """Forget the oldest, down to ``TRANSACTIONS_MAX``."""
    count = 0
    for sequences, _ in answers:
        count += len(sequences)
    while len(answers) > 1 and count > TRANSACTIONS_MAX:
        count -= len(answers.popleft()[0])


__all__ = ["Answers", "Fate", "FateState", "Patience", "Waiting"]
