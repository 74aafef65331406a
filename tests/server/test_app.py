"""The ASGI app on real sockets: good clients, slow ones, greedy ones, and those that go away."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from entidb.db import Database
from entidb.errors import PermissionDeniedError, ServerBusyError
from entidb.packing import ENCODINGS, compress
from entidb.protocol import (
    CONTENT_TYPE,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushResponse,
    Verdict,
)
from entidb.protocol import encode as encoded
from entidb.server import ServerConfig, SyncServer, create_app, mint_token, serving
from entidb.server.app import SyncApp
from entidb.server.exchange import path_in_app
from entidb.server.hooks import Grant
from entidb.server.room import SMALL_BYTES, Budget
from entidb.server.service import DatabaseService
from entidb.sync import HttpTransport, SyncConfig, SyncEngine
from tests.server.support import DEVICE, SECRET, Client, handshake, pull, push

pytestmark = pytest.mark.process

WAIT_S = 60.0


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[tuple[SyncServer, str]]:
    with SyncServer.in_memory(**settings) as server, serving(server) as url:
        yield server, url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as (_, url):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def eventually(true: Any, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


# ---------------------------------------------------------------- messages


def test_a_device_can_shake_hands_push_and_pull(client: Client):
    history = client.history("first")
    pushed = client.send(push(history, 1, 2, db_id="first")).message(PushResponse)
    assert [result.version for result in pushed.results] == [1, 2]
    pulled = client.send(pull(history, db_id="first")).message(PullResponse)
    assert len(pulled.commits) == 2
    idle = client.send(pull(history, db_id="first", cursor=2)).message(PullResponse)
    assert (idle.commits, idle.cursor) == ([], 2)


def test_pushes_of_many_devices_are_all_answered_and_all_there(url: str):
    with Client(url) as client:
        history = client.history("busy")

    def device(number: int) -> list[int]:
        with Client(url) as own:
            answers = [
                own.send(push(history, number * 100 + n, db_id="busy")).message(PushResponse)
                for n in range(1, 21)
            ]
        assert all(answer.results[0].verdict == Verdict.ACCEPTED for answer in answers)
        return [answer.results[0].version for answer in answers]

    with ThreadPoolExecutor(8) as pool:
        versions = [version for found in pool.map(device, range(8)) for version in found]
    assert sorted(versions) == list(range(1, 161))


def test_an_error_of_the_service_keeps_its_code(client: Client):
    client.history("errors")
    answer = client.send(pull(b"x" * 16, db_id="errors"))
    assert (answer.status, answer.code) == (409, "history_changed")
    answer = client.send(push(b"x" * 16, 1, db_id="errors"))
    assert (answer.status, answer.code) == (409, "history_changed")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packed_bodies_go_both_ways(client: Client, encoding: str):
    history = client.history(encoding)
    body = encoded(push(history, 1, db_id=encoding, value="long " * 100_000))
    packed = compress(encoding, body)
    answer = client.post("/v1/push", packed, content_encoding=encoding)
    assert answer.message(PushResponse).results[0].verdict == Verdict.ACCEPTED
    answer = client.send(pull(history, db_id=encoding), accept_encoding=encoding)
    assert answer.headers["content-encoding"] == encoding
    assert len(answer.body) < len(body) / 10


def test_every_answer_names_its_request(client: Client):
    answer = client.send(handshake(), x_request_id="mine-1")
    assert answer.headers["x-request-id"] == "mine-1"
    assert client.request("GET", "/healthz").headers["x-request-id"]


# ---------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    secret = tmp_path_factory.mktemp("keys") / "secret"
    secret.write_bytes(SECRET)
    with running(jwt_secret_file=secret) as (_, url):
        yield url


def test_without_a_token_the_answer_is_401_and_the_connection_can_be_used_again(guarded: str):
    with Client(guarded) as client:
        answer = client.send(push(b"h" * 16, 1, value="x" * 300_000))
        assert (answer.status, answer.code) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        client.connection.auto_open = 0
        token = mint_token(SECRET, subject="ada", databases=["shop"])
        answer = client.send(handshake(), authorization=f"Bearer {token}")
        assert answer.message(HandshakeResponse).head == 0


def test_a_token_for_another_database_is_403(guarded: str):
    token = mint_token(SECRET, subject="ada", databases=["shop"])
    with Client(guarded, token) as client:
        answer = client.send(handshake("payroll"))
    assert (answer.status, answer.code) == (403, "forbidden")


def test_the_plain_addresses_need_no_token(guarded: str):
    with Client(guarded) as client:
        assert client.request("GET", "/healthz").status == 200
        assert client.request("GET", "/v1/info").status == 200


# ---------------------------------------------------------------- plain addresses


def test_healthz_and_info_say_what_they_should(client: Client):
    assert json.loads(client.request("GET", "/healthz").body) == {"status": "ok"}
    info = json.loads(client.request("GET", "/v1/info").body)
    assert info["protocol"] == {"major": 1, "minor": 0}
    assert info["limits"]["transaction_bytes_max"] == 16 * 2**20
    assert info["encodings"] == list(ENCODINGS)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/pull", 405, "POST"),
        ("POST", "/healthz", 405, "GET, HEAD"),
        ("DELETE", "/v1/info", 405, "GET, HEAD"),
        ("GET", "/metrics", 404, None),
        ("GET", "/", 404, None),
        ("POST", "/v1/pull/../push", 404, None),
        ("POST", "//v1/pull", 404, None),
    ],
)
def test_other_addresses_and_methods_are_refused(
    client: Client, method: str, path: str, status: int, allow: str | None
):
    answer = client.request(method, path)
    assert (answer.status, answer.headers.get("allow")) == (status, allow)


def test_head_has_no_body(client: Client):
    answer = client.request("HEAD", "/healthz")
    assert (answer.status, answer.body) == (200, b"")


def test_metrics_are_there_when_they_are_asked_for():
    with running(metrics=True) as (_, url), Client(url) as client:
        history = client.history()
        client.send(push(history, 1))
        client.send(pull(b"x" * 16))
        client.request("GET", "/made/up/by/a/stranger")
        text = client.request("GET", "/metrics").body.decode()
    assert 'entidb_requests_total{path="/v1/push",status="200"} 1.0' in text
    assert 'entidb_requests_total{path="/v1/pull",status="409"} 1.0' in text
    assert 'entidb_transactions_total{verdict="accepted"} 1.0' in text
    assert "entidb_open_databases 1.0" in text
    assert "stranger" not in text


# ---------------------------------------------------------------- sizes


def raw(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S)


def head(path: str = "/v1/push", **headers: object) -> bytes:
    named = {"host": "localhost", "content-type": CONTENT_TYPE, **headers}
    lines = [f"POST {path} HTTP/1.1"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in named.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def everything(connection: socket.socket) -> bytes:
    """Until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_content_length_over_the_limit_is_refused_without_reading(url: str):
    with raw(url) as connection:
        connection.sendall(head(content_length=2**40, expect="100-continue"))
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


