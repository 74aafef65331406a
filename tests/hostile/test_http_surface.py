"""A real server process on a real socket, and clients without manners: it answers or hangs up,
its files do not change, its memory stays bounded, and the next client is served."""

from __future__ import annotations

import http.client
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from entidb import cbor
from entidb.protocol import (
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushResponse,
    PushTransaction,
    SyncRequest,
    Verdict,
    decode,
    encode,
    path_of,
)
from entidb.server import ServerConfig
from entidb.testing.fuzz import dense, garbled, packed
from tests.hostile.process import ServerProcess, read_all, running_server, statuses

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

DEVICE = b"d" * 16
MIB = 1 << 20
BODY_MAX = 20 * MIB
#: What all of it together may add to the process: two of the largest bodies, what they hold when
#: decoded, and the allocator's slack. The bombs here are 1.5 GB where nothing stops them.
GROWTH_MAX = 350 * MIB


@contextmanager
def filled_server(place: Path) -> Iterator[ServerProcess]:
    """A server that has twenty entities, and has been asked for them."""
    with running_server(place) as running:
        history = handshake(running).history
        transactions = [
            PushTransaction(
                bytes(15) + bytes([n]), 1, [PushOperation(0, bytes(15) + bytes([n]), 0, b"\xa0")]
            )
            for n in range(20)
        ]
        request = PushRequest(
            db_id="shop",
            device_id=DEVICE,
            history=history,
            cursor=0,
            collections=["notes"],
            transactions=transactions,
        )
        assert post(running, request)[0] == 200
        serves(running)
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with filled_server(tmp_path_factory.mktemp("hostile")) as running:
        before = running.memory("VmHWM")
        yield running
        assert running.process.poll() is None, "it is still running"
        assert running.memory("VmHWM") - before < GROWTH_MAX


