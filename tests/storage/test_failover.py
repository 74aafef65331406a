"""Failover: a primary and its synchronous standby, two nodes and their devices.

``scripts/failover`` does it with three servers under Patroni, for hours."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from entidb.db import Database, Role
from entidb.errors import CommitUnknownError, StorageError
from entidb.storage.base import OPENING_SHIFT
from entidb.storage.postgres import PostgresStorage, node, pulse
from entidb.testing.failover import DeviceLedger, Fleet, open_in_postgres
from tests.storage.postgres_cluster import MISSING, Cluster, Standby, address_of, pair

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]
ROOT = Path(__file__).parents[2]
WAIT_S = 60.0


@pytest.fixture
def servers() -> Iterator[tuple[Cluster, Standby]]:
    with pair() as made:
        yield made


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def works(do: Callable[[], object]) -> bool:
    try:
        do()
    except StorageError:
        return False
    return True


def test_nothing_is_lost_when_the_primary_is_killed_and_its_standby_leads(
    servers: tuple[Cluster, Standby], tmp_path: Path
) -> None:
    primary, standby = servers
    address = address_of(primary, standby)
    with Fleet(address, tmp_path, open_in_postgres(address), devices=3, pause_s=0.03) as fleet:
        fleet.begin("shop")
        before = fleet.acknowledged()
        until(lambda: fleet.acknowledged() > before + 50)
        primary.kill()
        killed = time.monotonic()
        standby.promote()
        fleet.resumed(killed)
        fleet.kill_node(0)
        fleet.resumed(time.monotonic())
        fleet.start_node(0)
        fleet.quiet()
        found = fleet.compare()
        assert found.faults == []
        assert found.lost == found.doubled == found.gaps == found.unequal == 0
        assert found.acknowledged == found.on_server > 50


def test_a_primary_that_was_replaced_while_it_was_frozen_is_not_written_to(
    servers: tuple[Cluster, Standby], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still thinks that it leads when it goes on, and so do the connections to it."""
    primary, standby = servers
    monkeypatch.setattr(pulse, "_EVERY_S", 0.1)
    monkeypatch.setattr(pulse, "_ANSWER_S", 0.5)
    monkeypatch.setattr(node, "BARRIER_S", 1.0)
    address, name = address_of(primary, standby), uuid.uuid4().hex
    alone = PostgresStorage.open(primary.address, name)
    alone.commit({b"a": b"1"})
    store = PostgresStorage.open(address, name)
    with contextlib.closing(store):
        assert store.commit({b"a": b"2"}) == 2
    raised: list[BaseException] = []

    def commits() -> None:
        try:
            alone.commit({b"a": b"never"})
        except BaseException as error:
            raised.append(error)

    primary.freeze()
    thread = threading.Thread(target=commits)
    try:
        standby.promote()
        thread.start()
        opened: list[PostgresStorage] = []
        until(lambda: works(lambda: opened.append(PostgresStorage.open(address, name))))
        store = opened[0]
        assert store.commit({b"a": b"3"}) % (1 << OPENING_SHIFT) == 3
    finally:
        primary.thaw()
    with contextlib.closing(store):
        # Nobody acknowledges what the old one is asked to commit, also now that it goes on.
        thread.join(WAIT_S)
        assert len(raised) == 1 and isinstance(raised[0], CommitUnknownError | StorageError)
        assert not works(lambda: PostgresStorage.open(primary.address, name))
        assert store.commit({b"a": b"4"}) % (1 << OPENING_SHIFT) == 4
        with store.snapshot() as snapshot:
            assert snapshot.get(b"a") == b"4" and snapshot.mark % (1 << OPENING_SHIFT) == 4
    with contextlib.suppress(StorageError):
        alone.close()


def test_what_a_standby_says_of_writing_makes_a_node_look_for_the_one_that_leads(
    servers: tuple[Cluster, Standby],
) -> None:
    """SQLSTATE 25006, on connections that are still there."""
    primary, standby = servers
    address, name = address_of(primary, standby), uuid.uuid4().hex
    with contextlib.closing(PostgresStorage.open(address, name)) as store:
        store.commit({b"a": b"1"})
        primary.set(default_transaction_read_only="on")
        until(lambda: not works(lambda: store.commit({b"a": b"2"})))
        standby.promote()
        until(lambda: works(lambda: store.commit({b"a": b"3"})))
        with (
            contextlib.closing(PostgresStorage.open(standby.address, name)) as new,
            new.snapshot() as snapshot,
        ):
            assert snapshot.get(b"a") == b"3"


# ---------------------------------------------------------------- the comparison can fail


def test_the_comparison_shows_what_is_lost_doubled_or_different(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text(
        '{"begun": "aa", "sum": "01"}\n{"committed": "aa", "sum": "01"}\n{"cycle": [1.0, 2.5], '
        '"pushed": 1}\n{"refused": "server_busy", "at": 2.0}\n{"fault": "half'
    )
    ledger = DeviceLedger(tmp_path / "ledger")
    told = ledger.read()
    assert (told.begun, told.committed, told.cycles) == ({"aa"}, {"aa": "01"}, [(1.0, 2.5, 1)])
    assert told.refused == {"server_busy": 1} and told.faults == []
    with (tmp_path / "ledger").open("a") as file:
        file.write(' a line"}\n{"drained": 7}\n')
    assert ledger.read().faults == ["half a line"] and told.drained == 1

    server, device = Database.in_memory(role=Role.SERVER), tmp_path / "device"
    with Database.open(device) as database:
        database.collection("sums").add({"tag": "aa", "before": {}, "deleted": []})

    @contextlib.contextmanager
    def opens(db_id: str) -> Iterator[Database]:
        yield server

    fleet = Fleet("", tmp_path, opens, nodes=0, devices=1)
    named: Any = type("Named", (), {"name": "device"})()
    fleet.devices, fleet.ledgers, fleet.paths = [named], [ledger], [device]
    found = fleet.compare()
    assert (found.acknowledged, found.lost, found.unequal) == (1, 1, 1)
    assert any("half a line" in fault for fault in found.faults)
    assert any("aa is lost" in fault for fault in found.faults)


def test_the_rig_says_in_one_line_what_is_not_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.patroni_rig", "--demo"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error[not_installed]: not installed: ") and "apt-get" in line


def test_what_a_run_leaves_when_it_is_killed_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "server").mkdir(parents=True)
    for last_words, ends in (("all is well\n", False), ("", True)):
        left = subprocess.Popen(["sleep", "600"], cwd=folder / "server")
        subprocess.run(
            [sys.executable, "-m", "scripts.patroni_rig.janitor", str(folder)],
            cwd=ROOT,
            input=last_words,
            text=True,
            timeout=WAIT_S,
            check=True,
        )
        assert folder.exists() is not ends
        if not ends:
            assert left.poll() is None
            left.kill()
        left.wait(WAIT_S)
