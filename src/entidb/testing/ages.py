"""Programs of different ages in a simulated run: devices whose program is old for a while, and a
server that does not let it pull any more, and stores what it pushes in a newer shape (R33); and a
server of 0.3 (R5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from entidb import cbor
from entidb.db import Database
from entidb.db.subjects import sendable
from entidb.errors import (
    EntiDBError,
    PermissionDeniedError,
    SyncCodecError,
    SyncError,
    UpgradeRequiredError,
)
from entidb.protocol import PullRequest, PushRequest, SnapshotRequest, SyncRequest
from entidb.server.hooks import NO_SCHEMA, Grant, Schema
from entidb.sync import SyncConfig
from entidb.sync.refusal import Path
from entidb.testing.invariants import Checks
from entidb.testing.knobs import Knobs
from entidb.testing.watch import DeviceWatch
from entidb.testing.workload import INVALID
from entidb.testing.world import World

OLD, NEW = 1, 2
#: Field that only the newer shape has.
NEWER: Final = "u"


def upcast(collection: str, value: Any, schema: int) -> Any:
    return {**value, NEWER: NEW} if isinstance(value, dict) else value


class ServerAge:
    """What a server asks of programs, over its lifetime."""

    def __init__(self, world: World, name: str) -> None:
        self._rng = world.stream(f"age of {name}")
        self._world = world
        self._least = 0

    def look(self, knobs: Knobs) -> bool:
        """Let time pass; whether the server has to be configured anew."""
        if not knobs.old_program or self._rng.random() > 0.2:
            return False
        self._world.fired("old_program")
        self._least = NEW if self._least == 0 else 0
        return True

    def schema(self) -> Schema:
        knobs = self._world.knobs
        if not (knobs.old_program or knobs.upcast):
            return NO_SCHEMA
        return Schema(NEW, self._least, upcast if knobs.upcast else None)

    def newest(self, schema: int, payload: bytes | None) -> bytes | None:
        """What has to be stored of what a program of ``schema`` has pushed."""
        if payload is None or not self.schema().upcasts(schema):
            return payload
        made = cbor.encode(upcast("", cbor.decode_trusted(payload), schema))
        if made != payload:
            self._world.fired("upcast")
        return made

    def check_refusal(self, checks: Checks, request: SyncRequest, error: SyncError) -> None:
        if isinstance(error, UpgradeRequiredError):
            checks.that(
                isinstance(request, PullRequest | SnapshotRequest)
                and 0 < request.schema < self._least,
                "TAKEN",
                f"{type(request).__name__} of a program of schema {getattr(request, 'schema', 0)} "
                f"is refused for its age; the server wants {self._least}",
            )


class DeviceAge:
    """The program of a device: old at first, or not, and updated some day."""

    def __init__(self, world: World, name: str) -> None:
        rng = self._rng = world.stream(f"age of {name}")
        self._world = world
        knobs = world.knobs
        self._schema = rng.choice((OLD, OLD, NEW)) if knobs.old_program or knobs.upcast else 0
        self._ready = False
        #: The newest commit there was when the cycle began.
        self._until = 0
        self.pushed = False

    def config(self, config: SyncConfig, database: Database) -> SyncConfig:
        """That of the cycle that begins."""
        self._until = database.sequence
        self._ready, self.pushed = _can_push(database, self._until), False
        if self._schema and (self._world.quiet or self._rng.random() < 0.02):
            self._schema = NEW
        return config if config.schema == self._schema else replace(config, schema=self._schema)

    def check_end(
        self, watch: DeviceWatch, error: EntiDBError | None, database: Database, path: Path
    ) -> None:
        """TAKEN: a pull that is refused for the program's age does not stop the push, unless
        versions are of another history."""
        if not isinstance(error, UpgradeRequiredError):
            return
        may = not (path.kept or watch.foreign or watch.foreign_names)
        ready = database.read_head().ready
        if self._ready and may and _can_push(database, self._until):
            checks = watch.checks
            checks.that(
                self.pushed,
                "TAKEN",
                f"a cycle ended with {error.code}, and {ready} transactions were not pushed",
            )


def _can_push(database: Database, until: int) -> bool:
    """Whether something is ready that was committed by then, and waits for nobody who is away
    (R36)."""
    with database.view() as view:
        return sendable(view, view.sync_state, until)


# ---------------------------------------------------------------- an older server


def refuse_as_before(
    world: World, refused: dict[bytes, set[str]], request: PushRequest, grant: Grant
) -> None:
    """A server of 0.3 refuses a push whole for a missing right, or for one invalid payload;
    ``refused`` is called with the transactions that were meant."""
    if not grant.write:
        world.fired("older_server")
        note_forbidden(refused, request)
        raise PermissionDeniedError("the token does not allow writing to this database")
    mark = INVALID.encode()
    invalid = [
        transaction.transaction_id
        for transaction in request.transactions
        if any(mark in (op.payload or b"") for op in transaction.operations)
    ]
    if invalid:
        world.fired("invalid")
        for identity in invalid:
            refused.setdefault(identity, set()).add("codec_error")
        raise SyncCodecError(f"transaction {invalid[0].hex()} is not canonical")


def note_forbidden(refused: dict[bytes, set[str]], request: PushRequest) -> None:
    for transaction in request.transactions:
        refused.setdefault(transaction.transaction_id, set()).add("forbidden")
