"""Planted bugs: pulling and applying pages."""

from __future__ import annotations

from typing import Any

from entidb.db.records import (
    EntityRow,
)
from entidb.db.writer import Writer
from entidb.sync.apply import applier, page, position, publish, settle
from entidb.sync.apply.applier import DatabaseApplier
from entidb.sync.apply.rebase import Rebase
from tests.planted.garden import CALM, Garden, bug


@bug("cursor-before-data", "PREFIX")
def _cursor_before_data(garden: Garden) -> None:
    """The cursor is stored in a commit before the page it belongs to."""

    def make(original: Any) -> Any:
        def apply(self: DatabaseApplier, request: Any, response: Any) -> Any:
            with self.database.write() as writer:
                state = writer.sync_state
                position.move_cursor(writer, state, response.cursor, state.seen)
            with self.database.write() as writer:
                foreign = position.foreign_collections(writer, state)
                rebase = Rebase(writer, self.policy_for, response.time, foreign=foreign)
                page.take_page(writer, rebase, response)
                rebase.release()
            return rebase.report

        return apply

    garden.replace(DatabaseApplier, "apply", make)


@bug("cursor-one-short", "ORDER", "PREFIX")
def _cursor_one_short(garden: Garden) -> None:
    """After a page the cursor is one short of what was applied."""
    for module in (applier, publish):
        garden.replace(
            module,
            "move_cursor",
            lambda original: (
                lambda writer, state, cursor, seen: original(
                    writer, state, max(0, cursor - 1), seen
                )
            ),
        )


@bug("base-not-replaced", "PREFIX", "NO-SILENT-LOSS")
def _base_not_replaced(garden: Garden) -> None:
    """A pulled change to an entity with pending changes leaves its old base."""
    garden.replace(Writer, "set_base", lambda original: lambda self, ref, row, base: None)


@bug("deletions-not-applied", "NO-RESURRECTION", "PREFIX")
def _deletions_not_applied(garden: Garden) -> None:
    """A pulled tombstone of a clean entity is skipped."""

    def make(original: Any) -> Any:
        def take_clean(self: Rebase, ref: Any, remote: Any, old: EntityRow | None) -> None:
            if remote.payload is not None:
                original(self, ref, remote, old)

        return take_clean

    garden.replace(Rebase, "take_clean", make)


@bug(
    "stage-loses-last-page",
    "PREFIX",
    "WHOLE",
    knobs=CALM | {"pull_operations_max": 2},
)
def _deltas_lost(garden: Garden) -> None:
    """What a pull of several pages brought is published without its changes."""
    garden.replace(publish, "_apply_deltas", lambda original: lambda writer, rebase, stage: None)


@bug(
    "stage-published-in-parts",
    "PREFIX",
    "WHOLE",
    "ORDER",
    knobs=CALM | {"pull_operations_max": 2},
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


@bug("own-ranges-wrong", "PREFIX", "ORDER", knobs=CALM | {"push_operations_max": 5})
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


@bug("done-is-a-conflict", "NO-FALSE-CONFLICT")
def _done_is_a_conflict(garden: Garden) -> None:
    """Equal bytes on both sides count as a conflict."""
    garden.replace(Rebase, "_done_prefix", lambda original: lambda self, chain, remote: 0)


@bug("own-count-forgotten", "CONVERGE", "UNEXPECTED")
def _count_forgotten(garden: Garden) -> None:
    """Deletions do not lower a collection's count."""

    def make(original: Any) -> Any:
        def count(self: Writer, collection: int, by: int) -> None:
            original(self, collection, max(0, by))

        return count

    garden.replace(Writer, "count", make)
