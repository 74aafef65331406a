"""Bugs put into the real code on purpose, to show that the checkers can fail.

Each is one place of the real code, replaced from here while its seeds run; there is no trace of
them in the code itself. ``python -m entidb.testing --planted`` plants each, alone, and says which
invariant noticed and after how many seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from entidb.db import Database, Role, adopt, maintenance, overruled, scope
from entidb.db.fields import Side
from entidb.db.overruled import Keeper
from entidb.db.records import (
    DISCARDED,
    FEED,
    READY,
    BaseRow,
    EntityRow,
    PendingTransaction,
    accepted_key,
    end_of,
    unpack_entity,
    unpack_pending,
)
from entidb.db.writer import Writer
from entidb.errors import (
    ProtocolError,
    ResetRequiredError,
    StorageFullError,
    SyncCodecError,
    SyncError,
)
from entidb.protocol import PullResponse, PushResponse, PushResult, Verdict, digest_operations
from entidb.server import decide, pages, service
from entidb.server.auth import Grants
from entidb.server.hooks import Grant
from entidb.server.service import DatabaseService
from entidb.sync import cycle, grants
from entidb.sync.apply import applier, batch, clock, page, position, publish, review, settle
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.review import Review
from entidb.sync.rebase import Rebase
from entidb.sync.refusal import Path
from entidb.testing import host
from entidb.testing.simulator import Options, Run, simulate
from entidb.types import SEQUENCE_MAX, system_entropy

#: A bug must be caught within so many seeds.
SEEDS_MAX: Final = 300

#: Replaces attributes of the code under test; undone when the seeds are through.
Plant = Callable[["Garden"], None]


class Garden:
    """Where bugs are planted: ``replace(owner, name, make)`` puts ``make(original)`` there."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def replace(self, owner: object, name: str, make: Callable[[Any], Any]) -> None:
        # An attribute that is gone means the registry is out of step: that has to be loud.
        value = make(getattr(owner, name))
        self._stack.enter_context(mock.patch.object(owner, name, value))


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The code under test has ``bug`` inside this block."""
    with contextlib.ExitStack() as stack:
        bug.plant(Garden(stack))
        yield


@dataclass(frozen=True)
class Bug:
    """``knobs`` make the seeds fit the bug; ``expected`` are the invariants that may notice."""

    name: str
    says: str
    plant: Plant
    expected: tuple[str, ...]
    knobs: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What became of a planted bug: the invariant that noticed, after how many seeds."""

    name: str
    invariant: str | None
    seeds: int
    message: str


BUGS: dict[str, Bug] = {}
_CALM: Final[dict[str, int]] = {
    "events": 700,
    "devices": 3,
    "keys": 5,
    "lmdb": 0,
    "stale_rows": 0,
}
_WILD: Final = _CALM | {"lost": 100, "repeated": 100}


def _bug(name: str, *expected: str, knobs: Mapping[str, int] = _CALM) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        BUGS[name] = Bug(name, (plant.__doc__ or "").strip(), plant, expected, knobs)
        return plant

    return register


def find(bug: Bug, seeds_max: int = SEEDS_MAX) -> Finding:
    """Plant ``bug`` and run seeds until an invariant notices."""
    with planted(bug):
        for seed in range(seeds_max):
            run = simulate(seed, Options(bug.knobs))
            noticed = run.invariant or _other_trace(bug, run)
            if noticed is not None:
                return Finding(bug.name, noticed, seed + 1, run.message)
    return Finding(bug.name, None, seeds_max, "")


def _other_trace(bug: Bug, run: Run) -> str | None:
    """SAME-SEED needs a second run."""
    if "SAME-SEED" not in bug.expected:
        return None
    again = simulate(run.seed, Options(bug.knobs))
    return None if again.digest == run.digest else "SAME-SEED"


def try_all(
    *, jobs: int = 1, only: str | None = None, tell: Callable[[Finding], None] = lambda f: None
) -> list[Finding]:
    """Every bug, or ``only`` one; ``tell`` is called with each finding."""
    names = [name for name in BUGS if only in (None, name)]
    findings = []
    if jobs <= 1:
        for name in names:
            findings.append(find(BUGS[name]))
            tell(findings[-1])
        return findings
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for finding in pool.map(_find_named, names):
            findings.append(finding)
            tell(finding)
    return findings


def _find_named(name: str) -> Finding:
    return find(BUGS[name])


# ---------------------------------------------------------------- pulling and applying


@_bug("cursor-before-data", "PREFIX")
def _cursor_before_data(garden: Garden) -> None:
    """The cursor is stored in a commit before the page it belongs to."""

    def make(original: Any) -> Any:
        def apply(self: DatabaseApplier, request: Any, response: Any) -> Any:
            with self.database.write() as writer:
                state = writer.sync_state
                position.move_cursor(writer, state, response.cursor)
            with self.database.write() as writer:
                foreign = position.foreign_collections(writer, state)
                rebase = Rebase(writer, self.policy_for, response.time, foreign=foreign)
                page.take_page(writer, rebase, response)
                rebase.release()
            return rebase.report

        return apply

    garden.replace(DatabaseApplier, "apply", make)


@_bug("cursor-one-short", "ORDER", "PREFIX")
def _cursor_one_short(garden: Garden) -> None:
    """After a page the cursor is one short of what was applied."""
    for module in (applier, publish):
        garden.replace(
            module,
            "move_cursor",
            lambda original: (
                lambda writer, state, cursor: original(writer, state, max(0, cursor - 1))
            ),
        )


@_bug("base-not-replaced", "PREFIX")
def _base_not_replaced(garden: Garden) -> None:
    """A pulled change to an entity with pending changes leaves its old base."""
    garden.replace(Rebase, "_set_base", lambda original: lambda self, ref, row, base: None)


@_bug("deletions-not-applied", "NO-RESURRECTION", "PREFIX")
def _deletions_not_applied(garden: Garden) -> None:
    """A pulled tombstone of a clean entity is skipped."""

    def make(original: Any) -> Any:
        def take_clean(self: Rebase, ref: Any, remote: Any, old: EntityRow | None) -> None:
            if remote.payload is not None:
                original(self, ref, remote, old)

        return take_clean

    garden.replace(Rebase, "take_clean", make)


@_bug(
    "stage-loses-last-page",
    "PREFIX",
    "WHOLE",
    knobs=_CALM | {"pull_operations_max": 2},
)
def _deltas_lost(garden: Garden) -> None:
    """What a pull of several pages brought is published without its changes."""
    garden.replace(publish, "_apply_deltas", lambda original: lambda writer, rebase, stage: None)


@_bug(
    "stage-published-in-parts",
    "PREFIX",
    "WHOLE",
    "ORDER",
    knobs=_CALM | {"pull_operations_max": 2},
)
def _page_by_page(garden: Garden) -> None:
    """A page that is not the last is shown to readers at once."""

    def make(original: Any) -> Any:
        def stage_page(self: DatabaseApplier, request: Any, response: Any, full: Any) -> Any:
            stage = original(self, request, response, full)
            if not request.full:
                with self.database.write() as writer:
                    rebase = Rebase(writer, self.policy_for, response.time)
                    page.take_page(writer, rebase, response)
                    rebase.release()
            return stage

        return stage_page

    garden.replace(DatabaseApplier, "stage_page", make)


