"""What a store in PostgreSQL does while its server is away, frozen, or not the one that leads."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from entidb.errors import ConfigError, DatabaseClosedError, StorageError, StorageUnreachableError
from entidb.storage.base import OPENING_SHIFT
from entidb.storage.postgres import PostgresStorage, node, pulse
from entidb.storage.postgres import pool as pool_module
from entidb.storage.postgres.failures import storage_error
from entidb.storage.postgres.line import Line
from entidb.storage.postgres.pool import Pool
from entidb.storage.postgres.reaching import Hosts
from tests.storage.postgres_cluster import MISSING, Cluster, cluster
from tests.waiting import until

needs_postgres = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
WAIT_S = 60.0


@pytest.fixture
def own() -> Iterator[Cluster]:
    if MISSING is not None:
        pytest.skip(MISSING)
    with cluster() as made:
        yield made


@pytest.fixture
def store(own: Cluster) -> Iterator[PostgresStorage]:
    with contextlib.closing(PostgresStorage.open(own.address, uuid.uuid4().hex)) as opened:
        opened.commit({b"a": b"1"})
        yield opened


def asked(address: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(address, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


# ---------------------------------------------------------------- a server that refuses


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('FATAL:  password authentication failed for user "me"', r"the user or the password"),
        ("fe_sendauth: no password supplied", r"the user or the password"),
        ('FATAL:  role "me" does not exist', r"the user or the password"),
        ('FATAL:  no pg_hba.conf entry for host "::1", user "me"', r"the user or the password"),
        ('FATAL:  database "shops" does not exist', r"create it with createdb"),
        ("FATAL:  sorry, too many clients already", r"raise its max_connections"),
        ("FATAL:  remaining connection slots are reserved for", r"raise its max_connections"),
        ("FATAL:  the database system is starting up", r"is shutting down or starting"),
        ("session is read-only", r"it is a standby now"),
        (
            'FATAL:  Datenbank "shops" existiert nicht',
            r"away \(Datenbank",
        ),
        ("Connection refused", r"cannot be reached, or went away$"),
    ],
)
def test_what_a_server_says_that_refuses_a_connection_is_said_in_words(
    said: str, words: str
) -> None:
    error = psycopg.OperationalError(f'connection failed: server at "h", port 1 failed: {said}')
    ours = storage_error(error, "opening it")
    assert re.search(words, str(ours))
    assert isinstance(ours, StorageUnreachableError)  # it may pass: devices are told to come again


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("127.0.0.1:99999/x", 'invalid port number: "99999"'),
        ("127.0.0.1:1,127.0.0.1:0/x", 'invalid port number: "0"'),
        ("127.0.0.1:1/x?sslmode=nope", 'invalid sslmode value: "nope"'),
        ("127.0.0.1:1/x?connect_timeout=soon", "bad value for connect_timeout"),
        ("127.0.0.1:1/x?ssl_min_protocol_version=a", 'ssl_min_protocol_version" value'),
    ],
)
def test_an_address_that_cannot_be_is_not_a_server_that_cannot_be_reached(
    place: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"the address is wrong.*{words}"):
        PostgresStorage.open(f"postgresql://{place}", "shop")


def test_what_is_wrong_with_an_address_is_named(own: Cluster) -> None:
    for other, words in (
        (own.address.replace("///postgres?", "///nosuch?"), "createdb"),
        (own.address.replace(f"user={own.user}", "user=nobody"), "the user or the password"),
    ):
        with pytest.raises(StorageUnreachableError, match=words):
            PostgresStorage.open(other, "shop")


# ---------------------------------------------------------------- a server that is away


def test_an_outage_is_said_at_once_and_over_with_the_server_back(
    own: Cluster, store: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_FAILED_S", 0.0)
    for _ in range(3):
        own.stop()
        with pytest.raises(StorageError):
            store.mark()
        own.start()
        # In another opening: the server was started again.
        assert store.mark() % (1 << OPENING_SHIFT) == 1, (
            "the first who asks after the outage has an answer"
        )


def test_connections_that_the_server_ended_while_they_were_idle_are_never_lent(
    own: Cluster, store: PostgresStorage
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(store.snapshot())
    ours = "FROM pg_stat_activity WHERE application_name = 'entidb' AND pid <> pg_backend_pid()"
    assert asked(own.address, f"SELECT count(pg_terminate_backend(pid)) {ours}") != [(0,)]
    until(lambda: asked(own.address, f"SELECT count(*) {ours}") == [(0,)])
    assert store.mark() == 1
    assert store.commit({b"a": b"2"}) == 2


# ---------------------------------------------------------------- a server that is frozen


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_nobody_waits_for_ever_for_a_server_that_is_frozen(
    own: Cluster, store: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "_EVERY_S", 0.1)
    monkeypatch.setattr(pulse, "_ANSWER_S", 0.5)
    raised: list[BaseException] = []

    def reads() -> None:
        try:
            while True:
                store.mark()
        except StorageError as error:
            raised.append(error)

    threads = [threading.Thread(target=reads) for _ in range(3)]
    for thread in threads:
        thread.start()
    own.freeze()
    try:
        for thread in threads:
            thread.join(WAIT_S)
        assert len(raised) == 3
    finally:
        own.thaw()
    until(lambda: works(store.mark))
    assert store.commit({b"a": b"2"}) == 2


def works(do: Callable[[], object]) -> bool:
    try:
        do()
    except StorageError:
        return False
    return True


def test_opening_does_not_wait_for_ever_for_a_standby_that_is_not_there(
    own: Cluster, store: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.mark()
    asked(own.address, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    asked(own.address, "SELECT pg_reload_conf()")
    until(lambda: asked(own.address, "SHOW synchronous_standby_names") == [("nobody",)])
    monkeypatch.setattr(node, "BARRIER_S", 0.3)
    # One that is there needs no standby to read, and a new one does.
    with store.snapshot(), pytest.raises(StorageError, match="synchronous standby"):
        store.snapshot()
    asked(own.address, "ALTER SYSTEM RESET synchronous_standby_names")
    asked(own.address, "SELECT pg_reload_conf()")
    until(lambda: works(store.mark))
    assert store.commit({b"a": b"2"}) == 2


@contextlib.contextmanager
def mute() -> Iterator[tuple[str, socket.socket]]:
    """The address of a server that takes connections and says nothing, and its socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(WAIT_S)
        port = listening.getsockname()[1]
        yield f"postgresql://nobody@127.0.0.1:{port}/none?connect_timeout=60", listening


