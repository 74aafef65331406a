"""``noisy``: 49 quiet databases, asked now and then, alone and beside one that is flooded."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from msgspec import json

from benchmarks.figures import Figure, Target, figure, percentile
from benchmarks.load import Connection, Plan, Prepared, check, prepare
from benchmarks.many import THERE, Histories, make_databases
from benchmarks.payloads import entities
from benchmarks.world import Server, World, environment

SIZES = (1_000,)
DATABASES = 50
NOISY = "db-0"
#: Connections that flood, each with its next push as soon as the last one is answered.
FLOODING = 50
#: Pushes that are prepared for the flood.
FLOOD_PREPARED = 30_000
#: Seconds between two requests to the quiet databases, all together.
PAUSE_S = 0.005
TARGET = Target("ratio", most=2.0)


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: requests to the quiet databases in each round."""
    for count in sizes:
        pairs = entities(min(THERE, count))
        paths, histories = make_databases(world, DATABASES, pairs)
        with world.server(paths) as server:
            _quiet(server, histories, 2 * DATABASES)  # opening them is not what is measured
            alone, beside = [], []
            for _ in range(rounds):
                alone.append(_quiet(server, histories, count))
                with _flood(server, histories):
                    beside.append(_quiet(server, histories, count))
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            yield figure(
                "noisy",
                f"quiet databases beside a flooded one: {name}",
                count,
                "ms",
                [percentile(times, share) * 1000 for times in beside],
                floors=[percentile(times, share) * 1000 for times in alone],
                floor_is="without the flood",
                target=TARGET if share == 0.99 else None,
            )


def _plan(server: Server, histories: Histories, count: int, connections: int) -> Plan:
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    mix = 1.0 if NOISY in histories else 0.5
    return Plan(parts.hostname, parts.port, server.token, histories, connections, count, mix)


def _quiet(server: Server, histories: Histories, count: int) -> list[float]:
    """How long each request to the quiet databases took: one after the other, with pauses."""
    quiet = {name: each for name, each in histories.items() if name != NOISY}
    plan = _plan(server, quiet, count, 1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_now_and_then(plan))


async def _now_and_then(plan: Plan) -> list[float]:
    loop = asyncio.get_running_loop()
    times = []
    todo: deque[Prepared] = deque()
    done: asyncio.Future[None] = loop.create_future()
    connection = Connection(todo, done)
    await loop.create_connection(lambda: connection, plan.host, plan.port)
    for prepared in prepare(plan):
        todo.append(prepared)
        connection.renew(done := loop.create_future())
        connection.send_next()
        await done
        seconds, request, raw = connection.answers.pop()
        check(request, raw, bare=False)
        times.append(seconds)
        await asyncio.sleep(PAUSE_S)
    connection.transport.abort()
    return times


@contextlib.contextmanager
def _flood(server: Server, histories: Histories) -> Iterator[None]:
    """Pushes to one database, from a process of its own, as long as the block runs."""
    plan = _plan(server, {NOISY: histories[NOISY]}, FLOOD_PREPARED, FLOODING)
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.noisy"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env=environment(),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.encode(plan))
            process.stdin.close()
            assert process.stdout.readline() == b"flooding\n"
            yield
            assert process.poll() is None, "the flood ended before the quiet ones were asked"
        finally:
            process.kill()


async def _pour(plan: Plan) -> None:
    """The prepared pushes, as fast as they are answered."""
    loop = asyncio.get_running_loop()
    prepared = prepare(plan)
    connections = []
    for number in range(plan.connections):
        todo = deque(prepared[number :: plan.connections])
        connection = Connection(todo, loop.create_future())
        await loop.create_connection(lambda c=connection: c, plan.host, plan.port)  # type: ignore[misc]
        connections.append(connection)
    for connection in connections:
        connection.send_next()
    print("flooding", flush=True)
    await loop.create_future()


def main() -> None:
    """The flood. Whoever started it kills it."""
    plan = json.decode(sys.stdin.buffer.read(), type=Plan)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_pour(plan))


if __name__ == "__main__":
    main()
