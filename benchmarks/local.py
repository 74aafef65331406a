"""``local``: the embedded database alone, against raw LMDB and sqlite3 doing the same.

All three encode and decode values with the project's CBOR codec, so that the difference is the
database. sqlite3 runs with WAL and synchronous=FULL: every commit is durable in all three.
"""

from __future__ import annotations

import gc
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, figure, timed
from benchmarks.floors import BATCH, RawLmdb, RawSqlite, batches
from benchmarks.payloads import COLLECTION, entities, value
from benchmarks.world import World, load
from entidb import cbor
from entidb.db import Collection, Database
from entidb.db.collection import TransactionCollection

SIZES = (50_000,)
GETS = 5000
SINGLES = 500
OPENS = 20
AHEAD = Target("ratio", least=1.0)
SINGLE_TARGET = Target("ratio", least=0.6)
RAW = "raw LMDB"
SQLITE = "sqlite3, WAL, synchronous=FULL"


@dataclass(frozen=True)
class Contestants:
    """Three stores with the same entities, and how each does one thing."""

    database: Database
    raw: RawLmdb
    sqlite: RawSqlite
    ids: list[bytes]


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        where = world.path("local")
        pairs = entities(count)
        database = Database.open(where / "entidb")
        raw = RawLmdb(where / "raw")
        sqlite = RawSqlite(where / "sqlite" / "data.db")
        load(database, pairs)
        raw.put_batches(pairs)
        sqlite.put_batches(pairs)
        three = Contestants(database, raw, sqlite, [key for key, _ in pairs])
        for name, (per_round, ours, floor, other) in _reads(three, count).items():
            yield from _compare(name, count, rounds, per_round, ours, floor, other, AHEAD)
        for name, (per_round, ours, floor, other) in _writes(three, count).items():
            target = AHEAD if name.startswith("batches") else None
            yield from _compare(name, count, rounds, per_round, ours, floor, other, target)
        for store in (database, raw, sqlite):
            store.close()
        yield from _open(where, count, rounds)
        shutil.rmtree(where)


Step = Callable[[], object]
#: How many operations a step is; ours, raw LMDB's, sqlite3's.
Case = tuple[int, Step, Step, Step]


def _compare(
    name: str,
    count: int,
    rounds: int,
    per_round: int,
    ours: Step,
    floor: Step,
    other: Step,
    target: Target | None,
) -> Iterator[Figure]:
    rates: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for store, step in enumerate((ours, floor, other)):
            # Else one of the three pays for what all of them have left to the collector.
            gc.collect()
            rates[store].append(per_round / timed(step))
    single = SINGLE_TARGET if name == "single commits" else None
    yield figure("local", name, count, "/s", rates[0], floors=rates[1], floor_is=RAW, target=single)
    yield figure(
        "local",
        f"{name}, sqlite3",
        count,
        "/s",
        rates[0],
        floors=rates[2],
        floor_is=SQLITE,
        target=target,
    )


def _reads(three: Contestants, count: int) -> dict[str, Case]:
    notes: Collection[Any] = three.database.collection(COLLECTION)
    pick = random.Random(1)
    some = pick.sample(three.ids, min(GETS, count))
    some_ids = [uuid.UUID(bytes=raw) for raw in some]
    groups = list(batches(some, BATCH))
    id_groups = list(batches(some_ids, BATCH))
    decode = cbor.decode_trusted
    raw, sqlite = three.raw, three.sqlite
    return {
        "get": (
            len(some),
            lambda: [notes[i] for i in some_ids],
            lambda: [decode(raw.get(i)) for i in some],
            lambda: [decode(sqlite.get(i)) for i in some],
        ),
        "get 1,000 at once": (
            len(some),
            lambda: [notes.get_many(group) for group in id_groups],
            lambda: [{k: decode(v) for k, v in raw.get_many(group)} for group in groups],
            lambda: [{k: decode(v) for k, v in sqlite.get_many(group)} for group in groups],
        ),
        "iterate": (
            count,
            lambda: _drain(notes.items()),
            lambda: _drain((uuid.UUID(bytes=k), decode(v)) for k, v in raw.pairs()),
            lambda: _drain((uuid.UUID(bytes=k), decode(v)) for k, v in sqlite.pairs()),
        ),
        "change feed": (
            count,
            lambda: _drain(event.value for event in three.database.changes()),
            lambda: _drain((uuid.UUID(bytes=k), decode(v)) for k, v in raw.changes()),
            lambda: _drain((uuid.UUID(bytes=k), decode(v)) for k, v in sqlite.changes()),
        ),
    }


def _drain(items: object) -> None:
    for _ in items:  # type: ignore[attr-defined]
        continue


def _writes(three: Contestants, count: int) -> dict[str, Case]:
    notes: Collection[Any] = three.database.collection(COLLECTION)
    database, raw, sqlite = three.database, three.raw, three.sqlite
    singles = min(SINGLES, count)
    values = [value(number) for number in range(singles)]
    many = [value(number) for number in range(min(10 * BATCH, count))]
    encode = cbor.encode

    def new() -> bytes:
        return database.new_id().bytes

    def singly(store: RawLmdb | RawSqlite) -> None:
        for item in values:
            store.put([(new(), encode(item))])

    def ours_batched() -> None:
        for group in batches(many, BATCH):
            with database.transaction() as tx:
                inside: TransactionCollection[Any] = tx.collection(COLLECTION)
                for item in group:
                    inside.add(item)

    def batched(store: RawLmdb | RawSqlite) -> None:
        for group in batches(many, BATCH):
            store.put([(new(), encode(item)) for item in group])

    return {
        "single commits": (
            singles,
            lambda: [notes.add(item) for item in values],
            lambda: singly(raw),
            lambda: singly(sqlite),
        ),
        "batches of 1,000": (
            len(many),
            ours_batched,
            lambda: batched(raw),
            lambda: batched(sqlite),
        ),
    }


def _open(where: Path, count: int, rounds: int) -> Iterator[Figure]:
    """Opening a store and reading one entity."""

    def ours() -> None:
        with Database.open(where / "entidb") as database:
            next(database.collection(COLLECTION).range(limit=1))

    def floor() -> None:
        raw = RawLmdb(where / "raw")
        next(raw.pairs())
        raw.close()

    def other() -> None:
        sqlite = RawSqlite(where / "sqlite" / "data.db")
        next(sqlite.pairs())
        sqlite.close()

    opens = min(OPENS, count)
    times: list[list[float]] = [[], [], []]
    for _ in range(rounds):
        for store, step in enumerate((ours, floor, other)):
            times[store].append(sum(timed(step) for _ in range(opens)) / opens * 1000)
    yield figure("local", "open", count, "ms", times[0], floors=times[1], floor_is=RAW)
    yield figure("local", "open, sqlite3", count, "ms", times[0], floors=times[2], floor_is=SQLITE)
    crashed: list[float] = []
    for _ in range(rounds):
        # What tells the next one that it was closed.
        (where / "entidb" / "entidb.lock").unlink()
        crashed.append(timed(ours) * 1000)
    yield figure("local", "open, not closed before", count, "ms", crashed)
