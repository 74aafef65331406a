"""``stalled``: clients that ask for a large page and stop reading in the middle of it.

What they cost the server in memory, and how long until it has let all of them go.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from benchmarks.figures import Figure, figure
from benchmarks.world import MemoryWatch, Server, World
from entidb import protocol
from entidb.db import Database, Role
from entidb.protocol import CONTENT_TYPE, PullRequest

SIZES = (100_000,)
CLIENTS = 400
PATIENCE_S = 180.0
_RECEIVE_BYTES = 8192
#: Open files of the one database, and a few that come and go.
_DATABASE_FILES = 10
_MB = 1e6


def run(world: World, sizes: tuple[int, ...] = SIZES, rounds: int = 5) -> Iterator[Figure]:
    for count in sizes:
        memory: list[float] = []
        dropped: list[float] = []
        # Each waits for the server's own timeout, so that one round says it all.
        for _ in range(min(rounds, 1)):
            path = world.server_database(count)
            with Database.open(path, role=Role.SERVER) as database:
                assert database.history is not None
                history = database.history
            with world.server({"stalled": path}) as server:
                most, seconds = _stall(server, history)
            memory.append(most / _MB)
            dropped.append(seconds)
        yield figure(
            "stalled",
            f"server memory with {CLIENTS} clients that stop reading",
            count,
            "MB",
            memory,
            note="in_flight_bytes_max (256 MiB unless set) bounds what answers may take together",
        )
        yield figure("stalled", "until all are dropped", count, "s", dropped)


def _stall(server: Server, history: bytes) -> tuple[float, float]:
    """Bytes resident at most, all of them, and seconds until no connection is left."""
    request = PullRequest(
        db_id="stalled",
        device_id=bytes(16),
        history=history,
        cursor=0,
        limit=20_000,
        bytes_max=1 << 30,
        full=True,
    )
    parts = urlsplit(server.url)
    assert parts.hostname is not None and parts.port is not None
    body = protocol.encode(request)
    head = (
        f"POST {protocol.path_of(request)} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Authorization: Bearer {server.token}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    before = _descriptors(server.pid)
    with contextlib.ExitStack() as stack, MemoryWatch([server.pid]) as watch:
        began = time.monotonic()
        clients = []
        for _ in range(CLIENTS):
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            client.connect((parts.hostname, parts.port))
            client.sendall(head + body)
            clients.append(client)
        deadline = began + PATIENCE_S
        while _descriptors(server.pid) > before + _DATABASE_FILES:
            if time.monotonic() > deadline:
                raise RuntimeError(f"after {PATIENCE_S:g} s the server still holds connections")
            clients = [client for client in clients if not _has_all(client)]
            time.sleep(0.05)
        seconds = time.monotonic() - began
    return watch.total[server.pid], seconds


def _has_all(client: socket.socket) -> bool:
    """Whether a short answer (that the server is busy) is there whole; if so the client leaves,
    because it has not stopped in the middle of anything."""
    try:
        there = client.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    found, end, rest = there.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", found.lower())
    if not end or length is None or len(rest) < int(length[1]):
        return False
    client.close()
    return True


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
