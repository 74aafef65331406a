"""Putting pending transactions on top of new server state (R23 to R25), and taking them back.

Everything here happens inside one ``Writer``, so inside one storage commit. Verdicts are
``settle``'s, pages are ``page``'s and ``publish``'s, cursors are ``position``'s; policies only
answer (``sync.policies``). How a chain is kept is in ``chains``, how one ends in ``outcomes``.

    pulled change ──▶ clean entity ──▶ taken
                  └─▶ dirty entity ──▶ base replaced ──▶ same bytes?  ──▶ operations done (R24)
                                                    └──▶ Conflict ──▶ policy ──▶ keep_local
                                                                             ├──▶ merge, op by op
                                                                             ├──▶ accept_remote
                                                                             └──▶ skip: held
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

from msgspec import Struct
from msgspec.structs import replace

from entidb.db.fields import Overruled
from entidb.db.overruled import BY_PERSON, BY_RESET
from entidb.db.pending import PendingTransaction
from entidb.db.records import REMOTE, BaseRow, EntityRow, conflict_key
from entidb.db.writer import Ref, Writer
from entidb.sync.apply.chains import Step
from entidb.sync.apply.conflict_rows import decode_conflict, decode_conflict_base, encode_conflict
from entidb.sync.apply.outcomes import Outcomes
from entidb.sync.apply.report import Resolved
from entidb.sync.conflict import Action, Conflict, ConflictPolicy, ConflictResolution

PolicyFor = Callable[[str], ConflictPolicy]
#: A pulled change to an entity with pending changes: the newest of those transactions, the entity,
#: and what the server has.
Dirty = tuple[int, Ref, BaseRow]


class Rebase(Outcomes):
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
        super().__init__(writer, server_ms, keeps=keeps)
        self._policy_for = policy_for
        self._foreign = foreign

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

    def take_all(
        self, changes: Sequence[tuple[Ref, BaseRow]], olds: Sequence[EntityRow | None]
    ) -> list[Dirty]:
        """As ``take_clean`` for each change to an entity without pending changes, in columns: no
        entity twice. The others are left, for ``take_all_dirty`` when all that is clean is taken.
        """
        plain: list[tuple[Ref, BaseRow, EntityRow | None]] = []
        dirty: list[Dirty] = []
        for (ref, remote), old in zip(changes, olds, strict=True):
            if old is not None and old.pending:
                dirty.append((old.pending, ref, remote))
            elif remote.payload is not None and (
                old is None or (old.version < remote.version and old.payload != remote.payload)
            ):
                plain.append((ref, remote, old))
            else:
                self.take_clean(ref, remote, old)
        if plain:
            self.report.pulled += len(plain)
            self._writer.show_all(plain, self.sequence())
        return dirty

    def take_all_dirty(self, dirty: list[Dirty]) -> None:
        """As ``take_dirty`` for each, oldest pending work first, so that what depends on it is
        decided after it."""
        for _, ref, remote in sorted(dirty, key=lambda item: item[:2]):
            self.take_dirty(ref, remote)

    def take_dirty(self, ref: Ref, remote: BaseRow) -> None:
        """A pulled change to an entity with pending changes: new base, then rebase."""
        writer = self._writer
        row = writer.entity(ref)
        if row is None or not row.pending:
            # An earlier conflict of this page withdrew what was pending here.
            self.take_clean(ref, remote, row)
            return
        base = self._writer.base(ref, row)
        foreign = ref[0] in self._foreign
        if not foreign and base.version >= remote.version:
            return
        self.report.pulled += 1
        conflict_raw = writer.get(conflict_key(*ref))
        ancestor = base if conflict_raw is None else decode_conflict_base(conflict_raw)
        self._writer.set_base(ref, row, remote)
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
        have been accepted, and deleted by another device since (R28). So the absence counts as a
        deletion. It is decided whole: no field can be merged with it."""
        row = self._writer.entity(ref)
        if row is None or not row.pending:
            # An earlier conflict withdrew what was pending here. What is written next is built on
            # the absence all the same.
            self.take_clean(ref, remote, row)
            return
        base, known = self._writer.base(ref, row), self._writer.get(conflict_key(*ref)) is not None
        self._writer.set_base(ref, row, remote)
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

    def _adds_up(self, ref: Ref, ancestor: BaseRow, remote: BaseRow) -> bool:
        """Whether the same bytes on both sides are two changes to this collection's policy
        (counters). A transaction of our own that comes back after a restore is told apart by the
        server: its id is known, so changed content is superseded (R14)."""
        if ancestor.payload is None or remote.payload is None:
            return False
        policy = self._policy_for(self._writer.catalogue.by_number[ref[0]].name)
        return bool(getattr(policy, "merges_equal", False))

    def replace_base(self, ref: Ref, remote: BaseRow) -> None:
        """Put what is pending on another base without asking a policy (R29). What a device wrote
        there since is overruled by it. A conflict that is open stays so, against the new base; what
        it was against is lost with its history, so that is kept."""
        row = self._writer.entity(ref)
        assert row is not None
        top = self._chain(ref, row)[-1]
        raw = self._writer.get(conflict_key(*ref))
        if raw is None:
            against = remote
            conflict = self._conflict(
                ref, self._writer.base(ref, row), row.payload, remote, top, top
            )
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
        self._writer.set_base(ref, row, remote)

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
            # The person who decides saw the conflict as it was listed; what counts is what is there
            # now.
            lost = self._against(replace(resolution, overruled=None), asked)
            self._overrule(ref, top, self._writer.base(ref, row), lost, BY_PERSON)
        if resolution.action is Action.ACCEPT_REMOTE:
            self._withdraw_lost(chain, conflict, "a person took the server's side")
        elif resolution.action is Action.MERGE:
            top.op.payload = resolution.payload
            self._save(top.transaction)
            self.show_top(ref, top)

    # ------------------------------------------------------------ settling (R18)

    def settle_accepted(
        self,
        transaction: PendingTransaction,
        version: int,
        timestamp: int,
        cursor: int,
        instead: Mapping[Ref, bytes],
    ) -> None:
        """The server has it as ``version``, and ``instead`` of some of what it wrote (R33)."""
        self.remove(transaction)
        for op in self.operations(transaction):
            ref = (op.collection, op.entity_id)
            row = self._writer.entity(ref)
            assert row is not None, "an unsettled operation keeps its entity dirty"
            self._drop_below(ref, op)
            if version > cursor and self._writer.base(ref, row).version < version:
                payload = instead.get(ref, op.payload)
                written = BaseRow(version, self._writer.device_id, timestamp, payload)
                self._writer.set_base(ref, row, written)
                if self._writer.head.conflicts:
                    # What is pending on top was built on this, and an open conflict is against
                    # something that came before: one that an older transaction of the same answer
                    # has left by being superseded. Nothing is left to decide.
                    self._drop_conflict(ref, self._writer.get(conflict_key(*ref)) is not None)
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
            base = self._writer.base(ref, row)
            if base.payload != op.payload:
                written = BaseRow(
                    base.version, self._writer.device_id, transaction.timestamp, op.payload
                )
                known = self._writer.get(conflict_key(*ref)) is not None
                self._decide(ref, self._chain(ref, row), written, base, known)
        return True


class Merged(Struct):
    """Outcome of merging a chain: for each operation its payload, whether the server's side was
    taken for it, and what was decided against; nothing if ``skipped``."""

    payloads: list[bytes | None]
    lost: list[bool]
    overruled: list[Sequence[Overruled]]
    skipped: bool = False


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