@_bug("own-ranges-wrong", "PREFIX", "ORDER", knobs=_CALM | {"push_operations_max": 5})
def _own_ranges_wrong(garden: Garden) -> None:
    """The versions a device has of its own are one off."""

    def make(original: Any) -> Any:
        def add(ranges: list[list[int]], number: int) -> None:
            # The same function counts outbox sequences, which are small steps from 1.
            original(ranges, number)
            if ranges and len(ranges) > 1:
                ranges[-1][1] += 1

        return add

    garden.replace(settle, "add_to_ranges", make)


@_bug("done-is-a-conflict", "NO-FALSE-CONFLICT")
def _done_is_a_conflict(garden: Garden) -> None:
    """Equal bytes on both sides count as a conflict."""
    garden.replace(Rebase, "_done_prefix", lambda original: lambda self, chain, remote: 0)


@_bug("own-count-forgotten", "CONVERGE", "UNEXPECTED")
def _count_forgotten(garden: Garden) -> None:
    """Deletions do not lower a collection's count."""

    def make(original: Any) -> Any:
        def count(self: Writer, collection: int, by: int) -> None:
            original(self, collection, max(0, by))

        return count

    garden.replace(Writer, "count", make)


# ---------------------------------------------------------------- pushing and settling


@_bug("any-answer-clears-the-outbox", "NO-SILENT-LOSS", knobs=_WILD)
def _any_answer_clears(garden: Garden) -> None:
    """A conflict takes the transaction out of the outbox."""

    def make(original: Any) -> Any:
        def run(self: Any, batch: Any, fresh: bool) -> Any:
            if not self._state.cursor:
                return original(self, batch, fresh)
            self._response = replace(
                self._response,
                results=[
                    PushResult(Verdict.ACCEPTED, 1) if r.verdict == Verdict.CONFLICT else r
                    for r in self._response.results
                ],
            )
            return original(self, batch, fresh)

        return run

    garden.replace(settle.Settling, "run", make)


@_bug(
    "accepted-below-cursor-moves-base",
    "PREFIX",
    "NO-RESURRECTION",
    knobs=_WILD | {"copy_device": 20},
)
def _accepted_moves_base(garden: Garden) -> None:
    """An old transaction that is accepted again becomes the base, though newer is known."""

    def make(original: Any) -> Any:
        def settle(self: Rebase, transaction: Any, version: int, stamp: int, cursor: int) -> None:
            self.remove(transaction)
            for op in transaction.operations:
                ref = (op.collection, op.entity_id)
                row = self._writer.entity(ref)
                assert row is not None
                written = BaseRow(version, self._writer.device_id, stamp, op.payload)
                self._set_base(ref, row, written)
                if row.pending == transaction.sequence:
                    self.show_base(ref)

        return settle

    garden.replace(Rebase, "settle_accepted", make)


@_bug(
    "newer-write-settled-too",
    "READ-YOUR-WRITES",
    "PREFIX",
    "NO-SILENT-LOSS",
    "CONVERGE",
    "UNEXPECTED",
)
def _newer_write_settled(garden: Garden) -> None:
    """An answer to an older batch cleans entities that were written since."""

    def make(original: Any) -> Any:
        def newest(self: Any, batch: Any, index: int, *rest: Any) -> bool:
            sequence = batch.sequences[index]
            with mock.patch.object(applier, "unpack_pending", _pretend_newest(sequence)):
                settled: bool = original(self, batch, index, *rest)
            return settled

        return newest

    garden.replace(settle.Settling, "_settle_newest", make)


def _pretend_newest(sequence: int) -> Callable[[bytes], tuple[Any, ...]]:
    real = unpack_pending
    return lambda raw: (*real(raw)[:5], sequence)


@_bug("stale-rows-settled", "READ-YOUR-WRITES", "NO-SILENT-LOSS", "CONVERGE", "UNEXPECTED")
def _stale_rows(garden: Garden) -> None:
    """Settling trusts the rows it read when the batch was made, whatever was written since."""

    def make(original: Any) -> Any:
        return lambda self, batch, fresh: original(self, batch, True)

    garden.replace(settle.Settling, "run", make)


_SMALL_BATCHES: Final = _CALM | {"push_operations_max": 1, "pause_ms": 3000, "ahead": 500}


@_bug(
    "following-builds-on-the-first",
    "NO-FALSE-CONFLICT",
    "LIVENESS",
    "CONVERGE",
    knobs=_SMALL_BATCHES,
)
def _following_not_apart(garden: Garden) -> None:
    """The batch after the one in flight may touch what that one touches."""

    def make(original: Any) -> Any:
        return lambda writer, limits, inflight, mark, apart=None: original(
            writer, limits, inflight, mark
        )

    garden.replace(applier, "choose", make)


@_bug("following-forgotten", "LIVENESS", "NO-FALSE-CONFLICT", "UNEXPECTED", knobs=_SMALL_BATCHES)
def _following_forgotten(garden: Garden) -> None:
    """After a crash only the first of two batches in flight is sent again."""
    garden.replace(DatabaseApplier, "inflight", lambda original: lambda self: original(self)[:1])


@_bug("in-flight-forgotten", "LIVENESS", "NO-FALSE-CONFLICT", knobs=_WILD)
def _in_flight_forgotten(garden: Garden) -> None:
    """A batch without an answer is not sent again first."""
    garden.replace(DatabaseApplier, "inflight", lambda original: lambda self: [])


# ---------------------------------------------------------------- pushes refused as a whole

_POISONED: Final = _CALM | {"older_server": 1, "invalid": 60}


@_bug("refused-push-stays-in-flight", "LIVENESS", knobs=_POISONED)
def _refusal_keeps_the_flight(garden: Garden) -> None:
    """A push that is refused as a whole is sent again before anything else, for ever."""

    def make(original: Any) -> Any:
        def ask(self: Any, batch: Any, state: Any, request: Any = None) -> Any:
            asked = self._push_request(batch, state) if request is None else request
            return (yield from self._ask(asked, PushResponse))

        return ask

    garden.replace(cycle.Cycle, "_ask_push", make)


@_bug("refusal-withdraws-the-batch", "NO-SILENT-LOSS", knobs=_POISONED | {"pause_ms": 3000})
def _refusal_withdraws_all(garden: Garden) -> None:
    """For one transaction that is refused, all that were sent with it are withdrawn."""

    def make(original: Any) -> Any:
        def take(self: Any, batch: Any, error: SyncError) -> Any:
            yield from ()
            self._report(self._applier.refuse(batch, error.code, error.message))

        return take

    garden.replace(cycle.Cycle, "_take_refusal", make)


@_bug("own-doubt-is-a-refusal", "NO-SILENT-LOSS", knobs=_CALM | {"cut": 300})
def _own_doubt(garden: Garden) -> None:
    """What the device finds wrong with an answer counts as if the server had refused."""
    garden.replace(SyncCodecError, "refused_by", lambda original: "server")


@_bug("kept-back-for-ever", "LIVENESS", knobs=_CALM | {"body_limit": 1000, "firewall": 300})
def _kept_for_ever(garden: Garden) -> None:
    """What did not get through once is never tried again."""
    garden.replace(Path, "try_again", lambda original: lambda self: None)


@_bug("kept-back-without-what-follows", "ORDER", knobs=_CALM | {"firewall": 300})
def _kept_alone(garden: Garden) -> None:
    """What is built on a transaction that is kept back goes out without it."""

    def make(original: Any) -> Any:
        def leave_out(view: Any, key: bytes, row: bytes, without: Any, left_out: Any) -> Any:
            return original(view, key, row, without, set())

        return leave_out

    garden.replace(batch, "_leave_out", make)


