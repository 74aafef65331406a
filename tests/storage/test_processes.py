"""A store on disk that several processes have open: who comes, who goes, and who dies."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from entidb.errors import DatabaseLockedError, StorageFullError
from entidb.storage import LmdbStorage
from entidb.storage.lmdb import company, turn
from entidb.storage.opening import closed_faults
from entidb.testing.contracts import read_all
from entidb.testing.openers import DEAD_SECONDS, ProcessOpener
from tests.storage.lmdb.test_lmdb_traps import run_killed, run_python
from tests.storage.lmdb.test_place import OPEN_AND_SAY

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="one process at a time there"
)


def small(path: str) -> LmdbStorage:
    """With a map that soon has to grow."""
    return LmdbStorage.open(path, map_bytes=1 << 20, drain_seconds=0.2)


def to_look(path: str) -> LmdbStorage:
    return LmdbStorage.open(path, read_only=True)


@contextlib.contextmanager
def other(path: Path, opens: str = "entidb.storage:open_storage") -> Iterator[ProcessOpener]:
    with contextlib.closing(ProcessOpener(opens, str(path))) as opener:
        yield opener


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LmdbStorage]:
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as made:
        made.commit({b"a": b"1"})
        yield made


# ---------------------------------------------------------------- coming and going


def test_whoever_leaves_last_notes_that_the_file_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_closed() -> bool:
        return b"closed " in (tmp_path / "db" / "entidb.lock").read_bytes()

    with other(tmp_path / "db") as one, other(tmp_path / "db") as two:
        one.commit({b"a": b"1"})
        one.close()
        assert not is_closed()
        two.commit({b"b": b"1"})
        two.close()
        assert is_closed()
    looks: list[str] = []
    monkeypatch.setattr("entidb.storage.lmdb.doubt.known_faults", looks.append)
    LmdbStorage.open(tmp_path / "db").close()
    assert looks == []


def test_what_one_met_that_may_be_damage_is_looked_at_whoever_leaves_last(
    store: LmdbStorage, tmp_path: Path
) -> None:
    with other(tmp_path / "db") as opener:
        store._gate.doubtful = True
        store.close()
        opener.commit({b"b": b"1"})
        with other(tmp_path / "db") as third:  # it may still be joined
            assert third.read() == {b"a": b"1", b"b": b"1"}
    assert b"closed " not in (tmp_path / "db" / "entidb.lock").read_bytes()


def test_what_the_dead_leave_is_looked_at_by_who_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    with other(tmp_path / "db") as one:
        one.commit({b"a": b"1"})
        one.die()

    def look(data: str) -> list[str]:
        looks.append(data)
        return []

    monkeypatch.setattr("entidb.storage.lmdb.doubt.known_faults", look)
    with contextlib.closing(LmdbStorage.open(tmp_path / "db")) as store:
        assert read_all(store) == {b"a": b"1"}
    assert len(looks) == 1


def test_processes_that_make_a_store_at_the_same_time_make_one(tmp_path: Path) -> None:
    code = """
        import sys
        from entidb.db import Database
        with Database.open(sys.argv[1]) as database:
            print(database.device_id.hex())
    """
    for n in range(4):
        with ThreadPoolExecutor(4) as pool:
            said = set(pool.map(lambda path: run_python(code, path), [str(tmp_path / str(n))] * 4))
        assert len(said) == 1


def test_a_file_that_all_share_and_that_was_deleted_lets_nobody_in(store: LmdbStorage) -> None:
    for name in ("lock.mdb", turn.TURN):
        path = Path(store.path, name)
        path.rename(path.with_name("aside"))
        said = run_python(OPEN_AND_SAY, store.path)
        assert f"is open in process {os.getpid()}; close it there" in said
        assert f"{name} was deleted or replaced" in said
        path.with_name("aside").rename(path)
    with other(Path(store.path)) as opener:
        assert opener.read() == {b"a": b"1"}


def test_processes_that_cannot_see_each_other_do_not_share(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Path(store.path, "entidb.lock")
    note = lock.read_bytes()
    namespace = company._namespace().encode()
    lock.write_bytes(note.replace(b" " + namespace + b" ", b" 4711 "))
    said = run_python(OPEN_AND_SAY, store.path)
    assert f"is open in process {os.getpid()}" in said and "in another container" in said
    lock.write_bytes(note)


# ---------------------------------------------------------------- needing it alone


def test_compacting_waits_for_the_others_and_says_who_they_are(
    store: LmdbStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit({b"%05d" % n: bytes(500) for n in range(2000)})
    store.commit({b"%05d" % n: None for n in range(2000)})
    monkeypatch.setattr(company, "ALONE_SECONDS", 0.1)
    with other(tmp_path / "db") as opener:
        before = store.mark()
        with pytest.raises(DatabaseLockedError, match=f"process {opener.pid} too"):
            store.compact()
        # Nothing was changed, and both go on.
        assert store.mark() == before
        opener.commit({b"b": b"1"})
        store.commit({b"c": b"1"})
        assert opener.read() == {b"a": b"1", b"b": b"1", b"c": b"1"}
        monkeypatch.setattr(company, "ALONE_SECONDS", 60.0)
        leaving = threading.Timer(0.1, opener.close)
        leaving.start()
        mark = store.mark()
        store.compact()
        leaving.join()
        assert store.mark() == mark  # the same state
        assert store.commit({b"d": b"1"}) == mark + 1
    with other(tmp_path / "db") as opener:
        assert opener.read().keys() == {b"a", b"b", b"c", b"d"}


def test_a_closed_store_is_looked_at_only_when_it_is_closed(store: LmdbStorage) -> None:
    with other(Path(store.path)) as opener:
        store.close()
        with pytest.raises(DatabaseLockedError, match=f"process {opener.pid}"):
            closed_faults(store.path)
    assert closed_faults(store.path) == []


# ---------------------------------------------------------------- reading beside


def test_who_only_reads_reads_beside_those_who_write(store: LmdbStorage) -> None:
    with other(Path(store.path), "tests.storage.test_processes:to_look") as reader:
        for n in range(100):
            store.commit({b"n": b"%d" % n, b"%03d" % n: bytes(2000)})
            store.commit({b"%03d" % n: None})
            assert reader.read()[b"n"] == b"%d" % n
        store.close()
        with other(Path(store.path)) as writer:
            writer.commit({b"n": b"after"})
            assert reader.read()[b"n"] == b"after"


def test_who_only_reads_keeps_those_who_would_write_out_for_a_bounded_time(
    store: LmdbStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(store.path)
    store.close()
    with other(path, "tests.storage.test_processes:to_look") as reader:
        with other(path, "tests.storage.test_processes:to_look") as second:
            assert second.read() == reader.read()
        monkeypatch.setattr(company, "_LOOKERS_SECONDS", 0.05)
        with pytest.raises(DatabaseLockedError):
            LmdbStorage.open(path)
        monkeypatch.setattr(company, "_LOOKERS_SECONDS", 60.0)
        leaving = threading.Timer(0.1, reader.close)
        leaving.start()
        LmdbStorage.open(path).close()
        leaving.join()


# ---------------------------------------------------------------- growing


def test_growth_by_another_process_reaches_no_reader_and_no_writer(tmp_path: Path) -> None:
    with (
        contextlib.closing(small(str(tmp_path / "db"))) as store,
        other(tmp_path / "db", "tests.storage.test_processes:small") as opener,
    ):
        for n in range(12):
            records = {b"%d %03d" % (n, key): bytes(20_000) for key in range(100)}
            assert store.turn.take(10)  # a commit is decided before it meets the growth
            store.turn.give_back()
            opener.commit(records)
            if n % 2:
                assert read_all(store).keys() >= records.keys()
            else:
                store.commit({b"mine %d" % n: bytes(20_000)})
        assert read_all(store) == opener.read()
        assert list(store.verify()) == []


def test_growth_waits_for_open_snapshots_and_says_so(tmp_path: Path) -> None:
    with (
        contextlib.closing(small(str(tmp_path / "db"))) as store,
        other(tmp_path / "db", "tests.storage.test_processes:small") as opener,
    ):
        store.commit({b"a": b"1"})
        with store.snapshot() as old:
            opener.commit({b"%03d" % key: bytes(20_000) for key in range(200)})
            with pytest.raises(StorageFullError, match="grown in another process"):
                store.snapshot()
            assert old.get(b"a") == b"1"
        assert len(read_all(store)) == 201


def test_a_reader_that_died_keeps_no_room_for_good(store: LmdbStorage, tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        snapshot = store.snapshot()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_killed(code, tmp_path / "db")
    for n in range(400):
        store.commit({b"k": b"%d" % n * 30_000})
    assert (tmp_path / "db" / "data.mdb").stat().st_size < 20_000_000


# ---------------------------------------------------------------- dying and stopping

KILLED_IN_A_COMMIT = """
    import os, signal, sys
    from entidb.storage import LmdbStorage
    from entidb.storage.lmdb import open_file
    store = LmdbStorage.open(sys.argv[1])
    class Dies:
        def __init__(self, env):
            self.env = env
        def __getattr__(self, name):
            return getattr(self.env, name)
        def begin(self, write=False):
            txn = self.env.begin(write=write)
            if write:
                txn.put(b"half", b"1")
                os.kill(os.getpid(), signal.SIGKILL)
            return txn
    store._file.env = Dies(store._file.env)
    store.commit({b"b": b"1"})
