"""TLS handshakes under way: so many of one address, so many of all, and room for who comes next."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn

from entidb.server import ServerConfig, serving
from entidb.server.handshakes import Handshakes, ShakingHands
from tests.server.test_app import eventually
from tests.server.test_run import make_certificate

pytestmark = pytest.mark.process


class Clocked:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Silent(ShakingHands):
    """One that begins no handshake."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.is_gone = False

    def hang_up(self) -> None:
        self.is_gone = True


def test_one_address_has_so_many_handshakes_under_way() -> None:
    clock, told = Clocked(), list[str]()
    handshakes = Handshakes(1000, clock, told.append)
    most = handshakes.most_of_address
    several = [Silent("192.0.2.1") for _ in range(most)]
    assert all(map(handshakes.begin, several))
    clock.now = 0.9
    assert not handshakes.begin(Silent("192.0.2.1"))
    other = Silent("192.0.2.2")
    assert handshakes.begin(other), "another address has room of its own"
    handshakes.end(other)
    assert told == ["busy"] and not any(each.is_gone for each in several)
    clock.now = 1.0
    assert handshakes.begin(Silent("192.0.2.1"))
    assert [each.is_gone for each in several[:2]] == [True, False]
    assert (len(handshakes), told) == (most, ["busy"] * 2)
    handshakes.end(several[1])
    handshakes.end(several[0])
    handshakes.end(several[1])
    assert len(handshakes) == most - 1, "each counts once"


def test_all_addresses_together_have_so_many() -> None:
    clock = Clocked()
    handshakes = Handshakes(100, clock)
    several = [Silent(f"192.0.2.{number}") for number in range(handshakes.most)]
    assert all(map(handshakes.begin, several))
    assert not handshakes.begin(Silent("192.0.2.200"))
    clock.now = 2.0
    assert handshakes.begin(Silent("192.0.2.200"))
    assert several[0].is_gone
    assert len(handshakes) == handshakes.most


def test_of_those_who_begin_no_handshake_only_so_many_are_kept(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    config = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True, connections_max=100)
    kept = Handshakes(100).most_of_address
    with serving(config, tls_cert=cert, tls_key=key) as url, contextlib.ExitStack() as stack:
        parts = urlsplit(url)
        place = str(parts.hostname), parts.port or 0
        several = [stack.enter_context(socket.create_connection(place)) for _ in range(60)]
        look = select.poll()
        for each in several:
            look.register(each, select.POLLIN)
        closed: set[int] = set()
        while len(closed) < 60 - kept:
            found = {descriptor for descriptor, _ in look.poll(30_000)}
            assert found, "it is closed"
            for descriptor in found:
                look.unregister(descriptor)
            closed |= found
        assert not look.poll(100), "as many as may be are kept"

        def asks() -> bool:
            context = ssl.create_default_context(cafile=cert)
            client = http.client.HTTPSConnection("localhost", parts.port, context=context)
            with contextlib.closing(client), contextlib.suppress(OSError):
                client.request("GET", "/healthz")
                return client.getresponse().status == 200
            return False

        eventually(asks)


@pytest.mark.parametrize("loop", ["asyncio", "auto"])
def test_many_clients_that_speak_at_once_are_all_answered(
    tmp_path: Path, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes in behind a hello is for the handshake, and what comes in behind that for the
    server, on every event loop."""
    made = uvicorn.Config

    def config(*given: Any, **named: Any) -> uvicorn.Config:
        return made(*given, **{**named, "loop": loop})

    monkeypatch.setattr(uvicorn, "Config", config)
    cert, key = make_certificate(tmp_path)
    context = ssl.create_default_context(cafile=cert)
    asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    settings = ServerConfig(data_dir=tmp_path / "data", insecure_no_auth=True)
    with serving(settings, tls_cert=cert, tls_key=key) as url:
        parts = urlsplit(url)

        def answer(number: int) -> bytes:
            plain = socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30)
            with plain, context.wrap_socket(plain, server_hostname="localhost") as line:
                line.sendall(asked)
                return line.recv(65536)

        with ThreadPoolExecutor(8) as pool:
            for said in pool.map(answer, range(100)):
                assert said.startswith(b"HTTP/1.1 200 ")
