"""What the nodes of one server have together in PostgreSQL: records, the journal, who lives, who is
on duty, and what they ask each other. And the formats of the tables."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial

import psycopg
import pytest

from entidb.errors import CommitUnknownError, DatabaseLockedError, FormatError, StorageError
from entidb.storage.postgres import PostgresStorage
from entidb.storage.postgres import schema as schemas
from entidb.storage.postgres.company import PostgresCompany
from entidb.storage.postgres.sharing import SharedTables
from tests.storage.postgres_cluster import Cluster, cluster
from tests.storage.test_postgres import asked
from tests.waiting import until

#: The tables of EntiDB 0.5.0, as it made them.
FORMAT_1 = """
CREATE TABLE entidb_format (format integer NOT NULL);
INSERT INTO entidb_format VALUES (1);
CREATE TABLE entidb_barrier (passed bigint NOT NULL);
INSERT INTO entidb_barrier VALUES (0);
CREATE TABLE entidb_store (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE,
    epoch bigint NOT NULL DEFAULT 0,
    mark bigint NOT NULL DEFAULT 0
);
CREATE TABLE entidb_kv (
    store integer NOT NULL,
    k bytea NOT NULL,
    v bytea NOT NULL,
    PRIMARY KEY (store, k)
) PARTITION BY HASH (store);
ALTER TABLE entidb_kv ALTER COLUMN v SET STORAGE EXTERNAL;
DO $$ BEGIN
    FOR n IN 0..15 LOOP
        EXECUTE format(
            'CREATE TABLE entidb_kv_%s PARTITION OF entidb_kv '
            'FOR VALUES WITH (MODULUS 16, REMAINDER %s)', n, n);
    END LOOP;
