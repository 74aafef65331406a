"""Indexes: which places an entity has in one, and keeping those in step.

A place is a key: the index, the table, what the entity's fields sort by (``sort_keys``), its id.
``Indexing`` hangs on the one room that writes entities. So a place is put or taken away in the
storage commit that changes the entity, from any path and in any table: what a first sync brings has
its indexes when readers see it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

from entidb import cbor
from entidb.collector import paused
from entidb.db.catalogue import CollectionInfo, IndexInfo, IndexSet
from entidb.db.entities import Entities, Payloads
from entidb.db.index_columns import AT_ONCE, fields_of, having, names_of, places_of_all
from entidb.db.index_definition import FIELDS_MAX, Index, Meaning, checked, meaning_of, paths_of
from entidb.db.index_keys import INDEXED_BYTES_MAX, WHOLE_TEXT, index_prefix
from entidb.db.looking import MISSING, Function, applied, field_of
from entidb.db.records import INDEX_COUNT, pack_u64, unpack_u64
from entidb.db.sort_keys import sort_key

Functions = dict[str, Function]
#: The fields of an entity's places in an index.
Places = tuple[bytes, ...]
MakePlaces = Callable[[Any], Places]
#: Ids, what they were, what they are.
_Columns = tuple[Sequence[bytes], Payloads, Payloads]


class _Kept(NamedTuple):
    """An index that is kept in step."""

    #: What its places begin with.
    prefix: bytes
    #: What makes them.
    places: MakePlaces
    #: Its fields, if its places are made of many entities at once (``index_columns``).
    names: tuple[str, ...] | None
    #: Up to which id its entities are counted; None: all.
    counted: bytes | None
    unique: bool


#: Functions that every program has.
WELL_KNOWN: Final[Mapping[str, Function]] = {
    "str.casefold": str.casefold,
    "str.lower": str.lower,
    "str.upper": str.upper,
}
NOWHERE: Final[Places] = ()
#: Places of one entity that are looked through one by one.
_FEW_PLACES: Final = 16


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


def places_of(
    prefix: bytes,
    ids: list[bytes],
    payloads: list[bytes],
    names: Sequence[str] | None,
    make: MakePlaces,
) -> tuple[list[bytes], list[bytes]]:
    """The places, with ``prefix`` before them, of entities by id, and which ids have one."""
    values = cbor.decode_all_trusted(payloads)
    at_once = None if names is None else places_of_all(prefix, values, names, ids)
    if at_once is not None:
        return at_once, ids
    found = [
        (one, places) for one, value in zip(ids, values, strict=True) if (places := make(value))
    ]
    made = [prefix + fields + one for one, places in found for fields in places]
    return made, [one for one, _ in found]


# ---------------------------------------------------------------- in step


class _Waiting:
    """Of one table the entities that a commit has changed: what they were before it, and what they
    are by now."""

    __slots__ = ("_first", "_news", "_olds", "info")

    def __init__(self, info: CollectionInfo) -> None:
        self.info = info
        #: What was told first, as long as it is all.
        self._first: _Columns | None = None
        self._olds: dict[bytes, bytes | None] = {}
        self._news: dict[bytes, bytes | None] = {}

    def take(self, ids: Sequence[bytes], olds: Payloads, news: Payloads) -> None:
        first = self._first
        if first is None and not self._news:
            self._first = ids, olds, news
            return
        if first is not None:
            self._first = None
            self._merge(*first)
        self._merge(ids, olds, news)

    def _merge(self, ids: Sequence[bytes], olds: Payloads, news: Payloads) -> None:
        was = self._olds
        if len(ids) == 1:
            was.setdefault(ids[0], olds[0])
            self._news[ids[0]] = news[0]
            return
        for entity_id, old in zip(ids, olds, strict=True):
            was.setdefault(entity_id, old)
        self._news.update(zip(ids, news, strict=True))

    def columns(self) -> _Columns:
        if self._first is not None:
            return self._first
        # Both dictionaries have the order in which entities were named first.
        return list(self._news), list(self._olds.values()), list(self._news.values())


class Indexing:
    """Keeps the places of entities in step within one commit: of all that it has changed at once,
    at its end. Where something is unique, what is asked next has to see what was done before, so
    there it is done with each change."""

    def __init__(self, entities: Entities, functions: Mapping[str, Function]) -> None:
        self._entities = entities
        self.functions = functions
        #: What this commit has done to places of indexes that are unique: by place, with the
        #: index before it, the ids that are there by now (True) or not any more.
        self.moved: dict[bytes, dict[bytes, bool]] = {}
        self._counts: dict[bytes, int] = {}
        #: By table.
        self._waiting: dict[int, _Waiting] = {}
        #: That of the collection that was named last.
        self._current: tuple[CollectionInfo | None, _Waiting | None] = None, None
        #: The collection that was asked about last, and what was found.
        self._known: tuple[CollectionInfo | None, list[_Kept]] = None, []

    def watches(self, info: CollectionInfo) -> bool:
        return bool(info.indexes)

    def changed(
        self, info: CollectionInfo, ids: Sequence[bytes], olds: Payloads, news: Payloads
    ) -> None:
        if info is not self._current[0]:
            self._current = info, self._waiting_for(info)
        waiting = self._current[1]
        if waiting is not None:
            waiting.take(ids, olds, news)
        elif info.indexes:
            self._take(info, ids, olds, news)

    def _waiting_for(self, info: CollectionInfo) -> _Waiting | None:
        """None: it has no indexes, or one of them does not wait."""
        if not info.indexes or any(index.unique for index in info.indexes):
            return None
        return self._waiting.setdefault(info.table, _Waiting(info))

    def _take(
        self, info: CollectionInfo, ids: Sequence[bytes], olds: Payloads, news: Payloads
    ) -> None:
        wanted = self._wanted(info)
        if not wanted:
            return
        for at in range(0, len(ids), AT_ONCE):
            end = at + AT_ONCE
            self._take_some(wanted, ids[at:end], olds[at:end], news[at:end])

    def _take_some(
        self, wanted: list[_Kept], ids: Sequence[bytes], olds: Payloads, news: Payloads
    ) -> None:
        were = len(olds) - olds.count(None)
        if not all(news) or 0 < were < len(olds):  # no value is of no bytes
            self._take_each(wanted, zip(ids, olds, news, strict=True))
            return
        decode = cbor.decode_all_trusted
        values = decode(cast("Sequence[bytes]", news))
        if not were:
            for kept in wanted:
                self._add(kept, ids, values)
            return
        before = decode(cast("Sequence[bytes]", olds))
        for kept in wanted:
            self._replace(kept, ids, before, values)

    def _take_each(
        self,
        wanted: list[_Kept],
        rows: Iterable[tuple[bytes, bytes | None, bytes | None]],
    ) -> None:
        """The law of ``_add`` and ``_replace``."""
        decode = cbor.decode_trusted
        for entity_id, old, new in rows:
            was = None if old is None else decode(old)
            now = None if new is None else decode(new)
            for kept in wanted:
                before = NOWHERE if old is None else kept.places(was)
                after = NOWHERE if new is None else kept.places(now)
                self._change(kept, entity_id, before, after)

    def _change(self, kept: _Kept, entity_id: bytes, before: Places, after: Places) -> None:
        if before == after:
            return
        was: Collection[bytes] = before
        now: Collection[bytes] = after
        if len(before) + len(after) > _FEW_PLACES:
            was, now = set(before), set(after)
        prefix, changes = kept.prefix, self._entities.changes
        if kept.unique:
            self._move(prefix, entity_id, before, after)
        for fields in before:
            if fields not in now:
                changes[prefix + fields + entity_id] = None
        for fields in after:
            if fields not in was:
                changes[prefix + fields + entity_id] = b""
        by = bool(after) - bool(before)
        if by and (kept.counted is None or entity_id <= kept.counted):
            self._counts[prefix] = self._counts.get(prefix, 0) + by

    def _add(self, kept: _Kept, ids: Sequence[bytes], values: Sequence[Any]) -> None:
        """Of entities that are new, as most are where many change."""
        if kept.names is None or kept.unique:
            for entity_id, value in zip(ids, values, strict=True):
                self._change(kept, entity_id, NOWHERE, kept.places(value))
            return
        prefix, counted = kept.prefix, kept.counted
        places = places_of_all(prefix, values, kept.names, ids)
        if places is None:
            those = having(values, kept.names)
            ids, values = [ids[at] for at in those], [values[at] for at in those]
            places = places_of_all(prefix, values, kept.names, ids) or []
        self._entities.changes.update(dict.fromkeys(places, b""))
        count = len(ids) if counted is None else sum([one <= counted for one in ids])
        self._counts[prefix] = self._counts.get(prefix, 0) + count

    def _replace(
        self, kept: _Kept, ids: Sequence[bytes], olds: Sequence[Any], news: Sequence[Any]
    ) -> None:
        """Of entities that have another value, as a rule with the same in most of its fields."""
        names = kept.names
        before = None if names is None else fields_of(olds, names)
        after = None if names is None else fields_of(news, names)
        if before is None or after is None:
            for entity_id, old, new in zip(ids, olds, news, strict=True):
                self._change(kept, entity_id, kept.places(old), kept.places(new))
        elif before != after:
            for entity_id, was, now in zip(ids, before, after, strict=True):
                if was != now:
                    self._change(kept, entity_id, (was,), (now,))

    def _move(self, prefix: bytes, entity_id: bytes, before: Places, after: Places) -> None:
        for fields in before:
            self.moved.setdefault(prefix + fields, {})[entity_id] = False
        for fields in after:
            self.moved.setdefault(prefix + fields, {})[entity_id] = True

    def _wanted(self, info: CollectionInfo) -> list[_Kept]:
        """Each index that is kept. One that is being built has places beyond what is counted
        too."""
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
            names = names_of(index)
            wanted.append(_Kept(prefix, places, names, counted, index.unique))
        self._known = info, wanted
        return wanted

    def _pause(self, index: IndexInfo) -> None:
        """This program cannot make the index's keys: it is built again by one that can."""
        catalogue = self._entities.catalogue
        if any(one.number == index.number and not one.paused for one in catalogue.indexes.each):
            indexes = renewed(catalogue.indexes, [index], catalogue.next_table, paused=True)
            self._entities.set_catalogue(catalogue.with_indexes(indexes))

    def finish(self) -> None:
        entities, waiting = self._entities, self._waiting
        self._waiting, self._current = {}, (None, None)
        for each in waiting.values():
            ids, olds, news = each.columns()
            if len(ids) < AT_ONCE:
                self._take(each.info, ids, olds, news)
                continue
            with paused():
                self._take(each.info, ids, olds, news)
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
