"""The device's side of a cycle in terms of its database: each method one storage commit.

The cycle (``cycle``) decides what to ask the server and calls these in order; what happens to
pending transactions is ``rebase``'s. Nothing here does network I/O or waits.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from operator import add, ge
from typing import Any, Protocol, cast

from msgspec import Struct, field
from msgspec.structs import replace

from entidb import cbor
from entidb.collector import paused
from entidb.db import Database, overruled
from entidb.db.adopt import adopt_step, has_adoption
from entidb.db.catalogue import CollectionInfo
from entidb.db.fields import with_field
from entidb.db.maintenance import sweep_garbage
from entidb.db.outbox import (
    DiscardedTransaction,
    discard_key,
    read_discarded,
    read_pending,
)
from entidb.db.overruled import (
    OVERRULED_DAYS,
    OVERRULED_MAX,
    OverruledValue,
    read_overruled,
)
from entidb.db.records import (
    CONFLICT,
    DIRTY,
    HAS_BASE,
    META_ADOPT,
    META_SYNC,
    OUTBOX_FIRST,
    PENDING_HEAD,
    READY,
    REMOTE,
    TOMBSTONE,
    BaseRow,
    EntityRow,
    PendingOp,
    PendingTransaction,
    base_key,
    conflict_key,
    decode_entity,
    decode_pending,
    end_of,
    pack_entity,
    sequence_key,
    sequence_of,
    split_numbered_key,
    table_prefix,
    unpack_entity,
    unpack_outbox_first,
    unpack_pending,
    version_of,
)
from entidb.db.replica import (
    HAVE_RANGES_MAX,
    Inflight,
    ReplicaState,
    Stage,
    add_to_ranges,
    decode_state,
    ranges_above,
    ranges_of,
)
from entidb.db.transaction import Writes
from entidb.db.writer import Ref, Writer
from entidb.errors import (
    CborDecodeError,
    ConfigError,
    ConflictError,
    CorruptionError,
    InvalidNameError,
    ProtocolError,
    SyncCodecError,
    SyncStateError,
)
from entidb.protocol import (
    ColumnRows,
    PullRequest,
    PullResponse,
    PushOperation,
    PushResponse,
    PushTransaction,
    Verdict,
    column_rows,
    expanded,
)
from entidb.storage import Snapshot
from entidb.sync.conflict import Action, Conflict, ConflictPolicy, ConflictResolution
from entidb.sync.grants import take_grant
from entidb.sync.policies import resolve_policy
from entidb.sync.rebase import (
    Rebase,
    RebaseReport,
    Withdrawn,
    decode_conflict,
)
from entidb.sync.room import STAGED_BYTES_MAX, check_room, staged_bytes
from entidb.types import (
    ID_BYTES,
    OPERATION_OVERHEAD_BYTES,
    SEQUENCE_MAX,
    check_name,
    timestamp_from_ms,
)

_DAY_MS = 24 * 3600 * 1000
#: What is kept of a server's words for a refusal.
_CODE_CHARS_MAX = 100
_MESSAGE_CHARS_MAX = 1000
#: Beyond this (the year 6429) a hybrid logical clock comes near the end of its 64 bits.
TIME_MS_MAX = 2**47
#: As a timestamp: by so much (a second) a clock may be ahead of the server's before pending
#: transactions are looked through for it. Clocks that are kept in step differ by less, and the
#: server makes up for that (R27).
CLOCK_SLACK = timestamp_from_ms(1000)
#: Rows moved or scanned at a time while publishing: bounds memory, not correctness.
_PAGE_ROWS = 2000
#: Keys read at a time to count them.
_COUNTED_ROWS = 20_000
#: Outbox rows read before it is known how large they are here.
_FIRST_ROWS = 32

# Plain numbers: looking a member up in its enum for every transaction costs more than the rest.
_ACCEPTED, _SUPERSEDED, _CONFLICT = (
    int(verdict) for verdict in (Verdict.ACCEPTED, Verdict.SUPERSEDED, Verdict.CONFLICT)
)


class BatchLimits(Struct, frozen=True):
    """How much one push batch may hold; a larger single transaction is sent alone. Transactions
    committed after ``sequence_max`` wait for the next cycle, so that a cycle ends even while
    somebody keeps writing. Those in ``without``, by their sequence, are left out, with all that is
    built on them."""

    operations_max: int = 5000
    bytes_max: int = 4 * 1024 * 1024
    sequence_max: int = SEQUENCE_MAX
    transactions_max: int = SEQUENCE_MAX
    collections_max: int = SEQUENCE_MAX
    without: frozenset[int] = frozenset()
    #: The server's clock as the newest answer said it, in ms; 0 if none did.
    server_ms: int = 0


class PushBatch(Struct):
    """A batch that is in flight (R5): what is sent, and what it was made of.

    Of each transaction its outbox row (``keys``, ``rows``) and how many operations it has
    (``counts``); ``chained`` are the places of those with an operation that follows another
    pending one on the same entity. Of each operation, one after another, the collection's number
    and the entity's row (``entity_rows``), which is still the entity's own while the database's
    ``commit_mark`` is ``mark``. Columns and not objects: a batch has thousands of each.
    """

    keys: list[bytes]
    rows: list[bytes]
    counts: list[int]
    chained: set[int]
    numbers: list[int]
    entity_keys: list[bytes]
    entity_rows: list[bytes]
    ranges: list[list[int]]
    collections: list[str]
    transactions: list[PushTransaction]
    cursor: int
    bytes: int
    mark: int

    @property
    def sequences(self) -> list[int]:
        """The local commits that made its transactions."""
        return [sequence_of(key) for key in self.keys]

    def pending(self, index: int) -> PendingTransaction:
        """Its transaction number ``index`` as it was sent."""
        return decode_pending(self.keys[index], self.rows[index])


class Settled(Struct):
    """What settling did. ``pull`` says the cycle must pull before it pushes more than what is in
    flight; ``next_batch`` was prepared in the same commit."""

    accepted: int = 0
    accepted_operations: int = 0
    superseded: int = 0
    conflicts: int = 0
    rejected: int = 0
    pull: bool = False
    next_batch: PushBatch | None = None
    report: RebaseReport = field(default_factory=RebaseReport)


class SyncApplier(Protocol):
    """What a cycle needs of a device. Each method is one storage commit, or none where nothing
    changes; each can be the last thing that ever happens, and the next cycle goes on from there.
    """

    def state(self) -> ReplicaState: ...

    def stage(self) -> Stage | None: ...

    def scope(self) -> list[str] | None:
        """Names to ask the server for; None for all."""
        ...

    @property
    def device_id(self) -> bytes: ...

    def sequence(self) -> int:
        """The newest local commit."""
        ...

    def ready(self) -> int:
        """How many transactions wait to be pushed."""
        ...

    def bind(self, db_id: str, history: bytes) -> None:
        """Remember whose replica this is. Raises ``ConfigError`` if it is another database's."""
        ...

    def inflight(self) -> list[PushBatch]:
        """The batches that may have been sent and have no answer (R5), exactly as they were sent,
        in order: none, one, or two."""
        ...

    def prepare(self, limits: BatchLimits) -> PushBatch | None:
        """Choose the next batch and make it durable as in flight; None if nothing is ready."""
        ...

    def prepare_after(self, batch: PushBatch, limits: BatchLimits) -> PushBatch | None:
        """Choose the batch after ``batch``, the only one in flight, and make it durable as in
        flight behind it. It touches no entity that ``batch`` touches, so it is right whatever
        becomes of ``batch``; None if there is no such batch."""
        ...

    def settle(
        self,
        batch: PushBatch,
        response: PushResponse,
        limits: BatchLimits | None,
        following: PushBatch | None = None,
    ) -> Settled:
        """Apply the verdicts (R18) on the first batch in flight; ``following`` is the other, if
        there is one. If ``limits`` are given and no pull is needed first, prepare one more, as
        ``prepare`` or ``prepare_after`` would."""
        ...

    def doubt(self) -> None:
        """What is in flight was sent, and its answer is lost: until a pull has shown what became of
        it, remember that the server may have accepted it (R28)."""
        ...

    def unsend(self) -> None:
        """The batches in flight count as not sent (R5): an answer proves that nothing of what was
        sent now was decided. A pull comes before anything of it is withdrawn, because an earlier
        sending may have arrived."""
        ...

    def refuse(self, batch: PushBatch, code: str, message: str) -> RebaseReport:
        """Withdraw the transactions of ``batch``, the first in flight, which the server refuses
        for good (R4), with those built on them. Nothing is in flight afterwards."""
        ...

    def still_pending(self, sequences: Iterable[int]) -> list[int]:
        """Those of these local commits whose transactions are in the outbox."""
        ...

    def confirm(self, cursor: int) -> None:
        """A pull has reached ``cursor`` and brought nothing but the device's own commits. Not
        worth a storage commit (R10): the next one that is made anyway takes the cursor along."""
        ...

    def apply(self, request: PullRequest, response: PullResponse) -> RebaseReport:
        """Apply one page that reaches the head: data, cursor, rebase, feed (R20, R22)."""
        ...

    def stage_page(
        self, request: PullRequest, response: PullResponse, full: list[str] | None
    ) -> Stage:
        """Keep one page of several, durable and out of sight. ``full`` are the collections
        that come from nothing (None: all)."""
        ...

    def publish(self) -> RebaseReport:
        """Make a complete stage the database's state in one commit."""
        ...

    def restart_stage(self, *, full: bool) -> None:
        """Forget what is staged; ``full`` asks for everything from 0 at the next pull (R28)."""
        ...

    def grant(self, granted: list[str] | None) -> RebaseReport:
        """Make these collections (None: all) what the token grants, as the server has said (R31).
        Nothing may be in flight. Raises ``PermissionDeniedError`` where a reset is to keep what
        is not granted; then nothing changes."""
        ...

    def adopt(self) -> bool:
        """Make the next bounded part of entities pending that a wider scope or a reset brought
        up (R29, R31); whether there may be more."""
        ...

    def tidy(self) -> bool:
        """Remove a bounded part of what was replaced; whether there may be more."""
        ...


