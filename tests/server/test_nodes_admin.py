"""Administration of a server whose nodes share nothing but PostgreSQL: what one of them decides
holds on all, what each has noted adds up, one is on duty, and who is gone is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from entidb.errors import ConfigError, ServerBusyError, StorageError
from entidb.protocol import ErrorResponse, HandshakeResponse, PushResponse
from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.admin.opening import office_of
from entidb.server.control import Control, Revoked
from entidb.server.nodes.records import NodeRecords
from entidb.server.records import CONTROL
from tests.cli.support import document, done, entidb, failed
from tests.server.support import DEVICE, Client, ManualClock, handshake, pull, push
from tests.server.test_live import Events
from tests.storage.postgres_cluster import Cluster, cluster
from tests.storage.test_postgres import asked
from tests.storage.test_postgres_sharing import cut, own_database

pytestmark = pytest.mark.process

WAIT_S = 60.0


def until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


@pytest.fixture
def address(postgres: Cluster) -> Iterator[str]:
    with own_database(postgres) as found:
        yield found


def config(address: str, **settings: Any) -> ServerConfig:
    return ServerConfig(data_dir=address, insecure_no_auth=True, access_log=False, **settings)


class Nodes:
    """Two nodes, each with a connection to it."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.stack = ExitStack()
        self.servers = [SyncServer(config(address, **settings)) for _ in range(2)]
        for server in self.servers:
            self.stack.callback(server.close)
        self.runs = [ExitStack() for _ in self.servers]
        self.urls = []
        for server, run in zip(self.servers, self.runs, strict=True):
            self.stack.enter_context(run)
            self.urls.append(run.enter_context(serving(server)))
        self.clients = [self.stack.enter_context(Client(url)) for url in self.urls]
        until(lambda: self.on_duty() is not None, "one is on duty")

    def on_duty(self) -> int | None:
        """Which of them is."""
        duty = [office_of(server).others.on_duty() for server in self.servers]
        return duty.index(True) if True in duty else None


@pytest.fixture
def nodes(address: str) -> Iterator[Nodes]:
    made = Nodes(address)
    with made.stack:
        yield made


def admin(client: Client, method: str, path: str, **body: Any) -> Any:
    answer = client.request(
        method, f"/v1/admin/{path}", json.dumps(body).encode(), content_type="application/json"
    )
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def code(client: Client, request: Any) -> str:
    answer = client.send(request)
    return "" if answer.status == 200 else answer.code


# ---------------------------------------------------------------- decided on one, in force on all


def test_who_is_revoked_on_one_node_is_out_on_all_before_the_administrator_has_the_answer(
    nodes: Nodes,
) -> None:
    first, second = nodes.clients
    history = first.history()
    assert code(second, push(history, 1)) == ""
    for one, other in ((first, second), (second, first)):
        who = {"kind": "device", "name": DEVICE.hex()}
        admin(one, "POST", "revoked", **who)
        assert code(other, pull(history)) == code(one, pull(history)) == "forbidden"
        assert [each["name"] for each in admin(other, "GET", "revoked")] == [DEVICE.hex()]
        assert admin(other, "DELETE", "revoked", **who)["changed"]
        assert code(one, pull(history)) == code(other, pull(history)) == ""


def test_open_streams_of_who_is_revoked_end_on_all_nodes(nodes: Nodes) -> None:
    nodes.clients[0].history()
    with ExitStack() as stack:
        streams = []
        for url in nodes.urls:
            query = f"db_id=shop&device_id={DEVICE.hex()}"
            streams.append(stack.enter_context(contextlib.closing(Events(url, query=query))))
        for stream in streams:
            assert stream.next()
        admin(nodes.clients[0], "POST", "revoked", kind="device", name=DEVICE.hex())
        for stream in streams:
            event = stream.next()
            assert event is not None and "revoked" in event["data"]
            assert stream.next() is None


def test_what_is_frozen_on_one_node_is_frozen_on_all(nodes: Nodes) -> None:
    first, second = nodes.clients
    history = first.history()
    admin(first, "POST", "databases/shop/freeze", reason="moving")
    assert code(second, push(history, 1)) == "busy"
    assert code(second, pull(history)) == ""
    admin(second, "POST", "databases/shop/thaw")
    assert code(first, push(history, 1)) == code(second, push(history, 2)) == ""


def test_a_node_sees_within_a_second_what_a_program_has_decided_that_tells_nobody(
    nodes: Nodes, address: str
) -> None:
    second = nodes.clients[1]
    history = second.history()
    records = NodeRecords(address)
    with contextlib.closing(records):
        revoke(Control(records, ManualClock()))
    until(lambda: code(second, pull(history)) == "forbidden", "it looks by itself")


