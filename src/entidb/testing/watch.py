"""The checkers of a device's side: each of its storage commits, compared with the oracle.

A ``DeviceWatch`` sees every batch that became durable, with what was there before, and knows what
the application was told. Induction makes it cheap: what held before a commit is checked again only
where the commit, or a moving cursor, could have changed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from entidb import cbor
from entidb.db.catalogue import Catalogue, CollectionInfo, decode_catalogue, empty_catalogue
from entidb.db.outbox import DiscardedTransaction
from entidb.db.overruled import OverruledValue
from entidb.db.records import (
    BASE,
    CONFLICT,
    DIRTY,
    DISCARDED,
    ENTITY,
    ENTITY_HEAD,
    HAS_BASE,
    HELD,
    META_ADOPT,
    META_CATALOGUE,
    META_HEAD,
    META_INFLIGHT,
    META_SYNC,
    READY,
    TOMBSTONE,
    PendingTransaction,
    base_key,
    conflict_key,
    decode_base,
    decode_head,
    decode_pending,
    payload_of,
    sequence_key,
    sequence_of,
    split_numbered_key,
    unpack_entity,
    unpack_pending,
    version_of,
)
from entidb.db.replica import ReplicaState, decode_record
from entidb.protocol import PushRequest, PushResult, Verdict
from entidb.storage.base import Batch
from entidb.sync import Action, Conflict, ConflictResolution, RebaseReport, SyncCycleResult
from entidb.sync.apply.conflict_rows import decode_conflict
from entidb.testing.checkers import GROUP_COLLECTION, Checks, group_is_whole
from entidb.testing.losers import Losers, leaves, lost_leaves
from entidb.testing.oracle import NEVER, Histories, History, Mark, Ref, State
from entidb.types import Clock, timestamp_from_ms

Records = Mapping[bytes, bytes]
_E, _B, _O, _H, _D, _C = ENTITY[0], BASE[0], READY[0], HELD[0], DISCARDED[0], CONFLICT[0]


#: Reasons for which a server of 0.3 refuses a whole push, and which count for one transaction.
_REFUSED_WHOLE = frozenset(("codec_error", "forbidden", "invalid_message", "too_large"))
#: What a policy was asked, and what it answered.
Question = tuple[Conflict, ConflictResolution]


class Context(NamedTuple):
    """What the bases of a store belong to; a copy of the store takes it along."""

    history: History | None
    cursor: int
    have: list[list[int]]
    excluded: dict[str, None]
    unheard: bool
    due: dict[Ref, State]


class DeviceCommit:
    """One storage commit of a device, taken apart."""

    __slots__ = (
        "bases",
        "conflicts",
        "discards",
        "entities",
        "outbox",
        "pending",
        "records",
        "sync",
    )

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
        #: Other rows of the outbox, as they are looked up.
        self.pending: dict[int, PendingTransaction | None] = {}
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

    def __init__(
        self, checks: Checks, name: str, histories: Histories, server_clock: Clock
    ) -> None:
        self.checks = checks
        self._server_clock = server_clock
        self.name = name
        self.histories = histories
        self.history: History | None = None
        self.cursor = 0
        self.have: list[list[int]] = []
        #: Collections in scope that the cursor does not speak of yet (R31).
        self.excluded: dict[str, None] = {}
        #: What is to be made pending before the adoption ends: payload, and the version it has
        #: from the history before a reset (0: written outside the scope). R29, R31.
        self.due: dict[Ref, State] = {}
        self.outbox: dict[bytes, int] = {}
        self.discarded: dict[int, bytes] = {}
        self.open_conflicts: dict[Ref, None] = {}
        self.answers: dict[bytes, PushResult] = {}
        self.answered_by: History | None = None
        self.calls: dict[Ref, ConflictResolution] = {}
        #: Transactions that were sent and got no answer.
        self.unanswered: dict[bytes, None] = {}
        self.by_person: dict[Ref, None] = {}
        #: What was asked about an entity since the last commit, and answered.
        self.questions: dict[Ref, list[Question]] = {}
        self.losers = Losers(checks, name, server_clock)
        #: What the commits since the last report put on the lists (SURFACED-ONCE).
        self.unreported: dict[bytes, None] = {}
        self.unreported_conflicts: dict[Ref, None] = {}
        self.reported: dict[bytes, None] = {}
        #: Codes for which the server has refused transactions, with their whole push (R5).
        self.refused: Mapping[bytes, set[str]] = {}
        self._catalogue_raw: bytes | None = None
        self._catalogue: Catalogue = empty_catalogue()
        self._prefixes: dict[bytes, CollectionInfo] = {}
        self._foreign = False
        #: Collections whose rows are of the history before a reset that did not cover them.
        self._outdated: frozenset[str] = frozenset()
        self._full = True
        self._keep_device = False
        self._unheard = False
        #: What the device was told that its token grants; None: all (R31).
        self._granted: frozenset[str] | None = None
        #: What the device remembers of lost answers, as it is stored (R28).
        self._unsettled: list[list[int]] = []

    # ------------------------------------------------------------ beginning again

    def context(self) -> Context:
        """What the bases of this device belong to."""
        return Context(
            self.history, self.cursor, self.have, self.excluded, self._unheard, dict(self.due)
        )

    def adopt(self, records: Records, context: Context) -> None:
        """Take the model from a store whose bases belong to ``context``: a restored device, or a
        copy."""
        self.history, self.cursor, self.have = context[:3]
        self.outbox, self.discarded, self.open_conflicts = self._lists(records)
        state = sync_state(records)
        if not state.foreign:
            self._move(state)
        self._foreign, self._outdated = state.foreign, frozenset(state.outdated)
        self._full = state.full
        self._keep_device, self._unsettled = state.keep_device, state.unsettled
        self._granted = None if state.granted is None else frozenset(state.granted)
        self._catalogue_raw, self._catalogue, self.due = None, empty_catalogue(), {}
        self._take_catalogue(records)
        self.excluded, self._unheard = context.excluded, context.unheard
        self.due = dict(context.due)
        self.losers.adopt(records)
        self.forget_reports()
        self.reported = {}

    @property
    def resetting(self) -> bool:
        """Whether its bases belong to a history that it has given up (R29)."""
        return self._foreign

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
            and (self._foreign or sync_state(records).cursor == self.cursor),
            "LOCAL-DURABLE",
            f"{self.name} came back with another outbox, list or cursor than it had",
        )
        self.forget_reports()

    def forget_reports(self) -> None:
        """A crash ends the cycle that would have reported; the lists still have everything."""
        self.unreported, self.unreported_conflicts = {}, {}
        self.forget_questions()
        self.losers.forget_reports()

    def forget_questions(self) -> None:
        """What was asked came to nothing: no commit followed."""
        self.calls, self.questions = {}, {}

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
        known = self._catalogue.by_name
        switched = self._take_catalogue(records) if META_CATALOGUE in batch else []
        commit = DeviceCommit(batch, old, records, self._prefixes)
        was_foreign, keep_device = self._foreign, self._keep_device
        excluded = self.excluded
        if commit.sync:
            self._take_grant(records, sync_state(records))
        moved = self._take_state(sync_state(records)) if commit.sync else ()
        fresh = [info.name for info in switched]
        # What the cursor is said to speak of from now on has to be there, all of it (R31).
        fresh += [name for name in excluded if name not in self.excluded and name not in fresh]
        if switched and keep_device and not self._foreign:
            self._owe_newer(records, known, switched)
        self._check_outbox(commit, reset=bool(switched) or self._foreign != was_foreign)
        if META_INFLIGHT in batch:
            self._check_clock(commit, records)
        self._check_lists(commit)
        self._check_losers(commit, batch, old)
        self._check_prefix(commit, moved, fresh)
        if switched and self.unanswered:
            self._check_deletions_stay(commit, old, known, switched)
        self._check_views(commit)
        self._check_due(commit)
        self.forget_questions()
        self.by_person = {}

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
            left = {i.number for n, i in known.items() if i.synced and not now[n].synced}
            self._check_leaving(records, left)
            self.due = {ref: state for ref, state in self.due.items() if now[ref[0]].synced}
            for name, info in now.items():
                if info.synced and not (name in known and known[name].synced):
                    self.excluded = self.excluded | {name: None}
                    self._owe_local(records, info)
            every = self._catalogue.scope is None
            self._unheard = every and (self._unheard or was.scope is not None)
        elif self._unheard:
            # From a list of names to all: the cursor speaks of none it had not heard of.
            names = dict.fromkeys(n for n, i in now.items() if n not in known and i.synced)
            self.excluded = self.excluded | names
        return [i for i in now.values() if i.name in known and i.table != known[i.name].table]

    def _check_leaving(self, records: Records, numbers: set[int]) -> None:
        """Nothing that is pending may leave the scope (R31)."""
        for sequence in self.outbox.values() if numbers else ():
            for kind in (READY, HELD):
                raw = records.get(sequence_key(kind, sequence))
                row = None if raw is None else decode_pending(sequence_key(kind, sequence), raw)
                for op in () if row is None else row.operations:
                    if op.collection in numbers:
                        self.checks.fail(
                            "NO-SILENT-LOSS",
                            f"a collection left the scope of {self.name} with the pending write "
                            f"of {op.entity_id.hex()}",
                        )

    def _grants(self, name: str) -> bool:
        return self._granted is None or name in self._granted

    def _take_grant(self, records: Records, state: ReplicaState) -> None:
        """R31: what is granted anew is not spoken of by the cursor until it was pulled; of what is
        granted no more nothing stays, and nothing is pending."""
        granted = None if state.granted is None else frozenset(state.granted)
        if granted == self._granted:
            return
        was, self._granted = self._granted, granted
        synced = {info.name: info for info in self._catalogue.by_name.values() if info.synced}
        if was is not None:
            anew = synced.keys() if granted is None else granted
            gained = dict.fromkeys(sorted(name for name in anew if name not in was))
            self.excluded = self.excluded | gained
            self._unheard |= granted is None and self._catalogue.scope is None
        lost = {info.prefix: name for name, info in synced.items() if not self._grants(name)}
        self._check_gone(records, lost)

    def _check_gone(self, records: Records, lost: Mapping[bytes, str]) -> None:
        for key, raw in records.items() if lost else ():
            if key[:5] in lost and not raw[0] & TOMBSTONE:
                self.checks.fail(
                    "PREFIX",
                    f"{self.name} keeps {lost[key[:5]]}/{key[5:].hex()}, which its token grants no "
                    "more",
                )
        self.checks.passed("PREFIX", len(lost))

    def _take_state(self, state: ReplicaState) -> Iterable[Ref]:
        """Follow the cursor; returns the entities that must look different now."""
        self._unsettled = state.unsettled
        self._outdated = frozenset(state.outdated)
        if state.foreign:
            # R29: until the reset is through, the bases are those of the old history.
            self._foreign = self._full = True
            self._keep_device = state.keep_device
            return ()
        history, cursor, have = self.history, self.cursor, self.have
        self._move(state)
        self._keep_device = False
        if self._foreign or history is not self.history:
            self._foreign = False
        elif state.cursor < cursor:
            self.checks.fail(
                "ORDER", f"the cursor of {self.name} went from {cursor} back to {state.cursor}"
            )
        if not state.full and not state.uncovered:
            self.excluded = {}
            self._unheard = False
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

    def _check_prefix(self, commit: DeviceCommit, moved: Iterable[Ref], fresh: list[str]) -> None:
        """``fresh`` are collections of which everything has to be compared."""
        by_name, by_number = self._catalogue.by_name, self._catalogue.by_number
        records, scope = commit.records, self._catalogue.scope
        refs: dict[Ref, None] = {
            (info.name, entity_id): None for info, entity_id in commit.entities
        }
        for number, entity_id in commit.bases:
            refs[by_number[number].name, entity_id] = None
        refs.update(dict.fromkeys(moved))
        if fresh:
            prefixes = {by_name[name].prefix: name for name in fresh if name in by_name}
            for key in records:
                if key[:5] in prefixes:
                    refs[prefixes[key[:5]], key[5:]] = None
            for ref in self.history.refs() if self.history is not None else ():
                if ref[0] in fresh:
                    refs[ref] = None
        compared: dict[str, bool] = {}
        for ref in refs:
            name = ref[0]
            info = by_name.get(name)
            if name not in compared:
                in_scope = (scope is None or name in scope) if info is None else info.synced
                compared[name] = in_scope and name not in self.excluded and self._grants(name)
            if compared[name]:
                self._compare_base(records, info, ref)
        self.checks.passed("PREFIX", len(refs))

    def _check_deletions_stay(
        self,
        commit: DeviceCommit,
        old: Mapping[bytes, bytes | None],
        known: Mapping[str, CollectionInfo],
        switched: list[CollectionInfo],
    ) -> None:
        """What was accepted without an answer, was deleted by somebody since, and forgotten, does
        not come back with a reset unless a policy says so (R28)."""
        history = self.history
        if history is None:
            return
        for sequence in self.outbox.values():
            raw = commit.records.get(sequence_key(READY, sequence))
            pending = None if raw is None else decode_pending(sequence_key(READY, sequence), raw)
            if pending is None or pending.transaction_id not in self.unanswered:
                continue
            accepted = history.accepted.get(pending.transaction_id)
            if accepted is None or not 0 < accepted[0] <= history.floor:
                continue
            for op in pending.operations:
                info = self._catalogue.by_number[op.collection]
                ref = (info.name, op.entity_id)
                if info not in switched or op.payload is None or ref in self.calls:
                    continue
                was = old.get(known[info.name].prefix + op.entity_id)
                unaware = was is not None and unpack_pending(was)[2] < accepted[0]
                wrote = ref in history.commits[accepted[0]]
                if unaware and wrote and history.state_at(ref, self.cursor)[1] is None:
                    self.checks.fail(
                        "NO-RESURRECTION",
                        f"{self.name} would bring back {ref[0]}/{ref[1].hex()}, which it had "
                        f"accepted as {accepted[0]}, and which was deleted since",
                    )
                self.checks.passed("NO-RESURRECTION")

    def check_everything(self, records: Records) -> None:
        """PREFIX without induction, for the end of a run and after restarts."""
        if self._foreign:
            return
        for info in self._catalogue.by_name.values():
            if not info.synced or info.name in self.excluded or not self._grants(info.name):
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
        mark: Mark | None = None
        if not flags & DIRTY:
            _, _, stored, device, timestamp = unpack_entity(raw)
            base = None if flags & TOMBSTONE else raw[ENTITY_HEAD:]
            mark = device, timestamp
        elif not flags & HAS_BASE:
            stored, base = unpack_pending(raw)[2], None
        else:
            stored = unpack_pending(raw)[2]
            row = decode_base(records[base_key(info.number, ref[1])])
            if row.version != stored:
                self.checks.fail("PREFIX", f"{self.name}: two base versions of {ref[1].hex()}")
            base = row.payload
            mark = row.device_id, row.timestamp
        if payload is not None or base is not None:
            if base != payload or stored != version:
                self._differs(ref, (stored, base), (version, payload))
            if mark is not None:
                self._check_mark(ref, version, mark)
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

    def _check_mark(self, ref: Ref, version: int, mark: Mark) -> None:
        """Who wrote it, and when, is what the server says, once clamped (R27). The verdict on a
        transaction that comes again, and was overwritten meanwhile, does not say so any more."""
        history = self.history
        assert history is not None
        if mark != history.marks[version] and history.latest(ref)[0] == version:
            self.checks.fail(
                "CLOCK",
                f"{self.name} has {mark} as device and timestamp of {ref[0]}/{ref[1].hex()} "
                f"version {version}; the server's are {history.marks[version]}",
            )

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
                    self._check_later(commit, now)
                continue
            if now is None:
                del self.outbox[was.transaction_id]
                if not self._explained(commit, was, discards.get(sequence)):
                    self._check_dropped(commit, was, {}, rule)
                continue
            if was.operations != now.operations:
                left = {(op.collection, op.entity_id): op.payload for op in now.operations}
                self._check_dropped(commit, was, left, rule)

    def _check_later(self, commit: DeviceCommit, made: PendingTransaction) -> None:
        """CLOCK: what is written is later than what it replaces, however slow the device's own
        clock is."""
        for op in made.operations:
            raw = commit.records.get(base_key(op.collection, op.entity_id))
            if raw is not None and decode_base(raw).timestamp >= made.timestamp:
                self.checks.fail(
                    "CLOCK",
                    f"{self.name} wrote {op.entity_id.hex()} at {made.timestamp}, which is not "
                    f"after what it replaced, {decode_base(raw).timestamp}",
                )
        self.checks.passed("CLOCK")

    def _check_clock(self, commit: DeviceCommit, records: Records) -> None:
        """CLOCK: with an answer to all that was pending, the device's logical clock is not ahead of
        the server's any more, so that what it writes next does not win for ever (R27)."""
        if self.outbox or META_HEAD not in records:
            return
        listed = {sequence for sequence, _, _ in commit.discards}
        gone = [
            was.transaction_id
            for sequence, (was, now) in commit.outbox.items()
            if was is not None and now is None and sequence not in listed
        ]
        answers = [self.answers[identity] for identity in gone if identity in self.answers]
        if any(answer.verdict == Verdict.ACCEPTED for answer in answers):
            latest = timestamp_from_ms(self._server_clock.now_ms()) | 0xFFFF
            ahead = decode_head(records[META_HEAD]).timestamp
            self.checks.that(
                ahead <= latest,
                "CLOCK",
                f"the clock of {self.name} stays ahead of the server's, {ahead} of {latest}",
            )

    # ------------------------------------------------------------ what is to become pending

    def _owe_local(self, records: Records, info: CollectionInfo) -> None:
        """A wider scope makes what was written outside of it pending (R31)."""
        for key, raw in records.items():
            if key[:5] == info.prefix and not raw[0] & (DIRTY | TOMBSTONE):
                if not unpack_entity(raw)[2]:
                    self.due[info.name, key[5:]] = 0, raw[ENTITY_HEAD:]

    def _owe_newer(
        self, records: Records, known: Mapping[str, CollectionInfo], switched: list[CollectionInfo]
    ) -> None:
        """A reset that keeps the device's side commits what the new history has not, or has older,
        once more (R29)."""
        for info in switched:
            old = known[info.name].prefix
            for key, raw in records.items():
                if key[:5] != old or raw[0] & DIRTY:
                    continue
                version, payload = unpack_entity(raw)[2], payload_of(raw)
                now = records.get(info.prefix + key[5:])
                if now is None:
                    owed = payload is not None
                else:
                    clean = not now[0] & DIRTY
                    owed = clean and unpack_entity(now)[2] < version and payload_of(now) != payload
                if owed:
                    self.due[info.name, key[5:]] = version, payload

    def _check_due(self, commit: DeviceCommit) -> None:
        due = self.due
        if not due:
            return
        by_name, by_number = self._catalogue.by_name, self._catalogue.by_number
        for _, now in commit.outbox.values():
            for op in () if now is None else now.operations:
                due.pop((by_number[op.collection].name, op.entity_id), None)
        if META_ADOPT in commit.records:
            return
        for ref, (version, payload) in due.items():
            info = by_name[ref[0]]
            raw = commit.records.get(info.prefix + ref[1])
            stored = 0 if raw is None else unpack_entity(raw)[2]
            overtaken = version and stored >= version
            there = stored and base_payload(commit.records, info, ref[1]) == payload
            if info.synced and not overtaken and not there:
                self.checks.fail(
                    "NO-SILENT-LOSS",
                    f"{ref[0]}/{ref[1].hex()} was to become pending on {self.name}, and did not",
                )
        self.checks.passed("NO-SILENT-LOSS", len(due))
        self.due = {}

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
            if all(self._grants(name) for name, _, _ in listed["operations"]):
                self._check_refused(was.transaction_id, listed["code"])
            return True
        answer = self.answers.get(was.transaction_id)
        if answer is None or answer.verdict not in (Verdict.ACCEPTED, Verdict.SUPERSEDED):
            return False
        history = self.answered_by
        return history is not None and was.transaction_id in history.accepted

    def _check_refused(self, identity: bytes, code: str) -> None:
        """What is withdrawn as refused was refused, and for that reason (R4, R5)."""
        if code not in _REFUSED_WHOLE:
            return
        answer = self.answers.get(identity)
        verdict = answer is not None and answer.verdict == Verdict.REJECTED and answer.code == code
        self.checks.that(
            verdict or code in self.refused.get(identity, ()),
            "NO-SILENT-LOSS",
            f"{self.name} withdrew {identity.hex()} as {code!r}, which nobody has said of it",
        )

    def _check_dropped(
        self,
        commit: DeviceCommit,
        was: PendingTransaction,
        left: Mapping[tuple[int, bytes], bytes | None],
        rule: str,
    ) -> None:
        """Operations may go, or change, only where the server has the bytes already (R24), or
        where a policy or a person said so, or where the server has had the transaction and
        forgotten its id since (R14)."""
        known = None if self.history is None else self.history.accepted.get(was.transaction_id)
        if known is not None and self.history is not None and known[0] <= self.history.floor:
            return
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
        that went with it. It has them no more if somebody has written since; then it has had
        those of the later one, which another copy of this device pushed without this one (R30)."""
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
                on_top = number > sequence and self._had(was, (info.name, entity_id), op.payload)
                if not stays and (on_top or op.payload == base):
                    return True
        return False

    def _had(self, was: PendingTransaction, ref: Ref, payload: bytes | None) -> bool:
        """Whether the server accepted the transaction with just these bytes. With others it says
        nothing of what is below: a merge may have taken the later write alone."""
        known = None if self.history is None else self.history.accepted.get(was.transaction_id)
        return known is not None and self._truth(ref, known[0]) == payload

    # ------------------------------------------------------------ what was decided against

    def _check_losers(
        self, commit: DeviceCommit, batch: Batch, old: Mapping[bytes, bytes | None]
    ) -> None:
        """R4: what was decided against in this commit is kept in it."""
        added = self.losers.on_commit(batch, old)
        by_person = self._decided_by_person(commit, old)
        self.losers.check_undecided([*self.questions, *by_person], added)
        for ref, asked in {**self.questions, **by_person}.items():
            if ref in self.open_conflicts:
                continue
            info = self._catalogue.by_name[ref[0]]
            raw = commit.records.get(info.prefix + ref[1])
            discarded = _discarded_payloads(commit, ref)
            outcomes = [(asked[0][0], None if raw is None else payload_of(raw))]
            if len(asked) > 1 and asked[0][1].action is Action.MERGE:
                # The steps of a chain, each decided on what the one before it became (R25): the
                # first question was about the newest and decided nothing but that. Where some are
                # withdrawn after all, nobody knows which question was about what is left.
                steps = [] if discarded else _steps(asked[1:])
                outcomes = [(c, outcome_of(c, a)) for c, a in steps]
            for conflict, outcome in outcomes:
                self.losers.check(
                    conflict,
                    outcome,
                    added.get(ref, ()),
                    discarded,
                    combines=ref not in by_person,
                    accepted=self._accepted_in(commit, (info.number, ref[1])),
                )

    def _decided_by_person(
        self, commit: DeviceCommit, old: Mapping[bytes, bytes | None]
    ) -> dict[Ref, list[Question]]:
        found = {}
        for name, entity_id in self.by_person:
            info = self._catalogue.by_name[name]
            raw = old.get(conflict_key(info.number, entity_id))
            if raw is None:
                continue
            entity = info.prefix + entity_id
            # Where the view does not change, its row need not be in the commit either.
            was = old[entity] if entity in old else commit.records.get(entity)
            local = None if was is None else payload_of(was)
            place = (info.number, entity_id)
            conflict = decode_conflict(raw, name, place, local)
            found[name, entity_id] = [(conflict, ConflictResolution.skip())]
        return found

    def _accepted_in(self, commit: DeviceCommit, place: tuple[int, bytes]) -> bool:
        """Whether a transaction on the entity left the outbox because the server has it."""
        for was, now in commit.outbox.values():
            answer = None if was is None else self.answers.get(was.transaction_id)
            if answer is None or now is not None or was is None:
                continue
            on_it = any((op.collection, op.entity_id) == place for op in was.operations)
            if on_it and answer.verdict in (Verdict.ACCEPTED, Verdict.SUPERSEDED):
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
        self._check_held(commit)

    def _check_held(self, commit: DeviceCommit) -> None:
        """Nothing that touches an open conflict, or is built on what does, may be pushed (R25)."""
        records = commit.records
        for _, now in commit.outbox.values():
            if now is None or now.held:
                continue
            for op in now.operations:
                ref = (self._catalogue.by_number[op.collection].name, op.entity_id)
                below = op.previous and sequence_key(HELD, op.previous) in records
                if ref in self.open_conflicts or below:
                    self.checks.fail(
                        "SURFACED-ONCE",
                        f"{self.name} would push a write of {ref[0]}/{ref[1].hex()}, which nobody "
                        "has decided about",
                    )
        for number, entity_id, conflict in commit.conflicts:
            raw = records.get(self._catalogue.by_number[number].prefix + entity_id)
            if conflict is not None and raw is not None and raw[0] & DIRTY:
                self.checks.that(
                    sequence_key(HELD, unpack_pending(raw)[5]) in records,
                    "SURFACED-ONCE",
                    f"{self.name} does not hold what is in conflict on {entity_id.hex()}",
                )
        self._check_why_held(commit)

    def _check_why_held(self, commit: DeviceCommit) -> None:
        """Nothing is held but by an open conflict, or by what is below it and held itself: nobody
        could ever let it go."""
        freed = any(conflict is None for _, _, conflict in commit.conflicts)
        pairs = commit.outbox.values()
        if not freed and not any(one and one.held for pair in pairs for one in pair):
            return
        holding: set[tuple[int, int, bytes]] = set()
        for sequence in sorted(self.outbox.values()):
            key = sequence_key(HELD, sequence)
            raw = commit.records.get(key)
            if raw is None:
                continue
            operations = decode_pending(key, raw).operations
            reasons = (
                (op.previous, op.collection, op.entity_id) in holding
                or conflict_key(op.collection, op.entity_id) in commit.records
                for op in operations
            )
            self.checks.that(
                any(reasons),
                "LIVENESS",
                f"{self.name} holds commit {sequence}, and nothing holds it",
            )
            holding.update((sequence, op.collection, op.entity_id) for op in operations)

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
        self.losers.check_report(report.overruled)
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
        groups: dict[bytes, None] = {}
        for info, entity_id in commit.entities:
            raw = records.get(info.prefix + entity_id)
            if info.name == GROUP_COLLECTION and entity_id[:15] not in groups:
                groups[entity_id[:15]] = None
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
        elif sequence in commit.pending:
            pending = commit.pending[sequence]
        else:
            for kind in (READY, HELD):
                raw = commit.records.get(sequence_key(kind, sequence))
                if raw is not None:
                    pending = decode_pending(sequence_key(kind, sequence), raw)
            commit.pending[sequence] = pending
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

    def on_push(self, records: Records, request: PushRequest) -> None:
        """Every operation names the version that the device has as its base: what somebody wrote
        after that is a conflict (R13)."""
        for transaction in request.transactions:
            for op in transaction.operations:
                name = request.collections[op.collection]
                raw = records.get(self._catalogue.by_name[name].prefix + op.entity_id)
                version = None if raw is None else version_of(raw)
                self.checks.that(
                    version == op.base_version,
                    "NO-LOST-UPDATE",
                    f"{self.name} pushes a write of {name}/{op.entity_id.hex()} as made on "
                    f"{op.base_version}, and has {version}",
                )

    def on_recommitted(self, records: Records, entry: DiscardedTransaction) -> None:
        """A discarded transaction was committed again: all of it is in the view."""
        for name, entity_id, payload in entry.operations:
            info = self._catalogue.by_name[name]
            raw = records.get(info.prefix + entity_id)
            self.checks.that(
                (None if raw is None else payload_of(raw)) == payload,
                "READ-YOUR-WRITES",
                f"{self.name} does not read what it has committed again, {name}/{entity_id.hex()}",
            )

    def on_written_back(self, records: Records, value: OverruledValue) -> None:
        """An overruled value was written back: the view has it again."""
        raw = records.get(self._catalogue.by_name[value.collection].prefix + value.id_bytes)
        view = leaves(None if raw is None else payload_of(raw))
        due = lost_leaves(value.base_payload, value.payload, value.won_payload)
        if value.path:
            held = leaves(value.payload)
            due = [((*value.path, *inner), leaf) for inner, leaf in held.items()]
        self.checks.that(
            all(view.get(path) == leaf for path, leaf in due),
            "READ-YOUR-WRITES",
            f"{self.name} does not read what it has written back to {value.collection}/"
            f"{value.id_bytes.hex()}",
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
        asked = self.questions.setdefault(ref, [])
        asked.append((conflict, ConflictResolution.skip() if answer is None else answer))
        latest = timestamp_from_ms(self._server_clock.now_ms()) | 0xFFFF
        self.checks.that(
            conflict.local_timestamp <= latest,
            "CLOCK",
            f"{self.name} asked its policy about {ref[0]}/{ref[1].hex()} with a time that has not "
            "come yet",
        )
        if not first or self._foreign or ref[0] in self._outdated or self.history is None:
            return
        if conflict.remote_payload is not None:
            mark = conflict.remote_device, conflict.remote_timestamp
            if conflict.remote_version <= self.history.head:
                self._check_mark(ref, conflict.remote_version, mark)
        base, remote = conflict.base_version, conflict.remote_version
        if base == remote and any(
            answer.verdict == Verdict.SUPERSEDED for answer in self.answers.values()
        ):
            # What it was built on is gone: another copy of this device pushed something else.
            return
        if conflict.remote_payload is None and conflict.base_payload is None:
            sequence = self.outbox.get(conflict.transaction_id, 0)
            if any(first <= sequence <= last for first, last, _ in self._unsettled):
                # It may have been accepted, and deleted since; nobody can know any more (R28).
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


def outcome_of(conflict: Conflict, answer: ConflictResolution) -> bytes | None:
    if answer.action is Action.MERGE:
        return answer.payload
    keeps = answer.action is Action.KEEP_LOCAL
    return conflict.local_payload if keeps else conflict.remote_payload


def _steps(asked: list[Question]) -> Iterator[Question]:
    """Questions without those about the newest write of a chain that a further decision of the
    same commit began with: the first step of its chain has the same two sides under it."""
    for question, following in pairwise(asked):
        now, then = question[0], following[0]
        if (now.base_payload, now.remote_payload) != (then.base_payload, then.remote_payload):
            yield question
    yield from asked[-1:]


def _discarded_payloads(commit: DeviceCommit, ref: Ref) -> list[bytes | None]:
    """What the transactions that this commit withdraws wrote to an entity."""
    records = [cbor.decode_trusted(new) for _, _, new in commit.discards if new is not None]
    return [
        payload
        for record in records
        for name, entity_id, payload in record["operations"]
        if (name, entity_id) == ref
    ]


def base_payload(records: Records, info: CollectionInfo, entity_id: bytes) -> bytes | None:
    """The last server state of an entity that the device knows."""
    raw = records.get(info.prefix + entity_id)
    if raw is None or not raw[0] & DIRTY:
        return None if raw is None else payload_of(raw)
    if not raw[0] & HAS_BASE:
        return None
    return decode_base(records[base_key(info.number, entity_id)]).payload
