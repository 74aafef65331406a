"""``incremental``: a hundred changes among many entities, pushed by one device, pulled by another.

The sizes take turns in every round, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.figures import Figure, Target, figure, timed
from benchmarks.floors import RawLmdb
from benchmarks.payloads import COLLECTION, entities, payload
from benchmarks.world import Device, World, load
from entidb.db import Collection

SIZES = (10_000, 100_000, 1_000_000)
CHANGES = 100
#: Each round is short, and takes turns: more of them cost nothing.
ROUNDS_PER_ROUND = 4
TIME_TARGET = Target("value", most=12.0)
GROWTH_TARGET = Target("ratio", most=1.25)


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    times: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        floors = {count: stack.enter_context(_floor(world, count)) for count in sizes}
        databases = {f"n{count}": world.server_database(count) for count in sizes}
        server = stack.enter_context(world.server(databases))
        pairs: list[tuple[int, Device, Device, list[bytes]]] = []
        for count in sizes:
            with world.device(server, f"n{count}") as first:
                first.sync()
                copies = [world.copy_of(first.path) for _ in range(2)]
            one, other = (
                stack.enter_context(world.device(server, f"n{count}", copy)) for copy in copies
            )
            known = [raw for raw, _ in _notes(one).payloads()]
            pairs.append((count, one, other, known))
        for number in range(rounds * ROUNDS_PER_ROUND + 1):
            for count, one, other, known in pairs:
                raw = floors[count](number)
                pushed, pulled = _round(one, other, known, number)
                if number:  # the first pays for handshakes and cold pages
                    times.setdefault(("raw", count), []).append(raw * 1000)
                    times.setdefault(("push", count), []).append(pushed * 1000)
                    times.setdefault(("pull", count), []).append(pulled * 1000)
    for what in ("push", "pull"):
        for count in sizes:
            yield figure(
                "incremental",
                f"{what} {CHANGES} changes",
                count,
                "ms",
                times[what, count],
                floors=times["raw", count],
                floor_is="raw LMDB, the same changes in one durable commit",
                target=TIME_TARGET,
            )
    for what in ("push", "pull", "raw"):
        yield figure(
            "incremental",
            f"{what} growth with size",
            sizes[-1],
            "ms",
            times[what, sizes[-1]],
            floors=times[what, sizes[0]],
            floor_is=f"the same among {sizes[0]:,}",
            target=None if what == "raw" else GROWTH_TARGET,
        )


@contextlib.contextmanager
def _floor(world: World, count: int) -> Iterator[Callable[[int], float]]:
    """Seconds of one durable commit of that many changes in a raw store of that size."""
    path = world.path("raw")
    raw = RawLmdb(path)
    pairs = entities(count)
    raw.put_batches(pairs)
    ids = [entity_id for entity_id, _ in pairs]
    places = {entity_id: number for number, entity_id in enumerate(ids, 1)}

    def commit(number: int) -> float:
        changes = _changes(ids, random.Random(number))
        return timed(lambda: raw.replace(changes, places))

    yield commit
    raw.close()
    shutil.rmtree(path)


def _changes(ids: list[bytes], pick: random.Random) -> list[tuple[bytes, bytes]]:
    chosen = pick.sample(ids, min(CHANGES, len(ids)))
    return [(entity_id, payload(pick.randrange(10**9))) for entity_id in chosen]


def _round(one: Device, other: Device, known: list[bytes], number: int) -> tuple[float, float]:
    changes = _changes(known, random.Random(number))
    load(one.database, changes)
    pushed = timed(one.sync)
    pulled = timed(other.sync)
    changed = [uuid.UUID(bytes=entity_id) for entity_id, _ in changes]
    assert _notes(one).get_many(changed) == _notes(other).get_many(changed)
    return pushed, pulled


def _notes(device: Device) -> Collection[Any]:
    return device.database.collection(COLLECTION)
