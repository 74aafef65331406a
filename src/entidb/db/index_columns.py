"""Where many entities stand in an index, made field by field and not entity by entity.

``indexing.places_in`` is the law: what is made here is the same, or nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import itemgetter
from typing import Any, Final

from entidb.db.catalogue import IndexInfo
from entidb.db.index_keys import INDEXED_BYTES_MAX
from entidb.db.looking import MISSING
from entidb.db.sort_keys import TEXT, TEXT_END, plain_texts, sort_keys

#: Entities that are decoded together: enough to share what one step costs, and few enough that
#: they stay in the processor's cache.
AT_ONCE: Final = 512
#: Bytes of a text that has room in a place.
_WHOLE_TEXT_MAX: Final = INDEXED_BYTES_MAX - len(TEXT + TEXT_END)


def names_of(index: IndexInfo) -> tuple[str, ...] | None:
    """The fields of ``index``, if each entity that has all of them has one place in it, by their
    values; else None."""
    if index.each or index.key is not None or max(map(len, index.fields)) > 1:
        return None
    return tuple([name for (name,) in index.fields])


def fields_of(values: Sequence[Any], names: Sequence[str]) -> list[bytes] | None:
    """What the place of each of ``values`` has of its fields; None where one of ``values`` has no
    place."""
    try:
        first = list(map(itemgetter(names[0]), values))
    except (KeyError, TypeError):
        return None  # it has no such field, or is no map
    fields = sort_keys(first)
    if len(names) > 1:
        rest = [sort_keys([value.get(name, MISSING) for value in values]) for name in names[1:]]
        fields = list(map(b"".join, zip(fields, *rest, strict=True)))
    if max(map(len, fields), default=0) > INDEXED_BYTES_MAX:
        return [one[:INDEXED_BYTES_MAX] for one in fields]
    return fields


def places_of_all(
    prefix: bytes, values: Sequence[Any], names: Sequence[str], ids: Sequence[bytes]
) -> list[bytes] | None:
    """The place of each of ``values``, with ``prefix`` before it and its id behind it; None where
    one of them has none."""
    if len(names) == 1:
        # What most indexes are of: put together at once, and not its fields before.
        try:
            texts = plain_texts(list(map(itemgetter(names[0]), values)))
        except (KeyError, TypeError):
            return None
        if texts is not None and max(map(len, texts)) <= _WHOLE_TEXT_MAX:
            parts = zip(repeat(prefix + TEXT), texts, repeat(TEXT_END), ids, strict=False)
            return list(map(b"".join, parts))
    fields = fields_of(values, names)
    if fields is None:
        return None
    return list(map(b"".join, zip(repeat(prefix, len(ids)), fields, ids, strict=True)))


def having(values: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Which of ``values`` have a place."""
    first = names[0]
    return [at for at, value in enumerate(values) if type(value) is dict and first in value]


__all__ = ["AT_ONCE", "fields_of", "having", "names_of", "places_of_all"]
