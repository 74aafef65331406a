"""The checkers of a device's side: each of its storage commits, compared with the oracle.

A ``DeviceWatch`` sees every batch that became durable, with what was there before, and knows what
the application was told. Induction makes it cheap: what held before a commit is checked again only
where the commit, or a moving cursor, could have changed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from entidb import cbor
from entidb.db.catalogue import Catalogue, CollectionInfo, decode_catalogue, empty_catalogue
from entidb.db.outbox import DiscardedTransaction
from entidb.db.records import (
    BASE,
    CONFLICT,
    DIRTY,
    DISCARDED,
    ENTITY,
    ENTITY_HEAD,
    HAS_BASE,
    HELD,
    META_CATALOGUE,
    META_SYNC,
    READY,
    TOMBSTONE,
    PendingTransaction,
    base_key,
    decode_base,
    decode_pending,
    payload_of,
    sequence_key,
    sequence_of,
    split_numbered_key,
    unpack_entity,
    unpack_pending,
)
from entidb.db.replica import ReplicaState, decode_record
from entidb.protocol import PushResult, Verdict
from entidb.storage.base import Batch
from entidb.sync import Action, Conflict, ConflictResolution, RebaseReport, SyncCycleResult
from entidb.testing.checkers import GROUP_COLLECTION, Checks, group_is_whole
from entidb.testing.oracle import NEVER, Histories, History, Ref, State

Records = Mapping[bytes, bytes]
#: History, cursor, and what is had above it.
Context = tuple[History | None, int, list[list[int]]]
_E, _B, _O, _H, _D, _C = ENTITY[0], BASE[0], READY[0], HELD[0], DISCARDED[0], CONFLICT[0]


class DeviceCommit:
    """One storage commit of a device, taken apart."""

    __slots__ = ("bases", "conflicts", "discards", "entities", "outbox", "records", "sync")

    def __init__(
        self,
        batch: Batch,
        old: Mapping[bytes, bytes | None],
        records: Records,
        prefixes: Mapping[bytes, CollectionInfo],
    ) -> None:
        self.records = records
        self.entities: list[tuple[CollectionInfo, bytes]] = []
        self.bases: list[tuple[int, bytes]] = []
        #: By sequence: what the outbox held before and holds now.
        self.outbox: dict[int, list[PendingTransaction | None]] = {}
        self.discards: list[tuple[int, bytes | None, bytes | None]] = []
        self.conflicts: list[tuple[int, bytes, bytes | None]] = []
        self.sync = META_SYNC in batch
        for key, new in batch.items():
            kind = key[0]
            if kind == _E:
                info = prefixes.get(key[:5])
                if info is not None:
                    self.entities.append((info, key[5:]))
            elif kind == _B:
                self.bases.append(split_numbered_key(key))
            elif kind in (_O, _H):
                pair = self.outbox.setdefault(sequence_of(key), [None, None])
                was = old[key]
                if was is not None:
                    pair[0] = decode_pending(key, was)
                if new is not None:
                    pair[1] = decode_pending(key, new)
            elif kind == _D:
                self.discards.append((sequence_of(key), old[key], new))
            elif kind == _C:
                self.conflicts.append((*split_numbered_key(key), new))


class DeviceWatch:
    """Model and checkers of one device. ``answers`` are the verdicts of the push answer it has
    just been given, ``calls`` what its policies were asked since the last commit."""

    def __init__(self, checks: Checks, name: str, histories: Histories) -> None:
        self.checks = checks
        self.name = name
        self.histories = histories
        self.history: History | None = None
        self.cursor = 0
        self.have: list[list[int]] = []
        self.excluded: dict[str, None] = {}
        self.outbox: dict[bytes, int] = {}
        self.discarded: dict[int, bytes] = {}
        self.open_conflicts: dict[Ref, None] = {}
        self.answers: dict[bytes, PushResult] = {}
        self.answered_by: History | None = None
        self.calls: dict[Ref, ConflictResolution] = {}
        self.by_person: dict[Ref, None] = {}
        #: What the commits since the last report put on the lists (SURFACED-ONCE).
        self.unreported: dict[bytes, None] = {}
        self.unreported_conflicts: dict[Ref, None] = {}
        self.reported: dict[bytes, None] = {}
        self._catalogue_raw: bytes | None = None
        self._catalogue: Catalogue = empty_catalogue()
        self._prefixes: dict[bytes, CollectionInfo] = {}
        self._foreign = False
        self._full = True

    # ------------------------------------------------------------ beginning again

    def context(self) -> Context:
        """What the bases of this device belong to."""
        return self.history, self.cursor, self.have

    def adopt(self, records: Records, context: Context) -> None:
        """Take the model from a store whose bases belong to ``context``: a restored device, or a
        copy."""
        self.history, self.cursor, self.have = context
        self.outbox, self.discarded, self.open_conflicts = self._lists(records)
        state = sync_state(records)
        if not state.foreign:
            self._move(state)
        self._foreign = state.foreign
        self._full = state.full
        self._take_catalogue(records)
        covered = not state.full and not state.uncovered
        names = [info.name for info in self._catalogue.by_name.values() if info.synced]
        partly = state.uncovered if not state.full else (names if state.cursor else [])
        self.excluded = {} if covered else dict.fromkeys(partly)
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
            same and (self._foreign or sync_state(records).cursor == self.cursor),
            "LOCAL-DURABLE",
            f"{self.name} came back with another outbox, list or cursor than it had",
        )
        self.forget_reports()

    def forget_reports(self) -> None:
        """A crash ends the cycle that would have reported; the lists still have everything."""
        self.unreported, self.unreported_conflicts = {}, {}
        self.calls = {}

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

    # ------------------------------------------------------------ commits

    def on_commit(self, batch: Batch, old: Mapping[bytes, bytes | None], records: Records) -> None:
        switched = self._take_catalogue(records) if META_CATALOGUE in batch else []
        commit = DeviceCommit(batch, old, records, self._prefixes)
        was_foreign = self._foreign
        moved = self._take_state(sync_state(records), switched) if commit.sync else ()
        self._check_outbox(commit, reset=bool(switched) or self._foreign != was_foreign)
        self._check_lists(commit)
        self._check_prefix(commit, moved, switched)
        self._check_views(commit)
        self.calls, self.by_person = {}, {}

    def _take_catalogue(self, records: Records) -> list[CollectionInfo]:
        """Collections that now stand in another table (R20)."""
        raw = records.get(META_CATALOGUE)
        if raw is self._catalogue_raw:
            return []
        was = self._catalogue
        self._catalogue_raw, self._catalogue = raw, decode_catalogue_of(records)
        now = self._catalogue.by_name
        self._prefixes = {info.prefix: info for info in now.values()}
        known = was.by_name
        scope_changed = was.scope != self._catalogue.scope or any(
            name in known and known[name].local != info.local for name, info in now.items()
        )
        if scope_changed:
            for name, info in now.items():
                if info.synced and not (name in known and known[name].synced):
                    self.excluded[name] = None
        return [i for i in now.values() if i.name in known and i.table != known[i.name].table]

    def _take_state(self, state: ReplicaState, switched: list[CollectionInfo]) -> Iterable[Ref]:
        """Follow the cursor; returns the entities that must look different now."""
        if state.foreign:
            # R29: until the reset is through, the bases are those of the old history.
            self._foreign = self._full = True
            return ()
        history, cursor, have = self.history, self.cursor, self.have
        self._move(state)
        if self._foreign or history is not self.history:
            self._foreign = False
        elif state.cursor < cursor:
            self.checks.fail(
                "ORDER", f"the cursor of {self.name} went from {cursor} back to {state.cursor}"
            )
        if not state.full and not state.uncovered:
            self.excluded.clear()
        if self.history is None:
            return ()
        after = 0 if history is not self.history else cursor
        moved = [
            ref for commit in self.history.commits[after + 1 : self.cursor + 1] for ref in commit
        ]
        for first, last in self.have:
            if not any(a <= first and last <= b for a, b in have):
                for commit in self.history.commits[first : last + 1]:
                    moved += commit
        return moved

    def _move(self, state: ReplicaState) -> None:
        self.history = self.histories.get(state.history)
        self.cursor, self.have, self._full = state.cursor, state.have, state.full

    def covers(self, head: int) -> bool:
        """Whether everything up to ``head`` is here: below the cursor, or the device's own."""
        reached = self.cursor
        for first, last in self.have:
            if first <= reached + 1:
                reached = max(reached, last)
        return reached >= head

    # ------------------------------------------------------------ PREFIX, NO-RESURRECTION

    def _check_prefix(
        self, commit: DeviceCommit, moved: Iterable[Ref], switched: list[CollectionInfo]
    ) -> None:
        by_name, by_number = self._catalogue.by_name, self._catalogue.by_number
        records, scope = commit.records, self._catalogue.scope
        refs: dict[Ref, None] = {
            (info.name, entity_id): None for info, entity_id in commit.entities
        }
        for number, entity_id in commit.bases:
            refs[by_number[number].name, entity_id] = None
        refs.update(dict.fromkeys(moved))
        if switched:
            prefixes = {info.prefix: info.name for info in switched}
            for key in sorted(records):
                if key[:5] in prefixes:
                    refs[prefixes[key[:5]], key[5:]] = None
            names = list(prefixes.values())
            for ref in self.history.refs() if self.history is not None else ():
                if ref[0] in names:
                    refs[ref] = None
        for ref in refs:
            info = by_name.get(ref[0])
            in_scope = (scope is None or ref[0] in scope) if info is None else info.synced
            if in_scope and ref[0] not in self.excluded:
                self._compare_base(records, info, ref)
        self.checks.passed("PREFIX", len(refs))

    def check_everything(self, records: Records) -> None:
        """PREFIX without induction, for the end of a run and after restarts."""
        if self._foreign:
            return
        for info in self._catalogue.by_name.values():
            if not info.synced or info.name in self.excluded:
                continue
            ids = {key[5:]: None for key in records if key[:5] == info.prefix}
            for ref in self.history.refs() if self.history is not None else ():
                if ref[0] == info.name:
                    ids[ref[1]] = None
            for entity_id in ids:
                self._compare_base(records, info, (info.name, entity_id))
            self.checks.passed("PREFIX", len(ids))

    def _expected(self, ref: Ref) -> State:
        if self.history is None:
            return NEVER
        return self.history.state_with(ref, self.cursor, self.have)

    def _compare_base(self, records: Records, info: CollectionInfo | None, ref: Ref) -> None:
        version, payload = self._expected(ref)
        if payload is None and version:
            self.checks.passed("NO-RESURRECTION")
        if info is None:
            if payload is not None:
                self._differs(ref, "nothing", (version, payload))
            return
        raw = records.get(info.prefix + ref[1])
        if raw is None:
            if payload is not None:
                self._differs(ref, "nothing", (version, payload))
            return
        flags = raw[0]
        if not flags & DIRTY:
            stored = unpack_entity(raw)[2]
            base = None if flags & TOMBSTONE else raw[ENTITY_HEAD:]
        elif not flags & HAS_BASE:
            stored, base = unpack_pending(raw)[2], None
        else:
            stored = unpack_pending(raw)[2]
            row = decode_base(records[base_key(info.number, ref[1])])
            if row.version != stored:
                self.checks.fail("PREFIX", f"{self.name}: two base versions of {ref[1].hex()}")
            base = row.payload
        if payload is not None or base is not None:
            if base != payload or stored != version:
                self._differs(ref, (stored, base), (version, payload))
            return
        # Both absent: the device must know of the tombstone, and of nothing in the future.
        limit = max(self.cursor, max((last for _, last in self.have), default=0))
        # While everything is being pulled anew, what is written counts as unknown to the server;
        # publishing puts that right (R28).
        # A tombstone at or below the floor may be gone, and then nobody can know of it.
        purged = self.history is not None and version <= self.history.floor
        unknown = stored == 0 and (self._full or purged)
        if flags & DIRTY and not (version <= stored <= limit or unknown):
            self._differs(ref, (stored, base), (version, payload))

    def _differs(self, ref: Ref, has: object, should: State) -> None:
        gone = should[1] is None and should[0] > 0
        self.checks.fail(
            "NO-RESURRECTION" if gone and has != "nothing" else "PREFIX",
            f"{self.name} at cursor {self.cursor} (have {self.have}) has {has} as base of "
            f"{ref[0]}/{ref[1].hex()}; the server's state is {should}",
        )

    # ------------------------------------------------------------ NO-SILENT-LOSS

    def _check_outbox(self, commit: DeviceCommit, *, reset: bool) -> None:
        rule = "RESET-KEEPS-OUTBOX" if reset else "NO-SILENT-LOSS"
        if reset:
            self.checks.passed("RESET-KEEPS-OUTBOX")
        discards = {sequence: new for sequence, _, new in commit.discards if new is not None}
        for sequence, (was, now) in commit.outbox.items():
            self.checks.passed("NO-SILENT-LOSS")
            if was is None:
                if now is not None:
                    self.outbox[now.transaction_id] = sequence
                continue
            if now is None:
                del self.outbox[was.transaction_id]
                if not self._explained(commit, was, discards.get(sequence)):
                    self._check_dropped(commit, was, {}, rule)
                continue
            if was.operations != now.operations:
                left = {(op.collection, op.entity_id): op.payload for op in now.operations}
                self._check_dropped(commit, was, left, rule)

    def _explained(
        self, commit: DeviceCommit, was: PendingTransaction, record: bytes | None
    ) -> bool:
        if record is not None:
            by_name = self._catalogue.by_name
            listed = cbor.decode_trusted(record)
            kept = {(by_name[name].number, i): payload for name, i, payload in listed["operations"]}
            self.checks.that(
                listed["transaction_id"] == was.transaction_id,
                "NO-SILENT-LOSS",
                f"{self.name} discarded {was.transaction_id.hex()} under another id",
            )
            self._check_dropped(commit, was, kept, "NO-SILENT-LOSS")
            return True
        answer = self.answers.get(was.transaction_id)
        if answer is None or answer.verdict not in (Verdict.ACCEPTED, Verdict.SUPERSEDED):
            return False
        history = self.answered_by
        return history is not None and was.transaction_id in history.accepted

    def _check_dropped(
        self,
        commit: DeviceCommit,
        was: PendingTransaction,
        left: Mapping[tuple[int, bytes], bytes | None],
        rule: str,
    ) -> None:
        """Operations may go, or change, only where the server has the bytes already (R24), or
        where a policy or a person said so."""
        for op in was.operations:
            key = (op.collection, op.entity_id)
            if key in left and left[key] == op.payload:
                continue
            info = self._catalogue.by_number[op.collection]
            ref = (info.name, op.entity_id)
            called = self.calls.get(ref)
            if ref in self.by_person or (called is not None and called.action is Action.MERGE):
                continue
            if key not in left and self._contained(commit, info, op.entity_id, was.sequence):
                continue
            self.checks.fail(
                rule,
                f"{self.name} lost the write of {ref[0]}/{ref[1].hex()} in transaction "
                f"{was.transaction_id.hex()}: it is not pending, not on the server, and not in "
                "the discarded list",
            )

    def _contained(
        self, commit: DeviceCommit, info: CollectionInfo, entity_id: bytes, sequence: int
    ) -> bool:
        """Whether the server has this operation's bytes, or those of a later one on top of it
        that went with it."""
        base = base_payload(commit.records, info, entity_id)
        for number, (was, now) in commit.outbox.items():
            if number < sequence or was is None:
                continue
            for op in was.operations:
                if op.entity_id != entity_id or op.collection != info.number:
                    continue
                stays = now is not None and any(
                    o.entity_id == entity_id and o.collection == info.number for o in now.operations
                )
                if op.payload == base and not stays:
                    return True
        return False

    # ------------------------------------------------------------ SURFACED-ONCE

    def _check_lists(self, commit: DeviceCommit) -> None:
        for sequence, was, now in commit.discards:
            if now is not None:
                identity = discarded_id(now)
                self.discarded[sequence] = identity
                self.unreported[identity] = None
            elif was is not None:
                identity = self.discarded.pop(sequence)
                self.checks.that(
                    identity in self.by_person_ids,
                    "SURFACED-ONCE",
                    f"{identity.hex()} left the discarded list of {self.name} by itself",
                )
        for number, entity_id, now in commit.conflicts:
            ref = (self._catalogue.by_number[number].name, entity_id)
            if now is not None:
                self.open_conflicts[ref] = None
                self.unreported_conflicts[ref] = None
            else:
                self.open_conflicts.pop(ref, None)
        for ref in self.calls:
            self.unreported_conflicts[ref] = None

    #: Ids a person is dealing with right now; set by ``by_person_deals_with``.
    by_person_ids: tuple[bytes, ...] = ()

    def on_report(self, report: SyncCycleResult | RebaseReport) -> None:
        """What a cycle, or a person's decision, says it has done: no more and no less."""
        withdrawn = [entry.transaction_id for entry in report.withdrawn]
        self.checks.that(
            dict.fromkeys(withdrawn) == self.unreported and len(withdrawn) == len(self.unreported),
            "SURFACED-ONCE",
            f"{self.name} withdrew {len(self.unreported)} transactions and reported "
            f"{len(withdrawn)}",
        )
        twice = [identity.hex() for identity in withdrawn if identity in self.reported]
        self.checks.that(not twice, "SURFACED-ONCE", f"{self.name} reported {twice} again")
        self.reported.update(dict.fromkeys(withdrawn))
        resolved = report.conflicts if isinstance(report, SyncCycleResult) else report.resolved
        told = {(r.conflict.collection, r.conflict.id_bytes): None for r in resolved}
        told.update({(c.collection, c.id_bytes): None for c in report.unresolved})
        silent = [ref for ref in self.unreported_conflicts if ref not in told]
        self.checks.that(
            not silent, "SURFACED-ONCE", f"{self.name} did not report conflicts on {silent}"
        )
        self.unreported, self.unreported_conflicts = {}, {}

    # ------------------------------------------------------------ WHOLE, READ-YOUR-WRITES

    def _check_views(self, commit: DeviceCommit) -> None:
        records = commit.records
        for info, entity_id in commit.entities:
            raw = records.get(info.prefix + entity_id)
            if info.name == GROUP_COLLECTION:
                self.checks.that(
                    group_is_whole(records, info.prefix, entity_id),
                    "WHOLE",
                    f"{self.name} shows half of a transaction on {entity_id.hex()}",
                )
            if raw is None or not raw[0] & DIRTY:
                continue
            sequence = unpack_pending(raw)[5]
            op_payload = self._pending_payload(commit, sequence, info.number, entity_id)
            self.checks.that(
                op_payload == (payload_of(raw),),
                "READ-YOUR-WRITES",
                f"{self.name} shows another value of {info.name}/{entity_id.hex()} than its newest "
                "pending write",
            )

    def _pending_payload(
        self, commit: DeviceCommit, sequence: int, number: int, entity_id: bytes
    ) -> tuple[bytes | None] | None:
        pending: PendingTransaction | None = None
        if sequence in commit.outbox:
            pending = commit.outbox[sequence][1]
        else:
            for kind in (READY, HELD):
                raw = commit.records.get(sequence_key(kind, sequence))
                if raw is not None:
                    pending = decode_pending(sequence_key(kind, sequence), raw)
        for op in () if pending is None else pending.operations:
            if op.entity_id == entity_id and op.collection == number:
                return (op.payload,)
        return None

    # ------------------------------------------------------------ what the application saw

    def on_acknowledged(
        self, records: Records, transaction_id: bytes, writes: Mapping[Ref, bytes | None]
    ) -> None:
        """``commit`` returned: the writes are durable, whole, and in the view."""
        by_name = self._catalogue.by_name
        infos = {name: by_name.get(name) for name, _ in writes}
        if any(info is None or info.synced for info in infos.values()):
            self.checks.that(
                transaction_id in self.outbox,
                "LOCAL-DURABLE",
                f"{self.name} acknowledged {transaction_id.hex()}, which is not durable",
            )
            self._check_row(records, transaction_id, writes)
        for (name, entity_id), payload in writes.items():
            info = infos[name]
            raw = None if info is None else records.get(info.prefix + entity_id)
            self.checks.that(
                (None if raw is None else payload_of(raw)) == payload,
                "READ-YOUR-WRITES",
                f"{self.name} does not read what it has just written to {name}/{entity_id.hex()}",
            )

    def _check_row(
        self, records: Records, transaction_id: bytes, writes: Mapping[Ref, bytes | None]
    ) -> None:
        sequence = self.outbox[transaction_id]
        by_number = self._catalogue.by_number
        for kind in (READY, HELD):
            raw = records.get(sequence_key(kind, sequence))
            if raw is None:
                continue
            row = decode_pending(sequence_key(kind, sequence), raw)
            stored = {
                (by_number[op.collection].name, op.entity_id): op.payload for op in row.operations
            }
            by_name = self._catalogue.by_name
            due = {ref: payload for ref, payload in writes.items() if by_name[ref[0]].synced}
            self.checks.that(
                stored == due, "WHOLE", f"{self.name} keeps half of {transaction_id.hex()}"
            )

    def on_policy(
        self, conflict: Conflict, answer: ConflictResolution | None, *, several: bool
    ) -> None:
        """NO-FALSE-CONFLICT, on the device's side; ``answer`` None: the policy raised, ``several``:
        more than one pending transaction wrote the entity, so that equal bytes at the end are not
        all there is to it."""
        ref = (conflict.collection, conflict.id_bytes)
        first = ref not in self.calls
        if first:
            # Later questions about the same entity are the steps of one merge (R25).
            self.calls[ref] = ConflictResolution.skip() if answer is None else answer
        if not first or self._foreign or self.history is None:
            return
        base, remote = conflict.base_version, conflict.remote_version
        if base == remote and any(
            answer.verdict == Verdict.SUPERSEDED for answer in self.answers.values()
        ):
            # What it was built on is gone: another copy of this device pushed something else.
            return
        if ref in self.open_conflicts:
            # An open conflict keeps its first base, which may be of a copy's transaction, or of
            # the history before a reset.
            base = -1
        real = (
            (conflict.local_payload != conflict.remote_payload or several or _merges(answer))
            and remote > base
            and (base < 0 or self._truth(ref, base) == conflict.base_payload)
            and self._truth(ref, remote) == conflict.remote_payload
            and bool(self.history.written_between(ref, base, remote))
        )
        self.checks.that(
            real,
            "NO-FALSE-CONFLICT",
            f"{self.name} was asked about {ref[0]}/{ref[1].hex()} from {base} to {remote}, where "
            f"nothing came between: {conflict.base_payload!r} (truly {self._truth(ref, base)!r}), "
            f"{conflict.local_payload!r}, {conflict.remote_payload!r} (truly "
            f"{self._truth(ref, remote)!r})",
        )

    def _truth(self, ref: Ref, version: int) -> bytes | None:
        assert self.history is not None
        return self.history.state_at(ref, version)[1]


def _merges(answer: ConflictResolution | None) -> bool:
    """Two equal counters are two changes all the same; a policy that adds up is asked."""
    return answer is not None and answer.action is Action.MERGE


def sync_state(records: Records) -> ReplicaState:
    raw = records.get(META_SYNC)
    return ReplicaState() if raw is None else decode_record(ReplicaState, raw)


def decode_catalogue_of(records: Records) -> Catalogue:
    raw = records.get(META_CATALOGUE)
    return empty_catalogue() if raw is None else decode_catalogue(raw)


def discarded_id(raw: bytes) -> bytes:
    record: dict[str, Any] = cbor.decode_trusted(raw)
    return DiscardedTransaction(0, **record).transaction_id


def base_payload(records: Records, info: CollectionInfo, entity_id: bytes) -> bytes | None:
    """The last server state of an entity that the device knows."""
    raw = records.get(info.prefix + entity_id)
    if raw is None or not raw[0] & DIRTY:
        return None if raw is None else payload_of(raw)
    if not raw[0] & HAS_BASE:
        return None
    return decode_base(records[base_key(info.number, entity_id)]).payload
