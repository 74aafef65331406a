"""Putting pending transactions on top of new server state (R23 to R25), and taking them back.

Everything here happens inside one ``Writer``, so inside one storage commit. Wire messages, cursors
and verdicts are ``applier``'s; policies only answer, they are in ``policies``.

    pulled change ──▶ clean entity ──▶ taken
                  └─▶ dirty entity ──▶ base replaced ──▶ same bytes?  ──▶ operations done (R24)
                                                    └──▶ Conflict ──▶ policy ──▶ keep_local
                                                                             ├──▶ merge, op by op
                                                                             ├──▶ accept_remote
                                                                             └──▶ skip: held
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from entidb import cbor
from entidb.db.fields import Overruled
from entidb.db.overruled import BY_PERSON, BY_POLICY, BY_RESET, Keeper
from entidb.db.records import (
    DISCARDED,
    HAS_BASE,
    HELD,
    IS_HELD,
    NO_DEVICE,
    REMOTE,
    BaseRow,
    EntityRow,
    PendingOp,
    PendingTransaction,
    absent_base,
    base_key,
    conflict_key,
    decode_base,
    end_of,
    sequence_key,
    sequence_of,
)
from entidb.db.writer import Ref, Writer
from entidb.errors import CorruptionError
from entidb.sync.conflict import Action, Conflict, ConflictPolicy, ConflictResolution, overruled_by
from entidb.types import timestamp_from_ms

PolicyFor = Callable[[str], ConflictPolicy]


class Withdrawn(Struct, frozen=True):
    """A transaction that went to the ``discarded`` list, and why (R4)."""

    sequence: int
    transaction_id: bytes
    code: str
    message: str


class Resolved(Struct, frozen=True):
    """A conflict and what the policy made of it."""

    conflict: Conflict
    resolution: ConflictResolution


class RebaseReport(Struct):
    """What one rebase did. ``done`` are ids of transactions the server had already (R24),
    ``overruled`` counts the values that were decided against and are kept (R4)."""

    pulled: int = 0
    resolved: list[Resolved] = field(default_factory=list)
    unresolved: list[Conflict] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)
    done: list[bytes] = field(default_factory=list)
    overruled: int = 0


class Step(Struct):
    """One pending operation of an entity's chain, with the transaction it belongs to."""

    transaction: PendingTransaction
    op: PendingOp