class DatabaseApplier:
    """The ``SyncApplier`` on an EntiDB database.

    ``policies`` maps collection names to policies (names or callables), ``default_policy`` is for
    the others. Of the values they decide against the newest ``overruled_max`` are kept, for
    ``overruled_days`` days (R4). A pull of several pages takes at most ``staged_bytes_max`` bytes,
    and leaves a quarter of the disk's free space. Only one engine uses a database at a time.
    """

    def __init__(
        self,
        database: Database,
        *,
        default_policy: str | ConflictPolicy = "server_wins",
        policies: Mapping[str, str | ConflictPolicy] | None = None,
        overruled_max: int = OVERRULED_MAX,
        overruled_days: float = OVERRULED_DAYS,
        staged_bytes_max: int = STAGED_BYTES_MAX,
    ) -> None:
        self.database = database
        self._staged_bytes_max = staged_bytes_max
        self._overruled_max = overruled_max
        self._overruled_days = overruled_days
        self._heard_ms = 0
        self._default = resolve_policy(default_policy)
        self._confirmed = 0
        self._policies = {name: resolve_policy(p) for name, p in (policies or {}).items()}

    # ------------------------------------------------------------ reading

    @property
    def device_id(self) -> bytes:
        return self.database.device_id

    def sequence(self) -> int:
        return self.database.sequence

    def ready(self) -> int:
        return self.database.read_head().ready

    def state(self) -> ReplicaState:
        with self.database.storage.snapshot() as snapshot:
            raw = snapshot.get(META_SYNC)
        return ReplicaState() if raw is None else decode_state(raw)

    def stage(self) -> Stage | None:
        with self.database.view() as view:
            return view.stage

    def scope(self) -> list[str] | None:
        scope = self.database.scope
        return None if scope is None else sorted(scope)

    def inflight(self) -> list[PushBatch]:
        # Read before the snapshot is taken: what moves it later makes the rows stale.
        mark = self.database.commit_mark
        with self.database.view() as view:
            inflight = view.inflight
            if inflight is None:
                return []
            both = [ranges for ranges in (inflight.ranges, inflight.after) if ranges]
            batches = [_batch(view, ranges, mark) for ranges in both]
            if [batch.ranges for batch in batches] != both:
                raise _outbox_damaged("transactions that were sent before are missing from it")
            return batches

    def policy_for(self, collection: str) -> ConflictPolicy:
        return self._policies.get(collection, self._default)

    def _rebase(self, writer: Writer, server_ms: int, foreign: Set[int] = frozenset()) -> Rebase:
        keeps = self._overruled_max > 0
        return Rebase(writer, self.policy_for, server_ms, foreign=foreign, keeps=keeps)

    # ------------------------------------------------------------ binding

    def bind(self, db_id: str, history: bytes) -> None:
        state = self.state()
        check_replica_of(state, db_id)
        if state.db_id == db_id and state.history == history:
            return
        with self.database.write() as writer:
            writer.set_sync_state(replace(writer.sync_state, db_id=db_id, history=history))

    # ------------------------------------------------------------ push

    def prepare(self, limits: BatchLimits) -> PushBatch | None:
        head = self.database.read_head()
        if not head.ready:
            return None
        latest = _latest(limits.server_ms)
        if limits.server_ms and head.timestamp > latest + CLOCK_SLACK:
            with paused(), self.database.write() as writer:
                _lower_clock(writer, latest)
        with paused(), self.database.write() as writer:
            self._take_confirmed(writer)
            _check_ready(writer)
            batch = _choose(writer, limits, [], self.database.commit_mark)
            if batch is not None:
                writer.set_inflight(Inflight(batch.ranges))
            return batch

    def prepare_after(self, batch: PushBatch, limits: BatchLimits) -> PushBatch | None:
        with paused(), self.database.write() as writer:
            inflight = writer.inflight
            if inflight is None or inflight.ranges != batch.ranges or inflight.after:
                raise SyncStateError("the batch was settled already by another engine")
            mark = self.database.commit_mark
            after = _choose(writer, limits, batch.ranges, mark, frozenset(batch.entity_keys))
            if after is not None:
                writer.set_inflight(Inflight(batch.ranges, after.ranges))
                _still_fresh(batch, mark)
            return after

    def settle(
        self,
        batch: PushBatch,
        response: PushResponse,
        limits: BatchLimits | None,
        following: PushBatch | None = None,
    ) -> Settled:
        if len(response.results) != len(batch.transactions):
            raise ProtocolError(
                f"the server answered {len(response.results)} verdicts to {len(batch.keys)} "
                "transactions; nothing was settled"
            )
        check_verdicts(response)
        self._heard_ms = response.time
        with paused(), self.database.write() as writer:
            inflight = writer.inflight
            kept = [] if following is None else following.ranges
            if inflight is None or (inflight.ranges, inflight.after) != (batch.ranges, kept):
                raise SyncStateError("the batch was settled already by another engine")
            mark = self.database.commit_mark
            rebase = self._rebase(writer, response.time)
            settled = _Settling(writer, rebase, response).run(batch, batch.mark == mark)
            _lower_idle_clock(writer, _latest(response.time))
            next_batch = None
            if limits is not None and not settled.pull:
                apart = frozenset() if following is None else frozenset(following.entity_keys)
                taken = sorted([*batch.ranges, *kept])
                next_batch = _choose(writer, limits, taken, mark, apart)
            settled.next_batch = next_batch
            left = [kept] if kept else []
            if next_batch is not None:
                left.append(next_batch.ranges)
            writer.set_inflight(Inflight(*left) if left else None)
            if following is not None:
                _still_fresh(following, mark)
            return settled

    def doubt(self) -> None:
        with self.database.write() as writer:
            _doubt(writer)

    def unsend(self) -> None:
        with self.database.write() as writer:
            writer.set_inflight(None)

    def refuse(self, batch: PushBatch, code: str, message: str) -> RebaseReport:
        with paused(), self.database.write() as writer:
            inflight = writer.inflight
            if inflight is None or inflight.ranges != batch.ranges:
                raise SyncStateError("the batch was settled already by another engine")
            rebase = self._rebase(writer, writer.now_ms)
            reason = code[:_CODE_CHARS_MAX], message[:_MESSAGE_CHARS_MAX]
            for sequence in batch.sequences:
                transaction = rebase.load(sequence)
                if transaction is not None:  # else it was built on one before it
                    rebase.withdraw([transaction], *reason, [])
            rebase.release()
            writer.set_inflight(None)
            return rebase.report

    def still_pending(self, sequences: Iterable[int]) -> list[int]:
        with self.database.view() as view:
            return [sequence for sequence in sequences if view.pending(sequence) is not None]

    # ------------------------------------------------------------ pull

    def confirm(self, cursor: int) -> None:
        self._confirmed = cursor

    def _take_confirmed(self, writer: Writer) -> None:
        state, confirmed = writer.sync_state, self._confirmed
        if state.cursor < confirmed <= state.reached:
            # Only the cursor: what a wider scope still has to bring is no business of this pull.
            have = ranges_above(state.have, confirmed)
            writer.set_sync_state(replace(state, cursor=confirmed, have=have))
        if writer.sync_state.unsettled:
            # A pull has reached the head, and it was no reset: it showed what became of those.
            writer.set_sync_state(replace(writer.sync_state, unsettled=[]))

    def apply(self, request: PullRequest, response: PullResponse) -> RebaseReport:
        response = expanded(response)
        check_page(request, response)
        self._heard_ms = response.time
        with paused(), self.database.write() as writer:
            state = self._check_belongs(writer, request)
            foreign = _foreign_collections(writer, state)
            rebase = self._rebase(writer, response.time, foreign)
            _hear_clock(writer, response)
            _take_page(writer, rebase, response)
            rebase.release()
            _move_cursor(writer, state, response.cursor)
            _lower_idle_clock(writer, _latest(response.time))
            return rebase.report

    def stage_page(
        self, request: PullRequest, response: PullResponse, full: list[str] | None
    ) -> Stage:
        with paused():
            return self._stage_page(request, response, full)

    def _stage_page(
        self, request: PullRequest, response: PullResponse, full: list[str] | None
    ) -> Stage:
        rows = None if response.columns is None else column_rows(response.columns)
        check_page(request, response, rows)
        self._heard_ms = response.time
        with self.database.write() as writer:
            state = self._check_belongs(writer, request)
            stage = writer.stage
            if stage is None and full != [] and not request.full:
                # The stage this page continues was abandoned: as the first page of another it
                # would pass for everything there is.
                raise _scope_changed()
            if stage is None:
                stage = Stage(
                    history=request.history,
                    cursor=state.cursor,
                    floor=response.floor,
                    first_head=response.head,
                    full=full,
                    full_done=full == [],
                    delta_cursor=state.cursor,
                )
            if rows is not None and not _comes_once(stage, response, rows):
                response, rows = expanded(response), None
            size = stage.size + staged_bytes(response)
            check_room(self.database.storage, size, self._staged_bytes_max)
            stage = replace(stage, size=size)
            _hear_clock(writer, response, rows)
            if rows is None:
                stage = _stage_operations(writer, stage, request, response)
            else:
                stage = _stage_rows(writer, stage, response, rows)
            writer.set_stage(stage)
            return stage

    def publish(self) -> RebaseReport:
        with paused(), self.database.write() as writer:
            stage = writer.stage
            if stage is None:
                raise SyncStateError("there is nothing staged to publish")
            state = writer.sync_state
            if stage.history != state.history or stage.cursor != state.cursor:
                raise SyncStateError("the stage belongs to another state; sync again")
            _check_adopted(writer)
            foreign = _foreign_collections(writer, state)
            rebase = self._rebase(writer, stage.time_ms, foreign)
            _publish(writer, rebase, stage, state)
            rebase.release()
            return rebase.report

    def restart_stage(self, *, full: bool) -> None:
        with self.database.write() as writer:
            writer.abandon_stage()
            state = writer.sync_state
            if full and not state.full:
                writer.set_sync_state(replace(state, full=True))

    def grant(self, granted: list[str] | None) -> RebaseReport:
        with paused(), self.database.write() as writer:
            if writer.inflight is not None:
                raise SyncStateError("a push is in flight; it must be settled before a grant (R5)")
            _check_adopted(writer)
            rebase = self._rebase(writer, writer.now_ms)
            take_grant(writer, rebase, granted)
            rebase.release()
            return rebase.report

    def adopt(self) -> bool:
        if not has_adoption(self.database):
            return False
        return adopt_step(self.database, keeps=self._overruled_max > 0)

    def tidy(self) -> bool:
        return sweep_garbage(self.database) or self._prune_overruled()

    def _prune_overruled(self) -> bool:
        """Forget a bounded part of the overruled values that are too many or too old. Their age
        counts by the earlier one of two clocks, this device's and the one last heard from the
        server: one that is wrong by years forgets nothing."""
        now_ms = min(self.database.clock.now_ms(), self._heard_ms)
        before_ms = int(now_ms - self._overruled_days * _DAY_MS)
        with self.database.view() as view:
            head = overruled.read_head(view)
        if not head.count or (head.count <= self._overruled_max and head.oldest_ms >= before_ms):
            return False
        with self.database.write() as writer:
            return overruled.prune(writer, count_max=self._overruled_max, before_ms=before_ms)

    def _check_belongs(self, writer: Writer, request: PullRequest) -> ReplicaState:
        """R22: history and cursor are still those the answer belongs to."""
        state = writer.sync_state
        if state.history != request.history:
            raise SyncStateError("the history changed while the answer was on its way; sync again")
        if writer.inflight is not None:
            raise SyncStateError("a push is in flight; it must be settled before a pull (R5)")
        stage = writer.stage
        expected = state.cursor
        if stage is not None:
            expected = stage.delta_cursor if stage.full_done else stage.full_cursor
        elif request.full:
            expected = 0
        if expected != request.cursor:
            raise SyncStateError("the cursor moved while the answer was on its way; sync again")
        # A stage is abandoned when the scope changes, so it needs no such check.
        if stage is None and not _is_missing(writer, state, request):
            raise _scope_changed()
        _check_adopted(writer)
        return state

    # ------------------------------------------------------------ conflicts (R25, R26)

    def conflicts(self) -> list[Conflict]:
        """Unresolved conflicts, in order of collection and id."""
        found = []
        with self.database.view() as view:
            names = view.catalogue.by_number
            for key, raw in view.snapshot.scan(CONFLICT, end_of(CONFLICT)):
                number, entity_id = split_numbered_key(key)
                info = names[number]
                row = view.entity((number, entity_id))
                local = None if row is None else row.payload
                found.append(decode_conflict(raw, info.name, (number, entity_id), local))
        return found

    def resolve(self, conflict: Conflict, resolution: ConflictResolution) -> RebaseReport:
        """Deal with an unresolved conflict; its transactions, and those that waited for them, are
        pushed by the next cycle. Raises ``ConflictError`` (``conflict_gone``) if it is not open,
        and (``conflict_changed``) if the server's side has changed since it was listed."""
        if not isinstance(conflict, Conflict):
            raise ConfigError(
                f"resolve takes an entry of conflicts(), not {conflict!r:.60}; list them first"
            )
        if resolution.action is Action.SKIP:
            raise ConflictError("skip leaves a conflict open", code="conflict_skipped")
        with self.database.write("local") as writer:
            info = writer.catalogue.by_name.get(conflict.collection)
            ref = (0 if info is None else info.number, conflict.id_bytes)
            raw = None if info is None else writer.get(conflict_key(*ref))
            if raw is None:
                raise ConflictError(
                    f"there is no open conflict on {conflict.collection}/{conflict.entity_id}; "
                    "list them again",
                    code="conflict_gone",
                )
            now = decode_conflict(raw, "", ref, None)
            # The same number can be of another history (R29).
            if (now.remote_version, now.remote_payload) != (
                conflict.remote_version,
                conflict.remote_payload,
            ):
                raise ConflictError(
                    f"the server's side of {conflict.collection}/{conflict.entity_id} has changed "
                    "since this conflict was listed; list them again",
                    code="conflict_changed",
                )
            rebase = self._rebase(writer, writer.now_ms)
            rebase.resolve(ref, conflict, resolution)
            rebase.release()
            return rebase.report

    # ------------------------------------------------------------ discarded and overruled (R4)

    def discarded(self) -> list[DiscardedTransaction]:
        """Withdrawn transactions, oldest first."""
        with self.database.view() as view:
            return read_discarded(view.snapshot)

    def overruled(self) -> list[OverruledValue]:
        """Values that a policy or a person decided against, whoever wrote them, oldest first."""
        with self.database.view() as view:
            return read_overruled(view.snapshot)

    def overruled_count(self) -> int:
        """How many of them there are."""
        with self.database.view() as view:
            return overruled.read_head(view).count

    def recommit(self, discarded: DiscardedTransaction | OverruledValue) -> int:
        """Commit a discarded transaction again, as a new one on the present state, and take it
        off the list; returns the commit sequence.

        Of an overruled value its field is written back, of an overruled entity the fields that
        were changed, and nothing else of what is there now; 0 is returned if that changes
        nothing. Raises ``ConflictError``
        (``discarded_gone``) if it is not in its list any more, and (``overruled_place_gone``) if
        the entity is deleted, or holds no map where the field was; then nothing has changed."""
        if isinstance(discarded, OverruledValue):
            return self._put_back(discarded)
        _check_entry("recommit", discarded)
        with self.database.write("local") as writer:
            key = discard_key(discarded)
            if writer.get(key) is None:
                raise ConflictError(
                    f"transaction {discarded.transaction_id.hex()} is not in the discarded list "
                    "any more",
                    code="discarded_gone",
                )
            writer.delete(key)
            writer.head.discarded -= 1
            writes: dict[str, dict[bytes, bytes | None]] = {}
            for name, entity_id, payload in discarded.operations:
                writes.setdefault(name, {})[entity_id] = payload
            return self.database.commit_writes(writer, writes)

    def _put_back(self, value: OverruledValue) -> int:
        with self.database.write("local") as writer:
            if not overruled.forget(writer, value.number):
                raise ConflictError(
                    f"the overruled value {value.number} of {value.collection}/{value.entity_id} "
                    "is not kept any more; list them again",
                    code="discarded_gone",
                )
            info = writer.catalogue.by_name.get(value.collection)
            row = None if info is None else writer.entity((info.number, value.id_bytes))
            there = payload = None if row is None else row.payload
            fields = value.fields()
            if there is None and value.payload is not None and not value.path:
                # The entity is not there, so it comes back whole.
                fields = [((), value.payload, None)]
            for path, lost, _ in fields:
                try:
                    payload = with_field(payload, path, lost)
                except LookupError:
                    raise ConflictError(
                        f"{value.collection}/{value.entity_id} is deleted, or has no place for "
                        f"field {'.'.join(path)!r} any more; write the entity itself",
                        code="overruled_place_gone",
                    ) from None
            if payload == there:
                return 0
            writes: Writes = {value.collection: {value.id_bytes: payload}}
            return self.database.commit_writes(writer, writes)

    def prune(self, discarded: DiscardedTransaction | OverruledValue) -> bool:
        """Forget a discarded transaction, or an overruled value, for good; returns whether it
        was there."""
        if isinstance(discarded, OverruledValue):
            with self.database.write("local") as writer:
                return overruled.forget(writer, discarded.number)
        _check_entry("prune", discarded)
        with self.database.write("local") as writer:
            key = discard_key(discarded)
            if writer.get(key) is None:
                return False
            writer.delete(key)
            writer.head.discarded -= 1
            return True

    def pending(self) -> Iterator[PendingTransaction]:
        """The outbox, oldest first, held ones included."""
        with self.database.view() as view:
            yield from read_pending(view.snapshot)

    # ------------------------------------------------------------ reset (R29)

    def reset(self, keep: str) -> None:
        """Start over with the server's present history. ``keep="server"`` takes its state;
        ``keep="device"`` also commits again what this device has newer or the server no longer
        has. Pending transactions stay pending either way."""
        if keep not in ("server", "device"):
            raise ConfigError(f"keep={keep!r}: choose 'server' or 'device'")
        with self.database.write() as writer:
            writer.abandon_stage()
            _doubt(writer)
            writer.set_inflight(None)
            state = writer.sync_state
            writer.set_sync_state(
                replace(
                    state,
                    history=None,
                    cursor=0,
                    have=[],
                    full=True,
                    foreign=True,
                    keep_device=keep == "device",
                )
            )


