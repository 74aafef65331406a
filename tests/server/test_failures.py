"""A server whose disk, housekeeping or code fails: who asks is told, and the next is served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from entidb.db import Database, Role
from entidb.errors import ConfigError, StorageError, StorageFullError
from entidb.protocol import PullResponse, PushResponse, Verdict
from entidb.server import Grants, Rights, ServerConfig, SyncServer, create_app, serving
from tests.server.support import Client, ManualClock, handshake, pull, push
from tests.storage.lmdb.test_doubtful_files import misdirect

pytestmark = pytest.mark.process

WAIT_S = 60.0


@contextlib.contextmanager
def on_disk(path: Path, **settings: Any) -> Iterator[tuple[SyncServer, Client]]:
    config = ServerConfig(data_dir=path, insecure_no_auth=True, access_log=False, **settings)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        yield server, client


def failing_once(server: SyncServer, name: str, error: Exception) -> None:
    """Let the next call of a method of the store of ``shop`` fail."""
    storage: Any = server.database("shop").storage
    sound = getattr(storage, name)
    left = [error]

    def method(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        return sound(*arguments)

    setattr(storage, name, method)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StorageError("/dev/sda is on fire"), 500, "storage_error"),
        (StorageFullError("/dev/sda is full"), 507, "storage_full"),
        (ZeroDivisionError("our own mistake"), 500, "server_error"),
    ],
)
def test_a_push_that_cannot_be_stored_is_told_so_and_the_next_one_is_taken(
    tmp_path: Path, error: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
):
    with on_disk(tmp_path) as (server, client):
        history = client.history()
        before = server.database("shop")
        failing_once(server, "commit", error)
        answer = client.send(push(history, 1))
        assert (answer.status, answer.code) == (status, code)
        assert "sda" not in answer.error.message and "mistake" not in answer.error.message
        full = isinstance(error, StorageFullError)
        while (answer := client.send(push(history, 1))).status == 507 and full:
            time.sleep(0.05)  # for a moment none is tried
        taken = answer.message(PushResponse)
        assert [result.verdict for result in taken.results] == [Verdict.ACCEPTED]
        assert server.database("shop").sequence == 1
        # What it knows may be wrong after an error of the store (R17); not after one that says
        # that nothing was changed.
        if full or isinstance(error, StorageError):
            assert (server.database("shop") is before) == full


@pytest.mark.parametrize("setting", ["authenticator", "validate", "upcast"])
def test_a_function_of_the_program_that_ends_the_process_ends_nothing_here(
    tmp_path: Path, setting: str, caplog: pytest.LogCaptureFixture
):
    left = [SystemExit(2)]  # as argparse and sys.exit() do

    def function(*arguments: Any) -> Any:
        if left:
            raise left.pop()
        if setting == "authenticator":
            return Grants("ada", {"*": Rights(read=True, write=True)})
        return arguments[1] if setting == "upcast" else None

    named: dict[str, Any] = {setting: function}
    if setting != "authenticator":
        named["insecure_no_auth"] = True
    if setting == "upcast":
        named["schema"] = 2
    config = ServerConfig(data_dir=tmp_path, access_log=False, **named)
    with SyncServer(config) as server, serving(server) as url, Client(url) as client:
        if setting == "authenticator":
            answer = client.send(handshake())
            assert (answer.status, answer.code) == (500, "server_error")
        history = client.history()
        request = replace(push(history, 1), schema=1)
        [first] = client.send(request).message(PushResponse).results
        assert (first.verdict == Verdict.REJECTED) == (setting == "validate")
        [second] = client.send(replace(push(history, 2), schema=1)).message(PushResponse).results
        assert second.verdict == Verdict.ACCEPTED
    assert not left
    assert "SystemExit" in caplog.text


def test_a_page_that_cannot_be_read_is_told_so_and_the_next_one_is_sent(tmp_path: Path):
    with on_disk(tmp_path) as (server, client):
        history = client.history()
        client.send(push(history, 1, 2)).message(PushResponse)
        before = server.database("shop")
        failing_once(server, "snapshot", StorageError("/dev/sda is on fire"))
        answer = client.send(pull(history))
        assert (answer.status, answer.code) == (500, "storage_error")
        assert "sda" not in answer.error.message
        page = client.send(pull(history)).message(PullResponse)
        assert len(page.commits) == 2
        assert server.database("shop") is not before


def test_one_damaged_page_ends_neither_the_server_nor_its_other_databases(tmp_path: Path):
    for name in ("bad", "good"):
        with Database.open(tmp_path / f"{name}.entidb", role=Role.SERVER) as database:
            for number in range(200):
                database.collection("notes").add({"n": number, "text": "x" * 200})
    sound = (tmp_path / "bad.entidb" / "data.mdb").read_bytes()
    misdirect(tmp_path / "bad.entidb")
    with on_disk(tmp_path) as (_, client):
        for _ in range(3):
            answer = client.send(handshake("bad"))
            assert (answer.status, answer.code) == (500, "storage_error")
            assert client.history("good")
        # As somebody does who restores it while the server runs.
        (tmp_path / "bad.entidb" / "data.mdb").write_bytes(sound)
        assert client.history("bad")


def test_housekeeping_that_fails_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture):
    with SyncServer.in_memory(clock=ManualClock()) as server:
        turns = threading.Semaphore(0)
        sound = server.housekeep

        def housekeep() -> None:
            turns.release()
            raise ZeroDivisionError("our own mistake")

        server.housekeep = housekeep  # type: ignore[method-assign]
        with (
            caplog.at_level(logging.ERROR, "entidb.server"),
            serving(server) as url,
            Client(url) as client,
        ):
            client.history()
            for _ in range(3):
                assert turns.acquire(timeout=WAIT_S)
            server.housekeep = sound  # type: ignore[method-assign]
            assert client.history()
        assert "housekeeping failed" in caplog.text


def test_a_purge_that_fails_is_logged_and_the_database_is_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    clock = ManualClock()
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, idle_close_s=0.0)
    with SyncServer(config, clock=clock) as server:
        database = server.database("shop")
        made = database.collection("notes").add(1)
        server.housekeep()  # remembers which commit the clock stands at
        del database.collection("notes")[made]
        clock.advance(2 * 3600)
        server.housekeep()
        clock.advance(91 * 24 * 3600)
        failing_once(server, "commit", StorageError("the disk"))
        with caplog.at_level(logging.ERROR):
            server.housekeep()
        assert "looking after it failed" in caplog.text
        assert server.database("shop").collection("notes").get(made) is None
        assert server.database("shop").sequence == 2
        assert server.database("shop") is not database


def test_a_database_that_cannot_be_closed_is_logged_and_the_server_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True)
    with caplog.at_level(logging.ERROR), SyncServer(config) as server:
        database = server.database("shop")
        database.collection("notes").add(1)
        storage: Any = database.storage
        sound = storage.close

        def close() -> None:
            sound()
            raise StorageError("the disk")

        storage.close = close
    assert "closing it failed" in caplog.text
    with SyncServer(config) as server:
        assert server.database("shop").sequence == 1


def test_a_scope_of_another_kind_is_none_of_the_apps_business():
    async def story() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("nothing is read")

        with SyncServer.in_memory() as server:
            await create_app(server)({"type": "telegraph"}, receive, send)
        return sent

    assert asyncio.run(story()) == []


def test_a_port_that_is_taken_is_a_config_error_also_on_a_thread():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        SyncServer.in_memory() as server,
        pytest.raises(ConfigError, match="in use"),
        serving(server, port=taken.getsockname()[1]),
    ):
        raise AssertionError("it serves")


def test_who_asks_while_the_server_stops_is_answered_or_told_to_come_back(tmp_path: Path):
    answers: list[tuple[int, str | None]] = []
    stop = threading.Event()

    def ask(url: str, history: bytes, number: int) -> None:
        while not stop.is_set():
            number += 1
            try:
                with Client(url) as client:
                    answer = client.send(push(history, number))
            except OSError:
                continue
            answers.append((answer.status, None if answer.status == 200 else answer.code))

    with on_disk(tmp_path) as (server, client):
        history = client.history()
        url = f"http://127.0.0.1:{client.connection.port}"
        threads = [
            threading.Thread(target=ask, args=(url, history, first), daemon=True)
            for first in (10**4, 10**6)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + WAIT_S
        while sum(status == 200 for status, _ in answers[:]) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert {status for status, _ in answers} <= {200, 503}
    assert {code for status, code in answers if status == 503} <= {"shutting_down", "busy"}
    accepted = sum(status == 200 for status, _ in answers)
    with on_disk(tmp_path) as (server, client):
        # What was acknowledged is there; what was not may be.
        assert server.database("shop").sequence >= accepted >= 5
