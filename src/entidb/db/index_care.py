"""Indexes from their declaration to their end: declared, built, built again, emptied.

All of it in bounded commits beside normal work. A build keeps its position in the commit that
carries it on, so it can stop anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from entidb import cbor
from entidb.db.catalogue import NO_INDEXES, CollectionInfo, IndexInfo, IndexSet
from entidb.db.core import Core
from entidb.db.index_keys import index_count_key, index_prefix
from entidb.db.index_run import (
    FIRST_ROWS,
    LEARNT_MAX,
    LONGER,
    ROWS_MAX,
    ROWS_MIN,
    IndexRun,
)
from entidb.db.indexing import Index, MakePlaces, Meaning, maker_of, meaning_of, renewed
from entidb.db.local import Role
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
    unpack_u64,
)
from entidb.db.writer import Writer
from entidb.errors import StorageError, TransactionError

#: Seconds between two looks of who waits for another's step whether there is still time.
_LOOK_S = 0.05
#: Seconds for which one that is overtaken by another process lets that one build.
REST_S = 0.25

# ---------------------------------------------------------------- declaring


def declare(
    database: Core,
    name: str,
    wanted: Sequence[Index] | None,
    unique: Sequence[Index] | None = None,
) -> bool:
    """Make ``wanted`` the indexes of collection ``name`` (None: leave those that are there): new
    ones are to be built, others are to be emptied. Whether there is something to do. Raises what a
    commit does.

    With ``unique`` these are unique beside them, and nothing else is. Without, what is unique on
    a server stays so: a program there does not end that by leaving it out."""
    for index in (*(wanted or ()), *(unique or ())):
        if index.key is not None:
            database.index_functions[function_name(index.key)] = index.key
    with database.view() as view:
        info = view.catalogue.by_name.get(name)
        there = () if info is None else info.indexes
        due = _definitions(database.role, there, wanted, unique)
        if set(map(_meaning, there)) == set(due):
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
            there = writer.collection(name).indexes
            _declare(writer, name, _definitions(database.role, there, wanted, unique))
    finally:
        database._format_lock.release()
    return True


def declare_all(
    database: Core,
    given: Mapping[str, tuple[Sequence[Index] | None, Sequence[Index] | None]],
) -> bool:
    """``declare`` for several collections; whether something is to be built. What was declared
    stays, whatever the next one raises."""
    to_do = [declare(database, name, *lists) for name, lists in given.items()]
    return any(to_do)


#: Fields, whether of each member, the name of the function, and whether it is unique.
_Definition = tuple[tuple[tuple[str, ...], ...], bool, str | None, bool]


def _meaning(index: IndexInfo) -> _Definition:
    return index.fields, index.each, index.key, index.unique


def _definitions(
    role: Role,
    there: Sequence[IndexInfo],
    wanted: Sequence[Index] | None,
    unique: Sequence[Index] | None,
) -> dict[_Definition, None]:
    """What the indexes of a collection are to be, in order; see ``declare``."""
    if wanted is None:
        found = [_meaning(index) for index in there if unique is None or not index.unique]
    else:
        found = [(*meaning_of(index), index.unique) for index in wanted]
    if unique is not None:
        found += [(*meaning_of(index), True) for index in unique]
    elif role is Role.SERVER:
        found += [_meaning(index) for index in there if index.unique]
    flags: dict[Meaning, bool] = {}
    for fields, each, key, flag in found:
        flags[fields, each, key] = flag or flags.get((fields, each, key), False)
    return {(*meaning, flag): None for meaning, flag in flags.items()}


def _declare(writer: Writer, name: str, wanted: Iterable[_Definition]) -> None:
    info = writer.collection(name)
    catalogue = writer.catalogue
    indexes = catalogue.indexes
    left = {_meaning(index)[:3]: index for index in indexes.of(info.number)}
    # A table without a row has all of them in it.
    built = () if writer.table_rows(info.table, 1) else (info.table,)
    mine, following = [], indexes.next
    for fields, each, key, unique in wanted:
        known = left.pop((fields, each, key), None)
        if known is None:
            since = catalogue.next_table
            known = IndexInfo(following, info.number, fields, each, key, since, built)
            following += 1
        elif known.paused:
            known = replace(known, since=catalogue.next_table, built=built, paused=False)
        mine.append(known if known.unique is unique else replace(known, unique=unique))
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


def build_step(
    database: Core,
    rows: int | None = None,
    *,
    places: int | None = None,
    is_ended: Callable[[], bool] = lambda: False,
) -> bool:
    """One commit of what is to be built, or emptied, which takes a few milliseconds
    (``index_pace``); whether there may be more. It writes so many ``places`` of a run
    (``index_run``), or with ``rows`` looks at so many entities within the commit. What it prepares
    is cut short once it ``is_ended``. Waits for another thread's step, unless it is ended by then;
    where another process builds the same index, it writes nothing, and waits for a moment."""
    while not database.index_lock.acquire(timeout=_LOOK_S):
        if is_ended():
            return True
    try:
        return _build_step(database, rows, places, is_ended)
    except _OvertakenError:
        database.index_run = None
    finally:
        database.index_lock.release()
    _rest(is_ended)
    return True


def build_on(database: Core, is_ended: Callable[[], bool] = lambda: False) -> bool:
    """``build_step`` of the one process that builds: in the others it waits for a moment. Who does
    not call it any more before it is False, or has raised, gives ``index_right`` back."""
    right = database.index_right
    with database.view() as view:
        if not _buildable(database, view) and not view.catalogue.indexes.dropped:
            database.index_run = None
            right.give_back()
            return False
    try:
        mine = right.take(0)
    except StorageError:
        mine = True  # such as where no file can be made; two that build are slower, and no more
    if not mine:
        _rest(is_ended)
        return True
    more = False
    try:
        more = build_step(database, is_ended=is_ended)
    finally:
        if not more:
            right.give_back()
    return more


def _rest(is_ended: Callable[[], bool]) -> None:
    until = time.monotonic() + REST_S
    while time.monotonic() < until and not is_ended():
        time.sleep(_LOOK_S)


class _OvertakenError(Exception):
    """Somebody else has carried on the build that a run is for."""


def _build_step(
    database: Core, rows: int | None, places: int | None, is_ended: Callable[[], bool]
) -> bool:
    paces = database.index_paces
    pace, done = paces.dropped, 0
    with database.view() as view:
        due = _buildable(database, view)
        if not due:
            database.index_run = None
            if not view.catalogue.indexes.dropped:
                return False
        run = _run_for(database, view, *due[0]) if due and rows is None else None
    while run is not None and not run.is_read:
        with database.view() as view:
            run.read(view, is_ended)
    if run is not None and not run.is_void:
        run.make_ready(places or paces.places.count)
    with database.write("local") as writer:
        began = database.clock.monotonic()
        chosen = _buildable(database, writer)
        if chosen and run is not None and run.goes_on(writer, *chosen[0][:2], LEARNT_MAX):
            pace = paces.places
            done, is_last = run.write(writer, places or pace.count)
            if is_last:
                _come_to(writer, *chosen[0][:2], run.last, run.counted)
        elif chosen:
            if run is not None and run.is_overtaken(*chosen[0][:2]):
                raise _OvertakenError
            if (last := database.index_run) is not None:
                last.is_void = True
            run, pace = None, paces.rows
            done = _build(writer, *chosen[0], rows or pace.count)
        elif writer.catalogue.indexes.dropped:
            run, pace = None, paces.dropped
            done = _empty(writer, writer.catalogue.indexes, pace.count)
    pace.took(done, database.clock.monotonic() - began)
    if run is not None:
        run.wrote()
    return True


def _run_for(
    database: Core, view: Writer, info: CollectionInfo, index: IndexInfo, make: MakePlaces
) -> IndexRun:
    """The run that goes on, or a new one, which is to be read: longer than the last if that came to
    its end, and shorter if it could not, because what is prepared for nothing is work."""
    run, rows = database.index_run, FIRST_ROWS
    if run is not None:
        if run.goes_on(view, info, index):
            return run
        if run.is_overtaken(info, index):
            raise _OvertakenError
        if run.is_void:
            rows = max(ROWS_MIN, run.rows // 4)
        elif run.is_over:
            rows = min(ROWS_MAX, LONGER * run.rows)
    database.index_run = run = IndexRun(view, info, index, make, rows)
    return run


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
) -> int:
    prefix, table = index_prefix(index.number, info.table), info.table
    after = index.after if index.table == table else b""
    page = writer.table_rows(table, rows, after)
    counted = 0
    for entity_id, row in page:
        found = () if row.payload is None else places(cbor.decode_trusted(row.payload))
        for fields in found:
            writer.put(prefix + fields + entity_id, b"")
        counted += bool(found)
    _come_to(writer, info, index, None if len(page) < rows else page[-1][0], counted)
    return len(page)


def _come_to(
    writer: Writer, info: CollectionInfo, index: IndexInfo, last: bytes | None, counted: int
) -> None:
    """All up to the id ``last`` are in the index, ``counted`` more than before; None: all."""
    table = info.table
    key = index_count_key(index.number, table)
    raw = writer.get(key) if index.table == table else None
    writer.put(key, pack_u64((0 if raw is None else unpack_u64(raw)) + counted))
    if last is None:
        index = replace(index, built=(table,), table=0, after=b"")
    else:
        index = replace(index, table=table, after=last)
    catalogue = writer.catalogue
    writer.set_catalogue(catalogue.with_indexes(catalogue.indexes.replacing(index)))


def _empty(writer: Writer, indexes: IndexSet, count: int) -> int:
    number, emptied = indexes.dropped[0], 0
    for kind in (INDEX, INDEX_COUNT):
        prefix = index_prefix(number, 0)[1:5]
        keys = writer.snapshot.scan_keys(kind + prefix, end_of(kind + prefix), limit=count)
        writer.delete_many(keys)
        emptied += len(keys)
        if len(keys) == count:
            return emptied
    left = replace(indexes, dropped=indexes.dropped[1:])
    if not left.each and not left.dropped:
        # An older EntiDB may have it again.
        left = NO_INDEXES
        writer.put(META_FORMAT, encode_format(FORMAT_PLAIN))
    writer.set_catalogue(writer.catalogue.with_indexes(left))
    return emptied


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


__all__ = [
    "IndexStatus",
    "build_on",
    "build_step",
    "declare",
    "declare_all",
    "rebuild",
    "statuses",
]
