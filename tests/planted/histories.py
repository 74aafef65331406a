"""Planted bugs: histories, floors, tenants and backups of the server."""

from __future__ import annotations

import contextlib
from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from entidb import cbor
from entidb.db import Database, maintenance, terms
from entidb.db.records import META_IDENTITY
from entidb.db.replica import ReplicaState
from entidb.db.terms import Terms
from entidb.db.writer import Writer
from entidb.errors import (
    ResetRequiredError,
    SyncError,
)
from entidb.protocol import PullResponse, decode, operations_count
from entidb.server import decide, pages, service
from entidb.server.auth import Grants
from entidb.server.hooks import Grant
from entidb.server.proofs import Proofs
from entidb.server.service import DatabaseService
from entidb.sync import pulling
from entidb.sync.apply import applier, image, position, settle
from entidb.types import SeenCommit
from tests.planted.garden import CALM, WILD, Garden, bug


@bug(
    "history-ignored",
    "ORDER",
    "PREFIX",
    knobs=CALM | {"restore_server": 30, "events": 2000, "pause_ms": 100},
)
def _history_ignored(garden: Garden) -> None:
    """The server answers requests that name the history before a restore."""
    garden.replace(DatabaseService, "_check_history", lambda original: lambda self, *rest: None)


@bug(
    "floor-ignored-in-pulls",
    "NO-RESURRECTION",
    "PREFIX",
    knobs=CALM | {"purge": 50, "pause_ms": 3000, "deletes": 400},
)
def _floor_ignored_in_pulls(garden: Garden) -> None:
    """A device below the floor gets a page instead of a reset."""

    def make(original: Any) -> Any:
        def check(self: DatabaseService, *rest: Any) -> None:
            with contextlib.suppress(ResetRequiredError):
                original(self, *rest)

        return check

    garden.replace(DatabaseService, "check_pull", make)


@bug(
    "floor-ignored-in-pushes",
    "NO-RESURRECTION",
    "NO-LOST-UPDATE",
    knobs=WILD | {"purge": 50, "pause_ms": 3000, "deletes": 400, "lost": 300},
)
def _floor_ignored_in_pushes(garden: Garden) -> None:
    """A push from below the floor is decided as if tombstones were all there."""

    def make(original: Any) -> Any:
        def init(self: Any, *rest: Any) -> None:
            original(self, *rest)
            self._below_floor = False

        return init

    garden.replace(decide.Deciding, "__init__", make)


@bug("reset-without-need", "RESET-ENDS", "LIVENESS", knobs=CALM | {"purge": 50})
def _reset_without_need(garden: Garden) -> None:
    """A device at the floor is told to reset as well, for ever."""

    def make(original: Any) -> Any:
        def check(
            self: Any, request: Any, grant: Grant, seen: int, head: int, floor: int, *rest: Any
        ) -> None:
            original(self, request, grant, seen, head, floor, *rest)
            if floor and not request.full and request.cursor <= floor + 3:
                raise ResetRequiredError("planted")

        return check

    garden.replace(DatabaseService, "check_pull", make)


@bug(
    "purge-beyond-the-floor",
    "ORDER",
    "NO-RESURRECTION",
    "PREFIX",
    "CONVERGE",
    knobs=CALM | {"purge": 50, "deletes": 400, "pause_ms": 3000},
)
def _purge_beyond_floor(garden: Garden) -> None:
    """Purging forgets tombstones above the floor it announces."""

    def make(original: Any) -> Any:
        def part(writer: Writer, floor: int, target: int) -> Any:
            keys, reached = original(writer, floor, writer.head.sequence)
            return keys, min(reached, target)

        return part

    garden.replace(maintenance, "_feed_part", make)


@bug("token-opens-everything", "TENANT", knobs=CALM | {"tenants": 2, "wrong_token": 100})
def _token_opens_everything(garden: Garden) -> None:
    """A valid token opens every database."""
    garden.replace(
        Grants, "on", lambda original: lambda self, db_id: Grant(self.subject, True, True)
    )


@bug("pages-shared-between-databases", "TENANT", knobs=CALM | {"tenants": 2, "devices": 4})
def _pages_shared(garden: Garden) -> None:
    """Pages are cached by cursor, and the database is left out of the key."""
    pages: dict[tuple[int, bool, str], tuple[str, bytes]] = {}

    def make(original: Any) -> Any:
        def pull_bytes(self: DatabaseService, request: Any, grant: Grant, *rest: Any) -> Any:
            raw = original(self, request, grant, *rest)
            page = decode(PullResponse, raw)
            key = (request.cursor, request.columns, str(request.collections))
            if operations_count(page):
                known = pages.setdefault(key, (self.db_id, raw))
                return known[1] if known[0] != self.db_id else raw
            return raw

        return pull_bytes

    garden.replace(DatabaseService, "pull_bytes", make)


