"""Planted bugs: what one commit of a device holds, and when it is acknowledged."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from entidb.db import Database, Role
from entidb.db.core import Core
from entidb.db.records import (
    READY,
    end_of,
)
from entidb.db.writer import Writer
from entidb.errors import (
    StorageFullError,
)
from entidb.sync.apply import applier
from entidb.types import system_entropy
from tests.planted.garden import CALM, Garden, bug


@bug("commit-in-two-parts", "READ-YOUR-WRITES", "WHOLE", "PREFIX")
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


@bug(
    "acknowledged-before-durable",
    "LOCAL-DURABLE",
    "READ-YOUR-WRITES",
    knobs=CALM | {"disk_full": 100},
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


@bug(
    "reset-drops-the-outbox",
    "RESET-KEEPS-OUTBOX",
    knobs=CALM | {"restore_server": 20, "events": 2000},
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


@bug("random-from-outside", "SAME-SEED")
def _random_from_outside(garden: Garden) -> None:
    """Ids come from the operating system instead of the source that was given."""

    def make(original: Any) -> Any:
        def init(self: Database, *rest: Any, **options: Any) -> None:
            original(self, *rest, **(options | {"entropy": system_entropy}))

        return init

    garden.replace(Database, "__init__", make)


@bug("the-state-of-sync-one-commit-late", "PREFIX", "ATTRIBUTED", "ORDER")
def _state_one_commit_late(garden: Garden) -> None:
    """What is remembered of the state of sync is what the commit before the last one left."""
    late = WeakKeyDictionary[Core, Any]()

    def make(original: Any) -> Any:
        def writer(self: Core, snapshot: Any) -> Any:
            made = original(self, snapshot)
            made.known_state, late[self] = late.get(self), made.known_state
            return made

        return writer

    garden.replace(Core, "_writer", make)


@bug("counts-one-commit-late", "CONVERGE")
def _counts_one_commit_late(garden: Garden) -> None:
    """What is remembered of counts is what the commit before the last one left."""
    late = WeakKeyDictionary[Core, Any]()

    def make(original: Any) -> Any:
        def writer(self: Core, snapshot: Any) -> Any:
            made = original(self, snapshot)
            made.known_counts, late[self] = late.get(self, {}), made.known_counts
            return made

        return writer

    garden.replace(Core, "_writer", make)