"""


def test_a_process_killed_in_a_commit_holds_nobody_up_and_leaves_nothing_of_it(
    store: LmdbStorage,
) -> None:
    run_killed(KILLED_IN_A_COMMIT, Path(store.path))
    began = time.monotonic()
    assert store.turn.take(60)
    assert time.monotonic() - began < DEAD_SECONDS
    with store.snapshot() as snapshot:
        assert snapshot.get(b"half") is None
        store.commit({b"c": b"1"}, snapshot.mark)
    store.turn.give_back()
    assert read_all(store) == {b"a": b"1", b"c": b"1"}


#: The number of the newest commit, ``mti_txnid``, in LMDB 0.9's table of readers.
TURN_BACK = """
    import sys
    with open(sys.argv[1], "r+b") as table:
        table.seek(48)
        number = int.from_bytes(table.read(8), sys.byteorder)
        assert 0 < number < 100, number
        table.seek(48)
        table.write((number - 1).to_bytes(8, sys.byteorder))
"""


def test_a_commit_that_was_there_when_its_owner_died_is_seen_by_whoever_takes_the_turn(
    store: LmdbStorage, tmp_path: Path
) -> None:
    """Killed when the header was written, and before LMDB's table said so: then the state that the
    next one decides on would be an older one than the one he commits to."""
    with other(tmp_path / "db") as opener:
        opener.commit({b"b": b"1"})
        opener.commit({b"b": b"2"})
        opener.close()
    # In another process: closing that file would take LMDB's locks away from this one.
    run_python(TURN_BACK, str(tmp_path / "db" / "lock.mdb"))
    with store.snapshot() as snapshot:
        assert snapshot.mark == store.mark() - 1
    died = store.turn
    assert isinstance(died, turn.FileTurn)
    died.memory[turn.COMMITTING] = 1
    run_killed(
        """
        import os, signal, sys
        from entidb.storage import LmdbStorage
        store = LmdbStorage.open(sys.argv[1])
        txn = store._file.env.begin(write=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path / "db",
    )
    assert store.turn.take(10)
    with store.snapshot() as snapshot:
        assert snapshot.get(b"b") == b"2"
        assert snapshot.mark == store.mark()
        store.commit({b"c": b"1"}, snapshot.mark)
    store.turn.give_back()
    assert read_all(store) == {b"a": b"1", b"b": b"2", b"c": b"1"}


def test_a_stopped_process_is_waited_for_and_named(store: LmdbStorage) -> None:
    with other(Path(store.path)) as opener:
        assert opener.take(10)
        opener.stop()
        try:
            assert not store.turn.take(0.1)
            assert store.turn.holder() == f"process {opener.pid}"
        finally:
            opener.go_on()
        opener.give_back()
        assert store.turn.take(10)


def test_turns_are_fair_between_processes(store: LmdbStorage) -> None:
    """Whoever commits without a pause lets others in."""
    with other(Path(store.path)) as opener:
        opener.tell("count_up", 3000)
        longest = 0.0
        for n in range(50):
            began = time.monotonic()
            assert store.turn.take(60)
            store.commit({b"n": b"%d" % n})
            store.turn.give_back()
            longest = max(longest, time.monotonic() - began)
        os.kill(opener.pid, signal.SIGTERM)
        opener.die()
    assert longest < 10
