"""Planted bugs: several nodes on one store, each with a memory of its own.

Those of the first half are in the product's code. The others are in the model of a store that the
simulator has (``entidb.testing.node_store``): they show what becomes of devices if a store breaks
its promise, and that it is noticed.
"""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

from entidb.db import core, terms
from entidb.db.core import Core
from entidb.db.hearing import Hearing
from entidb.db.moment import Moment
from entidb.server import service
from entidb.server.service import DatabaseService
from entidb.storage import MemoryStorage
from entidb.storage.memory import MemorySnapshot
from entidb.testing import node_store
from entidb.testing.node_store import NodeStorage, SharedStore, _copy
from tests.planted.garden import CALM, Garden, bug

NODES = CALM | {"nodes": 3}
PAUSED = NODES | {"node_pause": 50, "upcast": 0}

#: A standby leads that lacks commits, under nodes that stay.
PROMOTED = NODES | {"put_back": 200, "events": 1200}

# ---------------------------------------------------------------- above the store


@bug("a-promotion-begins-no-term", "ORDER", "PREFIX", "NO-FALSE-CONFLICT", knobs=PROMOTED)
def _no_term_after_a_promotion(garden: Garden) -> None:
    """A node begins a term when it has opened a database, and none when another server leads."""
    garden.replace(terms, "opening_of", lambda original: lambda mark: 0)


@bug("one-proof-ends-two-histories", "NO-EFFECT", knobs=PROMOTED | {"nodes": 2, "node_pause": 80})
def _two_histories(garden: Garden) -> None:
    """A process that has found a proof begins a history, also where another has done so since."""
    garden.replace(
        core, "another_history", lambda original: lambda *rest: original(*rest[:4], None)
    )


@bug("the-mark-of-another-past", "ORDER", "FRESH", "PREFIX", knobs=PROMOTED)
def _mark_of_another_past(garden: Garden) -> None:
    """What is remembered counts on, where another server has come to the same mark."""
    garden.replace(node_store, "OPENING", lambda original: 0)


@bug("idle-answer-from-memory", "FRESH", knobs=NODES)
def _idle_from_memory(garden: Garden) -> None:
    """Nothing new is what a node says for as long as it has committed nothing itself."""

    def make(original: Any) -> Any:
        def idle_pull(self: DatabaseService, *rest: Any) -> Any:
            with mock.patch.object(Moment, "is_current", return_value=True):
                return original(self, *rest)

        return idle_pull

    garden.replace(DatabaseService, "idle_pull", make)


@bug("history-from-memory", "ORDER", "FRESH", knobs=NODES | {"put_back": 200, "events": 1200})
def _history_from_memory(garden: Garden) -> None:
    """A node does not look whether another has begun a history."""
    garden.replace(Core, "history", lambda original: property(lambda self: self._history))


@bug("floor-from-memory", "FRESH", "NO-RESURRECTION", knobs=NODES | {"purge": 80, "deletes": 400})
def _floor_from_memory(garden: Garden) -> None:
    """The floor is the one that a node has read first."""

    def make(original: Any) -> Any:
        floors: dict[int, int] = {}

        def read_floor(view: Any) -> int:
            return floors.setdefault(id(view.moment.source), original(view))

        return read_floor

    garden.replace(service, "read_floor", make)


@bug("news-is-lost", "HEARD", knobs=NODES | {"node_pause": 300, "server_writes": 300})
def _news_is_lost(garden: Garden) -> None:
    """What was committed while a node listened counts as heard."""

    def make(original: Any) -> Any:
        def step(self: Hearing, mark: int) -> int:
            original(self, mark)
            storage = self._storage()
            assert storage is not None
            return storage.mark()

        return step

    garden.replace(Hearing, "step", make)


# ---------------------------------------------------------------- in the store


@bug("fenced-in-commits-alone", "FRESH", "HEARD", "ORDER", "CONVERGE", knobs=NODES)
def _fenced_in_commits(garden: Garden) -> None:
    """Who reads is not asked whether it is the newest state; who commits is."""

    def make(original: Any) -> Any:
        def take(self: NodeStorage) -> Any:
            kept = self.__dict__.get("planted")
            if not self._turn.taken and kept is not None and self._rng.random() < 0.3:
                return MemorySnapshot(cast(MemoryStorage, self.inner), kept)
            made = original(self)
            self.__dict__["planted"] = _copy(cast(MemoryStorage, self.inner))._state
            return made

        return take

    garden.replace(NodeStorage, "_take_snapshot", make)


@bug(
    "mark-compared-before-the-commit",
    "SERVER-DURABLE",
    "NO-LOST-UPDATE",
    "ORDER",
    "WHOLE",
    # Two states have one mark then, and what a node remembers is believed by its mark.
    "FRESH",
    knobs=PAUSED,
)
def _compared_before(garden: Garden) -> None:
    """The fence is looked at before the transaction of the commit, and not in it."""

    def make(original: Any) -> Any:
        def commit(self: NodeStorage, batch: Any, after: Any = None) -> Any:
            self.inner.commit({}, after)
            return original(self, batch)

        return commit

    garden.replace(NodeStorage, "commit", make)


@bug("no-barrier-after-a-restart", "ORDER", "FRESH", knobs=NODES | {"standby_away": 100})
def _no_barrier(garden: Garden) -> None:
    """A node reads what a restarted primary shows, before the standby has it."""
    garden.replace(SharedStore, "bar", lambda original: lambda self: None)


@bug("cancelled-is-a-success", "SERVER-DURABLE", knobs=NODES | {"standby_away": 100})
def _cancelled_succeeds(garden: Garden) -> None:
    """The warning that comes with a commit is not read."""

    def make(original: Any) -> Any:
        return lambda *, answered, warned: not answered

    garden.replace(node_store, "is_unknown", make)
