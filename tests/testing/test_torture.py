"""Real processes on real sockets, killed, stopped and cut off; and that the run could fail.

``ENTIDB_TORTURE_SECONDS`` is how long faults happen (``scripts/torture`` runs for longer),
``ENTIDB_TORTURE_SEED`` repeats a plan of faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database
from entidb.testing.torture import Torture, TortureConfig, TortureReport, main, run_torture
from entidb.testing.torture_process import TortureFailure, TortureProcess, read_ledger
from entidb.testing.torture_proxy import FAIR, Proxy, Weather
from entidb.testing.torture_workload import ROWS, SUMS, parts_seen, parts_stored, write_one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL and SIGSTOP are POSIX signals"),
]

SECONDS = float(os.environ.get("ENTIDB_TORTURE_SECONDS", "60"))
SEED = os.environ.get("ENTIDB_TORTURE_SEED")
#: Bounds a wait for something that must come; decides nothing else.
WAIT_SECONDS = 60.0


def test_nothing_is_lost_while_processes_are_killed_and_connections_cut() -> None:
    seed = random.SystemRandom().randrange(2**32) if SEED is None else int(SEED)
    print(f"torture: seed {seed}")
    report = run_torture(TortureConfig(seed=seed, seconds=SECONDS))
    print(report.summary())
    assert report.failures == [], f"{report.replay()} (files in {report.directory})"
    assert report.committed == report.on_server + report.discarded > 0
    assert report.entities > 0


def test_the_command_prints_seed_and_summary_and_leaves_nothing_running(tmp_path: Path) -> None:
    output = io.StringIO()
    arguments = ["--seconds", "2", "--seed", "5", "--keep", str(tmp_path / "run")]
    assert main(arguments, output) == 0, output.getvalue()
    first, last = output.getvalue().splitlines()
    assert first == "seed 5" and last.startswith("seed 5: ")
    assert not workers_of(tmp_path)


def workers_of(directory: Path) -> list[int]:
    """Processes that name the directory among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(directory).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


# ---------------------------------------------------------------- the run can fail


