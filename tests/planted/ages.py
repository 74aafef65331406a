"""Planted bugs: programs of different ages, and a server that stores newer shapes."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from entidb.db.records import decode_accepted
from entidb.errors import UpgradeRequiredError
from entidb.protocol import digest_stored_newer
from entidb.server import decide
from entidb.server.service import DatabaseService
from entidb.sync.cycle import Cycle
from tests.planted.garden import CALM, WILD, Garden, bug

_AGES: Final = CALM | {"old_program": 1}
_NEWER: Final = WILD | {"upcast": 1}


@bug("age-refuses-the-push", "TAKEN", knobs=_AGES)
def _age_refuses_pushes(garden: Garden) -> None:
    """A server that does not let an old program pull does not let it push either."""

    def make(original: Any) -> Any:
        def precheck(self: Any, request: Any, grant: Any) -> Any:
            if 0 < request.schema < self._schema.least:
                return UpgradeRequiredError("too old")
            return original(self, request, grant)

        return precheck

    garden.replace(DatabaseService, "_precheck", make)


@bug("too-old-pushes-nothing", "TAKEN", knobs=_AGES)
def _too_old_pushes_nothing(garden: Garden) -> None:
    """A cycle ends with the pull that is refused for the program's age."""

    def make(original: Any) -> Any:
        def check(self: Any, error: Exception) -> None:
            raise error

        return check

    garden.replace(Cycle, "_check_may_push", make)


@bug("newer-shape-is-not-told", "PREFIX", knobs=_NEWER)
def _newer_not_told(garden: Garden) -> None:
    """A device does not hear that something else was stored than it has pushed."""

    def make(original: Any) -> Any:
        return lambda *given: []

    garden.replace(decide, "_stored_instead", make)


@bug("newer-shape-is-told-once", "PREFIX", "EXACTLY-ONCE", knobs=_NEWER)
def _newer_told_once(garden: Garden) -> None:
    """A device whose answer got lost is told that what it pushed was stored as it was."""

    def make(original: Any) -> Any:
        def known(self: Any, *given: Any) -> Any:
            result = original(self, *given)
            return replace(result, states=[]) if result.verdict == 0 else result

        return known

    garden.replace(decide.Deciding, "_known", make)


@bug(
    "newer-shape-was-always-there",
    "PREFIX",
    "EXACTLY-ONCE",
    "NO-FALSE-CONFLICT",
    knobs=_NEWER | {"keys": 2},
)
def _newer_always_there(garden: Garden) -> None:
    """What was stored in a newer shape, and replaced since, is called accepted as it was pushed."""

    def make(original: Any) -> Any:
        def known(self: Any, transaction: Any, raw: Any, *given: Any) -> Any:
            result = original(self, transaction, raw, *given)
            _, digest = decode_accepted(raw)
            newer = digest_stored_newer(given[0]) == digest
            return replace(result, verdict=0) if newer else result

        return known

    garden.replace(decide.Deciding, "_known", make)


@bug(
    "too-old-pushes-into-another-history",
    "NO-LOST-UPDATE",
    "NO-RESURRECTION",
    "PREFIX",
    "READ-YOUR-WRITES",
    "ORDER",
    "NO-EFFECT",
    knobs=_AGES | {"restore_server": 50, "pause_ms": 100},
)
def _too_old_in_another_history(garden: Garden) -> None:
    """A program that is too old to pull pushes although its versions are of another history."""

    garden.replace(Cycle, "_check_may_push", lambda original: lambda self, error: None)