def check_replica_of(state: ReplicaState, db_id: str) -> None:
    """Raises ``ConfigError`` if the device is a replica of another database: before the server is
    asked, which might make one of that name."""
    if state.db_id not in (None, db_id):
        raise ConfigError(
            f"this device holds a copy of database {state.db_id!r}, not of {db_id!r}; sync "
            f"with db_id={state.db_id!r}, or use another directory for {db_id!r}"
        )


class MemorySyncApplier(DatabaseApplier):
    """A ``SyncApplier`` on a database in memory, for tests: the real rules without files."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Database.in_memory(), **options)


# ---------------------------------------------------------------- preparing


def _check_ready(writer: Writer) -> None:
    """Raises ``CorruptionError`` where the outbox does not hold as many transactions as it should.
    A damaged page can hide rows, each of them sound: what is behind them would go out without
    what it was built on."""
    found, start = 0, READY
    while keys := writer.snapshot.scan_keys(start, end_of(READY), limit=_COUNTED_ROWS):
        found += len(keys)
        start = keys[-1] + b"\0"
    if found != writer.head.ready:
        raise _outbox_damaged(f"it should hold {writer.head.ready} transactions, {found} are found")


def _outbox_damaged(how: str) -> CorruptionError:
    return CorruptionError(
        f"the outbox is damaged: {how}. Nothing is sent. Run `entidb verify` on this database, "
        "then restore a backup of it, or sync into a new directory"
    )


def _choose(
    writer: Writer,
    limits: BatchLimits,
    inflight: list[list[int]],
    mark: int,
    apart: frozenset[bytes] = frozenset(),
) -> PushBatch | None:
    """The next batch, for the caller to mark as in flight in the commit this is part of (R5).

    Rows within the ascending ranges ``inflight`` belong to other batches, or have just been
    settled and are gone but still in the snapshot. The batch ends before the first transaction
    that touches an entity in ``apart``."""
    if _outdated_in_scope(writer):
        # What is built on another history has to meet this one first (R29).
        return None
    gaps = _gaps(inflight, limits.sequence_max)
    # The commit moves the mark by two, and changes nothing of what is read here.
    batch = _batch(writer, gaps, mark + 2, limits, apart)
    return batch if batch.keys else None


def _gaps(ranges: list[list[int]], end: int) -> Iterator[tuple[int, int]]:
    """What is not in the ascending ``ranges`` up to ``end``, as (first, last)."""
    start = 0
    for first, last in ranges:
        if first > start:
            yield start, first - 1
        start = last + 1
    yield start, end


def _still_fresh(batch: PushBatch, mark: int) -> None:
    """The commit under way, at ``mark``, changes no entity of ``batch``."""
    if batch.mark == mark:
        batch.mark += 2


def _batch(
    view: Writer,
    ranges: Iterable[Sequence[int]],
    mark: int,
    limits: BatchLimits | None = None,
    apart: frozenset[bytes] = frozenset(),
) -> PushBatch:
    """The batch of the outbox rows in ``ranges``: all, or as many as ``limits`` allow, up to the
    first that touches an entity in ``apart``. Base versions come from the entities: nothing
    rebases them while the batch is in flight, so it is the same however often it is built."""
    infos = view.catalogue.by_number
    batch = PushBatch([], [], [], set(), [], [], [], [], [], [], view.sync_state.cursor, 0, mark)
    ids: list[bytes] = []
    stamps: list[int] = []
    payloads: list[bytes | None] = []
    operations = size = 0
    changes = view.changes
    few = limits is None or len(infos) <= limits.collections_max
    left_out: set[bytes] = set()
    for key, stored in itertools.chain.from_iterable(_pages(view.snapshot, ranges, limits)):
        # What this very commit has moved, changed or withdrawn is read from it.
        row = changes.get(key, stored)
        if row is None:
            continue
        transaction_id, stamp, count, number, entity_id, previous, length = unpack_outbox_first(row)
        if limits is not None:
            if limits.without and _leave_out(view, key, row, limits.without, left_out):
                continue
            if len(batch.keys) >= limits.transactions_max:
                break
        operations += count
        size += len(row)
        if limits is not None and (operations > limits.operations_max or size > limits.bytes_max):
            if batch.keys:
                break
        if count == 1:
            entity_key = infos[number].prefix + entity_id
            if entity_key in apart:
                break
            if not few and _too_many(batch, [number], limits):
                break
            batch.numbers.append(number)
            batch.entity_keys.append(entity_key)
            payloads.append(row[OUTBOX_FIRST:] if length >= 0 else None)
        else:
            writes = decode_pending(key, row).operations
            entity_keys = [infos[op.collection].prefix + op.entity_id for op in writes]
            if not apart.isdisjoint(entity_keys):
                break
            if not few and _too_many(batch, [op.collection for op in writes], limits):
                break
            batch.numbers += [op.collection for op in writes]
            batch.entity_keys += entity_keys
            payloads += [op.payload for op in writes]
            previous = any(op.previous for op in writes)
        if previous:
            batch.chained.add(len(batch.keys))
        batch.keys.append(key)
        batch.rows.append(row)
        batch.counts.append(count)
        ids.append(transaction_id)
        stamps.append(stamp)
    batch.ranges = ranges_of(batch.sequences)
    _add_transactions(view, batch, ids, stamps, payloads)
    return batch


def _leave_out(
    view: Writer, key: bytes, row: bytes, without: frozenset[int], left_out: set[bytes]
) -> bool:
    """Whether a transaction is kept back, or touches an entity of one that is (``left_out``)."""
    infos = view.catalogue.by_number
    writes = decode_pending(key, row).operations
    keys = [infos[op.collection].prefix + op.entity_id for op in writes]
    if sequence_of(key) not in without and left_out.isdisjoint(keys):
        return False
    left_out.update(keys)
    return True


def _too_many(batch: PushBatch, numbers: list[int], limits: BatchLimits | None) -> bool:
    """Whether the batch would name more collections than a message may."""
    assert limits is not None
    return bool(batch.keys) and len({*batch.numbers, *numbers}) > limits.collections_max


def _pages(
    snapshot: Snapshot, ranges: Iterable[Sequence[int]], limits: BatchLimits | None
) -> Iterator[list[tuple[bytes, bytes]]]:
    """Outbox rows in ``ranges``, so many at a time that they are about a batch together: rows are
    a hundred bytes or sixteen million."""
    bytes_max = BatchLimits().bytes_max if limits is None else limits.bytes_max
    rows = _FIRST_ROWS
    for first, last in ranges:
        start, stop = sequence_key(READY, first), sequence_key(READY, last) + b"\0"
        while page := snapshot.scan(start, stop, limit=rows):
            yield page
            start = page[-1][0] + b"\0"
            mean = sum([len(row) for _, row in page]) // len(page) + 1
            if len(page) < rows:
                break
            rows = max(_FIRST_ROWS, min(bytes_max // mean, _PAGE_ROWS))


def _add_transactions(
    view: Writer,
    batch: PushBatch,
    ids: list[bytes],
    stamps: list[int],
    payloads: list[bytes | None],
) -> None:
    """The wire form of what is in ``batch``; ``ids`` and ``stamps`` are its transactions'."""
    rows = view.get_many(batch.entity_keys)
    if not all(row is not None and row[0] & DIRTY for row in rows):
        at = next(n for n, row in enumerate(rows) if row is None or not row[0] & DIRTY)
        missing = batch.entity_keys[at][-ID_BYTES:].hex()
        raise CorruptionError(
            f"entity {missing} has pending changes and no row that says so; nothing was sent. Run "
            "verify, and restore a backup"
        )
    batch.entity_rows = cast("list[bytes]", rows)
    indexes = {number: index for index, number in enumerate(dict.fromkeys(batch.numbers))}
    operations = list(
        map(
            PushOperation,
            map(indexes.__getitem__, batch.numbers),
            [key[-ID_BYTES:] for key in batch.entity_keys],
            map(version_of, batch.entity_rows),
            payloads,
        )
    )
    if len(operations) == len(ids):
        groups = [[operation] for operation in operations]
    else:
        ends = list(itertools.accumulate(batch.counts))
        groups = [
            operations[end - count : end] for end, count in zip(ends, batch.counts, strict=True)
        ]
    batch.transactions = list(map(PushTransaction, ids, stamps, groups))
    batch.collections = [view.catalogue.by_number[number].name for number in indexes]
    batch.bytes = OPERATION_OVERHEAD_BYTES * len(operations)
    batch.bytes += sum([len(payload) for payload in payloads if payload is not None])


