"""Planted bugs: who is locked out, what is frozen, and what a device makes of being told (R32)."""

from __future__ import annotations

from typing import Any

from entidb import errors
from entidb.protocol import PushRequest
from entidb.server.control import Control
from tests.planted.garden import CALM, Garden, bug

LOCKS = CALM | {"revoke": 400}


@bug("a-locked-out-device-may-push", "LOCKED", knobs=LOCKS)
def _locked_out_may_push(garden: Garden) -> None:
    """Only what reads is looked at."""

    def make(original: Any) -> Any:
        def admit(self: Control, asking: Any, request: Any = None) -> None:
            if not isinstance(request, PushRequest):
                original(self, asking, request)

        return admit

    garden.replace(Control, "admit", make)


@bug("locked-out-of-all-is-locked-out-of-none", "LOCKED", knobs=LOCKS)
def _locked_out_of_none(garden: Garden) -> None:
    """Only entries for one database are looked for."""

    def make(original: Any) -> Any:
        def is_revoked(self: Control, asking: Any, db_id: Any, device_id: Any) -> bool:
            entries = self.decided.revoked
            device = device_id and device_id.hex()
            return any(each.name == device and each.db_id == db_id for each in entries)

        return is_revoked

    garden.replace(Control, "is_revoked", make)


@bug("a-frozen-database-takes-pushes", "LOCKED", knobs=CALM | {"freeze": 300})
def _frozen_takes_pushes(garden: Garden) -> None:
    """That a database is frozen is only shown."""
    garden.replace(Control, "freeze", lambda original: lambda self, db_id, frozen: True)


@bug("a-round-is-pushed-to-what-is-frozen", "LOCKED", knobs=CALM | {"freeze": 300, "rounds": 1})
def _round_into_frozen(garden: Garden) -> None:
    """Only whole pushes are looked at, and not those that come with a pull."""
    garden.replace(Control, "is_frozen", lambda original: lambda self, db_id: False)


@bug(
    "locked-out-is-taken-for-a-right-that-is-gone",
    "NO-SILENT-LOSS",
    "SURFACED-ONCE",
    knobs=LOCKS | {"revoke": 1000, "latency_ms": 200, "events": 2000},
)
def _locked_out_withdraws(garden: Garden) -> None:
    """A device that is locked out between its pull and its push withdraws what it has pending, as
    it does when its token may not write any more."""
    garden.replace(errors, "REASONS", lambda original: {})
