"""``nodes``: two nodes on one PostgreSQL against one, in turns: pulls of 50 databases and pushes to
50, with the requests of a database sent to any node, and all of them to the same; and what a
request takes of the processors, because PostgreSQL and the load need them too.

PostgreSQL is a server of the benchmark's own, as with ``--store postgres``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks import stores
from benchmarks.figures import Figure, Target, figure
from benchmarks.many import THERE, Histories, generate, make_databases, plan_of
from benchmarks.payloads import entities
from benchmarks.world import Server, World

SIZES = (4_000,)
DATABASES = 50
NODES = 2
#: What is asked, with which share of pushes, and what is promised where cores allow.
LOADS = (
    ("pull", 0.0, Target("ratio", least=1.5)),
    ("push", 1.0, Target("ratio", least=1.5)),
)


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: requests in each round."""
    world.closing(stores.begin(world))
    for count in sizes:
        for what, mix, target in LOADS:
            yield from _load(world, count, rounds, what, mix, target)


def _load(
    world: World, count: int, rounds: int, what: str, mix: float, target: Target
) -> Iterator[Figure]:
    paths, histories = make_databases(world, DATABASES, entities(min(THERE, count)))
    names = list(histories)
    halves = [{name: histories[name] for name in names[at::NODES]} for at in range(NODES)]
    with ExitStack() as stack:
        place = stack.enter_context(stores.placed(world, paths))
        one, other = (
            stack.enter_context(world.serving(place.directory, place.address)) for _ in range(NODES)
        )
        spread: list[float] = []
        routed: list[float] = []
        alone: list[float] = []
        busy: list[float] = []
        for _ in range(rounds):
            alone.append(_rate([(one, half) for half in halves], count, mix)[0])
            spread.append(_rate([(one, histories), (other, histories)], count, mix)[0])
            rate, used = _rate(list(zip((one, other), halves, strict=True)), count, mix)
            routed.append(rate)
            busy.append(1000 * used / rate)
    cores = os.cpu_count() or 1
    for how, rates in (("to any node", spread), ("each database to one node", routed)):
        yield figure(
            "nodes",
            f"{what}, {DATABASES} databases, {how}",
            count,
            "requests/s",
            rates,
            floors=alone,
            floor_is="one node",
            target=target if cores > NODES + 1 else None,
            note=f"{cores} cores, of which PostgreSQL and the load take their share",
        )
    yield figure(
        "nodes",
        f"{what}, {DATABASES} databases: all processors, each request",
        count,
        "ms",
        busy,
        note=f"so {cores} cores allow {1000 * cores / statistics.median(busy):.0f} requests/s",
    )


def _rate(loads: list[tuple[Server, Histories]], count: int, mix: float) -> tuple[float, float]:
    """Requests a second, and how many cores were at work."""
    plans = [
        plan_of(server.url, server, histories, count // len(loads), mix)
        for server, histories in loads
    ]
    for plan in plans:
        plan.connections //= len(loads)
    idle, began = _idle_s(), time.perf_counter()
    with ThreadPoolExecutor(len(plans)) as threads:
        outcomes = list(threads.map(generate, plans))
    took = time.perf_counter() - began
    used = (os.cpu_count() or 1) - (_idle_s() - idle) / took
    return count / max(outcome.seconds for outcome in outcomes), used


def _idle_s() -> float:
    with open("/proc/stat") as stat:
        fields = stat.readline().split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
