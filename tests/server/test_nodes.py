"""Servers on PostgreSQL: several nodes serve one place, and none of them owns anything."""

from __future__ import annotations

import builtins
import contextlib
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from entidb.cli.exits import Exit
from entidb.db import Database
from entidb.errors import ConfigError, StorageError, StorageUnreachableError
from entidb.protocol import (
    CONTENT_TYPE,
    HandshakeResponse,
    PullResponse,
    PushResponse,
    Verdict,
    encode,
)
from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.admin import backups, databases
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.admin.opening import office_of
from entidb.server.admin.tasks import Task
from entidb.server.news import News
from entidb.server.read_answers import ReadAnswers
from entidb.server.threads import PAGES_AHEAD, _Line
from entidb.storage.postgres import PostgresStorage
from entidb.storage.postgres.news import PostgresNews
from entidb.storage.postgres.node import Node
from entidb.storage.postgres.schema import _TABLES
from entidb.sync import SyncConfig, SyncEngine
from tests.cli.support import command, document, done, entidb, environment, failed
from tests.server.support import Client, handshake, pull, push
from tests.server.test_live import Events
from tests.storage.postgres_cluster import MISSING, Cluster, cluster
from tests.tools import PATIENT, free_port, package
from tests.waiting import until

ADMIN = Caller("ada", "here")
WAIT_S = 120.0