# ---------------------------------------------------------------- settling


def check_verdicts(response: PushResponse) -> None:
    """What cannot be true of verdicts, before anything is touched: a transaction leaves the
    outbox for a version of its own that the server's head covers (R12), or not at all. Raises
    ``ProtocolError``."""
    results, head = response.results, response.head
    versions = [result.version for result in results if result.verdict <= _SUPERSEDED]
    if versions and not 0 < min(versions) <= max(versions) <= head:
        worst = min(versions) if min(versions) <= 0 else max(versions)
        raise ProtocolError(
            f"the server says a transaction was accepted as version {worst}, with its head at "
            f"{head}; nothing was settled"
        )
    if len(set(versions)) != len(versions):
        raise ProtocolError(
            "the server says of two transactions that they were accepted as the same version; "
            "nothing was settled"
        )


class _Settling:
    """The verdicts of one answer, applied within one commit (R18)."""

    def __init__(self, writer: Writer, rebase: Rebase, response: PushResponse) -> None:
        self._writer = writer
        self._response = response
        self._rebase = rebase
        self._state = writer.sync_state
        self._have = [list(pair) for pair in self._state.have]
        self._settled = Settled(report=self._rebase.report)

    def run(self, batch: PushBatch, fresh: bool) -> Settled:
        """``fresh`` says that the rows in the batch are still the entities' own."""
        settled = self._settled
        if not fresh:
            # No row at all is for ``_settle_newest`` to leave alone.
            found = self._writer.get_many(batch.entity_keys)
            batch.entity_rows = [row or b"" for row in found]
        elif self._settle_all(batch):
            self._store_have(batch)
            return settled
        at = 0
        results = self._response.results
        for index, (count, result) in enumerate(zip(batch.counts, results, strict=True)):
            place = at
            at += count
            verdict = result.verdict
            if verdict == _ACCEPTED:
                self._accepted(batch, index, place, result.version, result.timestamp)
                settled.accepted += 1
                settled.accepted_operations += count
                continue
            current = self._rebase.load(sequence_of(batch.keys[index]))
            if current is None:
                continue  # withdrawn a moment ago, with the transaction it was built on
            if verdict == _SUPERSEDED:
                if self._rebase.settle_superseded(current):
                    settled.superseded += 1
                else:
                    settled.conflicts += 1
                settled.pull = True
            elif verdict == _CONFLICT:
                settled.conflicts += 1
                settled.pull = True
            else:
                # Every transaction built on this one keeps a copy of these.
                code = result.code[:_CODE_CHARS_MAX] or "rejected"
                message = result.message[:_MESSAGE_CHARS_MAX] or "refused by the server"
                self._rebase.withdraw([current], code, message, [])
                settled.rejected += 1
        self._rebase.release()
        self._store_have(batch)
        return settled

    def _settle_all(self, batch: PushBatch) -> bool:
        """What ``run`` does with an answer as most are, in columns: every transaction is accepted
        and has one operation, on an entity where it is the only pending one. False if it is not
        like that; then nothing has changed."""
        results, keys, rows = self._response.results, batch.entity_keys, batch.entity_rows
        if batch.chained or {result.verdict for result in results} != {_ACCEPTED}:
            return False
        versions = [result.version for result in results]
        if min(versions) <= self._state.cursor:
            return False
        heads = zip(*map(unpack_pending, rows), strict=True)
        flags, shown, before, devices, stamps, pending = heads
        # Not so where one has several operations, or an entity several transactions.
        if list(pending) != batch.sequences or any(map(ge, before, versions)):
            return False
        bases = [
            base_key(number, key[-ID_BYTES:])
            for number, key, flag in zip(batch.numbers, keys, flags, strict=True)
            if flag & HAS_BASE
        ]
        gone = [flag & TOMBSTONE for flag in flags]
        given = [result.timestamp or stamp for result, stamp in zip(results, stamps, strict=True)]
        clean = map(pack_entity, gone, shown, versions, devices, given)
        values = [row[PENDING_HEAD:] for row in rows]
        changes = self._writer.changes
        changes.update(dict.fromkeys([*bases, *batch.keys]))
        changes.update(zip(keys, map(add, clean, values), strict=True))
        for version in versions:
            add_to_ranges(self._have, version)
        self._writer.head.ready -= len(keys)
        self._settled.accepted += len(keys)
        self._settled.accepted_operations += len(keys)
        return True

    def _accepted(
        self, batch: PushBatch, index: int, place: int, version: int, timestamp: int
    ) -> None:
        cursor = self._state.cursor
        if version > cursor and self._settle_newest(batch, index, place, version, timestamp):
            add_to_ranges(self._have, version)
            return
        transaction = batch.pending(index)
        current = self._rebase.load(transaction.sequence)
        if current is None or _writes(self._rebase.operations(current)) != _writes(
            transaction.operations
        ):
            # An earlier verdict of this answer withdrew or merged it here, while a copy of this
            # device had it accepted as it was (R30): only a pull can bring what was accepted.
            self._settled.pull = True
            if current is not None:
                self._rebase.settle_superseded(current)
            return
        if version > cursor:
            add_to_ranges(self._have, version)
        stamp = timestamp or transaction.timestamp
        self._rebase.settle_accepted(current, version, stamp, cursor)

    def _settle_newest(
        self, batch: PushBatch, index: int, place: int, version: int, timestamp: int
    ) -> bool:
        """The common case, without objects: every entity has this transaction as its only pending
        one and a base that is older. Its rows then just become clean, in place."""
        changes = self._writer.changes
        outbox_key = batch.keys[index]
        sequence = sequence_of(outbox_key)
        if index in batch.chained and any(
            op.previous and self._rebase.load(op.previous) is not None
            for op in batch.pending(index).operations
        ):
            return False
        made: list[tuple[bytes, bytes | None]] = []
        for at in range(place, place + batch.counts[index]):
            key, row = batch.entity_keys[at], batch.entity_rows[at]
            if not row or not row[0] & DIRTY or key in changes:
                return False
            flags, shown, base, device, stamp, pending = unpack_pending(row)
            if pending != sequence or base >= version:
                return False
            if flags & HAS_BASE:
                made.append((base_key(batch.numbers[at], key[-ID_BYTES:]), None))
            head = pack_entity(flags & TOMBSTONE, shown, version, device, timestamp or stamp)
            made.append((key, head + row[PENDING_HEAD:]))
        changes[outbox_key] = None
        changes.update(made)
        self._writer.head.ready -= 1
        self._rebase.forget(sequence)
        return True

    def _store_have(self, batch: PushBatch) -> None:
        state = self._state
        if self._have != state.have:
            # Too many ranges only mean that some own changes come back and are skipped (R21).
            state = replace(state, have=self._have[-HAVE_RANGES_MAX:])
        if state.granted is not None and self._settled.accepted:
            # Accepted under a token that was wider for a moment: nothing else will come of these,
            # so what is there goes with the next look at the grant (R31).
            strange = {name for name in batch.collections if not state.grants(name)}
            if strange:
                state = replace(state, uncovered=sorted(strange.union(state.uncovered)))
        if state is not self._state:
            self._writer.set_sync_state(state)