@needs_postgres
def test_a_server_that_connects_slowly_keeps_no_store_at_another_address_waiting(
    postgres: Cluster,
) -> None:
    failed: list[BaseException] = []

    def slow(address: str) -> None:
        try:
            PostgresStorage.open(address, "a")
        except StorageError as error:
            failed.append(error)

    def waits(thread: threading.Thread) -> bool:
        frame = sys._current_frames().get(thread.ident or 0)
        return frame is not None and frame.f_code.co_name == "lease"

    with mute() as (address, listening):
        threads = [threading.Thread(target=slow, args=[address], daemon=True) for _ in range(3)]
        threads[0].start()
        line, _ = listening.accept()
        for each in threads[1:]:
            each.start()
        until(lambda: all(map(waits, threads[1:])))
        with contextlib.closing(PostgresStorage.open(postgres.address, uuid.uuid4().hex)) as other:
            assert other.mark() == 0
        assert threads[0].is_alive(), "it is still connecting"
        line.close()
        for each in threads:
            each.join(WAIT_S)
        assert [type(each) for each in failed] == [StorageUnreachableError] * 3
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()  # who waited has not tried it once more


# ---------------------------------------------------------------- which host is asked


def hosts_in(hosts: Hosts) -> list[tuple[str, str]]:
    parts = conninfo_to_dict(hosts.address())
    return list(zip(str(parts["host"]).split(","), str(parts["port"]).split(","), strict=True))


def test_the_host_that_answered_last_is_asked_first_and_one_that_stopped_last() -> None:
    hosts = Hosts({"host": "a,b,c"})
    assert hosts_in(hosts) == [("a", "5432"), ("b", "5432"), ("c", "5432")]
    hosts.prefer(("c", "5432"))
    assert [host for host, _ in hosts_in(hosts)] == ["c", "a", "b"]
    hosts.avoid(("c", "5432"))
    assert [host for host, _ in hosts_in(hosts)] == ["a", "b", "c"]
    hosts.prefer(("elsewhere", "5432"))
    assert [host for host, _ in hosts_in(hosts)] == ["a", "b", "c"]


def test_hosts_keep_their_ports_and_addresses() -> None:
    hosts = Hosts({"host": "a,b", "port": "1,2", "hostaddr": "10.0.0.1,10.0.0.2", "dbname": "x"})
    hosts.prefer(("b", "2"))
    parts = conninfo_to_dict(hosts.address())
    assert (parts["host"], parts["port"], parts["hostaddr"], parts["dbname"]) == (
        "b,a",
        "2,1",
        "10.0.0.2,10.0.0.1",
        "x",
    )


