"""Whether a value came back as it was written, and where it did not."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from datetime import datetime, time
from typing import Any, Final

import msgspec

from entidb.db.forms import is_model
from entidb.db.times import equal_times

# ---------------------------------------------------------------- are they the same


def difference(given: Any, got: Any, path: str = "") -> tuple[str, str] | None:
    """Where ``got`` is not what ``given`` is, and why; None if they are the same.

    Fields are compared one by one, because a class may leave some of them out of ``==``. Private
    attributes of models do not count: they are no data."""
    if given is got:
        return None
    if type(given) is not type(got):
        reason = f"is {type(given).__name__} and comes back as {type(got).__name__}"
        return None if _equal(given, got) else (path, reason)
    parts = _parts(given)
    if parts is None or _parts(got) is None:
        if _equal(given, got):
            return None
        if getattr(given, "fold", 0) and same(given, got):
            reason = "has fold=1, which is not stored; a time zone says which of two hours it is"
            return path, reason
        return path, "comes back with another value"
    there = dict(_parts(got) or ())
    for name, value in parts:
        step = f"{path}[{name}]" if isinstance(name, int) else f"{path}.{name}".lstrip(".")
        if name not in there:
            return step, "does not come back"
        found = difference(value, there.pop(name), step)
        if found is not None:
            return found
    return (path, f"comes back with {next(iter(there))!r} in addition") if there else None


def same(given: Any, got: Any) -> bool:
    try:
        return bool(given == got)
    except Exception:
        return False


def _equal(given: Any, got: Any) -> bool:
    if isinstance(given, (datetime, time)) and isinstance(got, type(given)):
        return equal_times(given, got)
    if same(given, got):
        return True
    try:
        return math.isnan(given) and math.isnan(got)
    except (TypeError, ValueError, OverflowError):
        return False


def _parts(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """The fields or members of ``value``; None if it is one value."""
    if isinstance(value, OrderedDict):
        return iter(enumerate(value.items()))
    if isinstance(value, dict):
        return iter(value.items())
    if isinstance(value, (list, tuple, deque)):
        return iter(enumerate(value))
    if is_model(type(value)):
        # Not by getattr, which warns of deprecated fields.
        fields, extra = vars(value), getattr(value, "model_extra", None) or {}
        return iter([*((n, fields.get(n)) for n in type(value).model_fields), *extra.items()])
    names = _field_names(value)
    return None if names is None else ((n, getattr(value, n, _UNSET)) for n in names)


_UNSET: Final = object()


def _field_names(value: Any) -> list[str] | None:
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return [each.name for each in dataclasses.fields(kind)]
    if hasattr(kind, "__attrs_attrs__"):
        return [each.name for each in kind.__attrs_attrs__]
    return list(kind.__struct_fields__) if isinstance(value, msgspec.Struct) else None


def part_of(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, dict) else getattr(value, name)
