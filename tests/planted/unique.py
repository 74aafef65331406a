"""Planted bugs: what is unique on a server, and is not."""

from __future__ import annotations

from typing import Any, Final

from entidb.db import uniqueness
from entidb.db.entities import Entities
from entidb.db.indexing import Indexing
from entidb.server import decide, unique
from entidb.server.service import DatabaseService
from tests.planted.garden import CALM, Garden, bug

_UNIQUE: Final = CALM | {"unique": 6, "keys": 20, "policy_notes": 0}


@bug("a-group-does-not-see-its-members", "UNIQUE", knobs=_UNIQUE | {"group_ms": 30})
def _group_is_blind(garden: Garden) -> None:
    """What is unique is looked up in what was there before the group, or before the batch."""

    def make(original: Any) -> Any:
        return lambda writer, moved, *rest: original(writer, {}, *rest)

    garden.replace(uniqueness, "_holders", make)


# Where nobody asks for a value again before the run ends, only the index shows that it is kept.
@bug(
    "a-deletion-frees-nothing",
    "UNIQUE",
    "CONVERGE",
    knobs=_UNIQUE | {"unique": 4, "deletes": 400, "indexes": 0},
)
def _deletion_frees_nothing(garden: Garden) -> None:
    """An entity that is deleted has its value for good."""
    deleting: list[bool] = []

    def make_accept(original: Any) -> Any:
        def accept(self: Any, info: Any, entity_id: Any, old: Any, payload: Any, *rest: Any) -> Any:
            deleting[:] = [True] if payload is None else []
            try:
                return original(self, info, entity_id, old, payload, *rest)
            finally:
                deleting.clear()

        return accept

    def make_change(original: Any) -> Any:
        def change(self: Indexing, kept: Any, *rest: Any) -> None:
            if not (deleting and kept.unique):
                original(self, kept, *rest)

        return change

    garden.replace(Entities, "accept", make_accept)
    garden.replace(Indexing, "_change", make_change)


@bug("unique-before-the-turn", "UNIQUE", knobs=_UNIQUE | {"group_ms": 30})
def _before_the_turn(garden: Garden) -> None:
    """Who has a value is looked up before it is the push's turn to be decided."""
    earlier: list[Any] = []

    def make_push(original: Any) -> Any:
        def push_many(self: DatabaseService, members: Any) -> Any:
            with self.database.view() as view:
                view.watcher = Indexing(view, self.database.index_functions)
                earlier[:] = [view]
                return original(self, members)

        return push_many

    def make_taken(original: Any) -> Any:
        return lambda writer, writes: original(earlier[0], writes)

    garden.replace(DatabaseService, "push_many", make_push)
    garden.replace(unique, "first_taken", make_taken)


@bug("unique-forgotten-in-columns", "UNIQUE", knobs=_UNIQUE | {"singles": 1000, "pause_ms": 3000})
def _forgotten_in_columns(garden: Garden) -> None:
    """Many transactions that are decided at once are not asked what they share."""

    def make(original: Any) -> Any:
        def accept_all(self: Any, *rest: Any) -> Any:
            asks, self._asks = self._asks, False
            try:
                return original(self, *rest)
            finally:
                self._asks = asks

        return accept_all

    garden.replace(decide.Deciding, "_accept_all", make)


@bug("unique-among-others-alone", "UNIQUE", knobs=_UNIQUE | {"operations": 8})
def _among_others(garden: Garden) -> None:
    """Two entities of one transaction may have the same."""

    def make(original: Any) -> Any:
        def first_taken(writer: Any, writes: Any) -> Any:
            found = original(writer, writes)
            own = {entity_id for _, entity_id, _ in writes}
            return None if found is not None and found.holder in own else found

        return first_taken

    garden.replace(unique, "first_taken", make)


@bug("programs-are-not-asked", "UNIQUE", knobs=_UNIQUE | {"server_writes": 100})
def _programs_not_asked(garden: Garden) -> None:
    """A program on the server writes what it likes."""
    garden.replace(uniqueness, "has_unique", lambda original: lambda info: False)
