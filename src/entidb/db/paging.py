"""Where a page ends and the next one goes on: what comes behind an entity, in an order of fields.

That place can be written as text, a *bookmark*, for a request that comes later, in another process
or from a browser.
"""

from __future__ import annotations

import uuid
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from typing import Any, Final

from entidb import cbor
from entidb.db.looking import MISSING, field_of, order_key
from entidb.db.plain import ValueCodec
from entidb.db.plans import Order
from entidb.errors import (
    CborDecodeError,
    CborEncodeError,
    QueryError,
    ValueTypeError,
)
from entidb.types import repr_of

#: What entities are sorted by, the id, and the values of the fields: of the last one of a page.
End = tuple[tuple[Any, ...], bytes, tuple[Any, ...]]
#: What is sorted: what it is sorted by, id, payload.
Sorted = tuple[tuple[Any, ...], bytes, bytes]
_LAST: Final = "the last (id, value) of the page before, as it was read"


def end_of_page(method: str, last: object, order: Sequence[Order], codec: ValueCodec[Any]) -> End:
    """Where a page ended whose last entity was ``last``, an ``(id, value)``. Raises ``QueryError``,
    which names ``method``."""
    entity_id, value = last if isinstance(last, tuple) and len(last) == 2 else (None, None)
    if type(entity_id) is not uuid.UUID:
        raise QueryError(f"{method}() takes {_LAST}, not {repr_of(last, 200)}")
    if not order:
        return _end(entity_id.bytes, ())
    try:
        stored = cbor.decode_trusted(codec.encode(value))
    except (CborEncodeError, ValueTypeError) as error:
        raise QueryError(f"{method}() takes {_LAST}: {error}") from error
    return _end(entity_id.bytes, (field_of(stored, one.path) for one in order))


def _end(raw: bytes, values: Iterable[Any]) -> End:
    there = tuple(values)
    return tuple(map(order_key, there)), raw, there


def bookmark_of(end: End, order: Sequence[Order]) -> str:
    """``end`` as text of letters, digits, ``-`` and ``_``, fit for an address."""
    _, raw, values = end
    fields = [[] if value is MISSING else [value] for value in values]
    packed = cbor.encode_message([raw, [str(one) for one in order], fields])
    return urlsafe_b64encode(packed).rstrip(b"=").decode()


def end_of_bookmark(text: str, order: Sequence[Order]) -> End:
    """The other way round; it may come from anybody. Raises ``QueryError``."""
    try:
        raw, sorted_by, fields = cbor.decode(urlsafe_b64decode(f"{text}{'=' * (-len(text) % 4)}"))
        if type(raw) is not bytes or len(raw) != 16 or type(fields) is not list:
            raise ValueError("another shape")
        end = _end(raw, (MISSING if each == [] else each[0] for each in fields))
    except (CborDecodeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise QueryError(
            f"{repr_of(text, 60)} is no bookmark: give after() what bookmark() made, or {_LAST}"
        ) from error
    if sorted_by != [str(one) for one in order] or len(end[2]) != len(order):
        raise QueryError(
            "this bookmark is of a query in another order: give it to the same query, or begin "
            "with the first page again"
        )
    return end


def is_after(keys: tuple[Any, ...], raw: bytes, end: End, order: Sequence[Order]) -> bool:
    """Whether an entity that is sorted by ``keys``, with the id ``raw``, comes behind ``end``."""
    for key, last, one in zip(keys, end[0], order, strict=True):
        if key != last:
            return bool(key < last) if one.descending else bool(key > last)
    return raw < end[1] if order[-1].descending else raw > end[1]


def sort(rows: list[Sorted], order: Sequence[Order]) -> None:
    """Sort ``rows`` in place."""
    # Sorting is stable, so the last criterion goes first.
    rows.sort(key=lambda row: row[1], reverse=order[-1].descending)
    for at in reversed(range(len(order))):
        rows.sort(key=lambda row, at=at: row[0][at], reverse=order[at].descending)  # type: ignore[misc]


__all__ = ["End", "Sorted", "bookmark_of", "end_of_bookmark", "end_of_page", "is_after", "sort"]
