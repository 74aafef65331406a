"""Indexes compared with the entities, and the places of a table that was replaced removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Final

from entidb import cbor
from entidb.db.catalogue import CollectionInfo, IndexInfo
from entidb.db.index_keys import index_count_key, index_prefix, split_index_key
from entidb.db.indexing import MakePlaces, maker_of
from entidb.db.looking import Function
from entidb.db.records import INDEX, INDEX_COUNT, end_of, payload_of, unpack_u64
from entidb.db.writer import Writer

_PAGE: Final = 2_000
#: Places of entities that are remembered, before one more is.
_HELD_PLACES: Final = 50_000
_NOWHERE: Final[Set[bytes]] = frozenset()


def sweep_places(writer: Writer, table: int, number: int, limit: int) -> bool:
    """Remove ``limit`` places of a replaced table of collection ``number``; whether there may be
    more."""
    for index in writer.catalogue.indexes.of(number):
        prefix = index_prefix(index.number, table)
        keys = writer.snapshot.scan_keys(prefix, end_of(prefix), limit=limit)
        writer.delete_many([*keys, index_count_key(index.number, table)])
        if len(keys) == limit:
            return True
    return False


def index_faults(view: Writer, functions: Mapping[str, Function]) -> Iterator[str]:
    """What differs between the indexes and the entities, one line each."""
    yield from _strays(view)
    for index in view.catalogue.indexes.each:
        info = view.catalogue.by_number[index.collection]
        places = maker_of(index, functions)
        if places is not None and not index.paused:
            yield from _missing(view, info, index, places)
            yield from _wrong(view, info, index, places)


def _strays(view: Writer) -> Iterator[str]:
    """Places in what is no index, or of what is no table."""
    catalogue, stage = view.catalogue, view.stage
    of = {index.number: index.collection for index in catalogue.indexes.each}
    tables = {(info.number, info.table) for info in catalogue.by_number.values()}
    tables |= {(number, table) for table, number in catalogue.garbage}
    if stage is not None:
        tables |= {(int(number), table) for number, table in stage.tables.items()}
    for kind in (INDEX, INDEX_COUNT):
        start = kind
        while keys := view.snapshot.scan_keys(start, end_of(kind), limit=1):
            number, table = split_index_key(keys[0])[:2]
            start = end_of(keys[0][:9])
            if number in catalogue.indexes.dropped:
                continue
            if number not in of:
                yield f"there are places in index number {number}, which nobody knows"
            elif (of[number], table) not in tables:
                yield f"index number {number} has places of table {table}, which nobody knows"


def _missing(
    view: Writer, info: CollectionInfo, index: IndexInfo, places: MakePlaces
) -> Iterator[str]:
    prefix, whole = index_prefix(index.number, info.table), index.has(info.table)
    upto = index.after if index.table == info.table else b""
    counted = 0
    for page in view.table_pages(info.table, _PAGE):
        wanted = [
            (entity_id, prefix + fields + entity_id)
            for entity_id, row in page
            if row.payload is not None and (whole or entity_id <= upto)
            for fields in places(cbor.decode_trusted(row.payload))
        ]
        counted += len({entity_id for entity_id, _ in wanted})
        rows = view.snapshot.get_many([key for _, key in wanted])
        for (entity_id, _), raw in zip(wanted, rows, strict=True):
            if raw is None:
                yield f"index {index} of {info.name}: entity {entity_id.hex()} is not in its place"
    raw = view.snapshot.get(index_count_key(index.number, info.table))
    said = 0 if raw is None else unpack_u64(raw)
    if said != counted:
        yield f"index {index} of {info.name} counts {said} entities, {counted} belong into it"


def _wrong(
    view: Writer, info: CollectionInfo, index: IndexInfo, places: MakePlaces
) -> Iterator[str]:
    prefix = index_prefix(index.number, info.table)
    start = prefix
    # An entity with many places has them all over the index: they are made once, and not for each.
    known: dict[bytes, Set[bytes]] = {}
    held = 0
    while keys := view.snapshot.scan_keys(start, end_of(prefix), limit=_PAGE):
        found = [split_index_key(key)[2:] for key in keys]
        rows = view.snapshot.get_many([info.prefix + entity_id for _, entity_id in found])
        for (fields, entity_id), raw in zip(found, rows, strict=True):
            theirs = known.get(entity_id)
            if theirs is None:
                payload = None if raw is None else payload_of(raw)
                theirs = _NOWHERE if payload is None else {*places(cbor.decode_trusted(payload))}
                if held > _HELD_PLACES:
                    known, held = {}, 0
                known[entity_id], held = theirs, held + len(theirs) + 1
            if fields not in theirs:
                yield (
                    f"index {index} of {info.name}: entity {entity_id.hex()} stands where it does "
                    "not belong"
                )
        start = keys[-1] + b"\0"


__all__ = ["index_faults", "sweep_places"]