def test_who_sends_too_much_anyway_still_reads_why(client: Client):
    answer = client.post("/v1/push", b"\0" * (21 * 2**20))
    assert (answer.status, answer.code) == (413, "too_large")


def test_a_body_without_a_length_is_counted_while_it_comes(url: str):
    with raw(url) as connection:
        connection.sendall(head(transfer_encoding="chunked"))
        piece = b"100000\r\n" + b"\0" * 0x100000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                connection.sendall(piece)
        assert b" 413 " in everything(connection)[:20]


@pytest.mark.parametrize("length", ["-1", "abc", "1, 2", "0x10", ""])
def test_a_length_that_is_none_is_refused(url: str, length: str):
    with raw(url) as connection:
        connection.sendall(head(content_length=length))
        assert everything(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_bomb_is_refused_at_the_limit(client: Client, encoding: str):
    bomb = compress(encoding, b"\0" * (64 << 20))
    answer = client.post("/v1/push", bomb, content_encoding=encoding)
    assert (answer.status, answer.code) == (413, "too_large")


def test_a_packed_body_that_is_cut_off_is_refused(client: Client):
    body = gzip.compress(encoded(handshake()))[:-9]
    answer = client.post("/v1/handshake", body, content_encoding="gzip")
    assert (answer.status, answer.code) == (400, "codec_error")


@pytest.mark.parametrize(("pieces", "said"), [(32, True), (1024, False)])
def test_an_endless_head_is_cut_off(url: str, pieces: int, said: bool):
    with raw(url) as connection:
        connection.sendall(b"POST /v1/push HTTP/1.1\r\nx: ")
        cut = False
        try:
            for _ in range(pieces):
                connection.sendall(b"a" * 65536)
        except ConnectionError:
            cut = True
        assert cut is not said
        if said:
            assert everything(connection).startswith(b"HTTP/1.1 431 ")


# ---------------------------------------------------------------- slow, stuck and gone


def test_a_body_that_does_not_arrive_in_time_is_a_timeout():
    with running(body_timeout_s=0.2) as (_, url), raw(url) as connection:
        connection.sendall(head(content_length=100) + b"x")
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", b""), (b"POST /v1/push HTTP/1.1\r\nhost: localhost\r\n", b"408"), (b"\r\n\r\n", b"408")],
)
def test_a_connection_that_never_asks_is_closed(sent: bytes, status: bytes):
    # What is said has to be there before that, on a busy machine too.
    with running(head_timeout_s=2.0 if sent else 0.2) as (_, url), raw(url) as connection:
        connection.sendall(sent)
        assert everything(connection)[9:12] == status


