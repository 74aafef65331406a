"""Queries: which entities of a collection, in which order, and how many of them.

A ``Query`` is a description; it reads when it is asked for something, each time from one snapshot
of its own, or inside the transaction or snapshot that its collection belongs to. It is never
changed: each method answers a new one. ``conditions`` says what a condition is.

An index is used where there is one that helps (``plans``). Without it a query looks at every
entity, and decodes as few as it can (``matching``).
"""

from __future__ import annotations

import sys
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Generic, Protocol, Self, TypeVar

from entidb import cbor
from entidb.db.catalogue import IndexInfo
from entidb.db.conditions import ALL, Condition, Field, all_of
from entidb.db.filters import from_dict
from entidb.db.index_reading import (
    count_by_index,
    ids_by_index,
    pairs_of,
    runs_by_index,
    serves,
)
from entidb.db.live import Live, Observe
from entidb.db.looking import Path, field_of, order_key
from entidb.db.lookup import entities_at, place_of
from entidb.db.matching import Plan, Tally, matching, shape_of
from entidb.db.notebook import ROWS_MAX, Explored, entities_table
from entidb.db.paging import End, Sorted, bookmark_of, end_of_bookmark, end_of_page, is_after, sort
from entidb.db.plain import ValueCodec
from entidb.db.plans import Chosen, Order, choose
from entidb.db.query_checks import check_fields, order_of
from entidb.db.rows import Pair, Rows
from entidb.db.scans import helping_index, warn_of_scan, why_unindexed
from entidb.db.sieve import Sieve
from entidb.errors import QueryError
from entidb.types import check_bool, repr_of, uuid_from_bytes

V = TypeVar("V")

#: Entities kept at most while the first few of an order are looked for, for each that is wanted.
_KEPT_FACTOR = 4
_KEPT_MIN = 1000


class Source(Protocol):
    """The collection a query reads from."""

    name: str

    @property
    def _codec(self) -> ValueCodec[Any]: ...

    @property
    def _open(self) -> Callable[[], AbstractContextManager[Rows]]: ...

    @property
    def _observe(self) -> Observe | None: ...

    def _pair(self, raw: bytes, payload: bytes) -> tuple[uuid.UUID, Any]: ...

    def _read(
        self, find: Callable[[int | None], Iterator[Pair]], limit: int | None = None
    ) -> Iterator[tuple[uuid.UUID, Any]]: ...

    def _read_values(
        self, find: Callable[[int | None], Iterator[Pair]], limit: int | None = None
    ) -> Iterator[Any]: ...


class Where(Generic[V]):
    """``where`` of a collection or a query: called with conditions, or given them as data."""

    __slots__ = ("_query",)

    def __init__(self, query: Query[V]) -> None:
        self._query = query

    def __call__(self, /, *conditions: Condition, **equal: Any) -> Query[V]:
        """Those that meet all of ``conditions``, and whose fields are ``equal``.

        Raises ``QueryError`` for a field that the collection's class does not have.
        """
        return self._query._and(all_of(conditions, equal))

    def from_dict(self, given: Mapping[str, Any]) -> Query[V]:
        """As the call, with conditions that come as data: ``{"kind": "tea", "price": {"<": 5}}``.

        A field inside a field is ``"address.city"``; ``"&"`` and ``"|"`` take a list of such
        maps, ``"~"`` one; a map is compared with ``{"==": {…}}``. Raises ``QueryError``.
        """
        return self._query._and(from_dict(given))


