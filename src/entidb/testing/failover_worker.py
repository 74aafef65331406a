"""The processes of a fleet (``failover``): a node that serves, or a device that writes and syncs.

    python -m entidb.testing.failover_worker node|device SETTINGS-AS-JSON

A device reports to its standard output, a file that outlives it, as ``torture_worker`` does; and
each cycle that brought something to the server, with its times by the clock that all processes of
the machine share. It takes its orders from standard input, one line each: ``go``, ``quiet``,
``sync``, ``close``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from entidb.db import Database
from entidb.errors import ServerError, SyncError, TransportError
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from entidb.testing.torture_worker import end_with_input, guarded, report
from entidb.testing.torture_workload import Written, write_one

#: Whatever it meets there, every transaction of a device gets to the server.
NAMES: Final = ("client_wins",)


def run_node(settings: dict[str, Any]) -> None:
    """Serve until SIGTERM; the address goes to the file ``ready``."""
    from entidb.server import ServerConfig, serve

    config = ServerConfig(
        data_dir=settings["address"],
        insecure_no_auth=True,
        access_log=False,
        shutdown_timeout_s=5.0,
    )
    threading.Thread(target=end_with_input, daemon=True).start()
    serve(config, port=0, ready_file=settings["ready"])


class FleetDevice:
    """Writes and syncs at the same time, each on a thread of its own, from ``go`` to ``quiet``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._source = random.Random(settings["seed"])
        self._pause_s = settings["pause_s"]
        self._quiet = threading.Event()
        self._threads: list[threading.Thread] = []
        self._database = Database.open(settings["path"])
        config = _config(settings["db_id"])
        self._engine = SyncEngine(config, settings["url"], self._database)

    def run(self) -> None:
        """Obey the lines of standard input until it ends."""
        orders = {"go\n": self._go, "quiet\n": self._be_quiet, "sync\n": self._catch_up}
        for line in sys.stdin:
            if line == "close\n":
                self._engine.close()
                self._database.close()
                return
            orders[line]()
        os._exit(0)  # the parent has gone

    def _go(self) -> None:
        self._quiet.clear()
        for work in (self._write, self._sync):
            thread = threading.Thread(target=guarded, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _be_quiet(self) -> None:
        self._quiet.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._drain()
        report(drained=self._engine.status().cursor)

    def _catch_up(self) -> None:
        self._drain()
        report(synced=self._engine.status().cursor)

    def _drain(self) -> None:
        """Cycles until nothing is pending. Its end is up to the parent's patience."""
        while True:
            done = self._cycle()
            status = self._engine.status()
            if done and not status.pending and not status.held:
                return
            time.sleep(0.05)

    def _write(self) -> None:
        while not self._quiet.is_set():
            written = write_one(self._database, self._source, _begun, NAMES)
            report(committed=written.transaction, sum=written.sum)
            time.sleep(self._source.random() * self._pause_s * 2)

    def _sync(self) -> None:
        source = random.Random(self._source.random())
        while not self._quiet.is_set():
            self._cycle()
            time.sleep(source.random() * 0.1)

    def _cycle(self) -> bool:
        """Whether it got to its end."""
        began = time.monotonic()
        try:
            done = self._engine.sync()
        except (TransportError, ServerError) as error:
            # What this is all about; the next cycle goes on from here (R9).
            report(refused=error.code, at=time.monotonic())
            return False
        except SyncError as error:
            if error.code != "rounds_exhausted":
                raise
            return False
        if done.pushed:
            report(cycle=[began, time.monotonic()], pushed=done.pushed)
        return True


def _config(db_id: str) -> SyncConfig:
    return SyncConfig(
        db_id=db_id,
        policies={"client_wins": "client_wins"},
        # Small, so that there are many batches and pages for something to happen between.
        push_operations_max=40,
        pull_operations_max=200,
        connect_timeout_s=2.0,
        read_timeout_s=3.0,
        total_timeout_s=5.0,
        retry=RetryConfig(attempts_max=1),
    )


def _begun(written: Written) -> None:
    report(begun=written.transaction, sum=written.sum)


def main(role: str, settings: dict[str, Any]) -> None:
    if os.getppid() != settings["parent"]:
        os._exit(0)  # it went before the system was asked
    if role == "node":
        run_node(settings)
        return
    Path(settings["path"]).parent.mkdir(parents=True, exist_ok=True)
    guarded(FleetDevice(settings).run)


if __name__ == "__main__":
    os.umask(0o077)
    main(sys.argv[1], json.loads(sys.argv[2]))


__all__ = ["NAMES", "FleetDevice", "run_node"]
