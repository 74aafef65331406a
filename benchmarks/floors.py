"""Floors: what the machine does without EntiDB. Raw py-lmdb, sqlite3, PostgreSQL, and HTTP with
nothing behind.

Raw LMDB keeps what any store of this kind has to: the entities by id, and one index of them by
commit sequence. It has no outbox, no versions, no checksums and no counts. Every commit is durable
(``sync=True``), as ours are.
"""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import psycopg

from benchmarks.figures import timed

BATCH = 1000
RAW_BATCHES = "raw LMDB, durable 1,000-op batches"
RAW_SINGLES = "raw LMDB, durable single commits"
BARE_EXCHANGE = "bare HTTP exchange of the same bytes"

_MAP_BYTES = 64 << 30
Pair = tuple[bytes, bytes]


class RawLmdb:
    """Entities and one sequence index, nothing else."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.env = lmdb.open(str(path), map_size=_MAP_BYTES, max_dbs=2)
        self.entities = self.env.open_db(b"entities")
        self.index = self.env.open_db(b"index")
        self.sequence = 0

    def put(self, pairs: Sequence[Pair]) -> None:
        """One durable commit."""
        with self.env.begin(write=True) as txn:
            txn.cursor(self.entities).putmulti(pairs)
            first = self.sequence + 1
            index = [(n.to_bytes(8, "big"), key) for n, (key, _) in enumerate(pairs, first)]
            txn.cursor(self.index).putmulti(index)
        self.sequence += len(pairs)

    def put_batches(self, pairs: Sequence[Pair], size: int = BATCH) -> None:
        for batch in batches(pairs, size):
            self.put(batch)

    def replace(self, pairs: Sequence[Pair], places: dict[bytes, int]) -> None:
        """As ``put`` for entities that are there: their old rows leave the index. ``places``
        knows the sequence of each, and is brought up to date."""
        with self.env.begin(write=True) as txn:
            for key, data in pairs:
                txn.delete(places[key].to_bytes(8, "big"), db=self.index)
                self.sequence += 1
                places[key] = self.sequence
                txn.put(key, data, db=self.entities)
                txn.put(self.sequence.to_bytes(8, "big"), key, db=self.index)

    def get(self, key: bytes) -> bytes:
        with self.env.begin() as txn:
            found = txn.get(key, db=self.entities)
        assert found is not None
        return found

    def get_many(self, keys: Sequence[bytes]) -> list[Pair]:
        with self.env.begin() as txn:
            return list(txn.cursor(self.entities).getmulti(keys))

    def pairs(self) -> Iterator[Pair]:
        with self.env.begin() as txn:
            yield from txn.cursor(self.entities)

    def changes(self) -> Iterator[Pair]:
        with self.env.begin() as txn:
            for _, key in txn.cursor(self.index):
                found = txn.get(key, db=self.entities)
                assert found is not None
                yield key, found

    def close(self) -> None:
        self.env.close()


class RawSqlite:
    """The same in ``sqlite3``: WAL, synchronous=FULL, payloads as blobs."""

    def __init__(self, path: Path, timeout_s: float = 5.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self.connection.execute(f"PRAGMA {pragma}")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS entities"
            "(id BLOB PRIMARY KEY, sequence INTEGER NOT NULL, payload BLOB NOT NULL) WITHOUT ROWID"
        )
        self.connection.execute("CREATE INDEX IF NOT EXISTS by_sequence ON entities(sequence)")
        self.sequence = 0

    def put(self, pairs: Sequence[Pair]) -> None:
        rows = [(key, n, data) for n, (key, data) in enumerate(pairs, self.sequence + 1)]
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        self.connection.executemany("INSERT OR REPLACE INTO entities VALUES (?, ?, ?)", rows)
        execute("COMMIT")
        self.sequence += len(pairs)

    def put_batches(self, pairs: Sequence[Pair], size: int = BATCH) -> None:
        for batch in batches(pairs, size):
            self.put(batch)

    def get(self, key: bytes) -> bytes:
        query = "SELECT payload FROM entities WHERE id = ?"
        found: bytes = self.connection.execute(query, (key,)).fetchone()[0]
        return found

    def get_many(self, keys: Sequence[bytes]) -> list[Pair]:
        marks = ",".join("?" * len(keys))
        query = f"SELECT id, payload FROM entities WHERE id IN ({marks})"
        return self.connection.execute(query, keys).fetchall()

    def pairs(self) -> Iterator[Pair]:
        return self.connection.execute("SELECT id, payload FROM entities ORDER BY id")

    def changes(self) -> Iterator[Pair]:
        return self.connection.execute("SELECT id, payload FROM entities ORDER BY sequence")

    def close(self) -> None:
        self.connection.close()


class RawPostgres:
    """The same in PostgreSQL: two tables, and as few round trips as there can be."""

    def __init__(self, address: str) -> None:
        self.connection = psycopg.connect(address, autocommit=True)
        self.connection.execute("CREATE TABLE entities (id bytea PRIMARY KEY, payload bytea)")
        self.connection.execute("CREATE TABLE changes (n bigint PRIMARY KEY, id bytea)")
        self.sequence = 0

    def put(self, pairs: Sequence[Pair]) -> None:
        """One durable commit."""
        self.connection.execute(
            "WITH new AS (SELECT * FROM unnest(%b::bytea[], %b::bytea[]) WITH ORDINALITY "
            "AS new(id, payload, n)), "
            "old AS (INSERT INTO entities SELECT id, payload FROM new "
            "ON CONFLICT (id) DO UPDATE SET payload = excluded.payload) "
            "INSERT INTO changes SELECT %s + n, id FROM new",
            ([key for key, _ in pairs], [data for _, data in pairs], self.sequence),
            prepare=True,
        )
        self.sequence += len(pairs)

    def put_batches(self, pairs: Sequence[Pair], size: int = BATCH) -> None:
        for batch in batches(pairs, size):
            self.put(batch)

    def close(self) -> None:
        self.connection.close()


def batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


_numbers = itertools.count()


def batched_rate(where: Path, pairs: Sequence[Pair]) -> float:
    """Entities per second into a new store in durable batches of 1,000."""
    path = where / f"floor-{next(_numbers)}"
    raw = RawLmdb(path)
    try:
        return len(pairs) / timed(lambda: raw.put_batches(pairs))
    finally:
        raw.close()
        shutil.rmtree(path)


class Singles:
    """Durable single commits into a store that stays, as a floor to be measured again and again."""

    def __init__(self, where: Path, pairs: Sequence[Pair]) -> None:
        self._raw = RawLmdb(where / f"floor-{next(_numbers)}")
        self._pairs = itertools.cycle(pairs)

    def seconds(self, count: int) -> list[float]:
        """Seconds of each of ``count`` commits."""
        return [timed(lambda: self._raw.put([next(self._pairs)])) for _ in range(count)]

    def close(self) -> None:
        self._raw.close()
