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
from typing import Final, Protocol

from msgspec import Struct

from entidb.db import Database
from entidb.db.outbox import read_discarded, scan_ready
from entidb.db.records import READY, sequence_key
from entidb.db.subjects import awaited_subject, is_others, roots_of, sendable
from entidb.db.writer import Writer
from entidb.errors import ConfigError, SyncStateError
from entidb.events import SafeEvent
from entidb.protocol import PushResult, Verdict
from entidb.sync.attempts import Attempts
from entidb.sync.background import Background
from entidb.sync.interrupt import acting_thread
from entidb.sync.refusal import KeptBack
from entidb.sync.state import SyncCycleResult
from entidb.types import Clock, kind_name

#: Answers to pushes that are remembered: the sequences of a batch, and their verdicts.
Answers = deque[tuple[list[int], list[PushResult]]]
#: Verdicts that are kept from one sync to the next.
TRANSACTIONS_MAX: Final = 10_000


class Committed(Protocol):
    """A transaction, of the database or of ``db.aio``: what has the sequence of its commit."""

    @property
    def transaction_id(self) -> bytes:
        """What names it on its whole way (R3)."""
        ...

    @property
    def sequence(self) -> int:
        """Of its commit; 0 before, and where there was nothing to write."""
        ...


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
    """What became of the transaction of local commit ``sequence``.

    While it is ``PENDING``, ``waits_for`` names the person who committed it, or what it was built
    on, if that is not who syncs now: it goes out when they sign in again (R36). And ``code`` and
    ``message`` say why it is kept back, if it does not get through to the server (R5)."""

    sequence: int
    state: FateState
    version: int | None = None
    code: str | None = None
    message: str | None = None
    waits_for: str | None = None

    @property
    def decided(self) -> bool:
        """Whether there is an answer: everything but ``PENDING``."""
        return self.state is not FateState.PENDING

    @property
    def accepted(self) -> bool:
        """Whether the server has it, as it was committed here."""
        return self.state is FateState.ACCEPTED


class Patience:
    """One wait that another thread can end."""

    def __init__(self) -> None:
        self.event = SafeEvent()
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

    def fate(self, transaction: Committed | int) -> Fate:
        """What has become of a committed transaction until now; ``transaction`` is the object, also
        one of ``db.aio``, or the sequence of its commit. Raises ``ConfigError`` for one that was
        never committed."""
        sequence = self._sequence_of(transaction)
        with self.database.view() as view:
            pending = view.pending(sequence)
            if pending is not None:
                if pending.held:
                    return Fate(sequence, FateState.CONFLICT)
                kept = self._kept_back(view, sequence)
                code, message = (None, None) if kept is None else (kept.code, kept.message)
                awaited = awaited_subject(view, view.sync_state, sequence)
                return Fate(sequence, FateState.PENDING, None, code, message, awaited)
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

    def accepted(self, transaction: Committed | int, timeout_s: float | None = None) -> Fate:
        """Wait until there is an answer to a transaction, at most ``timeout_s`` seconds, and return
        its ``Fate``, which is still ``PENDING`` if that was too short.

        In the background the next cycle begins at once; without it this calls ``sync()``, and
        raises what that raises. Raises ``SyncStateError`` inside a cycle or a listener of one."""
        return self.wait_accepted(Patience(), transaction, timeout_s)

    def synced(self, timeout_s: float | None = None) -> bool:
        """Wait until everything that is committed now is decided, at most ``timeout_s`` seconds:
        accepted, withdrawn, or left to a person. Whether it is; not if what is left is kept back,
        and no time is waited for that. As ``accepted`` in all else."""
        return self.wait_synced(Patience(), timeout_s)

    def wait_accepted(
        self, patience: Patience, transaction: Committed | int, timeout_s: float | None
    ) -> Fate:
        """As ``accepted``, until ``patience`` gives up."""
        sequence = self._sequence_of(transaction)

        def holds() -> bool:
            fate = self.fate(sequence)
            if fate.waits_for is None:
                return fate.decided or fate.code is not None
            # Who is there now, after somebody left or the program was started again, the server
            # says.
            with self.database.view() as view:
                return self._attempts.connection.knows(view.sync_state.subject)

        self._wait_until(holds, patience, timeout_s)
        return self.fate(sequence)

    def wait_synced(self, patience: Patience, timeout_s: float | None) -> bool:
        """As ``synced``, until ``patience`` gives up."""
        sequence = self.database.sequence
        self._wait_until(
            lambda: self._all_decided(sequence) or self._all_kept_back(sequence),
            patience,
            timeout_s,
        )
        return self._all_decided(sequence)

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

    def _kept_back(self, view: Writer, sequence: int) -> KeptBack | None:
        """What of a pending transaction, or of those it was built on, does not get through."""
        kept = self._attempts.connection.path.kept
        found = (kept.get(each) for each in roots_of(view, sequence)) if kept else iter(())
        return next((each for each in found if each is not None), None)

    def _all_kept_back(self, sequence: int) -> bool:
        """Whether all that could be sent of what was committed up to ``sequence`` is kept back."""
        if not self._attempts.connection.path.kept:
            return False
        stuck = set(self._attempts.connection.path.kept)
        with self.database.view() as view:
            state = view.sync_state
            for each in scan_ready(view.snapshot, 0, sequence):
                behind = any(op.previous in stuck for op in each.operations)
                if not behind and each.sequence not in stuck:
                    if not is_others(state, each.sequence):
                        return False
                stuck.add(each.sequence)
        return True

    def _wait_until(
        self, holds: Callable[[], bool], patience: Patience, timeout_s: float | None
    ) -> bool:
        if holds():
            return True
        here = acting_thread()
        inside = here == self._cycle_thread or self._background.syncs_on(here)
        if inside or self.database.in_transaction:
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

    def _sequence_of(self, transaction: Committed | int) -> int:
        given: object = transaction
        if hasattr(transaction, "transaction_id"):
            given = getattr(transaction, "sequence", None)
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