def _writes(operations: list[PendingOp]) -> list[tuple[int, bytes, bytes | None]]:
    return [(op.collection, op.entity_id, op.payload) for op in operations]


# ---------------------------------------------------------------- applying


def check_page(
    request: PullRequest, response: PullResponse, rows: ColumnRows | None = None
) -> None:
    """Everything of a page that can be wrong, before anything is touched: canonical payloads,
    names, and versions in order within what was asked for. ``rows`` are those of its columns,
    if it has some. Raises ``ProtocolError``."""
    for name in response.collections:
        try:
            check_name(name)
        except InvalidNameError as error:
            raise ProtocolError(f"the server sent an impossible name: {error}") from error
    last = request.cursor
    if rows is not None:
        if max(rows.indexes, default=-1) >= len(response.collections):
            raise ProtocolError(
                "the server's page names a collection that it does not list; nothing was applied"
            )
        if rows.versions:
            if rows.versions[0] <= last:
                raise _version_back(rows.versions[0], last)
            last = rows.versions[-1]
        places = zip(rows.versions, rows.ids, rows.payloads, strict=True)
        payloads = rows.payloads
    else:
        for commit in response.commits:
            if commit.version <= last:
                raise _version_back(commit.version, last)
            last = commit.version
            for op in commit.operations:
                if op.collection >= len(response.collections):
                    raise ProtocolError(
                        f"version {commit.version} names a collection that its page does not; "
                        "nothing was applied"
                    )
        operations = [(c.version, op) for c in response.commits for op in c.operations]
        payloads = [op.payload for _, op in operations]
        places = zip(
            [version for version, _ in operations],
            [op.entity_id for _, op in operations],
            payloads,
            strict=True,
        )
    if not cbor.all_pass([payload for payload in payloads if payload is not None]):
        for version, entity_id, payload in places:
            _check_payload(version, entity_id, payload)
    if response.cursor < last or response.head < response.cursor:
        raise ProtocolError(
            f"the server's page ends at cursor {response.cursor} with head {response.head}, but "
            f"holds version {last}; nothing was applied"
        )
    if response.has_more and response.cursor <= request.cursor:
        raise ProtocolError(
            f"the server says there is more after cursor {request.cursor}, but its page does not "
            "move on; nothing was applied"
        )


