"""INDEXED: what a database of a run does with indexes, and whether they are in step.

Indexes are declared, built, built again and dropped while all else goes on. After every durable
commit the places of each entity that it changed are compared with the entity, and each place that
it put; where a build has come further, all that it has come to. From time to time a question is
asked that an index answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from entidb import cbor
from entidb.db import Database, Index
from entidb.db.catalogue import Catalogue, CollectionInfo, IndexInfo, decode_catalogue
from entidb.db.conditions import F
from entidb.db.index_care import build_step, declare, rebuild
from entidb.db.index_keys import index_count_key, index_prefix, split_index_key
from entidb.db.indexing import maker_of
from entidb.db.looking import MISSING, field_of, order_key
from entidb.db.maintenance import sweep_garbage
from entidb.db.query import Query
from entidb.db.records import (
    ENTITY,
    INDEX,
    META_CATALOGUE,
    META_STAGE,
    payload_of,
    table_prefix,
    unpack_u64,
)
from entidb.db.replica import Stage, decode_record
from entidb.testing.world import World

Records = Mapping[bytes, bytes]
DECLARED: Final = (
    Index("i"),
    Index("n", "i"),
    Index("s", each=True),
    Index("f.a"),
    Index("i", "n"),
)


class IndexLife:
    """The indexes of one database: of ``collections``, whose entities have one of ``numbers``."""

    def __init__(
        self, world: World, name: str, collections: Sequence[str], numbers: Sequence[float]
    ) -> None:
        self._world = world
        self._collections = collections
        self._numbers = numbers
        self._name = name
        self._rng = world.stream(f"indexes of {name}")
        self._places: dict[bytes, CollectionInfo] = {}
        self._reached: dict[int, IndexInfo] = {}

    def act(self, database: Database) -> None:
        """Something is done with them."""
        rng = self._rng
        if rng.random() * 1000 >= self._world.knobs.indexes:
            return
        self._world.fired("indexes")
        chance, name = rng.randrange(12), rng.choice(self._collections)
        if chance < 2:
            declare(database, name, rng.sample(DECLARED, rng.randrange(4)))
        elif chance < 7:
            size = rng.choice((1, 3, 2000))
            if rng.random() < 0.5:
                build_step(database, size)
            else:
                build_step(database, places=size)
        elif chance < 8:
            rebuild(database)
        elif chance < 9:
            sweep_garbage(database)
        else:
            self._ask(database, name)

    def opened(self) -> None:
        """It may be an older copy: what indexes there are is looked up again."""
        self._places, self._reached = {}, {}

    # ------------------------------------------------------------ questions

    def _ask(self, database: Database, name: str) -> None:
        """The answer is that of a loop in Python."""
        rng, bound = self._rng, self._rng.choice(self._numbers)
        collection = database.collection(name)
        with_n = rng.randrange(5)
        asks: list[tuple[Query[Any], Callable[[Any], bool]]] = [
            (collection.where(F.i <= bound), lambda value: _number(value, "i", -1) <= bound),
            (collection.where(F.i > bound), lambda value: _number(value, "i", 0) > bound),
            (
                collection.where(F.i >= bound, n=with_n),
                lambda value: _number(value, "i", 0) >= bound and value.get("n") == with_n,
            ),
        ]
        query, meets = rng.choice(asks)
        with database.snapshot() as snapshot:
            there = {i.bytes: value for i, value in snapshot.collection(name).items()}
        expected = [i for i, value in there.items() if "i" in value and meets(value)]
        if rng.random() < 0.5:
            query = query.order_by("i")
            expected.sort(key=lambda i: order_key(there[i]["i"]))
        found = [i.bytes for i in query.ids()]
        self._world.checks.that(
            found == expected,
            "INDEXED",
            f"{self._name} finds {len(found)} entities for {query!r}, by hand {len(expected)}; "
            f"{query.explain()}",
        )

    # ------------------------------------------------------------ after every commit

    def stored(
        self,
        batch: Mapping[bytes, bytes | None],
        old: Mapping[bytes, bytes | None],
        records: Records,
    ) -> None:
        """A commit is durable: what it changed is in its places, and nowhere else."""
        if not self._world.knobs.indexes:
            return
        if not self._places or META_CATALOGUE in batch or META_STAGE in batch:
            self._look(records)
        for key, row in batch.items():
            info = self._places.get(key[:5]) if key[:1] == ENTITY else None
            if info is not None and info.indexes:
                self._check(info, key[5:], _value(old.get(key)), _value(row), records)
            if key[:1] == INDEX and row is not None:
                self._check_place(key, records)

    def _look(self, records: Records) -> None:
        """The catalogue has changed: which tables there are, and that no place is of another."""
        raw = records.get(META_CATALOGUE)
        if raw is None:
            return
        catalogue = decode_catalogue(raw)
        self._places = {info.prefix: info for info in catalogue.by_number.values()}
        raw = records.get(META_STAGE)
        if raw is not None:
            for number, table in decode_record(Stage, raw).tables.items():
                info = catalogue.by_number[int(number)].standing_in(table)
                self._places[info.prefix] = info
        if catalogue.indexes.each:
            self._check_strays(catalogue, records)
        reached = {index.number: index for index in catalogue.indexes.each}
        for index in catalogue.indexes.each:
            if self._reached.get(index.number) not in (None, index):
                self._check_reached(catalogue.by_number[index.collection], index, records)
        self._reached = reached

    def _check_strays(self, catalogue: Catalogue, records: Records) -> None:
        tables = {info.table for info in self._places.values()}
        tables |= {table for table, _ in catalogue.garbage}
        numbers = {index.number for index in catalogue.indexes.each}
        for key in records:
            if key[:1] == INDEX:
                number, table, _, entity_id = split_index_key(key)
                known = number in catalogue.indexes.dropped or (
                    number in numbers and table in tables
                )
                self._world.checks.that(
                    known,
                    "INDEXED",
                    f"{self._name}: {entity_id.hex()} has a place in index {number} of table "
                    f"{table}, which are gone",
                )

    def _check_place(self, key: bytes, records: Records) -> None:
        """A place that was put, by whom ever: the entity stands there."""
        number, table, fields, entity_id = split_index_key(key)
        info = self._places.get(table_prefix(table))
        for index in () if info is None else info.indexes:
            places = maker_of(index, {})
            if index.number == number and places is not None:
                value = _value(records.get(table_prefix(table) + entity_id))
                self._world.checks.that(
                    value is not MISSING and fields in places(value),
                    "INDEXED",
                    f"{self._name}: {entity_id.hex()} was put where it does not stand in {index}",
                )

    def _check_reached(self, info: CollectionInfo, index: IndexInfo, records: Records) -> None:
        """A build has come so far: all entities up to there have their places, and are counted."""
        places = maker_of(index, {})
        if places is None or index.paused:
            return
        upto = index.after if index.table == info.table else b""
        prefix, counted, missing = index_prefix(index.number, info.table), 0, 0
        for key, row in records.items():
            if key[:5] == info.prefix and (index.has(info.table) or key[5:] <= upto):
                value = _value(row)
                due = () if value is MISSING else places(value)
                counted += bool(due)
                missing += sum(1 for fields in due if prefix + fields + key[5:] not in records)
        raw = records.get(index_count_key(index.number, info.table))
        said = 0 if raw is None else unpack_u64(raw)
        self._world.checks.that(
            said == counted and not missing,
            "INDEXED",
            f"{self._name}: index {index} of {info.name} counts {said} entities of {counted}, and "
            f"lacks {missing} places",
        )

    def _check(
        self, info: CollectionInfo, entity_id: bytes, was: Any, now: Any, records: Records
    ) -> None:
        for index in info.indexes:
            places = maker_of(index, {})
            if places is None:
                continue
            prefix = index_prefix(index.number, info.table)
            upto = index.after if index.table == info.table else b""
            due = set() if now is MISSING else set(places(now))
            left = set() if was is MISSING else set(places(was)) - due
            if not index.has(info.table) and entity_id > upto:
                due = set()
            missing = [each for each in due if prefix + each + entity_id not in records]
            wrong = [each for each in left if prefix + each + entity_id in records]
            self._world.checks.that(
                not missing and not wrong,
                "INDEXED",
                f"{self._name}: {info.name}/{entity_id.hex()} is missing in index {index} "
                f"({len(missing)}), or where it was ({len(wrong)})",
            )


def _value(raw: bytes | None) -> Any:
    payload = None if raw is None else payload_of(raw)
    return MISSING if payload is None else cbor.decode_trusted(payload)


def _number(value: Any, name: str, otherwise: float) -> Any:
    found = field_of(value, (name,))
    return otherwise if found is MISSING else found


__all__ = ["IndexLife"]
