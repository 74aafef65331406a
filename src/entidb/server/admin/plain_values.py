"""Values of entities as JSON that loses nothing: what JSON cannot say is a map with one name that
begins with a dollar sign.
"""

from __future__ import annotations

import base64
import math
from typing import Any, Final

#: Whole numbers that every reader of JSON takes as they are (RFC 8259, section 6).
_EXACT: Final = 2**53 - 1
#: Characters of a text, and entries of a list or map, in a value that is cut short.
_TEXT_SHORT: Final = 120
_ENTRIES_SHORT: Final = 24


def as_json(value: Any) -> Any:
    """Bytes become ``{"$bytes": "base64"}``, large numbers ``{"$int": "…"}``, infinity
    ``{"$float": "inf"}``."""
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return {"$int": str(value)}
    return value


def cut(value: Any) -> tuple[Any, bool]:
    """The value in short, for a table, and whether that is all of it: what is inside a list or a
    map in it is only counted."""
    if not isinstance(value, dict):
        short = _short(value)
        return short, short == as_json(value)
    some = list(value.items())[:_ENTRIES_SHORT]
    short = {name: _short(each) for name, each in some}
    return short, short == as_json(value)


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _TEXT_SHORT:
        return value[:_TEXT_SHORT] + "…"
    if isinstance(value, bytes) and len(value) > _TEXT_SHORT:
        return {"$more": f"{len(value):,} bytes"}
    if isinstance(value, list) and value:
        return {"$more": f"list of {len(value):,}"}
    if isinstance(value, dict) and value:
        return {"$more": f"map of {len(value):,}"}
    return as_json(value)