def _scope_changed() -> SyncStateError:
    return SyncStateError("the scope changed while the answer was on its way; sync again")


def _check_adopted(writer: Writer) -> None:
    """What a wider scope or a reset has still to make pending must meet server state as pending
    work does: taken for clean, it would be lost, or pass over what it never saw (R4, R31)."""
    if writer.get(META_ADOPT) is not None:
        raise _scope_changed()


def _version_back(version: int, last: int) -> ProtocolError:
    return ProtocolError(f"the server sent version {version} after {last}; nothing was applied")


def _check_payload(version: int, entity_id: bytes, payload: bytes | None) -> None:
    if payload is None:
        return
    try:
        value = cbor.check(payload)
    except CborDecodeError as error:
        raise SyncCodecError(
            f"entity {entity_id.hex()} of version {version} is not canonical: {error}; nothing "
            "was applied"
        ) from error
    if value is None:
        raise SyncCodecError(
            f"entity {entity_id.hex()} of version {version} is null, and a deletion has no "
            "payload; nothing was applied"
        )


def _is_missing(writer: Writer, state: ReplicaState, request: PullRequest) -> bool:
    """Whether what was asked for is still what is missing: a scope that was widened meanwhile
    must not count as covered by an answer that does not speak of it (R31)."""
    if not request.full:
        return not (state.full or state.uncovered)
    asked = None if request.collections is None else frozenset(request.collections)
    return asked == (writer.catalogue.scope if state.full else frozenset(state.uncovered))


