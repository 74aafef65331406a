"""What programs give to a collection where they mean several things at once, looked at before it is
used: what Python itself would say of it names neither the call nor the way out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from entidb.errors import QueryError, ValueTypeError
from entidb.types import kind_name, repr_of


def range_of(reverse: object, limit: object) -> tuple[bool, int | None]:
    """How a range is read. Raises ``QueryError``."""
    if not isinstance(reverse, bool):
        raise QueryError(f"reverse is True or False, not {kind_name(reverse)}")
    if limit is None:
        return reverse, None
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise QueryError(f"limit is a number, or None for all, not {kind_name(limit)}")
    return reverse, min(max(limit, 0), sys.maxsize)


def several(call: str, given: Iterable[Any], what: str) -> Iterable[Any]:
    """``given``, which ``call`` goes through. Raises ``ValueTypeError``."""
    if not isinstance(given, Iterable):
        raise ValueTypeError(f"{call} takes {what}, not {kind_name(given)}")
    return given


def pairs_of(call: str, given: object) -> Iterator[tuple[Any, Any]]:
    """Pairs of id and value, from a mapping or from pairs. Raises ``ValueTypeError``."""
    pairs: Any = given.items() if isinstance(given, Mapping) else given
    for pair in several(call, pairs, "a mapping, or pairs of id and value"):
        try:
            entity_id, value = pair
        except (TypeError, ValueError):
            raise ValueTypeError(
                f"several values are given as a mapping, or as pairs of id and value, not as "
                f"{repr_of(pair, 60)}; `add` makes the id of a new value"
            ) from None
        yield entity_id, value


def changed(call: str, changes: object, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that ``call`` changes. Raises ``ValueTypeError``."""
    if changes is None:
        return fields
    if not isinstance(changes, Mapping):
        raise ValueTypeError(
            f"{call} takes a mapping of fields to values, or keywords, not {kind_name(changes)}"
        )
    return {**changes, **fields}


__all__ = ["changed", "pairs_of", "range_of", "several"]
