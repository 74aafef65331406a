"""What canonical CBOR cannot express: the reason, the place within the value, and the way out.

Asked only after an encoding has failed, so it may take its time.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import re
import uuid
from typing import Any, Final

from entidb.errors import CborEncodeError
from entidb.types import NESTING_MAX

INTEGER_MAX: Final = 2**64 - 1
_INTEGER_MIN: Final = -(2**64)
_PLAIN_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_TYPES_ALLOWED: Final = "use a map with text keys, a list, text, bytes, int, float, bool or None"

#: What to do instead, by type; the first match counts.
_WAYS_OUT: Final[tuple[tuple[Any, str], ...]] = (
    (datetime.datetime, "use text such as value.isoformat(), or int milliseconds"),
    ((datetime.date, datetime.time), "use text such as value.isoformat()"),
    (datetime.timedelta, "use int of the smallest unit, or value.total_seconds()"),
    (uuid.UUID, "use str(value) or value.bytes"),
    (decimal.Decimal, "use str or int of the smallest unit"),
    (tuple, "use list(value)"),
    ((set, frozenset), "use sorted(value), which is a list"),
    ((bytearray, memoryview), "use bytes(value)"),
    (enum.Enum, "use value.value"),
    (complex, "use a list of two floats"),
    (pathlib.PurePath, "use str(value)"),
)


def diagnose(value: Any, reason: str) -> CborEncodeError:
    """The error for the first thing in ``value`` that the profile cannot express."""
    todo: list[tuple[str, Any, int]] = [("$", value, 0)]
    while todo:
        path, item, depth = todo.pop()
        fault = _fault(item, depth)
        if fault is not None:
            return CborEncodeError(f"{path}: {fault}", path=path)
        if isinstance(item, dict):
            for key in item:
                fault = _key_fault(key)
                if fault is not None:
                    return CborEncodeError(f"{path}: {fault}", path=path)
            children = [(path + _step(key), item[key], depth + 1) for key in item]
        elif isinstance(item, list):
            children = [(f"{path}[{n}]", child, depth + 1) for n, child in enumerate(item)]
        else:
            continue
        # Last in, first out: reversed, the first fault in reading order is the one reported.
        todo.extend(reversed(children))
    return CborEncodeError(f"$: {reason}; {_TYPES_ALLOWED}")


def _fault(item: Any, depth: int) -> str | None:
    if isinstance(item, (dict, list)):
        if depth < NESTING_MAX:
            return None
        return (
            f"more than {NESTING_MAX} maps and lists inside each other; "
            "make the value flatter (or does it contain itself?)"
        )
    if item is None or isinstance(item, (bool, bytes)):
        return None
    if isinstance(item, str):
        return text_fault(item)
    if isinstance(item, int):
        if _INTEGER_MIN <= item <= INTEGER_MAX:
            return None
        return "int outside -2^64 to 2^64-1 cannot be stored; use str"
    if isinstance(item, float):
        return _float_fault(item)
    name = type(item).__name__
    if dataclasses.is_dataclass(item):
        return f"{name} cannot be stored; use dataclasses.asdict(value), or a typed collection"
    for kind, way_out in _WAYS_OUT:
        if isinstance(item, kind):
            return f"{name} cannot be stored; {way_out}"
    return f"{name} cannot be stored; {_TYPES_ALLOWED}"


def _float_fault(item: float) -> str | None:
    if not math.isfinite(item):
        return f"float {item!r} cannot be stored; use None, or text such as {str(item)!r}"
    if item == 0 and math.copysign(1, item) < 0:
        return "float -0.0 cannot be stored, because it equals 0.0 in other bytes; use 0.0"
    return None


def text_fault(item: str) -> str | None:
    try:
        item.encode()
    except UnicodeEncodeError as error:
        return (
            f"text with a lone surrogate at position {error.start} cannot be stored; "
            "clean it with value.encode(errors='replace').decode(), or use bytes"
        )
    return None


def _key_fault(key: Any) -> str | None:
    if not isinstance(key, str):
        return f"map key {key!r} is {type(key).__name__}, not text; use str(key)"
    fault = text_fault(key)
    return None if fault is None else f"map key {key!r}: {fault}"


def _step(key: str) -> str:
    return f".{key}" if _PLAIN_NAME.match(key) else f"[{json.dumps(key, ensure_ascii=False)}]"
