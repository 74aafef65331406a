"""What becomes of nodes whose PostgreSQL is there and of no use: frozen, demoted, full, without a
connection left, or with another password. Devices are told to come again, nothing is lost, and all
goes on by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from entidb.protocol import PullResponse, Verdict
from entidb.storage.postgres import pulse
from tests.server.support import pull
from tests.server.test_app import eventually
from tests.server.test_nodes import Ledger, Nodes
from tests.storage.lmdb.test_lmdb_traps import small_disk
from tests.storage.postgres_cluster import MISSING, Cluster, Standby, cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]
BUSY = (503, "busy", True)
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_EVERY_S", 0.2)
    monkeypatch.setattr(pulse, "_ANSWER_S", 1.0)


def suffer(
    nodes: Nodes,
    begin: Callable[[], object],
    end: Callable[[], object],
    answer: tuple[int, str, bool] = BUSY,
) -> None:
    """Devices write before, during and after something that lasts from ``begin`` to ``end``."""
    with Ledger(nodes, 4) as ledger:
        ledger.goes_on()
        begin()
        try:
            ledger.is_refused()
            assert nodes.clients[0].request("GET", "/healthz").status == 200
            if answer == BUSY:
                eventually(lambda: is_unready(nodes))
        finally:
            end()
        ledger.goes_on()
        ledger.goes_on()
    assert set(ledger.refused) <= {BUSY, answer} and ledger.refused[answer]
    assert set(ledger.verdicts) == {Verdict.ACCEPTED}
    page = nodes.clients[1].send(pull(ledger.history)).message(PullResponse)
    assert not page.has_more and page.head == len(page.commits)
    there = {each.entity_id for commit in page.commits for each in commit.operations}
    assert there >= ledger.acknowledged and len(there) == page.head


def is_unready(nodes: Nodes) -> bool:
    """One that is refused may have been the other node: this one has the place that was free."""
    ready = nodes.clients[0].request("GET", "/readyz")
    return (ready.status, json.loads(ready.body).get("reasons")) == (503, ["storage"])


def end_connections(address: str) -> None:
    """Of everybody else."""
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'entidb' AND pid <> pg_backend_pid()"
        )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_server_that_is_frozen() -> None:
    with cluster() as own, Nodes(own.address, 2) as nodes:
        suffer(nodes, own.freeze, own.thaw)


def test_a_server_that_becomes_a_standby_and_leads_again() -> None:
    with cluster() as own, Nodes(own.address, 2) as nodes:

        def demote() -> None:
            own.stop(signal.SIGINT)
            (own.data / "standby.signal").touch()
            own.start()

        def promote() -> None:
            follower = Standby(own.folder, own.port)
            follower.promote()

        suffer(nodes, demote, promote)


def test_a_server_without_a_connection_left() -> None:
    with cluster() as own:
        own.stop(signal.SIGINT)
        own.start(max_connections="40", superuser_reserved_connections="0")
        taken: list[psycopg.Connection[tuple[object, ...]]] = []

        def take_all() -> None:
            deadline = time.monotonic() + WAIT_S
            while True:
                assert time.monotonic() < deadline
                try:
                    taken.append(psycopg.connect(own.address, autocommit=True))
                except psycopg.OperationalError:
                    if not is_there(taken[0]):
                        return
                    # Whoever comes first gets the place: by and by all are ours.
                    end_some(taken[0])

        def give_back() -> None:
            for each in taken:
                each.close()

        with Nodes(own.address, 2) as nodes:
            suffer(nodes, take_all, give_back)


def is_there(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether a node has a connection."""
    asked = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'entidb' LIMIT 1"
    return connection.execute(asked).fetchone() is not None


def end_some(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'entidb' LIMIT 2"
    )


def test_a_password_that_changes() -> None:
    with cluster() as own:
        with psycopg.connect(own.address, autocommit=True) as connection:
            connection.execute("CREATE ROLE nodes LOGIN PASSWORD 'first'")
            connection.execute("CREATE DATABASE shops OWNER nodes")
        rules = own.data / "pg_hba.conf"
        rules.write_text("local all nodes scram-sha-256\n" + rules.read_text())
        own.set(log_connections="on")  # reads the rules again
        address = own.address.replace("///postgres?", "///shops?").replace(
            f"user={own.user}", "user=nodes"
        )

        def change(to: str) -> None:
            with psycopg.connect(own.address, autocommit=True) as connection:
                connection.execute(f"ALTER ROLE nodes PASSWORD '{to}'".encode())
            end_connections(own.address)

        with Nodes(f"{address}&password=first", 2) as nodes:
            suffer(nodes, lambda: change("second"), lambda: change("first"))


def test_a_disk_that_is_full() -> None:
    # Below a directory that the user of PostgreSQL may enter.
    with tempfile.TemporaryDirectory(prefix="entidb-small-") as above:
        os.chmod(above, 0o755)
        disk = Path(above) / "disk"
        with small_disk(disk, "120m"):
            own = Cluster(disk)
            own.make()
            own.start(max_wal_size="32MB", min_wal_size="32MB")
            filler = disk / "filler"

            def fill() -> None:
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(b"x" * 4096):
                        pass

            try:
                with Nodes(own.address, 2) as nodes:
                    suffer(nodes, fill, filler.unlink, (507, "storage_full", True))
            finally:
                own.stop()
