"""``size``: bytes on disk for each entity, and bytes on the wire for each operation.

Nothing is timed, and the same bytes come out every time, so there is one round whatever is asked.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator

from benchmarks.figures import Figure, figure
from benchmarks.floors import BATCH, RawLmdb, batches
from benchmarks.payloads import entities, payload
from benchmarks.world import COMPRESSIONS, World, disk_bytes, load

SIZES = (20_000,)
UPDATE_ROUNDS = 20
#: Each round of updates changes one entity in this many.
UPDATE_SHARE = 10
#: Cycles without a change after which a device is looked at: they give back what a push held.
IDLE_CYCLES = 2
LOADED = "after load"
UPDATED = f"after {UPDATE_ROUNDS} rounds of updates"


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        pairs = entities(count)
        payload_bytes = sum(len(data) for _, data in pairs) / count
        yield figure("size", "payload", count, "bytes", [payload_bytes])
        yield from _disk(world, count, pairs)
        yield from _wire(world, count, pairs)


def _disk(world: World, count: int, pairs: list[tuple[bytes, bytes]]) -> Iterator[Figure]:
    updates = list(_updates(pairs))
    floors = _raw_sizes(world, pairs, updates)
    with (
        world.server() as server,
        world.device(server, "size") as writer,
        world.device(server, "size") as reader,
    ):
        load(writer.database, pairs)
        for when, floor in floors.items():
            for changes in updates if when != LOADED else ([],):
                load(writer.database, changes)
                writer.sync()
            reader.sync()
            for _ in range(IDLE_CYCLES):
                writer.sync()
            places = {
                "writing device": writer.path,
                "reading device": reader.path,
                "server": server.path_of("size"),
            }
            for who, path in places.items():
                yield figure(
                    "size",
                    f"{who} {when}",
                    count,
                    "bytes/entity",
                    [disk_bytes(path) / count],
                    floors=[floor / count],
                    floor_is="raw LMDB with the same writes",
                )


def _updates(pairs: list[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    pick = random.Random(len(pairs))
    ids = [entity_id for entity_id, _ in pairs]
    for _ in range(UPDATE_ROUNDS):
        chosen = pick.sample(ids, max(1, len(ids) // UPDATE_SHARE))
        yield [(entity_id, payload(pick.randrange(10**9))) for entity_id in chosen]


def _raw_sizes(
    world: World, pairs: list[tuple[bytes, bytes]], updates: list[list[tuple[bytes, bytes]]]
) -> dict[str, int]:
    path = world.path("raw")
    raw = RawLmdb(path)
    raw.put_batches(pairs)
    sizes = {LOADED: disk_bytes(path)}
    places = {entity_id: number for number, (entity_id, _) in enumerate(pairs, 1)}
    for changes in updates:
        for batch in batches(changes, BATCH):
            raw.replace(batch, places)
    sizes[UPDATED] = disk_bytes(path)
    raw.close()
    shutil.rmtree(path)
    return sizes


def _wire(world: World, count: int, pairs: list[tuple[bytes, bytes]]) -> Iterator[Figure]:
    for packing in COMPRESSIONS:
        with (
            world.server() as server,
            world.device(server, "wire", compression=packing) as writer,
            world.device(server, "wire", compression=packing) as reader,
        ):
            load(writer.database, pairs)
            for what, device in (("push", writer), ("pull", reader)):
                device.client.recording = True
                device.sync()
                size = sum(
                    len(exchange.body) + len(exchange.response.body)
                    for exchange in device.client.exchanges
                )
                name = f"{what} on the wire, {packing}"
                yield figure("size", name, count, "bytes/op", [size / count])