class Rigged(Torture):
    """A run in which something is changed behind everybody's back before the comparison."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.harm: Any = None

    def _compare(self) -> None:
        self.harm(self)
        super()._compare()


def run_rigged(tmp_path: Path, harm: Any) -> TortureReport:
    config = TortureConfig(seed=11, seconds=1.5, keep=tmp_path)
    with Proxy(config.clients) as proxy:
        torture = Rigged(config, tmp_path, proxy)
        torture.harm = harm
        try:
            torture.run()
        finally:
            torture.discard()
    return torture.report


def test_a_lost_commit_is_noticed(tmp_path: Path) -> None:
    def harm(torture: Torture) -> None:
        with open(torture.clients[0].ledger, "a", encoding="utf-8") as ledger:
            ledger.write(f'{{"committed": "{"0" * 32}", "sum": "{"1" * 32}"}}\n')

    failures = run_rigged(tmp_path, harm).failures
    assert len(failures) == 1 and failures[0].startswith("NO-SILENT-LOSS: client-0")


def test_a_device_that_differs_is_noticed(tmp_path: Path) -> None:
    def harm(torture: Torture) -> None:
        with Database.open(tmp_path / "devices" / "1") as device:
            device.collection("server_wins")[uuid.UUID(int=1)] = {"tag": "x", "sum": "0" * 32}

    failures = run_rigged(tmp_path, harm).failures
    assert any(failure.startswith("CONVERGE: client-1") for failure in failures)
    assert any(failure.startswith("client-1: WHOLE") for failure in failures)


def test_a_process_that_ends_by_itself_is_noticed(tmp_path: Path) -> None:
    settings = {"path": str(tmp_path / "no" / "such"), "seed": "1", "url": "http://127.0.0.1:1"}
    client = TortureProcess("client", "client", settings, tmp_path)  # it misses a setting
    client.start()
    try:
        assert client._process is not None
        client._process.wait(WAIT_SECONDS)
        with pytest.raises(TortureFailure, match="ended by itself"):
            client.check()
    finally:
        client.discard()
    assert "pause_s" in client.log.read_text("utf-8") and not read_ledger(client.ledger).committed


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "entidb.testing.torture", "--seconds", "60", "--keep"]
    parent = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        # A client that writes has told the system to end it with its parent.
        wait_until(lambda: busy_client(tmp_path) is not None)
        for pid in workers_of(tmp_path / "devices" / str(busy_client(tmp_path))):
            os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not workers_of(tmp_path))


def busy_client(directory: Path) -> str | None:
    """Number of a client that has committed something."""
    for ledger in sorted(directory.glob("client-*.ledger")):
        if ledger.stat().st_size:
            return ledger.stem.removeprefix("client-")
    return None


def wait_until(done: Any) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT_SECONDS / 0.05)):
        if done():
            return
        waiting.wait(0.05)
    raise AssertionError("it did not come")


# ---------------------------------------------------------------- half a transaction


def test_a_reader_that_sees_half_a_transaction_says_so() -> None:
    source = random.Random(3)
    with Database.in_memory() as database:
        while len(database.collection(SUMS)) < 30:
            write_one(database, source, lambda written: None)
        with database.snapshot() as snapshot:
            assert list(parts_seen(snapshot)) == []
        name = next(name for name in ROWS if len(database.collection(name)))
        row = next(iter(database.collection(name).values()))
        del database.collection(SUMS)[uuid.UUID(row["sum"])]
        with database.snapshot() as snapshot:
            assert any("whose sum is missing" in fault for fault in parts_seen(snapshot))


def test_a_row_left_at_an_older_version_is_found() -> None:
    from entidb.db import Role

    source = random.Random(4)
    with Database.in_memory(role=Role.SERVER) as database:
        written = [write_one(database, source, lambda written: None) for _ in range(30)]
        assert list(parts_stored(database)) == []
        sums = database.collection(SUMS)
        entry = sums[uuid.UUID(written[-1].sum)]
        row = next(place for place in sums[uuid.UUID(written[0].sum)]["before"])
        # A sum that claims a row of an older transaction, which was not written with it.
        sums[uuid.UUID(written[-1].sum)] = entry | {"before": {row: ""}, "deleted": []}
        assert any("is still at version" in fault for fault in parts_stored(database))


# ---------------------------------------------------------------- the proxy


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets until the other side ends or breaks the connection."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(1000):
                self.request.sendall(data)


@contextlib.contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Ends when every connection to it has ended: close those first."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        host, port = server.socket.getsockname()
        try:
            yield host, port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with echo_server() as place, Proxy(1) as made:
        made.point_at(place)
        yield made


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.ports[0]), timeout=WAIT_SECONDS)


def set_weather(proxy: Proxy, weather: Weather) -> None:
    proxy.weather(0, weather)
    # Weather is set on the proxy's thread: what that did before is done when this is.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), proxy._loop).result(WAIT_SECONDS)


def received(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(1000):
        parts.append(part)
    return b"".join(parts)


def test_in_fair_weather_bytes_come_back(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert received(client) == b"hello"


def test_a_cut_lets_just_so_many_bytes_through(proxy: Proxy) -> None:
    set_weather(proxy, Weather(ending="cut", after_bytes=13))
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        assert received(client) == b"012"  # ten went there, three came back
    assert proxy.seen["connections cut"] == 1


def test_a_reset_is_a_reset(proxy: Proxy) -> None:
    set_weather(proxy, Weather(ending="reset", after_bytes=0))
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        with pytest.raises(ConnectionResetError):
            received(client)
    assert proxy.seen["connections reset"] == 1


def test_closing_one_direction_leaves_the_other(proxy: Proxy) -> None:
    set_weather(proxy, Weather(ending="half", after_bytes=4))
    with connect(proxy) as client:
        client.sendall(b"0123456789")
        assert received(client) == b"0123"  # the server got four and the end, and answered
    assert proxy.seen["directions closed"] == 1


def test_a_stall_ends_with_the_weather(proxy: Proxy) -> None:
    set_weather(proxy, Weather(stall=True))
    with connect(proxy) as client:
        client.sendall(b"hello")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)
        set_weather(proxy, FAIR)
        client.settimeout(WAIT_SECONDS)
        assert client.recv(10) == b"hello"


def test_refused_connections_are_reset_and_those_to_nowhere_too(proxy: Proxy) -> None:
    for weather, upstream in ((Weather(refuse=True), None), (FAIR, None)):
        set_weather(proxy, weather)
        proxy.point_at(upstream)
        with pytest.raises(ConnectionResetError), connect(proxy) as client:
            received(client)
    assert proxy.seen["connections refused"] == 1
