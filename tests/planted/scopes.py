"""Planted bugs: scopes and grants that change, adoption, the stage of a first sync or a reset."""

from __future__ import annotations

from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from entidb.db import adopt, scope
from entidb.db.records import (
    DISCARDED,
    BaseRow,
    EntityRow,
)
from entidb.db.writer import Writer
from entidb.protocol import PullResponse
from entidb.sync import grants
from entidb.sync.apply import applier, batch, position, publish
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.rebase import Rebase
from entidb.sync.exchange import Exchange
from entidb.sync.pulling import Pulling
from tests.planted.garden import CALM, Garden, bug

_SCOPED: Final = CALM | {"scope": 150, "scope_in_cycle": 100, "pause_ms": 100, "tenants": 1}


@bug("widening-cleared-by-a-push", "PREFIX", "CONVERGE", knobs=_SCOPED)
def _widening_cleared(garden: Garden) -> None:
    """A cursor taken along with a push clears what a wider scope still has to bring."""

    def make(original: Any) -> Any:
        def take_confirmed(self: DatabaseApplier, writer: Writer, **more: Any) -> Any:
            state = writer.sync_state
            if state.cursor < self._confirmed <= state.reached:
                position.move_cursor(writer, state, self._confirmed, state.seen)
            return original(self, writer, **more)

        return take_confirmed

    garden.replace(DatabaseApplier, "_take_confirmed", make)


@bug(
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


@bug(
    "changes-during-a-widening-lost",
    "PREFIX",
    "NO-FALSE-CONFLICT",
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


@bug("stage-counts-twice", "CONVERGE", knobs=_SCOPED | {"pull_operations_max": 2})
def _stage_counts_twice(garden: Garden) -> None:
    """An entity that comes a second time while everything is staged counts twice."""

    def make(original: Any) -> Any:
        def stage(writer: Writer, stage: Any, *rest: Any) -> Any:
            made = original(writer, replace(stage, first_head=2**60), *rest)
            return replace(made, first_head=stage.first_head)

        return stage

    garden.replace(applier, "stage_operations", make)


@bug(
    "tombstones-lost-at-publish",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=CALM | {"pull_operations_max": 2, "deletes": 400},
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


@bug(
    "floor-moves-under-a-reset",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=CALM
    | {"pull_operations_max": 1, "purge": 100, "deletes": 400, "keys": 20, "latency_ms": 200},
)
def _floor_moves(garden: Garden) -> None:
    """Everything is being pulled, and goes on although the floor moved meanwhile."""

    def make(original: Any) -> Any:
        def ask(self: Any, request: Any, kind: Any) -> Any:
            response = yield from original(self, request, kind)
            return replace(response, floor=0) if isinstance(response, PullResponse) else response

        return ask

    garden.replace(Exchange, "ask", make)


@bug("narrowing-leaves-pending-behind", "NO-SILENT-LOSS", knobs=_SCOPED)
def _narrowing_leaves_pending(garden: Garden) -> None:
    """A collection leaves the scope with changes that are not on the server."""

    def make(original: Any) -> Any:
        return lambda writer, catalogue, leaving: None

    garden.replace(scope, "_refuse_pending", make)


@bug("widening-forgets-what-was-local", "NO-SILENT-LOSS", knobs=_SCOPED)
def _widening_forgets(garden: Garden) -> None:
    """What was written outside the scope does not become pending when the scope widens."""
    garden.replace(
        scope, "schedule_adoption", lambda original: lambda writer, sources, *, compare: None
    )


@bug(
    "reset-forgets-the-devices-side",
    "NO-SILENT-LOSS",
    knobs=CALM | {"restore_server": 50, "events": 2000, "pause_ms": 100},
)
def _reset_forgets_device(garden: Garden) -> None:
    """A reset that was to keep the device's side takes the server's."""

    def make(original: Any) -> Any:
        def schedule(writer: Writer, sources: Any, *, compare: bool) -> None:
            if not compare:
                original(writer, sources, compare=compare)

        return schedule

    garden.replace(publish, "schedule_adoption", make)


@bug(
    "in-flight-forgotten-at-a-reset",
    "NO-RESURRECTION",
    knobs=CALM | {"lost": 300, "purge": 80, "deletes": 400, "keys": 2, "events": 400},
)
def _forgotten_at_a_reset(garden: Garden) -> None:
    """What was in flight and is not on the server counts as never accepted, though the server has
    forgotten what it accepted."""
    garden.replace(publish, "_unsettled", lambda original: lambda writer, stage, state: set())


_GRANTED: Final = CALM | {"grants": 300}


@bug("wider-grant-forgotten", "PREFIX", "CONVERGE", "NO-RESURRECTION", knobs=_GRANTED)
def _wider_grant_forgotten(garden: Garden) -> None:
    """What a token grants anew is not pulled from the beginning."""
    garden.replace(grants, "_gained", lambda original: lambda *rest: (set(), False))


@bug("narrower-grant-keeps-what-is-there", "PREFIX", knobs=_GRANTED)
def _narrower_grant_keeps(garden: Garden) -> None:
    """Entities stay on a device whose token grants them no more."""
    garden.replace(grants, "_remove", lambda original: lambda writer, rebase, lost: None)


@bug(
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


@bug(
    "absence-outside-the-grant-counts",
    "NO-LOST-UPDATE",
    "NO-RESURRECTION",
    "PREFIX",
    "NO-FALSE-CONFLICT",
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


@bug(
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
        def ask(self: Any, request: Any, state: Any) -> Any:
            if self._exchange.applier.stage() is None:
                return (yield from original(self, request, state))
            return (yield from self._exchange.ask(request, PullResponse))

        return ask

    garden.replace(Pulling, "_ask_page", make)


@bug(
    "adopted-group-cut-in-two",
    "WHOLE",
    knobs=CALM | {"restore_server": 50, "adopt_rows": 4, "push_operations_max": 1, "operations": 0},
)
def _adopted_group_cut(garden: Garden) -> None:
    """What was one transaction is made pending as two, where a bounded commit ends."""
    garden.replace(adopt, "_whole_groups", lambda original: lambda writer, keys: keys)


@bug("base-versions-one-high", "NO-LOST-UPDATE")
def _base_one_high(garden: Garden) -> None:
    """A push names base versions one above those the device has."""
    garden.replace(
        batch, "versions_of", lambda original: lambda rows: [n + 1 for n in original(rows)]
    )


@bug("have-begins-one-early", "PREFIX", "ORDER", "NO-RESURRECTION")
def _have_one_early(garden: Garden) -> None:
    """A pull says that the device has the commit before its own as well."""

    def make(original: Any) -> Any:
        def pull_request(self: Any, state: Any, cursor: int) -> Any:
            made = original(self, state, cursor)
            return replace(made, have=[(first - 1, last) for first, last in made.have])

        return pull_request

    garden.replace(Pulling, "_pull_request", make)
