"""A value in a condition in the forms in which typed collections store it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from entidb.db.settling import plain
from entidb.errors import QueryError
from entidb.types import repr_of


def stored_forms(value: Any) -> tuple[Any, ...]:
    """``value`` in each form in which a typed collection stores it: pydantic writes a span of time
    in other words than msgspec, which is what all other classes are stored by."""
    if type(value) in _ONE_FORM:
        return (plain(value),)
    if hasattr(type(value), "model_fields"):
        raise QueryError(
            f"{repr_of(value, 200)} is a model of pydantic, and no value that can be looked for: "
            "compare its fields, such as F.home.city, or the map of all of them"
        )
    first = plain(value)
    second = plain(_as_pydantic(value))
    return (first,) if second == first else (first, second)


_ONE_FORM: Final = frozenset({str, int, float, bool, type(None), bytes})


def _as_pydantic(value: Any) -> Any:
    """``value`` with its spans of time as the text that pydantic stores."""
    if isinstance(value, timedelta):
        return _span(value)
    if isinstance(value, dict):
        return {_as_pydantic(name): _as_pydantic(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_pydantic(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return {_as_pydantic(item) for item in value}
    return value


def _span(value: timedelta) -> str:
    """``P1Y35DT1H2M3.5S``: a year is 365 days, and what is 0 is left out."""
    whole = abs(value)
    years, days = divmod(whole.days, 365)
    hours, seconds = divmod(whole.seconds, 3600)
    minutes, seconds = divmod(seconds, 60)
    fraction = f".{whole.microseconds:06}".rstrip("0").rstrip(".")
    date = (f"{years}Y" if years else "") + (f"{days}D" if days else "")
    time = (f"{hours}H" if hours else "") + (f"{minutes}M" if minutes else "")
    if seconds or fraction or not (date or time):
        time += f"{seconds}{fraction}S"
    return ("-" if value < timedelta(0) else "") + "P" + date + ("T" + time if time else "")


__all__ = ["stored_forms"]
