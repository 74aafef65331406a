"""Nodes that serve one database, and devices that go on writing while something fails under them;
then everything is compared.

A *fleet* is some nodes and some devices, each a process of its own. A device reaches any node that
takes its connection, as through a load balancer that knows nothing of databases. What fails, and
how, is the business of who has the fleet: the PostgreSQL below the nodes (``scripts/failover``), or
a node.

After each fault the devices become quiet, and these hold: every transaction whose commit returned
on a device is on the server or in that device's discarded list, each is there once and whole, the
versions of the server have no gap, and the dumps of all are the same bytes.

``failover_worker`` is what the processes do, ``torture_workload`` what they write.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from entidb.cbor import decode
from entidb.db import Database, Role, dump
from entidb.db.outbox import read_discarded
from entidb.testing.torture import digest_of, first_difference
from entidb.testing.torture_process import START_SECONDS, TortureFailure, TortureProcess
from entidb.testing.torture_proxy import Proxy
from entidb.testing.torture_workload import SUMS, parts_seen, parts_stored

_MODULE: Final = "entidb.testing.failover_worker"
#: Seconds. It bounds a run that hangs, and decides nothing else.
_DRAIN_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.05
#: Faults of one kind that are named.
_NAMED: Final = 5


@dataclass
class Told:
    """What a device has reported, whatever happened to it since."""

    begun: set[str] = field(default_factory=set)
    committed: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    #: When a cycle that brought something to the server began and ended, and how many it brought.
    cycles: list[tuple[float, float, int]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    drained: int = 0
    synced: int = 0


class DeviceLedger:
    """The file that a device reports to, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.told = Told()
        self._path = path
        self._offset = 0

    def read(self) -> Told:
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        for raw in whole.splitlines():
            self._enter(json.loads(raw))
        return self.told

    def _enter(self, line: dict[str, Any]) -> None:
        told = self.told
        if "begun" in line:
            told.begun.add(line["begun"])
        elif "committed" in line:
            told.committed[line["committed"]] = line["sum"]
        elif "cycle" in line:
            told.cycles.append((*line["cycle"], line["pushed"]))
        elif "refused" in line:
            told.refused[line["refused"]] += 1
        elif "drained" in line:
            told.drained += 1
        elif "synced" in line:
            told.synced += 1
        else:
            told.faults.append(line["fault"])


@dataclass
class Comparison:
    """What a comparison has found; ``faults`` names what is wrong, and is empty if all is well."""

    acknowledged: int = 0
    on_server: int = 0
    discarded: int = 0
    lost: int = 0
    doubled: int = 0
    gaps: int = 0
    unequal: int = 0
    digest: str = ""
    faults: list[str] = field(default_factory=list)


