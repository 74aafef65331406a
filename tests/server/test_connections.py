"""How many connections there may be, and which one goes when there are too many."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from entidb import Database, RetryConfig, SyncConfig, SyncEngine
from entidb.protocol import encode
from entidb.server import ServerConfig, SyncServer, serving
from entidb.server.connections import Connections, files_needed, fit_connections, fit_databases
from tests.server.support import Client, handshake
from tests.server.test_app import eventually

pytestmark = pytest.mark.process

LIMIT = 8


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[str]:
    server = SyncServer.in_memory(**{"connections_max": LIMIT, **settings})
    with server, serving(server) as url:
        yield url


def silent(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30)


def test_the_connection_that_has_been_idle_for_longest_is_closed_for_a_new_one() -> None:
    with running() as url, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(url)) for _ in range(LIMIT)]
        for client in clients:
            client.history()
        clients[0].history()  # the second is the oldest now
        stack.enter_context(Client(url)).history()
        left = clients[1].connection.sock
        assert left is not None
        left.settimeout(30)
        assert left.recv(1) == b""
        for client in (clients[0], *clients[2:]):
            client.history()


def test_ten_times_as_many_devices_as_connections_all_get_in_and_stay_in_step() -> None:
    retry = RetryConfig(attempts_max=20, delay_initial_s=0.05, delay_max_s=0.5)
    config = SyncConfig(db_id="shop", interval_s=0.2, retry=retry)
    with running(push_queue_max=1000) as url:
        engines = [SyncEngine(config, url, Database.in_memory()) for _ in range(10 * LIMIT)]
        for number, engine in enumerate(engines):
            engine.database.collection("notes").add({"n": number})
            engine.start()
        try:
            # 160 threads of devices beside those of the server: a busy machine takes its time.
            notes = [engine.database.collection("notes") for engine in engines]
            eventually(lambda: all(len(each) == 80 for each in notes), 300)
            # Others may have pulled what is on the server before its own device has the verdict.
            eventually(lambda: all(engine.status().pending == 0 for engine in engines), 300)
        finally:
            threads = [threading.Thread(target=engine.close) for engine in engines]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def test_when_all_are_busy_a_request_is_told_to_come_again_and_its_connection_is_closed() -> None:
    body = encode(handshake())
    begun = (
        b"POST /v1/handshake HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/cbor\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with running() as url, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(silent(url)) for _ in range(LIMIT)]
        for line in busy:
            line.sendall(begun)
        with Client(url) as late:
            eventually(lambda: _turned_away(late))
            answer = late.send(handshake())
            assert (answer.status, answer.code) == (503, "busy")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["connection"] == "close"
        with Client(url) as watcher:
            assert watcher.request("GET", "/healthz").status == 200
        for line in busy:
            line.sendall(body)
            assert line.recv(12) == b"HTTP/1.1 200"
        with Client(url) as again:
            assert again.send(handshake()).status == 200


def _turned_away(client: Client) -> bool:
    """The heads of those who are busy may still be on their way."""
    return client.send(handshake()).status == 503


def test_those_who_connect_and_say_nothing_make_room_for_those_who_ask() -> None:
    with running() as url, contextlib.ExitStack() as stack:
        for _ in range(LIMIT + 2):
            stack.enter_context(silent(url))
        with Client(url) as client:
            eventually(lambda: client.send(handshake()).status == 200)


#: More than the server takes of one thing that is no body, and than a line holds on its way.
ENDLESS = b"a" * (64 * 1024 * 1024)
CHUNKED = (
    b"POST /v1/handshake HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/cbor\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(CHUNKED + b"1\r\na\r\n0\r\nX: ", id="a trailer"),
        pytest.param(CHUNKED + b"1;", id="an extension of a piece"),
        pytest.param(
            b"GET /v1/live?db_id=shop HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
            b"\r\nGET /healthz HTTP/1.1\r\nX: ",
            id="the next head while an answer is under way",
        ),
    ],
)
def test_what_is_neither_head_nor_body_has_an_end(begun: bytes) -> None:
    with running() as url, silent(url) as line:
        with Client(url) as client:
            client.history()
        line.sendall(begun)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            line.sendall(ENDLESS)
        with Client(url) as client:
            assert client.send(handshake()).status == 200


def test_requests_that_wait_for_an_answer_have_an_end(caplog: pytest.LogCaptureFixture) -> None:
    stream = (
        b"GET /v1/live?db_id=shop HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    )
    asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running() as url, silent(url) as line:
        with Client(url) as client:
            client.history()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            line.sendall(stream + asked * 1000)
            while line.recv(65536):
                pass  # the stream has no end of its own
        with Client(url) as client:
            assert client.send(handshake()).status == 200
    # The stream has learned that its connection is gone, and says no goodbye to it.
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


def test_a_few_requests_that_wait_are_answered_in_order() -> None:
    body = encode(handshake())
    asked = [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 50
    last = CHUNKED.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    asked[-1] = last + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with running() as url, silent(url) as line:
        line.sendall(b"".join(asked)[:-1])
        line.sendall(b"\n")
        with line.makefile("rb") as file:
            said = file.read()
    assert said.count(b"HTTP/1.1 200") == 50
    assert b"application/cbor" in said.rpartition(b"HTTP/1.1 200")[2].lower()


def test_small_pieces_of_a_body_are_no_trailer() -> None:
    body = encode(handshake())
    pieces = b"".join(b"1;x=%s\r\n%c\r\n" % (b"y" * 1000, byte) for byte in body)
    with running() as url, silent(url) as line:
        line.sendall(CHUNKED + pieces + b"0\r\n\r\n")
        assert line.recv(12) == b"HTTP/1.1 200"


def test_what_follows_a_body_is_no_header() -> None:
    body = encode(handshake())
    trailers = b"Content-Encoding: gzip\r\nHost: example.org\r\n"
    with running() as url, silent(url) as line:
        line.sendall(CHUNKED + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers))
        assert line.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("other", ["websocket", "h2c"])
def test_who_asks_for_another_protocol_is_answered_in_this_one(
    other: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"connection": "Upgrade", "upgrade": other, "sec_websocket_version": "13"}
    with caplog.at_level(logging.INFO, "uvicorn"), running() as url, Client(url) as client:
        for _ in range(2):
            assert client.request("GET", "/healthz", None, **asked).status == 200
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


class _Line:
    """A connection as ``Connections`` sees it."""

    def __init__(self) -> None:
        self.making_room = False
        self.is_closed = False
        self.transport = self

    def close(self) -> None:
        self.is_closed = True


def test_requests_that_do_not_wait_for_the_answer_before_them_are_answered_in_their_order() -> None:
    asked = [b"/healthz", b"/nowhere-1", b"/nowhere-2", b"/healthz", b"/nowhere-3"]
    with running() as url, silent(url) as connection:
        host = urlsplit(url).netloc.encode()
        connection.sendall(
            b"".join(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (path, host) for path in asked)
        )
        said = b""
        while said.count(b"HTTP/1.1 ") < len(asked):
            piece = connection.recv(65536)
            assert piece, said
            said += piece
    statuses = [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"404", b"200", b"404"]


def test_one_that_is_closing_makes_room_once_and_counts_no_more() -> None:
    connections: Any = Connections(2, lambda: 0.0)
    lines = [_Line() for _ in range(5)]
    for line in lines[:2]:
        assert connections.enter(line) and connections.asks(line)
        connections.rests(line)
    for line in lines[2:4]:
        assert connections.enter(line) and connections.asks(line)
    assert [line.is_closed for line in lines] == [True, True, False, False, False]
    assert connections.enter(lines[4]) and not connections.asks(lines[4])
    for line in lines[:2]:
        connections.closed(line)
    connections.closed(lines[4])
    assert connections.count == 2
    assert connections.enter(lines[4]) and not connections.asks(lines[4])
    connections.rests(lines[2])
    assert lines[2].is_closed


# ---------------------------------------------------------------- open files


def test_the_limits_fit_into_the_files_that_a_process_may_open(tmp_path: Any) -> None:
    config = ServerConfig(data_dir=tmp_path, insecure_no_auth=True)
    needed = files_needed(config)
    assert fit_connections(config, None) == fit_connections(config, needed) == 2000
    few = fit_connections(config, 1024)
    assert 300 < few < 1024 - 9 * 64
    assert fit_databases(config, None) == fit_databases(config, needed) == 64
    assert fit_databases(config, 512) == 28
    assert fit_databases(config, 16) == 1
    many = ServerConfig(data_dir=tmp_path, insecure_no_auth=True, databases_open_max=10_000)
    assert fit_databases(many, files_needed(many)) == 10_000
    assert 0 < fit_connections(config, 128) < 64
    assert fit_connections(config, 16) == 1
    memory = ServerConfig(data_dir=None, insecure_no_auth=True, databases_open_max=100_000)
    assert fit_connections(memory, 4096) == 2000
    assert fit_databases(memory, 64) == 100_000


def test_fewer_connections_than_asked_for_are_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("entidb.server.run.raise_file_limit", lambda needed: 256)
    with running(connections_max=5000) as url, Client(url) as client:
        assert client.send(handshake()).status == 200
    [said] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "this process may have 256 open files" in said
    assert "ulimit -n" in said
