"""``workers``: two workers against one, in turn: pulls of 50 databases, pushes to 50, pushes to
one; and how much of a core the load generator takes meanwhile, which the workers do not have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from benchmarks.figures import Figure, Target, figure
from benchmarks.load import Outcome
from benchmarks.many import THERE, Histories, generate, make_databases, plan_of
from benchmarks.payloads import entities
from benchmarks.world import Server, World

SIZES = (10_000,)
WORKERS = 2
#: What is asked, of how many databases, with which share of pushes, and what is promised with as
#: many cores as workers.
LOADS = (
    ("pull, 50 databases", 50, 0.0, Target("ratio", least=1.5)),
    ("push, 50 databases", 50, 1.0, Target("ratio", least=1.4)),
    ("push, 1 database", 1, 1.0, Target("ratio", least=0.9)),
)


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: requests in each round."""
    for count in sizes:
        for what, databases, mix, target in LOADS:
            yield from _load(world, count, rounds, what, databases, mix, target)


def _load(
    world: World, count: int, rounds: int, what: str, databases: int, mix: float, target: Target
) -> Iterator[Figure]:
    pairs = entities(min(THERE, count))
    one_paths, one_histories = make_databases(world, databases, pairs)
    many_paths, many_histories = make_databases(world, databases, pairs)
    with world.server(one_paths) as one, world.server(many_paths, workers=WORKERS) as many:

        def measure(server: Server, histories: Histories) -> Outcome:
            return generate(plan_of(server.url, server, histories, count, mix))

        outcomes = [
            (measure(one, one_histories), measure(many, many_histories)) for _ in range(rounds)
        ]
    yield figure(
        "workers",
        f"{what}: requests",
        count,
        "requests/s",
        [count / together.seconds for _, together in outcomes],
        floors=[count / alone.seconds for alone, _ in outcomes],
        floor_is="one worker",
        target=target if (os.cpu_count() or 1) >= WORKERS else None,
    )
    yield figure(
        "workers",
        f"{what}: load generator",
        count,
        "% of a core",
        [100 * together.cpu / together.seconds for _, together in outcomes],
        floors=[100 * alone.cpu / alone.seconds for alone, _ in outcomes],
        floor_is="with one worker",
    )
