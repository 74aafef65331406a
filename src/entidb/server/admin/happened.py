"""What became of pushes and refused requests lately, for administrators: who sent it, the verdict,
and what a refused transaction wanted to write.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from entidb import cbor
from entidb.errors import EntiDBError, ProtocolError
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.admin.plain_values import as_json
from entidb.server.pulse import Happened, Touched

_KINDS: Final = ("pushed", "conflict", "rejected", "refused")


class TouchedRow(Struct, omit_defaults=True):
    """An entity that a refused transaction wanted to write; without a ``value``: to delete, or,
    where it is not ``kept``, too large to keep."""

    collection: str
    id: str
    base: int
    value: Any = None
    deleted: bool = False
    kept: bool = True


class HappenedRow(Struct, omit_defaults=True):
    """``pushed``: transactions were accepted, ``count`` of them; ``conflict`` and ``rejected``: one
    was not; ``refused``: a whole request. Times are milliseconds since 1970."""

    number: int
    at_ms: int
    what: str
    database: str
    device_id: str
    subject: str
    count: int = 1
    version: int | None = None
    transaction: str | None = None
    code: str | None = None
    message: str | None = None
    touched: list[TouchedRow] = []
    more: int = 0


def rows_of(
    office: Office,
    caller: Caller,
    database: str | None = None,
    device_id: str | None = None,
    *,
    what: str = "",
    limit: int = 200,
) -> list[HappenedRow]:
    """Newest first; ``what`` names kinds, with commas between. Empty where the server keeps none
    of it. Raises ``ProtocolError`` for a kind that there is not."""
    if database is not None:
        caller.check(database)
    kinds = set(what.split(",")) if what else set(_KINDS)
    if not kinds <= set(_KINDS):
        raise ProtocolError(f"what is some of {', '.join(_KINDS)}")
    if office.pulse is None:
        return []

    def wanted(each: Happened) -> bool:
        return (
            each.what in kinds
            and caller.sees(each.database)
            and database in (None, each.database)
            and device_id in (None, each.device_id)
        )

    return [_row(each) for each in office.pulse.happened(wanted, limit)]


def _row(each: Happened) -> HappenedRow:
    return HappenedRow(
        number=each.number,
        at_ms=each.at_ms,
        what=each.what,
        database=each.database,
        device_id=each.device_id,
        subject=each.subject,
        count=each.count,
        version=each.version,
        transaction=each.transaction,
        code=each.code,
        message=each.message,
        touched=[_touched(one) for one in each.touched],
        more=each.more,
    )


def _touched(one: Touched) -> TouchedRow:
    row = TouchedRow(one.collection, one.id, one.base, kept=one.kept)
    if one.payload is None:
        row.deleted = one.kept
        return row
    try:
        row.value = as_json(cbor.decode(one.payload))
    except EntiDBError:
        row.kept = False  # it was refused because it cannot be read
    return row
