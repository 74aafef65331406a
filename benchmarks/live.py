"""``live``: what devices that listen for news wait for, what they cost a server that has none, and
how they come back to one that was restarted.

``arriving`` is between two real engines; in the others a process of its own does over the wire what
engines would (``fleet``). That process takes a core of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec import json

from benchmarks.figures import Figure, Target, figure, percentile, timed
from benchmarks.fleet import Arrivals, Plan, Return
from benchmarks.floors import Singles
from benchmarks.latency import COMMITS, ENTITIES, EXCHANGES, FLOOR_IS, TAIL_TARGET, TARGET
from benchmarks.many import Histories, make_databases
from benchmarks.payloads import COLLECTION, entities, value
from benchmarks.world import (
    BareExchange,
    Exchange,
    Server,
    World,
    environment,
    memory_bytes,
    processor_s,
)

#: N: changes from A to B, and live devices among which changes go; fifty times as many wait for
#: nothing, and ten times as many come back.
SIZES = (200,)
WAITING = 50
RETURNING = 10
DATABASES = 50
#: Of all writers together, for so many seconds with 200 devices.
CHANGES_PER_S = 50.0
SECONDS = 10.0
#: Seconds for which nothing happens: one sign of life for each stream.
IDLE_S = 15.0
HEARD_TARGET = Target("value", most=25.0)
#: Of 10,000 streams; fewer have so much less.
MEMORY_MB = 160.0
IDLE_PERCENT = 1.0
BACK_TARGET = Target("value", most=15.0)
OTHERS_TARGET = Target("value", most=0.0)
#: Rounds of what takes its time by the clock.
RETURNS = 3
_PATIENCE_S = 30.0
#: Files that a server may need beside two connections for each stream, and a tenth more of them.
_OTHER_FILES = 640
#: Below where the system takes ports for connections from: one of a device that comes back could be
#: the server's own.
_PORTS = (20_000, 32_000)
_MB = 1e6


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        yield from arriving(world, count, rounds)
        for databases in (DATABASES, 1):
            yield from hearing(world, count, rounds, databases)
        yield from waiting(world, count)
        yield from returning(world, count, rounds)


# ---------------------------------------------------------------- from one engine to another


def arriving(world: World, count: int, rounds: int) -> Iterator[Figure]:
    """From a commit on one device until the observer of another is called."""
    halves: list[float] = []
    tails: list[float] = []
    floors: list[float] = []
    with (
        world.server() as server,
        world.bare_server() as bare_url,
        _device(world, server, "live") as one,
        _device(world, server, "live") as other,
        contextlib.closing(Singles(world.directory, entities(ENTITIES))) as singles,
        contextlib.closing(BareExchange(bare_url, _a_push(world, server))) as bare,
    ):
        one.ask(f"load {ENTITIES}")
        for _ in range(rounds):
            commit = statistics.median(singles.seconds(count))
            bare_s = statistics.median(timed(bare) for _ in range(count))
            floors.append((COMMITS * commit + EXCHANGES * bare_s) * 1000)
            times = _changes(one, other, count)
            halves.append(percentile(times, 0.5) * 1000)
            tails.append(percentile(times, 0.99) * 1000)
    yield figure(
        "live",
        "from a commit to another's observer: p50",
        count,
        "ms",
        halves,
        floors=floors,
        floor_is=FLOOR_IS,
        target=TARGET,
    )
    yield figure(
        "live",
        "from a commit to another's observer: p99",
        count,
        "ms",
        tails,
        floors=halves,
        floor_is="p50",
        target=TAIL_TARGET,
    )


def _changes(one: Process, other: Process, count: int) -> list[float]:
    """Seconds of each of ``count`` changes on ``one`` until ``other`` has observed it."""
    began = json.decode(one.ask(f"commit {count}"), type=dict[str, float])
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        seen = json.decode(other.ask("seen"), type=dict[str, float])
        if began.keys() <= seen.keys():
            return [seen[entity] - at for entity, at in began.items()]
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(began.keys() - seen.keys())} changes did not arrive")
        time.sleep(0.05)


def _a_push(world: World, server: Server) -> Exchange:
    """The largest of the exchanges that one change takes, by a device that is up to date."""
    with world.device(server, "bare") as device:
        for number in range(2):
            device.client.recording = number == 1
            device.database.collection(COLLECTION).add(value(number))
            device.sync()
        return max(device.client.exchanges, key=lambda each: len(each.body))


# ---------------------------------------------------------------- among many


def hearing(world: World, count: int, rounds: int, databases: int) -> Iterator[Figure]:
    """From sending a push until others that listen have the page with it."""
    paths, histories = _databases(world, databases)
    seconds = SECONDS * min(1.0, count / SIZES[0])
    outcomes = []
    with world.server(paths, **_settings(count)) as server:
        plan = _plan(world, server, histories, count)
        plan.changes_per_s, plan.seconds = CHANGES_PER_S, seconds
        with _fleet(plan) as fleet:
            for _ in range(rounds):
                took = processor_s(server.pid)
                outcome = json.decode(fleet.ask("push"), type=Arrivals)
                outcomes.append((outcome, processor_s(server.pid) - took))
    several = f"{databases} database{'s' if databases > 1 else ''}"
    what = f"live devices of {several}, {CHANGES_PER_S:g} changes/s"
    came = sum(each.pulls + each.carried for each, _ in outcomes)
    pages = sum(len(each.times) for each, _ in outcomes) / came
    asked = sum(each.pulls for each, _ in outcomes) / came
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        yield figure(
            "live",
            f"{what}: {name}",
            count,
            "ms",
            [percentile(each.times, share) * 1000 for each, _ in outcomes],
            target=HEARD_TARGET if databases > 1 and share == 0.99 else None,
            note=f"{pages:.3g} changes in a page; {asked:.0%} of them were asked for",
        )
    yield figure(
        "live",
        f"{what}: the server",
        count,
        "% of a core",
        [100 * cpu / each.seconds for each, cpu in outcomes],
    )
    yield figure(
        "live",
        f"{what}: the devices' process",
        count,
        "% of a core",
        [100 * each.cpu / each.seconds for each, _ in outcomes],
    )


# ---------------------------------------------------------------- with nothing to hear


def waiting(world: World, count: int) -> Iterator[Figure]:
    """What streams that wait take of a server in which nothing happens. One round."""
    streams = min(WAITING * count, _streams_max())
    paths, histories = _databases(world, DATABASES)
    with world.server(paths, **_settings(streams)) as server:
        # What the first requests cost, and open databases, is not what a stream costs.
        warm = min(4 * DATABASES, streams // 2)
        first, rest = (_plan(world, server, histories, each) for each in (warm, streams - warm))
        first.pulls = rest.pulls = False
        with _fleet(first):
            before = memory_bytes(server.pid)[1]
            with _fleet(rest):
                grown = max(memory_bytes(server.pid)[1] - before, 1) / (streams - warm)
                seconds = IDLE_S * min(1.0, count / SIZES[0])
                # Limits of the requests that began the streams end unused within as many seconds.
                time.sleep(seconds)
                took = processor_s(server.pid)
                time.sleep(seconds)
                took = processor_s(server.pid) - took
    what = f"{streams:,} waiting streams"
    bound, idle = (
        Target("value", most=round(most * streams / 10_000, 3))
        for most in (MEMORY_MB, IDLE_PERCENT)
    )
    yield figure("live", f"{what}: memory, own", count, "MB", [grown * streams / _MB], target=bound)
    yield figure("live", f"{what}: for each", count, "kB", [grown / 1000])
    yield figure("live", f"{what}: idle", count, "% of a core", [100 * took / seconds], target=idle)


def _streams_max() -> int:
    """As many as this system lets one process have files for: a server keeps as many connections
    for requests as for streams."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (hard - _OTHER_FILES) * 10 // 22)


