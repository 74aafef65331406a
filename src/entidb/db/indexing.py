"""Indexes: which places an entity has in one, and keeping those in step.

A place is a key: the index, the table, what the entity's fields sort by (``sort_keys``), its id.
``Indexing`` hangs on the one room that writes entities. So a place is put or taken away in the
storage commit that changes the entity, from any path and in any table: what a first sync brings has
its indexes when readers see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from entidb import cbor
from entidb.db.catalogue import CollectionInfo, IndexInfo, IndexSet
from entidb.db.entities import Entities, Payloads
from entidb.db.index_definition import FIELDS_MAX, Index, Meaning, checked, meaning_of, paths_of
from entidb.db.index_keys import INDEXED_BYTES_MAX, WHOLE_TEXT, index_prefix
from entidb.db.looking import MISSING, Function, applied, field_of
from entidb.db.records import INDEX_COUNT, pack_u64, unpack_u64
from entidb.db.sort_keys import sort_key

Functions = dict[str, Function]
#: The fields of an entity's places in an index.
Places = tuple[bytes, ...]
MakePlaces = Callable[[Any], Places]
#: Of an index that is kept in step: see ``Indexing._wanted``.
_Kept = tuple[bytes, MakePlaces, bytes | None, bool]

#: Functions that every program has.
WELL_KNOWN: Final[Mapping[str, Function]] = {
    "str.casefold": str.casefold,
    "str.lower": str.lower,
    "str.upper": str.upper,
}
NOWHERE: Final[Places] = ()


# ---------------------------------------------------------------- places


@lru_cache(maxsize=512)
def places_in(
    fields: tuple[tuple[str, ...], ...], each: bool, function: Function | None
) -> MakePlaces:
    """What says of a plain value which places it has in an index, each once."""
    if each:
        return lambda value: _members(_field(value, fields[0], function))
    if function is None and len(fields) == 1 and len(fields[0]) == 1:
        (name,) = fields[0]

        def one(value: Any) -> Places:
            if type(value) is not dict or name not in value:
                return NOWHERE
            return (sort_key(value[name])[:INDEXED_BYTES_MAX],)

        return one

    if function is None and max(map(len, fields)) == 1:
        names = [path[0] for path in fields]

        def flat(value: Any) -> Places:
            if type(value) is not dict or names[0] not in value:
                return NOWHERE
            parts = [sort_key(value.get(name, MISSING)) for name in names]
            return (b"".join(parts)[:INDEXED_BYTES_MAX],)

        return flat

    def several(value: Any) -> Places:
        first = _field(value, fields[0], function)
        if first is MISSING:
            return NOWHERE
        rest = [sort_key(_field(value, path, function)) for path in fields[1:]]
        return (b"".join([sort_key(first), *rest])[:INDEXED_BYTES_MAX],)

    return several


def _field(value: Any, path: tuple[str, ...], function: Function | None) -> Any:
    found = field_of(value, path)
    return found if function is None or found is MISSING else applied(function, found)


def _members(found: Any) -> Places:
    if type(found) is list:
        return tuple({sort_key(member)[:INDEXED_BYTES_MAX]: None for member in found})
    return (WHOLE_TEXT,) if type(found) is str else NOWHERE


def maker_of(index: IndexInfo, functions: Mapping[str, Function]) -> MakePlaces | None:
    """What makes the places of ``index``; None if this program does not have its function."""
    if index.key is None:
        return places_in(index.fields, index.each, None)
    function = functions.get(index.key)
    return None if function is None else places_in(index.fields, index.each, function)


# ---------------------------------------------------------------- in step


class Indexing:
    """Keeps the places of entities in step within one commit."""

    def __init__(self, entities: Entities, functions: Mapping[str, Function]) -> None:
        self._entities = entities
        self.functions = functions
        #: What this commit has done to places of indexes that are unique: by place, with the
        #: index before it, the ids that are there by now (True) or not any more.
        self.moved: dict[bytes, dict[bytes, bool]] = {}
        self._counts: dict[bytes, int] = {}
        #: The collection that was asked about last, and what was found.
        self._known: tuple[CollectionInfo | None, list[_Kept]] = None, []

    def changed(
        self, info: CollectionInfo, ids: Sequence[bytes], olds: Payloads, news: Payloads
    ) -> None:
        if not info.indexes:
            return
        wanted = self._wanted(info)
        decode, changes = cbor.decode_trusted, self._entities.changes
        if not any(olds) and None not in news:
            values = [decode(new) for new in news if new is not None]
            for kept in wanted:
                self._add(kept, ids, values)
            return
        for entity_id, old, new in zip(ids, olds, news, strict=True):
            was = None if old is None else decode(old)
            now = None if new is None else decode(new)
            for prefix, places, counted, unique in wanted:
                before = NOWHERE if old is None else places(was)
                after = NOWHERE if new is None else places(now)
                if before == after:
                    continue
                if unique:
                    self._move(prefix, entity_id, before, after)
                for fields in before:
                    if fields not in after:
                        changes[prefix + fields + entity_id] = None
                for fields in after:
                    if fields not in before:
                        changes[prefix + fields + entity_id] = b""
                by = bool(after) - bool(before)
                if by and (counted is None or entity_id <= counted):
                    self._counts[prefix] = self._counts.get(prefix, 0) + by

    def _add(self, kept: _Kept, ids: Sequence[bytes], values: Sequence[Any]) -> None:
        """What ``changed`` does about entities that are new, as most are where many change."""
        prefix, places, counted, unique = kept
        changes, count = self._entities.changes, 0
        if counted is None and not unique:
            # As below, for most.
            made = map(places, values)
            found_by = [(found, one) for found, one in zip(made, ids, strict=True) if found]
            changes.update(
                dict.fromkeys([prefix + f + one for found, one in found_by for f in found], b"")
            )
            self._counts[prefix] = self._counts.get(prefix, 0) + len(found_by)
            return
        for entity_id, value in zip(ids, values, strict=True):
            found = places(value)
            for fields in found:
                changes[prefix + fields + entity_id] = b""
            if unique:
                self._move(prefix, entity_id, NOWHERE, found)
            if found and (counted is None or entity_id <= counted):
                count += 1
        self._counts[prefix] = self._counts.get(prefix, 0) + count

    def _move(self, prefix: bytes, entity_id: bytes, before: Places, after: Places) -> None:
        for fields in before:
            self.moved.setdefault(prefix + fields, {})[entity_id] = False
        for fields in after:
            self.moved.setdefault(prefix + fields, {})[entity_id] = True

    def _wanted(self, info: CollectionInfo) -> list[_Kept]:
        """Of each index that is kept: what its places begin with, what makes them, up to which
        id its entities are counted (None: all), and whether it is unique. One that is being built
        has places beyond too."""
        if self._known[0] is info:
            return self._known[1]
        wanted = []
        for index in info.indexes:
            if index.paused:
                continue
            places = maker_of(index, self.functions)
            if places is None:
                self._pause(index)
                continue
            counted = None
            if not index.has(info.table):
                counted = index.after if index.table == info.table else b""
            prefix = index_prefix(index.number, info.table)
            wanted.append((prefix, places, counted, index.unique))
        self._known = info, wanted
        return wanted

    def _pause(self, index: IndexInfo) -> None:
        """This program cannot make the index's keys: it is built again by one that can."""
        catalogue = self._entities.catalogue
        if any(one.number == index.number and not one.paused for one in catalogue.indexes.each):
            indexes = renewed(catalogue.indexes, [index], catalogue.next_table, paused=True)
            self._entities.set_catalogue(catalogue.with_indexes(indexes))

    def finish(self) -> None:
        entities = self._entities
        for prefix, by in self._counts.items():
            if by:
                key = INDEX_COUNT + prefix[1:]
                raw = entities.get(key)
                entities.changes[key] = pack_u64((0 if raw is None else unpack_u64(raw)) + by)
        self._counts = {}


def renewed(
    indexes: IndexSet, old: Sequence[IndexInfo], next_table: int, *, paused: bool = False
) -> IndexSet:
    """With ``old`` to be built from nothing, under new numbers; what they had is emptied."""
    numbers = {index.number: indexes.next + at for at, index in enumerate(old)}
    each = tuple(
        IndexInfo(
            numbers[one.number],
            one.collection,
            one.fields,
            one.each,
            one.key,
            next_table,
            paused=paused,
            unique=one.unique,
        )
        if one.number in numbers
        else one
        for one in indexes.each
    )
    return IndexSet(each, indexes.dropped + tuple(numbers), indexes.next + len(numbers))


__all__ = [
    "FIELDS_MAX",
    "WELL_KNOWN",
    "Functions",
    "Index",
    "Indexing",
    "Meaning",
    "checked",
    "maker_of",
    "meaning_of",
    "paths_of",
    "renewed",
]
