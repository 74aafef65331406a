"""Room that nothing uses is given back to the disk, and never what somebody still reads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from entidb import Database, SyncConfig, SyncEngine
from entidb.server import SyncServer
from entidb.storage import MemoryStorage
from entidb.storage.lmdb import LmdbStorage, holes
from entidb.storage.lmdb.holes import oldest_read, runs_of
from entidb.storage.spare import give_back
from entidb.sync import HttpTransport, LoopbackClient

WAIT_S = 60.0
#: Enough that giving half of it back is worth it.
ROWS = 3000
KEEP = 300


def _has_holes(directory: Path) -> bool:
    probe = directory / "probe"
    with probe.open("wb") as file:
        file.write(bytes(range(256)) * 4096)
        file.flush()
        os.fsync(file.fileno())
        before = os.fstat(file.fileno()).st_blocks
        done = sys.platform == "linux" and holes.punch(file.fileno(), 0, 512 * 1024)
        os.fsync(file.fileno())
        return done and os.fstat(file.fileno()).st_blocks < before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    if not _has_holes(tmp_path):
        pytest.skip("this file system has no holes")
    return tmp_path / "store"


def _key(number: int) -> bytes:
    return b"k%06d" % number


def _value(number: int) -> bytes:
    return number.to_bytes(4, "big") * 250


ALL = {_key(number): _value(number) for number in range(ROWS)}
KEPT = {_key(number): _value(number) for number in range(KEEP)}


def _filled(path: Path) -> LmdbStorage:
    store = LmdbStorage.open(path)
    store.commit(dict(ALL))
    return store


def _empty(store: LmdbStorage) -> None:
    """All but a few rows are gone, in several commits, of which the newest has freed little."""
    for first in range(KEEP, ROWS, 900):
        store.commit({_key(number): None for number in range(first, min(ROWS, first + 900))})
    store.commit({_key(0): _value(0)})


def _disk_bytes(path: Path) -> int:
    return (path / "data.mdb").stat().st_blocks * 512


def _all_of(snapshot: Any) -> dict[bytes, bytes]:
    return dict(snapshot.scan(b"", b"\xff" * 8))


def _give_all(store: LmdbStorage) -> None:
    for _ in range(100):
        if not store.give_back():
            return
    raise AssertionError("there is always more to give back")


def test_what_was_removed_is_given_back_and_what_is_left_is_read_and_written(path: Path) -> None:
    with closing(_filled(path)) as store:
        _empty(store)
        full, size = _disk_bytes(path), (path / "data.mdb").stat().st_size
        _give_all(store)
        assert _disk_bytes(path) < full - 2 * 2**20
        assert (path / "data.mdb").stat().st_size == size
        with store.snapshot() as snapshot:
            assert _all_of(snapshot) == KEPT
        assert list(store.verify()) == []
        store.commit(dict(ALL))
        with store.snapshot() as snapshot:
            assert _all_of(snapshot) == ALL
        assert list(store.verify()) == []
    assert LmdbStorage.closed_faults(path) == []
    with closing(LmdbStorage.open(path)) as again, again.snapshot() as snapshot:
        assert _all_of(snapshot) == ALL


def test_a_snapshot_reads_what_it_saw_and_its_room_is_given_back_after_it(path: Path) -> None:
    with closing(_filled(path)) as store:
        with store.snapshot() as before:
            _empty(store)
            full = _disk_bytes(path)
            assert store.give_back()
            assert _all_of(before) == ALL
            assert _disk_bytes(path) >= full - 2**20
        _give_all(store)
        assert _disk_bytes(path) < full - 2 * 2**20


_READER = """
import sys
from entidb.storage.lmdb import LmdbStorage
store = LmdbStorage.open(sys.argv[1])
with store.snapshot() as snapshot:
    print("reading", flush=True)
    sys.stdin.readline()
    print(len(snapshot.scan(b"", b"\\xff" * 8)), flush=True)
store.close()
"""


@pytest.mark.process
def test_another_process_reads_what_it_saw(path: Path) -> None:
    with closing(_filled(path)) as store:
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with reader:
            assert reader.stdin is not None and reader.stdout is not None
            assert reader.stdout.readline() == "reading\n"
            _empty(store)
            assert store.give_back()
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"{ROWS}\n"
        assert reader.returncode == 0
        full = _disk_bytes(path)
        _give_all(store)
        assert _disk_bytes(path) < full - 2 * 2**20


_KILLED = """
import os, sys
from entidb.storage.lmdb import LmdbStorage, holes
left = int(sys.argv[2])
holes.STEP_PAGES_MAX = 64
punch = holes.punch
def killed(*given):
    global left
    if not left:
        os._exit(9)
    left -= 1
    return punch(*given)
holes.punch = killed
store = LmdbStorage.open(sys.argv[1])
while store.give_back():
    pass
