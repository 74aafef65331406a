"""Where a benchmark runs: a directory on disk, server processes, devices, data to start from."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.floors import batches
from benchmarks.payloads import COLLECTION, entities
from entidb.db import Database, Role
from entidb.server import mint_token
from entidb.server.config import directory_name
from entidb.sync import HttpTransport, SyncConfig, SyncEngine
from entidb.sync.config import Compression
from entidb.sync.http import HttpResponse, HttpxClient

#: Transactions staged in one storage commit while loading: bounds memory, not correctness.
_LOAD_TRANSACTIONS = 5000
_START_S = 30.0
_MEMORY_TMPFS = ("tmpfs", "ramfs")
_ROOT = Path(__file__).parent.parent


class World:
    """One temporary directory for one run of benchmarks, and what was made in it."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        check_on_disk(parent)
        self.directory = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
        self.secret_file = self.directory / "secret"
        self.secret_file.write_text(secrets.token_hex(32))
        self._numbers = itertools.count(1)
        self._templates: dict[tuple[str, int, str], Path] = {}
        self._ends: list[Callable[[], None]] = []
        #: Makes the address that a server keeps its databases at; None: in a directory.
        self.new_address: Callable[[], str] | None = None

    def path(self, name: str) -> Path:
        """A path nobody else has."""
        return self.directory / f"{name}-{next(self._numbers)}"

    def token(self) -> str:
        secret = self.secret_file.read_bytes()
        return mint_token(secret, subject="bench", databases={"*": "rw"}, expires_s=7 * 24 * 3600)

    def closing(self, close: Callable[[], None]) -> None:
        """Have ``close`` called before the directory goes."""
        self._ends.append(close)

    def close(self) -> None:
        for end in self._ends:
            end()
        shutil.rmtree(self.directory)

    # ------------------------------------------------------------ data to start from

    def pending_device(self, count: int, kind: str = "v7") -> Path:
        """A device with ``count`` single-entity transactions waiting, copied for the caller."""
        return self._copy(("device", count, kind), Role.DEVICE)

    def server_database(self, count: int, kind: str = "v7") -> Path:
        """A server database of ``count`` single-entity transactions, copied for the caller."""
        return self._copy(("server", count, kind), Role.SERVER)

    def _copy(self, key: tuple[str, int, str], role: Role) -> Path:
        if key not in self._templates:
            path = self.path("template")
            _, count, kind = key
            with contextlib.closing(Database.open(path, role=role)) as database:
                load(database, entities(count, kind))
            self._templates[key] = path
        copy = self.copy_of(self._templates[key])
        # A copy is a file that nobody has closed: who opens it first reads all of it, to see that
        # it is well. ``local`` measures that; everything else begins with what was closed.
        Database.open(copy, role=role).close()
        return copy

    def copy_of(self, path: Path) -> Path:
        copy = self.path("copy")
        shutil.copytree(path, copy)
        # Else the copy is still being written to disk while something else is measured.
        os.sync()
        return copy

    # ------------------------------------------------------------ processes

    @contextlib.contextmanager
    def server(
        self, databases: Mapping[str, Path] | None = None, **settings: Any
    ) -> Iterator[Server]:
        """A real server in a process of its own, or in several. ``databases`` are moved into its
        directory; ``settings`` are those of ``ServerConfig``."""
        data_dir = self.new_data_dir(databases)
        place = str(data_dir)
        if self.new_address is not None:
            place = self.new_address()
            if databases:
                from entidb.server import copy_server  # an older version is measured too

                copy_server(data_dir, place)
        with self.serving(data_dir, place, **settings) as server:
            yield server
        shutil.rmtree(data_dir)

    def new_data_dir(self, databases: Mapping[str, Path] | None = None) -> Path:
        """A directory for a server, into which ``databases`` are moved."""
        data_dir = self.path("server")
        data_dir.mkdir(mode=0o700)
        for db_id, path in (databases or {}).items():
            path.rename(data_dir / directory_name(db_id))
        return data_dir

    @contextlib.contextmanager
    def serving(
        self, data_dir: Path, place: str = "", *, port: int = 0, **settings: Any
    ) -> Iterator[Server]:
        """One run of a server on ``data_dir``, or on what ``place`` names; it may be killed."""
        arguments = [
            "benchmarks.serving",
            place or str(data_dir),
            str(self.secret_file),
            json.dumps(settings),
            str(port),
        ]
        with self._process(arguments) as (pid, url):
            yield Server(url=url, pid=pid, data_dir=data_dir, token=self.token())

    @contextlib.contextmanager
    def bare_server(self) -> Iterator[str]:
        """A server with nothing behind it; yields its URL."""
        with self._process(["benchmarks.bare"]) as (_, url):
            yield url

    @contextlib.contextmanager
    def _process(self, arguments: list[str]) -> Iterator[tuple[int, str]]:
        ready = self.path("ready")
        log = self.path("log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments, str(ready)],
                cwd=_ROOT,
                env=environment(),
                stdout=output,
                stderr=output,
            )
        try:
            deadline = time.monotonic() + _START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{arguments[0]} did not start:\n{log.read_text()}")
                time.sleep(0.01)
            yield process.pid, ready.read_text().strip()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_START_S)

    # ------------------------------------------------------------ devices

    @contextlib.contextmanager
    def device(
        self, server: Server, db_id: str, path: Path | None = None, **settings: Any
    ) -> Iterator[Device]:
        """A device in this process, on the database at ``path`` or a new one, removed at the
        end. ``settings`` are those of ``SyncConfig``."""
        where = path or self.path("device")
        config = SyncConfig(db_id=db_id, **settings)
        client = RecordingClient(HttpxClient(config))
        database = Database.open(where)
        transport = HttpTransport(server.url, token=server.token, client=client, config=config)
        with contextlib.closing(database), SyncEngine(config, transport, database) as engine:
            yield Device(where, database, engine, client)
        shutil.rmtree(where)