@pytest.fixture
def address(postgres: Cluster) -> str:
    """Of a PostgreSQL database of the test's own."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(postgres.address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return postgres.address.replace("///postgres?", f"///{name}?")


def config(address: str, **settings: Any) -> ServerConfig:
    return ServerConfig(data_dir=address, insecure_no_auth=True, access_log=False, **settings)


class Nodes:
    """Some nodes of one place, each with a connection to it."""

    def __init__(self, address: str, count: int, **settings: Any) -> None:
        self.stack = ExitStack()
        self.servers = [
            self.stack.enter_context(SyncServer(config(address, **settings))) for _ in range(count)
        ]
        self.urls = [self.stack.enter_context(serving(server)) for server in self.servers]
        self.clients = [self.stack.enter_context(Client(url)) for url in self.urls]

    def engine(self, node: int, database: Database, db_id: str = "shop") -> SyncEngine:
        made = SyncEngine(
            SyncConfig(db_id=db_id, default_policy="merge"), self.urls[node], database
        )
        return self.stack.enter_context(made)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def news(self, node: int, waiting: Waiting) -> News:
        """Beside those that the node has of its own."""
        source = self.servers[node].place.news()
        assert source is not None
        return News(source, waiting)


@pytest.fixture
def nodes(address: str) -> Iterator[Nodes]:
    with Nodes(address, 2) as made:
        yield made


# ---------------------------------------------------------------- one place, several nodes


def test_what_is_pushed_to_one_node_is_pulled_from_another(nodes: Nodes) -> None:
    first, second = nodes.clients
    history = first.history()
    assert second.history() == history
    for number, node in enumerate([first, second, first], 1):
        answer = node.send(push(history, number)).message(PushResponse)
        assert [each.verdict for each in answer.results] == [Verdict.ACCEPTED]
        for other in nodes.clients:
            page = other.send(pull(history)).message(PullResponse)
            assert page.head == number and len(page.commits) == number
            # And nothing new, which is answered from memory if that is still true.
            assert other.send(pull(history, cursor=number)).message(PullResponse).head == number


def test_a_conflict_between_devices_of_two_nodes_is_decided_once(nodes: Nodes) -> None:
    devices = [Database.in_memory(), Database.in_memory()]
    engines = [nodes.engine(node, device) for node, device in enumerate(devices)]
    entity = devices[0].collection("items").add({"name": "tea", "price": 1, "left": 1})
    engines[0].sync()
    engines[1].sync()
    devices[0].collection("items").patch(entity, {"price": 2})
    devices[1].collection("items").patch(entity, {"left": 5})
    for _ in range(2):
        for engine in engines:
            engine.sync()
    found = [device.collection("items")[entity] for device in devices]
    assert found[0] == found[1]
    assert found[0]["price"] == 2 and found[0]["left"] == 5


def test_a_database_is_made_by_whoever_is_asked_first_unless_none_are_made(address: str) -> None:
    with Nodes(address, 1, create_databases=False) as made:
        assert made.clients[0].send(handshake()).code == "unknown_database"
        made.servers[0].stores.make("shop")
        assert made.clients[0].send(handshake()).message(HandshakeResponse).head == 0
        assert made.clients[0].send(handshake("other")).code == "unknown_database"
        assert made.servers[0].place.names() == ["shop"]


def test_names_that_differ_in_case_are_two_databases(nodes: Nodes) -> None:
    histories = {nodes.clients[0].history(name) for name in ("shop", "Shop", "shop.1")}
    assert len(histories) == 3
    assert nodes.servers[1].place.names() == ["Shop", "shop", "shop.1"]


# ---------------------------------------------------------------- changed by one of them


def test_a_database_that_is_renamed_on_one_node_is_not_served_from_memory_by_another(
    nodes: Nodes,
) -> None:
    first, second = nodes.clients
    history = first.history()
    second.send(push(history, 1)).message(PushResponse)
    idle = pull(history, cursor=1)
    assert second.send(idle).message(PullResponse).head == 1
    office = office_of(nodes.servers[0])
    nodes.servers[0].place.rename("shop", "store")  # and nobody asks the other to close it
    # The node notices, and the next request opens what is there now.
    assert second.send(idle).status == 503
    assert second.send(idle).code == "history_changed"
    found = second.send(pull(history, db_id="store")).message(PullResponse)
    assert found.head == 1
    assert "store" in {each.name for each in databases.rows(office, ADMIN)}


def test_a_database_that_is_deleted_on_one_node_is_gone_for_another_and_can_be_taken_back(
    nodes: Nodes,
) -> None:
    first, second = nodes.clients
    history = first.history()
    second.send(push(history, 1)).message(PushResponse)
    office = office_of(nodes.servers[0])
    aside = nodes.servers[0].place.put_aside("shop", 1_700_000_000_000)
    assert second.send(push(history, 2)).status == 503
    assert second.send(push(history, 2)).code == "history_changed"
    assert [each.id for each in databases.all_aside(office, ADMIN)] == [aside.id]
    databases.take_back(office, ADMIN, aside.id)
    assert second.send(push(history, 2)).message(PushResponse).head == 2
    assert databases.row(office, ADMIN, "shop").bytes > 0


def test_what_was_aside_for_a_day_is_removed_for_good(nodes: Nodes) -> None:
    nodes.clients[0].history()
    place = nodes.servers[0].place
    aside = place.put_aside("shop", 1000)
    assert [each.id for each in place.aside()] == [aside.id]
    end = time.monotonic() + WAIT_S
    while place.aside():  # by whichever of them is on duty
        for server in nodes.servers:
            databases.clear_aside(office_of(server))
        assert time.monotonic() < end
    assert place.aside() == [] and place.names() == []


def test_a_backup_takes_the_place_of_a_database_and_begins_a_history(
    address: str, tmp_path: Path
) -> None:
    with Nodes(address, 2, backup_dir=tmp_path / "backups") as nodes:
        first, second = nodes.clients
        history = first.history()
        second.send(push(history, 1)).message(PushResponse)
        office = next_on_duty(nodes)
        assert finished(office, backups.backup(office, ADMIN, "shop")) == "done"
        second.send(push(history, 2)).message(PushResponse)
        (made,) = backups.rows(office, ADMIN)
        task = backups.restore(office, ADMIN, "shop", made.id, "shop")
        assert finished(office, task) == "done"
        until(lambda: second.send(pull(history, cursor=1)).status != 503)
        assert second.send(pull(history, cursor=1)).code == "history_changed"
        renewed = second.history()
        assert renewed == first.history() != history
        assert first.send(pull(renewed)).message(PullResponse).head == 1
        assert [each.name for each in databases.all_aside(office, ADMIN)] == ["shop"]


def next_on_duty(nodes: Nodes) -> Office:
    """The office of the node that is on duty, which does what only one may do."""
    offices = [office_of(server) for server in nodes.servers]
    until(lambda: any(each.others.on_duty() for each in offices))
    return next(each for each in offices if each.others.on_duty())


def finished(office: Office, task: Task) -> str:
    until(lambda: ended(office, task).ended_ms is not None)
    return ended(office, task).state


def ended(office: Office, task: Task) -> Task:
    found = office.tasks.find(task.id)
    assert found is not None
    return found


# ---------------------------------------------------------------- the address


def test_no_message_and_no_repr_shows_the_password_of_the_address() -> None:
    for address in (
        "postgresql://me:hunt:er2x@db.example:5433,other/shops?sslmode=require",
        "postgresql://db.example/shops?user=me&password=hunt:er2x",
        "postgresql://me@db.example/shops?password=se@hunt:er2x",
        "postgresql://me:a/hunt:er2x@db.example/shops",
    ):
        assert "er2x" not in repr(config(address)), address
        assert "workers=1" in repr(config(address))


def test_a_server_that_cannot_reach_its_place_does_not_start_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = "postgresql://me:hunter2x@127.0.0.1:1/shops"
    with pytest.raises(StorageError, match=r"postgresql://127\.0\.0\.1:1/shops") as raised:
        SyncServer(config(address))
    assert "hunter2x" not in str(raised.value)
    line = failed(
        entidb("serve", "--insecure-no-auth", ENTIDB_SERVE_DATA_DIR=address),
        Exit.STORAGE,
        raised.value.code,
    )
    assert "hunter2x" not in line and "cannot be reached" in line


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("entidb.storage.postgres"):
            raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r'\(psycopg\): pip install "entidb\[postgres\]"'):
        SyncServer(config("postgresql://db.example/shops"))


def test_an_address_of_one_store_is_no_address_of_a_server() -> None:
    with pytest.raises(ConfigError, match="without #NAME") as raised:
        config("postgresql://me:hunter2x@db.example/shops#shop")
    assert "hunter2x" not in str(raised.value)
    address = "postgresql://me:hunt#er2x@db.example/shops"
    assert config(address).address == address
    for words in (
        ("init", "X"),
        ("serve", "--insecure-no-auth", "X"),
        ("admin", "--dir", "X", "nodes"),
    ):
        given = [f"{address}#shop" if word == "X" else word for word in words]
        line = failed(entidb(*given), Exit.USAGE, "invalid_config")
        assert "er2x" not in line and "without #NAME" in line


def test_another_scheme_is_no_directory() -> None:
    with pytest.raises(ConfigError, match="begins with postgresql://"):
        config("mysql://db.example/shops")


@pytest.mark.parametrize(
    "words",
    [
        ("get", "ADDRESS", "notes", "1"),
        ("put", "ADDRESS", "notes", "{}"),
        ("verify", "ADDRESS"),
        ("verify", "ADDRESS#shop", "--server", "http://localhost:1"),
        ("compact", "ADDRESS#shop"),
        ("status", "ADDRESS#shop"),
        ("backup", "here", "ADDRESS#shop"),
        ("backup", "--dir", "ADDRESS", "copy"),
        ("restore", "backup", "ADDRESS", "shop"),
        ("doctor", "ADDRESS", "--mend"),
        ("sync", "ADDRESS", "http://localhost:1"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_wants_a_directory_refuses_an_address_without_showing_it(
    words: tuple[str, ...],
) -> None:
    address = "postgresql://me:hunter2x@db.example/shops"
    given = [word.replace("ADDRESS", address) for word in words]
    line = failed(entidb(*given), Exit.USAGE, "usage")
    assert "hunter2x" not in line and ("PostgreSQL" in line or "in files" in line)


def test_commands_that_only_read_read_one_database_in_postgresql(
    nodes: Nodes, address: str, tmp_path: Path
) -> None:
    """Also while nodes serve it, and they change nothing."""
    history = nodes.clients[0].history()
    nodes.clients[0].send(push(history, 1)).message(PushResponse)
    place = f"{address}#shop"
    notes = document(done("list", place, "--json"))
    assert notes["entities"] == 1
    listed = done("list", place, notes["collection"], "--json")
    number = document(listed)["id"]
    assert done("get", place, notes["collection"], number, "--json")
    assert number in done("export", place, notes["collection"])
    assert document(done("inspect", place, "--json"))["role"] == "server"
    assert document(done("verify", place, "--json"))["ok"]
    assert "no index" in done("index", place)
    done("snapshot", place, str(tmp_path / "file"))
    done("backup", place, str(tmp_path / "copy"))
    assert document(done("verify", str(tmp_path / "copy"), "--json"))["ok"]
    failed(entidb("verify", f"{address}#nosuch"), Exit.NOT_FOUND, "no_database")
    assert nodes.clients[1].send(pull(history, cursor=1)).message(PullResponse).head == 1


#: Commands on one database, and on all of them; whoever writes to what is not there makes no tables
#: either.
LOOKING: tuple[tuple[str, ...], ...] = (
    ("list", "ADDRESS#shop"),
    ("list", "ADDRESS#shop", "notes"),
    ("get", "ADDRESS#shop", "notes", str(uuid.UUID(int=1))),
    ("export", "ADDRESS#shop", "notes"),
    ("inspect", "ADDRESS#shop"),
    ("verify", "ADDRESS#shop"),
    ("index", "ADDRESS#shop"),
    ("snapshot", "ADDRESS#shop", "file"),
    ("backup", "ADDRESS#shop", "copy"),
    ("copy", "ADDRESS", "copy"),
    ("copy", "ADDRESS#shop", "copy"),
    ("renew", "ADDRESS"),
    ("admin", "--dir", "ADDRESS", "databases"),
    ("doctor", "ADDRESS"),
)


def tables(address: str) -> list[str]:
    with psycopg.connect(address) as connection:
        found = connection.execute(
            "SELECT relname FROM pg_class WHERE relname LIKE 'entidb%' ORDER BY relname"
        ).fetchall()
    return [name for (name,) in found]


@pytest.mark.parametrize("words", LOOKING, ids=" ".join)
def test_a_command_that_looks_at_an_address_without_tables_makes_none(
    words: tuple[str, ...], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = entidb(*(word.replace("ADDRESS", address) for word in words))
    if words[0] != "doctor":  # which looks at more than that
        assert answer.exit_code != 0
        assert "no tables of EntiDB" in answer.stderr and "entidb init" in answer.stderr
    assert tables(address) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [each for each in LOOKING if each[0] != "renew"], ids=" ".join)
def test_a_command_that_looks_leaves_tables_of_an_older_format_as_they_are(
    words: tuple[str, ...], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(_TABLES.encode())
    before = tables(address)
    answer = entidb(*(word.replace("ADDRESS", address) for word in words))
    assert words[0] == "doctor" or answer.exit_code != 0  # no database is there, nobody serves
    assert tables(address) == before and list(tmp_path.iterdir()) == []
    # Who may do more makes the newest format, also where this process only looks otherwise.
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("INSERT INTO entidb_store (name) VALUES ('shop')")
    with closing(PostgresStorage.open(address, "shop", read_only=True)):
        assert tables(address) == before
        PostgresStorage.open(address, "shop", create=False).close()
        assert len(tables(address)) > len(before)


def checks(*words: str, code: Exit = Exit.OK) -> dict[str, dict[str, Any]]:
    answer = entidb("doctor", "--json", *words)
    assert answer.exit_code == code, answer.stderr
    return {found["check"]: found for found in map(json.loads, answer.stdout.splitlines())}


def test_the_doctor_looks_at_what_nodes_need_of_postgresql(
    address: str, postgres: Cluster, tmp_path: Path
) -> None:
    found = checks(address)
    assert "first node makes those" in found["tables"]["says"]
    with psycopg.connect(address) as connection:
        tables = connection.execute("SELECT to_regclass('entidb_store')").fetchone()
    assert tables == (None,)  # it has made none
    with Nodes(address, 2):
        found = checks(address, "--", "--insecure-no-auth")
    assert {each: found[each]["state"] for each in found} == {
        **dict.fromkeys(("settings", "postgresql", "durable", "tables", "connections"), "ok"),
        **dict.fromkeys(("autovacuum", "clock"), "ok"),
        "standby": "warning",
        "backups": "skipped",
    }
    assert "2 nodes" in found["connections"]["says"]
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("UPDATE entidb_format SET format = 99")
        connection.execute("ALTER ROLE CURRENT_USER SET synchronous_commit = 'off'")
        try:
            found = checks(address, code=Exit.FAULTS)
        finally:
            connection.execute("ALTER ROLE CURRENT_USER RESET synchronous_commit")
    assert found["tables"]["state"] == found["durable"]["state"] == "problem"
    assert "synchronous_commit is off" in found["durable"]["says"]
    nosuch = address.replace("postgresql:///", "postgresql:///no")
    assert "createdb" in checks(nosuch, code=Exit.FAULTS)["postgresql"]["says"]


def test_the_doctor_says_that_commits_wait_for_a_standby_that_is_not_there() -> None:
    with cluster() as own:
        own.set(synchronous_standby_names="nobody", autovacuum="off", max_connections="150")
        found = checks(own.address, code=Exit.FAULTS)
    assert found["standby"]["state"] == found["autovacuum"]["state"] == "problem"


def test_init_makes_the_tables_once(address: str) -> None:
    assert "made the tables" in done("init", address)
    assert "already" in done("init", address)
    assert document(done("init", address, "--json"))["created"] is False
    failed(entidb("init", address, "--local", "drafts"), Exit.USAGE, "usage")
    assert json.loads(done("init", address, "--json"))["path"].startswith("postgresql://")


# ---------------------------------------------------------------- news


@pytest.fixture
def streams() -> Iterator[list[Events]]:
    yield Events.opened
    while Events.opened:
        Events.opened.pop().close()


def test_a_push_to_one_node_wakes_who_waits_at_another(nodes: Nodes, streams: list[Events]) -> None:
    history = nodes.clients[0].history()
    stream = Events(nodes.urls[1])
    assert stream.next() is not None
    for number in (1, 2):
        nodes.clients[0].send(push(history, number)).message(PushResponse)
        event = stream.next()
        assert event is not None and event["data"] == str(number)


def test_who_waits_for_a_database_that_is_closed_there_hears_of_it_and_it_stays_closed(
    nodes: Nodes, streams: list[Events]
) -> None:
    history = nodes.clients[0].history()
    stream = Events(nodes.urls[1])
    assert stream.next() is not None
    stores = nodes.servers[1].stores
    with stores.closed_here("shop", 60):
        nodes.clients[0].send(push(history, 1)).message(PushResponse)
        event = stream.next()
        assert event is not None and event["data"] == "1"
        assert stores.opened() == {}


class Waiting:
    """Those who wait, for ``News`` alone."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.heard: queue.Queue[tuple[str, str, int]] = queue.Queue()

    def awaited(self) -> set[str]:
        return set(self.names)

    def told(self, db_id: str, head: int) -> None:
        self.heard.put(("told", db_id, head))

    def opened(self, db_id: str, head: int) -> None:
        self.heard.put(("opened", db_id, head))