class Query(Explored, Generic[V]):
    """Entities of one collection, found when they are asked for.

    Iterating gives ``(id, value)`` as ``collection.items()`` does, in the order of ids unless
    ``order_by`` says another. ``values()`` and ``ids()`` give one half.
    """

    __slots__ = ("_after", "_condition", "_delete", "_limit", "_order", "_scan", "_source")

    def __init__(
        self,
        source: Source,
        condition: Condition = ALL,
        *,
        order: tuple[Order, ...] = (),
        limit: int | None = None,
        after: End | None = None,
        delete: Callable[[Query[V]], int] | None = None,
        scan: bool = True,
    ) -> None:
        self._source = source
        self._condition = condition
        self._order = order
        self._limit = limit
        self._after = after
        self._delete = delete
        self._scan = scan

    # ------------------------------------------------------------ narrowing

    @property
    def where(self) -> Where[V]:
        """Only those that meet more conditions too: ``query.where(F.price > 3, kind="tea")``."""
        return Where(self)

    def order_by(self, *fields: str | Field) -> Self:
        """Sorted by ``fields``: a name, with dots for fields inside fields and a minus before it
        for the largest first (``"-price"``), or ``F.price``.

        Missing comes before None, then false, true, numbers, text, bytes, lists and maps. Entities
        with equal fields come in the order of their ids, or against it after a descending field.
        Raises ``QueryError``.
        """
        if not fields:
            raise QueryError('order_by needs a field: order_by("price")')
        order = tuple(order_of(field) for field in fields)
        self._check_fields({one.path for one in order})
        if self._after is not None:
            raise QueryError("call order_by before after(): a page goes on in an order")
        return self._with(order=order)

    def limit(self, count: int) -> Self:
        """At most ``count`` of them. Raises ``QueryError``."""
        given: object = count
        if type(given) is not int or given < 0:
            raise QueryError(f"limit takes a number from 0, not {repr_of(given, 80)}")
        return self._with(limit=min(count, sys.maxsize))

    def after(self, last: tuple[uuid.UUID, V] | str | None) -> Self:
        """Only those behind ``last``, an ``(id, value)`` that an earlier page ended with, or the
        ``bookmark`` of it: the way to turn pages, which stays right while others write. None begins
        at the beginning.

        Raises ``QueryError``.
        """
        if last is None:
            return self._with(after=None)
        if isinstance(last, str):
            return self._with(after=end_of_bookmark(last, self._order))
        return self._with(after=end_of_page("after", last, self._order, self._source._codec))

    def bookmark(self, last: tuple[uuid.UUID, V]) -> str:
        """``last``, the ``(id, value)`` that a page ended with, as text for ``after`` of the same
        query in another request or process. It holds the id and the fields that are sorted by, for
        everybody to read, and is fit for an address. Raises ``QueryError``.
        """
        end = end_of_page("bookmark", last, self._order, self._source._codec)
        return bookmark_of(end, self._order)

    def scan(self, allowed: bool) -> Query[V]:
        """With False only an index may answer it: asking raises ``QueryError`` (``no_index``) where
        none does, or it is not built yet, instead of looking at every entity."""
        check_bool("scan", allowed)
        return self._with(scan=allowed)

    def _and(self, added: Condition) -> Self:
        self._check_fields(added.paths())
        if added is ALL:
            return self
        return self._with(condition=added if self._condition is ALL else self._condition & added)

    def _check_fields(self, paths: Iterable[Path]) -> None:
        check_fields(self._source.name, self._source._codec.stored_names, paths)

    def _on(self, source: Source) -> Self:
        """The same question, asked of ``source``."""
        return self._with(source=source)

    def _with(self, **changes: Any) -> Self:
        kind = type(self)
        made = kind.__new__(kind)
        made._source, made._condition, made._order = self._source, self._condition, self._order
        made._limit, made._after = self._limit, self._after
        made._delete, made._scan = self._delete, self._scan
        for name, value in changes.items():
            setattr(made, f"_{name}", value)
        return made

    # ------------------------------------------------------------ asking

    def __iter__(self) -> Iterator[tuple[uuid.UUID, V]]:
        return self._source._read(self._found_up_to, self._limit)

    def values(self) -> Iterator[V]:
        """Their values alone."""
        return self._source._read_values(self._found_up_to, self._limit)

    def ids(self) -> Iterator[uuid.UUID]:
        """Their ids alone; nothing is converted to the collection's class."""
        return (uuid_from_bytes(raw) for raw, _ in self._found())

    def first(self) -> tuple[uuid.UUID, V] | None:
        """The first ``(id, value)``, None where there is none."""
        return next(iter(self._few(1)), None)

    def one(self) -> tuple[uuid.UUID, V]:
        """The only ``(id, value)``. Raises ``QueryError`` where there is none or another."""
        found = self._few(2)
        if len(found) == 1:
            return found[0]
        how = "no entity" if not found else "more than one entity"
        raise QueryError(f"{how} of {self._source.name!r} meets {self._condition!r}")

    def _few(self, most: int) -> list[tuple[uuid.UUID, V]]:
        most, source = _least(self._limit, most), self._source
        if source._codec.instead is not None:
            return list(self._with(limit=most))
        return [source._pair(raw, payload) for raw, payload in self._found_up_to(most)]

    def exists(self) -> bool:
        """Whether there is one."""
        return next(self._with(limit=_least(self._limit, 1))._found(), None) is not None

    def count(self) -> int:
        """How many there are; with a limit, at most that many."""
        if self._condition is ALL and self._after is None:
            with self._source._open() as rows:
                count = rows.count(self._source.name)
            return count if self._limit is None else min(count, self._limit)
        # The order does not matter for a number, unless a page begins inside of it.
        counted = self if self._after is not None else self._with(order=())
        with self._source._open() as rows:
            chosen = counted._choose(rows)
            if chosen is not None and chosen.exact and self._after is None:
                if not rows.own(self._source.name):
                    count = count_by_index(rows, self._source.name, chosen)
                    return count if self._limit is None else min(count, self._limit)
        return sum(1 for _ in counted._found())

    def min(self, field: str | Field) -> Any:
        """The least value of ``field`` among them, as it is stored; None where none has it. From an
        index of the field it takes no longer among more. Raises ``QueryError``."""
        return self._extreme(field, descending=False)

    def max(self, field: str | Field) -> Any:
        """The largest value of ``field`` among them, as ``min``."""
        return self._extreme(field, descending=True)

    def _extreme(self, field: str | Field, *, descending: bool) -> Any:
        order = Order(order_of(field).path, descending)
        there = self._and(Field(order.path).exists())
        if self._limit is None and self._after is None:
            there = there._with(order=(order,), limit=1)
            found = next(there._found(), None)
            return None if found is None else field_of(there._value(found[1]), order.path)
        values = [field_of(there._value(payload), order.path) for _, payload in there._found()]
        pick = max if descending else min
        return pick(values, key=order_key, default=None)

    def _value(self, payload: bytes) -> Any:
        upgraded = self._source._codec.upgraded
        return cbor.decode_trusted(payload) if upgraded is None else shape_of(upgraded, payload)

    def delete(self) -> int:
        """Delete them, in one transaction; how many there were.

        Raises ``QueryError`` on a snapshot, which cannot be written to.
        """
        if self._delete is None:
            raise QueryError("a snapshot cannot be written to: ask the database's own collection")
        return self._delete(self)

    def live(self) -> Live[V]:
        """What it finds now, and again after every commit that changed that, of other processes
        too: ``for rows in query.live()``, each a list of ``(id, value)``. See ``Live``.

        Raises ``QueryError`` in a transaction and on a snapshot, where nothing changes.
        """
        observe = self._source._observe
        if observe is None:
            raise QueryError("here nothing changes: ask the database's own collection")
        return Live(self, self._source.name, observe)

    def explain(self) -> Plan:
        """Run it, and say how the answer was found and what that took."""
        tally = Tally()
        found = sum(1 for _ in self._found(tally))
        return Plan(
            collection=self._source.name,
            way=tally.way,
            condition="" if self._condition is ALL else repr(self._condition),
            order=tuple(map(str, self._order)),
            entities=tally.entities,
            decoded=tally.decoded,
            found=found,
            because=tally.because,
        )

    def __repr__(self) -> str:
        parts = [f"<Query of {self._source.name!r}"]
        if self._condition is not ALL:
            parts.append(f"where {self._condition!r}")
        if self._order:
            parts.append(f"by {', '.join(map(str, self._order))}")
        if self._limit is not None:
            parts.append(f"limit {self._limit}")
        return " ".join(parts) + ">"

    def _repr_html_(self) -> str:
        shown = self._with(limit=_least(self._limit, ROWS_MAX + 1))
        found = [(uuid_from_bytes(raw), payload) for raw, payload in shown._found()]
        return entities_table(repr(self)[1:-1], found)

    def _read_once(self) -> tuple[list[Pair], Iterator[tuple[uuid.UUID, V]]]:
        pairs: list[Pair] = []

        def find(limit: int | None) -> Iterator[Pair]:
            pairs.extend(self._found_up_to(limit))
            return iter(pairs)

        return pairs, self._source._read(find, self._limit)

    def _check_open(self) -> None:
        with self._source._open():
            return

    # ------------------------------------------------------------ finding

    def _found(self, tally: Tally | None = None) -> Iterator[Pair]:
        """(id, payload) of what is asked for, in order. One snapshot, held until the end."""
        if self._limit == 0:
            return iter(())
        pairs = self._run(tally)
        return pairs if self._limit is None else islice(pairs, self._limit)

    def _found_up_to(self, limit: int | None) -> Iterator[Pair]:
        return self._with(limit=limit)._found()

    def _run(self, tally: Tally | None) -> Iterator[Pair]:
        with self._source._open() as rows:
            place = self._place(rows)
            if place is not None:
                pairs = entities_at(rows, self._source.name, *place, self._limit)
                if tally is not None:
                    tally.way = f"index({place[0]})"
                    pairs = tally.counted(pairs)
                yield from pairs
                return
            chosen = self._choose(rows)
            if chosen is None:
                yield from self._by_scan(rows, tally)
                return
            if tally is not None:
                tally.way = str(chosen)
            if chosen.ordered and not rows.own(self._source.name):
                yield from self._as_they_stand(rows, chosen, tally)
                return
            ids = ids_by_index(rows, self._source.name, chosen)
            if self._after is not None and not self._order:
                del ids[: bisect_right(ids, self._after[1])]
            pairs = pairs_of(rows, self._source.name, ids)
            yield from self._sorted(pairs, tally) if self._order else self._meeting(pairs, tally)

    def _place(self, rows: Rows) -> tuple[IndexInfo, bytes] | None:
        """The place of an index that has the answer, all of it and nothing else."""
        name = self._source.name
        if self._order or self._after is not None or self._source._codec.upgraded is not None:
            return None
        return None if rows.own(name) else place_of(rows.indexes(name), self._condition)

    def _choose(self, rows: Rows) -> Chosen | None:
        """The index to use, if there is one. Raises ``QueryError`` where there has to be."""
        name = self._source.name
        # Conditions are about the newest shape of an entity, an index about what is stored.
        indexes = rows.indexes(name) if self._source._codec.upgraded is None else ()
        chosen = self._best_of(indexes)
        if chosen is not None and not serves(rows, name, chosen):
            chosen = None
        if chosen is None and not self._scan:
            why = self._why_unindexed(rows) or (
                f"declare {helping_index(self._condition, self._order) or 'one'}, and wait for it "
                "with db.wait_for_indexes()"
            )
            raise QueryError(
                f"no index that is ready answers {self!r}: {why}; or ask without scan(False)",
                code="no_index",
            )
        return chosen

    def _best_of(self, indexes: Sequence[IndexInfo]) -> Chosen | None:
        if not indexes:
            return None
        after = None if self._after is None else self._after[0]
        limited = self._limit is not None
        return choose(indexes, self._condition, self._order, limited=limited, after=after)

    def _why_unindexed(self, rows: Rows) -> str:
        """Why an index that is declared does not answer it; empty if there is none."""
        if self._condition is ALL and not self._order:
            return ""
        upgraded = self._source._codec.upgraded is not None
        return why_unindexed(rows, self._source.name, self._best_of, upgraded=upgraded)

    def _by_scan(self, rows: Rows, tally: Tally | None) -> Iterator[Pair]:
        name = self._source.name
        because = self._why_unindexed(rows)
        if tally is not None:
            tally.because = because
        if self._order or self._condition is not ALL:
            warn_of_scan(rows, name, self._condition, self._order, because)
        start = b"" if self._after is None or self._order else self._after[1] + b"\0"
        # What is stored may be of an older shape than the condition is about.
        sieve = Sieve(self._condition) if self._source._codec.upgraded is None else None
        if sieve and tally is None:
            pairs = rows.holding(name, start, sieve)
        else:
            pairs = rows.pairs(name, start, None, False)
        yield from (self._sorted if self._order else self._meeting)(pairs, tally, sieve)

    def _meeting(
        self, pairs: Iterable[Pair], tally: Tally | None, sieve: Sieve | None = None
    ) -> Iterator[Pair]:
        upgraded = self._source._codec.upgraded
        for raw, payload, _ in matching(pairs, self._condition, tally, upgraded, sieve=sieve):
            yield raw, payload

    def _as_they_stand(self, rows: Rows, chosen: Chosen, tally: Tally | None) -> Iterator[Pair]:
        """What an index gives in the order of the query."""
        name, after = self._source.name, None
        if self._after is not None:
            pairs = zip(self._order, self._after[2], strict=True)
            values = [value for one, value in pairs if one.path in chosen.rest]
            after = values, self._after[1]
        for unsorted, ids in runs_by_index(rows, name, chosen, after):
            pairs_there = pairs_of(rows, name, ids)
            if unsorted and self._order:
                yield from self._sorted(pairs_there, tally)
            else:
                yield from self._meeting(pairs_there, tally)

    def _sorted(
        self, pairs: Iterable[Pair], tally: Tally | None, sieve: Sieve | None = None
    ) -> Iterator[Pair]:
        """All of ``pairs`` that match, sorted; with a limit only what can be among the first is
        kept."""
        wanted = self._limit
        most = None if wanted is None else max(_KEPT_MIN, _KEPT_FACTOR * wanted)
        kept: list[Sorted] = []
        for raw, payload, value in matching(
            pairs,
            self._condition,
            tally,
            self._source._codec.upgraded,
            decoded=True,
            sieve=sieve,
        ):
            keys = self._keys(value)
            if self._after is None or is_after(keys, raw, self._after, self._order):
                kept.append((keys, raw, payload))
                if most is not None and len(kept) > most:
                    sort(kept, self._order)
                    del kept[wanted:]
        sort(kept, self._order)
        return ((raw, payload) for _, raw, payload in kept)

    def _keys(self, value: Any) -> tuple[Any, ...]:
        return tuple(order_key(field_of(value, one.path)) for one in self._order)


def _least(limit: int | None, most: int) -> int:
    return most if limit is None else min(limit, most)


__all__ = ["Order", "Plan", "Query", "Where"]
