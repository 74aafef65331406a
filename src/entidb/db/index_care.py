"""Indexes from their declaration to their end: declared, built, built again, emptied, compared.

All of it in bounded commits beside normal work. A build keeps its position in the commit that
carries it on, so it can stop anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from entidb import cbor
from entidb.db.catalogue import NO_INDEXES, CollectionInfo, IndexInfo, IndexSet
from entidb.db.core import Core
from entidb.db.index_keys import index_count_key, index_prefix, split_index_key
from entidb.db.indexing import Index, MakePlaces, maker_of, paths_of, renewed
from entidb.db.looking import function_name
from entidb.db.records import (
    FORMAT_PLAIN,
    FORMAT_VERSION,
    INDEX,
    INDEX_COUNT,
    META_FORMAT,
    count_key,
    encode_format,
    end_of,
    pack_u64,
    payload_of,
    unpack_u64,
)
from entidb.db.writer import Writer
from entidb.errors import TransactionError

#: Entities that one commit of a build looks at, and places that one commit empties.
BUILD_ROWS = 2_000
DROP_ROWS = 5_000
_PAGE = 2_000

# ---------------------------------------------------------------- declaring


def declare(database: Core, name: str, wanted: list[Index]) -> bool:
    """Make ``wanted`` the indexes of collection ``name``: new ones are to be built, others are to
    be emptied. Whether there is something to do. Raises what a commit does."""
    for index in wanted:
        if index.key is not None:
            database.index_functions[function_name(index.key)] = index.key
    with database.view() as view:
        info = view.catalogue.by_name.get(name)
        there = () if info is None else info.indexes
        if {_meaning(index) for index in there} == set(map(_declared, wanted)):
            if not any(index.paused for index in there):
                return bool(_unfinished(view)) or bool(view.catalogue.indexes.dropped)
        if database.read_only:
            return False
    if not database._format_lock.acquire(timeout=database._busy_timeout_s):
        raise TransactionError(
            f"{database.where} is being copied, and its format is about to change; declare the "
            f"indexes of {name!r} when the backup is done",
            code="busy",
        )
    try:
        with database.write("local") as writer:
            _declare(writer, name, wanted)
    finally:
        database._format_lock.release()
    return True


def _declared(index: Index) -> tuple[object, ...]:
    key = None if index.key is None else function_name(index.key)
    return paths_of(index), index.each, key


def _meaning(index: IndexInfo) -> tuple[object, ...]:
    return index.fields, index.each, index.key


def _declare(writer: Writer, name: str, wanted: list[Index]) -> None:
    info = writer.collection(name)
    catalogue = writer.catalogue
    indexes = catalogue.indexes
    left = {_meaning(index): index for index in indexes.of(info.number)}
    # A table without a row has all of them in it.
    built = () if writer.table_rows(info.table, 1) else (info.table,)
    mine, following = [], indexes.next
    for index in wanted:
        known = left.pop(_declared(index), None)
        if known is None:
            key = None if index.key is None else function_name(index.key)
            fields, since = paths_of(index), catalogue.next_table
            known = IndexInfo(following, info.number, fields, index.each, key, since, built)
            following += 1
        elif known.paused:
            known = replace(known, since=catalogue.next_table, built=built, paused=False)
        mine.append(known)
    others = tuple(index for index in indexes.each if index.collection != info.number)
    gone = tuple(index.number for index in left.values())
    indexes = IndexSet((*others, *mine), indexes.dropped + gone, following)
    if indexes.each or indexes.dropped:
        writer.put(META_FORMAT, encode_format(FORMAT_VERSION))
    writer.set_catalogue(catalogue.with_indexes(indexes))


def rebuild(database: Core, name: str | None = None) -> int:
    """Have the indexes of collection ``name``, or of all, built from nothing; how many there are.
    Until they are, queries do without them."""
    with database.write("local") as writer:
        catalogue = writer.catalogue
        chosen = [
            index
            for index in catalogue.indexes.each
            if name is None or catalogue.by_number[index.collection].name == name
        ]
        if chosen:
            indexes = renewed(catalogue.indexes, chosen, catalogue.next_table)
            writer.set_catalogue(catalogue.with_indexes(indexes))
    return len(chosen)


# ---------------------------------------------------------------- building and emptying


def build_step(database: Core, rows: int = BUILD_ROWS) -> bool:
    """One bounded commit of what is to be built, or emptied; whether there may be more."""
    with database.view() as view:
        if not _buildable(database, view) and not view.catalogue.indexes.dropped:
            return False
    with database.write("local") as writer:
        chosen = _buildable(database, writer)
        if chosen:
            _build(writer, *chosen[0], rows)
            return True
        if writer.catalogue.indexes.dropped:
            _empty(writer, writer.catalogue.indexes)
            return True
    return False


def _unfinished(view: Writer) -> list[tuple[CollectionInfo, IndexInfo]]:
    infos = view.catalogue.by_number
    pairs = [(infos[index.collection], index) for index in view.catalogue.indexes.each]
    return [(info, index) for info, index in pairs if not index.has(info.table)]


def _buildable(database: Core, view: Writer) -> list[tuple[CollectionInfo, IndexInfo, MakePlaces]]:
    return [
        (info, index, places)
        for info, index in _unfinished(view)
        if not index.paused and (places := maker_of(index, database.index_functions)) is not None
    ]


def _build(
    writer: Writer, info: CollectionInfo, index: IndexInfo, places: MakePlaces, rows: int
) -> None:
    prefix, table = index_prefix(index.number, info.table), info.table
    after = index.after if index.table == table else b""
    page = writer.table_rows(table, rows, after)
    counted = 0
    for entity_id, row in page:
        found = () if row.payload is None else places(cbor.decode_trusted(row.payload))
        for fields in found:
            writer.put(prefix + fields + entity_id, b"")
        counted += bool(found)
    key = index_count_key(index.number, table)
    raw = writer.get(key) if after else None
    writer.put(key, pack_u64((0 if raw is None else unpack_u64(raw)) + counted))
    if len(page) < rows:
        index = replace(index, built=(table,), table=0, after=b"")
    else:
        index = replace(index, table=table, after=page[-1][0])
    catalogue = writer.catalogue
    writer.set_catalogue(catalogue.with_indexes(catalogue.indexes.replacing(index)))


def _empty(writer: Writer, indexes: IndexSet) -> None:
    number = indexes.dropped[0]
    for kind in (INDEX, INDEX_COUNT):
        prefix = index_prefix(number, 0)[1:5]
        keys = writer.snapshot.scan_keys(kind + prefix, end_of(kind + prefix), limit=DROP_ROWS)
        writer.delete_many(keys)
        if len(keys) == DROP_ROWS:
            return
    left = replace(indexes, dropped=indexes.dropped[1:])
    if not left.each and not left.dropped:
        # An older EntiDB may have it again.
        left = NO_INDEXES
        writer.put(META_FORMAT, encode_format(FORMAT_PLAIN))
    writer.set_catalogue(writer.catalogue.with_indexes(left))


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


# ---------------------------------------------------------------- looking


class IndexStatus(Struct, frozen=True):
    """The state of an index: ``ready`` for queries, or with ``done`` of ``entities`` in it so far.
    It is ``paused`` when a program wrote that did not have its function, until one that has it
    declares it again."""

    collection: str
    index: str
    ready: bool
    done: int
    entities: int
    paused: bool


def statuses(database: Core) -> list[IndexStatus]:
    """All indexes, in the order of collections and of their declaration."""
    found = []
    with database.view() as view:
        for name, info in sorted(view.catalogue.by_name.items()):
            raw = view.get(count_key(info.number))
            entities = 0 if raw is None else unpack_u64(raw)
            for index in info.indexes:
                raw = view.get(index_count_key(index.number, info.table))
                done = 0 if raw is None else unpack_u64(raw)
                ready = index.has(info.table)
                status = IndexStatus(name, str(index), ready, done, entities, index.paused)
                found.append(status)
    return found


# ---------------------------------------------------------------- comparing


def index_faults(database: Core, view: Writer) -> Iterator[str]:
    """What differs between the indexes and the entities, one line each."""
    yield from _strays(view)
    for index in view.catalogue.indexes.each:
        info = view.catalogue.by_number[index.collection]
        places = maker_of(index, database.index_functions)
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
    while keys := view.snapshot.scan_keys(start, end_of(prefix), limit=_PAGE):
        found = [split_index_key(key)[2:] for key in keys]
        rows = view.snapshot.get_many([info.prefix + entity_id for _, entity_id in found])
        for (fields, entity_id), raw in zip(found, rows, strict=True):
            payload = None if raw is None else payload_of(raw)
            if payload is None or fields not in places(cbor.decode_trusted(payload)):
                yield (
                    f"index {index} of {info.name}: entity {entity_id.hex()} stands where it does "
                    "not belong"
                )
        start = keys[-1] + b"\0"


__all__ = [
    "BUILD_ROWS",
    "IndexStatus",
    "build_step",
    "declare",
    "index_faults",
    "rebuild",
    "statuses",
    "sweep_places",
]
