"""Planted bugs: how the server decides about a push."""

from __future__ import annotations

from typing import Any, Final
from unittest import mock

from msgspec.structs import replace

from entidb.db import Database
from entidb.db.records import (
    accepted_key,
)
from entidb.protocol import PushResult, digest_operations
from entidb.server import decide
from entidb.server.service import DatabaseService
from entidb.types import SEQUENCE_MAX
from tests.planted.garden import CALM, WILD, Garden, bug


@bug("history-kept-after-the-proof", "ORDER", "LIVENESS", knobs=CALM | {"put_back": 80})
def _history_kept(garden: Garden) -> None:
    """A server whose files were put back tells only those who can prove it."""
    garden.replace(Database, "begin_history", lambda original: lambda self, *rest: False)


@bug("base-version-ignored", "NO-LOST-UPDATE", "NO-RESURRECTION")
def _base_version_ignored(garden: Garden) -> None:
    """The server accepts whatever comes."""
    garden.replace(
        decide.Deciding, "_conflicts", lambda original: lambda self, transaction, places: False
    )


_COLUMNS: Final = CALM | {"singles": 1000, "keys": 40, "pause_ms": 3000}


@bug("base-version-ignored-in-columns", "NO-LOST-UPDATE", "NO-RESURRECTION", knobs=_COLUMNS)
def _base_ignored_in_columns(garden: Garden) -> None:
    """Deciding many transactions at once takes whatever they were built on."""

    def lower(rows: list[bytes]) -> list[int]:
        return [0] * len(rows)

    def make(original: Any) -> Any:
        def accept_all(self: Any, *rest: Any) -> Any:
            with mock.patch.object(decide, "versions_of", lower):
                return original(self, *rest)

        return accept_all

    garden.replace(decide.Deciding, "_accept_all", make)


@bug("digests-in-columns-of-one", "EXACTLY-ONCE", knobs=_COLUMNS)
def _digests_in_columns(garden: Garden) -> None:
    """Of many transactions decided at once all are remembered with the content of the first."""

    def make(original: Any) -> Any:
        def accept_all(self: Any, *rest: Any) -> Any:
            transactions = self._request.transactions
            one = digest_operations(self._digest_heads, transactions[0].operations)
            all_of_them = [one] * len(transactions)
            with mock.patch.object(decide, "digests_of_single", return_value=all_of_them):
                return original(self, *rest)

        return accept_all

    garden.replace(decide.Deciding, "_accept_all", make)


@bug("equal-version-conflicts", "NO-FALSE-CONFLICT", "LIVENESS")
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


@bug("same-batch-conflicts", "NO-FALSE-CONFLICT")
def _same_batch_conflicts(garden: Garden) -> None:
    """A transaction conflicts with an earlier one of its own batch."""

    def make(original: Any) -> Any:
        def conflicts(self: Any, transaction: Any, places: list[bytes]) -> bool:
            self._written, self._began_at = {}, SEQUENCE_MAX
            found: bool = original(self, transaction, places)
            return found

        return conflicts

    garden.replace(decide.Deciding, "_conflicts", make)


@bug("ids-not-remembered", "EXACTLY-ONCE", knobs=WILD)
def _ids_not_remembered(garden: Garden) -> None:
    """The id of an accepted transaction is not stored with it."""

    def make(original: Any) -> Any:
        def accept(self: Any, transaction: Any, places: Any, digest: bytes) -> PushResult:
            result: PushResult = original(self, transaction, places, digest)
            del self._writer.changes[accepted_key(transaction.transaction_id)]
            return result

        return accept

    garden.replace(decide.Deciding, "_accept", make)


@bug("ids-in-a-second-commit", "EXACTLY-ONCE", knobs=WILD)
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


@bug(
    "ids-not-looked-up",
    "EXACTLY-ONCE",
    "NO-FALSE-CONFLICT",
    knobs=WILD,
)
def _ids_not_looked_up(garden: Garden) -> None:
    """A transaction that comes again is decided again."""

    def make(original: Any) -> Any:
        def one(self: Any, transaction: Any, keys: Any, known: Any, values: Any) -> Any:
            return original(self, transaction, keys, None, values)

        return one

    garden.replace(decide.Deciding, "_one", make)


@bug(
    "digest-ignored",
    "EXACTLY-ONCE",
    knobs=WILD | {"copy_device": 30, "events": 2000, "policy_notes": 3, "operations": 3},
)
def _digest_ignored(garden: Garden) -> None:
    """An id that was accepted with other content is called accepted."""
    garden.replace(
        decide,
        "digest_operations",
        lambda original: lambda heads, operations: bytes(32),
    )


@bug("half-a-transaction-accepted", "WHOLE")
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