class Odd:
    """A source of news that fails once in a way that nobody knows."""

    def __init__(self) -> None:
        self.failures = 1

    def wake(self) -> None: ...

    def wait(self, timeout_s: float) -> set[str]:
        if self.failures:
            self.failures -= 1
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        time.sleep(0.01)
        return set()

    def tell(self, names: Collection[str]) -> None: ...

    def marks(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(names, (1, 1))

    def value(self, number: int, key: bytes) -> bytes | None:
        return None

    def close(self) -> None: ...


def test_what_nobody_knows_of_ends_no_news() -> None:
    waiting = Waiting("shop")
    with contextlib.closing(News(Odd(), waiting)):
        assert waiting.heard.get(timeout=WAIT_S) == ("told", "shop", 0)


def test_marks_are_looked_at_also_where_every_notification_is_lost(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresNews, "tell", lambda self, names: None)
    monkeypatch.setattr(PostgresNews, "_take_in", lambda self, line: time.sleep(0.01))
    history = nodes.clients[0].history()
    waiting = Waiting("shop", "nosuch")
    with contextlib.closing(nodes.news(1, waiting)):
        assert waiting.heard.get(timeout=WAIT_S) == ("told", "shop", 0)
        nodes.clients[0].send(push(history, 1)).message(PushResponse)
        assert waiting.heard.get(timeout=WAIT_S) == ("told", "shop", 1)


def test_another_database_of_the_same_name_is_told_as_one_that_was_opened_anew(
    nodes: Nodes,
) -> None:
    history = nodes.clients[0].history()
    nodes.clients[0].send(push(history, 1, 2)).message(PushResponse)
    waiting = Waiting("shop")
    with contextlib.closing(nodes.news(1, waiting)):
        assert waiting.heard.get(timeout=WAIT_S) == ("told", "shop", 2)
        nodes.servers[0].place.put_aside("shop", 1000)
        nodes.servers[1].stores.make("shop")
        assert waiting.heard.get(timeout=WAIT_S) == ("opened", "shop", 0)


def test_news_go_on_after_the_connection_was_ended(nodes: Nodes, address: str) -> None:
    history = nodes.clients[0].history()
    waiting = Waiting("shop")
    with contextlib.closing(nodes.news(1, waiting)):
        assert waiting.heard.get(timeout=WAIT_S) == ("told", "shop", 0)
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND datname = current_database()"
            )
        until(lambda: nodes.clients[0].send(push(history, 1)).status == 200)
        assert waiting.heard.get(timeout=WAIT_S) == ("told", "shop", 1)


