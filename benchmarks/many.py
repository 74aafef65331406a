"""``many``: 200 connections at once, pushing one transaction a request, pulling, and both."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import json

from benchmarks.figures import Figure, Target, figure
from benchmarks.floors import RAW_SINGLES, Singles
from benchmarks.load import Outcome, Plan
from benchmarks.payloads import entities
from benchmarks.world import Server, World, environment, load
from entidb.db import Database, Role

SIZES = (20_000,)
CONNECTIONS = 200
SINGLES = 500
#: Entities that are there to be pulled, in each database.
THERE = 2000
#: What a disk that takes 2,500 single commits a second has to be good for; a faster one helps a
#: single commit more than a group of many, which is bound by the processor.
PUSH_TARGET = Target("value", least=4000.0)
TAIL_TARGET = Target("value", most=120.0)
#: Of databases: what they are asked by.
Histories = dict[str, tuple[str, int]]
MIXES = {"push": 1.0, "pull": 0.0, "mixed": 0.5}


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: requests in each round."""
    for count in sizes:
        for databases in (1, 50):
            yield from _databases(world, count, rounds, databases)


def make_databases(
    world: World, databases: int, pairs: list[tuple[bytes, bytes]]
) -> tuple[dict[str, Path], Histories]:
    """So many of them, each with ``pairs`` in it: where they are; their histories and heads."""
    paths, histories = {}, {}
    for name in [f"db-{number}" for number in range(databases)]:
        paths[name] = world.path("many")
        with Database.open(paths[name], role=Role.SERVER) as database:
            load(database, pairs)
            assert database.history is not None
            histories[name] = (database.history.hex(), database.sequence)
    return paths, histories


def _databases(world: World, count: int, rounds: int, databases: int) -> Iterator[Figure]:
    pairs = entities(min(THERE, count))
    paths, histories = make_databases(world, databases, pairs)
    with (
        world.server(paths) as server,
        world.bare_server() as bare_url,
        contextlib.closing(Singles(world.directory, pairs)) as raw,
    ):
        for what, mix in MIXES.items():
            plan = plan_of(server.url, server, histories, count, mix)
            bare_plan = plan_of(bare_url, server, histories, count, mix)
            bare_plan.bare = True
            rounds_done = [_round(plan, bare_plan, raw, count) for _ in range(rounds)]
            yield from _figures(what, databases, count, rounds_done)


#: Raw commits a second, what the bare server did, what ours did.
Round = tuple[float, Outcome, Outcome]


def _round(plan: Plan, bare_plan: Plan, raw: Singles, count: int) -> Round:
    singles = min(SINGLES, count)
    rate = singles / sum(raw.seconds(singles))
    return rate, generate(bare_plan), generate(plan)


def _figures(what: str, databases: int, count: int, rounds: list[Round]) -> Iterator[Figure]:
    where = f"{what}, {databases} database{'s' if databases > 1 else ''}"
    promised = what == "push" and databases == 1
    outcomes = [ours for _, _, ours in rounds]
    rates = [count / outcome.seconds for outcome in outcomes]
    if what != "pull":
        yield figure(
            "many",
            f"{where}: requests",
            count,
            "requests/s",
            rates,
            floors=[rate for rate, _, _ in rounds],
            floor_is=RAW_SINGLES,
            target=PUSH_TARGET if promised else None,
        )
    yield figure(
        "many",
        f"{where}: against bare",
        count,
        "requests/s",
        rates,
        floors=[count / bare.seconds for _, bare, _ in rounds],
        floor_is="the same requests, a server with nothing behind",
    )
    for name, values in (
        ("p50", [outcome.p50 * 1000 for outcome in outcomes]),
        ("p99", [outcome.p99 * 1000 for outcome in outcomes]),
    ):
        target = TAIL_TARGET if promised and name == "p99" else None
        yield figure("many", f"{where}: {name}", count, "ms", values, target=target)


def plan_of(url: str, server: Server, histories: Histories, count: int, mix: float) -> Plan:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return Plan(parts.hostname, parts.port, server.token, histories, CONNECTIONS, count, mix)


def generate(plan: Plan) -> Outcome:
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=json.encode(plan),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env=environment(),
        check=True,
    )
    return json.decode(answer.stdout, type=Outcome)
