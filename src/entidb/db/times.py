"""Dates and times that compare equal and are not the same, and the other way round.

Python leaves ``fold`` out of comparisons of times without a zone, and takes a time of day with a
zone for one without. And in the hour that comes twice it finds no time of one zone equal to one of
another, although both are the same moment.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, time
from typing import Any, Final

_TIMES: Final = (datetime, time)


def equal_times(given: datetime | time, got: datetime | time) -> bool:
    """Whether ``got``, which was read from text, is what ``given`` is: the same moment, and the
    same difference from UTC. The name of a zone is not stored."""
    offset = given.utcoffset()
    if offset != got.utcoffset():
        return False
    if offset is None:
        return (
            given == got
            and given.fold == got.fold
            and (given.tzinfo is None) == (got.tzinfo is None)
        )
    if isinstance(given, datetime) and isinstance(got, datetime):
        return given.astimezone(UTC) == got.astimezone(UTC)
    return given == got


def odd_times(kind: Any) -> Callable[[Any], bool] | None:
    """Answers for a value of a class whether a time in it may compare equal to what comes back, and
    not be the same. None: it holds no times."""
    hints = _hints_of(kind)
    direct = tuple(name for name, hint in hints.items() if _is_time(hint))
    seen: set[int] = {id(kind)}
    if any(_holds_times(hint, seen) for name, hint in hints.items() if name not in direct):
        return lambda value: True
    if not direct:
        return (lambda value: True) if _holds_times(kind, set()) else None

    def is_odd(value: Any) -> bool:
        for name in direct:
            part = getattr(value, name, None)
            if isinstance(part, _TIMES) and (part.fold or part.tzinfo is not None):
                return True
        return False

    return is_odd


def _is_time(hint: Any) -> bool:
    return any(isinstance(part, type) and issubclass(part, _TIMES) for part in _choices(hint))


def _choices(hint: Any) -> Iterator[Any]:
    """A type, or the members of a union."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _choices(hint.__origin__)
    elif origin is not None and "Union" in str(origin):
        for each in typing.get_args(hint):
            yield from _choices(each)
    else:
        yield hint


def _holds_times(hint: Any, seen: set[int]) -> bool:
    if _is_time(hint):
        return True
    if id(hint) in seen:
        return False
    seen.add(id(hint))
    return any(_holds_times(each, seen) for each in typing.get_args(hint)) or any(
        _holds_times(each, seen) for each in _hints_of(hint).values()
    )


def _hints_of(kind: Any) -> dict[str, Any]:
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type) or origin.__module__ == "builtins":
        return {}
    try:
        return typing.get_type_hints(origin)
    except (NameError, TypeError, AttributeError):
        return {}