@_bug("rights-before-what-was-accepted", "EXACTLY-ONCE", knobs=_WILD | {"read_only": 300})
def _rights_first(garden: Garden) -> None:
    """A token that may not write any more is refused what it had accepted before."""

    def make(original: Any) -> Any:
        def known(self: Any, transaction: Any, row: bytes, digest: bytes, keys: Any) -> Any:
            if not self._grant.write:
                return self._refuse([], "forbidden", "this token may not write")
            return original(self, transaction, row, digest, keys)

        return known

    garden.replace(decide.Deciding, "_known", make)


@_bug("rejected-is-tried-again", "LIVENESS", "NO-POISON", knobs=_CALM | {"refuse": 100})
def _rejected_stays(garden: Garden) -> None:
    """A refused transaction stays in the outbox and is pushed for ever."""

    def make(original: Any) -> Any:
        def withdraw(self: Rebase, roots: Any, code: str, message: str, lost: Any) -> None:
            if code == "conflict":
                original(self, roots, code, message, lost)

        return withdraw

    garden.replace(Rebase, "withdraw", make)


@_bug("withdrawn-not-listed", "NO-SILENT-LOSS")
def _withdrawn_not_listed(garden: Garden) -> None:
    """A withdrawn transaction does not reach the discarded list."""

    def make(original: Any) -> Any:
        def discard(self: Rebase, transaction: Any, code: str, message: str, lost: Any) -> None:
            return None

        return discard

    garden.replace(Rebase, "_discard", make)


@_bug("withdrawn-not-reported", "SURFACED-ONCE")
def _withdrawn_not_reported(garden: Garden) -> None:
    """A withdrawn transaction is listed, and no report names it."""

    def make(original: Any) -> Any:
        def discard(self: Rebase, *rest: Any) -> None:
            original(self, *rest)
            self.report.withdrawn.clear()

        return discard

    garden.replace(Rebase, "_discard", make)


@_bug("conflict-not-held", "SURFACED-ONCE", knobs=_CALM | {"policy_notes": 7, "operations": 3})
def _conflict_not_held(garden: Garden) -> None:
    """A conflict nobody decided is neither listed nor reported."""

    def make(original: Any) -> Any:
        return lambda self, ref, chain, conflict, known: None

    garden.replace(Rebase, "hold", make)


@_bug("withdrawn-still-shown", "READ-YOUR-WRITES", "CONVERGE", "UNEXPECTED")
def _withdrawn_still_shown(garden: Garden) -> None:
    """The view keeps what was withdrawn."""

    def make(original: Any) -> Any:
        def withdraw(self: Rebase, *rest: Any) -> None:
            with mock.patch.object(self, "show_top", return_value=None):
                original(self, *rest)

        return withdraw

    garden.replace(Rebase, "withdraw", make)


@_bug("dependents-left-behind", "WHOLE", "PREFIX", "CONVERGE", "READ-YOUR-WRITES", "UNEXPECTED")
def _dependents_left(garden: Garden) -> None:
    """What was built on a withdrawn transaction stays pending."""
    garden.replace(Rebase, "_closure", lambda original: lambda self, roots, **more: list(roots))


@_bug("idle-cycle-asks-twice", "LIVENESS")
def _idle_cycle_asks_twice(garden: Garden) -> None:
    """A cycle with nothing to do pulls a second time."""

    def make(original: Any) -> Any:
        def pull(self: Any) -> Any:
            yield from original(self)
            yield from original(self)

        return pull

    garden.replace(cycle.Cycle, "_pull", make)


# ---------------------------------------------------------------- the device's commits