@dataclass(frozen=True)
class Server:
    """A running server process."""

    url: str
    pid: int
    data_dir: Path
    token: str

    def path_of(self, db_id: str) -> Path:
        return self.data_dir / directory_name(db_id)


@dataclass(frozen=True)
class Device:
    """A device and the way it talks to its server."""

    path: Path
    database: Database
    engine: SyncEngine
    client: RecordingClient

    def sync(self) -> None:
        """One cycle to the end: nothing may be left pending."""
        result = self.engine.sync()
        assert not result.incomplete, "the cycle ended before everything was in step"


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, as they went over the wire."""

    url: str
    headers: Mapping[str, str]
    body: bytes
    response: HttpResponse


@dataclass
class RecordingClient:
    """The client a device ships with, and what went over it while ``recording``."""

    client: HttpxClient
    recording: bool = False
    exchanges: list[Exchange] = field(default_factory=list)
    tells_when_sent: bool = True
    #: Called when a push has been answered, before the device hears of it.
    on_pushed: Callable[[], None] | None = None

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout_s: float,
        **telling: Any,
    ) -> HttpResponse:
        response = self.client.request(method, url, headers, body, timeout_s, **telling)
        if self.on_pushed is not None and url.endswith(("/v1/push", "/v1/sync")):
            self.on_pushed()
        if self.recording:
            self.exchanges.append(Exchange(url, headers, body, response))
        return response

    def interrupt(self) -> None:
        self.client.interrupt()

    def resume(self) -> None:
        self.client.resume()

    def close(self) -> None:
        self.client.close()


class BareExchange:
    """Repeats a recorded exchange against a server with nothing behind it: same client class,
    same headers, same bytes both ways."""

    def __init__(self, url: str, exchange: Exchange) -> None:
        self._client = HttpxClient()
        self._url = url
        self._exchange = exchange
        self._client.request("PUT", url, {}, exchange.response.body, _START_S)

    def __call__(self) -> None:
        exchange = self._exchange
        answer = self._client.request("POST", self._url, exchange.headers, exchange.body, _START_S)
        assert len(answer.body) == len(exchange.response.body)

    def close(self) -> None:
        self._client.close()


# ---------------------------------------------------------------- loading


def load(database: Database, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    """Commit every pair as a transaction of its own, thousands of them in one storage commit.

    What results is what that many calls would have made, except that a disk flush for each would
    take minutes that nobody wants to measure."""
    for batch in batches(list(pairs), _LOAD_TRANSACTIONS):
        with database.write("local") as writer:
            for entity_id, data in batch:
                database.commit_writes(writer, {COLLECTION: {entity_id: data}})


def disk_bytes(path: Path) -> int:
    """What the database at ``path`` takes on disk."""
    return sum(item.stat().st_blocks * 512 for item in path.iterdir())


# ---------------------------------------------------------------- memory


class MemoryWatch:
    """The most memory that processes had while the block ran, by sampling. ``total`` counts
    everything resident, ``own`` leaves out pages of mapped files, which the system takes back
    when somebody needs the room."""

    def __init__(self, pids: Sequence[int], every_s: float = 0.02) -> None:
        self.total = dict.fromkeys(pids, 0)
        self.own = dict.fromkeys(pids, 0)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()  # the block may have been too short for a look in it

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        for pid in self.total:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total, own = memory_bytes(pid)
                self.total[pid] = max(self.total[pid], total)
                self.own[pid] = max(self.own[pid], own)


def memory_bytes(pid: int) -> tuple[int, int]:
    """Resident bytes of a process: all of them, and those that are its own (not file pages)."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.startswith(("VmRSS", "RssAnon")):
            fields[name] = int(rest.split()[0]) * 1024
    return fields.get("VmRSS", 0), fields.get("RssAnon", 0)


def processor_s(pid: int) -> float:
    """Seconds of a processor that a process has taken, with threads that have ended."""
    # As clock_getcpuclockid(3) names its clock; /proc/PID/stat counts in hundredths of a second.
    return time.clock_gettime((~pid << 3) | 2)


# ---------------------------------------------------------------- the machine


def environment() -> dict[str, str]:
    """For our processes: they import what this one imports, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


def check_on_disk(path: Path) -> None:
    """Raises ``SystemExit`` if ``path`` is in memory, where flushing costs nothing."""
    best, kind = "", ""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return
    for line in mounts.read_text().splitlines():
        _, mount, name, *_ = line.split()
        inside = path.resolve().is_relative_to(mount)
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    if kind in _MEMORY_TMPFS:
        raise SystemExit(f"{path} is on {kind}, which flushes nothing: give --dir on a disk")


COMPRESSIONS: tuple[Compression, ...] = ("none", "gzip", "zstd")