END $$;
"""


@contextlib.contextmanager
def own_database(postgres: Cluster) -> Iterator[str]:
    """The address of a PostgreSQL database that no other test uses."""
    name = f"own_{uuid.uuid4().hex}"
    asked(postgres.address, f"CREATE DATABASE {name}")
    yield postgres.address.replace("/postgres?", f"/{name}?")
    asked(postgres.address, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def address(postgres: Cluster) -> Iterator[str]:
    with own_database(postgres) as found:
        yield found


@pytest.fixture
def shared(address: str) -> Iterator[SharedTables]:
    with contextlib.closing(SharedTables(address)) as opened:
        yield opened


@pytest.fixture
def other(address: str) -> Iterator[SharedTables]:
    """As of another process: connections of its own."""
    with contextlib.closing(SharedTables(address, connections_max=15)) as opened:
        yield opened


def nothing(revision: int) -> None:
    return None


def cut(address: str) -> None:
    """End all connections of EntiDB."""
    asked(
        address,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'entidb' "
        "AND datname = current_database()",
    )


# ---------------------------------------------------------------- formats of the tables


def make_format_1(address: str) -> None:
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(FORMAT_1.encode())
        connection.execute("INSERT INTO entidb_store (name) VALUES ('shop')")


def test_tables_of_the_first_format_are_upgraded_and_keep_what_is_in_them(address: str) -> None:
    assert schemas._TABLES == FORMAT_1  # what a newer program adds has a step of its own
    make_format_1(address)
    with contextlib.closing(PostgresStorage.open(address, "shop", create=False)) as store:
        store.commit({b"a": b"1"})
        with store.snapshot() as snapshot:
            assert snapshot.get(b"a") == b"1"
    assert asked(address, "SELECT format FROM entidb_format") == [(schemas.FORMAT,)]
    assert asked(address, "SELECT name FROM entidb_page") == [("entidb opening",)]


def test_tables_made_anew_are_those_that_an_upgrade_makes(postgres: Cluster) -> None:
    columns = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default "
        "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
    )
    with own_database(postgres) as new, own_database(postgres) as old:
        make_format_1(old)
        for each in (new, old):
            PostgresStorage.open(each, "shop").close()
        assert asked(new, columns) == asked(old, columns) != []


def test_an_upgrade_that_fails_leaves_the_tables_as_they_were(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_format_1(address)
    broken = "CREATE TABLE entidb_half (a integer); SELECT 1 / 0"
    monkeypatch.setattr(schemas, "_STEPS", {2: broken})
    with pytest.raises(StorageError, match="SQLSTATE 22012"):
        PostgresStorage.open(address, "shop")
    assert asked(address, "SELECT format FROM entidb_format") == [(1,)]
    assert asked(address, "SELECT to_regclass('entidb_half')") == [(None,)]
    monkeypatch.undo()
    PostgresStorage.open(address, "shop", create=False).close()


def test_an_older_program_leaves_the_tables_of_this_one_alone(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PostgresStorage.open(address, "shop").close()
    monkeypatch.setattr(schemas, "FORMAT", 1)
    with pytest.raises(FormatError, match="upgrade it") as raised:
        PostgresStorage.open(address, "shop")
    assert raised.value.code == "newer_format"


def test_nodes_that_begin_at_once_upgrade_once(address: str) -> None:
    make_format_1(address)
    failed: list[BaseException] = []

    def begin(number: int) -> None:
        try:
            SharedTables(address, connections_max=10 + number).close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert asked(address, "SELECT format FROM entidb_format") == [(schemas.FORMAT,)]


# ---------------------------------------------------------------- records


def test_a_record_has_another_revision_after_each_change(shared: SharedTables) -> None:
    assert shared.read("control") is None and shared.revision("control") == 0
    seen: list[int] = []
    shared.change("control", lambda before: b"one" if before is None else None, seen.append)
    shared.change("control", lambda before: (before or b"") + b" two", seen.append)
    assert shared.read("control") == b"one two"
    assert seen == [1, 2] and shared.revision("control") == 2


def test_what_makes_nothing_changes_nothing(shared: SharedTables) -> None:
    shared.change("control", lambda before: None, lambda revision: pytest.fail("written"))
    assert shared.read("control") is None


def test_changes_of_several_nodes_at_once_all_count(
    shared: SharedTables, other: SharedTables
) -> None:
    def add(node: SharedTables) -> None:
        for _ in range(20):
            node.change("n", lambda before: str(int(before or b"0") + 1).encode(), nothing)

    threads = [threading.Thread(target=add, args=(node,)) for node in (shared, other, shared)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.read("n") == b"60" and shared.revision("n") == 60


def test_who_is_never_quick_enough_is_told_so(shared: SharedTables, other: SharedTables) -> None:
    def make(before: bytes | None) -> bytes:
        other.change("n", lambda now: (now or b"") + b"x", nothing)
        return b"mine"

    with pytest.raises(DatabaseLockedError, match="try again"):
        shared.change("n", make, nothing)


def test_a_record_is_renamed_and_removed(shared: SharedTables) -> None:
    shared.change("a", lambda before: b"A", nothing)
    shared.change("b", lambda before: b"B", nothing)
    shared.rename("a", "b")
    assert (shared.read("a"), shared.read("b")) == (None, b"A")
    assert shared.revision("b") == 2  # not that of the one that was there
    shared.rename("b", None)
    shared.rename("never", "there")
    assert shared.read("b") is None and shared.read("there") is None


def test_a_connection_that_was_cut_is_made_anew(shared: SharedTables, address: str) -> None:
    shared.change("n", lambda before: b"1", nothing)
    cut(address)
    assert shared.read("n") == b"1"
    cut(address)
    shared.change("n", lambda before: b"2", nothing)
    assert shared.read("n") == b"2"


def test_a_server_that_is_away_is_an_error_of_ours_and_it_works_again_afterwards() -> None:
    with cluster() as own, contextlib.closing(SharedTables(own.address)) as shared:
        shared.append([b"one"])
        own.stop()
        for call in (shared.check, partial(shared.read, "n"), partial(shared.append, [b"two"])):
            assert not _works(call)
        own.start()
        until(lambda: _works(shared.check))
        assert list(shared.newest()) == [b"one"]


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except StorageError:
        return False
    return True


def test_a_write_that_was_not_waited_for_is_not_said_to_be_done() -> None:
    with cluster() as own, contextlib.closing(SharedTables(own.address)) as shared:
        shared.append([b"one"])
        asked(own.address, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        asked(own.address, "SELECT pg_reload_conf()")
        raised: list[BaseException] = []

        def write() -> None:
            try:
                while True:  # the server looks at its settings when it has a moment
                    shared.append([b"more"])
            except BaseException as error:
                raised.append(error)

        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        writer = threading.Thread(target=write)
        writer.start()
        until(lambda: asked(own.address, waiting))
        ((pid,),) = asked(own.address, waiting)
        asked(own.address, "SELECT pg_cancel_backend(%s)", pid)
        writer.join()
        assert isinstance(raised[0], CommitUnknownError)


# ---------------------------------------------------------------- the journal


def test_lines_are_read_newest_first_and_the_oldest_are_forgotten(
    shared: SharedTables, other: SharedTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entidb.storage.postgres.sharing._LINES_AT_ONCE", 3)
    for number in range(5):
        (shared if number % 2 else other).append([b"%d a" % number, b"%d b" % number])
    newest = [b"%d %s" % (n, part) for n in range(4, -1, -1) for part in (b"b", b"a")]
    assert list(shared.newest()) == newest
    shared.forget_lines(4)
    assert list(other.newest()) == newest[:4]


def test_what_is_done_now_and_then_is_done_by_one_node(
    shared: SharedTables, other: SharedTables
) -> None:
    assert shared.is_first("purge/shop", 3600)
    assert not other.is_first("purge/shop", 3600) and not shared.is_first("purge/shop", 3600)
    assert other.is_first("purge/other", 3600)
    time.sleep(0.02)
    assert other.is_first("purge/shop", 0.01)


# ---------------------------------------------------------------- the nodes


class Two:
    """Two nodes, as of two processes."""

    def __init__(self, address: str) -> None:
        self.sharings = [SharedTables(address, connections_max=12 + number) for number in range(2)]
        self.one, self.two = (
            PostgresCompany(sharing, f"node-{number}", b"about %d" % number)
            for number, sharing in enumerate(self.sharings, 1)
        )

    def close(self) -> None:
        for company, sharing in zip((self.one, self.two), self.sharings, strict=True):
            company.leave()
            sharing.close()


@pytest.fixture
def nodes(address: str) -> Iterator[Two]:
    with contextlib.closing(Two(address)) as made:
        yield made


def names(company: PostgresCompany) -> list[str]:
    return [each.name for each in company.members()]


def quiet() -> None:
    return None


def test_nodes_see_each_other_until_they_leave(nodes: Two) -> None:
    assert names(nodes.one) == names(nodes.two) == ["node-1", "node-2"]
    first, second = nodes.two.members()
    assert (first.about, second.about) == (b"about 1", b"about 2")
    assert abs(first.began_ms - time.time() * 1000) < 600_000
    nodes.one.leave()
    assert names(nodes.two) == ["node-2"]


def test_a_node_whose_connection_has_ended_is_gone_at_once(nodes: Two, address: str) -> None:
    nodes.sharings[0].node.rights.drop()
    until(lambda: names(nodes.two) == ["node-2"])
    nodes.one.keep_seat()  # it was only cut off
    assert names(nodes.two) == ["node-1", "node-2"]


def test_what_a_dead_node_has_left_is_removed(nodes: Two, address: str) -> None:
    asked(
        address,
        "INSERT INTO entidb_node (name, about, seen) "
        "VALUES ('dead', '', now() - interval '1 minute')",
    )
    asked(
        address,
        "INSERT INTO entidb_letter (node, question) "
        "SELECT number, '' FROM entidb_node WHERE name = 'dead'",
    )
    assert names(nodes.one) == ["node-1", "node-2"]
    nodes.one.clear()
    assert asked(address, "SELECT name FROM entidb_node ORDER BY 1") == [("node-1",), ("node-2",)]
    assert asked(address, "SELECT count(*) FROM entidb_letter") == [(0,)]


def test_one_node_is_on_duty_and_another_takes_it_over(nodes: Two) -> None:
    assert nodes.one.take_duty() and nodes.one.take_duty()
    assert not nodes.two.take_duty()
    assert [each.on_duty for each in nodes.two.members()] == [True, False]
    nodes.sharings[0].node.rights.drop()  # as when its process dies
    until(nodes.two.take_duty)
    nodes.one.keep_seat()
    assert not nodes.one.take_duty()
    nodes.two.give_duty()
    assert nodes.one.take_duty()


def test_a_node_that_was_stopped_is_taken_off_duty_and_is_back_when_it_goes_on(
    nodes: Two, address: str
) -> None:
    assert nodes.one.take_duty()
    nodes.two.relieve(nodes.one.number)
    assert not nodes.two.take_duty()  # it has just been seen
    asked(
        address,
        "UPDATE entidb_node SET seen = now() - interval '1 minute' WHERE number = %s",
        nodes.one.number,
    )
    assert [each.quiet for each in nodes.two.members()] == [True, False]
    nodes.two.relieve(nodes.one.number)
    until(nodes.two.take_duty)
    assert names(nodes.two) == ["node-2"]
    nodes.one.keep_seat()
    assert not nodes.one.take_duty()
    assert [each.quiet for each in nodes.one.members()] == [False, False]


def test_a_database_is_kept_closed_for_every_node(nodes: Two) -> None:
    right = nodes.one.keep_closed("shop")
    assert right is not None
    assert nodes.two.keep_closed("shop") is None and nodes.one.keep_closed("shop") is None
    assert nodes.two.is_kept_closed("shop") and nodes.one.is_kept_closed("shop")
    assert not nodes.two.is_kept_closed("other")
    nodes.one.let_open("shop", right)
    assert not nodes.two.is_kept_closed("shop")


def test_a_node_answers_what_another_one_asks(nodes: Two) -> None:
    looks: list[int] = []
    nodes.two.listen(lambda question: question.upper(), lambda: looks.append(1))
    for number in range(3):
        assert nodes.one.ask(nodes.two.number, b"what %d" % number, 60) == b"WHAT %d" % number
    until(lambda: len(looks) > 1)


def test_a_question_is_heard_once_and_does_not_keep_the_next_ones_waiting(nodes: Two) -> None:
    go_on, heard = threading.Event(), []

    def hear(question: bytes) -> bytes:
        heard.append(question)
        if question == b"long":
            go_on.wait(60)
        return b"done"

    nodes.two.listen(hear, quiet)
    answers: list[bytes] = []
    asking = threading.Thread(
        target=lambda: answers.append(nodes.one.ask(nodes.two.number, b"long", 60))
    )
    asking.start()
    until(lambda: heard)
    assert nodes.one.ask(nodes.two.number, b"short", 60) == b"done"
    go_on.set()
    asking.join()
    assert answers == [b"done"] and heard == [b"long", b"short"]


def test_who_asks_a_node_that_is_gone_or_slow_is_told_so(nodes: Two, address: str) -> None:
    with pytest.raises(TimeoutError):
        nodes.one.ask(nodes.two.number, b"?", 0.05)
    assert asked(address, "SELECT count(*) FROM entidb_letter") == [(0,)]
    with pytest.raises(ConnectionRefusedError):
        nodes.one.ask(4711, b"?", 60)

    def goes() -> None:
        """When it has been asked: one that is gone before that was never there."""
        until(lambda: asked(address, "SELECT count(*) FROM entidb_letter") == [(1,)])
        nodes.sharings[1].node.rights.drop()

    going = threading.Thread(target=goes)
    going.start()
    with pytest.raises(ConnectionResetError):
        nodes.one.ask(nodes.two.number, b"?", 60)
    going.join()


def test_a_node_that_was_cut_off_hears_again(nodes: Two, address: str) -> None:
    nodes.two.listen(lambda question: b"here", nodes.two.keep_seat)
    assert nodes.one.ask(nodes.two.number, b"?", 60) == b"here"
    cut(address)
    until(lambda: _works(nodes.one.keep_seat) and names(nodes.one) == ["node-1", "node-2"])
    assert nodes.one.ask(nodes.two.number, b"?", 60) == b"here"