@_bug("commit-in-two-parts", "READ-YOUR-WRITES", "WHOLE", "PREFIX")
def _commit_in_two_parts(garden: Garden) -> None:
    """A local transaction is two storage commits."""

    def make(original: Any) -> Any:
        def store(self: Database, writer: Writer, origin: str) -> None:
            if origin == "local" and self.role is Role.DEVICE:
                changes = writer.finish()
                half = dict(list(changes.items())[: len(changes) // 2])
                if half:
                    self.storage.commit(half)
            original(self, writer, origin)

        return store

    garden.replace(Database, "_store", make)


@_bug(
    "acknowledged-before-durable",
    "LOCAL-DURABLE",
    "READ-YOUR-WRITES",
    knobs=_CALM | {"disk_full": 100},
)
def _acknowledged_early(garden: Garden) -> None:
    """A full disk is not told to the application."""

    def make(original: Any) -> Any:
        def store(self: Database, writer: Writer, origin: str) -> None:
            try:
                original(self, writer, origin)
            except StorageFullError:
                if self.role is Role.SERVER:
                    raise

        return store

    garden.replace(Database, "_store", make)


@_bug(
    "reset-drops-the-outbox",
    "RESET-KEEPS-OUTBOX",
    knobs=_CALM | {"restore_server": 20, "events": 2000},
)
def _reset_drops_outbox(garden: Garden) -> None:
    """Publishing the new state throws pending transactions away."""

    def make(original: Any) -> Any:
        def publish(writer: Writer, *rest: Any) -> None:
            original(writer, *rest)
            for key in writer.snapshot.scan_keys(READY, end_of(READY)):
                writer.delete(key)

        return publish

    garden.replace(applier, "publish_stage", make)


@_bug("random-from-outside", "SAME-SEED")
def _random_from_outside(garden: Garden) -> None:
    """Ids come from the operating system instead of the source that was given."""

    def make(original: Any) -> Any:
        def init(self: Database, *rest: Any, **options: Any) -> None:
            original(self, *rest, **(options | {"entropy": system_entropy}))

        return init

    garden.replace(Database, "__init__", make)


# ---------------------------------------------------------------- scope, adoption, stage


_SCOPED: Final = _CALM | {"scope": 150, "scope_in_cycle": 100, "pause_ms": 100, "tenants": 1}


@_bug("widening-cleared-by-a-push", "PREFIX", "CONVERGE", knobs=_SCOPED)
def _widening_cleared(garden: Garden) -> None:
    """A cursor taken along with a push clears what a wider scope still has to bring."""

    def make(original: Any) -> Any:
        def take_confirmed(self: DatabaseApplier, writer: Writer) -> None:
            state = writer.sync_state
            if state.cursor < self._confirmed <= state.reached:
                position.move_cursor(writer, state, self._confirmed)

        return take_confirmed

    garden.replace(DatabaseApplier, "_take_confirmed", make)


@_bug(
    "stage-survives-a-widening",
    "PREFIX",
    "CONVERGE",
    "UNEXPECTED",
    knobs=_SCOPED | {"pull_operations_max": 2},
)
def _stage_survives(garden: Garden) -> None:
    """What was staged for a narrower scope is published for the wider one."""

    def make(original: Any) -> Any:
        def switch(writer: Writer, *rest: Any, **options: Any) -> None:
            with mock.patch.object(writer, "abandon_stage", return_value=None):
                original(writer, *rest, **options)

        return switch

    garden.replace(scope, "_switch", make)


@_bug(
    "changes-during-a-widening-lost",
    "PREFIX",
    "NO-RESURRECTION",
    knobs=_SCOPED | {"pull_operations_max": 2},
)
def _changes_during_widening(garden: Garden) -> None:
    """What changes in a collection while it is pulled from nothing is not staged."""

    def make(original: Any) -> Any:
        def stage(writer: Writer, stage: Any, request: Any, response: Any) -> Any:
            if stage.full and stage.full_done:
                late = [i for i, name in enumerate(response.collections) if name in stage.full]
                commits = [
                    replace(c, operations=[o for o in c.operations if o.collection not in late])
                    for c in response.commits
                ]
                response = replace(response, commits=commits)
            return original(writer, stage, request, response)

        return stage

    garden.replace(applier, "stage_operations", make)


@_bug("stage-counts-twice", "CONVERGE", knobs=_SCOPED | {"pull_operations_max": 2})
def _stage_counts_twice(garden: Garden) -> None:
    """An entity that comes a second time while everything is staged counts twice."""

    def make(original: Any) -> Any:
        def stage(writer: Writer, stage: Any, *rest: Any) -> Any:
            made = original(writer, replace(stage, first_head=2**60), *rest)
            return replace(made, first_head=stage.first_head)

        return stage

    garden.replace(applier, "stage_operations", make)


@_bug(
    "tombstones-lost-at-publish",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=_CALM | {"pull_operations_max": 2, "deletes": 400},
)
def _tombstones_lost(garden: Garden) -> None:
    """Publishing a pull of several pages leaves out its deletions."""

    def make(original: Any) -> Any:
        def apply_deltas(writer: Writer, rebase: Rebase, stage: Any) -> None:
            take = rebase.take_clean

            def living(ref: Any, remote: BaseRow, old: EntityRow | None) -> None:
                if remote.payload is not None:
                    take(ref, remote, old)

            with mock.patch.object(rebase, "take_clean", living):
                original(writer, rebase, stage)

        return apply_deltas

    garden.replace(publish, "_apply_deltas", make)


@_bug(
    "floor-moves-under-a-reset",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=_CALM
    | {"pull_operations_max": 1, "purge": 100, "deletes": 400, "keys": 20, "latency_ms": 200},
)
def _floor_moves(garden: Garden) -> None:
    """Everything is being pulled, and goes on although the floor moved meanwhile."""

    def make(original: Any) -> Any:
        def ask(self: Any, request: Any, kind: Any) -> Any:
            response = yield from original(self, request, kind)
            return replace(response, floor=0) if isinstance(response, PullResponse) else response

        return ask

    garden.replace(cycle.Cycle, "_ask", make)


@_bug("narrowing-leaves-pending-behind", "NO-SILENT-LOSS", knobs=_SCOPED)
def _narrowing_leaves_pending(garden: Garden) -> None:
    """A collection leaves the scope with changes that are not on the server."""

    def make(original: Any) -> Any:
        return lambda writer, catalogue, leaving: None

    garden.replace(scope, "_refuse_pending", make)


@_bug("widening-forgets-what-was-local", "NO-SILENT-LOSS", knobs=_SCOPED)
def _widening_forgets(garden: Garden) -> None:
    """What was written outside the scope does not become pending when the scope widens."""
    garden.replace(
        scope, "schedule_adoption", lambda original: lambda writer, sources, *, compare: None
    )


@_bug(
    "reset-forgets-the-devices-side",
    "NO-SILENT-LOSS",
    knobs=_CALM | {"restore_server": 50, "events": 2000, "pause_ms": 100},
)
def _reset_forgets_device(garden: Garden) -> None:
    """A reset that was to keep the device's side takes the server's."""

    def make(original: Any) -> Any:
        def schedule(writer: Writer, sources: Any, *, compare: bool) -> None:
            if not compare:
                original(writer, sources, compare=compare)

        return schedule

    garden.replace(publish, "schedule_adoption", make)


@_bug(
    "in-flight-forgotten-at-a-reset",
    "NO-RESURRECTION",
    knobs=_CALM | {"lost": 300, "purge": 80, "deletes": 400, "keys": 2, "events": 400},
)
def _forgotten_at_a_reset(garden: Garden) -> None:
    """What was in flight and is not on the server counts as never accepted, though the server has
    forgotten what it accepted."""
    garden.replace(publish, "_unsettled", lambda original: lambda writer, stage, state: set())


_GRANTED: Final = _CALM | {"grants": 300}


@_bug("wider-grant-forgotten", "PREFIX", "CONVERGE", "NO-RESURRECTION", knobs=_GRANTED)
def _wider_grant_forgotten(garden: Garden) -> None:
    """What a token grants anew is not pulled from the beginning."""
    garden.replace(grants, "_gained", lambda original: lambda *rest: (set(), False))


@_bug("narrower-grant-keeps-what-is-there", "PREFIX", knobs=_GRANTED)
def _narrower_grant_keeps(garden: Garden) -> None:
    """Entities stay on a device whose token grants them no more."""
    garden.replace(grants, "_remove", lambda original: lambda writer, rebase, lost: None)


@_bug(
    "narrower-grant-drops-what-is-pending",
    "NO-SILENT-LOSS",
    "RESET-KEEPS-OUTBOX",
    "CONVERGE",
    knobs=_GRANTED,
)
def _narrower_grant_drops(garden: Garden) -> None:
    """Pending transactions go with the collections that are granted no more, and nobody is told."""

    def make(original: Any) -> Any:
        def withdraw(writer: Writer, rebase: Rebase, lost: Any) -> None:
            before = dict(writer.changes)
            counted = writer.head.discarded
            original(writer, rebase, lost)
            for key in [key for key in writer.changes if key[:1] == DISCARDED]:
                if key not in before:
                    del writer.changes[key]
            writer.head.discarded = counted
            rebase.report.withdrawn.clear()

        return withdraw

    garden.replace(grants, "_withdraw", make)


@_bug(
    "absence-outside-the-grant-counts",
    "NO-LOST-UPDATE",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=_GRANTED | {"purge": 80, "pull_operations_max": 2},
)
def _absence_counts(garden: Garden) -> None:
    """A full pull takes what is absent for deleted, also what the token does not grant."""

    def make(original: Any) -> Any:
        def full(writer: Writer, stage: Any) -> Any:
            state = writer.sync_state
            writer.set_sync_state(replace(state, granted=None))
            found = original(writer, stage)
            writer.set_sync_state(state)
            return found

        return full

    garden.replace(publish, "_full_collections", make)


@_bug(
    "grant-between-pages-ignored",
    "PREFIX",
    "CONVERGE",
    "NO-RESURRECTION",
    "WHOLE",
    knobs=_GRANTED | {"pull_operations_max": 2, "latency_ms": 200},
)
def _grant_between_pages(garden: Garden) -> None:
    """What comes while something is staged counts, whatever it was made under."""

    def make(original: Any) -> Any:
        def ask(self: cycle.Cycle, request: Any, state: Any) -> Any:
            if self._applier.stage() is None:
                return (yield from original(self, request, state))
            return (yield from self._ask(request, PullResponse))

        return ask

    garden.replace(cycle.Cycle, "_ask_page", make)


@_bug(
    "adopted-group-cut-in-two",
    "WHOLE",
    knobs=_CALM
    | {"restore_server": 50, "adopt_rows": 4, "push_operations_max": 1, "operations": 0},
)
def _adopted_group_cut(garden: Garden) -> None:
    """What was one transaction is made pending as two, where a bounded commit ends."""
    garden.replace(adopt, "_whole_groups", lambda original: lambda writer, keys: keys)


@_bug("base-versions-one-high", "NO-LOST-UPDATE")
def _base_one_high(garden: Garden) -> None:
    """A push names base versions one above those the device has."""
    garden.replace(batch, "version_of", lambda original: lambda row: original(row) + 1)


@_bug("have-begins-one-early", "PREFIX", "ORDER", "NO-RESURRECTION")
def _have_one_early(garden: Garden) -> None:
    """A pull says that the device has the commit before its own as well."""

    def make(original: Any) -> Any:
        def pull_request(self: Any, state: Any, cursor: int) -> Any:
            made = original(self, state, cursor)
            return replace(made, have=[(first - 1, last) for first, last in made.have])

        return pull_request

    garden.replace(cycle.Cycle, "_pull_request", make)


# ---------------------------------------------------------------- clocks


_TIMES: Final = _CALM | {"clock_offset_ms": 315_576_000_000}


@_bug("clamp-forgotten-on-the-server", "CLOCK", knobs=_TIMES)
def _clamp_forgotten_on_server(garden: Garden) -> None:
    """A timestamp ten years ahead is stored as it came, and wins for ever."""

    def make(original: Any) -> Any:
        def accept(self: Any, *rest: Any) -> PushResult:
            self._timestamp_max = 2**63
            result: PushResult = original(self, *rest)
            return result

        return accept

    garden.replace(decide.Deciding, "_accept", make)


@_bug("clamp-forgotten-on-the-device", "CLOCK", knobs=_TIMES)
def _clamp_forgotten_on_device(garden: Garden) -> None:
    """Policies see the time of a clock that is ahead."""
    garden.replace(Rebase, "_clamp", lambda original: lambda self, timestamp: timestamp)


@_bug("clamped-time-not-taken-over", "CLOCK", knobs=_TIMES)
def _clamped_not_taken(garden: Garden) -> None:
    """A device keeps its own time for what the server stored with another."""

    def make(original: Any) -> Any:
        def accepted(self: Any, *rest: Any) -> None:
            original(self, *rest[:-1], 0)

        return accepted

    garden.replace(settle.Settling, "_accepted", make)


@_bug("clock-stays-ahead", "CLOCK", knobs=_TIMES)
def _clock_stays_ahead(garden: Garden) -> None:
    """A device that was in the future once writes from there until that has come."""
    for module in (applier, clock):
        garden.replace(module, "lower_idle_clock", lambda original: lambda writer, latest: None)


@_bug("clock-not-heard", "CLOCK", knobs=_TIMES)
def _clock_not_heard(garden: Garden) -> None:
    """A slow device writes with times before those it has seen, and loses to its own past."""
    garden.replace(applier, "hear_clock", lambda original: lambda *rest: None)


# ---------------------------------------------------------------- what waits for a person


@_bug("discarded-in-a-second-commit", "NO-SILENT-LOSS", knobs=_CALM | {"crash_after": 60})
def _discarded_later(garden: Garden) -> None:
    """A withdrawn transaction reaches the list with the next commit only."""
    late: dict[int, dict[bytes, bytes | None]] = {}

    def make(original: Any) -> Any:
        def discard(self: Rebase, transaction: Any, *rest: Any) -> None:
            changes = self._writer.changes
            changes.update(late.pop(id(self._policy_for), {}))
            before = dict(changes)
            original(self, transaction, *rest)
            made = [key for key in changes if key not in before]
            late[id(self._policy_for)] = {key: changes.pop(key) for key in made}

        return discard

    garden.replace(Rebase, "_discard", make)


@_bug("loser-not-kept", "NO-SILENT-LOSS")
def _loser_not_kept(garden: Garden) -> None:
    """What a policy decides against is not kept."""
    garden.replace(Keeper, "add", lambda original: lambda self, *rest: None)


@_bug("own-side-kept-only", "NO-SILENT-LOSS", knobs=_CALM | {"policy_notes": 1})
def _own_side_only(garden: Garden) -> None:
    """What the server's side loses to this device is not kept."""

    def make(original: Any) -> Any:
        def add(self: Keeper, *rest: Any) -> None:
            ref, mine, theirs, identity, lost, *more = rest
            own = [each for each in lost if each[0] is Side.LOCAL]
            if own:
                original(self, ref, mine, theirs, identity, own, *more)

        return add

    garden.replace(Keeper, "add", make)


@_bug("loser-kept-in-a-second-commit", "NO-SILENT-LOSS", knobs=_CALM | {"crash_after": 60})
def _loser_later(garden: Garden) -> None:
    """What a policy decides against is kept with the next commit only."""
    waiting: list[tuple[Any, ...]] = []

    def make(original: Any) -> Any:
        def store(self: Keeper) -> int:
            late, waiting[:] = waiting[:], self._values
            self._values = late
            made: int = original(self)
            return made

        return store

    garden.replace(Keeper, "store", make)


@_bug("wrong-side-kept", "NO-SILENT-LOSS")
def _wrong_side_kept(garden: Garden) -> None:
    """The value that won is kept, and not the one that lost."""

    def make(original: Any) -> Any:
        def add(self: Keeper, *rest: Any) -> None:
            ref, mine, theirs, identity, lost, *more = rest
            turned = [(side, path, won, lost, base) for side, path, lost, won, base in lost]
            original(self, ref, mine, theirs, identity, turned, *more)

        return add

    garden.replace(Keeper, "add", make)


@_bug("persons-loser-not-kept", "NO-SILENT-LOSS", knobs=_CALM | {"policy_notes": 7, "person": 100})
def _persons_loser(garden: Garden) -> None:
    """What a person decides against is not kept."""

    def make(original: Any) -> Any:
        def resolve(self: Rebase, *rest: Any) -> None:
            with mock.patch.object(self, "_keeps", False):
                original(self, *rest)

        return resolve

    garden.replace(Rebase, "resolve", make)


@_bug("prune-takes-one-more", "NO-SILENT-LOSS", knobs=_CALM | {"overruled_max": 2})
def _prune_one_more(garden: Garden) -> None:
    """Pruning leaves one overruled value less than may be kept."""

    def make(original: Any) -> Any:
        def prune(writer: Writer, *, count_max: int, before_ms: int) -> bool:
            more: bool = original(writer, count_max=count_max - 1, before_ms=before_ms)
            return more

        return prune

    garden.replace(overruled, "prune", make)


@_bug("prune-takes-the-newest", "NO-SILENT-LOSS", knobs=_CALM | {"overruled_max": 2})
def _prune_newest(garden: Garden) -> None:
    """Where there are too many overruled values the newest are forgotten."""
    garden.replace(
        overruled, "_numbers", lambda original: lambda raw: list(reversed(original(raw)))
    )


@_bug(
    "prune-by-a-wrong-clock", "NO-SILENT-LOSS", knobs=_CALM | {"clock_offset_ms": 315_576_000_000}
)
def _prune_wrong_clock(garden: Garden) -> None:
    """The age of overruled values counts by the device's clock alone."""

    def make(original: Any) -> Any:
        def prune(self: DatabaseApplier) -> bool:
            self._heard_ms = 2**60
            done: bool = original(self)
            return done

        return prune

    garden.replace(DatabaseApplier, "_prune_overruled", make)


@_bug("written-back-nowhere", "READ-YOUR-WRITES", knobs=_CALM | {"person": 100})
def _written_back_nowhere(garden: Garden) -> None:
    """An overruled value leaves the list, and its field stays as it is."""
    garden.replace(review, "with_field", lambda original: lambda payload, path, field: payload)


@_bug("dependents-not-held", "SURFACED-ONCE", knobs=_CALM | {"policy_notes": 7, "policy_pairs": 7})
def _dependents_not_held(garden: Garden) -> None:
    """What was built on a transaction in conflict is pushed without it."""

    def make(original: Any) -> Any:
        def hold(self: Rebase, *rest: Any) -> None:
            with mock.patch.object(self, "_closure", lambda roots, **more: list(roots)):
                original(self, *rest)

        return hold

    garden.replace(Rebase, "hold", make)


@_bug(
    "one-decision-releases-all",
    "SURFACED-ONCE",
    knobs=_CALM | {"policy_notes": 7, "policy_pairs": 7, "person": 100},
)
def _one_releases_all(garden: Garden) -> None:
    """Deciding one conflict lets go what is held by others."""
    garden.replace(Rebase, "_is_blocked", lambda original: lambda self, transaction: False)


@_bug(
    "held-for-no-reason",
    "LIVENESS",
    knobs=_CALM
    | {"policy_notes": 7, "policy_pairs": 7, "operations": 4, "lost": 50}
    | {"restore_device": 30, "put_back": 60},
)
def _held_for_no_reason(garden: Garden) -> None:
    """What was held only through a write that the server has by now stays held."""

    def make(original: Any) -> Any:
        def remove(self: Rebase, step: Any) -> None:
            freed = set(self._freed)
            original(self, step)
            if self.load(step.transaction.sequence) is not None:
                self._freed = freed

        return remove

    garden.replace(Rebase, "_remove_op", make)


@_bug(
    "stale-decision-taken",
    "SURFACED-ONCE",
    knobs=_CALM | {"policy_notes": 7, "policy_pairs": 7, "think_ms": 100, "pause_ms": 100},
)
def _stale_decision(garden: Garden) -> None:
    """A person's decision counts although the server's side has changed since they looked."""

    def make(original: Any) -> Any:
        def resolve(self: Review, conflict: Any, resolution: Any) -> Any:
            for now in self.conflicts():
                if (now.collection, now.id_bytes) == (conflict.collection, conflict.id_bytes):
                    conflict = now
            return original(self, conflict, resolution)

        return resolve

    garden.replace(Review, "resolve", make)


@_bug("recommit-loses-a-write", "READ-YOUR-WRITES", "WHOLE", knobs=_CALM | {"person": 100})
def _recommit_loses(garden: Garden) -> None:
    """A discarded transaction is committed again without its first write."""

    def make(original: Any) -> Any:
        def recommit(self: Review, discarded: Any) -> int:
            made: int = original(self, replace(discarded, operations=discarded.operations[1:]))
            return made

        return recommit

    garden.replace(Review, "recommit", make)


# ---------------------------------------------------------------- the server


@_bug("history-kept-after-the-proof", "ORDER", knobs=_CALM | {"put_back": 80})
def _history_kept(garden: Garden) -> None:
    """A server whose files were put back tells only those who can prove it."""
    garden.replace(Database, "begin_history", lambda original: lambda self, times, within: False)


@_bug("base-version-ignored", "NO-LOST-UPDATE", "NO-RESURRECTION")
def _base_version_ignored(garden: Garden) -> None:
    """The server accepts whatever comes."""
    garden.replace(
        decide.Deciding, "_conflicts", lambda original: lambda self, transaction, places: False
    )


_COLUMNS: Final = _CALM | {"singles": 1000, "keys": 40, "pause_ms": 3000}


@_bug("base-version-ignored-in-columns", "NO-LOST-UPDATE", "NO-RESURRECTION", knobs=_COLUMNS)
def _base_ignored_in_columns(garden: Garden) -> None:
    """Deciding many transactions at once takes whatever they were built on."""

    def lower(row: bytes) -> tuple[Any, ...]:
        flags, sequence, _, *more = unpack_entity(row)
        return flags, sequence, 0, *more

    def make(original: Any) -> Any:
        def accept_all(self: Any, *rest: Any) -> Any:
            with mock.patch.object(service, "unpack_entity", lower):
                return original(self, *rest)

        return accept_all

    garden.replace(decide.Deciding, "_accept_all", make)


@_bug("digests-in-columns-of-one", "EXACTLY-ONCE", knobs=_COLUMNS)
def _digests_in_columns(garden: Garden) -> None:
    """Of many transactions decided at once all are remembered with the content of the first."""

    def make(original: Any) -> Any:
        def accept_all(self: Any, *rest: Any) -> Any:
            first = self._request.transactions[0].operations
            one = digest_operations(self._digest_heads, first)
            with mock.patch.object(service, "digest_operations", return_value=one):
                return original(self, *rest)

        return accept_all

    garden.replace(decide.Deciding, "_accept_all", make)


@_bug("equal-version-conflicts", "NO-FALSE-CONFLICT", "LIVENESS")
def _equal_version_conflicts(garden: Garden) -> None:
    """The server refuses what was made on exactly the version it has."""

    def make(original: Any) -> Any:
        def conflicts(self: Any, transaction: Any, places: list[bytes]) -> bool:
            lowered = [
                replace(op, base_version=max(0, op.base_version - 1))
                for op in transaction.operations
            ]
            found: bool = original(self, replace(transaction, operations=lowered), places)
            return found

        return conflicts

    garden.replace(decide.Deciding, "_conflicts", make)


@_bug("same-batch-conflicts", "NO-FALSE-CONFLICT")
def _same_batch_conflicts(garden: Garden) -> None:
    """A transaction conflicts with an earlier one of its own batch."""

    def make(original: Any) -> Any:
        def conflicts(self: Any, transaction: Any, places: list[bytes]) -> bool:
            self._written, self._began_at = {}, SEQUENCE_MAX
            found: bool = original(self, transaction, places)
            return found

        return conflicts

    garden.replace(decide.Deciding, "_conflicts", make)


@_bug("ids-not-remembered", "EXACTLY-ONCE", knobs=_WILD)
def _ids_not_remembered(garden: Garden) -> None:
    """The id of an accepted transaction is not stored with it."""

    def make(original: Any) -> Any:
        def accept(self: Any, transaction: Any, places: Any, digest: bytes) -> PushResult:
            result: PushResult = original(self, transaction, places, digest)
            del self._writer.changes[accepted_key(transaction.transaction_id)]
            return result

        return accept

    garden.replace(decide.Deciding, "_accept", make)


@_bug("ids-in-a-second-commit", "EXACTLY-ONCE", knobs=_WILD)
def _ids_in_second_commit(garden: Garden) -> None:
    """Ids are stored in a commit of their own, after the data."""
    late: dict[bytes, bytes | None] = {}

    def make_accept(original: Any) -> Any:
        def accept(self: Any, transaction: Any, places: Any, digest: bytes) -> PushResult:
            result: PushResult = original(self, transaction, places, digest)
            key = accepted_key(transaction.transaction_id)
            late[key] = self._writer.changes.pop(key)
            return result

        return accept

    def make_push(original: Any) -> Any:
        def push_many(self: DatabaseService, members: Any) -> Any:
            late.clear()
            answers = original(self, members)
            with self.database.write() as writer:
                writer.changes.update(late)
            return answers

        return push_many

    garden.replace(decide.Deciding, "_accept", make_accept)
    garden.replace(DatabaseService, "push_many", make_push)


@_bug(
    "ids-not-looked-up",
    "EXACTLY-ONCE",
    "NO-FALSE-CONFLICT",
    knobs=_WILD,
)
def _ids_not_looked_up(garden: Garden) -> None:
    """A transaction that comes again is decided again."""

    def make(original: Any) -> Any:
        def one(self: Any, transaction: Any, keys: Any, known: Any, values: Any) -> Any:
            return original(self, transaction, keys, None, values)

        return one

    garden.replace(decide.Deciding, "_one", make)


@_bug(
    "digest-ignored",
    "EXACTLY-ONCE",
    knobs=_WILD | {"copy_device": 30, "events": 2000, "policy_notes": 3, "operations": 3},
)
def _digest_ignored(garden: Garden) -> None:
    """An id that was accepted with other content is called accepted."""
    garden.replace(
        service,
        "digest_operations",
        lambda original: lambda heads, operations: bytes(32),
    )


@_bug("half-a-transaction-accepted", "WHOLE")
def _half_accepted(garden: Garden) -> None:
    """The last write of a transaction is dropped on the server."""

    def make(original: Any) -> Any:
        def accept(self: Any, transaction: Any, places: list[bytes], digest: bytes) -> PushResult:
            if len(places) > 1:
                transaction = replace(transaction, operations=transaction.operations[:-1])
                places = places[:-1]
            result: PushResult = original(self, transaction, places, digest)
            return result

        return accept

    garden.replace(decide.Deciding, "_accept", make)


@_bug("half-a-transaction-in-a-page", "ORDER", "WHOLE", knobs=_CALM | {"pull_operations_max": 2})
def _half_in_a_page(garden: Garden) -> None:
    """A page is cut inside a commit."""

    def make(original: Any) -> Any:
        def feed_page(snapshot: Any, after: int, limit: int) -> Any:
            keys, more = original(snapshot, after, limit)
            return keys[:limit], more or len(keys) > limit

        return feed_page

    garden.replace(pages, "feed_page", make)


@_bug("stale-row-sent", "LIVENESS", "ORDER", knobs=_CALM | {"stale_rows": 2000, "operations": 8})
def _stale_row_sent(garden: Garden) -> None:
    """A page takes an entity where its feed row is stale, and not where it changed last."""
    garden.replace(pages.Page, "_is_stale", lambda original: lambda *place: False)


@_bug(
    "a-current-row-swept",
    "CONVERGE",
    "ORDER",
    knobs=_CALM | {"stale_rows": 20, "operations": 8},
)
def _current_row_swept(garden: Garden) -> None:
    """With the stale feed rows of a list the row of an entity's latest change is removed."""

    def make(original: Any) -> Any:
        def sweep(self: Writer) -> None:
            if self.stale_rows:
                newest = self.snapshot.scan_keys(FEED, end_of(FEED), limit=1, reverse=True)
                self.changes.update(dict.fromkeys(newest))
            original(self)

        return sweep

    garden.replace(Writer, "sweep_stale", make)


@_bug(
    "a-purge-leaves-stale-rows",
    "UNEXPECTED",
    "CONVERGE",
    knobs=_CALM | {"stale_rows": 2000, "operations": 8, "purge": 80, "deletes": 400},
)
def _purge_leaves_stale_rows(garden: Garden) -> None:
    """Feed rows of entities that were forgotten stay, and lead nowhere."""

    def make(original: Any) -> Any:
        def purge(database: Any, up_to: int) -> Any:
            with mock.patch.object(Writer, "sweep_stale"):
                return original(database, up_to)

        return purge

    garden.replace(host, "purge_tombstones", make)


@_bug(
    "group-decided-on-old-state",
    "NO-LOST-UPDATE",
    "EXACTLY-ONCE",
    "NO-RESURRECTION",
    knobs=_CALM | {"group_ms": 500, "keys": 2, "devices": 6, "pause_ms": 100},
)
def _group_on_old_state(garden: Garden) -> None:
    """A push does not see the earlier members of its group."""

    def make(original: Any) -> Any:
        def run(self: Any, values: Any) -> Any:
            look = self._writer.snapshot.get_many
            with mock.patch.object(self._writer, "get_many", look):
                return original(self, values)

        return run

    garden.replace(decide.Deciding, "run", make)


@_bug("version-used-twice", "WHOLE", "ORDER", "EXACTLY-ONCE")
def _version_twice(garden: Garden) -> None:
    """Two transactions of one batch get the same version."""

    def make(original: Any) -> Any:
        def accept(self: Any, *rest: Any) -> PushResult:
            again = getattr(self, "planted_accepts", 0)
            self.planted_accepts = again + 1
            if again:
                self._writer.head.sequence -= 1
            result: PushResult = original(self, *rest)
            return result

        return accept

    garden.replace(decide.Deciding, "_accept", make)


@_bug("answered-from-memory", "SERVER-DURABLE", knobs=_CALM | {"server_disk_full": 100})
def _answered_from_memory(garden: Garden) -> None:
    """The server answers although its commit failed."""

    def make(original: Any) -> Any:
        def store(self: Database, writer: Writer, origin: str) -> None:
            try:
                original(self, writer, origin)
            except StorageFullError:
                if self.role is Role.DEVICE:
                    raise

        return store

    garden.replace(Database, "_store", make)


@_bug(
    "head-known-after-nothing",
    "ORDER",
    "LIVENESS",
    knobs=_WILD | {"server_writes": 300, "repeated": 300},
)
def _head_known(garden: Garden) -> None:
    """A push that stored nothing answers for the commit that comes after it."""

    def make(original: Any) -> Any:
        def push_many(self: DatabaseService, members: Any) -> Any:
            mark = self.database.commit_mark
            answers = original(self, members)
            if self._known is not None:
                self._known = (mark + 2, *self._known[1:])
            return answers

        return push_many

    garden.replace(DatabaseService, "push_many", make)


@_bug(
    "one-refusal-fails-the-batch",
    "NO-POISON",
    "LIVENESS",
    "NO-SILENT-LOSS",
    knobs=_CALM | {"refuse": 100},
)
def _refusal_fails_batch(garden: Garden) -> None:
    """A refused transaction makes the whole push an error."""

    def make(original: Any) -> Any:
        def refuse(self: Any, places: Any, code: str, message: str) -> PushResult:
            raise ProtocolError(message)

        return refuse

    garden.replace(decide.Deciding, "_refuse", make)


@_bug("refusal-spreads", "NO-POISON", knobs=_CALM | {"refuse": 100, "pause_ms": 3000})
def _refusal_spreads(garden: Garden) -> None:
    """After a refused transaction the rest of the batch is refused as well."""

    def make_refuse(original: Any) -> Any:
        def refuse(self: Any, *rest: Any) -> PushResult:
            self.planted_refusal = True
            result: PushResult = original(self, *rest)
            return result

        return refuse

    def make_one(original: Any) -> Any:
        def one(self: Any, transaction: Any, keys: Any, known: Any, values: Any) -> PushResult:
            if known is None and getattr(self, "planted_refusal", False):
                return PushResult(Verdict.REJECTED, code="refused", message="like the one before")
            result: PushResult = original(self, transaction, keys, known, values)
            return result

        return one

    garden.replace(decide.Deciding, "_refuse", make_refuse)
    garden.replace(decide.Deciding, "_one", make_one)


@_bug("error-leaves-traces", "NO-EFFECT", knobs=_CALM | {"purge": 50, "pause_ms": 3000})
def _error_leaves_traces(garden: Garden) -> None:
    """A pull that is answered with an error has written something."""

    def make(original: Any) -> Any:
        def check(self: DatabaseService, *rest: Any) -> None:
            try:
                original(self, *rest)
            except ResetRequiredError:
                with self.database.write() as writer:
                    writer.put(b"mlast_error", b"reset")
                raise

        return check

    garden.replace(DatabaseService, "_check_pull", make)


@_bug(
    "history-ignored",
    "ORDER",
    "PREFIX",
    knobs=_CALM | {"restore_server": 30, "events": 2000, "pause_ms": 100},
)
def _history_ignored(garden: Garden) -> None:
    """The server answers requests that name the history before a restore."""
    garden.replace(
        DatabaseService, "_check_history", lambda original: lambda self, history, cursor, head: None
    )


@_bug(
    "floor-ignored-in-pulls",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=_CALM | {"purge": 50, "pause_ms": 3000, "deletes": 400},
)
def _floor_ignored_in_pulls(garden: Garden) -> None:
    """A device below the floor gets a page instead of a reset."""

    def make(original: Any) -> Any:
        def check(self: DatabaseService, *rest: Any) -> None:
            with contextlib.suppress(ResetRequiredError):
                original(self, *rest)

        return check

    garden.replace(DatabaseService, "_check_pull", make)


@_bug(
    "floor-ignored-in-pushes",
    "NO-RESURRECTION",
    "NO-LOST-UPDATE",
    knobs=_WILD | {"purge": 50, "pause_ms": 3000, "deletes": 400, "lost": 300},
)
def _floor_ignored_in_pushes(garden: Garden) -> None:
    """A push from below the floor is decided as if tombstones were all there."""

    def make(original: Any) -> Any:
        def init(self: Any, *rest: Any) -> None:
            original(self, *rest)
            self._below_floor = False

        return init

    garden.replace(decide.Deciding, "__init__", make)


@_bug("reset-without-need", "RESET-ENDS", "LIVENESS", knobs=_CALM | {"purge": 50})
def _reset_without_need(garden: Garden) -> None:
    """A device at the floor is told to reset as well, for ever."""

    def make(original: Any) -> Any:
        def check(self: Any, request: Any, grant: Grant, head: int, floor: int) -> None:
            original(self, request, grant, head, floor)
            if floor and not request.full and request.cursor <= floor + 3:
                raise ResetRequiredError("planted")

        return check

    garden.replace(DatabaseService, "_check_pull", make)


@_bug(
    "purge-beyond-the-floor",
    "ORDER",
    "NO-RESURRECTION",
    "PREFIX",
    "CONVERGE",
    knobs=_CALM | {"purge": 50, "deletes": 400, "pause_ms": 3000},
)
def _purge_beyond_floor(garden: Garden) -> None:
    """Purging forgets tombstones above the floor it announces."""

    def make(original: Any) -> Any:
        def part(writer: Writer, floor: int, target: int) -> Any:
            keys, reached = original(writer, floor, writer.head.sequence)
            return keys, min(reached, target)

        return part

    garden.replace(maintenance, "_feed_part", make)


@_bug("token-opens-everything", "TENANT", knobs=_CALM | {"tenants": 2, "wrong_token": 100})
def _token_opens_everything(garden: Garden) -> None:
    """A valid token opens every database."""
    garden.replace(
        Grants, "on", lambda original: lambda self, db_id: Grant(self.subject, True, True)
    )


@_bug("pages-shared-between-databases", "TENANT", knobs=_CALM | {"tenants": 2, "devices": 4})
def _pages_shared(garden: Garden) -> None:
    """Pages are cached by cursor, and the database is left out of the key."""
    pages: dict[tuple[int, bool, str], Any] = {}

    def make(original: Any) -> Any:
        def pull(self: DatabaseService, request: Any, grant: Grant) -> Any:
            page = original(self, request, grant)
            key = (request.cursor, request.columns, str(request.collections))
            if page.commits or page.columns is not None:
                known = pages.setdefault(key, (self.db_id, page))
                return known[1] if known[0] != self.db_id else page
            return page

        return pull

    garden.replace(DatabaseService, "pull", make)


@_bug("own-gap-jumped", "ORDER", "PREFIX", knobs=_CALM | {"push_operations_max": 1})
def _own_gap_jumped(garden: Garden) -> None:
    """The server takes a device to have everything up to its newest own commit."""

    def make(original: Any) -> Any:
        return lambda request: request.have[-1][1] if request.have else request.cursor

    for room in (service, pages):
        garden.replace(room, "known_up_to", make)


@_bug("ids-forgotten-above-the-floor", "EXACTLY-ONCE", knobs=_WILD | {"purge": 80})
def _ids_forgotten(garden: Garden) -> None:
    """Purging forgets the ids of all transactions, not only of those at or below the floor."""

    def make(original: Any) -> Any:
        def forget(database: Database) -> None:
            with mock.patch.object(maintenance, "read_floor", return_value=2**60):
                original(database)

        return forget

    garden.replace(maintenance, "_forget_accepted", make)


@_bug(
    "backup-keeps-its-history",
    "ORDER",
    knobs=_CALM | {"restore_server": 50, "events": 2000, "pause_ms": 100},
)
def _backup_keeps_history(garden: Garden) -> None:
    """A server that comes back from a backup does not tell its devices so."""

    def make(original: Any) -> Any:
        def leave(self: Database, identity: dict[str, Any]) -> None:
            known = identity["history"]
            with mock.patch.object(self, "entropy", return_value=known):
                original(self, identity)

        return leave

    garden.replace(Database, "_leave_backup", make)


@_bug(
    "versions-outlive-their-history",
    "PREFIX",
    "NO-FALSE-CONFLICT",
    "NO-LOST-UPDATE",
    "CONVERGE",
    knobs=_CALM
    | {
        "restore_server": 30,
        "scope": 60,
        "scope_in_cycle": 60,
        "keys": 2,
        "events": 1500,
        "pause_ms": 300,
    },
)
def _versions_outlive_their_history(garden: Garden) -> None:
    """A scope that widens compares versions with those of a history that was lost meanwhile."""

    def make(original: Any) -> Any:
        def foreign(writer: Any, state: Any) -> frozenset[int]:
            none: frozenset[int] = frozenset()
            return original(writer, state) if state.foreign else none

        return foreign

    garden.replace(applier, "_foreign_collections", make)


@_bug(
    "superseded-takes-what-is-below",
    "NO-SILENT-LOSS",
    knobs=_CALM
    | {
        "events": 2000,
        "devices": 2,
        "tenants": 1,
        "keys": 1,
        "operations": 1,
        "policy_notes": 3,
        "policy_pairs": 3,
        "policy_carts": 3,
        "deletes": 0,
        "copy_device": 60,
        "restore_server": 30,
        "restore_device": 0,
        "latency_ms": 100,
        "think_ms": 300,
        "pause_ms": 100,
        "lost": 20,
        "disk_full": 0,
        "person": 0,
        "scope": 0,
        "server_writes": 0,
    },
)
def _superseded_takes_below(garden: Garden) -> None:
    """What another copy of the device pushed of a transaction stands for the older ones too."""

    def make(original: Any) -> Any:
        def settle(self: Rebase, transaction: PendingTransaction) -> Any:
            for op in transaction.operations:
                self._drop_below((op.collection, op.entity_id), op)
            return original(self, transaction)

        return settle

    garden.replace(Rebase, "settle_superseded", make)


@_bug(
    "a-group-shares-one-failure",
    "NO-EFFECT",
    "ORDER",
    "RESET-ENDS",
    knobs=_CALM
    | {"group_ms": 500, "devices": 6, "pause_ms": 100, "restore_server": 50, "late": 300},
)
def _group_shares_failure(garden: Garden) -> None:
    """One push of a group that cannot be decided fails the others."""

    def make(original: Any) -> Any:
        def push_many(self: DatabaseService, members: Any) -> Any:
            answers = original(self, members)
            errors = [answer for answer in answers if isinstance(answer, SyncError)]
            return [errors[0] for _ in answers] if errors else answers

        return push_many

    garden.replace(DatabaseService, "push_many", make)


__all__ = ["BUGS", "Bug", "Finding", "find", "planted", "try_all"]
