"""Entities by an index: the places that a plan names, and what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from entidb.db.index_keys import INDEXED_BYTES_MAX, Span
from entidb.db.plans import Chosen
from entidb.db.records import end_of
from entidb.db.rows import Pair, Rows
from entidb.db.sort_keys import sort_key
from entidb.types import ID_BYTES

#: Places read at a time: a few at first, because often a few are wanted.
_FIRST_PLACES = 32
_PLACES_MAX = 2048
_COUNTED_PLACES = 20_000
#: Entities read at a time.
_PAGE_ROWS = 512


def serves(rows: Rows, name: str, chosen: Chosen) -> bool:
    """Whether the index can be used for what ``rows`` show."""
    if not chosen.whole:
        return True
    return not rows.own(name) and rows.index_count(name, chosen.index) == rows.count(name)


def ids_by_index(rows: Rows, name: str, chosen: Chosen) -> list[bytes]:
    """The ids of all that the index gives, ascending, each once; of a transaction, all that it
    wrote with them."""
    own = rows.own(name)
    found = {
        key[-ID_BYTES:]
        for span in chosen.spans
        for page in rows.places(name, chosen.index, span, False, _PLACES_MAX)
        for key in page
    }
    if own:
        found = {one for one in found if one not in own}
        found.update(one for one, payload in own.items() if payload is not None)
    return sorted(found)


def pairs_of(rows: Rows, name: str, ids: Sequence[bytes]) -> Iterator[Pair]:
    """(id, payload) of the entities ``ids``, in that order."""
    for at in range(0, len(ids), _PAGE_ROWS):
        part = ids[at : at + _PAGE_ROWS]
        for entity_id, payload in zip(part, rows.get_many(name, part), strict=True):
            if payload is not None:
                yield entity_id, payload


def count_by_index(rows: Rows, name: str, chosen: Chosen) -> int:
    """How many places there are."""
    return sum(
        len(page)
        for span in chosen.spans
        for page in rows.places(name, chosen.index, span, False, _COUNTED_PLACES)
    )


def runs_by_index(
    rows: Rows, name: str, chosen: Chosen, after: tuple[Sequence[Any], bytes] | None
) -> Iterator[tuple[bool, list[bytes]]]:
    """The ids that an index gives, in its order, some at a time: as they stand, or (True) all of a
    place whose fields had no room in the key, which are yet to be sorted. ``after``: the values
    of the order's fields of the index and the id that a page begins behind."""
    span = chosen.spans[0]
    if after is not None:
        span = _behind(span, chosen, *after)
    waiting: list[bytes] = []
    fields_waiting = b""
    pages = rows.places(name, chosen.index, span, chosen.backwards, _FIRST_PLACES)
    for page in pages:
        plain: list[bytes] = []
        for key in page:
            fields = key[:-ID_BYTES]
            if waiting and fields != fields_waiting:
                yield True, waiting
                waiting = []
            if len(fields) < INDEXED_BYTES_MAX:
                plain.append(key[-ID_BYTES:])
                continue
            if plain:
                yield False, plain
                plain = []
            fields_waiting = fields
            waiting.append(key[-ID_BYTES:])
        if plain:
            yield False, plain
    if waiting:
        yield True, waiting


def _behind(span: Span, chosen: Chosen, values: Sequence[Any], entity_id: bytes) -> Span:
    fields = chosen.fixed + b"".join(map(sort_key, values))
    cut = len(fields) >= INDEXED_BYTES_MAX
    fields = fields[:INDEXED_BYTES_MAX]
    if cut and values:
        # Entities at the same place are behind it or not: that is looked at one by one.
        if chosen.backwards:
            return span[0], _least(span[1], end_of(fields))
        return max(span[0], fields), span[1]
    if chosen.backwards:
        return span[0], _least(span[1], fields + entity_id)
    return max(span[0], fields + entity_id + b"\0"), span[1]


def _least(one: bytes | None, other: bytes) -> bytes:
    return other if one is None else min(one, other)


__all__ = ["count_by_index", "ids_by_index", "pairs_of", "runs_by_index", "serves"]