class Rebase:
    """One rebase. ``server_ms`` is the server's clock: a local timestamp beyond it is clamped for
    the policies as the server will clamp it (R27). In the collections ``foreign`` (numbers) bytes
    are compared, not versions, because their entities come from another history (R29). With
    ``keeps`` what is decided against is kept (R4). ``release`` has to be called at the end."""

    def __init__(
        self,
        writer: Writer,
        policy_for: PolicyFor,
        server_ms: int,
        *,
        foreign: Set[int] = frozenset(),
        keeps: bool = True,
    ) -> None:
        self.report = RebaseReport()
        self._writer = writer
        self._policy_for = policy_for
        self._timestamp_max = timestamp_from_ms(server_ms) | 0xFFFF
        self._foreign = foreign
        self._loaded: dict[int, PendingTransaction] = {}
        # Of transactions with many operations: those by entity, and which lists have more.
        self._by_entity: dict[int, dict[Ref, PendingOp]] = {}
        self._shrunk: set[int] = set()
        # A transaction may be touched once for each of its entities, and is encoded once.
        self._unsaved: dict[int, PendingTransaction] = {}
        self._sequence = 0
        # Entities and transactions that nothing may hold any more.
        self._freed: set[Ref] = set()
        self._freed_sequences: set[int] = set()
        # A clock that is wrong must not let what is kept be forgotten too soon, or never.
        self._keeper = Keeper(writer, min(writer.now_ms, server_ms))
        self._keeps = keeps
        self._taken_back: set[Ref] = set()

    # ------------------------------------------------------------ taking server state

    def take_clean(self, ref: Ref, remote: BaseRow, old: EntityRow | None) -> None:
        """A pulled change to an entity without pending changes (R23)."""
        foreign = ref[0] in self._foreign
        if old is not None and old.version >= remote.version and not foreign:
            return
        self.report.pulled += 1
        if old is None and remote.payload is None:
            return
        row = EntityRow(
            REMOTE, 0, remote.version, remote.device_id, remote.timestamp, 0, remote.payload
        )
        if old is not None and old.payload == remote.payload:
            row.sequence = old.sequence
            self._writer.put_entity(ref, row, old)
            return
        self._writer.show(ref, row, old, self.sequence())

    def take_dirty(self, ref: Ref, remote: BaseRow) -> None:
        """A pulled change to an entity with pending changes: new base, then rebase."""
        writer = self._writer
        row = writer.entity(ref)
        if row is None or not row.pending:
            # An earlier conflict of this page withdrew what was pending here.
            self.take_clean(ref, remote, row)
            return
        base = self._base(ref, row)
        foreign = ref[0] in self._foreign
        if not foreign and base.version >= remote.version:
            return
        self.report.pulled += 1
        conflict_raw = writer.get(conflict_key(*ref))
        ancestor = base if conflict_raw is None else decode_conflict_base(conflict_raw)
        self._set_base(ref, row, remote)
        chain = self._chain(ref, row)
        done = self._done_prefix(chain, remote)
        if done and not self._adds_up(ref, ancestor, remote):
            self._drop_conflict(ref, conflict_raw is not None)
            self._drop_done(ref, chain, done)
            return
        if foreign and base.payload == remote.payload:
            return
        self._decide(ref, chain, ancestor, remote, conflict_raw is not None)

    def take_unsettled(self, ref: Ref, remote: BaseRow) -> None:
        """Nothing is known to have been on the server, but what is pending was in flight, and may
        have been accepted, and deleted by somebody since (R28). So the absence counts as a
        deletion. It is decided whole: no field can be merged with it."""
        row = self._writer.entity(ref)
        if row is None or not row.pending:
            return  # an earlier conflict withdrew what was pending here
        base, known = self._base(ref, row), self._writer.get(conflict_key(*ref)) is not None
        self._set_base(ref, row, remote)
        chain = self._chain(ref, row)
        if done := self._done_prefix(chain, remote):
            self._drop_conflict(ref, known)
            self._drop_done(ref, chain, done)
            return
        self._decide(ref, chain, base, remote, known, whole=True)

    def _done_prefix(self, chain: list[Step], remote: BaseRow) -> int:
        """How many operations of the chain the server state ``remote`` already contains (R24).

        The first one, if it wrote the same bytes. All, if the newest did and their transactions
        wrote nothing else, so that all of them end here. Otherwise more than the first only if
        the server has that very transaction, from another copy of this device (R30): somebody
        else's equal bytes, mostly a deletion, say nothing of what ours wrote in between. One of
        ours would reach the server without this operation, and what it wrote would be gone
        without a trace if the newest were withdrawn for what else it touches."""
        last = len(chain) - 1
        if last and any(len(self.operations(step.transaction)) > 1 for step in chain):
            last = 0
        for index in range(len(chain) - 1, -1, -1):
            step = chain[index]
            ours = (
                remote.device_id == self._writer.device_id
                and remote.timestamp == step.transaction.timestamp
            )
            if step.op.payload == remote.payload and (index in (0, last) or ours):
                return index + 1
        return 0

    def replace_base(self, ref: Ref, remote: BaseRow) -> None:
        """Put what is pending on another base without asking anybody (R29). What somebody wrote
        there since is overruled by it. A conflict that is open stays so, against the new base;
        what it was against is lost with its history, so that is kept."""
        row = self._writer.entity(ref)
        assert row is not None
        top = self._chain(ref, row)[-1]
        raw = self._writer.get(conflict_key(*ref))
        if raw is None:
            against = remote
            conflict = self._conflict(ref, self._base(ref, row), row.payload, remote, top, top)
        else:
            name = self._writer.catalogue.by_number[ref[0]].name
            conflict = decode_conflict(raw, name, ref, row.payload)
            against = BaseRow(
                conflict.remote_version,
                conflict.remote_device,
                conflict.remote_timestamp,
                conflict.remote_payload,
            )
            now = replace(
                conflict,
                remote_version=remote.version,
                remote_device=remote.device_id,
                remote_timestamp=remote.timestamp,
                remote_payload=remote.payload,
            )
            self._writer.put(conflict_key(*ref), encode_conflict(now))
            self.report.unresolved.append(now)
        if against.payload is not None:
            lost = self._against(ConflictResolution.keep_local(), conflict)
            self._overrule(ref, top, against, lost, BY_RESET)
        self._set_base(ref, row, remote)

    def _adds_up(self, ref: Ref, ancestor: BaseRow, remote: BaseRow) -> bool:
        """Whether the same bytes on both sides are two changes to this collection's policy
        (counters). A transaction of our own that comes back after a restore is told apart by the
        server: its id is known, so changed content is superseded (R14)."""
        if ancestor.payload is None or remote.payload is None:
            return False
        policy = self._policy_for(self._writer.catalogue.by_number[ref[0]].name)
        return bool(getattr(policy, "merges_equal", False))

    def sequence(self) -> int:
        """The one local commit sequence of everything this rebase shows to readers."""
        if not self._sequence:
            self._sequence = self._writer.next_sequence()
        return self._sequence

    # ------------------------------------------------------------ deciding

    def _decide(
        self,
        ref: Ref,
        chain: list[Step],
        ancestor: BaseRow,
        remote: BaseRow,
        known: bool,
        *,
        whole: bool = False,
    ) -> None:
        policy = self._policy_for(self._writer.catalogue.by_number[ref[0]].name)
        if whole:
            policy = getattr(policy, "fallback", policy)
        in_turn: Merged | None = None
        while chain:
            last = chain[-1]
            conflict = self._conflict(ref, ancestor, last.op.payload, remote, last, chain[0])
            try:
                resolution = ask(policy, conflict)
                if resolution.action is Action.MERGE and in_turn is None:
                    in_turn = self._merge_in_turn(
                        ref, policy, chain, ancestor, remote, conflict, resolution
                    )
            except Exception as error:
                # R26: a policy that raises holds the transaction, and the person gets to see why.
                conflict = conflict.with_error(f"{type(error).__name__}: {error}")
                self.hold(ref, chain, conflict, known)
                return
            merged = in_turn if resolution.action is Action.MERGE else None
            if resolution.action is Action.SKIP or (merged is not None and merged.skipped):
                self.hold(ref, chain, conflict, known)
                return
            self.report.resolved.append(Resolved(conflict, resolution))
            self._drop_conflict(ref, known)
            known = False
            if resolution.action is Action.ACCEPT_REMOTE:
                message = f"the policy of {conflict.collection!r} took the server's side"
                self._withdraw_lost(chain, conflict, message)
            elif merged is not None:
                if merged.lost[len(chain) - 1]:
                    # No later operation of this device took the place of what was written last,
                    # so it is kept in ``discarded`` (R4), with its whole transaction. The policy
                    # has not been asked about what is left yet: a transaction of that must not
                    # lose this operation alone because of what was on top (R3).
                    message = f"merging {conflict.collection!r} took the server's side at the end"
                    self._withdraw_lost([chain.pop()], conflict, message)
                    continue
                self._store_merged(ref, chain, remote, merged.payloads[: len(chain)])
                for step, lost in zip(chain, merged.overruled, strict=False):
                    if lost:
                        self._overrule(ref, step, remote, lost)
            else:
                self._overrule(ref, last, remote, self._against(resolution, conflict))
            return

    def _merge_in_turn(
        self,
        ref: Ref,
        policy: ConflictPolicy,
        chain: list[Step],
        ancestor: BaseRow,
        remote: BaseRow,
        asked: Conflict,
        first: ConflictResolution,
    ) -> Merged:
        """R25, like a cherry-pick: each operation on what the one before it became. ``first`` is
        the answer to ``asked``, which is about the newest."""
        if len(chain) == 1:
            return Merged([first.payload], [False], [self._against(first, asked)])
        below, onto = ancestor, remote
        merged = Merged([], [], [])
        for step in chain:
            payload, lost = step.op.payload, False
            against: Sequence[Overruled] = ()
            if below.payload != onto.payload:
                conflict = self._conflict(ref, below, payload, onto, step, chain[0])
                answer = ask(policy, conflict)
                if answer.action is Action.SKIP:
                    return Merged([], [], [], skipped=True)
                lost = answer.action is Action.ACCEPT_REMOTE
                payload = _answered(answer, payload, onto.payload)
                against = self._against(answer, conflict)
            merged.payloads.append(payload)
            merged.lost.append(lost)
            merged.overruled.append(against)
            timestamp = self._clamp(step.transaction.timestamp)
            device = self._writer.device_id
            below = BaseRow(remote.version, device, timestamp, step.op.payload)
            onto = BaseRow(remote.version, device, timestamp, payload)
        return merged

    def _conflict(
        self,
        ref: Ref,
        base: BaseRow,
        local: bytes | None,
        remote: BaseRow,
        step: Step,
        first: Step,
    ) -> Conflict:
        return Conflict(
            collection=self._writer.catalogue.by_number[ref[0]].name,
            id_bytes=ref[1],
            base_payload=base.payload,
            local_payload=local,
            remote_payload=remote.payload,
            base_version=base.version,
            remote_version=remote.version,
            base_device=base.device_id,
            local_device=self._writer.device_id,
            remote_device=remote.device_id,
            base_timestamp=base.timestamp,
            local_timestamp=self._clamp(step.transaction.timestamp),
            # A mark that a server made while its own clock was wrong (R27).
            remote_timestamp=self._clamp(remote.timestamp),
            transaction_id=first.transaction.transaction_id,
        )

    def _clamp(self, timestamp: int) -> int:
        return min(timestamp, self._timestamp_max)

    # ------------------------------------------------------------ outcomes

    def _drop_done(self, ref: Ref, chain: list[Step], count: int) -> None:
        """The first ``count`` operations of the chain are on the server already (R24)."""
        for step in chain[:count]:
            self._remove_op(step)
        self._relink(ref, chain[count:])

    def _store_merged(
        self, ref: Ref, chain: list[Step], remote: BaseRow, payloads: list[bytes | None]
    ) -> None:
        below = remote.payload
        left = []
        for step, payload in zip(chain, payloads, strict=True):
            if payload == below:
                self._remove_op(step)
                continue
            below = payload
            if step.op.payload != payload:
                step.op.payload = payload
                self._save(step.transaction)
            left.append(step)
        self._relink(ref, left)

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

    def _ops_by_entity(self, transaction: PendingTransaction) -> dict[Ref, PendingOp]:
        found = self._by_entity.get(transaction.sequence)
        if found is None:
            found = {(op.collection, op.entity_id): op for op in transaction.operations}
            self._by_entity[transaction.sequence] = found
        return found

    def operations(self, transaction: PendingTransaction) -> list[PendingOp]:
        """What the transaction still writes."""
        if transaction.sequence in self._shrunk:
            self._shrunk.remove(transaction.sequence)
            transaction.operations = list(self._by_entity[transaction.sequence].values())
        return transaction.operations

    def _relink(self, ref: Ref, chain: list[Step]) -> None:
        """Make ``chain`` the whole chain of the entity and show what is on top of it."""
        previous = 0
        for step in chain:
            if step.op.previous != previous:
                step.op.previous = previous
                self._save(step.transaction)
            previous = step.transaction.sequence
        self.show_top(ref, chain[-1] if chain else None)

    def show_top(self, ref: Ref, top: Step | None) -> None:
        """The view of the entity becomes the operation ``top``, or its base (R18, R25)."""
        row = self._writer.entity(ref)
        assert row is not None, "an entity with pending changes has a row"
        if top is None:
            base = self._base(ref, row)
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

    def _set_clean(self, ref: Ref, row: EntityRow, base: BaseRow) -> None:
        if row.flags & HAS_BASE:
            self._writer.delete(base_key(*ref))
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
        mine = self._writer.device_id, self._clamp(transaction.timestamp), 0
        theirs = remote.device_id, remote.timestamp, remote.version
        self._keeper.add(ref, mine, theirs, transaction.transaction_id, lost, decided_by)

    def _keep_overruled(self) -> None:
        """Store what was decided against, in the commit that decides."""
        # Where all that was pending was withdrawn after that, the server's side stands.
        stands = {ref for ref in self._taken_back if self._is_clean(ref)}
        if stands:
            self._keeper.drop_remote(stands)
        self.report.overruled += self._keeper.store()

    def _is_clean(self, ref: Ref) -> bool:
        row = self._writer.entity(ref)
        return row is None or not row.pending

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
        self._writer.put(key, cbor.encode(record))
        self._writer.head.discarded += 1
        self.report.withdrawn.append(
            Withdrawn(transaction.sequence, transaction.transaction_id, code, message)
        )

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

    def _drop_conflict(self, ref: Ref, known: bool) -> None:
        if known:
            self._writer.delete(conflict_key(*ref))
            self._writer.head.conflicts -= 1
            self._freed.add(ref)

    def release(self) -> None:
        """Let held transactions go that no open conflict holds any more, and keep what was
        decided against. Call once at the end."""
        self._keep_overruled()
        head = self._writer.head
        if head.held and not head.conflicts:
            # Nothing can hold anything any more; a file of version 0.3 can have some that stayed.
            self._freed_sequences.update(self._held())
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

    def resolve(self, ref: Ref, conflict: Conflict, resolution: ConflictResolution) -> None:
        """What a person decided about an open conflict (R25). A value becomes the newest pending
        operation of the entity; those before it stay as they are."""
        row = self._writer.entity(ref)
        assert row is not None, "an open conflict keeps its entity dirty"
        chain = self._chain(ref, row)
        top = chain[-1]
        stored = self._writer.get(conflict_key(*ref))
        assert stored is not None, "the conflict is open"
        asked = decode_conflict(stored, conflict.collection, ref, row.payload)
        self.report.resolved.append(Resolved(conflict, resolution))
        self._drop_conflict(ref, True)
        if resolution.action is not Action.ACCEPT_REMOTE:
            # Whoever decides saw the conflict as it was listed; what counts is what is there now.
            lost = self._against(replace(resolution, overruled=None), asked)
            self._overrule(ref, top, self._base(ref, row), lost, BY_PERSON)
        if resolution.action is Action.ACCEPT_REMOTE:
            self._withdraw_lost(chain, conflict, "a person took the server's side")
        elif resolution.action is Action.MERGE:
            top.op.payload = resolution.payload
            self._save(top.transaction)
            self.show_top(ref, top)

    # ------------------------------------------------------------ chains, bases, rows

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

    def load(self, sequence: int) -> PendingTransaction | None:
        """The pending transaction as this rebase has left it."""
        known = self._loaded.get(sequence)
        if known is not None:
            return known if known.sequence else None
        found = self._writer.pending(sequence)
        return None if found is None else self._remember(found)

    def _remember(self, transaction: PendingTransaction) -> PendingTransaction:
        return self._loaded.setdefault(transaction.sequence, transaction)

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

    def _base(self, ref: Ref, row: EntityRow) -> BaseRow:
        if not row.flags & HAS_BASE:
            return absent_base(row.version)
        raw = self._writer.get(base_key(*ref))
        if raw is None:
            raise CorruptionError(
                f"the base of entity {ref[1].hex()} is missing; run `entidb verify`"
            )
        return decode_base(raw)

    def _set_base(self, ref: Ref, row: EntityRow, base: BaseRow) -> None:
        """Replace the base of a dirty entity; the view stays."""
        writer = self._writer
        if base.payload is not None:
            writer.put(base_key(*ref), base.encode())
            row.flags |= HAS_BASE
        elif row.flags & HAS_BASE:
            writer.delete(base_key(*ref))
            row.flags &= ~HAS_BASE
        row.version = base.version
        writer.put_entity(ref, row, row)

    # ------------------------------------------------------------ settling (R18)

    def settle_accepted(
        self, transaction: PendingTransaction, version: int, timestamp: int, cursor: int
    ) -> None:
        """The server has it as ``version``."""
        self.remove(transaction)
        for op in self.operations(transaction):
            ref = (op.collection, op.entity_id)
            row = self._writer.entity(ref)
            assert row is not None, "an unsettled operation keeps its entity dirty"
            self._drop_below(ref, op)
            if version > cursor and self._base(ref, row).version < version:
                written = BaseRow(version, self._writer.device_id, timestamp, op.payload)
                self._set_base(ref, row, written)
            if row.pending == transaction.sequence:
                self.show_base(ref)

    def settle_superseded(self, transaction: PendingTransaction) -> bool:
        """Another copy of it was accepted with other content: the next pull brings that. What is
        pending on top was built on content that is gone, so the policy is asked about it.

        False if an older transaction is still pending on one of its entities: it stays until that
        one is settled, because what was accepted need not contain it. The copy can have had it
        accepted in a history that the server has lost since (R29), and have merged this one
        alone. The next pull puts both on top of what the server has."""
        for op in self.operations(transaction):
            if self._step((op.collection, op.entity_id), op.previous) is not None:
                return False
        self.remove(transaction)
        for op in self.operations(transaction):
            ref = (op.collection, op.entity_id)
            row = self._writer.entity(ref)
            assert row is not None
            if not row.pending:
                continue  # deciding about another of its entities withdrew what was on top
            if row.pending == transaction.sequence:
                self.show_base(ref)
                continue
            base = self._base(ref, row)
            if base.payload != op.payload:
                written = BaseRow(
                    base.version, self._writer.device_id, transaction.timestamp, op.payload
                )
                known = self._writer.get(conflict_key(*ref)) is not None
                self._decide(ref, self._chain(ref, row), written, base, known)
        return True

    def _drop_below(self, ref: Ref, op: PendingOp) -> None:
        """The server has what replaced the older pending operations on this entity. There are
        some only if another copy of this device pushed it, having settled those by R24 (R30), or
        in a history that the server has lost since (R29)."""
        step = self._step(ref, op.previous)
        while step is not None:
            previous = step.op.previous
            self._remove_op(step)
            step = self._step(ref, previous)

    def show_base(self, ref: Ref) -> None:
        """Nothing is pending any more: the view is the base."""
        self.show_top(ref, None)