def revoke(control: Control) -> None:
    control.revoke(Revoked("device", DEVICE.hex(), since_ms=1, by="ada"))


def test_what_was_not_looked_at_for_a_second_is_not_believed(address: str) -> None:
    clock = ManualClock()
    # Without an app nothing of them looks but who is asked.
    with SyncServer(config(address)) as one, SyncServer(config(address), clock=clock) as other:
        assert isinstance(other.handle("/v1/handshake", None, handshake()), HandshakeResponse)
        revoke(one.front.control)
        clock.advance(0.9)
        assert not other.front.control.is_stale()
        clock.advance(0.2)
        answer = other.handle("/v1/handshake", None, handshake())
        assert isinstance(answer, ErrorResponse) and answer.code == "forbidden"


def test_nobody_is_let_in_while_it_cannot_be_read_who_is_revoked() -> None:
    clock = ManualClock()
    with cluster() as own, SyncServer(config(own.address), clock=clock) as server:
        assert isinstance(server.handle("/v1/handshake", None, handshake()), HandshakeResponse)
        own.stop()
        clock.advance(2)
        answer = server.handle("/v1/handshake", None, handshake())
        assert isinstance(answer, ErrorResponse) and answer.code == "busy"
        assert "revoked" in answer.message
        with pytest.raises(ServerBusyError):
            server.front.control.freshen()
        own.start()
        until(lambda: not _is_away(server), "it is served again")
        with SyncServer(config(own.address)) as another:
            assert another.front.control.decided.revoked == ()


def _is_away(server: SyncServer) -> bool:
    return isinstance(server.handle("/v1/handshake", None, handshake()), ErrorResponse)


def test_a_node_that_cannot_read_who_is_revoked_does_not_start(address: str) -> None:
    records = NodeRecords(address)
    with contextlib.closing(records):
        records.change(CONTROL, lambda before: b"{", lambda mark: None)
    with pytest.raises(ConfigError, match="who is revoked"):
        SyncServer(config(address))
    with pytest.raises(StorageError, match="closed"):
        records.read(CONTROL)


# ---------------------------------------------------------------- noted by each


def test_what_each_node_has_noted_of_a_device_adds_up(nodes: Nodes) -> None:
    first, second = nodes.clients
    history = first.history()
    for number, client in enumerate((first, second, second), 1):
        client.send(push(history, number)).message(PushResponse)
    for client in nodes.clients:
        (row,) = admin(client, "GET", "databases/shop/devices")
        assert row["device"]["requests"] == 4 and row["device"]["accepted"] == 3
    admin(second, "POST", "databases/shop/rename", to="store")
    (row,) = admin(first, "GET", "databases/store/devices")
    assert row["device"]["accepted"] == 3


def test_there_is_one_audit_log(nodes: Nodes) -> None:
    first, second = nodes.clients
    admin(first, "POST", "databases", name="shop")
    admin(second, "POST", "databases/shop/freeze", reason="moving")
    admin(first, "POST", "databases/shop/thaw")
    for client in nodes.clients:
        found = [each["action"] for each in admin(client, "GET", "audit")]
        assert found == ["thaw", "freeze", "create"]


# ---------------------------------------------------------------- one on duty


def test_nodes_are_listed_with_the_one_on_duty_until_they_are_gone(nodes: Nodes) -> None:
    for client in nodes.clients:
        rows = admin(client, "GET", "nodes")
        assert [row["process"] for row in rows] == [os.getpid()] * 2
        assert [row.get("on_duty", False) for row in rows].count(True) == 1
        assert {row["address"] for row in rows} == {*nodes.urls}
        assert admin(client, "GET", "overview")["nodes"][0]["name"] == rows[0]["name"]
        answer = client.request("GET", "/healthz")
        assert json.loads(answer.body) == {"status": "ok", "nodes": 2}
    duty = nodes.on_duty()
    assert duty is not None
    nodes.runs[duty].close()
    left = 1 - duty
    until(lambda: nodes.on_duty() == left, "the other one is on duty")
    (row,) = admin(nodes.clients[left], "GET", "nodes")
    assert row["address"] == nodes.urls[left] and row["on_duty"]


def test_a_task_runs_on_the_node_on_duty_whichever_is_asked(nodes: Nodes) -> None:
    nodes.clients[0].history()
    numbers = [admin(each, "POST", "databases/shop/purge")["id"] for each in nodes.clients]
    assert numbers == [1, 2]
    for client in nodes.clients:
        until(partial(both_done, client), "the tasks are done")
    idle = nodes.servers[1 - (nodes.on_duty() or 0)]
    assert office_of(idle).tasks.all() == []


