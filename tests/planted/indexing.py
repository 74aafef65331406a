"""Planted bugs: indexes that fall out of step, and queries that trust them too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from entidb.db import maintenance, plans, sort_keys
from entidb.db.conditions import Compared
from entidb.db.entities import Entities
from entidb.db.index_run import IndexRun
from entidb.sync.apply.chains import Chains
from tests.planted.garden import CALM, Garden, bug

_INDEXES: Final = CALM | {"indexes": 1000, "events": 500}


def _silent(original: Callable[..., Any]) -> Callable[..., Any]:
    """A verb of the room of entities that nobody hears."""

    def verb(self: Entities, *args: Any, **options: Any) -> Any:
        watcher, self.watcher = self.watcher, None
        try:
            return original(self, *args, **options)
        finally:
            self.watcher = watcher

    return verb


@bug(
    "an-index-forgotten-in-columns",
    "INDEXED",
    knobs=_INDEXES | {"singles": 1000, "keys": 40, "pause_ms": 3000, "server_writes": 20},
)
def _forgotten_in_columns(garden: Garden) -> None:
    """What a server accepts in columns does not come into its indexes."""
    garden.replace(Entities, "accept_all", _silent)


@bug("an-index-forgotten-at-rebase", "INDEXED", knobs=_INDEXES | {"person": 100})
def _forgotten_at_rebase(garden: Garden) -> None:
    """Where pending work is put on newer state, indexes keep what was seen before."""

    def make(original: Any) -> Any:
        def replace(self: Any, ref: Any, new: Any, old: Any) -> None:
            watcher, self._writer.watcher = self._writer.watcher, None
            try:
                original(self, ref, new, old)
            finally:
                self._writer.watcher = watcher

        return replace

    garden.replace(Chains, "_replace", make)


@bug("an-index-forgotten-while-staged", "INDEXED", knobs=_INDEXES | {"pull_operations_max": 2})
def _forgotten_while_staged(garden: Garden) -> None:
    """What is published has no places in the indexes of its collection."""
    garden.replace(Entities, "stage_entities", _silent)
    garden.replace(Entities, "stage_entity", _silent)


@bug(
    "an-index-forgotten-at-publish",
    "INDEXED",
    knobs=_INDEXES | {"pull_operations_max": 2, "scope": 100, "restore_server": 50},
)
def _forgotten_at_publish(garden: Garden) -> None:
    """What is pending is carried over into a new table, and its places are not."""
    garden.replace(Entities, "carry_over", _silent)


@bug(
    "a-purge-forgets-the-indexes",
    "INDEXED",
    "CONVERGE",
    knobs=_INDEXES | {"pull_operations_max": 2, "scope": 150, "restore_server": 50},
)
def _purge_forgets(garden: Garden) -> None:
    """A replaced table is emptied, and its places in indexes stay."""
    garden.replace(
        maintenance, "sweep_places", lambda original: lambda writer, table, number, limit: False
    )


_RUNS: Final = _INDEXES | {"keys": 40}


@bug("a-run-outlives-a-commit", "INDEXED", "CONVERGE", "UNEXPECTED", knobs=_RUNS)
def _run_outlives(garden: Garden) -> None:
    """An index is built from what was read before somebody committed."""
    garden.replace(IndexRun, "_take_note", lambda original: lambda self, entity_id: None)


@bug("a-run-forgets-what-is-gone", "INDEXED", "CONVERGE", "UNEXPECTED", knobs=_RUNS)
def _run_forgets(garden: Garden) -> None:
    """A run writes places of entities that were changed since it read them."""
    garden.replace(IndexRun, "_unchanged", lambda original: lambda self, places: places)


@bug("a-run-forgets-whom-it-counts", "INDEXED", "CONVERGE", knobs=_RUNS)
def _run_forgets_whom(garden: Garden) -> None:
    """A run counts entities that were changed since it read them once more."""
    garden.replace(IndexRun, "_has", lambda original: lambda self, entity_id: False)


@bug("a-run-does-not-look-again", "INDEXED", "CONVERGE", "UNEXPECTED", knobs=_RUNS)
def _run_does_not_look(garden: Garden) -> None:
    """A run leaves out what was changed since it read it, and that is all."""

    def make(original: Any) -> Any:
        def look_again(self: IndexRun, writer: Any, count: int) -> None:
            kept = dict(writer.changes)
            original(self, writer, count)
            writer.changes.clear()
            writer.changes.update(kept)

        return look_again

    garden.replace(IndexRun, "_look_again", make)


@bug("a-range-ends-one-too-early", "INDEXED", knobs=_INDEXES)
def _range_ends_early(garden: Garden) -> None:
    """An index leaves out what is equal to the end of a range."""

    def make(original: Any) -> Any:
        def bounds(fixed: bytes, part: Any) -> Any:
            if isinstance(part, Compared) and part.sign == "<=":
                part = Compared(part.path, "<", part.other)
            return original(fixed, part)

        return bounds

    garden.replace(plans, "_bounds", make)


@bug("integers-before-floats", "INDEXED", knobs=_INDEXES)
def _integers_before_floats(garden: Garden) -> None:
    """An index orders integers and floats apart from each other."""

    def make(original: Any) -> Any:
        return {**original, float: lambda value: b"\x31" + original[float](value)[1:]}

    garden.replace(sort_keys, "_KEYS", make)


@bug("integers-as-floats", "INDEXED", knobs=_INDEXES | {"deletes": 0})
def _integers_as_floats(garden: Garden) -> None:
    """An index cannot tell integers beyond 2^53 apart."""

    def make(original: Any) -> Any:
        return {**original, int: lambda value: original[float](float(value))}

    garden.replace(sort_keys, "_KEYS", make)
