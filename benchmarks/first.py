"""``first``: a fresh device, in a process of its own, begins with an image of a server's database,
in segments, and without; killed in its middle; and over a slow line.

A database below ``MIN_ENTITIES`` has no image, and a device pulls pages; so both figures are there
for all sizes, and the others where there is an image.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Target, figure
from benchmarks.floors import RAW_BATCHES, batched_rate
from benchmarks.pacing import Line
from benchmarks.payloads import entities
from benchmarks.world import MemoryWatch, Server, World, disk_bytes, environment, processor_s
from entidb import packing
from entidb.protocol import HandshakeRequest, SnapshotRequest
from entidb.sync import HttpTransport

SIZES = (10_000, 100_000, 1_000_000)
MIN_ENTITIES = 50_000
TARGET = Target("ratio", least=0.35)
TARGET_SERVER = Target("value", most=0.2)
TARGET_AGAIN = Target("value", most=1.1)
TARGET_LINE = Target("ratio", most=1.15)
TARGET_MEMORY = Target("value", most=100.0)
#: 20 Mbit/s, and 50 ms from one end to the other and back.
LINE_BYTES_PER_S = 20e6 / 8
LINE_DELAY_S = 0.025
_MB = 1e6
_IMAGE_S = 600.0
_DB = "first"


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        least = 1 if count < 1_000 else MIN_ENTITIES
        databases = {_DB: world.server_database(count)}
        with world.server(databases, segments_min_entities=least) as server:
            if count >= least:
                _wait_for_image(server)
            yield from _figures(world, server, count, rounds, image=count >= least)


def _figures(
    world: World, server: Server, count: int, rounds: int, *, image: bool
) -> Iterator[Figure]:
    pairs = entities(count)
    rates, pages, floors, work = [], [], [], []
    memory: dict[str, list[float]] = {}
    for _ in range(rounds):
        floors.append(batched_rate(world.directory, pairs))
        began = processor_s(server.pid)
        rates.append(count / _sync(world, server, server.url, count, memory=memory)["seconds"])
        work.append(1e6 * (processor_s(server.pid) - began) / count)
        pages.append(count / _sync(world, server, server.url, count, segments=False)["seconds"])
    yield figure(
        "first",
        "first sync",
        count,
        "entities/s",
        rates,
        floors=floors,
        floor_is=RAW_BATCHES,
        target=TARGET if image else None,
    )
    yield figure("first", "first sync by pages", count, "entities/s", pages)
    target = TARGET_SERVER if image else None
    yield figure("first", "server, for one more device", count, "us/entity", work, target=target)
    for name, values in memory.items():
        most = TARGET_MEMORY if image and name.endswith("own") else None
        yield figure("first", name, count, "MB", values, target=most)
    yield from _over_lines(world, server, count, image=image)


def _over_lines(world: World, server: Server, count: int, *, image: bool) -> Iterator[Figure]:
    """What does not get better by more rounds: bytes, and a line so slow that it is all there is
    to wait for."""
    with Line(server.url) as line:
        whole = _sync(world, server, line.url, count)
        on_wire = line.down
    yield figure("first", "bytes on the wire", count, "bytes/entity", [on_wire / count])
    yield figure("first", "file after it", count, "bytes/entity", [whole["file"] / count])
    if not image:
        return
    with Line(server.url) as line:
        killer = _Killer(on_wire // 2)
        line.on_bytes = killer.at
        _sync(world, server, line.url, count, killer=killer)
        again = line.down / on_wire
    yield figure("first", "bytes when killed at half", count, "x all", [again], target=TARGET_AGAIN)
    with Line(server.url, bytes_per_s=LINE_BYTES_PER_S, delay_s=LINE_DELAY_S) as line:
        took = _sync(world, server, line.url, count)["seconds"]
    yield figure(
        "first",
        "over 20 Mbit/s and 50 ms",
        count,
        "s",
        [took],
        floors=[on_wire / LINE_BYTES_PER_S],
        floor_is="what the bytes take",
        target=TARGET_LINE,
    )


class _Killer:
    """Kills a process when so many bytes have come."""

    def __init__(self, bytes_max: int) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.killed = False
        self._bytes_max = bytes_max

    def at(self, came: int) -> None:
        if came >= self._bytes_max and not self.killed and self.process is not None:
            self.killed = True
            self.process.kill()


def _sync(
    world: World,
    server: Server,
    url: str,
    count: int,
    *,
    segments: bool = True,
    memory: dict[str, list[float]] | None = None,
    killer: _Killer | None = None,
) -> dict[str, Any]:
    """A first sync, by a second process where ``killer`` has killed the first."""
    path = world.path("device")
    token_file = world.path("token")
    token_file.write_text(server.token)
    arguments = [url, _DB, str(path), str(token_file), "segments" if segments else "pages"]
    if killer is not None:
        _process(arguments, killer)
    answer, watch, pid = _process(arguments, pids=[server.pid])
    if memory is not None:
        for name, each in (("device", pid), ("server", server.pid)):
            memory.setdefault(f"{name} memory, own", []).append(watch.own[each] / _MB)
            memory.setdefault(f"{name} memory, with file", []).append(watch.total[each] / _MB)
    assert answer["entities"] == count, "the device has what the server has"
    answer["file"] = disk_bytes(path)
    shutil.rmtree(path)
    return answer


def _process(
    arguments: list[str], killer: _Killer | None = None, pids: Sequence[int] = ()
) -> tuple[dict[str, Any], MemoryWatch, int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.device", *arguments],
        cwd=Path(__file__).parent.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    if killer is not None:
        killer.process = process
    with MemoryWatch([process.pid, *pids]) as watch:
        output, _ = process.communicate()
    if killer is not None and killer.killed:
        return {}, watch, process.pid
    if process.returncode:
        raise RuntimeError("the device process failed")
    return json.loads(output), watch, process.pid


def _wait_for_image(server: Server) -> None:
    """Until the server has made one: it does so in the background."""
    deadline = time.monotonic() + _IMAGE_S
    device = bytes(16)
    with HttpTransport(server.url, token=server.token) as transport:
        shaken = transport.handshake(
            HandshakeRequest(major=1, minor=0, db_id=_DB, device_id=device, history=None, cursor=0)
        )
        if "segments" not in shaken.features:
            raise RuntimeError("this server has no images")
        request = SnapshotRequest(
            db_id=_DB, device_id=device, history=None, packings=list(packing.ENCODINGS)
        )
        while not transport.send(request).segments:  # type: ignore[union-attr]
            if time.monotonic() > deadline:
                raise RuntimeError("the server made no image")
            time.sleep(0.2)
