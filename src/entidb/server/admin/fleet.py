"""All devices of a server at once: found by what one knows of them, sorted by who is behind, and
one of them with what happened to it lately.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Final, Literal

from msgspec import Struct

from entidb.errors import ProtocolError
from entidb.server.admin import access
from entidb.server.admin.access import DeviceRow
from entidb.server.admin.callers import Caller
from entidb.server.admin.databases import rows as database_rows
from entidb.server.admin.happened import HappenedRow, rows_of
from entidb.server.admin.office import Office
from entidb.server.admin.summary import LAGS, ServerSummary
from entidb.server.registry import DEVICES_MAX

#: Answers of a device's story.
_STORY_MAX: Final = 200

Sort = Literal["behind", "seen", "name", "conflicts", "rejected"]


class FleetRow(Struct, omit_defaults=True):
    """A device in ``database``."""

    database: str
    row: DeviceRow


class FleetPage(Struct):
    """``total``: so many were found, of which ``rows`` shows a part."""

    total: int
    rows: list[FleetRow]


class DeviceStory(Struct):
    """A device, and what happened to it lately, newest first; that is empty where the server
    shows no console, which keeps it."""

    row: DeviceRow
    happened: list[HappenedRow]


_ORDERS: Final[dict[str, Callable[[FleetRow], Any]]] = {
    "behind": lambda each: (-(each.row.behind or 0), -each.row.device.last_ms),
    "seen": lambda each: -each.row.device.last_ms,
    "name": lambda each: (each.row.device.subject, each.row.device.device_id),
    "conflicts": lambda each: -each.row.device.conflicts,
    "rejected": lambda each: -each.row.device.rejected,
}


def devices(
    office: Office,
    caller: Caller,
    *,
    database: str | None = None,
    search: str = "",
    sort: str = "behind",
    offset: int = 0,
    limit: int = 100,
) -> FleetPage:
    """Those of which a name, an id, a program or an error contains ``search``. Raises
    ``ProtocolError`` for another order than those of ``Sort``."""
    order = _ORDERS.get(sort)
    if order is None:
        raise ProtocolError(f"sort is one of {', '.join(_ORDERS)}")
    if database is None:
        names = [each.name for each in database_rows(office, caller)]
    else:
        names = [database]
    words = search.lower().split()
    found = [
        FleetRow(name, row)
        for name in names
        for row in access.devices(office, caller, name, DEVICES_MAX)
        if all(word in _text(name, row) for word in words)
    ]
    found.sort(key=order)
    return FleetPage(len(found), found[offset : offset + limit])


def _text(database: str, row: DeviceRow) -> str:
    device = row.device
    parts = (database, device.device_id, device.subject, device.client, device.error, device.token)
    return " ".join([each for each in parts if each] + ["revoked"] * row.revoked).lower()


def story(office: Office, caller: Caller, db_id: str, device_id: str) -> DeviceStory:
    """Raises ``ProtocolError`` (not_found) for a device that this database does not know."""
    if re.fullmatch("[0-9a-f]{32}", device_id) is None:
        raise ProtocolError("a device id is 32 hexadecimal digits, in lower case")
    for row in access.devices(office, caller, db_id, DEVICES_MAX):
        if row.device.device_id == device_id:
            happened = rows_of(office, caller, db_id, device_id, limit=_STORY_MAX)
            return DeviceStory(row, happened)
    raise ProtocolError("this database does not know that device", code="not_found")


def summary(office: Office, caller: Caller) -> ServerSummary:
    """All that ``caller`` may see, as it was at most some seconds ago."""
    now = office.clock.monotonic()
    return office.summaries.total(now, lambda: _summaries(office), caller.sees)


def _summaries(office: Office) -> dict[str, ServerSummary]:
    everyone = Caller("the server", "local")
    found = {}
    for each in database_rows(office, everyone):
        rows = access.devices(office, everyone, each.name, DEVICES_MAX)
        found[each.name] = ServerSummary(
            devices=len(rows),
            behind=sum(bool(row.behind) for row in rows),
            revoked=sum(row.revoked for row in rows),
            lag=_lag(rows),
        )
    return found


def _lag(rows: list[DeviceRow]) -> list[int]:
    counts = [0] * (len(LAGS) + 1)
    for row in rows:
        counts[bisect_left(LAGS, row.behind or 0)] += 1
    return counts
