"""The pending operations of entities, as the commit under way leaves them.

Of an entity its chain, oldest first, its base and what readers see; of a transaction what it still
writes. Nothing is decided here, and no policy is known: that is ``rebase``'s. What leaves the
outbox undone, or waits, is ``outcomes``'s.
"""

from __future__ import annotations

from msgspec import Struct

from entidb.db.pending import PendingOp, PendingTransaction
from entidb.db.records import (
    HAS_BASE,
    IS_HELD,
    NO_DEVICE,
    REMOTE,
    BaseRow,
    EntityRow,
    conflict_key,
)
from entidb.db.writer import Ref, Writer
from entidb.errors import CorruptionError
from entidb.sync.apply.report import RebaseReport


class Step(Struct):
    """One pending operation of an entity's chain, with the transaction it belongs to."""

    transaction: PendingTransaction
    op: PendingOp


#: So few operations are looked through faster than they are put into a dictionary.
_FEW_OPERATIONS = 8
_GONE = PendingTransaction(0, NO_DEVICE, 0, [])


class Chains:
    """The chains that one commit works on. Transactions are read once; those that changed wait in
    ``_unsaved``, to be encoded once, at the end."""

    def __init__(self, writer: Writer) -> None:
        self.report = RebaseReport()
        self._writer = writer
        self._loaded: dict[int, PendingTransaction] = {}
        # Of transactions with many operations: those by entity, and which lists have more.
        self._by_entity: dict[int, dict[Ref, PendingOp]] = {}
        self._shrunk: set[int] = set()
        # A transaction may be touched once for each of its entities.
        self._unsaved: dict[int, PendingTransaction] = {}
        self._sequence = 0
        # Entities and transactions that nothing may hold any more.
        self._freed: set[Ref] = set()
        self._freed_sequences: set[int] = set()

    def sequence(self) -> int:
        """The one local commit sequence of everything this rebase shows to readers."""
        if not self._sequence:
            self._sequence = self._writer.next_sequence()
        return self._sequence

    # ------------------------------------------------------------ transactions

    def load(self, sequence: int) -> PendingTransaction | None:
        """The pending transaction as this rebase has left it."""
        known = self._loaded.get(sequence)
        if known is not None:
            return known if known.sequence else None
        found = self._writer.pending(sequence)
        return None if found is None else self._loaded.setdefault(sequence, found)

    def operations(self, transaction: PendingTransaction) -> list[PendingOp]:
        """What the transaction still writes."""
        if transaction.sequence in self._shrunk:
            self._shrunk.remove(transaction.sequence)
            transaction.operations = list(self._by_entity[transaction.sequence].values())
        return transaction.operations

    def _ops_by_entity(self, transaction: PendingTransaction) -> dict[Ref, PendingOp]:
        found = self._by_entity.get(transaction.sequence)
        if found is None:
            found = {(op.collection, op.entity_id): op for op in transaction.operations}
            self._by_entity[transaction.sequence] = found
        return found

    def _save(self, transaction: PendingTransaction) -> None:
        self._unsaved[transaction.sequence] = transaction

    def remove(self, transaction: PendingTransaction) -> None:
        """Take a transaction out of the outbox; its entities are the caller's."""
        self._writer.delete(transaction.key)
        self._loaded[transaction.sequence] = _GONE
        self._unsaved.pop(transaction.sequence, None)
        if transaction.held:
            self._freed.update((op.collection, op.entity_id) for op in transaction.operations)
            self._writer.head.held -= 1
        else:
            self._writer.head.ready -= 1

    def forget(self, sequence: int) -> None:
        """The transaction was taken out of the outbox elsewhere in this commit."""
        self._unsaved.pop(sequence, None)
        if sequence in self._loaded:
            self._loaded[sequence] = _GONE

    # ------------------------------------------------------------ chains

    def _chain(self, ref: Ref, row: EntityRow) -> list[Step]:
        """The pending operations of an entity, oldest first."""
        steps = []
        at = row.pending
        while at:
            step = self._step(ref, at)
            if step is None:
                break
            steps.append(step)
            at = step.op.previous
        if not steps:
            raise CorruptionError(
                f"entity {ref[1].hex()} says it has pending changes, but the outbox has none; "
                "run `entidb verify`"
            )
        return steps[::-1]

    def _step(self, ref: Ref, sequence: int) -> Step | None:
        transaction = self.load(sequence) if sequence else None
        if transaction is None:
            return None
        if len(transaction.operations) > _FEW_OPERATIONS or sequence in self._shrunk:
            found = self._ops_by_entity(transaction).get(ref)
            return None if found is None else Step(transaction, found)
        for op in transaction.operations:
            if op.entity_id == ref[1] and op.collection == ref[0]:
                return Step(transaction, op)
        return None

    def _remove_op(self, step: Step) -> None:
        transaction, op = step.transaction, step.op
        by_entity = self._ops_by_entity(transaction)
        del by_entity[op.collection, op.entity_id]
        self._shrunk.add(transaction.sequence)
        if transaction.held:
            self._freed_sequences.add(transaction.sequence)
            # What came after it here may have been held by nothing else.
            self._freed.add((op.collection, op.entity_id))
        if by_entity:
            self._save(transaction)
            return
        self.remove(transaction)
        self.report.done.append(transaction.transaction_id)

    def _drop_below(self, ref: Ref, op: PendingOp) -> None:
        """The server has what replaced the older pending operations on this entity. There are
        some only if another copy of this device pushed it, having settled those by R24 (R30), or
        in a history that the server has lost since (R29)."""
        step = self._step(ref, op.previous)
        while step is not None:
            previous = step.op.previous
            self._remove_op(step)
            step = self._step(ref, previous)

    def _relink(self, ref: Ref, chain: list[Step]) -> None:
        """Make ``chain`` the whole chain of the entity and show what is on top of it."""
        previous = 0
        for step in chain:
            if step.op.previous != previous:
                step.op.previous = previous
                self._save(step.transaction)
            previous = step.transaction.sequence
        self.show_top(ref, chain[-1] if chain else None)

    # ------------------------------------------------------------ what readers see

    def show_top(self, ref: Ref, top: Step | None) -> None:
        """The view of the entity becomes the operation ``top``, or its base (R18, R25)."""
        row = self._writer.entity(ref)
        assert row is not None, "an entity with pending changes has a row"
        if top is None:
            base = self._writer.base(ref, row)
            self._set_clean(ref, row, base)
            return
        flags = row.flags & ~IS_HELD & ~REMOTE
        if top.transaction.held:
            flags |= IS_HELD
        new = EntityRow(
            flags,
            row.sequence,
            row.version,
            self._writer.device_id,
            top.transaction.timestamp,
            top.transaction.sequence,
            top.op.payload,
        )
        self._replace(ref, new, row)

    def show_base(self, ref: Ref) -> None:
        """Nothing is pending any more: the view is the base."""
        self.show_top(ref, None)

    def _set_clean(self, ref: Ref, row: EntityRow, base: BaseRow) -> None:
        if row.flags & HAS_BASE:
            self._writer.drop_base(ref)
        self._drop_conflict(ref, self._writer.get(conflict_key(*ref)) is not None)
        origin = 0 if base.device_id == self._writer.device_id else REMOTE
        new = EntityRow(
            origin, row.sequence, base.version, base.device_id, base.timestamp, 0, base.payload
        )
        self._replace(ref, new, row)

    def _replace(self, ref: Ref, new: EntityRow, old: EntityRow) -> None:
        if new.payload == old.payload:
            self._writer.put_entity(ref, new, old)
        else:
            self._writer.show(ref, new, old, self.sequence())

    def _is_clean(self, ref: Ref) -> bool:
        row = self._writer.entity(ref)
        return row is None or not row.pending

    # ------------------------------------------------------------ conflicts

    def _drop_conflict(self, ref: Ref, known: bool) -> None:
        if known:
            self._writer.delete(conflict_key(*ref))
            self._writer.head.conflicts -= 1
            self._freed.add(ref)