class Fleet:
    """See the module. A context manager: everything it started has ended when it is left.

    ``address`` is what the nodes serve, ``open_server`` opens the database of that name on the
    server for the comparison. ``directory`` keeps the files of devices, and all logs."""

    def __init__(
        self,
        address: str,
        directory: Path,
        open_server: Callable[[str], AbstractContextManager[Database]],
        *,
        nodes: int = 2,
        devices: int = 5,
        pause_s: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.directory = directory
        self._open_server = open_server
        self._pause_s = pause_s
        self._source = random.Random(seed)
        self._links = devices
        self._proxy: Proxy | None = None
        self._ready = [directory / f"node-{number}.ready" for number in range(nodes)]
        self._places: dict[int, tuple[str, int]] = {}
        self.nodes = [
            TortureProcess(
                f"node-{number}",
                "node",
                {"address": address, "ready": str(ready), "seed": number},
                directory,
                _MODULE,
            )
            for number, ready in enumerate(self._ready)
        ]
        self.devices: list[TortureProcess] = []
        self.ledgers: list[DeviceLedger] = []
        self.paths: list[Path] = []
        self._db_id = ""
        self._rounds = 0

    def __enter__(self) -> Fleet:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._proxy = Proxy(self._links)
        self._proxy.__enter__()
        try:
            for node, ready in zip(self.nodes, self._ready, strict=True):
                ready.unlink(missing_ok=True)
                node.start()
            for number in range(len(self.nodes)):
                self._until_it_serves(number)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in (*self.devices, *self.nodes):
            process.discard()
        assert self._proxy is not None
        self._proxy.__exit__(None, None, None)

    # ---- nodes

    def start_node(self, number: int) -> None:
        self._ready[number].unlink(missing_ok=True)
        self.nodes[number].start()
        self._until_it_serves(number)

    def _until_it_serves(self, number: int) -> None:
        ready, node = self._ready[number], self.nodes[number]
        end = time.monotonic() + START_SECONDS
        while not ready.exists():
            node.check()
            if time.monotonic() > end:
                raise TortureFailure(f"{node.name} does not start")
            time.sleep(_POLL_SECONDS)
        address = urlsplit(ready.read_text("utf-8").strip())
        assert address.hostname is not None and address.port is not None
        self._places[number] = (address.hostname, address.port)
        self._balance()

    def kill_node(self, number: int) -> None:
        """SIGKILL; it stays away until ``start_node``."""
        self.nodes[number].kill()
        del self._places[number]
        self._balance()

    def _balance(self) -> None:
        assert self._proxy is not None
        self._proxy.balance(tuple(self._places.values()))

    # ---- devices

    def begin(self, db_id: str) -> None:
        """New devices, on the database of that name; those of before have to be quiet."""
        for device in self.devices:
            device.finish(lambda device=device: device.order("close"))  # type: ignore[misc]
        self._db_id, self._rounds = db_id, 0
        self.paths = [
            self.directory / "devices" / db_id / str(number) for number in range(self._links)
        ]
        self.devices = [self._device(number) for number in range(len(self.paths))]
        self.ledgers = [DeviceLedger(device.ledger) for device in self.devices]
        for device in self.devices:
            device.start()
        self.go_on()
        self.until("writing", lambda told: bool(told.cycles))

    def _device(self, number: int) -> TortureProcess:
        assert self._proxy is not None
        settings = {
            "path": str(self.paths[number]),
            "url": f"http://127.0.0.1:{self._proxy.ports[number]}",
            "db_id": self._db_id,
            "seed": self._source.random(),
            "pause_s": self._pause_s,
        }
        return TortureProcess(
            f"device-{self._db_id}-{number}", "device", settings, self.directory, _MODULE
        )

    def go_on(self) -> None:
        for device in self.devices:
            device.order("go")

    def quiet(self) -> None:
        """Devices write no more, and have what all of them wrote. Raises ``TortureFailure`` if
        that does not come to an end."""
        self._rounds += 1
        for device in self.devices:
            device.order("quiet")
        self.until("drained", lambda told: told.drained >= self._rounds)
        for device in self.devices:
            device.order("sync")
        self.until("in step", lambda told: told.synced >= self._rounds)

    def until(
        self, what: str, done: Callable[[Told], bool], seconds: float = _DRAIN_SECONDS
    ) -> None:
        """Until it is so of every device. Raises ``TortureFailure`` after ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            waiting = [
                device.name
                for device, ledger in zip(self.devices, self.ledgers, strict=True)
                if not done(ledger.read())
            ]
            if not waiting:
                return
            self.check()
            if time.monotonic() > end:
                raise TortureFailure(f"{', '.join(waiting)} not {what} in {seconds:g} s")
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raises ``TortureFailure`` if a process has ended by itself."""
        for process in (*self.nodes, *self.devices):
            if process.running:
                try:
                    process.check()
                except TortureFailure as failure:
                    faults = [each for ledger in self.ledgers for each in ledger.read().faults]
                    raise TortureFailure("\n".join([str(failure), *faults[:_NAMED]])) from failure

    def resumed(self, since: float, seconds: float = _DRAIN_SECONDS) -> tuple[float, float]:
        """Wait until every device has written to the server again, in a cycle that began after
        ``since`` (``time.monotonic``). Seconds from then until the first one has, and the last."""
        self.until("writing again", lambda told: _written_since(told, since) is not None, seconds)
        times = [_written_since(ledger.told, since) or 0.0 for ledger in self.ledgers]
        return min(times) - since, max(times) - since

    def pause(self, since: float) -> tuple[float, float]:
        """As ``resumed``, where what fails goes on working for a while: the longest time since
        ``since`` in which a device brought nothing to the server, of the device with the shortest
        one and of that with the longest."""
        self.resumed(time.monotonic())
        longest = [_longest_pause(ledger.told, since) for ledger in self.ledgers]
        return min(longest), max(longest)

    def acknowledged(self) -> int:
        """Transactions whose commit has returned on a device, until now."""
        return sum(len(ledger.read().committed) for ledger in self.ledgers)

    # ---- comparison

    def compare(self) -> Comparison:
        """While the devices are quiet."""
        found = Comparison()
        with self._open_server(self._db_id) as server:
            found.digest = digest_of(server)
            sums = self._check_versions(server, found)
            for number in range(len(self.devices)):
                self._compare_device(number, sums, server, found)
        begun = set[str]().union(*(ledger.told.begun for ledger in self.ledgers))
        for transaction in set(sums.values()) - begun:
            found.faults.append(f"{transaction} is on the server and no device wrote it")
        return found

    def _check_versions(self, server: Database, found: Comparison) -> dict[str, str]:
        """Transactions by their sum. Each has one version of the server's, and each version is one
        of theirs: one that was done twice has taken two."""
        sums: dict[str, str] = {}
        versions: Counter[int] = Counter()
        for name, raw, version, payload in dump(server):
            if name == SUMS:
                sums[uuid.UUID(bytes=raw).hex] = _tag(payload)
                versions[version] += 1
        twice = len(sums) - len(set(sums.values()))
        missing = set(range(1, server.sequence + 1)).difference(versions)
        found.doubled = twice + sum(count - 1 for count in versions.values())
        found.gaps = len(missing)
        if found.doubled or missing:
            found.faults.append(
                f"{found.doubled} transactions are there twice, and {len(missing)} versions of "
                f"{server.sequence} are no transaction's: {sorted(missing)[:_NAMED]}"
            )
        return sums

    def _compare_device(
        self, number: int, sums: dict[str, str], server: Database, found: Comparison
    ) -> None:
        name, told = self.devices[number].name, self.ledgers[number].read()
        found.faults += [f"{name}: {fault}" for fault in told.faults[:_NAMED]]
        with Database.open(self.paths[number], create=False, role=Role.DEVICE) as device:
            if digest_of(device) != found.digest:
                found.unequal += 1
                where = first_difference(device, server)
                found.faults.append(f"{name} differs from the server: {where}")
            elif number == 0:  # what all have is the same
                found.faults += list(_parts(device))[:_NAMED]
            with device.storage.snapshot() as snapshot:
                gone = {entry.transaction_id.hex() for entry in read_discarded(snapshot)}
        lost = []
        for transaction, sum_id in told.committed.items():
            there = sums.get(sum_id) == transaction
            found.acknowledged += 1
            found.on_server += there
            found.discarded += not there and transaction in gone
            if there == (transaction in gone):
                lost.append(transaction)
        found.lost += len(lost)
        found.faults += [f"{name}: {each} is lost, or there and discarded" for each in lost[:5]]


def _written_since(told: Told, since: float) -> float | None:
    """When the first cycle ended that began after ``since`` and brought something."""
    for began, ended, _ in told.cycles:
        if began >= since:
            return ended
    return None


def _longest_pause(told: Told, since: float) -> float:
    times = [since, *(ended for _, ended, _ in told.cycles if ended > since)]
    return max((later - sooner for sooner, later in pairwise(times)), default=0.0)


def _parts(database: Database) -> Iterator[str]:
    with database.snapshot() as snapshot:
        yield from parts_seen(snapshot)
    yield from parts_stored(database)


def _tag(payload: bytes) -> str:
    tag = decode(payload)["tag"]
    assert isinstance(tag, str)
    return tag


def open_in_postgres(address: str) -> Callable[[str], AbstractContextManager[Database]]:
    """What opens a database of the server at ``address`` (``Fleet``)."""
    from entidb.storage.postgres import PostgresStorage

    @contextlib.contextmanager
    def opened(db_id: str) -> Iterator[Database]:
        store = PostgresStorage.open(address, db_id, create=False)
        with Database(store, role=Role.SERVER) as database:
            yield database

    return opened


__all__ = ["Comparison", "Fleet", "DeviceLedger", "Told", "open_in_postgres"]
