"""Reading entities: the view of one storage snapshot, with or without a transaction on top.

Speaks of collections by name and of entities by their 16 bytes; values are still payloads here.
``collection`` puts mappings of Python values over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from entidb.db.catalogue import Catalogue, IndexInfo
from entidb.db.index_keys import Span, index_count_key, index_prefix
from entidb.db.records import (
    DIRTY,
    ENTITY_HEAD,
    PENDING_HEAD,
    TOMBSTONE,
    EntityRow,
    count_key,
    decode_entity,
    end_of,
    payload_of,
    unpack_u64,
    unreadable,
)
from entidb.storage import Snapshot
from entidb.storage.picking import picking
from entidb.types import ID_BYTES

#: More entities than any disk has room for.
_COUNT_MAX = 2**48

#: Entities read at a time while iterating: large enough to be fast, small enough to stay bounded.
PAGE_ROWS = 512
#: At first fewer: many want no more than the first few.
_PAGE_ROWS_FIRST = 32

#: And places of an index.
_PLACES_MAX = 2048

Pair = tuple[bytes, bytes]


def ids_of(keys: Iterable[bytes]) -> list[bytes]:
    """Of keys of entities, their ids."""
    return [key[-ID_BYTES:] for key in keys]


def entities_of(page: Sequence[Pair]) -> list[Pair]:
    """(id, payload) of rows of entities with their keys; tombstones are left out."""
    try:
        # As ``payload_of``, which would cost as much again for calling it.
        return [
            (key[5:], raw[PENDING_HEAD if raw[0] & DIRTY else ENTITY_HEAD :])
            for key, raw in page
            if not raw[0] & TOMBSTONE
        ]
    except IndexError as error:
        raise unreadable("an entity", b"") from error


R_co = TypeVar("R_co", bound="Rows", covariant=True)


class Stops(Protocol):
    """What says of rows that lie one after another which may be wanted: ``sieve.Sieve``."""

    def through(self, rows: Sequence[bytes]) -> Sequence[int]:
        """The places of those."""
        ...


class Rows(Protocol):
    """One unchanging view of the entities."""

    def get(self, name: str, entity_id: bytes) -> bytes | None: ...

    def get_many(self, name: str, ids: Sequence[bytes]) -> list[bytes | None]: ...

    def row(self, name: str, entity_id: bytes) -> EntityRow | None:
        """The stored row, a tombstone included."""
        ...

    def pairs(self, name: str, start: bytes, stop: bytes | None, reverse: bool) -> Iterator[Pair]:
        """(id, payload) with start <= id < stop (None: to the end), in id order."""
        ...

    def pages(
        self, name: str, start: bytes, stop: bytes | None, reverse: bool
    ) -> Iterator[list[Pair]]:
        """As ``pairs``, some at a time, as they are read: at first few."""
        ...

    def holding(self, name: str, start: bytes, sieve: Stops) -> Iterator[Pair]:
        """As ``pairs`` from ``start``, in the order of ids, without those that ``sieve`` stops; it
        need not stop all that it could."""
        ...

    def count(self, name: str) -> int: ...

    def indexes(self, name: str) -> tuple[IndexInfo, ...]:
        """Those of a collection that have all of its entities."""
        ...

    def unready_indexes(self, name: str) -> tuple[IndexInfo, ...]:
        """Those that have not: they are being built, or wait for a program with their function."""
        ...

    def places(
        self, name: str, index: IndexInfo, span: Span, backwards: bool, limit: int
    ) -> Iterator[list[bytes]]:
        """Fields and id of each place of the index in ``span``, in order or against it: ``limit``
        of them, and then more at a time."""
        ...

    def index_count(self, name: str, index: IndexInfo) -> int:
        """How many entities are in it."""
        ...

    def own(self, name: str) -> Mapping[bytes, bytes | None]:
        """What a transaction wrote to the collection, which no index knows of yet."""
        ...


class SnapshotRows(Struct, eq=False):
    """The entities of a storage snapshot, read with the catalogue of that same snapshot."""

    snapshot: Snapshot
    catalogue: Catalogue

    def get(self, name: str, entity_id: bytes) -> bytes | None:
        info = self.catalogue.by_name.get(name)
        if info is None:
            return None
        raw = self.snapshot.get(info.prefix + entity_id)
        return None if raw is None else payload_of(raw)

    def row(self, name: str, entity_id: bytes) -> EntityRow | None:
        info = self.catalogue.by_name.get(name)
        raw = None if info is None else self.snapshot.get(info.prefix + entity_id)
        return None if raw is None else decode_entity(raw)

    def get_many(self, name: str, ids: Sequence[bytes]) -> list[bytes | None]:
        info = self.catalogue.by_name.get(name)
        if info is None:
            return [None] * len(ids)
        prefix = info.prefix
        found = self.snapshot.get_many([prefix + entity_id for entity_id in ids])
        try:
            # As in ``entities_of``.
            return [
                None
                if raw is None or raw[0] & TOMBSTONE
                else raw[PENDING_HEAD if raw[0] & DIRTY else ENTITY_HEAD :]
                for raw in found
            ]
        except IndexError as error:
            raise unreadable("an entity", b"") from error

    def pairs(self, name: str, start: bytes, stop: bytes | None, reverse: bool) -> Iterator[Pair]:
        return chain.from_iterable(self.pages(name, start, stop, reverse))

    def pages(
        self, name: str, start: bytes, stop: bytes | None, reverse: bool
    ) -> Iterator[list[Pair]]:
        info = self.catalogue.by_name.get(name)
        if info is None:
            return
        low = info.prefix + start
        high = end_of(info.prefix) if stop is None else info.prefix + stop
        rows = _PAGE_ROWS_FIRST
        while True:
            page = self.snapshot.scan(low, high, limit=rows, reverse=reverse)
            yield entities_of(page)
            if len(page) < rows:
                return
            if reverse:
                high = page[-1][0]
            else:
                low = page[-1][0] + b"\0"
            rows = min(4 * rows, PAGE_ROWS)

    def holding(self, name: str, start: bytes, sieve: Stops) -> Iterator[Pair]:
        info = self.catalogue.by_name.get(name)
        if info is None:
            return
        low, high = info.prefix + start, end_of(info.prefix)
        pick = picking(self.snapshot)
        while True:
            found, last = pick(low, high, PAGE_ROWS, sieve.through)
            for key, raw in found:
                payload = payload_of(raw)
                if payload is not None:
                    yield key[5:], payload
            if last is None:
                return
            low = last + b"\0"

    def count(self, name: str) -> int:
        info = self.catalogue.by_name.get(name)
        raw = None if info is None else self.snapshot.get(count_key(info.number))
        number = 0 if raw is None else unpack_u64(raw)
        if number > _COUNT_MAX:
            raise unreadable("a count of entities", raw or b"")
        return number

    def indexes(self, name: str) -> tuple[IndexInfo, ...]:
        info = self.catalogue.by_name.get(name)
        if info is None or not info.indexes:
            return ()
        return tuple([index for index in info.indexes if index.has(info.table)])

    def unready_indexes(self, name: str) -> tuple[IndexInfo, ...]:
        info = self.catalogue.by_name.get(name)
        if info is None or not info.indexes:
            return ()
        return tuple([index for index in info.indexes if not index.has(info.table)])

    def places(
        self, name: str, index: IndexInfo, span: Span, backwards: bool, limit: int
    ) -> Iterator[list[bytes]]:
        prefix = index_prefix(index.number, self.catalogue.by_name[name].table)
        low = prefix + span[0]
        high = end_of(prefix) if span[1] is None else prefix + span[1]
        cut = len(prefix)
        while low < high:
            keys = self.snapshot.scan_keys(low, high, limit=limit, reverse=backwards)
            if keys:
                yield [key[cut:] for key in keys]
            if len(keys) < limit:
                return
            if backwards:
                high = keys[-1]
            else:
                low = keys[-1] + b"\0"
            limit = min(4 * limit, max(limit, _PLACES_MAX))

    def index_count(self, name: str, index: IndexInfo) -> int:
        table = self.catalogue.by_name[name].table
        raw = self.snapshot.get(index_count_key(index.number, table))
        return 0 if raw is None else unpack_u64(raw)

    def own(self, name: str) -> Mapping[bytes, bytes | None]:
        return {}


class LentRows(Generic[R_co]):
    """Rows that somebody else has opened and closes; a class because one is made for every ``get``
    inside a transaction."""

    __slots__ = ("_rows",)

    def __init__(self, rows: R_co) -> None:
        self._rows = rows

    def __enter__(self) -> R_co:
        return self._rows

    def __exit__(self, *exc: object) -> None:
        return None


class OverlayRows:
    """A view with a transaction's own uncommitted writes on top; ``writes`` maps collection name
    and id to the payload or None for deleted."""

    __slots__ = ("below", "writes")

    def __init__(self, below: Rows, writes: dict[str, dict[bytes, bytes | None]]) -> None:
        self.below = below
        self.writes = writes

    def get(self, name: str, entity_id: bytes) -> bytes | None:
        mine = self.writes.get(name)
        if mine is not None and entity_id in mine:
            return mine[entity_id]
        return self.below.get(name, entity_id)

    def row(self, name: str, entity_id: bytes) -> EntityRow | None:
        """As it is stored: what this transaction wrote has no version and no time yet. None for
        what it deletes."""
        mine = self.writes.get(name)
        if mine is not None and entity_id in mine and mine[entity_id] is None:
            return None
        return self.below.row(name, entity_id)

    def get_many(self, name: str, ids: Sequence[bytes]) -> list[bytes | None]:
        found = self.below.get_many(name, ids)
        mine = self.writes.get(name)
        if mine:
            for index, entity_id in enumerate(ids):
                if entity_id in mine:
                    found[index] = mine[entity_id]
        return found

    def pairs(self, name: str, start: bytes, stop: bytes | None, reverse: bool) -> Iterator[Pair]:
        below = self.below.pairs(name, start, stop, reverse)
        return self._with_own(below, name, start, stop, reverse)

    def pages(
        self, name: str, start: bytes, stop: bytes | None, reverse: bool
    ) -> Iterator[list[Pair]]:
        if not self.writes.get(name):
            return self.below.pages(name, start, stop, reverse)
        return _cut(self.pairs(name, start, stop, reverse))

    def _with_own(
        self, below: Iterator[Pair], name: str, start: bytes, stop: bytes | None, reverse: bool
    ) -> Iterator[Pair]:
        mine = self.writes.get(name)
        if not mine:
            return below
        chosen = [
            (entity_id, payload)
            for entity_id, payload in mine.items()
            if start <= entity_id and (stop is None or entity_id < stop)
        ]
        chosen.sort(key=lambda pair: pair[0], reverse=reverse)
        return _merge(below, chosen, reverse)

    def holding(self, name: str, start: bytes, sieve: Stops) -> Iterator[Pair]:
        return self._with_own(self.below.holding(name, start, sieve), name, start, None, False)

    def count(self, name: str) -> int:
        count = self.below.count(name)
        mine = self.writes.get(name)
        if not mine:
            return count
        before = self.below.get_many(name, list(mine))
        return count + sum(
            (now is not None) - (was is not None)
            for now, was in zip(mine.values(), before, strict=True)
        )

    def indexes(self, name: str) -> tuple[IndexInfo, ...]:
        return self.below.indexes(name)

    def unready_indexes(self, name: str) -> tuple[IndexInfo, ...]:
        return self.below.unready_indexes(name)

    def places(
        self, name: str, index: IndexInfo, span: Span, backwards: bool, limit: int
    ) -> Iterator[list[bytes]]:
        return self.below.places(name, index, span, backwards, limit)

    def index_count(self, name: str, index: IndexInfo) -> int:
        return self.below.index_count(name, index)

    def own(self, name: str) -> Mapping[bytes, bytes | None]:
        mine, before = self.writes.get(name, {}), self.below.own(name)
        return {**before, **mine} if before else mine


def _merge(
    below: Iterator[Pair], mine: list[tuple[bytes, bytes | None]], reverse: bool
) -> Iterator[Pair]:
    """Two sorted streams as one; ``mine`` wins where both have an id, None hides it."""
    at = 0
    for entity_id, payload in below:
        while at < len(mine) and (mine[at][0] > entity_id if reverse else mine[at][0] < entity_id):
            own = mine[at][1]
            if own is not None:
                yield mine[at][0], own
            at += 1
        if at < len(mine) and mine[at][0] == entity_id:
            continue
        yield entity_id, payload
    for own_id, own in mine[at:]:
        if own is not None:
            yield own_id, own


def _cut(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    rows = _PAGE_ROWS_FIRST
    while page := list(islice(pairs, rows)):
        yield page
        rows = min(4 * rows, PAGE_ROWS)
