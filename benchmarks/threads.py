"""``threads``: 32 threads that commit one entity at a time, against one thread doing the same.

On the disk as it is, on a store whose every commit takes 2 ms longer, as on a disk that flushes
slowly, and against sqlite3 with as many threads, each with a connection of its own.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, figure, timed
from benchmarks.floors import RawSqlite
from benchmarks.payloads import COLLECTION, value
from benchmarks.world import World
from entidb import cbor
from entidb.db import Database
from entidb.storage import LmdbStorage
from entidb.storage.base import Batch

SIZES = (3200,)
THREADS = 32
SLOW_S = 0.002
ONE = "one thread"
SQLITE = "sqlite3, WAL, synchronous=FULL, 32 threads"


class SlowDisk(LmdbStorage):
    """Each commit waits as a slow disk makes it wait: without the interpreter's lock."""

    def commit(self, batch: Batch, after: int | None = None) -> int:
        mark = super().commit(batch, after)
        time.sleep(SLOW_S)
        return mark


#: Does a thread's share: a commit for each of them.
Share = Callable[[Sequence[Any]], object]


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        where = world.path("threads")
        with Database.open(where / "fast") as fast, Database(SlowDisk.open(where / "slow")) as slow:
            here, alone, theirs, flushes = [], [], [], []
            late, late_alone = [], []
            # One thread does fewer: it takes as long for them. What they store is made before the
            # clock runs: making it takes the interpreter, for which all threads wait.
            values = [value(number) for number in range(max(1, count // THREADS))]
            few = [value(number) for number in range(max(1, count // 8))]
            RawSqlite(where / "sqlite" / "data.db").close()
            for _ in range(rounds):
                alone.append(len(few) / timed(partial(_add, fast, few)))
                here.append(_together(values, partial(_add, fast)))
                theirs.append(_together(values, partial(_add_sqlite, where)))
                flushes.append(_flush_ms(fast))
                late_alone.append(len(few) / timed(partial(_add, slow, few)))
                late.append(_together(values, partial(_add, slow)))
        shutil.rmtree(where)
        name = f"{THREADS} threads"
        note = "3 times is asked where a flush takes less than 0.3 ms"
        yield figure(
            "threads",
            f"{name}, the disk as it is",
            count,
            "/s",
            here,
            floors=alone,
            floor_is=ONE,
            target=Target("ratio", least=3.0),
            note=note,
        )
        yield figure(
            "threads",
            f"{name}, 2 ms more for a flush",
            count,
            "/s",
            late,
            floors=late_alone,
            floor_is=ONE,
            target=Target("ratio", least=10.0),
        )
        yield figure(
            "threads",
            f"{name}, sqlite3",
            count,
            "/s",
            here,
            floors=theirs,
            floor_is=SQLITE,
            target=Target("ratio", least=1.2),
        )
        yield figure("threads", "a commit of one row, without Python", count, "ms", flushes)


def _together(values: Sequence[Any], share: Share) -> float:
    """Commits a second of all threads, each of which stores all ``values``."""
    threads = [threading.Thread(target=share, args=(values,)) for _ in range(THREADS)]

    def go() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return len(values) * THREADS / timed(go)


def _add(database: Database, values: Sequence[Any]) -> None:
    notes: Any = database.collection(COLLECTION)
    for each in values:
        notes.add(each)


def _add_sqlite(where: Path, values: Sequence[Any]) -> None:
    store = RawSqlite(where / "sqlite" / "data.db", timeout_s=600.0)
    identity = threading.get_ident().to_bytes(8, "big")
    try:
        for each in values:
            key = identity + time.monotonic_ns().to_bytes(8, "big")
            store.put([(key, cbor.encode(each))])
    finally:
        store.close()


def _flush_ms(database: Database) -> float:
    """What the store alone takes for the smallest commit."""
    storage, times = database.storage, []
    for number in range(20):
        times.append(timed(partial(storage.commit, {b"\xff": bytes([number])})) * 1000)
    return sorted(times)[len(times) // 2]