@bug("own-gap-jumped", "ORDER", "PREFIX", knobs=CALM | {"push_operations_max": 1})
def _own_gap_jumped(garden: Garden) -> None:
    """The server takes a device to have everything up to its newest own commit."""

    def make(original: Any) -> Any:
        return lambda request: request.have[-1][1] if request.have else request.cursor

    for room in (service, pages):
        garden.replace(room, "known_up_to", make)


@bug("ids-forgotten-above-the-floor", "EXACTLY-ONCE", knobs=WILD | {"purge": 80})
def _ids_forgotten(garden: Garden) -> None:
    """Purging forgets the ids of all transactions, not only of those at or below the floor."""

    def make(original: Any) -> Any:
        def forget(database: Database) -> None:
            with mock.patch.object(maintenance, "read_floor", return_value=2**60):
                original(database)

        return forget

    garden.replace(maintenance, "_forget_accepted", make)


@bug(
    "backup-keeps-its-history",
    "ORDER",
    knobs=CALM | {"restore_server": 50, "events": 2000, "pause_ms": 100},
)
def _backup_keeps_history(garden: Garden) -> None:
    """A server that comes back from a backup does not tell its devices so."""

    def make(original: Any) -> Any:
        def leave(self: Database) -> None:
            with self.storage.snapshot() as snapshot:
                raw = snapshot.get(META_IDENTITY)
            known = cbor.decode_trusted(raw or b"")["history"]
            with mock.patch.object(self, "entropy", return_value=known):
                original(self)

        return leave

    garden.replace(Database, "_leave_backup", make)


@bug(
    "versions-outlive-their-history",
    "PREFIX",
    "NO-FALSE-CONFLICT",
    "NO-LOST-UPDATE",
    "CONVERGE",
    knobs=CALM
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

    for module in (applier, position):
        garden.replace(module, "foreign_collections", make)


@bug(
    "a-group-shares-one-failure",
    "NO-EFFECT",
    "ORDER",
    "RESET-ENDS",
    "PULL-FIRST",
    knobs=CALM
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


_OLDER = CALM | {"put_back": 150, "events": 700}


@bug("one-term-for-all-openings", "ORDER", "PREFIX", knobs=_OLDER)
def _one_term(garden: Garden) -> None:
    """Once a term has begun, none does when the files are opened again."""

    def make(original: Any) -> Any:
        def begin(self: Terms, writer: Writer) -> None:
            if terms.newest_term(writer.snapshot) is None:
                original(self, writer)

        return begin

    garden.replace(Terms, "begin", make)


@bug("a-seen-commit-is-believed", "ORDER", "LIVENESS", knobs=_OLDER)
def _seen_is_believed(garden: Garden) -> None:
    """A server does not look whether a commit that was seen is its own; the device does."""
    garden.replace(Proofs, "has_parted", lambda original: lambda self, request, view: False)


@bug("pages-of-several-pasts", "PREFIX", "ORDER", knobs=_OLDER | {"pull_operations_max": 1})
def _pages_of_pasts(garden: Garden) -> None:
    """Of a pull in pages a device remembers what it has seen when all of them are there."""
    garden.replace(applier, "see_page", lambda original: lambda *rest: None)
    garden.replace(pulling, "seen_in", lambda original: lambda state, answer: state.seen)


@bug(
    "sent-ahead-into-another-past",
    "NO-SILENT-LOSS",
    "ORDER",
    "PREFIX",
    knobs=_OLDER | {"push_operations_max": 1},
)
def _sent_ahead(garden: Garden) -> None:
    """A device takes every answer for one of the past that it has seen."""

    def make(original: Any) -> Any:
        def seen_in(state: ReplicaState, answer: Any) -> SeenCommit | None:
            seen: SeenCommit | None = original(replace(state, seen=None, cursor=0), answer)
            return seen

        return seen_in

    for place in (position, pulling, applier, settle):
        garden.replace(place, "seen_in", make)


#: Devices stop between an image and the pages that follow it.
_STOPS: Final = {"images": 2, "nodes": 1, "cancel": 200, "crash_after": 100, "think_ms": 1500}


@bug(
    "an-image-counts-as-nothing-seen",
    "PREFIX",
    "CLOCK",
    "NO-FALSE-CONFLICT",
    knobs=_OLDER | _STOPS | {"expired_token": 0},
)
def _image_not_seen(garden: Garden) -> None:
    """A device that begins with an image remembers nothing of the state that it is of."""
    garden.replace(image, "see_image", lambda original: lambda *rest: None)
