"""Planted bugs: how syncs are run, and how the server's process deals with its databases."""

from __future__ import annotations

from typing import Any

from entidb.errors import EntiDBError
from entidb.server.group_commit import GroupCommitter
from entidb.server.stores import Store
from entidb.sync import SyncEngine, SyncState
from entidb.sync.attempts import Attempts
from tests.planted.garden import CALM, WILD, Garden, bug


@bug("a-failed-sync-counts", "LIVENESS", knobs=WILD)
def _failed_sync_counts(garden: Garden) -> None:
    """When the last attempt has failed the sync returns as if it had worked."""

    def make(original: Any) -> Any:
        def run(self: Attempts, *rest: Any, **named: Any) -> Any:
            try:
                return (yield from original(self, *rest, **named))
            except EntiDBError:
                assert self.cycle is not None
                return self.cycle.result

        return run

    garden.replace(Attempts, "run", make)


@bug("a-state-stays-behind", "LIVENESS", knobs=WILD | {"attempts": 3})
def _state_stays(garden: Garden) -> None:
    """After a wait for another attempt the state says that the engine is still waiting."""

    def make(original: Any) -> Any:
        def enter(self: SyncEngine, state: SyncState) -> None:
            if self.state is not SyncState.RETRY_WAIT:
                original(self, state)

        return enter

    garden.replace(SyncEngine, "_enter", make)


@bug("cancel-is-forgotten", "LIVENESS", knobs=CALM | {"cancel": 50})
def _cancel_forgotten(garden: Garden) -> None:
    """A cycle that was cancelled goes on to its end."""
    garden.replace(SyncEngine, "_check_cancelled", lambda original: lambda self: None)


@bug(
    "answers-of-a-group-changed-round",
    "SERVER-DURABLE",
    "EXACTLY-ONCE",
    "NO-SILENT-LOSS",
    "UNEXPECTED",
    knobs=CALM | {"group_ms": 500, "devices": 6, "pause_ms": 100},
)
def _answers_changed_round(garden: Garden) -> None:
    """The members of a group get each other's answers."""

    def make(original: Any) -> Any:
        def commit(self: GroupCommitter, group: list[Any]) -> None:
            others = [done for _, _, done in reversed(group)]
            moved = [
                (request, grant, done)
                for (request, grant, _), done in zip(group, others, strict=True)
            ]
            original(self, moved)

        return commit

    garden.replace(GroupCommitter, "_commit", make)


@bug(
    "a-broken-store-is-kept",
    "LIVENESS",
    "NO-EFFECT",
    "UNEXPECTED",
    knobs=CALM | {"server_commit_unknown": 60},
)
def _broken_store_kept(garden: Garden) -> None:
    """After a storage error the server goes on with what it has open (R17)."""
    garden.replace(Store, "report", lambda original: lambda self, error: None)