def test_clients_that_stop_reading_are_dropped_and_what_they_held_is_free_again():
    # Twenty such answers do not fit into the room there is, nor one of them into what the system
    # takes over for a connection (4 MiB where Linux is as it comes).
    room, size = 63 << 20, 8 << 20
    with running(write_timeout_s=2.0, in_flight_bytes_max=room) as (_, url):
        with Client(url) as client:
            history = client.history()
            client.send(push(history, 1, value="x" * size))
        request = encoded(pull(history))
        stuck = [raw(url) for _ in range(20)]
        try:
            for connection in stuck:
                connection.sendall(head("/v1/pull", content_length=len(request)) + request)
            with Client(url) as client:
                assert len(client.send(pull(history)).body) > size
            eventually(lambda: all(_cut(connection) for connection in stuck))
        finally:
            for connection in stuck:
                connection.close()


def _cut(connection: socket.socket) -> bool:
    """Whether the server gave up on it: what is left to read ends before the answer does."""
    connection.setblocking(False)
    try:
        return connection.send(b"x") == 0
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_client_that_goes_away_while_sending_disturbs_nobody(url: str, client: Client):
    for _ in range(5):
        with raw(url) as connection:
            connection.sendall(head(content_length=1000) + b"x" * 10)
    assert client.request("GET", "/healthz").status == 200


def test_a_client_that_goes_away_before_its_answer_has_pushed_all_the_same(
    client: Client, url: str
):
    history = client.history("gone")
    body = encoded(push(history, 1, db_id="gone"))
    with raw(url) as connection:
        connection.sendall(head(content_length=len(body)) + body)
    eventually(lambda: client.send(pull(history, db_id="gone")).message(PullResponse).head == 1)


def test_the_app_drops_a_client_that_does_not_read_under_any_server():
    async def story() -> None:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.sleep(3600)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        with SyncServer.in_memory(write_timeout_s=0.1) as server:
            app = create_app(server)
            await app(_scope("GET", "/v1/info"), receive, send)
            assert len(sent) == 2
            assert app.in_flight_bytes == 0
            await app.aclose()

    asyncio.run(story())


def _scope(method: str, path: str, **fields: Any) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [],
        "client": None,
    }
    return {**scope, **fields}


# ---------------------------------------------------------------- memory


def test_a_budget_gives_room_in_the_order_it_was_asked_for():
    async def story() -> list[int]:
        budget = Budget(100)
        assert budget.take(100)
        order: list[int] = []

        async def want(size: int) -> None:
            await budget.wait(size)
            order.append(size)
            budget.give(size)

        waiting = [asyncio.ensure_future(want(size)) for size in (90, 5, 50)]
        await asyncio.sleep(0)
        assert not budget.take(1)
        budget.give(100)
        await asyncio.gather(*waiting)
        assert budget.used == 0
        return order

    assert asyncio.run(story()) == [90, 5, 50]


def test_who_stops_waiting_for_room_takes_none():
    async def story() -> None:
        budget = Budget(10)
        budget.take(10)
        waiting = asyncio.ensure_future(budget.wait(5))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        budget.give(10)
        assert budget.used == 0
        assert budget.take(10)

    asyncio.run(story())


def test_room_that_came_as_the_waiter_left_is_given_back():
    async def story() -> None:
        budget = Budget(10)
        budget.take(10)
        waiting = asyncio.ensure_future(budget.wait(5))
        await asyncio.sleep(0)
        budget.give(10)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert budget.used == 0

    asyncio.run(story())


