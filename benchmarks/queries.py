"""``queries``: entities found by their fields, beside ``sqlite3`` with the same entities as JSON
text; and what it costs to build an index, and those who write meanwhile. (``indexes``: to keep it.)

TinyDB, which has no indexes, is beside scans and finds where it is installed.
``sqlite3`` has an index of an expression, ``json_extract(body, '$.title')``, and gives ids as UUIDs
and values as Python's own ``json`` makes them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, figure, percentile, timed
from benchmarks.payloads import COLLECTION, entities, value
from benchmarks.threads import SLOW_S, SlowDisk
from benchmarks.tiny import NAME as TINY
from benchmarks.tiny import TinyTable, tiny_table
from benchmarks.world import World, load
from entidb import F, Index, cbor
from entidb.db import Database, Query

SIZES = (100_000,)
FINDS = 1000
PAGE = 20
PAGES = 50
COMMITS = 200
TASKS = 32
SQLITE = "sqlite3, JSON text and an index"
SQLITE_SCAN = "sqlite3, JSON text without an index"
THREE = Target("ratio", most=3.0)
TWICE = Target("ratio", most=2.0)
NOT_SLOWER = Target("ratio", most=1.0)
#: For a million.
BUILD = Target("value", most=10.0)
WAIT = Target("value", most=50.0)
LIVE = Target("value", most=10.0)
STOP = Target("value", most=5.0)
#: Seconds between two looks at whether the event loop goes on.
BEAT_S = 0.001
#: Seconds for which a thread holds its transaction open.
HELD_S = 0.05
_US, _MS = 1e6, 1e3


@dataclass
class Note:
    """The class of the typed collection."""

    title: str
    done: bool
    n: int
    tags: list[str]
    body: str


Pairs = Sequence[tuple[bytes, bytes]]
Step = Callable[[], object]


class JsonTable:
    """The entities as JSON text in ``sqlite3``."""

    def __init__(self, path: Path, pairs: Pairs) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("CREATE TABLE notes (id BLOB PRIMARY KEY, body TEXT NOT NULL)")
        rows = ((key, json.dumps(cbor.decode(payload))) for key, payload in pairs)
        self._connection.execute("BEGIN")
        self._connection.executemany("INSERT INTO notes VALUES (?, ?)", rows)
        self._connection.execute("COMMIT")

    def index(self) -> None:
        for name in ("title", "n"):
            self._connection.execute(
                f"CREATE INDEX by_{name} ON notes(json_extract(body, '$.{name}'))"
            )

    def find(self, rest: str, *arguments: object) -> list[tuple[uuid.UUID, Any]]:
        rows = self._connection.execute(f"SELECT id, body FROM notes {rest}", arguments)
        return [(uuid.UUID(bytes=key), json.loads(body)) for key, body in rows]

    def close(self) -> None:
        self._connection.close()


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        where = world.path("queries")
        where.mkdir()
        pairs = entities(count)
        with Database.open(where / "entidb") as database:
            load(database, pairs)
            table = JsonTable(where / "sqlite.db", pairs)
            tiny = tiny_table(where / "tiny.json", pairs)
            yield from _scans(database, table, tiny, count, rounds)
            yield from _build(database, count, rounds)
            table.index()
            yield from _by_index(database, table, tiny, count, rounds)
            yield from _live(database, count, rounds)
            table.close()
            if tiny is not None:
                tiny.close()
        shutil.rmtree(where)
    yield from _tasks(world, COMMITS if max(sizes) > COMMITS else max(sizes), rounds)


# ---------------------------------------------------------------- finding


def _beside(
    name: str, count: int, rounds: int, per_round: int, steps: tuple[Step, Step], **given: Any
) -> Figure:
    """Microseconds of a processor for one of ``per_round``, of the first of ``steps`` beside the
    other: all of both is in this process."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for of, step in zip(times, steps, strict=True):
            gc.collect()
            of.append(_processor_s(step) / per_round * _US)
    return figure("queries", name, count, "us", times[0], floors=times[1], **given)