@pytest.mark.parametrize("parts", [{"dbname": "x"}, {"host": "a", "port": "5"}])
def test_what_names_one_host_or_none_is_left_as_it_is(parts: dict[str, str]) -> None:
    hosts = Hosts(parts)
    hosts.prefer(("a", "5432"))
    assert conninfo_to_dict(hosts.address()) == parts


# ---------------------------------------------------------------- connections that are used again


@needs_postgres
def test_a_pool_gives_no_more_than_it_has_and_none_when_it_is_closed(postgres: Cluster) -> None:
    pool = Pool(lambda: Line.connect(postgres.address, autocommit=True), 2, 0.05)
    one, two = pool.getconn(), pool.getconn()
    with pytest.raises(StorageError, match="in use for"):
        pool.getconn()
    pool.putconn(one)
    assert pool.getconn() is one
    pool.close()
    pool.putconn(one)
    pool.putconn(two)
    assert one.closed and two.closed
    with pytest.raises(DatabaseClosedError):
        pool.getconn()


@needs_postgres
def test_a_connection_goes_to_whoever_has_waited_longest(postgres: Cluster) -> None:
    pool, had = Pool(lambda: Line.connect(postgres.address, autocommit=True), 1, WAIT_S), []

    def have(who: str) -> None:
        line = pool.getconn()
        had.append(who)
        pool.putconn(line)

    held = pool.getconn()
    threads = [threading.Thread(target=have, args=(who,)) for who in "abcd"]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        until(lambda count=count: len(pool._line) == count)  # type: ignore[misc]
    # Who gives one back and wants the next one is the fastest of all.
    pool.putconn(held)
    have("the first again")
    for thread in threads:
        thread.join(WAIT_S)
    assert had == [*"abcd", "the first again"]
    pool.close()


@needs_postgres
def test_who_gave_up_waiting_for_a_connection_holds_nobody_up(postgres: Cluster) -> None:
    pool = Pool(lambda: Line.connect(postgres.address, autocommit=True), 1, 0.05)
    held = pool.getconn()
    with pytest.raises(StorageUnreachableError, match="in use for"):
        pool.getconn()
    # An interrupt at the wrong moment may leave one in the line.
    left = pool_module._Waiting()
    left.until = time.monotonic() + 0.1
    pool._line.append(left)
    pool.putconn(held)
    pool._wait_s = WAIT_S
    assert pool.getconn() is held
    pool.putconn(held)
    pool.close()


@needs_postgres
def test_a_broken_connection_takes_those_with_it_that_were_made_before(postgres: Cluster) -> None:
    pool = Pool(lambda: Line.connect(postgres.address, autocommit=True), 3, 1.0)
    one, two, three = pool.getconn(), pool.getconn(), pool.getconn()
    pool.putconn(three)
    one.close()
    pool.putconn(one)
    assert three.closed
    pool.putconn(two)
    assert two.closed
    four = pool.getconn()
    pool.putconn(four)
    assert pool.getconn() is four
    pool.close()
    pool.putconn(four)


@needs_postgres
def test_a_connection_that_was_dropped_leaves_its_place_to_the_next(postgres: Cluster) -> None:
    """As an interrupt drops one, between the pool and whoever asked for it."""
    pool = Pool(lambda: Line.connect(postgres.address, autocommit=True), 1, WAIT_S)
    dropped = pool.getconn()
    process = dropped.info.backend_pid
    del dropped
    gc.collect()
    another = pool.getconn()
    assert another.info.backend_pid != process
    another.leave(b"BEGIN; SELECT pg_sleep(0.05); ROLLBACK")
    pool.putconn(another)
    assert pool.getconn() is another
    assert another.execute("SELECT 1").fetchall() == [(1,)]
    pool.close()
    pool.putconn(another)


@needs_postgres
def test_what_was_idle_for_long_is_closed(
    postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(lambda: Line.connect(postgres.address, autocommit=True), 3, 1.0)
    one, two = pool.getconn(), pool.getconn()
    pool.putconn(one)
    pool.tidy()
    assert not one.closed
    monkeypatch.setattr(pool_module, "_IDLE_S", -1.0)
    pool.tidy()
    assert [each.closed for each in (one, two)] == [True, False]
    pool.close()
    pool.putconn(two)


@needs_postgres
def test_a_node_watches_its_connections_until_the_last_is_closed(
    own: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "_EVERY_S", 0.05)

    def beats() -> bool:
        return any(thread.name == "entidb-pulse" for thread in threading.enumerate())

    with contextlib.closing(PostgresStorage.open(own.address, uuid.uuid4().hex)) as store:
        assert store.mark() == 0
        assert beats()
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "_IDLE_S", -1.0)
            until(lambda: not beats())
        assert store.mark() == 0
        assert beats()
    until(lambda: not beats())
