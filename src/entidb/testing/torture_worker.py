"""The processes of a torture run: one server, or one client with a device database.

    python -m entidb.testing.torture_worker server|client SETTINGS-AS-JSON

A client reports to its standard output, a file that outlives it: what it begins, what was committed
(strictly after ``commit`` has returned), and anything that must not happen. It takes its orders
from standard input, one line each. Both end with their parent, whatever ends it.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Final

from entidb.db import Database
from entidb.errors import EntiDBError, ServerError, StorageError, SyncError, TransportError
from entidb.sync import RetryConfig, SyncConfig, SyncEngine
from entidb.testing.torture_workload import Written, parts_seen, write_one

DB_ID: Final = "torture"
_DIE_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG, prctl(2)
_POLICIES: Final = {
    "client_wins": "client_wins",
    "last_write_wins": "last_write_wins",
    "manual": "manual",
}


_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Even a stopped process is killed when its parent goes, where the system can do that. Called
    between fork and exec: a worker can be stopped before it has run a line of its own."""
    if _LIBC is not None:
        _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


# ---------------------------------------------------------------- server


def run_server(settings: dict[str, Any]) -> None:
    """Serve until SIGTERM; the address goes to the file ``ready``."""
    from entidb.server import ServerConfig, serve

    config = ServerConfig(
        data_dir=settings["path"],
        insecure_no_auth=True,
        access_log=False,
        head_timeout_s=3.0,
        body_timeout_s=3.0,
        write_timeout_s=3.0,
        shutdown_timeout_s=5.0,
    )
    threading.Thread(target=end_with_input, daemon=True).start()
    serve(config, port=0, ready_file=settings["ready"])


def end_with_input() -> None:
    """End this process when its parent closes the other end of its standard input."""
    sys.stdin.read()
    os._exit(0)


# ---------------------------------------------------------------- client


class Client:
    """Writes, syncs and reads at the same time, each on a thread of its own, until the order
    ``quiet``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._source = random.Random(settings["seed"])
        self._pause_s = settings["pause_s"]
        self._quiet = threading.Event()
        self._threads: list[threading.Thread] = []
        self._database = Database.open(settings["path"])
        self._engine = SyncEngine(_config(), settings["url"], self._database)

    def run(self) -> None:
        """Obey the lines of standard input: ``quiet``, ``sync``, and the end."""
        for work in (self._write, self._sync, self._read):
            thread = threading.Thread(target=guarded, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)
        for line in sys.stdin:
            if line == "quiet\n":
                self._be_quiet()
            elif line == "sync\n":
                self._drain()
                report(synced=self._engine.status().cursor)
            elif line == "close\n":
                self._engine.close()
                self._database.close()
                return
        os._exit(0)  # the parent has gone

    def _be_quiet(self) -> None:
        self._quiet.set()
        for thread in self._threads:
            thread.join()
        self._drain()
        report(drained=self._engine.status().cursor)

    def _drain(self) -> None:
        """Cycles until nothing is pending. Its end is up to the parent's patience (LIVENESS)."""
        while True:
            self._cycle(resolve=True)
            status = self._engine.status()
            if not status.pending and not status.held and not status.conflicts:
                return

    def _write(self) -> None:
        while not self._quiet.is_set():
            written = write_one(self._database, self._source, _begun)
            report(committed=written.transaction, sum=written.sum)
            if self._source.random() < 0.002:
                self._compact()
            time.sleep(self._source.random() * self._pause_s * 2)

    def _compact(self) -> None:
        try:
            self._database.compact()
        except StorageError as error:
            # A reader's snapshot that is open for longer than it waits: mostly a stopped process.
            if type(error) is not StorageError:
                raise

    def _sync(self) -> None:
        source = random.Random(self._source.random())
        while not self._quiet.is_set():
            self._cycle(resolve=source.random() < 0.1)
            time.sleep(source.random() * 0.1)

    def _cycle(self, *, resolve: bool) -> None:
        try:
            self._engine.sync()
            # One decision may settle others, so they are listed again after each.
            while resolve and (conflicts := self._engine.conflicts()):
                self._engine.resolve(conflicts[0], self._source.choice(("mine", "theirs")))
        except (TransportError, ServerError):
            pass  # what this is all about; the next cycle goes on from here (R9)
        except SyncError as error:
            if error.code != "rounds_exhausted":
                raise

    def _read(self) -> None:
        while not self._quiet.is_set():
            with self._database.snapshot() as snapshot:
                for fault in parts_seen(snapshot):
                    report(fault=f"WHOLE: {fault}")
            time.sleep(0.2)


def _config() -> SyncConfig:
    return SyncConfig(
        db_id=DB_ID,
        policies=_POLICIES,
        # Small, so that there are many batches and pages for something to happen between.
        push_operations_max=40,
        pull_operations_max=60,
        connect_timeout_s=1.0,
        read_timeout_s=1.0,
        total_timeout_s=2.0,
        retry=RetryConfig(attempts_max=3, delay_initial_s=0.02, delay_max_s=0.2),
    )


def _begun(written: Written) -> None:
    report(begun=written.transaction, sum=written.sum)


def report(**line: Any) -> None:
    """One line of the ledger, in one write: a kill leaves all of it or nothing."""
    os.write(sys.stdout.fileno(), json.dumps(line).encode() + b"\n")


def guarded(work: Any) -> None:
    """Do ``work``, and end the process if it raises."""
    try:
        work()
    except BaseException:
        # A thread that ends in silence would look like a quiet client.
        report(fault=traceback.format_exc())
        os._exit(3)


def main(role: str, settings: dict[str, Any]) -> None:
    if os.getppid() != settings["parent"]:
        os._exit(0)  # it went before the system was asked
    if role == "server":
        run_server(settings)
        return
    try:
        Client(settings).run()
    except EntiDBError:
        report(fault=traceback.format_exc())
        os._exit(3)


if __name__ == "__main__":
    os.umask(0o077)
    Path(json.loads(sys.argv[2])["path"]).parent.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], json.loads(sys.argv[2]))
