"""``push``: transactions that wait on a device, pushed to an empty server until settled."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.figures import Figure, Target, figure, timed
from benchmarks.floors import RAW_BATCHES, batched_rate
from benchmarks.payloads import entities
from benchmarks.world import World

SIZES = (10_000, 100_000)
TARGETS = {"v7": Target("ratio", least=0.06), "random": Target("ratio", least=0.25)}
TARGET_SIZE = 100_000


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        for kind, target in TARGETS.items():
            rates, floors = [], []
            pairs = entities(count, kind)
            with world.server() as server:
                for number in range(rounds):
                    floors.append(batched_rate(world.directory, pairs))
                    path = world.pending_device(count, kind)
                    with world.device(server, f"push-{number}", path) as device:
                        rates.append(count / timed(device.sync))
                        assert device.engine.status().pending == 0
            yield figure(
                "push",
                f"{kind} ids",
                count,
                "entities/s",
                rates,
                floors=floors,
                floor_is=RAW_BATCHES,
                target=target if count == TARGET_SIZE else None,
            )