# ---------------------------------------------------------------- after a restart


def returning(world: World, count: int, rounds: int) -> Iterator[Figure]:
    """From the restart of a server until all that were live are live again."""
    devices = RETURNING * count
    for name, by in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        outcomes = [_restart(world, devices, by) for _ in range(min(rounds, RETURNS))]
        what = f"{devices:,} devices, server {name}"
        said: dict[int, int] = {}
        for each in outcomes:
            for status, times in each.statuses.items():
                said[status] = said.get(status, 0) + times
        polling = sum(each.polling for each in outcomes)
        unreached = sum(each.unreached for each in outcomes)
        yield figure(
            "live",
            f"{what}: all back",
            count,
            "s",
            [each.seconds for each in outcomes],
            target=BACK_TARGET,
            note=f"answers by status: {said}; tries without one: {unreached}; polling: {polling}",
        )
        halves = [percentile(each.times, 0.5) for each in outcomes]
        yield figure("live", f"{what}: half of them back", count, "s", halves)
        others = [
            float(sum(times for status, times in each.statuses.items() if status not in (200, 503)))
            for each in outcomes
        ]
        yield figure(
            "live",
            f"{what}: other answers than 200, 503",
            count,
            "answers",
            others,
            target=OTHERS_TARGET,
        )


def _restart(world: World, devices: int, by: signal.Signals) -> Return:
    paths, histories = _databases(world, DATABASES)
    data_dir, port = world.new_data_dir(paths), _free_port()
    settings = _settings(devices)
    with contextlib.ExitStack() as devices_end:
        with world.serving(data_dir, port=port, **settings) as server:
            fleet = devices_end.enter_context(_fleet(_plan(world, server, histories, devices)))
            assert fleet.ask("return") == b"watching\n"
            os.kill(server.pid, by)
        with world.serving(data_dir, port=port, **settings):
            outcome = json.decode(fleet.answer(), type=Return)
            devices_end.close()  # the devices go before the server does
    return outcome


