"""The head of a request and a small body leave in one write."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpcore2
import pytest

from entidb.sync.http import HttpxClient
from entidb.sync.http.joined import JoinedStream

HEAD = b"POST / HTTP/1.1\r\n\r\n"


class Recorded(httpcore2.NetworkStream):
    """Notes what is written; reads from ``stream``, or nothing."""

    def __init__(self, stream: httpcore2.NetworkStream | None = None) -> None:
        self.written: list[bytes] = []
        self._stream = stream

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if buffer:
            self.written.append(bytes(buffer))
        if self._stream is not None:
            self._stream.write(buffer, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return b"" if self._stream is None else self._stream.read(max_bytes, timeout)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return None if self._stream is None else self._stream.get_extra_info(info)


def test_a_head_waits_for_the_body_and_for_nothing_else() -> None:
    wire = Recorded()
    stream = JoinedStream(wire)
    for _ in range(2):  # also on a connection that was kept
        wire.written.clear()
        stream.write(HEAD)
        assert wire.written == []
        stream.write(b"body")
        stream.write(b"more")
        assert wire.written == [HEAD + b"body", b"more"]
        stream.read(10)


@pytest.mark.parametrize("end", [lambda s: s.write(b""), lambda s: s.read(10)])
def test_a_head_without_a_body_leaves(end: Callable[[JoinedStream], object]) -> None:
    wire = Recorded()
    stream = JoinedStream(wire)
    stream.write(HEAD)
    end(stream)
    assert wire.written == [HEAD]


def test_a_large_body_is_not_copied() -> None:
    wire = Recorded()
    stream = JoinedStream(wire)
    body = bytes(64 * 1024 + 1)
    stream.write(HEAD)
    stream.write(body)
    assert wire.written == [HEAD, body]


@pytest.fixture
def answering() -> Iterator[str]:
    """A server that answers every request with two bytes, once it has a body of four."""
    bound = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            connection, _ = bound.accept()
        except OSError:  # the test is over
            return
        with connection:
            seen = b""
            while piece := connection.recv(4096):
                seen += piece
                if seen.endswith(b"body") or (b"none" in seen and seen.endswith(b"\r\n\r\n")):
                    seen = b""
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    bound.close()
    thread.join(5)


def test_each_request_of_the_client_is_one_write(
    answering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wires: list[Recorded] = []
    connect = httpcore2.SyncBackend.connect_tcp

    def recorded(*arguments: Any, **named: Any) -> Recorded:
        wires.append(Recorded(connect(*arguments, **named)))
        return wires[-1]

    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", recorded)
    client = HttpxClient()
    try:
        for method, headers, body in (
            ("POST", {}, b"body"),
            ("POST", {}, b"body"),
            ("GET", {"X": "none"}, b""),
        ):
            answer = client.request(method, answering, headers, body, 10.0)
            assert (answer.status, answer.body) == (200, b"ok")
        (wire,) = wires
        assert [each.split(b"\r\n\r\n")[1] for each in wire.written] == [b"body", b"body", b""]
    finally:
        client.close()
