"""A server and its clients as real processes on real sockets, under faults; then everything is
compared.

    python -m entidb.testing.torture --seconds 60 --seed 7 --clients 4

Either side is killed (SIGKILL) and stopped (SIGSTOP, SIGCONT) at random, and a proxy between them
delays, stalls, cuts, resets and closes one direction. Then the faults stop, all clients sync until
nothing is pending, and these must hold: all dumps are the same bytes, ``verify`` is clean, every
commit that returned on a client is on the server or in that client's discarded list, and every
transaction is whole. The seed chooses faults and writes, but not the timing of the processes, so a
failure may need several runs to come back.

``torture_workload`` decides what is written, ``torture_worker`` what the processes do,
``torture_process`` starts and ends them, ``torture_proxy`` makes the bad weather.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

from entidb.db import Database, DiscardedTransaction, Role, dump
from entidb.db.outbox import read_discarded
from entidb.errors import EntiDBError
from entidb.storage.opening import closed_faults
from entidb.testing.torture_process import (
    START_SECONDS,
    Ledger,
    TortureFailure,
    TortureProcess,
    read_ledger,
)
from entidb.testing.torture_proxy import FAIR, Proxy, Weather
from entidb.testing.torture_worker import DB_ID
from entidb.testing.torture_workload import SUMS, parts_seen, parts_stored

CLIENTS_MIN: Final = 4
#: Seconds. As ``START_SECONDS``, for everything that is pending to get through.
_DRAIN_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class TortureConfig:
    """``seconds`` is how long faults happen, ``pause_s`` what a client waits between two commits
    on average. ``keep`` is a directory for all files, a temporary one if None, which is removed
    after a run without failures."""

    seed: int
    seconds: float = 60.0
    clients: int = CLIENTS_MIN
    pause_s: float = 0.03
    keep: Path | None = None


@dataclass
class TortureReport:
    """``failures`` is empty if every promise held. ``faults`` counts what was done to whom."""

    config: TortureConfig
    faults: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    on_server: int = 0
    discarded: int = 0
    entities: int = 0
    commits_on_server: int = 0
    failures: list[str] = field(default_factory=list)
    directory: Path | None = None

    def summary(self) -> str:
        done = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        return (
            f"seed {self.config.seed}: {self.committed} commits acknowledged, {self.on_server} on "
            f"the server, {self.discarded} discarded, {self.commits_on_server} server commits, "
            f"{self.entities} entities; faults: {done or 'none'}"
        )

    def replay(self) -> str:
        c = self.config
        return (
            f"python -m entidb.testing.torture --seed {c.seed} --seconds {c.seconds:g} "
            f"--clients {c.clients}"
        )


# ---------------------------------------------------------------- the run


class Torture:
    """One run: start, faults, quiet, comparison."""

    def __init__(self, config: TortureConfig, directory: Path, proxy: Proxy) -> None:
        self.report = TortureReport(config, faults=proxy.seen)
        self._config = config
        self._directory = directory
        self._proxy = proxy
        self._source = random.Random(config.seed)
        #: What has to be undone, and when: (time, what).
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._ready = directory / "server.ready"
        self._server_path = directory / "server"
        server: dict[str, Any] = {"path": str(self._server_path), "ready": str(self._ready)}
        self.server = TortureProcess("server", "server", server | {"seed": config.seed}, directory)
        self.clients = [self._make_client(number) for number in range(config.clients)]

    def _make_client(self, number: int) -> TortureProcess:
        settings = {
            "path": str(self._client_path(number)),
            "url": f"http://127.0.0.1:{self._proxy.ports[number]}",
            "seed": f"{self._config.seed} {number}",
            "pause_s": self._config.pause_s,
        }
        return TortureProcess(f"client-{number}", "client", settings, self._directory)

    def _client_path(self, number: int) -> Path:
        return self._directory / "devices" / str(number)

    def run(self) -> None:
        """Raises ``TortureFailure``; more of them may be in the report."""
        self._start_server()
        for client in self.clients:
            client.start()
        self._torment()
        self._calm()
        self._drain()
        self._close()
        self._compare()

    def discard(self) -> None:
        for process in (*self.clients, self.server):
            process.discard()

    # ---- faults

    def _torment(self) -> None:
        faults: dict[Callable[[], None], int] = {
            self._kill_client: 3,
            self._kill_server: 1,
            self._stop_client: 2,
            self._stop_server: 1,
            self._bad_weather: 9,
        }
        chosen, weights = list(faults), list(faults.values())
        end = time.monotonic() + self._config.seconds
        while time.monotonic() < end:
            self._source.choices(chosen, weights)[0]()
            self._wait(self._source.uniform(0.05, 0.6))

    def _wait(self, seconds: float) -> None:
        """Sleep, do what is due, and check that no process has ended."""
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            due = [what for at, what in self._later if at <= now]
            self._later = [(at, what) for at, what in self._later if at > now]
            for what in due:
                what()
            for process in (self.server, *self.clients):
                process.check()
            if now >= end:
                return
            time.sleep(min(_POLL_SECONDS, end - now))

    def _after(self, low: float, high: float, what: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + self._source.uniform(low, high), what))

    def _kill_client(self) -> None:
        client = self._source.choice(self.clients)
        if client.running:
            self.report.faults["clients killed"] += 1
            client.kill()
            self._after(0.0, 1.0, client.start)

    def _kill_server(self) -> None:
        if self.server.running:
            self.report.faults["servers killed"] += 1
            self.server.kill()
            self._proxy.point_at(None)
            self._after(0.0, 1.0, self._start_server)

    def _stop_client(self) -> None:
        self._stop(self._source.choice(self.clients), "clients stopped")

    def _stop_server(self) -> None:
        self._stop(self.server, "servers stopped")

    def _stop(self, process: TortureProcess, name: str) -> None:
        if process.running and not process.stopped:
            self.report.faults[name] += 1
            process.pause()
            self._after(0.1, 2.5, process.go_on)

    def _bad_weather(self) -> None:
        link = self._source.randrange(len(self.clients))
        kind = self._source.choice(("delay", "stall", "refuse", "cut", "reset", "half"))
        # Often within the head of a request or an answer, sometimes far into a body.
        after = int(self._source.choice((200, 2_000, 40_000)) * self._source.random())
        if kind == "delay":
            weather = Weather(delay_s=self._source.uniform(0.005, 0.4))
        elif kind in ("stall", "refuse"):
            weather = Weather(stall=kind == "stall", refuse=kind == "refuse")
        else:
            weather = Weather(ending=kind, after_bytes=after)
        self._proxy.weather(link, weather)
        self._after(0.2, 2.5, lambda: self._proxy.weather(link, FAIR))

    def _start_server(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ready.unlink()
        self.server.start()
        end = time.monotonic() + START_SECONDS
        while not self._ready.exists():
            self.server.check()
            if time.monotonic() > end:
                raise TortureFailure("the server does not start")
            time.sleep(_POLL_SECONDS)
        address = urlsplit(self._ready.read_text("utf-8").strip())
        assert address.hostname is not None and address.port is not None
        self._proxy.point_at((address.hostname, address.port))

    # ---- quiet

    def _calm(self) -> None:
        self._later.clear()
        for link in range(len(self.clients)):
            self._proxy.weather(link, FAIR)
        for process in (self.server, *self.clients):
            process.go_on()
        if not self.server.running:
            self._start_server()
        for client in self.clients:
            if not client.running:
                client.start()

    def _drain(self) -> None:
        for client in self.clients:
            client.order("quiet")
        self._until("drained", lambda ledger: ledger.drained is not None)
        # All writing has ended: after one more cycle each, all have seen all.
        for client in self.clients:
            client.order("sync")
        self._until("in step", lambda ledger: bool(ledger.synced))

    def _until(self, what: str, done: Callable[[Ledger], bool]) -> None:
        end = time.monotonic() + _DRAIN_SECONDS
        waiting = list(self.clients)
        while waiting:
            waiting = [client for client in waiting if not done(read_ledger(client.ledger))]
            self._wait(0.1)
            if time.monotonic() > end:
                names = ", ".join(client.name for client in waiting)
                raise TortureFailure(f"LIVENESS: {names} not {what} in {_DRAIN_SECONDS:g} s")

    def _close(self) -> None:
        for client in self.clients:
            client.finish(lambda client=client: client.order("close"))  # type: ignore[misc]
        self.server.finish(self.server.terminate)

    # ---- comparison

    def _compare(self) -> None:
        ledgers = [read_ledger(client.ledger) for client in self.clients]
        fail = self.report.failures.append
        for client, ledger in zip(self.clients, ledgers, strict=True):
            for fault in ledger.faults[:5]:
                fail(f"{client.name}: {fault}")
        with self._open(self._stored_server(), Role.SERVER) as server:
            expected = digest_of(server)
            sums = {entity_id.hex: entry["tag"] for entity_id, entry in _sums(server)}
            self.report.commits_on_server = server.sequence
            self.report.entities = sum(1 for _ in dump(server))
            for fault in _faults_of(server):
                fail(f"server: {fault}")
            self._check_unknown(sums, ledgers)
            for number, ledger in enumerate(ledgers):
                self._compare_client(number, ledger, expected, sums, server)

    def _compare_client(
        self, number: int, ledger: Ledger, expected: str, sums: dict[str, str], server: Database
    ) -> None:
        fail, name = self.report.failures.append, self.clients[number].name
        with self._open(self._client_path(number), Role.DEVICE) as device:
            for fault in _faults_of(device):
                fail(f"{name}: {fault}")
            if digest_of(device) != expected:
                fail(
                    f"CONVERGE: {name} differs from the server: {first_difference(device, server)}"
                )
            head = device.read_head()
            if head.ready or head.held or head.conflicts:
                fail(f"LIVENESS: {name} still has {head}")
            with device.storage.snapshot() as snapshot:
                discarded = {
                    entry.transaction_id.hex(): entry for entry in read_discarded(snapshot)
                }
        self._check_ledger(name, ledger, sums, discarded)

    def _check_ledger(
        self,
        name: str,
        ledger: Ledger,
        sums: dict[str, str],
        discarded: dict[str, DiscardedTransaction],
    ) -> None:
        for transaction, sum_id in ledger.committed.items():
            self.report.committed += 1
            if sums.get(sum_id) == transaction:
                self.report.on_server += 1
                if transaction in discarded:
                    self.report.failures.append(
                        f"SURFACED-ONCE: {name}: {transaction} is on the server and discarded"
                    )
            elif transaction in discarded:
                self.report.discarded += 1
                if not _has_sum(discarded[transaction], sum_id):
                    self.report.failures.append(f"WHOLE: {name}: {transaction} was cut up")
            else:
                self.report.failures.append(
                    f"NO-SILENT-LOSS: {name}: acknowledged commit {transaction} is gone"
                )

    def _check_unknown(self, sums: dict[str, str], ledgers: list[Ledger]) -> None:
        begun = set[str]().union(*(ledger.begun for ledger in ledgers))
        for transaction in set(sums.values()) - begun:
            self.report.failures.append(f"{transaction} is on the server and no client wrote it")

    def _stored_server(self) -> Path:
        found = [e for e in self._server_path.iterdir() if e.name.startswith(DB_ID) and e.is_dir()]
        (path,) = found
        return path

    @contextlib.contextmanager
    def _open(self, path: Path, role: Role) -> Iterator[Database]:
        for fault in closed_faults(path):
            raise TortureFailure(f"{path}: {fault}")
        with Database.open(path, create=False, role=role) as database:
            yield database


def digest_of(database: Database) -> str:
    """SHA-256 of everything that must be the same on all sides."""
    digest = hashlib.sha256()
    for row in dump(database):
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _faults_of(database: Database) -> list[str]:
    with database.snapshot() as snapshot:
        seen = [f"WHOLE: {fault}" for fault in parts_seen(snapshot)]
    stored = [f"WHOLE: {fault}" for fault in parts_stored(database)]
    return [*database.verify()[:10], *seen[:10], *stored[:10]]


def _sums(database: Database) -> Iterator[tuple[uuid.UUID, Any]]:
    yield from database.collection(SUMS).items()


def _has_sum(discarded: DiscardedTransaction, sum_id: str) -> bool:
    return any(name == SUMS and each.hex == sum_id for name, each, _ in discarded.values())


def first_difference(device: Database, server: Database) -> str:
    ours, theirs = set(dump(device)), set(dump(server))
    some = sorted(ours ^ theirs, key=lambda row: row[:3])[:1]
    where = [f"{name}/{raw.hex()} at version {version}" for name, raw, version, _ in some]
    return f"{len(ours - theirs)} only there, {len(theirs - ours)} only here; {where}"


# ---------------------------------------------------------------- running it


def run_torture(config: TortureConfig) -> TortureReport:
    """One run; everything it started has ended when it returns or raises. Files are kept after a
    failure, or where ``config.keep`` says. POSIX only."""
    if config.clients < 1:
        raise ValueError("a run needs clients")
    directory = config.keep or Path(tempfile.mkdtemp(prefix="entidb-torture-"))
    directory.mkdir(parents=True, exist_ok=True)
    with Proxy(config.clients) as proxy:
        torture = Torture(config, directory, proxy)
        report = torture.report
        report.directory = directory
        try:
            torture.run()
        except (TortureFailure, EntiDBError) as failure:
            report.failures.append(f"{type(failure).__name__}: {failure}")
            report.failures += [
                f"{client.name}: {fault}"
                for client in torture.clients
                if client.ledger.exists()
                for fault in read_ledger(client.ledger).faults[:5]
            ]
        finally:
            torture.discard()
    if config.keep is None and not report.failures:
        shutil.rmtree(directory)
        report.directory = None
    return report


def main(arguments: Sequence[str] | None = None, output: IO[str] = sys.stdout) -> int:
    """The command line; 0 if every promise held, else 1."""
    parser = argparse.ArgumentParser(prog="python -m entidb.testing.torture")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults happen")
    parser.add_argument("--seed", type=int, help="random unless given")
    parser.add_argument("--clients", type=int, default=CLIENTS_MIN)
    parser.add_argument("--keep", type=Path, help="a directory to leave all files in")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    print(f"seed {seed}", file=output, flush=True)
    config = TortureConfig(seed=seed, seconds=given.seconds, clients=given.clients, keep=given.keep)
    report = run_torture(config)
    print(report.summary(), file=output)
    if not report.failures:
        return 0
    for failure in report.failures:
        print(f"FAILED {failure}", file=output)
    print(f"files: {report.directory}; again: {report.replay()}", file=output, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