def both_done(client: Client) -> bool:
    return [each.get("state") for each in admin(client, "GET", "tasks")] == ["done", "done"]


def test_one_node_looks_for_old_tombstones(nodes: Nodes) -> None:
    for client in nodes.clients:
        client.history()
    asked_first = [server.stores.may_purge("shop", 3600.0) for server in nodes.servers]
    assert asked_first == [True, False]


def test_a_database_that_is_looked_after_is_closed_in_all_nodes(nodes: Nodes) -> None:
    first, second = nodes.clients
    history = first.history()
    assert code(second, push(history, 1)) == ""
    with nodes.servers[0].stores.closed("shop", 10.0):
        assert "shop" not in nodes.servers[1].stores.opened()
        assert code(second, push(history, 2)) == code(first, push(history, 2)) == "busy"
        with (
            pytest.raises(ServerBusyError),
            nodes.servers[1].stores.elsewhere("shop", 1.0),
        ):
            pytest.fail("two look after it")
    assert code(second, push(history, 2)) == ""


def test_a_database_is_renamed_deleted_and_taken_back_while_all_nodes_serve_it(
    nodes: Nodes,
) -> None:
    first, second = nodes.clients
    history = first.history()
    assert code(second, push(history, 1)) == ""
    admin(first, "POST", "databases/shop/rename", to="store")
    assert code(second, pull(history, cursor=1)) == "history_changed"
    assert code(second, pull(history, db_id="store", cursor=1)) == ""
    aside = admin(second, "DELETE", "databases/store", confirm="store")
    assert code(first, pull(history, db_id="store")) == "history_changed"
    admin(first, "POST", f"deleted/{aside['id']}/undelete")
    assert code(second, pull(history, db_id="store", cursor=1)) == ""
    assert [each["name"] for each in admin(second, "GET", "databases")] == ["store"]


def test_nodes_whose_connections_are_cut_are_back_by_themselves(nodes: Nodes, address: str) -> None:
    first, second = nodes.clients
    cut(address)

    def both() -> bool:
        rows = databases_of(first)
        return rows is not None and len(rows) == 2 and nodes.on_duty() is not None

    until(both, "both are there again")
    until(lambda: databases_of(second), "and may be asked")


def databases_of(client: Client) -> Any:
    answer = client.request("GET", "/v1/admin/nodes")
    return json.loads(answer.body) if answer.status == 200 else None


# ---------------------------------------------------------------- backups


def finished(client: Client, task: int) -> Any:
    def over() -> Any:
        found = admin(client, "GET", f"tasks/{task}")
        return found if "ended_ms" in found else None

    return until(over, "the task is over")


def test_a_backup_of_one_node_is_put_back_for_all_as_a_new_history(
    address: str, tmp_path: Path
) -> None:
    made = Nodes(address, backup_dir=tmp_path)
    with made.stack:
        first, second = made.clients
        history = first.history()
        assert code(second, push(history, 1)) == ""
        task = admin(first, "POST", "databases/shop/backup")
        assert finished(second, task["id"])["state"] == "done"
        assert code(second, push(history, 2)) == code(first, push(history, 3)) == ""
        (backup,) = admin(second, "GET", "backups")
        task = admin(second, "POST", "databases/shop/restore", backup=backup["id"], confirm="shop")
        done = finished(first, task["id"])
        assert done["state"] == "done" and done["result"]["head"] == 1
        for client in made.clients:
            assert code(client, pull(history, cursor=3)) == "history_changed"
        anew = second.history()
        assert anew != history and first.history() == anew
        assert code(first, push(anew, 4)) == ""
        # What it took the place of can be taken back.
        (aside,) = admin(first, "GET", "deleted")
        admin(first, "POST", "databases/shop/rename", to="restored")
        admin(second, "POST", f"deleted/{aside['id']}/undelete")
        assert code(first, pull(history, cursor=3)) == ""
        assert [each["name"] for each in admin(first, "GET", "databases")] == ["restored", "shop"]


def test_a_database_is_verified_compacted_and_erased_from(nodes: Nodes) -> None:
    first, second = nodes.clients
    items = nodes.servers[0].database("shop").collection("items")
    kept, gone = items.add({"who": "ada"}), items.add({"who": "bob"})
    for what in ("verify", "compact"):
        task = admin(second, "POST", f"databases/shop/{what}")
        assert finished(first, task["id"])["state"] == "done"
    wanted = {"collections": {"items": {"who": "bob"}}}
    seen = admin(second, "POST", "databases/shop/erase/preview", **wanted)
    assert seen["entities"] == 1
    task = admin(second, "POST", "databases/shop/erase", confirm=seen["confirm"], **wanted)
    result = finished(first, task["id"])["result"]
    assert result["erased"] == {"items": 1}
    assert gone not in items and kept in items
    # What it says of PostgreSQL is so: the rest is for whoever runs that.
    assert "entidb_kv" in result["storage_may_keep_it"][0]


