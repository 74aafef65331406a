"""``latency``: one commit on A until it is durable on the server and applied on B.

B syncs as soon as the server has answered A's push, in a thread of its own: what A still does with
the answer is not what B waits for.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.figures import Figure, Target, figure, percentile, timed
from benchmarks.floors import Singles
from benchmarks.payloads import COLLECTION, entities, value
from benchmarks.world import BareExchange, Device, World, load
from entidb.db import Collection

SIZES = (200,)
COMMITS = 4
EXCHANGES = 3
FLOOR_IS = f"{COMMITS} raw durable commits + {EXCHANGES} bare exchanges"
TARGET = Target("ratio", most=2.2)
TAIL_TARGET = Target("ratio", most=3.0)
ENTITIES = 1000


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: changes in each round."""
    for count in sizes:
        halves: list[float] = []
        tails: list[float] = []
        floors: list[float] = []
        pairs = entities(ENTITIES)
        with (
            world.server() as server,
            world.bare_server() as bare_url,
            world.device(server, "latency") as one,
            world.device(server, "latency") as other,
            contextlib.closing(Singles(world.directory, pairs)) as singles,
            _in_step(one, other, pairs) as pair,
        ):
            pair.change(0)
            one.client.recording = True
            pair.change(1)
            one.client.recording = False
            # The push: the largest of the exchanges that one change takes.
            exchange = max(one.client.exchanges, key=lambda item: len(item.body))
            with contextlib.closing(BareExchange(bare_url, exchange)) as bare:
                for _ in range(rounds):
                    commit = statistics.median(singles.seconds(count))
                    bare_s = statistics.median(timed(bare) for _ in range(count))
                    floors.append((COMMITS * commit + EXCHANGES * bare_s) * 1000)
                    times = [pair.change(number) for number in range(2, 2 + count)]
                    halves.append(percentile(times, 0.5) * 1000)
                    tails.append(percentile(times, 0.99) * 1000)
        yield figure(
            "latency",
            "p50",
            count,
            "ms",
            halves,
            floors=floors,
            floor_is=FLOOR_IS,
            target=TARGET,
        )
        yield figure(
            "latency",
            "p99",
            count,
            "ms",
            tails,
            floors=halves,
            floor_is="p50",
            target=TAIL_TARGET,
        )


def _in_step(one: Device, other: Device, pairs: list[tuple[bytes, bytes]]) -> Pair:
    load(one.database, pairs)
    one.sync()
    other.sync()
    return Pair(one, other)


class Pair:
    """Two devices; the second one syncs whenever a push of the first was answered."""

    def __init__(self, one: Device, other: Device) -> None:
        self._one = one
        self._other = other
        self._pushed = threading.Event()
        self._applied = threading.Event()
        self._applied_at = 0.0
        self._stop = False
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Pair:
        self._one.client.on_pushed = self._pushed.set
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._pushed.set()
        self._thread.join()

    def _follow(self) -> None:
        while True:
            self._pushed.wait()
            self._pushed.clear()
            if self._stop:
                return
            self._other.sync()
            self._applied_at = time.perf_counter()
            self._applied.set()

    def change(self, number: int) -> float:
        """Seconds from before the commit on the first until it is applied on the second."""
        self._applied.clear()
        began = time.perf_counter()
        notes: Collection[Any] = self._one.database.collection(COLLECTION)
        entity_id = notes.add(value(number))
        self._one.sync()
        self._applied.wait()
        assert entity_id in self._other.database.collection(COLLECTION)
        return self._applied_at - began
