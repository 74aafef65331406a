"""The sync engines of several processes on one database: one cycle at a time, one in the
background, and the next when that one ends."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entidb.db import Database
from entidb.errors import DatabaseLockedError, StorageError, SyncCancelledError
from entidb.storage import MemoryStorage
from entidb.sync import SyncConfig, SyncEngine, others
from entidb.sync.state import SyncState
from tests.support import Device, Wire, World, assert_in_step

linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="one process at a time there"
)


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.002)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def first(world: World) -> Device:
    return world.device()


@pytest.fixture
def second(world: World, first: Device) -> Iterator[SyncEngine]:
    """The engine of another process on the database of the first."""
    inner = first.storage.inner
    assert isinstance(inner, MemoryStorage)
    with (
        Database(inner.another()) as database,
        SyncEngine(SyncConfig(db_id="shop"), Wire(world), database) as engine,
    ):
        yield engine


def test_both_sync_by_hand_in_turns(world: World, first: Device, second: SyncEngine) -> None:
    first.put(("notes", 1, "x"))
    assert second.sync().pushed == 1
    second.database["notes"].add("y")
    assert first.sync().pushed == 1
    world.put(("notes", 3, "z"))
    assert first.sync().pulled == 1
    assert second.sync().pulled == 0
    assert_in_step(world, first)


def test_a_sync_waits_for_the_cycle_of_another_and_then_reports(
    first: Device, second: SyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert second.database.right("engine").take(0)
    first.put(("notes", 1, "x"))
    monkeypatch.setattr(others, "OTHERS_S", 0.0)
    with pytest.raises(DatabaseLockedError, match=r"another (opener|process)"):
        first.engine.sync()
    with pytest.raises(DatabaseLockedError):
        first.engine.reset("server")
    monkeypatch.setattr(others, "OTHERS_S", 60.0)
    second.database.right("engine").give_back()
    assert first.engine.sync().pushed == 1


def test_waiting_for_another_can_be_cancelled(first: Device, second: SyncEngine) -> None:
    assert first.db.right("engine").take(0)
    raised: list[BaseException] = []

    def sync() -> None:
        try:
            second.sync()
        except SyncCancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=sync)
    thread.start()
    until(lambda: second.cycle_thread is not None)
    while thread.is_alive():
        second.cancel()
        thread.join(0.01)
    assert len(raised) == 1
    first.db.right("engine").give_back()
    second.sync()


def test_the_second_in_the_background_stands_by_and_takes_over(
    world: World, first: Device, second: SyncEngine
) -> None:
    third = SyncEngine(SyncConfig(db_id="shop"), Wire(world), _beside(first))
    second.start()
    until(lambda: second.state is SyncState.SYNCED)
    third.start()
    until(lambda: third.state is SyncState.STANDBY)
    assert third.status().state is SyncState.STANDBY
    began = time.monotonic()
    second.stop()
    until(lambda: third.state is not SyncState.STANDBY)
    assert time.monotonic() - began < 30
    third.close()
    third.database.close()


def _beside(device: Device) -> Database:
    inner = device.storage.inner
    assert isinstance(inner, MemoryStorage)
    return Database(inner.another())


def test_standing_by_ends_at_once_when_it_is_stopped_or_closed(
    first: Device, second: SyncEngine
) -> None:
    assert first.db.right("background").take(0)
    for end in (second.stop, second.close):
        second.start()
        until(lambda: second.state is SyncState.STANDBY)
        end()
        assert second.state is not SyncState.STANDBY


def test_what_another_process_commits_starts_a_cycle_in_the_background(
    world: World, first: Device, second: SyncEngine
) -> None:
    second.start()
    until(lambda: second.state is SyncState.SYNCED)
    first.put(("notes", 1, "x"))
    second.database.hear_others()  # as the thread that hears does
    until(lambda: second.status().pending == 0 and second.state is SyncState.SYNCED)
    second.stop()
    assert world.server.sequence == 1


BACKGROUND = """
import sys, time
from entidb import Database, SyncConfig, SyncEngine
from entidb.sync import MockTransport
database = Database.open(sys.argv[1])
engine = SyncEngine(SyncConfig(db_id="shop"), MockTransport([]), database)
engine.start()
right = database.right("background")
while not right.mine:
    time.sleep(0.005)
print("runs", flush=True)
time.sleep(600)
"""


@pytest.mark.process
@linux
def test_the_engine_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", BACKGROUND, str(tmp_path / "db")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with running, contextlib.ExitStack() as end:
        end.callback(running.kill)
        assert running.stdout is not None and running.stdout.readline() == b"runs\n"
        with (
            Database.open(tmp_path / "db") as database,
            SyncEngine(SyncConfig(db_id="shop"), "http://127.0.0.1:9", database) as engine,
        ):
            engine.start()
            until(lambda: engine.state is SyncState.STANDBY)
            assert database.right("background").holder() == f"process {running.pid}"
            running.kill()
            until(lambda: database.right("background").mine)
            until(lambda: engine.state is not SyncState.STANDBY)


@pytest.fixture
def on_disk(world: World, tmp_path: Path) -> Iterator[SyncEngine]:
    with (
        Database.open(tmp_path / "db") as database,
        SyncEngine(SyncConfig(db_id="shop"), Wire(world), database) as engine,
    ):
        yield engine


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int) -> list[str]:
    """Makes the making of the file ``name`` fail so often; which were refused."""
    refused: list[str] = []
    opened = os.open

    def open_failing(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_CREAT and str(path).endswith(name) and len(refused) < times:
            refused.append(path)
            raise OSError(number, os.strerror(number), path)
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", open_failing)
    return refused


@linux
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "storage_full"),
        (errno.EDQUOT, "storage_full"),
        (errno.EIO, "storage_error"),
        (errno.EROFS, "storage_error"),
        (errno.EMFILE, "storage_error"),
    ],
)
def test_a_first_sync_whose_right_cannot_be_had_says_so_in_our_words(
    on_disk: SyncEngine, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    """The file that says which process runs a cycle is made with the first one."""
    on_disk.database["notes"].add("x")
    assert refusing(monkeypatch, "entidb.engine", number, 2) == []
    with pytest.raises(StorageError, match=r"entidb\.engine") as raised:
        on_disk.sync()
    assert raised.value.code == code
    with pytest.raises(StorageError, match=r"entidb\.engine"):
        on_disk.reset("server")
    assert on_disk.sync().pushed == 1


@linux
def test_two_processes_that_sync_for_the_first_time_at_once_both_do(
    on_disk: SyncEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The other one has made the file just when this one is about to."""
    on_disk.database["notes"].add("x")
    opened, made = os.open, list[str]()

    def other_first(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_EXCL and str(path).endswith("entidb.engine") and not made:
            made.append(path)
            os.close(opened(path, os.O_CREAT | os.O_RDWR, 0o600))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", other_first)
    assert on_disk.sync().pushed == 1 and made


@linux
def test_an_engine_in_the_background_outlasts_a_disk_that_has_no_room_for_its_right(
    on_disk: SyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended without a word, and nothing was synchronised until the program began again."""
    monkeypatch.setattr("entidb.sync.background.STANDBY_S", 0.01)
    refused = refusing(monkeypatch, "entidb.background", errno.ENOSPC, 3)
    on_disk.database["notes"].add("x")
    on_disk.start()
    until(lambda: on_disk.status().pending == 0)
    assert len(refused) == 3
    on_disk.stop()
