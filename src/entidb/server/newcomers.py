"""How many devices a database may have, and how many one subject may have in it.

A device that was met before is always let in. One that is new is noted among the devices of its
database before it gets an answer, if there is room: then the quota holds among all processes of a
server, and across a restart. What is revoked takes no room, nor does what was not seen for as long
as devices are remembered.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from msgspec import Struct

from entidb.errors import DatabaseLockedError, PermissionDeniedError, ServerBusyError, StorageError
from entidb.protocol import PushRequest, RoundRequest, SyncRequest
from entidb.server.config import ServerConfig
from entidb.server.control import Asking, Control
from entidb.server.registry import DeviceRecord, Registry
from entidb.types import Clock

logger = logging.getLogger("entidb.server")

REASON: Final = "too_many_devices"
#: Seconds after which it is read again which devices there are.
_KNOWN_S: Final = 3600.0
_DATABASES_MAX: Final = 1000
#: Seconds after which a device asks again whether it may push.
_RETRY_S: Final = 60.0


class _Known(Struct):
    """Devices of one database, as of ``since``."""

    since: float
    devices: set[bytes]


class _Owner(Struct):
    """Whose a device is, as a revocation asks."""

    subject: str
    claims: dict[str, Any]


class Newcomers:
    """Of one server process. Thread-safe."""

    def __init__(
        self, config: ServerConfig, registry: Registry, control: Control, clock: Clock
    ) -> None:
        self._database_max = config.database_devices_max
        self._subject_max = config.subject_devices_max
        self._registry = registry
        self._control = control
        self._clock = clock
        #: Held while a device is noted: this process writes down one at a time.
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}

    def knows(self, request: SyncRequest) -> bool:
        """Whether the device was let in already, without looking at any disk."""
        known = self._known.get(request.db_id)
        if known is None or self._clock.monotonic() - known.since > _KNOWN_S:
            return False
        return request.device_id in known.devices

    def admit(self, request: SyncRequest, asking: Asking) -> None:
        """Let a device in, and write it down if it is new. Raises ``PermissionDeniedError``
        (forbidden), and for a push ``ServerBusyError``, with the reason ``too_many_devices``."""
        if self.knows(request):
            return
        check = partial(self._check, request, asking)
        try:
            with self._lock:
                found = self._registry.meet(request, asking, check)
                if len(self._known) >= _DATABASES_MAX:
                    self._known.clear()
                self._known[request.db_id] = _Known(self._clock.monotonic(), found)
        except (OSError, StorageError, DatabaseLockedError) as error:
            logger.warning("a device of database %s is not noted: %s", request.db_id, error)
            raise ServerBusyError(
                "the server cannot note a new device at the moment", retry_after=1.0
            ) from error

    def _check(self, request: SyncRequest, asking: Asking, rows: Sequence[DeviceRecord]) -> None:
        counted = [row for row in rows if not self._is_revoked(row, request.db_id)]
        own = sum(row.subject == asking.subject for row in counted)
        if self._database_max and len(counted) >= self._database_max:
            raise _refused(
                request, f"database {request.db_id!r}", self._database_max, "database_devices_max"
            )
        if self._subject_max and own >= self._subject_max:
            whose = f"{asking.subject!r} in database {request.db_id!r}"
            raise _refused(request, whose, self._subject_max, "subject_devices_max")

    def _is_revoked(self, row: DeviceRecord, db_id: str) -> bool:
        owner = _Owner(row.subject, {} if row.token is None else {"jti": row.token})
        return self._control.is_revoked(owner, db_id, bytes.fromhex(row.device_id))


def _refused(
    request: SyncRequest, whose: str, most: int, setting: str
) -> PermissionDeniedError | ServerBusyError:
    said = (
        f"this device is new, and {whose} has the {most} devices it may have ({setting}): ask "
        "whoever runs the server to allow more, or to revoke one that is not used any more; what "
        "is pending here stays pending"
    )
    details = {"reason": REASON}
    if isinstance(request, PushRequest | RoundRequest):
        # A device may take a push that is forbidden for one of what is in it, and withdraw it.
        return ServerBusyError(said, retry_after=_RETRY_S, details=details)
    return PermissionDeniedError(said, details=details)


def newcomers_of(
    config: ServerConfig, registry: Registry, control: Control, clock: Clock
) -> Newcomers | None:
    """None where any number of devices may come, which then costs nothing; else ``registry`` asks
    it who is met already."""
    if not (config.database_devices_max or config.subject_devices_max):
        return None
    made = Newcomers(config, registry, control, clock)
    registry.is_met = made.knows
    return made


__all__ = ["REASON", "Newcomers", "newcomers_of"]