store.close()
"""


@pytest.mark.process
def test_killed_before_any_hole_the_store_is_as_it_was(path: Path, tmp_path: Path) -> None:
    with closing(_filled(path)) as store:
        _empty(store)
    for step in range(100):
        ended = subprocess.run(
            [sys.executable, "-c", _KILLED, str(path), str(step % 4)], check=False
        )
        assert LmdbStorage.closed_faults(path) == []
        with closing(LmdbStorage.open(path)) as store, store.snapshot() as snapshot:
            assert _all_of(snapshot) == KEPT
        if not ended.returncode:
            break
        assert ended.returncode == 9
    assert step >= 3


def test_room_is_given_back_in_bounded_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    punch = holes.punch

    def noted(descriptor: int, offset: int, length: int) -> bool:
        given.append(length)
        return punch(descriptor, offset, length)

    monkeypatch.setattr(holes, "punch", noted)
    monkeypatch.setattr(holes, "STEP_PAGES_MAX", 64)
    with closing(_filled(path)) as store:
        _empty(store)
        steps = 0
        while store.give_back():
            assert 0 < sum(given) <= 2 * 64 * 4096
            given.clear()
            steps += 1
        assert steps > 5


def test_a_file_system_without_holes_is_asked_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def none(descriptor: int, offset: int, length: int) -> bool:
        asked.append(offset)
        return False

    monkeypatch.setattr(holes, "punch", none)
    with closing(_filled(path)) as store:
        _empty(store)
        assert not store.give_back()
        store.commit({b"more": b"1"})
        assert not store.give_back()
        assert len(asked) == 1


def test_who_cannot_write_gives_nothing_back(path: Path) -> None:
    with closing(_filled(path)) as store:
        _empty(store)
    full = _disk_bytes(path)
    with closing(LmdbStorage.open(path, read_only=True)) as store:
        assert not store.give_back()
    assert _disk_bytes(path) == full
    with closing(MemoryStorage()) as memory:
        assert not give_back(memory)


def test_nobody_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> bool:
        raise AssertionError("a hole was made beside a commit")

    monkeypatch.setattr(holes, "punch", never)
    with closing(_filled(path)) as store:
        _empty(store)
        taken, done = threading.Event(), threading.Event()

        def commits() -> None:
            with store._gate.turns.hold():
                taken.set()
                assert done.wait(WAIT_S)

        other = threading.Thread(target=commits)
        other.start()
        try:
            assert taken.wait(WAIT_S)
            assert store.give_back()
        finally:
            done.set()
            other.join()
        # A process that died in a commit: whether that one is durable shows with the next.
        store.turn.memory[8] = 1
        assert store.give_back()
        store.turn.memory[8] = 0


def test_what_is_not_worth_a_hole_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> bool:
        raise AssertionError("a hole was made")

    monkeypatch.setattr(holes, "punch", never)
    with closing(_filled(path)) as store:
        assert not store.give_back()
        store.commit({_key(number): None for number in range(100)})
        assert not store.give_back()


@pytest.mark.parametrize(
    ("table", "oldest"),
    [
        ("(no active readers)\n", sys.maxsize),
        ("    pid     thread     txnid\n      12 7f00 8\n      13 7f01 -\n      14 7f02 6\n", 6),
        ("    pid     thread     txnid\n      13 7f01 -\n", sys.maxsize),
        ("    pid     thread     txnid\n      12 7f00 what\n      14 7f02 6\n", 0),
        ("something else\n", 0),
    ],
)
def test_the_oldest_reader_is_read_from_the_table_or_taken_for_older_than_all(
    table: str, oldest: int
) -> None:
    assert oldest_read(table) == oldest


def test_pages_that_follow_each_other_are_one_run() -> None:
    assert runs_of([]) == []
    assert runs_of([5]) == [(5, 1)]
    assert runs_of([2, 3, 4, 7, 9, 10]) == [(2, 3), (7, 1), (9, 2)]


@pytest.fixture
def pushed(path: Path) -> Iterator[tuple[Path, SyncEngine, Database]]:
    """A device that has just pushed a large outbox."""
    server = SyncServer.in_memory()
    transport = HttpTransport("http://localhost", client=LoopbackClient(server))
    database = Database.open(path)
    notes = database.collection("notes")
    with (
        server,
        closing(database),
        SyncEngine(SyncConfig(db_id="shop"), transport, database) as engine,
    ):
        engine.sync()
        for first in range(0, 12_000, 2000):
            with database.transaction() as tx:
                for number in range(first, first + 2000):
                    tx.collection("notes").add({"n": number, "text": "x" * 100})
        assert engine.sync().pushed == 6
        assert len(notes) == 12_000
        yield path, engine, database


def test_the_file_of_a_device_is_about_as_large_as_after_compacting_when_it_has_been_idle(
    pushed: tuple[Path, SyncEngine, Database],
) -> None:
    path, engine, database = pushed
    full = _disk_bytes(path)
    for _ in range(3):
        engine.sync()
    idle = _disk_bytes(path)
    assert database.verify() == [] and len(database.collection("notes")) == 12_000
    database.compact()
    assert _disk_bytes(path) < idle < full - 2**20
    assert idle < 1.2 * _disk_bytes(path) + 2**20