# ---------------------------------------------------------------- the event loop


def test_nothing_is_asked_of_the_store_on_the_event_loop(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, streams: list[Events]
) -> None:
    asked: list[str] = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            asked.append(threading.current_thread().name)
            return real(*given)

        return call

    # All ways to a connection.
    monkeypatch.setattr(Node, "lend", noted(Node.lend))
    monkeypatch.setattr(Node, "connect", noted(Node.connect))
    ask_everything(nodes)
    stream = Events(nodes.urls[0])
    assert stream.next() is not None
    kinds = {name.partition("_")[0] for name in asked}
    assert {"entidb-asker", "entidb-reader", "entidb-opener"} <= kinds
    assert not kinds & {"entidb-server", "MainThread"}


def ask_everything(nodes: Nodes) -> None:
    client = nodes.clients[0]
    history = client.history()
    for number in range(1, 4):
        client.send(push(history, number)).message(PushResponse)
        client.send(pull(history)).message(PullResponse)
        client.send(pull(history, cursor=number - 1)).message(PullResponse)
        client.send(pull(history, cursor=number)).message(PullResponse)
    device = Database.in_memory()
    engine = nodes.engine(0, device)
    for number in range(3):
        device.collection("notes").add({"n": number})
        engine.sync()
        engine.sync()
    assert engine.verify_with_server().agrees


