"""Which collections a database has, in which tables their entities are, and which of them
synchronise.

A catalogue that was stored is immutable; a commit that changes it stores another. Readers use the
one of their own snapshot, because a publication (R20) moves collections to other tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from entidb import cbor
from entidb.db.records import table_prefix, unreadable
from entidb.errors import CborDecodeError, CorruptionError, ScopeError
from entidb.types import COLLECTIONS_MAX

#: What a server can make a device take, beside what the device has of its own.
_PULLED_MAX = 4 * COLLECTIONS_MAX


class IndexInfo(Struct, frozen=True):
    """One index of a collection: by which ``fields``, with one place for ``each`` member of a list,
    by what the function called ``key`` makes of them.

    A table has all of its entities in it if it was begun with the index there already (its number
    is ``since`` or more), or is in ``built``. In ``table`` it is being built, up to and with the id
    ``after``. It is ``paused`` once a program has written that does not have the function.
    ``unique`` says that no two entities may have the same place in it.
    """

    number: int
    collection: int
    fields: tuple[tuple[str, ...], ...]
    each: bool
    key: str | None
    since: int
    built: tuple[int, ...] = ()
    table: int = 0
    after: bytes = b""
    paused: bool = False
    unique: bool = False

    def has(self, table: int) -> bool:
        """Whether all entities of ``table`` are in it."""
        return not self.paused and (table >= self.since or table in self.built)

    def __str__(self) -> str:
        names = ", ".join(".".join(path) for path in self.fields)
        how = (" each" if self.each else "") + (f" by {self.key}" if self.key else "")
        return names + how + (" unique" if self.unique else "")


class IndexSet(Struct, frozen=True):
    """The indexes of a database; those whose number is in ``dropped`` are being emptied. ``next``
    is the number of the next one."""

    each: tuple[IndexInfo, ...] = ()
    dropped: tuple[int, ...] = ()
    next: int = 1

    def of(self, collection: int) -> tuple[IndexInfo, ...]:
        return tuple([index for index in self.each if index.collection == collection])

    def replacing(self, *changed: IndexInfo) -> IndexSet:
        """With ``changed`` in the place of those that have their numbers."""
        by_number = {index.number: index for index in changed}
        return replace(self, each=tuple(by_number.get(i.number, i) for i in self.each))


NO_INDEXES: Final = IndexSet()


class CollectionInfo(Struct, frozen=True):
    """``prefix`` starts the keys of its entities; ``synced`` says it is in the scope (R31)."""

    number: int
    name: str
    table: int
    local: bool
    synced: bool
    prefix: bytes
    indexes: tuple[IndexInfo, ...] = ()

    def standing_in(self, table: int) -> CollectionInfo:
        """The same collection with its entities in ``table``."""
        return replace(self, table=table, prefix=table_prefix(table))


class _ByNumber(dict[int, CollectionInfo]):
    """Numbers come from other records, which were written with the catalogue that knows them."""

    def __missing__(self, number: int) -> CollectionInfo:
        raise CorruptionError(
            f"a record names collection number {number}, and the catalogue has no such collection: "
            "the file is damaged; run verify, and restore a backup"
        )


class Catalogue:
    """Collections by name and by number, the newest of which is ``last_number``. ``scope`` None
    means all that are not local; ``garbage`` lists (table, collection) pairs that were replaced
    and wait to be emptied."""

    __slots__ = ("by_name", "by_number", "garbage", "indexes", "last_number", "next_table", "scope")

    def __init__(
        self,
        collections: list[tuple[int, str, int, bool]],
        next_table: int,
        scope: frozenset[str] | None,
        garbage: tuple[tuple[int, int], ...],
        indexes: IndexSet = NO_INDEXES,
    ) -> None:
        self.scope = scope
        self.indexes = indexes
        self.next_table = next_table
        self.garbage = garbage
        self.by_name: dict[str, CollectionInfo] = {}
        self.by_number: dict[int, CollectionInfo] = _ByNumber()
        for number, name, table, local in collections:
            synced = not local and (scope is None or name in scope)
            mine = indexes.of(number)
            info = CollectionInfo(number, name, table, local, synced, table_prefix(table), mine)
            self.by_name[name] = self.by_number[number] = info
        self.last_number = max(self.by_number, default=0)

    def encode(self) -> bytes:
        record = {
            "collections": [
                [info.number, info.name, info.table, info.local] for info in self.by_name.values()
            ],
            "next_table": self.next_table,
            "scope": None if self.scope is None else sorted(self.scope),
            "garbage": [list(pair) for pair in self.garbage],
        }
        if self.indexes != NO_INDEXES:
            record["indexes"] = _listed(asdict(self.indexes))
        return cbor.encode_message(record)

    def adding(self, name: str, *, local: bool = False) -> Catalogue:
        """With a new, empty collection. Raises ``ScopeError`` when there are too many."""
        made = self.copy()
        made.add(name, local=local)
        return made

    def copy(self) -> Catalogue:
        """A catalogue that nothing else reads yet, for ``add``."""
        made = Catalogue([], self.next_table, self.scope, self.garbage, self.indexes)
        made.by_name, made.by_number = dict(self.by_name), _ByNumber(self.by_number)
        made.last_number = self.last_number
        return made

    def add(self, name: str, *, local: bool = False) -> CollectionInfo:
        """A new, empty collection in this very catalogue, which must be a ``copy`` that is not
        stored yet. Raises ``ScopeError`` when there are too many."""
        synced = not local and (self.scope is None or name in self.scope)
        if not self.room(synced=synced):
            raise ScopeError(
                f"collection {name!r} does not fit: a database holds at most {COLLECTIONS_MAX} "
                f"collections that {'synchronise' if synced else 'are local'}. Use a field of the "
                "entity instead.",
                code="too_many_collections",
            )
        number = self.last_number + 1
        table = self.next_table
        info = CollectionInfo(number, name, table, local, synced, table_prefix(table))
        self.by_name[name] = self.by_number[number] = info
        self.next_table, self.last_number = table + 1, number
        return info

    def room(self, *, synced: bool) -> int:
        """How many more collections fit. Local ones do not count against those that synchronise,
        nor the other way round."""
        if len(self.by_name) < COLLECTIONS_MAX:
            return COLLECTIONS_MAX - len(self.by_name)
        there = sum(info.synced is synced for info in self.by_name.values())
        return max(0, COLLECTIONS_MAX - there)

    def adding_all(self, names: Iterable[str], *, pulled: bool = False) -> Catalogue:
        """With those of ``names`` that are missing and fit, in one step. Itself if none is
        missing. What is ``pulled`` fits: the server has counted it, and what this device has of
        its own must not keep it out."""
        missing = [name for name in names if name not in self.by_name]
        if not missing:
            return self
        rows, last = self._rows(), self.last_number
        room = max(0, _PULLED_MAX - len(rows)) if pulled else self.room(synced=True)
        fitting = missing[:room]
        for index, name in enumerate(fitting):
            rows.append((last + 1 + index, name, self.next_table + index, False))
        return self._with(rows, next_table=self.next_table + len(fitting))

    def in_scope(self, name: str) -> bool:
        """Whether the collection synchronises, or would if there were one of that name."""
        info = self.by_name.get(name)
        if info is not None:
            return info.synced
        return self.scope is None or name in self.scope

    def with_scope(self, scope: frozenset[str] | None) -> Catalogue:
        return Catalogue(self._rows(), self.next_table, scope, self.garbage, self.indexes)

    def with_indexes(self, indexes: IndexSet) -> Catalogue:
        return Catalogue(self._rows(), self.next_table, self.scope, self.garbage, indexes)

    def with_local(self, name: str, local: bool) -> Catalogue:
        rows = [(n, x, t, local if x == name else was) for n, x, t, was in self._rows()]
        return self._with(rows)

    def allocating(self) -> tuple[int, Catalogue]:
        """A fresh table number."""
        return self.next_table, self._beside(self.next_table + 1, self.garbage)

    def moving(self, tables: dict[int, int], empty: Set[int]) -> Catalogue:
        """With collections (by number) standing in new tables; the old ones become garbage, but
        for those that are ``empty``."""
        moved = [(n, x, tables.get(n, t), local) for n, x, t, local in self._rows()]
        left = ((self.by_number[number].table, number) for number in tables)
        old = tuple(pair for pair in left if pair[0] not in empty)
        return self._with(moved, garbage=self.garbage + old)

    def discarding(self, table: int, number: int) -> Catalogue:
        """With a table that nothing will use (an abandoned stage) put with the garbage."""
        return self._beside(self.next_table, (*self.garbage, (table, number)))

    def swept(self, table: int) -> Catalogue:
        left = tuple(pair for pair in self.garbage if pair[0] != table)
        return self._beside(self.next_table, left)

    def _beside(self, next_table: int, garbage: tuple[tuple[int, int], ...]) -> Catalogue:
        """The same collections, shared and not built again: there may be a thousand."""
        made = Catalogue([], next_table, self.scope, garbage, self.indexes)
        made.by_name, made.by_number = self.by_name, self.by_number
        made.last_number = self.last_number
        return made

    def _with(
        self,
        rows: list[tuple[int, str, int, bool]],
        *,
        next_table: int | None = None,
        garbage: tuple[tuple[int, int], ...] | None = None,
    ) -> Catalogue:
        return Catalogue(
            rows,
            self.next_table if next_table is None else next_table,
            self.scope,
            self.garbage if garbage is None else garbage,
            self.indexes,
        )

    def _rows(self) -> list[tuple[int, str, int, bool]]:
        return [(i.number, i.name, i.table, i.local) for i in self.by_name.values()]


def _listed(value: Any) -> Any:
    """``value`` with lists and maps for tuples and structs, as a record is stored."""
    if isinstance(value, Struct):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: _listed(member) for name, member in value.items()}
    return list(map(_listed, value)) if isinstance(value, tuple) else value


def decode_catalogue(raw: bytes) -> Catalogue:
    try:
        record: dict[str, Any] = cbor.decode_trusted(raw)
        scope = record["scope"]
        return Catalogue(
            [(n, x, t, local) for n, x, t, local in record["collections"]],
            record["next_table"],
            None if scope is None else frozenset(scope),
            tuple((t, n) for t, n in record["garbage"]),
            # Not strict: before 0.16, a program could declare ``each=1``, which was written so.
            msgspec.convert(record["indexes"], IndexSet, strict=False)
            if "indexes" in record
            else NO_INDEXES,
        )
    except (CborDecodeError, KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise unreadable("the catalogue", raw) from error


def empty_catalogue(scope: frozenset[str] | None = None) -> Catalogue:
    return Catalogue([], 1, scope, ())


__all__ = ["COLLECTIONS_MAX", "Catalogue", "CollectionInfo", "decode_catalogue", "empty_catalogue"]
