"""Entities with fields equal to given values, and nothing else asked: one place of an index.

It is what programs ask most, so there is no plan to weigh: an index of just these fields has
all that meet the condition at one place, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from entidb.db.catalogue import IndexInfo
from entidb.db.conditions import Compared, Condition, Joined
from entidb.db.index_keys import INDEXED_BYTES_MAX
from entidb.db.looking import Path
from entidb.db.records import end_of
from entidb.db.rows import Pair, Rows
from entidb.db.sort_keys import sort_key
from entidb.types import ID_BYTES

#: Places read at a time at first.
_FIRST_PLACES = 32


def place_of(indexes: Sequence[IndexInfo], condition: Condition) -> tuple[IndexInfo, bytes] | None:
    """The index that has the entities of ``condition`` at one place, and that place; None if more
    is asked than that, or of no index, or if the values have no room in a key."""
    if not indexes:
        return None
    if type(condition) is Compared:
        if condition.sign != "==":
            return None
        # The name of a function at the end of a path is no name of a field.
        path = condition.path
        for index in indexes:
            if index.fields == (path,) and _by_fields(index, path):
                return _at(index, sort_key(condition.other))
        return None
    if type(condition) is not Joined or not condition.all:
        return None
    asked: dict[Path, Any] = {}
    for part in condition.parts:
        if type(part) is not Compared or part.sign != "==" or part.path in asked:
            return None
        asked[part.path] = part.other
    for index in indexes:
        if len(index.fields) == len(asked) and all(map(asked.__contains__, index.fields)):
            if all(_by_fields(index, path) for path in asked):
                return _at(index, b"".join([sort_key(asked[path]) for path in index.fields]))
    return None


def _by_fields(index: IndexInfo, path: Path) -> bool:
    return index.key is None and not index.each and type(path[-1]) is str


def _at(index: IndexInfo, key: bytes) -> tuple[IndexInfo, bytes] | None:
    return (index, key) if len(key) < INDEXED_BYTES_MAX else None


def entities_at(
    rows: Rows, name: str, index: IndexInfo, key: bytes, limit: int | None
) -> Iterator[Pair]:
    """(id, payload) of the entities at a place, in the order of ids. Mostly it is one."""
    first = _FIRST_PLACES if limit is None else min(limit, _FIRST_PLACES)
    for page in rows.places(name, index, (key, end_of(key)), False, first):
        if len(page) == 1:
            entity_id = page[0][-ID_BYTES:]
            payload = rows.get(name, entity_id)
            if payload is not None:
                yield entity_id, payload
            continue
        ids = [place[-ID_BYTES:] for place in page]
        for entity_id, payload in zip(ids, rows.get_many(name, ids), strict=True):
            if payload is not None:
                yield entity_id, payload


__all__ = ["entities_at", "place_of"]
