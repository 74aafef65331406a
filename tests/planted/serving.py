"""Planted bugs: the server's pages, its group commits, and what an error does to others."""

from __future__ import annotations

from typing import Any
from unittest import mock

from entidb.db import Database, Role
from entidb.db.moment import Moment
from entidb.db.records import (
    FEED,
    end_of,
)
from entidb.db.writer import Writer
from entidb.errors import (
    ProtocolError,
    ResetRequiredError,
    StorageFullError,
)
from entidb.protocol import PushResult, Verdict
from entidb.server import decide, pages
from entidb.server.service import DatabaseService
from entidb.testing import tenant
from tests.planted.garden import CALM, WILD, Garden, bug


@bug("half-a-transaction-in-a-page", "ORDER", "WHOLE", knobs=CALM | {"pull_operations_max": 2})
def _half_in_a_page(garden: Garden) -> None:
    """A page is cut inside a commit."""

    def make(original: Any) -> Any:
        def feed_page(snapshot: Any, after: int, limit: int) -> Any:
            keys, more = original(snapshot, after, limit)
            return keys[:limit], more or len(keys) > limit

        return feed_page

    garden.replace(pages, "feed_page", make)


@bug("stale-row-sent", "LIVENESS", "ORDER", knobs=CALM | {"stale_rows": 2000, "operations": 8})
def _stale_row_sent(garden: Garden) -> None:
    """A page takes an entity where its feed row is stale, and not where it changed last."""
    garden.replace(pages.Page, "_is_stale", lambda original: lambda *place: False)


@bug(
    "a-current-row-swept",
    "CONVERGE",
    "ORDER",
    knobs=CALM | {"stale_rows": 20, "operations": 8},
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


@bug(
    "a-purge-leaves-stale-rows",
    "UNEXPECTED",
    "CONVERGE",
    "LIVENESS",
    knobs=CALM | {"stale_rows": 2000, "operations": 8, "purge": 80, "deletes": 400},
)
def _purge_leaves_stale_rows(garden: Garden) -> None:
    """Feed rows of entities that were forgotten stay, and lead nowhere."""

    def make(original: Any) -> Any:
        def purge(database: Any, up_to: int) -> Any:
            with mock.patch.object(Writer, "sweep_stale"):
                return original(database, up_to)

        return purge

    garden.replace(tenant, "purge_tombstones", make)


@bug(
    "group-decided-on-old-state",
    "NO-LOST-UPDATE",
    "EXACTLY-ONCE",
    "NO-RESURRECTION",
    knobs=CALM | {"group_ms": 500, "keys": 2, "devices": 6, "pause_ms": 100},
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


@bug("version-used-twice", "WHOLE", "ORDER", "EXACTLY-ONCE")
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


@bug("answered-from-memory", "SERVER-DURABLE", knobs=CALM | {"server_disk_full": 100})
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


@bug(
    "head-known-after-nothing",
    "FRESH",
    "ORDER",
    "LIVENESS",
    knobs=WILD | {"server_writes": 300, "repeated": 300},
)
def _head_known(garden: Garden) -> None:
    """A push that stored nothing answers for the commit that comes after it."""

    def make(original: Any) -> Any:
        def push_many(self: DatabaseService, members: Any) -> Any:
            mark = self.database.commit_mark
            answers = original(self, members)
            if self._known is not None:
                moment = Moment(self.database, mark + 1)
                self._known = (moment, *self._known[1:])
            return answers

        return push_many

    garden.replace(DatabaseService, "push_many", make)


@bug(
    "one-refusal-fails-the-batch",
    "NO-POISON",
    "LIVENESS",
    "NO-SILENT-LOSS",
    knobs=CALM | {"refuse": 100},
)
def _refusal_fails_batch(garden: Garden) -> None:
    """A refused transaction makes the whole push an error."""

    def make(original: Any) -> Any:
        def refuse(self: Any, places: Any, code: str, message: str) -> PushResult:
            raise ProtocolError(message)

        return refuse

    garden.replace(decide.Deciding, "_refuse", make)


@bug("refusal-spreads", "NO-POISON", knobs=CALM | {"refuse": 100, "pause_ms": 3000})
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


@bug("error-leaves-traces", "NO-EFFECT", knobs=CALM | {"purge": 50, "pause_ms": 3000})
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

    garden.replace(DatabaseService, "check_pull", make)