def _hear_clock(writer: Writer, response: PullResponse, rows: ColumnRows | None = None) -> None:
    """The clock is a hybrid one (R27): what is written after this is later than what was seen,
    however slow the device's own clock is, but never beyond what the server says the time is."""
    latest = _latest(response.time)
    stamps = rows.timestamps if rows is not None else [c.timestamp for c in response.commits]
    newest = max(stamps, default=0)
    writer.head.timestamp = max(writer.head.timestamp, min(newest, latest))
    _lower_idle_clock(writer, latest)


def _latest(server_ms: int) -> int:
    """The latest timestamp that the server lets pass at this time of its clock."""
    return timestamp_from_ms(min(server_ms, TIME_MS_MAX)) | 0xFFFF


def _lower_idle_clock(writer: Writer, latest: int) -> None:
    """A clock that was ahead comes back (R27): else all that is written until its time has really
    come would count as later than what others write. Where something is pending this waits for the
    next push (``_lower_clock``), because the clock stays after what this device wrote."""
    head = writer.head
    if head.timestamp > latest and not head.ready and not head.held:
        head.timestamp = latest


def _lower_clock(writer: Writer, latest: int) -> None:
    """As ``_lower_idle_clock``, with what is pending: it gets the time that the server would make
    of it now. What is in flight has to stay as it was sent (R5)."""
    if writer.inflight is not None:
        return
    for transaction in read_pending(writer.snapshot):
        if transaction.timestamp <= latest:
            continue
        transaction.timestamp = latest
        writer.put_pending(transaction)
        for op in transaction.operations:
            ref = (op.collection, op.entity_id)
            row = writer.entity(ref)
            if row is not None and row.pending == transaction.sequence:
                row.timestamp = latest
                writer.put_entity(ref, row, row)
    writer.head.timestamp = min(writer.head.timestamp, latest)


def _targets(writer: Writer, response: PullResponse) -> list[CollectionInfo | None]:
    """The collection behind each index of the page; None for one that is local here (R31)."""
    wanted: list[CollectionInfo | None] = []
    scope = writer.catalogue.scope
    known = writer.catalogue.adding_all(
        (name for name in response.collections if scope is None or name in scope), pulled=True
    )
    if known is not writer.catalogue:
        writer.set_catalogue(known)
    for name in response.collections:
        if scope is not None and name not in scope:
            wanted.append(None)
            continue
        info = writer.collection(name)
        wanted.append(info if info.synced else None)
    return wanted


def _take_page(writer: Writer, rebase: Rebase, response: PullResponse) -> None:
    targets = _targets(writer, response)
    places: list[tuple[Ref, BaseRow]] = []
    keys = []
    for version, device, timestamp, operations in (
        (c.version, c.device_id, c.timestamp, c.operations) for c in response.commits
    ):
        for op in operations:
            info = targets[op.collection]
            if info is not None:
                keys.append(info.prefix + op.entity_id)
                places.append(
                    (
                        (info.number, op.entity_id),
                        BaseRow(version, device, timestamp, op.payload),
                    )
                )
    if len(set(keys)) != len(keys):
        raise ProtocolError("the server sent an entity twice in one page; nothing was applied")
    dirty = []
    for (ref, remote), raw in zip(places, writer.get_many(keys), strict=True):
        old = None if raw is None else decode_entity(raw)
        if old is not None and old.pending:
            dirty.append((old.pending, ref, remote))
        else:
            rebase.take_clean(ref, remote, old)
    # Oldest pending work first, so that what depends on it is decided after it.
    dirty.sort(key=lambda item: item[:2])
    for _, ref, remote in dirty:
        rebase.take_dirty(ref, remote)


def _foreign_collections(writer: Writer, state: ReplicaState) -> frozenset[int]:
    """Numbers of the collections whose entities have versions of another history (R29)."""
    return frozenset(
        info.number
        for info in writer.catalogue.by_name.values()
        if state.foreign or info.name in state.outdated
    )


def _outdated_in_scope(writer: Writer) -> bool:
    found = map(writer.catalogue.by_name.get, writer.sync_state.outdated)
    return any(info is not None and info.synced for info in found)


def _move_cursor(writer: Writer, state: ReplicaState, cursor: int) -> None:
    """Only a pull moves the cursor (R22)."""
    foreign = _foreign_collections(writer, state)
    now = replace(
        state,
        cursor=cursor,
        have=ranges_above(state.have, cursor),
        full=False,
        uncovered=[],
        foreign=False,
        keep_device=False,
        unsettled=[],
        outdated=sorted(
            info.name
            for info in writer.catalogue.by_name.values()
            if not info.synced and info.number in foreign
        ),
    )
    if now != state:
        writer.set_sync_state(now)


# ---------------------------------------------------------------- staging and publishing


def _comes_once(stage: Stage, response: PullResponse, rows: ColumnRows) -> bool:
    """Whether everything on this page belongs to the full part of the stage, and is below the
    head at its first page: then no page before or after it has any of these entities."""
    newest = rows.versions[-1] if rows.versions else 0
    names = stage.full
    return (
        not stage.full_done
        and newest <= stage.first_head
        and (names is None or all(name in names for name in response.collections))
    )


def _stage_rows(writer: Writer, stage: Stage, response: PullResponse, rows: ColumnRows) -> Stage:
    """As ``_stage_operations``, for a page in columns whose entities come once: its tombstones
    remove nothing, and its rows are those of the server but for the number of its commit."""
    tables, counts = dict(stage.tables), dict(stage.counts)
    targets = _targets(writer, response)
    prefixes = [
        None if info is None else table_prefix(_table_for(writer, tables, info.number))
        for info in targets
    ]
    fresh = bytes((REMOTE,)) + bytes(8)
    made = [
        (prefix + entity_id, fresh + head + payload)
        for index, entity_id, head, payload in zip(
            rows.indexes, rows.ids, rows.heads, rows.payloads, strict=True
        )
        if payload is not None and (prefix := prefixes[index]) is not None
    ]
    before = len(writer.changes)
    writer.changes.update(made)
    sent, operations = Counter(rows.indexes), 0
    gone = Counter(
        index for index, payload in zip(rows.indexes, rows.payloads, strict=True) if payload is None
    )
    twice = len(writer.changes) != before + len(made)
    if twice or (gone and len(set(zip(rows.indexes, rows.ids, strict=True))) != len(rows.ids)):
        raise ProtocolError("the server sent an entity twice in one page; nothing was kept")
    for index, info in enumerate(targets):
        if info is not None:
            number = str(info.number)
            counts[number] = counts.get(number, 0) + sent[index] - gone[index]
            operations += sent[index]
    return replace(
        stage,
        full_cursor=response.cursor,
        full_done=not response.has_more,
        tables=tables,
        counts=counts,
        operations=stage.operations + operations,
        time_ms=response.time,
    )


def _table_for(writer: Writer, tables: dict[str, int], collection: int) -> int:
    """The stage's table of a collection, allocated when it is needed first."""
    number = str(collection)
    if number not in tables:
        table, catalogue = writer.catalogue.allocating()
        writer.set_catalogue(catalogue)
        tables[number] = table
    return tables[number]