class Merged(Struct):
    """Outcome of merging a chain: for each operation its payload, whether the server's side was
    taken for it, and what was decided against; nothing if ``skipped``."""

    payloads: list[bytes | None]
    lost: list[bool]
    overruled: list[Sequence[Overruled]]
    skipped: bool = False


#: Keys of held transactions read at a time.
_PAGE_ROWS = 2000
#: So few operations are looked through faster than they are put into a dictionary.
_FEW_OPERATIONS = 8
_GONE = PendingTransaction(0, NO_DEVICE, 0, [])


def ask(policy: ConflictPolicy, conflict: Conflict) -> ConflictResolution:
    """A policy's answer. Raises ``TypeError`` if it is not a ``ConflictResolution``."""
    answer = policy(conflict)
    if not isinstance(answer, ConflictResolution):
        raise TypeError(
            f"the policy answered {type(answer).__name__}; return a ConflictResolution, such as "
            "ConflictResolution.keep_local()"
        )
    return answer


def _answered(
    answer: ConflictResolution, local: bytes | None, remote: bytes | None
) -> bytes | None:
    if answer.action is Action.MERGE:
        return answer.payload
    return local if answer.action is Action.KEEP_LOCAL else remote


# ---------------------------------------------------------------- conflict records


def encode_conflict(conflict: Conflict) -> bytes:
    return cbor.encode(
        {
            "base": _state(
                conflict.base_version,
                conflict.base_device,
                conflict.base_timestamp,
                conflict.base_payload,
            ),
            "remote": _state(
                conflict.remote_version,
                conflict.remote_device,
                conflict.remote_timestamp,
                conflict.remote_payload,
            ),
            "local_timestamp": conflict.local_timestamp,
            "transaction_id": conflict.transaction_id,
            "error": conflict.error,
        }
    )


