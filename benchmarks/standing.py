"""``standing``: what databases, devices that wait for news, and devices that are known take of a
server while nothing happens; and what a device takes.

Nothing is timed; memory is looked at once everything has been answered.
"""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from benchmarks.figures import Figure, figure
from benchmarks.world import Server, World, disk_bytes, environment, memory_bytes
from entidb.db import Database
from entidb.protocol import (
    CONTENT_TYPE,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    decode,
    encode,
)
from entidb.server.auth import Grants
from entidb.server.registry import Registry
from entidb.sync import HttpTransport, SyncConfig, SyncEngine
from entidb.types import SystemClock

SIZES = (200,)
#: A server has so many databases open at once, unless it is told otherwise; and so many devices of
#: one subject wait.
OPEN = 64
WAITING = 200
_MB = 1024 * 1024
_WARM = "warm"


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    """``sizes``: databases, and devices. One round, whatever is asked."""
    for count in sizes:
        yield from _server(world, count)
        yield from _registry(world, count)
        yield from _device(world, count)


def _server(world: World, count: int) -> Iterator[Figure]:
    with world.server() as server, contextlib.ExitStack() as stack:
        # What the first request costs is not what a database costs.
        _shake_hands(server, _WARM, 0)
        began = memory_bytes(server.pid)[1]
        yield figure("standing", "server, with nothing to do", count, "MB", [began / _MB])
        databases = min(count, OPEN)
        for number in range(databases):
            _shake_hands(server, f"db-{number}", number)
        opened = memory_bytes(server.pid)[1]
        each = _each(opened - began, databases)
        yield figure("standing", "memory of an open database", count, "kB", [each / 1024])
        disk = disk_bytes(server.path_of("db-0"))
        yield figure("standing", "disk of an empty database", count, "kB", [disk / 1024])
        waiting = min(count, WAITING)
        for number in range(waiting):
            stack.callback(_wait_for_news(server, number).close)
        held = memory_bytes(server.pid)[1]
        each = _each(held - opened, waiting)
        yield figure("standing", "memory of a device that waits", count, "kB", [each / 1024])


def _each(grown: int, count: int) -> float:
    # Pages that were free already are used first.
    return max(grown, 1) / count


def _post(server: Server, path: str, body: bytes) -> bytes:
    parts = urlsplit(server.url)
    with contextlib.closing(http.client.HTTPConnection(parts.netloc)) as connection:
        headers = {"Authorization": f"Bearer {server.token}", "Content-Type": CONTENT_TYPE}
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return answer.read()


def _shake_hands(server: Server, db_id: str, number: int) -> None:
    """A device meets a database, which is made, and pulls nothing from it."""
    device = number.to_bytes(16, "big")
    request = HandshakeRequest(
        db_id=db_id, device_id=device, history=None, cursor=0, major=1, minor=0
    )
    met = decode(HandshakeResponse, _post(server, "/v1/handshake", encode(request)))
    pull = PullRequest(
        db_id=db_id, device_id=device, history=met.history, cursor=0, limit=1, bytes_max=1
    )
    _post(server, "/v1/pull", encode(pull))


def _wait_for_news(server: Server, number: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    asked = {"db_id": "db-0", "device_id": number.to_bytes(16, "big").hex(), "request": number}
    headers = {"Authorization": f"Bearer {server.token}", "Accept": "text/event-stream"}
    connection.request("GET", f"/v1/live?{urlencode(asked)}", headers=headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    assert answer.readline(), "the first event of the stream"
    return connection


def _registry(world: World, count: int) -> Iterator[Figure]:
    """What is written down of each device."""
    place = world.path("registry")
    (place / "shop.entidb").mkdir(parents=True)
    registry = Registry(place, SystemClock(), retention_days=90)
    for number in range(count):
        request = PullRequest(
            db_id="shop",
            device_id=number.to_bytes(16, "big"),
            history=bytes(16),
            cursor=number,
            limit=1,
            bytes_max=1,
        )
        asking = Grants(f"person-{number}@example.org", {}, {"jti": f"token-{number}"})
        registry.heard(
            request, asking, code=None, client="entidb/0.6.0", bytes_in=100, bytes_out=100
        )
    registry.flush()
    written = (place / "shop.entidb.devices").stat().st_size
    yield figure("standing", "disk of a device that is known", count, "bytes", [written / count])


def _device(world: World, count: int) -> Iterator[Figure]:
    with world.server() as server:
        path = world.path("device")
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.standing", server.url, server.token, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            env=environment(),
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == b"synced\n"
            own = memory_bytes(process.pid)[1]
            process.stdin.close()
        yield figure("standing", "a device that has synced", count, "MB", [own / _MB])
        disk = disk_bytes(path)
        yield figure("standing", "disk of a device with nothing", count, "kB", [disk / 1024])


def main(url: str, token: str, path: str) -> None:
    """A device, until its input ends."""
    config = SyncConfig(db_id="standing")
    transport = HttpTransport(url, token=token, config=config)
    with Database.open(path) as db, SyncEngine(config, transport, db) as engine:
        engine.sync()
        print("synced", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:4])