def post(
    server: ServerProcess, request: SyncRequest | bytes, path: str = "", **headers: str
) -> tuple[int, bytes]:
    body = request if isinstance(request, bytes) else encode(request)
    where = path if isinstance(request, bytes) else path_of(request)
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    try:
        named = {"content-type": "application/cbor"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request("POST", where, body, named)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def handshake(server: ServerProcess) -> HandshakeResponse:
    request = HandshakeRequest(
        major=1, minor=0, db_id="shop", device_id=DEVICE, history=None, cursor=0
    )
    return decode(HandshakeResponse, post(server, request)[1])


def pull_request(server: ServerProcess, **fields: object) -> PullRequest:
    values: dict[str, object] = {
        "db_id": "shop",
        "device_id": DEVICE,
        "history": handshake(server).history,
        "cursor": 0,
        "limit": 1000,
        "bytes_max": MIB,
    }
    return PullRequest(**(values | fields))  # type: ignore[arg-type]


def serves(server: ServerProcess) -> None:
    status, body = post(server, pull_request(server))
    assert status == 200
    assert decode(PullResponse, body).head == 20


def head(*lines: str, method: str = "POST", target: str = "/v1/pull") -> bytes:
    named = ("Host: localhost", "Content-Type: application/cbor", *lines)
    return "\r\n".join((f"{method} {target} HTTP/1.1", *named, "", "")).encode("latin-1")


CLOSE = "Connection: close"
RAW = {
    "nothing HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9.9": b"POST /v1/pull HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no host": b"POST /v1/pull HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    "bare line feeds": b"POST /v1/pull HTTP/1.1\nHost: localhost\nContent-Length: 0\n\n",
    "spaces before the colon": head("Content-Length : 5", CLOSE) + b"12345",
    "folded header": b"POST /v1/pull HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    "null in a header": head("X: a\x00b", CLOSE),
    "latin letters in the path": b"POST /v1/p\xf8ll HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "negative length": head("Content-Length: -1"),
    "length with a plus": head("Content-Length: +5") + b"12345",
    "length in hex": head("Content-Length: 0x10"),
    "length of 20 digits": head("Content-Length: 99999999999999999999"),
    "length over the limit": head(f"Content-Length: {BODY_MAX + 1}", CLOSE),
    "two lengths": head("Content-Length: 5", "Content-Length: 6") + b"123456",
    "length and chunks": head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "unknown transfer encoding": head("Transfer-Encoding: gzip, chunked, gzip") + b"0\r\n\r\n",
    "bad chunk size": head("Transfer-Encoding: chunked") + b"xyz\r\n",
    "negative chunk": head("Transfer-Encoding: chunked") + b"-5\r\nhello\r\n",
    "huge chunk": head("Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n",
    "chunk without its end": head("Transfer-Encoding: chunked", CLOSE)
    + b"3\r\nabcdef\r\n0\r\n\r\n",
    "chunk extension": head("Transfer-Encoding: chunked", CLOSE)
    + b"1;" + b"x" * 100_000 + b"\r\na\r\n0\r\n\r\n",
    "trailers": head("Transfer-Encoding: chunked", CLOSE)
    + b"1\r\na\r\n0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    "one header of 1 MiB": head("X: " + "a" * MIB),
    "100,000 headers": head(*(f"X{n}: y" for n in range(100_000))),
    "a path of 1 MiB": head(target="/" + "a" * MIB),
    "no body": head("Content-Length: 0", CLOSE),
    "no content type": b"POST /v1/pull HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n",
    "websocket": head("Upgrade: websocket", "Connection: close, Upgrade",
                      "Sec-WebSocket-Version: 13",
                      "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", method="GET"),
    "upgrade to h2c": head("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ", "Content-Length: 0",
                           "Connection: Upgrade, close"),
    "expect something": head("Expect: 200-everything", "Content-Length: 3", CLOSE) + b"abc",
    "half a request": head("Content-Length: 1000") + b"half",
    "half a head": b"POST /v1/pull HTTP/1.1\r\nHost: localhost\r\nX-Half: ",
    "nothing": b"",
}  # fmt: skip
TARGETS = {
    ("GET", "/v1/pull"), ("PUT", "/v1/push"), ("DELETE", "/v1/handshake"), ("OPTIONS", "*"),
    ("TRACE", "/v1/pull"), ("HEAD", "/v1/pull"), ("PATCH", "/v1/pull"), ("POST", "/"),
    ("POST", "/v1"), ("POST", "/v1/pull/"), ("POST", "//v1/pull"), ("POST", "/v1/../v1/pull"),
    ("POST", "/V1/PULL"), ("POST", "/v1/pull%00"), ("POST", "/v1/pull%2f"), ("POST", "/v2/pull"),
    ("POST", "/v1/%2e%2e/%2e%2e/etc/passwd"), ("POST", "/healthz"), ("POST", "/v1/info"),
    ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/..%2f..%2fetc/passwd"), ("POST", "/%ff%fe"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_proper_request_is_refused_or_cut_off(server: ServerProcess, name: str) -> None:
    before = server.store_hash()
    codes = statuses(server.say(RAW[name]))
    assert all(400 <= code < 500 or code == 505 for code in codes), codes
    assert server.store_hash() == before
    serves(server)


@pytest.mark.parametrize(("method", "target"), sorted(TARGETS))
def test_wrong_methods_and_paths_are_refused(
    server: ServerProcess, method: str, target: str
) -> None:
    (code,) = statuses(server.say(head("Content-Length: 0", CLOSE, method=method, target=target)))
    assert code in (400, 404, 405)
    serves(server)


@pytest.mark.parametrize("name", ["lists", "maps", "ranges", "texts"])
def test_a_body_that_is_huge_in_memory_is_refused(server: ServerProcess, name: str) -> None:
    body = dense(BODY_MAX - 100)[name]
    before = server.memory("VmHWM")
    for encoding, sent in {"identity": body, **packed(body)}.items():
        status, _ = post(server, sent, "/v1/pull", content_encoding=encoding)
        assert status == 413, encoding
    assert server.memory("VmHWM") - before < GROWTH_MAX
    serves(server)


def test_a_value_that_is_huge_in_memory_is_refused(server: ServerProcess) -> None:
    count = 15 * MIB
    request = PushRequest(
        db_id="shop",
        device_id=DEVICE,
        history=handshake(server).history,
        cursor=0,
        collections=["notes"],
        transactions=[
            PushTransaction(
                b"t" * 16,
                1,
                [PushOperation(0, b"e" * 16, 0, cbor.array_head(count) + b"\x80" * count)],
            )
        ],
    )
    before = server.store_hash()
    status, body = post(server, request)
    [result] = decode(PushResponse, body).results
    assert (status, result.verdict, result.code) == (200, Verdict.REJECTED, "codec_error")
    assert server.store_hash() == before
    serves(server)


def test_bombs_in_every_content_encoding_are_refused(server: ServerProcess) -> None:
    for encoding, body in packed(bytes(200 * MIB)).items():
        for _ in range(3):
            assert post(server, body, "/v1/push", content_encoding=encoding)[0] == 413
    serves(server)


def test_a_flood_of_garbage_bodies_leaves_no_trace(server: ServerProcess) -> None:
    rng = random.Random(5)
    data = encode(pull_request(server))
    before = server.store_hash()
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    for _ in range(400):
        connection.request(
            "POST", "/v1/pull", garbled(data, rng), {"content-type": "application/cbor"}
        )
        response = connection.getresponse()
        response.read()
        assert response.status < 500
    connection.close()
    assert server.store_hash() == before
    serves(server)


def test_pipelined_requests_are_answered_in_order_and_in_bounds(server: ServerProcess) -> None:
    body = encode(pull_request(server))
    one = head(f"Content-Length: {len(body)}") + body
    last = head(f"Content-Length: {len(body)}", CLOSE) + body
    codes = statuses(server.say(one * 50 + last))
    assert codes == [200] * 51
    # Thousands, by somebody who never reads an answer.
    with server.connect() as connection:
        connection.settimeout(3.0)
        try:
            for _ in range(200):
                connection.sendall(one * 50)
        except OSError:
            pass  # it stops listening to who does not listen
    serves(server)


@pytest.mark.parametrize("how", ["head", "body", "chunks"])
def test_a_client_that_drips_is_cut_off(server: ServerProcess, how: str) -> None:
    start = {
        "head": b"POST /v1/pull HTTP/1.1\r\nHost: localhost\r\nX: ",
        "body": head("Content-Length: 100000"),
        "chunks": head("Transfer-Encoding: chunked"),
    }[how]
    drop = b"1\r\na\r\n" if how == "chunks" else b"a"
    with server.connect() as connection:
        connection.sendall(start)
        for _ in range(200):
            try:
                connection.sendall(drop)
            except OSError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("it listened for twenty seconds")
        answer = read_all(connection)
    assert all(400 <= code < 500 for code in statuses(answer))
    serves(server)


def test_many_connections_that_say_nothing_stop_nobody(server: ServerProcess) -> None:
    idle = [server.connect() for _ in range(300)]
    serves(server)
    for connection in idle:
        assert read_all(connection) == b""
        connection.close()
    serves(server)


def test_bodies_that_never_end_hold_no_more_than_the_budget(tmp_path: Path) -> None:
    """With a server of its own: what many clients hold at once has another bound than what one
    request may add."""
    piece = bytes(MIB)
    with filled_server(tmp_path) as server:
        before = server.memory("VmHWM")

        def send() -> None:
            with server.connect() as connection:
                try:
                    connection.sendall(head("Transfer-Encoding: chunked"))
                    for _ in range(60):
                        connection.sendall(b"100000\r\n" + piece + b"\r\n")
                except OSError:
                    return

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.memory("VmHWM") - before < ServerConfig.in_flight_bytes_max + 64 * MIB
        serves(server)


def test_extremes_of_limit_and_bytes_are_taken_for_the_servers_own(server: ServerProcess) -> None:
    for number in (1, 2**63 - 1):
        status, body = post(server, pull_request(server, limit=number, bytes_max=number))
        assert status == 200
        assert decode(PullResponse, body).cursor >= 1
    ranges = [(2 * n, 2 * n) for n in range(5000)]
    assert post(server, pull_request(server, have=ranges))[0] == 413
    assert post(server, pull_request(server, have=ranges[:10]))[0] == 200
    names = [f"n{n}" for n in range(10_000)]
    assert post(server, pull_request(server, collections=names))[0] == 413
    assert post(server, pull_request(server, cursor=2**63 - 1))[0] == 409
    serves(server)


def test_file_descriptors_come_back(server: ServerProcess) -> None:
    serves(server)
    before = server.files()
    for _ in range(100):
        with server.connect() as connection:
            connection.sendall(b"POST /v1/pull HTTP/1.1\r\n")
    until = time.monotonic() + 20
    while server.files() > before + 5 and time.monotonic() < until:
        time.sleep(0.05)
    assert server.files() <= before + 5
