"""``idle``: a cycle with nothing to do, against a bare HTTP exchange of the same bytes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator

from benchmarks.figures import Figure, Target, figure, timed
from benchmarks.floors import BARE_EXCHANGE
from benchmarks.payloads import entities
from benchmarks.world import BareExchange, World, load

SIZES = (1000,)
REPEATS = 300
TARGET = Target("ratio", most=1.6)


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: how many entities are in step."""
    for count in sizes:
        cycles, floors = [], []
        repeats = min(REPEATS, count)
        with (
            world.server() as server,
            world.bare_server() as bare_url,
            world.device(server, "idle") as device,
        ):
            load(device.database, entities(count))
            device.sync()
            device.client.recording = True
            device.sync()
            device.client.recording = False
            (exchange,) = device.client.exchanges
            with contextlib.closing(BareExchange(bare_url, exchange)) as bare:
                for _ in range(rounds):
                    floors.append(statistics.median(timed(bare) for _ in range(repeats)) * 1e6)
                    cycles.append(
                        statistics.median(timed(device.sync) for _ in range(repeats)) * 1e6
                    )
        size = len(exchange.body) + len(exchange.response.body)
        yield figure(
            "idle",
            "cycle with nothing to do",
            count,
            "us",
            cycles,
            floors=floors,
            floor_is=BARE_EXCHANGE,
            target=TARGET,
            note=f"{size} bytes of bodies in one exchange",
        )