def _stage_operations(
    writer: Writer, stage: Stage, request: PullRequest, response: PullResponse
) -> Stage:
    """Write a page into the stage's own tables. In collections that come from nothing a tombstone
    only removes; in the others it must stay, to be applied."""
    full_phase = not stage.full_done
    # After the full part of some collections the changes of the others follow; a change of a
    # full one then goes straight into its new table.
    tables, deltas, counts = dict(stage.tables), dict(stage.deltas), dict(stage.counts)
    prefixes: list[tuple[bytes, str, bool] | None] = []
    for info in _targets(writer, response):
        is_full = info is not None and (stage.full is None or info.name in stage.full)
        if info is None or (full_phase and not is_full):
            # A collection that was not asked for now: its changes come after the full part.
            prefixes.append(None)
            continue
        table = _table_for(writer, tables if is_full else deltas, info.number)
        prefixes.append((table_prefix(table), str(info.number), is_full))
    operations = 0
    changes = writer.changes
    for commit in response.commits:
        head = pack_entity(REMOTE, 0, commit.version, commit.device_id, commit.timestamp)
        gone = pack_entity(
            REMOTE | TOMBSTONE, 0, commit.version, commit.device_id, commit.timestamp
        )
        unseen = commit.version <= stage.first_head and full_phase
        for op in commit.operations:
            target = prefixes[op.collection]
            if target is None:
                continue
            prefix, number, is_full = target
            operations += is_full
            key = prefix + op.entity_id
            if key in changes:
                raise ProtocolError("the server sent an entity twice in one page; nothing was kept")
            payload = op.payload
            if not is_full:
                changes[key] = gone if payload is None else head + payload
                continue
            if not unseen:
                there = writer.get(key)
                if there is not None:
                    if unpack_entity(there)[2] >= commit.version:
                        continue
                    counts[number] -= 1
            if payload is None:
                changes[key] = None
            else:
                changes[key] = head + payload
                counts[number] = counts.get(number, 0) + 1
    full_cursor, full_done, delta_cursor = stage.full_cursor, stage.full_done, stage.delta_cursor
    if full_phase:
        full_cursor, full_done = response.cursor, not response.has_more
    else:
        delta_cursor = response.cursor
    return replace(
        stage,
        full_cursor=full_cursor,
        full_done=full_done,
        delta_cursor=delta_cursor,
        tables=tables,
        deltas=deltas,
        counts=counts,
        operations=stage.operations + operations,
        time_ms=response.time,
    )


def _publish(writer: Writer, rebase: Rebase, stage: Stage, state: ReplicaState) -> None:
    cursor = stage.full_cursor if stage.full is None else stage.delta_cursor
    rebase.report.pulled += stage.operations
    full = _full_collections(writer, stage)
    old_tables = {number: writer.catalogue.by_number[number].table for number in full}
    dirty = _dirty_of(writer, set(full))
    if full:
        _switch_tables(writer, rebase, stage, full)
        unsettled = _unsettled(writer, stage, state)
        _carry_over(writer, rebase, dirty, old_tables, cursor, state.keep_device, unsettled)
    _apply_deltas(writer, rebase, stage)
    if state.keep_device:
        from entidb.db.adopt import schedule_adoption

        schedule_adoption(writer, [[n, old_tables[n]] for n in sorted(full)], compare=True)
    writer.set_stage(None)
    _move_cursor(writer, writer.sync_state, cursor)


def _full_collections(writer: Writer, stage: Stage) -> list[int]:
    return sorted(
        info.number
        for info in writer.catalogue.by_name.values()
        if info.synced
        and (stage.full is None or info.name in stage.full)
        # That something is not there proves nothing about what the token does not grant (R31).
        and writer.sync_state.grants(info.name)
    )


def _dirty_of(writer: Writer, numbers: set[int]) -> list[tuple[Ref, EntityRow]]:
    """Entities of collections about to be switched that have pending changes, with their rows, in
    the order of their oldest pending transaction."""
    found: dict[Ref, EntityRow] = {}
    for transaction in read_pending(writer.snapshot):
        for op in transaction.operations:
            ref = (op.collection, op.entity_id)
            if op.collection in numbers and ref not in found:
                row = writer.entity(ref)
                assert row is not None
                found[ref] = row
    return list(found.items())


def _switch_tables(writer: Writer, rebase: Rebase, stage: Stage, full: list[int]) -> None:
    catalogue = writer.catalogue
    moves = {}
    for number in full:
        table = stage.tables.get(str(number))
        if table is None:
            table, catalogue = catalogue.allocating()
        moves[number] = table
    names = sorted(catalogue.by_number[number].name for number in full)
    writer.set_catalogue(catalogue.moving(moves))
    for number in full:
        writer.set_count(number, stage.counts.get(str(number), 0))
    writer.put_replaced(rebase.sequence(), cbor.encode(names))


def _carry_over(
    writer: Writer,
    rebase: Rebase,
    dirty: list[tuple[Ref, EntityRow]],
    old_tables: dict[int, int],
    cursor: int,
    keep_device: bool,
    unsettled: Set[Ref],
) -> None:
    """Put entities with pending changes into the new tables with their old bases, then let the
    rebase see what the server has for them (R28)."""
    incoming, doubtful = [], []
    for ref, row in dirty:
        staged = writer.entity(ref)
        had_base = bool(row.flags & HAS_BASE)
        if staged is not None:
            remote = BaseRow(staged.version, staged.device_id, staged.timestamp, staged.payload)
        else:
            remote = BaseRow(cursor, bytes(16), 0, None)
        old_table_key = table_prefix(old_tables[ref[0]]) + ref[1]
        # The row lives on in the new table only; the feed row moves with it.
        writer.delete(old_table_key)
        writer.put_entity(ref, row, staged)
        if staged is None and not had_base and ref in unsettled:
            doubtful.append((ref, remote))
            continue
        if staged is None and not had_base:
            # Never on the server, and still not: no conflict, but now known up to the cursor.
            row.version = cursor
            writer.put_entity(ref, row, row)
            continue
        if keep_device and (staged is None or staged.version < row.version):
            # R29: the server lost what this was built on, and the person chose this device.
            rebase.replace_base(ref, remote)
            continue
        incoming.append((ref, remote))
    for ref, remote in incoming:
        rebase.take_dirty(ref, remote)
    for ref, remote in doubtful:
        rebase.take_unsettled(ref, remote)


def _doubt(writer: Writer) -> None:
    inflight, state = writer.inflight, writer.sync_state
    if inflight is None:
        return
    sent = [[first, last, state.cursor] for first, last in (*inflight.ranges, *inflight.after)]
    unsettled = [each for each in state.unsettled if each not in sent] + sent
    if unsettled != state.unsettled:
        writer.set_sync_state(replace(state, unsettled=unsettled))


def _unsettled(writer: Writer, stage: Stage, state: ReplicaState) -> set[Ref]:
    """Entities of transactions that the server may have accepted and forgotten: those that were in
    flight before its floor moved past where the device was. Where it has not, it would have known
    them when they came again (R14). Where a person keeps the device's side, that is decided."""
    ranges = [each for each in state.unsettled if each[2] < stage.floor]
    if not ranges or state.keep_device:
        return set()
    return {
        (op.collection, op.entity_id)
        for transaction in read_pending(writer.snapshot)
        if any(first <= transaction.sequence <= last for first, last, _ in ranges)
        for op in transaction.operations
    }


def _apply_deltas(writer: Writer, rebase: Rebase, stage: Stage) -> None:
    dirty = []
    for number, table in sorted(stage.deltas.items()):
        collection = int(number)
        prefix = table_prefix(table)
        start, stop = prefix, end_of(prefix)
        infos = writer.catalogue.by_number
        while page := writer.snapshot.scan(start, stop, limit=_PAGE_ROWS):
            ids = [key[5:] for key, _ in page]
            olds = writer.get_many([infos[collection].prefix + i for i in ids])
            for (_, raw), entity_id, old_raw in zip(page, ids, olds, strict=True):
                row = decode_entity(raw)
                remote = BaseRow(row.version, row.device_id, row.timestamp, row.payload)
                old = None if old_raw is None else decode_entity(old_raw)
                ref = (collection, entity_id)
                if old is not None and old.pending:
                    dirty.append((old.pending, ref, remote))
                else:
                    rebase.take_clean(ref, remote, old)
            start = page[-1][0] + b"\0"
        writer.set_catalogue(writer.catalogue.discarding(table, collection))
    dirty.sort(key=lambda item: item[:2])
    for _, ref, remote in dirty:
        rebase.take_dirty(ref, remote)


def _check_entry(method: str, given: object) -> None:
    if not isinstance(given, DiscardedTransaction):
        raise ConfigError(
            f"{method} takes an entry of discarded() or overruled(), not {given!r:.60}; list them "
            "first"
        )


__all__ = [
    "BatchLimits",
    "DatabaseApplier",
    "MemorySyncApplier",
    "PushBatch",
    "Settled",
    "SyncApplier",
    "Withdrawn",
]
