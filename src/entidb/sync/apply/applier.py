"""The device's side of a cycle in terms of its database: each method one storage commit.

The cycle (``sync.cycle``) decides what to ask the server and calls these in order. What each step
does is in the other rooms of this package, what happens to pending transactions in ``rebase``; what
a person decides between cycles is ``review``'s. Nothing here does network I/O or waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from entidb.collector import paused
from entidb.db import Database, machine, overruled
from entidb.db.adopt import adopt_step
from entidb.db.maintenance import sweep_garbage
from entidb.db.overruled import OVERRULED_DAYS, OVERRULED_MAX
from entidb.db.records import OverruledHead
from entidb.db.replica import Inflight, ReplicaState, Stage, ranges_above
from entidb.db.writer import Writer
from entidb.errors import ProtocolError, SyncStateError
from entidb.protocol import (
    DigestRequest,
    DigestResponse,
    PullRequest,
    PullResponse,
    PushResponse,
    column_rows,
    expanded,
)
from entidb.storage.spare import give_back
from entidb.sync.apply.batch import batch_of, check_ready, choose, outbox_damaged, still_fresh
from entidb.sync.apply.clock import (
    CLOCK_SLACK,
    hear_clock,
    latest_timestamp,
    lower_clock,
    lower_idle_clock,
)
from entidb.sync.apply.image import StagesImages
from entidb.sync.apply.look import look_after, look_at
from entidb.sync.apply.page import check_page, take_page
from entidb.sync.apply.position import (
    check_adopted,
    check_belongs,
    check_replica_of,
    foreign_collections,
    move_cursor,
    remember_doubt,
    scope_changed,
    see_page,
    seen_in,
)
from entidb.sync.apply.publish import publish_stage
from entidb.sync.apply.repair import check_states, repair
from entidb.sync.apply.report import RebaseReport
from entidb.sync.apply.review import Review
from entidb.sync.apply.seam import BatchLimits, Look, PushBatch, Settled
from entidb.sync.apply.settle import CODE_CHARS_MAX, MESSAGE_CHARS_MAX, Settling, check_verdicts
from entidb.sync.apply.signing import sign_in
from entidb.sync.apply.stage import comes_once, stage_operations, stage_rows
from entidb.sync.conflict import ConflictPolicy
from entidb.sync.grants import take_grant
from entidb.sync.room import PROVE_SAMPLE, STAGED_BYTES_MAX, check_room, staged_bytes

_DAY_MS = 24 * 3600 * 1000


class DatabaseApplier(StagesImages, Review):
    """The ``SyncApplier`` on an EntiDB database.

    ``policies`` maps collection names to policies (names or callables), ``default_policy`` is for
    the others. Of the values they decide against the newest ``overruled_max`` are kept, for
    ``overruled_days`` days (R4). A pull of several pages takes at most ``staged_bytes_max`` bytes,
    and leaves a quarter of the disk's free space. Of the values that come in segments it proves a
    sample, or with ``prove="all"`` each (R35). Only one engine uses a database at a time.
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
        prove: str = PROVE_SAMPLE,
    ) -> None:
        StagesImages.__init__(self, database, staged_bytes_max=staged_bytes_max, prove=prove)
        keeps = overruled_max > 0
        Review.__init__(
            self, database, default_policy=default_policy, policies=policies, keeps=keeps
        )
        self._overruled_max = overruled_max
        self._overruled_days = overruled_days
        self._heard_ms = 0
        self._look: Look | None = None
        self._confirmed = 0

    # ------------------------------------------------------------ reading

    @property
    def device_id(self) -> bytes:
        return self.database.device_id

    def look(self) -> Look:
        look = self._look
        if look is None or not look.moment.is_current():
            self._look = look = look_at(self.database)
        return look

    def _seen(self, writer: Writer) -> Look | None:
        """The newest look, if it shows what ``writer`` begins with, which then need not read it
        again."""
        look = self._look
        if look is None or look.moment.mark != writer.moment.mark:
            return None
        writer.know(look.state, look.inflight)
        return look

    def sequence(self) -> int:
        """The newest local commit."""
        return self.look().sequence

    def ready(self) -> int:
        """How many transactions wait to be pushed."""
        return self.look().ready

    def state(self) -> ReplicaState:
        """The device's position in the server's history."""
        return self.look().state

    def stage(self) -> Stage | None:
        """A pull that is still coming in (R20)."""
        return self.look().stage

    def scope(self) -> list[str] | None:
        """Names to ask the server for; None for all."""
        return self.look().scope

    def inflight(self) -> list[PushBatch]:
        with self.database.view() as view:
            inflight = view.inflight
            if inflight is None:
                return []
            both = [ranges for ranges in (inflight.ranges, inflight.after) if ranges]
            cursor = view.sync_state.cursor
            batches = [batch_of(view, cursor, ranges) for ranges in both]
            if [batch.ranges for batch in batches] != both:
                raise outbox_damaged("transactions that were sent before are missing from it")
            return batches

    # ------------------------------------------------------------ binding

    def bind(self, db_id: str, history: bytes, subject: str | None = None) -> None:
        state = self.state()
        check_replica_of(state, db_id)
        same = subject is None or state.subject == subject
        if state.db_id == db_id and state.history == history and same:
            return
        with self.database.write() as writer:
            before = writer.sync_state
            now = replace(before, db_id=db_id, history=history)
            writer.set_sync_state(machine.STAND(before, now))
            if subject is not None:
                sign_in(writer, subject)

    def sign_in(self, subject: str) -> None:
        if self.state().subject != subject:
            with self.database.write() as writer:
                sign_in(writer, subject)

    # ------------------------------------------------------------ push

    def prepare(self, limits: BatchLimits) -> PushBatch | None:
        with paused(), self.database.write("send") as writer:
            if writer.unsent is not None:
                marked = self._marked(writer, limits)
                if marked is not None:
                    return marked
                writer.unmark()
            seen = self._seen(writer)
            if not writer.head.ready:
                return None
            latest = latest_timestamp(limits.server_ms)
            if limits.server_ms and writer.head.timestamp > latest + CLOCK_SLACK:
                lower_clock(writer, latest)
            state = self._take_confirmed(writer, pulled=True)
            check_ready(writer)
            batch = choose(writer, limits, [], state=state)
            if batch is not None:
                writer.set_inflight(machine.SEND(writer.inflight, Inflight(batch.ranges)))
        if seen is not None:
            self._look = look_after(seen, writer)
        return batch

    def _marked(self, writer: Writer, limits: BatchLimits) -> PushBatch | None:
        """The transaction that its own commit has marked as in flight, if it is the whole batch:
        it is sent from here on, and nothing needs to be stored for that."""
        latest, state = latest_timestamp(limits.server_ms), writer.sync_state
        late = limits.server_ms and writer.head.timestamp > latest + CLOCK_SLACK
        if writer.head.ready != 1 or late or state.unsettled:
            return None
        check_ready(writer)
        batch = choose(writer, limits, [])
        if batch is None or writer.unsent != Inflight(batch.ranges):
            return None
        self.database.unsent = writer.unsent = None
        self._look = None
        return batch

    def prepare_after(self, batch: PushBatch, limits: BatchLimits) -> PushBatch | None:
        with paused(), self.database.write() as writer:
            inflight = writer.inflight
            if inflight is None or inflight.ranges != batch.ranges or inflight.after:
                raise SyncStateError("the batch was settled already by another engine")
            after = choose(writer, limits, batch.ranges, frozenset(batch.entity_keys))
            if after is not None:
                both = Inflight(batch.ranges, after.ranges)
                writer.set_inflight(machine.FOLLOW(inflight, both))
                still_fresh(batch, writer)
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
            seen = self._seen(writer)
            inflight = writer.inflight
            kept = [] if following is None else following.ranges
            if inflight is None or (inflight.ranges, inflight.after) != (batch.ranges, kept):
                raise SyncStateError("the batch was settled already by another engine")
            settling = Settling(writer, self._rebase, response)
            settled = settling.run(batch, batch.moment.mark == writer.moment.mark)
            lower_idle_clock(writer, latest_timestamp(response.time))
            if self._confirmed:
                self._take_confirmed(writer, pulled=False)
            next_batch = None
            more = writer.head.ready > (0 if following is None else len(following.keys))
            if limits is not None and more and not settled.pull:
                apart = frozenset() if following is None else frozenset(following.entity_keys)
                taken = sorted([*batch.ranges, *kept])
                next_batch = choose(writer, limits, taken, apart)
            settled.next_batch = next_batch
            left = [kept] if kept else []
            if next_batch is not None:
                left.append(next_batch.ranges)
            writer.set_inflight(machine.SETTLE(inflight, Inflight(*left) if left else None))
            if following is not None:
                still_fresh(following, writer)
        if seen is not None:
            self._look = look_after(seen, writer)
        return settled

    def doubt(self) -> None:
        with self.database.write() as writer:
            remember_doubt(writer)

    def unsend(self) -> None:
        with self.database.write() as writer:
            writer.set_inflight(machine.UNSEND(writer.inflight, None))

    def refuse(self, batch: PushBatch, code: str, message: str) -> RebaseReport:
        with paused(), self.database.write() as writer:
            inflight = writer.inflight
            if inflight is None or inflight.ranges != batch.ranges:
                raise SyncStateError("the batch was settled already by another engine")
            rebase = self._rebase(writer, writer.now_ms)
            reason = code[:CODE_CHARS_MAX], message[:MESSAGE_CHARS_MAX]
            for sequence in batch.sequences:
                transaction = rebase.load(sequence)
                if transaction is not None:  # else it was built on one before it
                    rebase.withdraw([transaction], *reason, [])
            rebase.release()
            writer.set_inflight(machine.REFUSE(inflight, None))
            return rebase.report

    def still_pending(self, sequences: Iterable[int]) -> list[int]:
        with self.database.view() as view:
            return [sequence for sequence in sequences if view.pending(sequence) is not None]

    # ------------------------------------------------------------ pull

    def confirm(self, cursor: int) -> None:
        self._confirmed = cursor

    def _take_confirmed(self, writer: Writer, *, pulled: bool) -> ReplicaState:
        """``pulled`` says that nothing was in flight when this cycle pulled."""
        state, confirmed = writer.sync_state, self._confirmed
        now = state
        if state.cursor < confirmed <= state.reached:
            # Only the cursor: what a wider scope still has to bring is no business of this pull.
            now = replace(now, cursor=confirmed, have=ranges_above(state.have, confirmed))
        if state.unsettled and pulled:
            # A pull has reached the head, and it was no reset: it showed what became of those.
            now = replace(now, unsettled=[])
        if now is not state:
            writer.set_sync_state(machine.STAND(state, now))
        self._confirmed = 0
        return now

    def apply(self, request: PullRequest, response: PullResponse) -> RebaseReport:
        response = expanded(response)
        check_page(request, response)
        self._heard_ms = response.time
        with paused(), self.database.write() as writer:
            seen = self._seen(writer)
            state = check_belongs(writer, request)
            newest = seen_in(state, response)
            foreign = foreign_collections(writer, state)
            rebase = self._rebase(writer, response.time, foreign)
            hear_clock(writer, response)
            take_page(writer, rebase, response)
            rebase.release()
            move_cursor(writer, state, response.cursor, newest)
            lower_idle_clock(writer, latest_timestamp(response.time))
        if seen is not None:
            self._look = look_after(seen, writer)
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
            state = check_belongs(writer, request)
            before = stage = writer.stage
            if stage is None and full != [] and not request.full:
                # The stage this page continues was abandoned: as the first page of another it
                # would pass for everything there is.
                raise scope_changed()
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
            if rows is not None and not comes_once(stage, response, rows):
                response, rows = expanded(response), None
            size = stage.size + staged_bytes(response)
            check_room(self.database.storage, size, self._staged_bytes_max)
            stage = replace(stage, size=size)
            if stage.image_head:
                # It may move, up to the image (R35); what is in doubt is told by the newest (R28).
                stage = replace(stage, floor=max(stage.floor, response.floor))
            hear_clock(writer, response, rows)
            if rows is None:
                stage = stage_operations(writer, stage, request, response)
            else:
                stage = stage_rows(writer, stage, response, rows)
            writer.set_stage(machine.KEEP(before, stage))
            see_page(writer, state, response)
            return stage

    def publish(self) -> RebaseReport:
        with paused(), self.database.write() as writer:
            stage = writer.stage
            if stage is None:
                raise SyncStateError("there is nothing staged to publish")
            state = writer.sync_state
            if not stage.fits(state):
                raise SyncStateError("the stage belongs to another state; sync again")
            check_adopted(writer)
            foreign = foreign_collections(writer, state)
            rebase = self._rebase(writer, stage.time_ms, foreign)
            publish_stage(writer, rebase, stage, state)
            rebase.release()
            return rebase.report

    def restart_stage(self, *, full: bool) -> None:
        with self.database.write() as writer:
            writer.abandon_stage()
            state = writer.sync_state
            if full and not state.full:
                writer.set_sync_state(machine.FALL(state, replace(state, full=True)))

    def grant(self, granted: list[str] | None) -> RebaseReport:
        with paused(), self.database.write() as writer:
            if writer.inflight is not None:
                raise SyncStateError("a push is in flight; it must be settled before a grant (R5)")
            check_adopted(writer)
            rebase = self._rebase(writer, writer.now_ms)
            take_grant(writer, rebase, granted)
            rebase.release()
            return rebase.report

    def repair(self, request: DigestRequest, response: DigestResponse) -> RebaseReport:
        check_states(request, response)
        with paused(), self.database.write() as writer:
            rebase = self._rebase(writer, writer.now_ms)
            repair(writer, rebase, request, response.states)
            rebase.release()
            return rebase.report

    def adopt(self) -> bool:
        return self.look().adopting and adopt_step(self.database, keeps=self._keeps)

    def tidy(self) -> bool:
        look = self._look
        if look is None or look.garbage or look.overruled.count:
            look = self.look()
        # Else there was nothing at the newest look of this cycle; what came since waits.
        if look.garbage and sweep_garbage(self.database):
            return True
        return bool(look.overruled.count) and self._prune_overruled(look.overruled)

    def give_back(self) -> bool:
        """Give the disk a bounded part of the room that the outbox held; whether there is more."""
        return give_back(self.database.storage)

    def _prune_overruled(self, head: OverruledHead) -> bool:
        """Forget a bounded part of the overruled values that are too many or too old. Their age
        counts by the earlier one of two clocks, this device's and the one last read from the
        server: one that is wrong by years forgets nothing."""
        now_ms = min(self.database.clock.now_ms(), self._heard_ms)
        before_ms = int(now_ms - self._overruled_days * _DAY_MS)
        if head.count <= self._overruled_max and head.oldest_ms >= before_ms:
            return False
        with self.database.write() as writer:
            return overruled.prune(writer, count_max=self._overruled_max, before_ms=before_ms)


class MemorySyncApplier(DatabaseApplier):
    """A ``SyncApplier`` on a database in memory, for tests: the real rules without files."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Database.in_memory(), **options)


__all__ = ["DatabaseApplier", "MemorySyncApplier"]
