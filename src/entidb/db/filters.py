"""Conditions that come as data, such as from a web form: ``{"kind": "tea", "price": {"<": 5}}``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from entidb.db.conditions import ALL, Condition, Field, Joined
from entidb.errors import QueryError
from entidb.types import repr_of

#: How a condition is written as data: ``{"price": {"<": 5}}``.
_SIGNS: Final[dict[str, Callable[[Field, Any], Condition]]] = {
    "==": Field.__eq__,
    "!=": Field.__ne__,
    "<": Field.__lt__,
    "<=": Field.__le__,
    ">": Field.__gt__,
    ">=": Field.__ge__,
    "between": lambda field, value: field.between(*_pair(value)),
    "in": lambda field, value: field.in_(_list(value)),
    "startswith": lambda field, value: field.startswith(value),
    "contains": lambda field, value: field.contains(value),
    "exists": lambda field, value: field.exists() if _flag(value) else ~field.exists(),
    "is_null": lambda field, value: field.is_null() if _flag(value) else ~field.is_null(),
}
#: Conditions inside each other: what comes from outside does not decide how deep a program goes.
_DEPTH_MAX: Final = 30


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    raise QueryError(f"between takes [low, high], not {repr_of(value, 200)}")


def _list(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return value
    raise QueryError(f"in takes a list of values, not {repr_of(value, 200)}")


def _flag(value: Any) -> bool:
    # Text from a form would be true, also "false".
    if isinstance(value, bool):
        return value
    raise QueryError(f"exists and is_null take true or false, not {repr_of(value, 200)}")


def from_dict(given: Mapping[str, Any], *, depth: int = 0) -> Condition:
    """The condition that ``given`` describes: all of ``{"kind": "tea", "price": {"<": 5}}``.

    A field inside a field is ``"address.city"``. ``"|"`` and ``"&"`` take a list of such maps,
    ``"~"`` one. A value that is a map is compared with ``{"==": {…}}``. Raises ``QueryError``.
    """
    if not isinstance(given, Mapping):
        raise QueryError(f"a condition as data is a map of fields, not {repr_of(given, 200)}")
    if depth > _DEPTH_MAX:
        raise QueryError(f"conditions as data are at most {_DEPTH_MAX} inside each other")
    parts = [part for name, value in given.items() for part in _entry(name, value, depth + 1)]
    return Joined(True, parts) if parts else ALL


def _entry(name: str, value: Any, depth: int) -> list[Condition]:
    if not isinstance(name, str):
        raise QueryError(f"a field's name is text, not {repr_of(name, 80)}")
    if name in ("&", "|"):
        if not isinstance(value, list | tuple):
            raise QueryError(f'"{name}" takes a list of conditions, not {repr_of(value, 80)}')
        return [Joined(name == "&", [from_dict(one, depth=depth) for one in value])]
    if name == "~":
        return [~from_dict(value, depth=depth)]
    field = Field(tuple(name.split(".")))
    if not isinstance(value, Mapping):
        return [field.__eq__(value)]
    unknown = value.keys() - _SIGNS.keys()
    if unknown or not value:
        raise QueryError(
            f"field {name!r} is compared by one of {', '.join(_SIGNS)}, not by "
            f"{', '.join(map(repr, sorted(map(str, unknown)))) or 'nothing'}; to compare it with a "
            'map write {"==": {…}}'
        )
    return [_SIGNS[sign](field, other) for sign, other in value.items()]
