"""``latency``: one commit on A until it is durable on the server and applied on B."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.figures import Figure, Target, figure, percentile, timed
from benchmarks.floors import Singles
from benchmarks.payloads import COLLECTION, entities, value
from benchmarks.world import BareExchange, Device, World, load
from entidb.db import Collection

SIZES = (200,)
COMMITS = 3
EXCHANGES = 4
TARGET = Target("ratio", most=1.0)
TAIL_TARGET = Target("ratio", most=5.0)
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
        ):
            load(one.database, pairs)
            one.sync()
            other.sync()
            _change(one, other, 0)
            one.client.recording = True
            _change(one, other, 1)
            one.client.recording = False
            # The push: the largest of the exchanges that one change takes.
            exchange = max(one.client.exchanges, key=lambda item: len(item.body))
            with contextlib.closing(BareExchange(bare_url, exchange)) as bare:
                for _ in range(rounds):
                    commit = statistics.median(singles.seconds(count))
                    bare_s = statistics.median(timed(bare) for _ in range(count))
                    floors.append((COMMITS * commit + EXCHANGES * bare_s) * 1000)
                    times = [
                        timed(lambda number=number: _change(one, other, number))  # type: ignore[misc]
                        for number in range(2, 2 + count)
                    ]
                    halves.append(percentile(times, 0.5) * 1000)
                    tails.append(percentile(times, 0.99) * 1000)
        yield figure(
            "latency",
            "p50",
            count,
            "ms",
            halves,
            floors=floors,
            floor_is=f"{COMMITS} raw durable commits + {EXCHANGES} bare exchanges",
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


def _change(one: Device, other: Device, number: int) -> None:
    notes: Collection[Any] = one.database.collection(COLLECTION)
    entity_id = notes.add(value(number))
    one.sync()
    other.sync()
    assert entity_id in other.database.collection(COLLECTION)
