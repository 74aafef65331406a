"""Values by their fields: what of one is missing in another, a field put back, a line for people.

Pure functions of payloads, without a database. ``sync.merging`` decides a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final

from entidb import cbor
from entidb.types import ID_BYTES, ms_from_timestamp

#: Where a field is inside an entity: the keys on the way to it; empty for the entity itself.
Path = tuple[str, ...]
#: Where a value was, the value, and what is there instead; None: nothing is there.
LostField = tuple[Path, bytes | None, bytes | None]


class Side(Enum):
    """Whose value it is."""

    #: This device's.
    LOCAL = "local"
    #: The server's, so mostly another device's.
    REMOTE = "remote"


#: Whose value was decided against, where it was, the value, what won, and of a whole entity the
#: base; None: nothing there.
Overruled = tuple[Side, Path, bytes | None, bytes | None, bytes | None]


class _Marker(Enum):
    ABSENT = "absent"


#: A field that is not there. Not None, which is null, a value like any other.
ABSENT: Final = _Marker.ABSENT
_NO_FIELDS: Final[dict[str, Any]] = {}
_NO_DEVICE: Final = bytes(ID_BYTES)
_VALUE_SHOWN_MAX: Final = 200
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def same(one: Any, other: Any) -> bool:
    """Whether two fields are the same bytes. Python finds 1, 1.0 and True equal; CBOR does not."""
    kind = type(one)
    if kind is not type(other) or one != other:
        return False
    # Equal maps and lists can still hold a 1 against a 1.0 further in.
    return (kind is not dict and kind is not list) or cbor.encode(one) == cbor.encode(other)


def lost_fields(base: bytes | None, side: bytes | None, won: bytes | None) -> list[LostField]:
    """What ``side`` changed of ``base`` and is not there in ``won``: field by field where all are
    maps, nested maps included, else whole.

    What is as in the base was not changed, and what is the same in ``won`` is not lost."""
    if side in (base, won):
        return []
    if side is None or won is None:
        return [((), side, won)]
    mine, theirs = cbor.decode_trusted(side), cbor.decode_trusted(won)
    was = _NO_FIELDS if base is None else cbor.decode_trusted(base)
    if not (type(mine) is dict and type(theirs) is dict and type(was) is dict):
        return [((), side, won)]
    found: list[LostField] = []
    _compare(was, mine, theirs, (), found)
    return found


def _compare(
    base: Mapping[str, Any],
    side: Mapping[str, Any],
    won: Mapping[str, Any],
    path: Path,
    found: list[LostField],
) -> None:
    for key, mine in side.items():
        theirs = won.get(key, ABSENT)
        # Most fields are the same, and comparing them here first costs half as much.
        if mine == theirs and (type(mine) is str or same(mine, theirs)):
            continue
        was = base.get(key, ABSENT)
        if mine == was and same(mine, was):
            continue
        if type(mine) is dict and type(theirs) is dict and (was is ABSENT or type(was) is dict):
            below = _NO_FIELDS if was is ABSENT else was
            _compare(below, mine, theirs, (*path, key), found)
            continue
        instead = None if theirs is ABSENT else cbor.encode(theirs)
        found.append(((*path, key), cbor.encode(mine), instead))
    if base.keys() <= side.keys():
        return
    for key in base:
        if key not in side and key in won:
            found.append(((*path, key), None, cbor.encode(won[key])))


def field_at(payload: bytes | None, path: Path) -> bytes | None:
    """The field at ``path``; None if it, or something on the way to it, is not there."""
    if not path or payload is None:
        return payload
    at = cbor.decode_trusted(payload)
    for key in path:
        if type(at) is not dict or key not in at:
            return None
        at = at[key]
    return cbor.encode(at)


def with_field(payload: bytes | None, path: Path, field: bytes | None) -> bytes | None:
    """``payload`` with ``field`` at ``path``; None removes it. Maps on the way that are missing
    are made. Raises ``LookupError`` where something on the way is no map."""
    if not path:
        return field
    value = None if payload is None else cbor.decode_trusted(payload)
    if type(value) is not dict:
        raise LookupError(path)
    at = value
    for key in path[:-1]:
        if field is None and key not in at:
            return payload
        at = at.setdefault(key, {})
        if type(at) is not dict:
            raise LookupError(path)
    if field is None:
        at.pop(path[-1], None)
    else:
        at[path[-1]] = cbor.decode_trusted(field)
    return cbor.encode(value)


# ---------------------------------------------------------------- for people


def shown(payload: bytes | None, absent: str) -> str:
    """A value on one line, ``absent`` if there is none."""
    if payload is None:
        return absent
    # repr escapes control characters: a value must not be able to steer a terminal.
    text = repr(cbor.decode_trusted(payload))
    return text if len(text) <= _VALUE_SHOWN_MAX else text[:_VALUE_SHOWN_MAX] + " …"


def when_by(timestamp: int, device: bytes) -> str:
    """When something was written and by which device, as far as it is known."""
    when = time_of(ms_from_timestamp(timestamp)) if timestamp else "at an unknown time"
    return when if device == _NO_DEVICE else f"{when} by device {device.hex()[:8]}"


def time_of(milliseconds: int) -> str:
    try:
        moment = _EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        # 48 bits of milliseconds reach past the year 9999, where Python's calendar ends.
        return f"{milliseconds} ms after 1970"
    return moment.isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")


__all__ = [
    "ABSENT",
    "LostField",
    "Overruled",
    "Path",
    "Side",
    "field_at",
    "lost_fields",
    "same",
    "shown",
    "when_by",
    "with_field",
]