def test_a_page_that_turns_out_larger_is_counted_as_it_is():
    async def story() -> None:
        budget = Budget(100)
        with budget.hold() as held:
            held.take(20)
            await held.reserve(40)
            assert budget.used == 40
            held.resize(150)
            assert budget.used == 150
            with budget.hold() as other, pytest.raises(ServerBusyError):
                other.take(SMALL_BYTES + 1)
        assert budget.used == 0

    asyncio.run(story())


def test_a_server_that_is_full_says_busy_and_when_to_come_again():
    with SyncServer.in_memory() as server:
        app = create_app(server)
        with _served(app) as url, Client(url) as client:
            history = client.history()
            app._budget.used = app._budget.limit
            large = push(history, 1, value="x" * SMALL_BYTES)
            answer = client.send(large)
            assert (answer.status, answer.code) == (503, "busy")
            assert answer.headers["retry-after"] == "1"
            app._budget.used = 0
            assert client.send(large).status == 200
            assert app.in_flight_bytes == 0


def test_who_waits_too_long_behind_other_pages_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("entidb.server.threads.LINE_WAIT_S", 0.1)
    monkeypatch.setattr("entidb.server.threads.PAGES_AHEAD", 1)
    reading, go_on = threading.Event(), threading.Event()
    real = DatabaseService.pull_bytes

    def slow(self: DatabaseService, request: PullRequest, grant: Grant, view: Any = None) -> bytes:
        reading.set()
        assert go_on.wait(WAIT_S)
        return real(self, request, grant, view)

    with running() as (_, url), Client(url) as one, Client(url) as other:
        history = one.history()
        one.send(push(history, 1))
        monkeypatch.setattr(DatabaseService, "pull_bytes", slow)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(one.send, pull(history, full=True))
            assert reading.wait(WAIT_S)
            answer = other.send(pull(history, full=True))
            go_on.set()
            assert (answer.status, answer.code) == (503, "busy")
            assert "retry-after" in answer.headers
            assert first.result().status == 200
        assert other.send(pull(history, full=True)).status == 200


def test_a_full_queue_is_busy():
    with running(push_queue_max=1) as (server, url), Client(url) as client:
        history = client.history()
        store = server.stores.try_use("shop")
        assert store is not None
        entered, leave = threading.Event(), threading.Event()
        real = store.service.push_many

        def slow(members: Any) -> Any:
            entered.set()
            leave.wait(WAIT_S)
            return real(members)

        store.service.push_many = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:

            def one(number: int) -> int:
                with Client(url) as own:
                    return own.send(push(history, number)).status

            first = pool.submit(one, 1)
            assert entered.wait(WAIT_S)
            second = pool.submit(one, 2)
            eventually(lambda: len(store.committer._queue) == 1)
            answer = client.send(push(history, 3))
            leave.set()
            assert (first.result(), second.result()) == (200, 200)
        assert (answer.status, answer.code) == (503, "busy")


# ---------------------------------------------------------------- mounting and life