def decode_conflict(raw: bytes, collection: str, ref: Ref, local: bytes | None) -> Conflict:
    """A stored conflict; ``local`` is what the view has now, which later commits may change."""
    record = cbor.decode_trusted(raw)
    base, remote = record["base"], record["remote"]
    return Conflict(
        collection=collection,
        id_bytes=ref[1],
        base_payload=base[3],
        local_payload=local,
        remote_payload=remote[3],
        base_version=base[0],
        remote_version=remote[0],
        base_device=base[1],
        local_device=NO_DEVICE,
        remote_device=remote[1],
        base_timestamp=base[2],
        local_timestamp=record["local_timestamp"],
        remote_timestamp=remote[2],
        transaction_id=record["transaction_id"],
        error=record["error"],
    )


def decode_conflict_base(raw: bytes) -> BaseRow:
    version, device, timestamp, payload = cbor.decode_trusted(raw)["base"]
    return BaseRow(version, device, timestamp, payload)


def lost_to(conflict: Conflict) -> list[Any]:
    """How a ``discarded`` record names the server state a transaction lost to."""
    return [
        conflict.collection,
        conflict.id_bytes,
        conflict.remote_version,
        conflict.remote_device,
        conflict.remote_timestamp,
        conflict.remote_payload,
    ]


def _state(version: int, device: bytes, timestamp: int, payload: bytes | None) -> list[Any]:
    return [version, device, timestamp, payload]


__all__ = ["Rebase", "RebaseReport", "Resolved", "Withdrawn"]