def _scans(
    database: Database, table: JsonTable, tiny: TinyTable | None, count: int, rounds: int
) -> Iterator[Figure]:
    notes = database.collection(COLLECTION)
    title, low, high = value(count // 2)["title"], count // 2, count // 2 + count // 100
    equal, between = notes.where(title=title), notes.where(F.n.between(low, high))
    of_title, of_n = "json_extract(body, '$.title')", "json_extract(body, '$.n')"
    compared: dict[str, tuple[Query[Any], Step, Target]] = {
        "scan for equality": (
            equal,
            lambda: table.find(f"WHERE {of_title} = ?", title),
            NOT_SLOWER,
        ),
        "scan for a range": (
            between,
            lambda: table.find(f"WHERE {of_n} BETWEEN ? AND ?", low, high),
            TWICE,
        ),
    }
    for name, (query, other, target) in compared.items():
        assert len(list(query)) == len(other())  # type: ignore[arg-type]
        steps = partial(list[Any], query), other
        yield _beside(name, count, rounds, 1, steps, floor_is=SQLITE_SCAN, target=target)
    if tiny is not None:
        others: dict[str, tuple[Query[Any], Step]] = {
            "scan for equality": (equal, lambda: tiny.equal("title", title)),
            "scan for a range": (between, lambda: tiny.between("n", low, high)),
        }
        for name, (query, other) in others.items():
            assert len(list(query)) == len(other())  # type: ignore[arg-type]
            name = f"{name}, {TINY}"
            yield _beside(name, count, rounds, 1, (partial(list, query), other), floor_is=TINY)


def _by_index(
    database: Database, table: JsonTable, tiny: TinyTable | None, count: int, rounds: int
) -> Iterator[Figure]:
    notes, typed = database.collection(COLLECTION), database.collection(COLLECTION, Note)
    pick = random.Random(1)
    titles = [value(pick.randrange(count))["title"] for _ in range(min(FINDS, count))]
    where = "WHERE json_extract(body, '$.title') = ?"
    assert notes.where(title=titles[0]).one() == table.find(where, titles[0])[0]
    plain: Step = lambda: [notes.where(title=title).one() for title in titles]  # noqa: E731
    objects: Step = lambda: [typed.where(title=title).one() for title in titles]  # noqa: E731
    theirs: Step = lambda: [table.find(where, title)[0] for title in titles]  # noqa: E731
    per = len(titles)
    for name, steps, floor_is, target in (
        ("find one", (plain, theirs), SQLITE, THREE),
        ("find one, typed", (objects, theirs), SQLITE, THREE),
        ("find one, typed beside plain", (objects, plain), "plain values", TWICE),
    ):
        yield _beside(name, count, rounds, per, steps, floor_is=floor_is, target=target)
    if tiny is not None:
        steps = partial(notes.where(title=titles[0]).one), partial(tiny.equal, "title", titles[0])
        yield _beside(f"find one, {TINY}", count, rounds, 1, steps, floor_is=TINY)
    pages: list[Step] = []
    for name, behind in (("the first", None), ("in the middle", count // 2)):
        last = None if behind is None else notes.where(n=behind).one()
        page = notes.order_by("n").after(last).limit(PAGE)
        by_n = "json_extract(body, '$.n')"
        rest = f"WHERE {by_n} > ? ORDER BY {by_n} LIMIT {PAGE}"
        start = -1 if behind is None else behind
        assert list(page) == table.find(rest, start)
        ours = partial(_often, partial(list, page))
        steps = ours, partial(_often, partial(table.find, rest, start))
        pages.append(ours)
        name = f"page of {PAGE}, {name}"
        yield _beside(name, count, rounds, PAGES, steps, floor_is=SQLITE, target=THREE)
    yield _beside(
        f"page of {PAGE}, in the middle beside the first",
        count,
        rounds,
        PAGES,
        (pages[1], pages[0]),
        floor_is="the first page",
        target=Target("ratio", most=1.5),
    )


def _processor_s(step: Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _often(step: Step) -> None:
    for _ in range(PAGES):
        step()


# ---------------------------------------------------------------- what an index costs


def _build(database: Database, count: int, rounds: int) -> Iterator[Figure]:
    """An index of a field in no order, built; alone, and beside a thread that writes."""
    alone, beside, waits, tails = [], [], [], []
    database.collection(COLLECTION, indexes=[Index("title"), Index("n")])
    database.wait_for_indexes()
    others = database.collection("others")
    for _ in range(min(rounds, 3)):
        database.collection(COLLECTION, indexes=[Index("n")])
        database.wait_for_indexes()

        def build() -> None:
            database.collection(COLLECTION, indexes=[Index("title"), Index("n")])
            database.wait_for_indexes()

        alone.append(timed(build))
        database.collection(COLLECTION, indexes=[Index("n")])
        database.wait_for_indexes()
        over = threading.Event()
        took: list[float] = []

        def write(over: threading.Event = over, took: list[float] = took) -> None:
            while not over.is_set():
                took.append(timed(partial(others.add, value(len(took)))))
                time.sleep(0.02)

        writer = threading.Thread(target=write)
        writer.start()
        beside.append(timed(build))
        over.set()
        writer.join()
        waits.append(max(took) * _MS)
        tails.append(percentile(took, 0.99) * _MS)
    million = count == 1_000_000
    yield figure(
        "queries", "build of an index", count, "s", alone, target=BUILD if million else None
    )
    yield figure("queries", "build of an index, beside a writer", count, "s", beside)
    yield figure("queries", "commits meanwhile: p99", count, "ms", tails, target=WAIT)
    yield figure("queries", "longest commit meanwhile", count, "ms", waits, target=WAIT)


# ---------------------------------------------------------------- live queries, and tasks


def _live(database: Database, count: int, rounds: int) -> Iterator[Figure]:
    """From the beginning of a commit until the iterator of a live query gives the new answer."""
    notes = database.collection(COLLECTION)
    changed, tails = min(COMMITS, count), []
    entity_id, note = notes.where(n=0).one()
    given = threading.Semaphore(0)
    began: list[float] = []

    def write(round_number: int) -> None:
        for number in range(changed):
            began.append(time.perf_counter())
            notes[entity_id] = {**note, "body": f"{number} of {round_number}"}
            given.acquire()

    with notes.where(F.n < PAGE).order_by("n").limit(PAGE).live() as live:
        next(live)
        for number in range(rounds):
            began.clear()
            times: list[float] = []
            writer = threading.Thread(target=write, args=(number,))
            writer.start()
            for rows in islice(live, changed):
                times.append(time.perf_counter() - began[-1])
                assert rows[0][1]["body"] == f"{len(times) - 1} of {number}"
                given.release()
            writer.join()
            tails.append(percentile(times, 0.99) * _MS)
    yield figure("queries", "live query, commit until given: p99", count, "ms", tails, target=LIVE)


def _tasks(world: World, each: int, rounds: int) -> Iterator[Figure]:
    """Commits a second of many asyncio tasks, beside those of one task."""
    where = world.path("tasks")
    with Database.open(where / "fast") as fast, Database(SlowDisk.open(where / "slow")) as slow:
        for name, database, least in (
            ("the disk as it is", fast, 4.0),
            (f"{SLOW_S * _MS:g} ms more for a flush", slow, 10.0),
        ):
            many, one = [], []
            for _ in range(rounds):
                one.append(each / timed(partial(asyncio.run, _commits(database, 1, each))))
                took = timed(partial(asyncio.run, _commits(database, TASKS, each)))
                many.append(TASKS * each / took)
            yield figure(
                "queries",
                f"{TASKS} asyncio tasks, {name}",
                each,
                "/s",
                many,
                floors=one,
                floor_is="one task",
                target=Target("ratio", least=least),
            )
        beats, nothing = [], []
        for _ in range(rounds):
            nothing.append(asyncio.run(_longest_stop(_rest())) * _MS)
            beats.append(asyncio.run(_longest_stop(_beside_a_thread(fast, each))) * _MS)
        yield figure(
            "queries",
            "longest stop of an event loop",
            each,
            "ms",
            beats,
            floors=nothing,
            floor_is="a loop with nothing to do",
            target=STOP,
        )
    shutil.rmtree(where)


async def _rest() -> None:
    await asyncio.sleep(0.25)


async def _beside_a_thread(database: Database, each: int) -> None:
    """Commits of tasks while a thread holds one transaction after the other open."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            with database.transaction() as tx:
                tx.collection(COLLECTION).add(value(0))
                over.wait(HELD_S)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        await _commits(database, 4, max(1, each // 20))
    finally:
        over.set()
        await asyncio.to_thread(thread.join)


async def _longest_stop(work: Coroutine[Any, Any, None]) -> float:
    """Seconds for which the loop ran nothing else, at most, while it did ``work``."""
    task = asyncio.ensure_future(work)
    longest, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(BEAT_S)
        now = time.perf_counter()
        longest, last = max(longest, now - last - BEAT_S), now
    await task
    return longest


async def _commits(database: Database, tasks: int, each: int) -> None:
    notes = database.aio.collection(COLLECTION)

    async def commit() -> None:
        for number in range(each):
            await notes.add(value(number))

    await asyncio.gather(*[commit() for _ in range(tasks)])