def test_what_was_erased_is_in_no_table_after_the_vacuum_that_the_report_names(
    nodes: Nodes, address: str, postgres: Cluster
) -> None:
    first, _ = nodes.clients
    items = nodes.servers[0].database("shop").collection("items")
    erased, kept = "ada-king-of-ockham", "grace-hopper-of-arlington"
    with nodes.servers[0].database("shop").transaction() as tx:
        for number in range(50):
            tx.collection("items").add({"who": erased, "number": number})
        tx.collection("items").add({"who": kept})
    wanted = {"collections": {"items": {"who": erased}}}
    seen = admin(first, "POST", "databases/shop/erase/preview", **wanted)
    task = admin(first, "POST", "databases/shop/erase", confirm=seen["confirm"], **wanted)
    assert finished(first, task["id"])["state"] == "done"
    assert len(items) == 1
    nodes.stack.close()
    asked(address, "VACUUM FULL")
    asked(address, "CHECKPOINT")
    contents = [path.read_bytes() for path in (postgres.data / "base").rglob("*") if path.is_file()]
    assert any(kept.encode() in content for content in contents)
    assert not any(erased.encode() in content for content in contents)


def test_a_backup_that_is_due_is_made_by_the_node_on_duty(address: str, tmp_path: Path) -> None:
    made = Nodes(address, backup_dir=tmp_path, backup_every_s=3600.0)
    with made.stack:
        made.clients[0].history()
        for server in made.servers:
            server.housekeep()
        until(lambda: admin(made.clients[0], "GET", "backups"), "it is made")
        for server in made.servers:
            server.housekeep()
        assert len(admin(made.clients[1], "GET", "backups")) == 1
        assert [each["kind"] for each in admin(made.clients[1], "GET", "tasks")] == ["backup"]


# ---------------------------------------------------------------- by the address


def test_administration_goes_by_the_address_too(nodes: Nodes, address: str) -> None:
    history = nodes.clients[1].history()
    found = document(done("admin", "--dir", address, "nodes", "--json"))
    assert len(found) == 2
    assert "on duty" in done("admin", "--dir", address, "nodes")
    done("admin", "--dir", address, "revoke", "device", DEVICE.hex())
    assert code(nodes.clients[1], pull(history)) == "forbidden"
    failed(entidb("admin", "--dir", address, "show", "nosuch"), 3, "unknown_database")
    (line,) = admin(nodes.clients[0], "GET", "audit")[-1:]
    assert line["who"].endswith("by PostgreSQL")


def test_an_address_that_no_node_serves_is_said_to_be_so(address: str) -> None:
    SyncServer(config(address)).close()
    failed(entidb("admin", "--dir", address, "nodes"), 5, "transport_error")


# ---------------------------------------------------------------- processes


@contextlib.contextmanager
def processes(address: str, place: Path, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source}
    made: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            command = [sys.executable, "-m", "entidb", "serve", address, "--insecure-no-auth"]
            ready = ["--port", "0", "--ready-file", str(place / f"ready{number}")]
            with (place / f"log{number}").open("w") as log:
                made.append(
                    subprocess.Popen([*command, *ready], env=environment, stdout=log, stderr=log)
                )
        yield made
    finally:
        for process in made:
            process.kill()
            process.wait()


def test_when_the_node_on_duty_is_killed_another_one_is_on_duty_and_it_is_gone(
    address: str, tmp_path: Path
) -> None:
    with processes(address, tmp_path, 2) as made:

        def ready(number: int) -> str:
            path = tmp_path / f"ready{number}"
            return path.read_text().strip() if path.exists() else ""

        urls = [until(partial(ready, n), "it serves") for n in range(2)]
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(url)) for url in urls]
            rows = until(
                lambda: [row for row in databases_of(clients[0]) or [] if row.get("on_duty")],
                "one is on duty",
            )
            pids = [process.pid for process in made]
            victim = pids.index(rows[0]["process"])
            os.kill(pids[victim], signal.SIGKILL)
            left = clients[1 - victim]

            def taken() -> bool:
                found = databases_of(left) or []
                there = [(row["process"], row.get("on_duty")) for row in found]
                return there == [(pids[1 - victim], True)]

            until(taken, "the other one is on duty, and the dead one gone")
            left.history()
            task = admin(left, "POST", "databases/shop/purge")["id"]
            until(lambda: admin(left, "GET", f"tasks/{task}").get("state") == "done", "it is done")
