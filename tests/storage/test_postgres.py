"""The store in PostgreSQL: the promises of every store, between openers, and what is its own."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from entidb.db import Database, Role
from entidb.errors import (
    CommitUnknownError,
    ConfigError,
    CorruptionError,
    DatabaseClosedError,
    FormatError,
    StorageError,
    StorageUnreachableError,
)
from entidb.storage import Storage, open_storage
from entidb.storage.base import OPENING_SHIFT
from entidb.storage.postgres import PostgresStorage, schema, turn
from entidb.storage.postgres.line import Line
from entidb.storage.postgres.pool import Pool
from entidb.storage.postgres.schema import DURABLE
from entidb.storage.postgres.store import ROWS_AT_ONCE
from entidb.testing.openers import LocalOpener, Opener, ProcessOpener, SeveralOpeners
from tests.storage.postgres_cluster import Cluster, cluster
from tests.storage.storage_model import StorageMachine
from tests.waiting import until


def open_named(where: str) -> PostgresStorage:
    """For openers in other processes: address and name, with a space between them."""
    address, _, name = where.partition(" ")
    return PostgresStorage.open(address, name)


class TestPostgres(SeveralOpeners):
    @pytest.fixture(autouse=True)
    def _cluster(self, postgres: Cluster) -> None:
        self.address = postgres.address

    def make_storage(self) -> Storage:
        return PostgresStorage.open(self.address, uuid.uuid4().hex)

    def reopen(self, storage: Storage) -> Storage:
        assert isinstance(storage, PostgresStorage)
        storage.close()
        return PostgresStorage.open(self.address, storage.name, create=False)

    def open_path(self, path: str) -> Storage:
        return open_storage(path)

    @contextlib.contextmanager
    def another(self, storage: Storage) -> Iterator[Opener]:
        assert isinstance(storage, PostgresStorage)
        opened = PostgresStorage.open(self.address, storage.name)
        with contextlib.closing(LocalOpener(opened)) as opener:
            yield opener


class TestPostgresAcrossProcesses(TestPostgres):
    @contextlib.contextmanager
    def another(self, storage: Storage) -> Iterator[Opener]:
        assert isinstance(storage, PostgresStorage)
        where = f"{self.address} {storage.name}"
        opens = "tests.storage.test_postgres:open_named"
        with contextlib.closing(ProcessOpener(opens, where)) as opener:
            yield opener


WAIT_S = 60.0


@pytest.fixture
def store(postgres: Cluster) -> Iterator[PostgresStorage]:
    with contextlib.closing(PostgresStorage.open(postgres.address, uuid.uuid4().hex)) as opened:
        yield opened


def asked(address: str, statement: str, *values: object) -> list[tuple[object, ...]]:
    """Past EntiDB, as an operator would."""
    with psycopg.connect(address, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), values)
        return cursor.fetchall() if cursor.description else []


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("address", ["postgresql://[::1/x", "what is this"])
def test_what_is_no_address_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(ConfigError, match="no address of a PostgreSQL database") as raised:
        PostgresStorage.open(address, "shop")
    assert address not in str(raised.value)


def test_a_server_that_is_not_there_is_named_without_the_password() -> None:
    with pytest.raises(StorageError, match=r"postgresql://127\.0\.0\.1:1/shop") as raised:
        PostgresStorage.open("postgresql://me:secret@127.0.0.1:1/shop", "shop")
    assert "secret" not in str(raised.value)


def test_a_store_that_is_not_there_is_not_made_unless_asked_for(postgres: Cluster) -> None:
    with pytest.raises(StorageError, match="there is no store 'nosuch'"):
        PostgresStorage.open(postgres.address, "nosuch", create=False)
    for name in ("", "a\0b"):
        with pytest.raises(ConfigError, match="name"):
            PostgresStorage.open(postgres.address, name)


def test_tables_of_a_newer_program_are_left_alone() -> None:
    with cluster() as own:
        PostgresStorage.open(own.address, "shop").close()
        asked(own.address, "UPDATE entidb_format SET format = format + 1")
        with pytest.raises(FormatError, match="newer EntiDB") as raised:
            PostgresStorage.open(own.address, "shop")
        assert raised.value.code == "newer_format"


def test_tables_that_another_node_makes_meanwhile_are_not_made_twice() -> None:
    with cluster() as own:
        raised: list[BaseException] = []

        def opens() -> None:
            try:
                with psycopg.connect(own.address, autocommit=True) as second:
                    schema.see_to_tables(second, "here", schema.Tables.MAKE)
            except BaseException as error:
                raised.append(error)

        waits = b"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        thread = threading.Thread(target=opens)
        with psycopg.connect(own.address) as first:
            first.execute("SELECT pg_advisory_xact_lock(%s, %s)", schema._MAKING)
            thread.start()
            until(lambda: first.execute(waits).fetchone() == (1,))
            first.execute(schema._TABLES.encode())
            for step in sorted(schema._STEPS):
                first.execute(schema._STEPS[step].encode())
            first.execute("UPDATE entidb_format SET format = %s", (schema.FORMAT,))
        thread.join(WAIT_S)
        assert raised == []


def test_a_server_that_may_lose_commits_is_refused() -> None:
    with cluster() as own:
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            own.stop(signal.SIGINT)
            own.start(**{setting: "off"})
            with pytest.raises(StorageError, match=f"has {setting} = off"):
                PostgresStorage.open(own.address, "shop")


def test_a_record_that_was_changed_is_never_returned(store: PostgresStorage) -> None:
    store.commit({b"a": b"1", b"b": b"2"})
    with psycopg.connect(store.opened.node._address, autocommit=True) as connection:
        connection.execute(
            "UPDATE entidb_kv SET v = set_byte(v, 0, 51) WHERE store = %s AND k = %s",
            (store.opened.number, b"a"),
        )
    with store.snapshot() as snapshot:
        assert snapshot.get(b"b") == b"2"
        with pytest.raises(CorruptionError, match="61"):
            snapshot.get(b"a")
    assert len(list(store.verify())) == 1


# ---------------------------------------------------------------- connections that end


def end_connections(address: str) -> None:
    asked(
        address,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'entidb' AND pid <> pg_backend_pid()",
    )


def end_connection(address: str, process: int) -> None:
    """And wait until it has ended."""
    asked(address, "SELECT pg_terminate_backend(%s)", process)
    until(lambda: not asked(address, "SELECT 1 FROM pg_stat_activity WHERE pid = %s", process))


def test_a_store_goes_on_after_its_idle_connections_were_ended(store: PostgresStorage) -> None:
    store.commit({b"a": b"1"})
    right = store.claim("engine")
    assert right.take(0)
    end_connections(store.opened.node._address)
    with store.snapshot() as snapshot:
        assert snapshot.get(b"a") == b"1"
    until(lambda: right.take(0))
    mark = store.mark()
    until(lambda: works(lambda: store.commit({b"a": b"2"}, mark)))
    assert store.mark() == mark + 1


def works(do: Callable[[], object]) -> bool:
    try:
        do()
    except StorageError:
        return False
    return True


def test_a_turn_goes_with_its_connection_and_nothing_is_committed_without_it(
    store: PostgresStorage,
) -> None:
    store.commit({b"a": b"1"})
    mark = store.mark()
    assert store.turn.take(WAIT_S)
    assert store.turn.connection is not None
    end_connection(store.opened.node._address, store.turn.connection.info.backend_pid)
    with pytest.raises(StorageError, match=r"cannot be reached, or went away|shutting down"):
        store.commit({b"a": b"2"}, mark)
    assert not store.turn.mine
    store.turn.give_back()
    assert store.commit({b"a": b"3"}, mark) == mark + 1


@pytest.mark.parametrize("records", [1, ROWS_AT_ONCE + 1])
def test_a_connection_that_ends_before_the_answer_to_a_commit_leaves_it_open(
    store: PostgresStorage, monkeypatch: pytest.MonkeyPatch, records: int
) -> None:
    """One that is a single statement, and one that takes several."""
    address = store.opened.node._address
    store.commit({b"a": b"1"})
    to_the_end = Line.ask_to_the_end

    def lose_and_ask(line: Line, *question: object) -> object:
        end_connection(address, line.info.backend_pid)
        return to_the_end(line, *question)  # type: ignore[arg-type]

    monkeypatch.setattr(Line, "ask_to_the_end", lose_and_ask)
    with pytest.raises(CommitUnknownError, match="open it again"):
        store.commit({b"%06d" % number: b"2" for number in range(records)})
    with pytest.raises(DatabaseClosedError):
        store.snapshot()


def test_a_commit_and_a_read_take_the_round_trips_that_the_guide_says(
    store: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit({b"a": b"1", b"b": b"2"})
    for _ in range(2):  # it learns what is asked for again and again
        with store.snapshot() as snapshot:
            assert [snapshot.get(key) for key in (b"a", b"b", b"c")] == [b"1", b"2", None]
    trips: list[str] = []
    ask, to_the_end = Line._asked, Line.ask_to_the_end

    def count(line: Line, *question: object) -> object:
        trips.append("ask")
        return ask(line, *question)  # type: ignore[arg-type]

    def count_commit(line: Line, *question: object) -> object:
        trips.append("commit")
        return to_the_end(line, *question)  # type: ignore[arg-type]

    monkeypatch.setattr(Line, "_asked", count)
    monkeypatch.setattr(Line, "ask_to_the_end", count_commit)
    with store.snapshot() as snapshot:
        assert [snapshot.get(key) for key in (b"a", b"b", b"c")] == [b"1", b"2", None]
    assert len(trips) == 1  # nobody waits for its end
    trips.clear()
    store.commit({b"a": b"3", b"b": None}, store.mark())
    assert trips == ["ask", "ask", "commit", "ask"]  # the mark; turn, commit, turn
    trips.clear()
    store.commit({b"%06d" % number: b"2" for number in range(2 * ROWS_AT_ONCE)})
    assert trips == ["ask", "ask", "commit", "ask"]  # turn, all the records, commit, turn


def test_what_comes_with_the_mark_is_of_its_state_and_only_what_is_asked_for_and_small(
    store: PostgresStorage,
) -> None:
    def read(*keys: bytes) -> list[bytes | None]:
        with store.snapshot() as snapshot:
            return [snapshot.get(key) for key in keys]

    store.commit({b"small": b"1", b"large": b"x" * 2000, b"other": b"2"})
    for _ in range(2):
        read(b"small", b"large")
    assert list(store.opened.often.keys) == [b"small"]
    with store.snapshot() as before:
        store.commit({b"small": b"3"})
        assert before.get(b"small") == b"1"
    assert read(b"small") == [b"3"]
    store.commit({b"small": None})
    assert read(b"small") == [None]
    store.commit({b"small": b"y" * 2000})  # it has grown, and does not come again
    assert read(b"small") == [b"y" * 2000]
    assert b"small" not in store.opened.often.keys
    for number in range(100):  # each is asked for twice, and as many come as are of use
        assert read(b"k%d" % number, b"other") == [None, b"2"]
        assert read(b"k%d" % number, b"other") == [None, b"2"]
    assert b"other" in store.opened.often.keys
    assert b"k0" not in store.opened.often.keys
    assert len(store.opened.often.keys) <= 8


def test_a_damaged_record_that_comes_with_the_mark_is_not_returned(
    store: PostgresStorage, postgres: Cluster
) -> None:
    store.commit({b"a": b"1"})
    for _ in range(2):
        with store.snapshot() as snapshot:
            snapshot.get(b"a")
    with psycopg.connect(postgres.address, autocommit=True) as connection:
        connection.execute(
            "UPDATE entidb_kv SET v = set_byte(v, 0, 7) WHERE store = %s", (store.opened.number,)
        )
    assert store.opened.often.keys == (b"a",)
    with store.snapshot() as snapshot, pytest.raises(CorruptionError):
        snapshot.get(b"a")


def test_a_store_that_was_lost_gives_back_its_turn_and_its_rights(postgres: Cluster) -> None:
    name = uuid.uuid4().hex
    lost = PostgresStorage.open(postgres.address, name)
    lost.commit({b"a": b"1"})
    assert lost.turn.take(WAIT_S)
    assert lost.claim("engine").take(0)
    del lost
    gc.collect()
    with contextlib.closing(PostgresStorage.open(postgres.address, name)) as store:
        assert store.turn.take(WAIT_S)
        store.turn.give_back()
        until(lambda: store.claim("engine").take(0))


def test_who_has_the_turn_is_named(store: PostgresStorage, postgres: Cluster) -> None:
    with contextlib.closing(PostgresStorage.open(postgres.address, store.name)) as other:
        assert other.turn.take(WAIT_S)
        assert "entidb" in store.turn.holder()
        assert not store.turn.take(0.01)


def test_a_child_of_a_fork_opens_its_own(store: PostgresStorage) -> None:
    store.commit({b"a": b"1"})
    child = os.fork()
    if child == 0:
        try:
            store.mark()
        except BaseException as error:
            os._exit(7 if getattr(error, "code", "") == "database_forked" else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert store.mark() == 1


# ---------------------------------------------------------------- a standby that does not answer


def test_a_commit_that_was_made_to_stop_waiting_for_its_standby_is_no_success() -> None:
    """PostgreSQL says COMMIT to it, with a warning."""
    with cluster() as own:
        PostgresStorage.open(own.address, "shop").close()
        own.stop(signal.SIGINT)
        own.start()
        store = PostgresStorage.open(own.address, "shop")
        store.commit({b"a": b"1"})
        assert store.turn.take(WAIT_S)
        assert store.turn.connection is not None
        backend = store.turn.connection.info.backend_pid
        asked(own.address, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        asked(own.address, "SELECT pg_reload_conf()")
        until(lambda: asked(own.address, "SHOW synchronous_standby_names") == [("nobody",)])
        raised: list[BaseException] = []

        def commit() -> None:
            try:
                store.commit({b"a": b"2"})
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=commit)
        thread.start()
        waits = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
        until(lambda: asked(own.address, waits, backend) == [("SyncRep",)])
        asked(own.address, "SELECT pg_cancel_backend(%s)", backend)
        thread.join(WAIT_S)
        assert [type(error) for error in raised] == [CommitUnknownError]


def test_a_failure_to_connect_takes_no_place_however_long_the_error_is_kept() -> None:
    def fails() -> Line:
        raise psycopg.OperationalError("away")

    pool, kept = Pool(fails, 2, 0.01), []
    for _ in range(5):
        with pytest.raises(psycopg.OperationalError) as raised:
            pool.getconn()
        kept.append(raised)


def test_waiting_for_a_turn_leaves_no_limit_of_time_behind(
    store: PostgresStorage, postgres: Cluster
) -> None:
    with contextlib.closing(PostgresStorage.open(postgres.address, store.name)) as other:
        node = other.opened.node
        assert store.turn.take() and not other.turn.take(0.05)
        # The one that has just waited in vain is the first to be lent again.
        line = node.lend(node.committing)
        assert line.execute("SHOW lock_timeout").fetchall() == [("0",)]
        node.take_back(node.committing, line)
        giving = threading.Timer(0.2, store.turn.give_back)
        giving.start()
        assert other.turn.take(WAIT_S)
        giving.join()
        waited = other.turn.connection
        assert waited is not None
        assert waited.execute("SHOW lock_timeout").fetchall() == [("0",)]
        other.turn.give_back()


# ---------------------------------------------------------------- a process that is stopped


def test_the_turn_of_one_who_asks_nothing_is_ended_when_others_wait_and_it_commits_nothing(
    store: PostgresStorage, postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = PostgresStorage.open(postgres.address, uuid.uuid4().hex)
    other = PostgresStorage.open(postgres.address, store.name)
    with contextlib.closing(other), contextlib.closing(beside):
        assert store.turn.take() and beside.turn.take()
        monkeypatch.setattr(turn, "STILL_S", 0.2)
        assert other.turn.take(WAIT_S)
        with pytest.raises(StorageUnreachableError):
            store.commit({b"k": b"stale"}, 0)
        assert other.commit({b"k": b"new"}, 0) == 1
        # Whose turn is that of another store, is left alone.
        assert beside.commit({b"k": b"beside"}, 0) == 1
        other.turn.give_back()
        with store.snapshot() as snapshot:
            assert snapshot.get(b"k") == b"new"


# ---------------------------------------------------------------- crashes


def test_what_was_acknowledged_is_there_after_every_crash_of_the_server() -> None:
    with cluster() as own:
        acknowledged, number = 0, 0
        for _ in range(5):
            store = PostgresStorage.open(own.address, "shop")
            with contextlib.suppress(StorageError), contextlib.closing(store):
                killer = threading.Timer(0.3, own.stop)
                killer.start()
                while True:
                    number += 1
                    store.commit({b"%08d" % number: b"x" * 200, b"newest": b"%d" % number})
                    acknowledged = number
            killer.join()
            own.start()
            with contextlib.closing(PostgresStorage.open(own.address, "shop")) as again:
                with again.snapshot() as snapshot:
                    newest = int(snapshot.get(b"newest") or b"0")
                    there = snapshot.scan_keys(b"0", b"9")
                assert newest in (acknowledged, number)
                assert len(there) == newest == again.mark() % (1 << OPENING_SHIFT)
                assert list(again.verify()) == []
            number = acknowledged = newest


def test_a_database_lives_in_it_and_is_backed_up_to_files(
    store: PostgresStorage, postgres: Cluster, tmp_path: object
) -> None:
    with Database(store, role=Role.DEVICE) as database:
        notes = database.collection("notes")
        notes.put_many({uuid.uuid4(): {"n": n} for n in range(200)})
        assert len(notes) == 200
        assert database.verify() == []
        database.backup(f"{tmp_path}/copy")
    with Database.open(f"{tmp_path}/copy") as copy:
        assert len(copy.collection("notes")) == 200


class PostgresMachine(StorageMachine):
    address = ""

    def make_storage(self) -> Storage:
        return PostgresStorage.open(self.address, uuid.uuid4().hex)


def test_it_does_what_a_dict_does(postgres: Cluster) -> None:
    PostgresMachine.address = postgres.address
    PostgresMachine.TestCase().runTest()


# ---------------------------------------------------------------- settings

GUIDE = Path(__file__).parent.parent.parent / "docs" / "postgres.md"


def test_the_guide_names_the_settings_that_are_checked_and_no_other() -> None:
    text = GUIDE.read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", text[text.index("## Settings") :], re.MULTILINE))
    assert named == {"server_version", *DURABLE}


def test_limits_of_time_that_a_role_has_do_not_reach_our_connections() -> None:
    """PostgreSQL answers a commit that was cancelled by one of them with success."""
    with cluster() as own:
        settings = {
            **dict.fromkeys(("statement_timeout", "lock_timeout"), "'1ms'"),
            "idle_in_transaction_session_timeout": "'1ms'",
            "idle_session_timeout": "'1min'",  # this one reaches them until they have said so
            "default_transaction_isolation": "serializable",
        }
        with psycopg.connect(own.address, autocommit=True) as operator:
            for name, value in settings.items():
                operator.execute(f"ALTER DATABASE postgres SET {name} = {value}".encode())
        with contextlib.closing(PostgresStorage.open(own.address, "shop")) as store:
            with store.snapshot() as snapshot:
                time.sleep(0.05)
                assert snapshot.get(b"a") is None
            store.commit({b"%06d" % number: b"x" for number in range(20_000)})
            with store.opened.node.connect() as connection:
                for name in settings:
                    ((found,),) = connection.execute(f"SHOW {name}".encode()).fetchall()
                    assert found == ("read committed" if "isolation" in name else "0"), name
