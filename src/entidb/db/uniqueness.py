"""Fields that no two entities of a collection may share: who has a value already.

An index that is ``unique`` says which fields. Looked at is what would be visible if a transaction
were committed, whole: what it deletes frees its values, and two of its own entities may exchange
theirs. Missing fields and None are no values. Where a server decides on a push, and where a
program commits, the same question is asked here, of the commit that is being put together, so
that what was decided earlier in it counts.

An entity that has its value already keeps it: what was there before the index was declared unique
is no reason to refuse a change of something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from msgspec import Struct

from entidb import cbor
from entidb.db.catalogue import CollectionInfo, IndexInfo
from entidb.db.index_keys import INDEXED_BYTES_MAX, index_prefix
from entidb.db.indexing import Indexing
from entidb.db.looking import MISSING, Function, applied, field_of
from entidb.db.records import end_of, payload_of
from entidb.db.sort_keys import sort_key
from entidb.db.writer import Writer
from entidb.errors import NotUniqueError, TransactionError
from entidb.types import ID_BYTES, uuid_from_bytes

#: (collection, id, payload or None for a deletion)
Write = tuple[CollectionInfo, bytes, bytes | None]
#: Places of an index read at a time: mostly there is none, or one.
_PLACES = 16


class Taken(Struct, frozen=True):
    """The entity ``entity_id`` of ``collection`` cannot have its fields of ``index``: ``holder``
    has the same."""

    collection: CollectionInfo
    index: IndexInfo
    entity_id: bytes
    holder: bytes

    @property
    def fields(self) -> str:
        """Which fields, in words."""
        return " and ".join(repr(".".join(path)) for path in self.index.fields)

    @property
    def has(self) -> str:
        """The verb behind ``fields``."""
        return "has" if len(self.index.fields) == 1 else "together have"


def unready(writer: Writer) -> dict[str, IndexInfo]:
    """Collections with an index that is unique and cannot be asked yet, because it is being
    built."""
    infos = writer.catalogue.by_number
    return {
        infos[index.collection].name: index
        for index in writer.catalogue.indexes.each
        if index.unique and not index.has(infos[index.collection].table)
    }


def has_unique(info: CollectionInfo) -> bool:
    return any(index.unique for index in info.indexes)


def first_taken(writer: Writer, writes: Sequence[Write]) -> Taken | None:
    """The first of ``writes``, a transaction, that would have what another entity has; None if all
    of them may be. Of an index that is being built nothing is known."""
    watcher = writer.watcher
    if not isinstance(watcher, Indexing):
        return None
    for info in {info.number: info for info, _, _ in writes}.values():
        for index in info.indexes:
            if index.unique and index.has(info.table):
                mine = [(i, payload) for at, i, payload in writes if at.number == info.number]
                taken = _taken_in(writer, watcher, info, index, mine)
                if taken is not None:
                    return taken
    return None


def _taken_in(
    writer: Writer,
    indexing: Indexing,
    info: CollectionInfo,
    index: IndexInfo,
    writes: Sequence[tuple[bytes, bytes | None]],
) -> Taken | None:
    function = None
    if index.key is not None:
        function = indexing.functions.get(index.key)
        if function is None:
            return None  # this commit pauses the index, for want of its function
    key_of = _key_in(index.fields, function)
    ids = {entity_id for entity_id, _ in writes}
    kept: dict[bytes, bytes] = {}
    taken: list[tuple[bytes, bytes]] = []
    for entity_id, payload in writes:
        key = key_of(payload)
        if key is None:
            continue
        if key == key_of(_stored(writer, info, entity_id)):
            kept[key] = entity_id
        else:
            taken.append((key, entity_id))
    for key, entity_id in taken:
        holder = kept.setdefault(key, entity_id)
        if holder == entity_id:
            found = (
                one
                for one in _holders(writer, indexing.moved, info, index, key)
                # A place that is cut is that of other values too.
                if one not in ids
                and (len(key) < INDEXED_BYTES_MAX or key_of(_stored(writer, info, one)) == key)
            )
            holder = next(found, entity_id)
        if holder != entity_id:
            return Taken(info, index, entity_id, holder)
    return None


def _holders(
    writer: Writer,
    moved: Mapping[bytes, Mapping[bytes, bool]],
    info: CollectionInfo,
    index: IndexInfo,
    key: bytes,
) -> Iterator[bytes]:
    """The entities at a place, as it is in this commit by now."""
    place = index_prefix(index.number, info.table) + key[:INDEXED_BYTES_MAX]
    changed = moved.get(place, {})
    yield from (entity_id for entity_id, there in changed.items() if there)
    start, stop = place, end_of(place)
    while keys := writer.snapshot.scan_keys(start, stop, limit=_PLACES):
        for one in keys:
            if len(one) == len(place) + ID_BYTES and one[-ID_BYTES:] not in changed:
                yield one[-ID_BYTES:]
        start = keys[-1] + b"\0"


def _stored(writer: Writer, info: CollectionInfo, entity_id: bytes) -> bytes | None:
    raw = writer.get(info.prefix + entity_id)
    return None if raw is None else payload_of(raw)


@lru_cache(maxsize=256)
def _key_in(
    fields: tuple[tuple[str, ...], ...], function: Function | None
) -> Callable[[bytes | None], bytes | None]:
    """What makes of a payload the whole key of its fields; None where one of them is no value."""

    def key_of(payload: bytes | None) -> bytes | None:
        if payload is None:
            return None
        value, parts = cbor.decode_trusted(payload), []
        for path in fields:
            found: Any = field_of(value, path)
            if function is not None and found is not MISSING:
                found = applied(function, found)
            if found is MISSING or found is None:
                return None
            parts.append(sort_key(found))
        return b"".join(parts)

    return key_of


# ---------------------------------------------------------------- programs


def refuse_taken(
    writer: Writer, writes: Mapping[str, Mapping[bytes, bytes | None]], *, decides: bool
) -> None:
    """Raises ``NotUniqueError`` for a transaction of a program that would have what another entity
    has; nothing was written. With ``decides`` what cannot be told yet is refused as well: the
    index is being built, and ``TransactionError`` (``busy``) says so."""
    infos = {name: writer.catalogue.by_name.get(name) for name in writes}
    asked = {name: info for name, info in infos.items() if info is not None and has_unique(info)}
    if not asked:
        return
    if decides and (building := set(unready(writer)) & set(asked)):
        raise TransactionError(
            f"the index that says what is unique in {min(building)!r} is being built; try again "
            "when it is ready (db.wait_for_indexes())",
            code="busy",
        )
    found = first_taken(
        writer, [(info, *write) for name, info in asked.items() for write in writes[name].items()]
    )
    if found is not None:
        name = found.collection.name
        raise NotUniqueError(
            f"entity {uuid_from_bytes(found.entity_id)} of {name!r} cannot be written: "
            f"{found.fields} {found.has} to be unique, and entity "
            f"{uuid_from_bytes(found.holder)} has the same. Nothing was written",
            collection=name,
            entity_id=uuid_from_bytes(found.entity_id),
            fields=tuple(".".join(path) for path in found.index.fields),
            holder=uuid_from_bytes(found.holder),
        )


__all__ = ["Taken", "Write", "first_taken", "has_unique", "refuse_taken", "unready"]
