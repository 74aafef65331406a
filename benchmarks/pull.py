"""``pull``: a fresh device, in a process of its own, pulls everything a server has."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, Target, figure
from benchmarks.floors import RAW_BATCHES, batched_rate
from benchmarks.payloads import entities
from benchmarks.world import MemoryWatch, Server, World, environment

SIZES = (10_000, 100_000, 1_000_000)
TARGET = Target("ratio", least=0.20)
TARGET_SIZE = 100_000
MEMORY_SIZE = 1_000_000
MEMORY_TARGET = Target("value", most=250.0)
_MB = 1e6


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        rates: list[float] = []
        floors: list[float] = []
        memory: dict[str, list[float]] = {}
        pairs = entities(count)
        for _ in range(rounds):
            floors.append(batched_rate(world.directory, pairs))
            # A new server each time, so that its memory is that of this one sync.
            with world.server({"pull": world.server_database(count)}) as server:
                rates.append(count / _first_sync(world, server, count, memory))
        yield figure(
            "pull",
            "first sync",
            count,
            "entities/s",
            rates,
            floors=floors,
            floor_is=RAW_BATCHES,
            target=TARGET if count == TARGET_SIZE else None,
        )
        yield figure("pull", "time per million", count, "s", [1e6 / rate for rate in rates])
        for name, values in memory.items():
            target = MEMORY_TARGET if count == MEMORY_SIZE else None
            yield figure("pull", name, count, "MB", values, target=target)


def _first_sync(world: World, server: Server, count: int, memory: dict[str, list[float]]) -> float:
    path = world.path("device")
    token_file = world.path("token")
    token_file.write_text(server.token)
    arguments = [server.url, "pull", str(path), str(token_file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.device", *arguments],
        cwd=Path(__file__).parent.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    with MemoryWatch([process.pid, server.pid]) as watch:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("the device process failed")
    for name, pid in (("device", process.pid), ("server", server.pid)):
        memory.setdefault(f"{name} memory, own", []).append(watch.own[pid] / _MB)
        memory.setdefault(f"{name} memory, with file", []).append(watch.total[pid] / _MB)
    shutil.rmtree(path)
    answer = json.loads(output)
    assert answer["entities"] == count, "the device has what the server has"
    seconds: float = answer["seconds"]
    return seconds