def _free_port() -> int:
    while True:
        port = random.randrange(*_PORTS)
        with socket.socket() as bound, contextlib.suppress(OSError):
            bound.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------- processes


class Process:
    """One that is asked by lines and answers by lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, line: str) -> bytes:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of devices has ended; what it said is above")
        return line


@contextlib.contextmanager
def process(arguments: list[str]) -> Iterator[Process]:
    """A module of this project with ``arguments``, killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env=environment(),
    ) as child:
        try:
            yield Process(child)
        finally:
            child.kill()


@contextlib.contextmanager
def _device(world: World, server: Server, db_id: str) -> Iterator[Process]:
    token_file = world.path("token")
    token_file.write_text(server.token)
    arguments = [server.url, db_id, str(world.path("device")), str(token_file)]
    with process(["benchmarks.background", *arguments]) as device:
        assert device.answer() == b"live\n"
        yield device


@contextlib.contextmanager
def _fleet(plan: Plan) -> Iterator[Process]:
    with process(["benchmarks.fleet"]) as fleet:
        assert fleet.ask(json.encode(plan).decode()) == b"ready\n"
        yield fleet


def _databases(world: World, databases: int) -> tuple[dict[str, Path], Histories]:
    return make_databases(world, databases, entities(100))


def _plan(world: World, server: Server, histories: Histories, devices: int) -> Plan:
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    secret = world.secret_file.read_text()
    return Plan(parts.hostname, parts.port, secret, histories, devices)


def _settings(streams: int) -> dict[str, Any]:
    """Of a server that takes so many streams, and as many connections besides."""
    return {"connections_max": max(2000, 2 * streams), "live_max": max(1000, streams)}


__all__ = ["SIZES", "arriving", "hearing", "returning", "run", "waiting"]
