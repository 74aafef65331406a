"""What happens to pending work that lost, or that is not decided yet.

It is withdrawn to ``discarded`` with all that was built on it, its value is kept as overruled (R4),
or it is held until a person decides (R25, R26). ``rebase`` says which of these it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from entidb import cbor
from entidb.db.fields import Overruled
from entidb.db.overruled import BY_POLICY, OverruledKeeper
from entidb.db.pending import PendingTransaction
from entidb.db.records import (
    DISCARDED,
    HELD,
    IS_HELD,
    BaseRow,
    conflict_key,
    end_of,
    sequence_key,
    sequence_of,
)
from entidb.db.writer import Ref, Writer
from entidb.sync.apply.chains import Chains, Step
from entidb.sync.apply.conflict_rows import encode_conflict, lost_to
from entidb.sync.apply.report import Withdrawn
from entidb.sync.conflict import Conflict, ConflictResolution, overruled_by
from entidb.types import timestamp_from_ms

#: Keys of held transactions read at a time.
_PAGE_ROWS = 2000


class Outcomes(Chains):
    """The chains of one commit, and how they end. Timestamps beyond ``server_ms`` are clamped as
    the server will clamp them (R27). With ``keeps`` what is decided against is kept (R4).
    ``release`` has to be called at the end."""

    def __init__(self, writer: Writer, server_ms: int, *, keeps: bool) -> None:
        super().__init__(writer)
        self._timestamp_max = timestamp_from_ms(server_ms) | 0xFFFF
        # A clock that is wrong must not let what is kept be forgotten too soon, or never.
        self._keeper = OverruledKeeper(writer, min(writer.now_ms, server_ms))
        self._keeps = keeps
        self._taken_back: set[Ref] = set()

    def _clamp(self, timestamp: int) -> int:
        return min(timestamp, self._timestamp_max)

    # ------------------------------------------------------------ withdrawing (R4)

    def _withdraw_lost(self, chain: list[Step], conflict: Conflict, message: str) -> None:
        self.withdraw(
            [step.transaction for step in chain], "conflict", message, [lost_to(conflict)]
        )

    def withdraw(
        self,
        roots: list[PendingTransaction],
        code: str,
        message: str,
        lost: list[list[Any]],
    ) -> None:
        """Take ``roots`` and everything built on them out of the view and into ``discarded``."""
        everything = self._closure(roots)
        chosen = {transaction.sequence for transaction in roots}
        for transaction in everything:
            if transaction.sequence in chosen:
                reason = (code, message, lost)
            else:
                first = roots[0].transaction_id.hex()
                reason = ("depends", f"built on transaction {first}: {message}", lost)
            self._discard(transaction, *reason)
        touched: dict[Ref, int] = {}
        for transaction in everything:
            self.remove(transaction)
            for op in self.operations(transaction):
                # The oldest withdrawn operation of an entity names what stays under it.
                touched.setdefault((op.collection, op.entity_id), op.previous)
        self._taken_back.update(touched)
        for ref, previous in touched.items():
            self.show_top(ref, self._step(ref, previous))

    def _closure(
        self, roots: list[PendingTransaction], *, past_held: bool = True
    ) -> list[PendingTransaction]:
        """``roots`` and every later pending transaction that touches an entity they touched, and
        so on; oldest first. Without ``past_held`` nothing is followed from those that are held:
        what depends on them is held already.

        Every chain is walked once, however many of its transactions are found."""
        found = {transaction.sequence: transaction for transaction in roots}
        queue = list(roots)
        walked: dict[Ref, int] = {}
        while queue:
            transaction = queue.pop()
            for op in self.operations(transaction):
                ref = (op.collection, op.entity_id)
                at = walked.get(ref, -1)
                if at < 0:
                    row = self._writer.entity(ref)
                    assert row is not None
                    at = row.pending
                while at > transaction.sequence:
                    step = self._step(ref, at)
                    assert step is not None
                    later = step.transaction
                    if later.sequence not in found:
                        found[later.sequence] = later
                        if past_held or not later.held:
                            queue.append(later)
                    at = step.op.previous
                walked[ref] = at
        return [found[sequence] for sequence in sorted(found)]

    def _discard(
        self, transaction: PendingTransaction, code: str, message: str, lost: list[list[Any]]
    ) -> None:
        names = self._writer.catalogue.by_number
        record = {
            "transaction_id": transaction.transaction_id,
            "timestamp": transaction.timestamp,
            "code": code,
            "message": message,
            "operations": [
                [names[op.collection].name, op.entity_id, op.payload]
                for op in self.operations(transaction)
            ],
            "lost_to": lost,
            "at_ms": self._writer.now_ms,
        }
        key = sequence_key(DISCARDED, transaction.sequence)
        self._writer.put(key, cbor.encode_message(record))
        self._writer.head.discarded += 1
        self.report.withdrawn.append(
            Withdrawn(transaction.sequence, transaction.transaction_id, code, message)
        )

    # ------------------------------------------------------------ overruled values (R4)

    def _against(self, resolution: ConflictResolution, conflict: Conflict) -> Sequence[Overruled]:
        """What ``resolution`` decides against, where that is kept."""
        return overruled_by(resolution, conflict) if self._keeps else ()

    def _overrule(
        self,
        ref: Ref,
        step: Step,
        remote: BaseRow,
        lost: Sequence[Overruled],
        decided_by: int = BY_POLICY,
    ) -> None:
        """Remember what was decided against about ``step`` and the server's state ``remote``."""
        if not lost:
            return
        transaction = step.transaction
        timestamp = transaction.timestamp
        if timestamp > self._timestamp_max:
            timestamp = self._clamp(timestamp)
        mine = self._writer.device_id, timestamp, 0
        theirs = remote.device_id, remote.timestamp, remote.version
        identity, sequence = transaction.transaction_id, transaction.sequence
        self._keeper.add(ref, mine, theirs, identity, lost, decided_by, sequence)

    def _keep_overruled(self) -> None:
        """Store what was decided against, in the commit that decides."""
        # Where all that was pending was withdrawn after that, the server's side stays.
        stands = {ref for ref in self._taken_back if self._is_clean(ref)}
        if stands:
            self._keeper.drop_remote(stands)
        self.report.overruled += self._keeper.store()

    # ------------------------------------------------------------ holding

    def hold(self, ref: Ref, chain: list[Step], conflict: Conflict, known: bool) -> None:
        """Keep the chain and what depends on it in the view, but out of pushes, until resolved."""
        self._writer.put(conflict_key(*ref), encode_conflict(conflict))
        if not known:
            self._writer.head.conflicts += 1
        self.report.unresolved.append(conflict)
        free = [step.transaction for step in chain if not step.transaction.held]
        for transaction in self._closure(free, past_held=False):
            self._set_held(transaction, True)

    def _set_held(self, transaction: PendingTransaction, held: bool) -> None:
        if transaction.held == held:
            return
        writer = self._writer
        writer.delete(transaction.key)
        transaction.held = held
        self._save(transaction)
        writer.head.held += 1 if held else -1
        writer.head.ready += -1 if held else 1
        for op in self.operations(transaction):
            ref = (op.collection, op.entity_id)
            row = writer.entity(ref)
            assert row is not None
            if held and row.flags & IS_HELD:
                continue
            if row.pending == transaction.sequence or held:
                row.flags = row.flags | IS_HELD if held else row.flags & ~IS_HELD
                writer.put_entity(ref, row, row)

    def release(self) -> None:
        """Let held transactions go that no open conflict holds any more, and keep what was
        decided against. Call once at the end."""
        self._keep_overruled()
        head = self._writer.head
        if head.held and not head.conflicts:
            # Nothing can hold anything any more; a file of version 0.3 can have some that stayed.
            self._freed_sequences.update(self._held())
        if self._freed or self._freed_sequences:
            for transaction in self._closure(self._freed_transactions()):
                if transaction.held and not self._is_blocked(transaction):
                    self._set_held(transaction, False)
        for sequence in self._shrunk.intersection(self._unsaved):
            self.operations(self._unsaved[sequence])
        for transaction in self._unsaved.values():
            self._writer.put_pending(transaction)
        self._unsaved = {}

    def _held(self) -> Iterator[int]:
        """The local commits whose transactions were held before this commit, and may be still."""
        start = HELD
        while keys := self._writer.snapshot.scan_keys(start, end_of(HELD), limit=_PAGE_ROWS):
            yield from map(sequence_of, keys)
            start = keys[-1] + b"\0"

    def _freed_transactions(self) -> list[PendingTransaction]:
        """Held transactions that something which held them has let go."""
        found: dict[int, PendingTransaction] = {}
        for ref in self._freed:
            row = self._writer.entity(ref)
            if row is not None and row.pending:
                for step in self._chain(ref, row):
                    found[step.transaction.sequence] = step.transaction
        for sequence in self._freed_sequences:
            transaction = self.load(sequence)
            if transaction is not None:
                found[sequence] = transaction
        self._freed, self._freed_sequences = set(), set()
        return list(found.values())

    def _is_blocked(self, transaction: PendingTransaction) -> bool:
        """Whether an open conflict, or one below it that is still held, holds the transaction."""
        for op in self.operations(transaction):
            ref = (op.collection, op.entity_id)
            below = self._step(ref, op.previous)
            if below is not None and below.transaction.held:
                return True
            if self._writer.get(conflict_key(*ref)) is not None:
                return True
        return False
