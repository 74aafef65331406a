"""The watch of one device: each of its commits goes through all the checkers."""

from __future__ import annotations

from collections.abc import Mapping

from entidb.db.catalogue import empty_catalogue
from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledValue
from entidb.db.pending import decode_pending
from entidb.db.records import (
    CONFLICT,
    DISCARDED,
    HELD,
    META_CATALOGUE,
    META_INFLIGHT,
    READY,
    sequence_of,
    split_numbered_key,
)
from entidb.protocol import PushRequest
from entidb.storage.base import Batch
from entidb.sync import Conflict, ConflictResolution, RebaseReport, SyncCycleResult
from entidb.testing.oracle import Ref
from entidb.testing.watch import decisions, following, lists, loss, owed, prefix, questions, views
from entidb.testing.watch.commits import DeviceCommit, Records
from entidb.testing.watch.model import (
    Context,
    DeviceModel,
    decode_catalogue_of,
    discarded_id,
    sync_state,
)

_O, _H, _D, _C = READY[0], HELD[0], DISCARDED[0], CONFLICT[0]


class DeviceWatch(DeviceModel):
    """Model and checkers of one device."""

    def adopt(self, records: Records, context: Context) -> None:
        """Take the model from a store whose bases belong to ``context``: a restored device, or a
        copy."""
        self.history, self.cursor, self.have = context[:3]
        self.outbox, self.discarded, self.open_conflicts = self._lists(records)
        state = sync_state(records)
        if not state.foreign:
            self.move(state)
        self.foreign, self.foreign_names = state.foreign, frozenset(state.foreign_names)
        self.full = state.full
        self.keep_device, self.unsettled = state.keep_device, state.unsettled
        self.granted = None if state.granted is None else frozenset(state.granted)
        self.catalogue_raw, self.catalogue, self.due = None, empty_catalogue(), {}
        following.take_catalogue(self, records)
        self.excluded, self.unheard = context.excluded, context.unheard
        self.due = dict(context.due)
        self.losers.adopt(records)
        self.forget_reports()
        self.reported = {}

    def compare_after_restart(self, records: Records) -> None:
        """LOCAL-DURABLE: what a restart finds is what had been acknowledged."""
        outbox, discarded, conflicts = self._lists(records)
        same = (outbox, discarded, conflicts) == (
            self.outbox,
            self.discarded,
            self.open_conflicts,
        )
        self.checks.that(
            same
            and self.losers.same_as(records)
            and (self.foreign or sync_state(records).cursor == self.cursor),
            "LOCAL-DURABLE",
            f"{self.name} came back with another outbox, list or cursor than it had",
        )
        self.forget_reports()

    def _lists(
        self, records: Records
    ) -> tuple[dict[bytes, int], dict[int, bytes], dict[Ref, None]]:
        catalogue = decode_catalogue_of(records)
        outbox: dict[bytes, int] = {}
        discarded: dict[int, bytes] = {}
        conflicts: dict[Ref, None] = {}
        for key in sorted(records):
            kind = key[0]
            if kind in (_O, _H):
                pending = decode_pending(key, records[key])
                outbox[pending.transaction_id] = pending.sequence
            elif kind == _D:
                discarded[sequence_of(key)] = discarded_id(records[key])
            elif kind == _C:
                number, entity_id = split_numbered_key(key)
                conflicts[catalogue.by_number[number].name, entity_id] = None
        return dict(sorted(outbox.items())), discarded, conflicts

    def on_commit(self, batch: Batch, old: Mapping[bytes, bytes | None], records: Records) -> None:
        known = self.catalogue.by_name
        switched = following.take_catalogue(self, records) if META_CATALOGUE in batch else []
        commit = DeviceCommit(batch, old, records, self.prefixes)
        was_foreign, keep_device = self.foreign, self.keep_device
        excluded = self.excluded
        if commit.sync:
            following.take_grant(self, records, sync_state(records))
        moved = following.take_state(self, sync_state(records)) if commit.sync else ()
        fresh = [info.name for info in switched]
        # Everything that the cursor covers from now on has to be there (R31).
        fresh += [name for name in excluded if name not in self.excluded and name not in fresh]
        if switched and keep_device and not self.foreign:
            owed.owe_newer(self, records, known, switched)
        loss.check_outbox(self, commit, reset=bool(switched) or self.foreign != was_foreign)
        if META_INFLIGHT in batch:
            loss.check_clock(self, commit, records)
        lists.check_lists(self, commit)
        decisions.check_losers(self, commit, batch, old)
        prefix.check_prefix(self, commit, moved, fresh)
        if switched and self.unanswered:
            prefix.check_deletions_stay(self, commit, old, known, switched)
        views.check_views(self, commit)
        owed.check_due(self, commit)
        self.forget_questions()
        self.by_person = {}

    # ------------------------------------------------------------ what the application saw

    def check_everything(self, records: Records) -> None:
        """PREFIX without induction, for the end of a run and after restarts."""
        prefix.check_everything(self, records)

    def on_report(self, report: SyncCycleResult | RebaseReport) -> None:
        """What a cycle, or a person's decision, says it has done: no more and no less."""
        lists.on_report(self, report)

    def on_acknowledged(
        self, records: Records, transaction_id: bytes, writes: Mapping[Ref, bytes | None]
    ) -> None:
        """``commit`` returned: the writes are durable, whole, and in the view."""
        views.on_acknowledged(self, records, transaction_id, writes)

    def on_push(self, records: Records, request: PushRequest) -> None:
        """Every operation names the version that the device has as its base: what another device
        wrote after that is a conflict (R13)."""
        views.on_push(self, records, request)

    def on_recommitted(self, records: Records, entry: DiscardedTransaction) -> None:
        """A discarded transaction was committed again: all of it is in the view."""
        views.on_recommitted(self, records, entry)

    def on_written_back(self, records: Records, value: OverruledValue) -> None:
        """An overruled value was written back: the view has it again."""
        views.on_written_back(self, records, value)

    def on_policy(
        self, conflict: Conflict, answer: ConflictResolution | None, *, several: bool
    ) -> None:
        """NO-FALSE-CONFLICT, on the device's side; ``answer`` None: the policy raised, ``several``:
        more than one pending transaction wrote the entity, so that equal bytes at the end are not
        all there is to it."""
        questions.on_policy(self, conflict, answer, several=several)