def test_no_thread_waits_for_a_connection_to_read_while_it_has_one(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else as many threads as there are connections would wait for each other."""
    held: Counter[tuple[int, int]] = Counter()
    nested: list[str] = []
    lend, take_back = Node.lend, Node.take_back

    def lent(node: Node, pool: Any) -> Any:
        key = threading.get_ident(), id(pool)
        if held[key]:
            nested.extend(traceback.format_stack(limit=12))
        line = lend(node, pool)
        held[key] += 1
        return line

    def taken_back(node: Node, pool: Any, line: Any) -> None:
        held[threading.get_ident(), id(pool)] -= 1
        take_back(node, pool, line)

    monkeypatch.setattr(Node, "lend", lent)
    monkeypatch.setattr(Node, "take_back", taken_back)
    ask_everything(nodes)
    assert not nested, "".join(nested)


# ---------------------------------------------------------------- reading together


@pytest.fixture
def crowd(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Crowd:
    """20 pulls from one node, of which those that wait for the first ones are read together."""
    client = nodes.clients[0]
    history = client.history()
    for number in range(1, 41):
        client.send(push(history, number)).message(PushResponse)
    return Crowd(nodes.urls[0], history, monkeypatch)


class Crowd:
    def __init__(self, url: str, history: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url, self.history = url, history
        self.answers: dict[int, Any] = {}
        #: Whatever reads; and how many read then.
        self.views = 0
        #: How many had no turn at once.
        self._waiting = 0
        self._first = threading.Event()
        self._go_on = threading.Event()
        page, pages, wait = ReadAnswers._page, ReadAnswers._pages, _Line.wait

        def slow(reading: ReadAnswers, *given: Any) -> Any:
            if not self._go_on.is_set():
                self._first.set()
                self._go_on.wait(WAIT_S)
            return page(reading, *given)

        def counted(reading: ReadAnswers, store: Any, several: list[Any]) -> Any:
            self.views += 1
            return pages(reading, store, several)

        async def waits(line: _Line, small: bool, brought: object = None) -> bool:
            self._waiting += 1
            return await wait(line, small, brought)

        monkeypatch.setattr(ReadAnswers, "_page", slow)
        monkeypatch.setattr(ReadAnswers, "_pages", counted)
        monkeypatch.setattr(_Line, "wait", waits)

    def pull(
        self, count: int, meanwhile: Callable[[], None] = lambda: None, *, others: int = 0
    ) -> None:
        """``others`` have asked already."""

        def one(number: int) -> None:
            with Client(self.url) as client:
                wanted = pull(self.history, cursor=number, limit=3)
                self.answers[number] = client.send(wanted)

        threads = [threading.Thread(target=one, args=[number]) for number in range(count)]
        for thread in threads:
            thread.start()
        assert self._first.wait(WAIT_S)
        until(lambda: self._waiting >= count + others - PAGES_AHEAD)
        meanwhile()
        self._go_on.set()
        for thread in threads:
            thread.join(WAIT_S)


def test_pulls_that_wait_are_read_together_and_each_gets_its_own(crowd: Crowd) -> None:
    crowd.pull(20)
    for number in range(20):
        page = crowd.answers[number].message(PullResponse)
        assert [each.version for each in page.commits] == [number + 1, number + 2, number + 3]
    assert 1 <= crowd.views < 10


def connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return socket.create_connection((parts.hostname, parts.port))


def test_who_leaves_while_pulls_are_read_together_keeps_no_other_from_its_answer(
    crowd: Crowd,
) -> None:
    gone = [connected(crowd.url) for _ in range(6)]
    body = encode(pull(crowd.history, cursor=1, limit=3))
    head = f"POST /v1/pull HTTP/1.1\r\nhost: localhost\r\ncontent-type: {CONTENT_TYPE}\r\n"
    for each in gone:
        each.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def leave() -> None:
        for each in gone:
            each.close()

    crowd.pull(12, leave, others=len(gone))
    for number in range(12):
        page = crowd.answers[number].message(PullResponse)
        assert [each.version for each in page.commits] == [number + 1, number + 2, number + 3]


def test_a_store_that_fails_while_pulls_are_read_together_fails_for_each_of_them(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: PostgresStorage) -> Any:
        raise StorageUnreachableError("the server is away")

    crowd.pull(20, lambda: monkeypatch.setattr(PostgresStorage, "snapshot", fails))
    refused = [each for each in crowd.answers.values() if each.status != 200]
    assert len(crowd.answers) == 20 and len(refused) >= 16
    assert {each.code for each in refused} == {"busy"}


# ---------------------------------------------------------------- what can happen


class Ledger:
    """Devices that push one transaction after the other, to either node, until they are stopped."""

    def __init__(self, nodes: Nodes, devices: int) -> None:
        self.history = nodes.clients[0].history()
        self.acknowledged: set[bytes] = set()
        self.verdicts: Counter[Verdict] = Counter()
        #: Status, code, and whether it was said when to come again.
        self.refused: Counter[tuple[int, str, bool]] = Counter()
        self.stop = threading.Event()
        self.threads = [
            threading.Thread(target=self.run, args=[nodes.urls, device])
            for device in range(1, devices + 1)
        ]

    def run(self, urls: list[str], device: int) -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(url)) for url in urls]
            number = 1000 * device
            while not self.stop.is_set():
                request = push(self.history, number)
                answer = clients[number % len(clients)].send(request)
                if answer.status == 200:
                    (result,) = answer.message(PushResponse).results
                    self.verdicts[Verdict(result.verdict)] += 1
                    self.acknowledged.add(request.transactions[0].transaction_id)
                    number += 1
                else:
                    known = "retry-after" in answer.headers
                    self.refused[answer.status, answer.code, known] += 1
                    self.stop.wait(0.05)

    def goes_on(self) -> None:
        """Every device gets further from here."""
        count = len(self.acknowledged)
        until(lambda: len(self.acknowledged) > count + 2 * len(self.threads))

    def is_refused(self) -> None:
        count = self.refused.total()
        until(lambda: self.refused.total() > count + 2 * len(self.threads))

    def __enter__(self) -> Ledger:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_while_postgresql_is_away_devices_are_told_busy_and_nothing_is_lost() -> None:
    with cluster() as own, Nodes(own.address, 2) as nodes:
        with Ledger(nodes, 4) as ledger:
            for kind in (signal.SIGQUIT, signal.SIGINT):
                ledger.goes_on()
                own.stop(kind)
                ledger.is_refused()
                assert nodes.clients[0].request("GET", "/healthz").status == 200
                ready = nodes.clients[0].request("GET", "/readyz")
                assert (ready.status, json.loads(ready.body)["reasons"]) == (503, ["storage"])
                own.start()
            ledger.goes_on()
        assert set(ledger.refused) == {(503, "busy", True)}
        assert set(ledger.verdicts) == {Verdict.ACCEPTED}
        page = nodes.clients[1].send(pull(ledger.history)).message(PullResponse)
        assert not page.has_more and page.head == len(page.commits)
        there = {each.entity_id for commit in page.commits for each in commit.operations}
        assert there >= ledger.acknowledged and len(there) == page.head


def test_a_node_that_is_killed_in_the_middle_of_a_push_holds_up_no_other(
    address: str, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def check(collection, *rest):\n"
        "    pathlib.Path('deciding').touch()\n"
        "    time.sleep(600)\n"
    )
    ready = tmp_path / "ready"
    options = ("--insecure-no-auth", "--port", "0", "--ready-file", ready)
    node = subprocess.Popen(
        command("serve", *options, "--validate", "slow:check"),
        cwd=tmp_path,
        env=environment(ENTIDB_SERVE_DATA_DIR=address),
        stderr=subprocess.DEVNULL,
    )
    try:
        until(ready.exists)
        with Nodes(address, 1) as nodes, Client(ready.read_text().strip()) as killed:
            history = nodes.clients[0].history()
            request = push(history, 1)
            sent = threading.Thread(target=lambda: refused(killed.send, request))
            sent.start()
            until((tmp_path / "deciding").exists)
            node.kill()
            sent.join(WAIT_S)
            assert nodes.clients[0].send(push(history, 2)).message(PushResponse).head == 1
            # The device sends again what it has no answer to, to a node that lives.
            assert nodes.clients[0].send(request).message(PushResponse).head == 2
    finally:
        node.kill()
        node.wait(WAIT_S)


def test_databases_that_nobody_uses_are_closed_and_opened_again(address: str) -> None:
    with Nodes(address, 1, databases_open_max=2, idle_close_s=0.1) as nodes:
        histories = {f"db{n}": nodes.clients[0].history(f"db{n}") for n in range(5)}
        assert nodes.servers[0].stores.open_count <= 2
        until(lambda: nodes.servers[0].stores.open_count == 0)
        for name, history in histories.items():
            assert nodes.clients[0].send(push(history, 1, db_id=name)).status == 200


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_workers_are_nodes_of_one_address(address: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    options = ("--insecure-no-auth", "--port", "0", "--ready-file", ready, "--workers", "2")
    parent = subprocess.Popen(
        command("serve", *options, "--metrics"),
        cwd=tmp_path,
        env=environment(ENTIDB_SERVE_DATA_DIR=address),
        stderr=subprocess.DEVNULL,
    )
    try:
        until(ready.exists)
        url = ready.read_text().strip()
        with Client(url) as client:
            history = client.history()
        for number in range(1, 21):
            with Client(url) as client:  # each connection is for whichever of them is quicker
                assert client.send(push(history, number)).message(PushResponse).head == number
                assert client.send(pull(history)).message(PullResponse).head == number
        with Client(url) as client:
            health = json.loads(client.request("GET", "/healthz").body)
        assert health == {"status": "ok", "nodes": 2}
        # Counted when its answer has left, which the client may have read before that.
        until(lambda: pulls_counted(url) == {20.0})
        # Another node has an address of its own, and is asked there.
        with Nodes(address, 1) as other:
            other.clients[0].send(pull(history))
            for _ in range(10):
                with Client(url) as client:
                    metrics = client.request("GET", "/metrics").body.decode()
                    assert client.request("GET", "/readyz").status == 200
                pulls = re.findall(r'requests_total\{path="/v1/pull",status="200"\} (\S+)', metrics)
                assert list(map(float, pulls)) == [20.0]  # of both workers, whichever is asked
                assert re.findall(r"\nentidb_databases (\S+)", metrics) == ["1.0"]
        # What somebody has seen is not gone with a worker that is killed.
        for _ in range(2):
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            gone = Path(f"/proc/{children[0]}")
            until(lambda gone=gone: not gone.exists())  # type: ignore[misc]
            for _ in range(5):
                with Client(url) as client:
                    metrics = client.request("GET", "/metrics").body.decode()
                found = re.findall(r'requests_total\{path="/v1/pull",status="200"\} (\S+)', metrics)
                assert list(map(float, found)) == [20.0]
    finally:
        parent.terminate()
        assert parent.wait(WAIT_S) == 0
    assert asked_for(address) == 0


APP = """
import os

from entidb.server import ServerConfig, create_app

app = create_app(
    ServerConfig(data_dir=os.environ["DATA"], insecure_no_auth=True, metrics=True)
)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.parametrize("manager", ["uvicorn", "gunicorn", "gunicorn --preload"])
def test_nodes_that_one_parent_has_started_count_together(
    address: str, tmp_path: Path, manager: str
) -> None:
    (tmp_path / "shop_app.py").write_text(APP)
    port = free_port()
    starts = [sys.executable, "-m", *manager.split(), "shop_app:app", "--workers", "2"]
    starts += PATIENT[manager.split()[0]]
    if manager == "uvicorn":
        starts += ["--port", str(port)]
    else:
        package("gunicorn")
        worker = "uvicorn.workers.UvicornWorker"
        starts += ["--bind", f"127.0.0.1:{port}", "--worker-class", worker]
    url, parent = (
        f"http://127.0.0.1:{port}",
        subprocess.Popen(
            starts,
            cwd=tmp_path,
            env=environment(DATA=address, PYTHONWARNINGS="default", TMPDIR=str(tmp_path)),
            stderr=subprocess.DEVNULL,
        ),
    )

    def both() -> bool:
        assert parent.poll() is None
        with contextlib.suppress(OSError), Client(url) as client:
            health = client.request("GET", "/healthz")
            return bool(json.loads(health.body).get("nodes") == 2)
        return False

    try:
        until(both)
        with Client(url) as client:
            history = client.history()
        for _ in range(20):
            with Client(url) as client:  # each connection is for whichever of them is quicker
                assert client.send(pull(history)).status == 200
        with Nodes(address, 1) as other:  # at an address of its own
            other.clients[0].send(pull(history))
            # Counted when its answer has left, which the client may have read before that.
            until(lambda: pulls_counted(url) == {20.0})
            office = office_of(other.servers[0])

            def started() -> set[int]:
                """``/healthz`` counts the node at its own address too, and tells none apart."""
                return {row.process for row in office.nodes()} - {os.getpid()}

            def is_replaced(killed: int, left: int) -> bool:
                now = started()
                return len(now) == 2 and left in now and killed not in now

            # What somebody has seen is not gone with a process that is killed.
            for _ in range(2):
                killed, left = sorted(started())
                os.kill(killed, signal.SIGKILL)
                until(partial(is_replaced, killed, left))
                assert pulls_counted(url) == {20.0}
    finally:
        parent.terminate()
        assert parent.wait(WAIT_S) in (0, -signal.SIGTERM)


def pulls_counted(url: str) -> set[float]:
    """What ten looks at the metrics say, each of them of whichever process is quicker."""
    found: set[float] = set()
    for _ in range(10):
        with Client(url) as client:
            metrics = client.request("GET", "/metrics").body.decode()
        pulls = re.findall(r'requests_total\{path="/v1/pull",status="200"\} (\S+)', metrics)
        found.update(map(float, pulls))
    return found


def asked_for(address: str) -> int:
    """How many connections EntiDB has to ``address``."""
    with psycopg.connect(address) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'entidb'"
        ).fetchone()
    assert row is not None
    return int(row[0])


def refused(send: Callable[..., object], *given: object) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        send(*given)