@contextlib.contextmanager
def _served(app: Any) -> Iterator[str]:
    """Any ASGI app on plain uvicorn, as somebody else would run it."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def mounted(app: SyncApp) -> Starlette:
    async def home(request: object) -> PlainTextResponse:
        return PlainTextResponse("the shop")

    return Starlette(routes=[Route("/", home), Mount("/api/sync", app=app)], lifespan=app.lifespan)


def test_it_can_be_mounted_under_a_path_of_another_app(tmp_path: Path):
    app = create_app(ServerConfig(data_dir=tmp_path, insecure_no_auth=True))
    with _served(mounted(app)) as url:
        with Client(url) as other:
            assert other.request("GET", "/").body == b"the shop"
            assert other.request("GET", "/v1/info").status == 404
        with Client(url + "/api/sync") as client:
            history = client.history()
            assert client.send(push(history, 1)).status == 200
            assert client.request("GET", "/healthz").status == 200
    # The other app's lifespan has closed it.
    with SyncServer(ServerConfig(data_dir=tmp_path, insecure_no_auth=True)) as server:
        assert server.database("shop").sequence == 1


@pytest.mark.parametrize(
    ("root", "path", "found"),
    [
        ("", "/v1/pull", "/v1/pull"),
        ("/sync", "/sync/v1/pull", "/v1/pull"),
        ("/sync/", "/sync/v1/pull", "/v1/pull"),
        ("/sync", "/v1/pull", "/v1/pull"),
        ("/sync", "/synchro/v1/pull", "/synchro/v1/pull"),
        ("/sync", "/sync", "/"),
    ],
)
def test_the_path_is_the_one_below_the_mount(root: str, path: str, found: str):
    assert path_in_app({"path": path, "root_path": root}) == found


def test_a_server_of_ones_own_stays_open_when_the_app_stops():
    with SyncServer.in_memory() as server:
        with serving(server) as url, Client(url) as client:
            history = client.history()
            client.send(push(history, 1))
        assert server.database("shop").sequence == 1
        answer = server.handle("/v1/pull", None, pull(history))
        assert isinstance(answer, PullResponse)


def test_no_thread_is_left_when_the_app_has_stopped():
    before = set(threading.enumerate())
    with running() as (_, url), Client(url) as client:
        history = client.history()
        client.send(push(history, 1))
        client.send(pull(history))

    def left() -> list[str]:
        begun = set(threading.enumerate()) - before
        return [thread.name for thread in begun if thread.name.startswith("entidb")]

    eventually(lambda: left() == [])


def test_a_stopped_app_refuses_and_says_that_it_stops():
    async def story() -> tuple[int, int]:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        with SyncServer.in_memory() as server:
            app = create_app(server)
            await app.aclose()
            await app(_scope("GET", "/healthz"), receive, send)
            await app(_scope("POST", "/v1/push"), receive, send)
        return statuses[0], statuses[1]

    assert asyncio.run(story()) == (503, 503)


def test_a_websocket_is_turned_away():
    async def story() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        with SyncServer.in_memory() as server:
            await create_app(server)({"type": "websocket"}, receive, send)
        return sent

    assert asyncio.run(story()) == [{"type": "websocket.close", "code": 1000}]


# ---------------------------------------------------------------- access log


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "entidb.access"]


def test_the_access_log_is_one_line_of_json_for_each_request(
    guarded: str, caplog: pytest.LogCaptureFixture
):
    token = mint_token(SECRET, subject="ada\n<admin>", databases=["shop"])
    with caplog.at_level(logging.INFO, "entidb.access"), Client(guarded, token) as client:
        history = client.history()
        client.send(push(history, 1), x_request_id="the-push")
        client.send(pull(b"x" * 16), x_request_id="the-refusal")
        eventually(lambda: len(access_lines(caplog)) >= 3)
    lines = access_lines(caplog)
    assert all("\n" not in line for line in lines)
    by_id = {entry["request_id"]: entry for entry in map(json.loads, lines)}
    pushed = by_id["the-push"]
    assert (pushed["status"], pushed["path"], pushed["db_id"]) == (200, "/v1/push", "shop")
    assert (pushed["subject"], pushed["method"]) == ("ada\n<admin>", "POST")
    assert pushed["bytes_in"] > 0
    assert by_id["the-refusal"]["code"] == "history_changed"
    assert token not in "".join(lines)
    assert DEVICE.hex() not in "".join(lines)


def test_what_a_device_says_of_an_error_finds_the_line_in_the_access_log(
    guarded: str, caplog: pytest.LogCaptureFixture
):
    reader = mint_token(SECRET, subject="ada", databases={"shop": "r"})
    with (
        caplog.at_level(logging.INFO, "entidb.access"),
        HttpTransport(guarded, token=reader) as transport,
        Database.in_memory() as db,
        SyncEngine(SyncConfig(db_id="elsewhere"), transport, db) as engine,
    ):
        with pytest.raises(PermissionDeniedError) as caught:
            engine.sync()
        said = engine.status().last_error
        eventually(lambda: access_lines(caplog))
    (line,) = map(json.loads, access_lines(caplog))
    assert line["code"] == "forbidden"
    assert caught.value.request_id == line["request_id"]
    assert said is not None
    assert said.endswith(f"(request {line['request_id']})")


def test_the_access_log_can_be_switched_off(caplog: pytest.LogCaptureFixture):
    with running(access_log=False) as (_, url), caplog.at_level(logging.INFO), Client(url) as own:
        own.request("GET", "/healthz")
    assert [record for record in caplog.records if record.name == "entidb.access"] == []
