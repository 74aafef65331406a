"""Every transport and every HTTP client keeps what the seams promise."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from entidb.errors import TransportError
from entidb.protocol import CONTENT_TYPE, ErrorResponse, decode_request, encode
from entidb.server.wire import error_response
from entidb.sync import HttpTransport, HttpxClient, LoopbackClient, MockTransport, SyncTransport
from entidb.sync.transport import HttpClient, HttpResponse
from entidb.testing.http_client_contract import HttpClientContract, HttpPeer, Received
from entidb.testing.transport_contract import Peer, SyncTransportContract
from tests.tools import closed_port


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    peer: ClassVar[HttpPeer]

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        try:
            answer = type(self).peer(Received(method, self.path, headers, body))
        except TransportError:
            self.close_connection = True
            return
        with suppress(OSError):  # nobody waits for it any more
            self.send_response_only(answer.status)
            for name, value in {**answer.headers, "content-length": len(answer.body)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(answer.body)

    def log_message(self, *arguments: Any) -> None:
        return None


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        return None  # a connection that the client has cut


@contextmanager
def listening(peer: HttpPeer) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"peer": staticmethod(peer)})
    with _HttpServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Served:
    """Keeps the servers of one test until it is over."""

    @pytest.fixture(autouse=True)
    def _servers(self) -> Iterator[None]:
        with ExitStack() as self.servers:
            yield

    def serve(self, peer: HttpPeer) -> str:
        url: str = self.servers.enter_context(listening(peer))
        return url


def over_http(peer: Peer) -> HttpPeer:
    """A server of the protocol that answers with ``peer``."""

    def answer(received: Received) -> HttpResponse:
        said = peer(decode_request(received.path, received.body))
        if isinstance(said, ErrorResponse):
            refused = error_response(said)
            return HttpResponse(refused.status, refused.headers, refused.body)
        return HttpResponse(200, {"content-type": CONTENT_TYPE}, encode(said))

    return answer


class InProcess:
    """A ``LoopbackServer`` that answers with a peer."""

    def __init__(self, peer: HttpPeer) -> None:
        self._peer = peer

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpResponse:
        return self._peer(Received(method, path, headers, body))


class TestHttpTransport(Served, SyncTransportContract):
    def make_transport(self, peer: Peer) -> SyncTransport:
        return HttpTransport(self.serve(over_http(peer)))


class TestHttpTransportInProcess(SyncTransportContract):
    def make_transport(self, peer: Peer) -> SyncTransport:
        client = LoopbackClient(InProcess(over_http(peer)))
        return HttpTransport("http://localhost", client=client)


class TestMockTransport(SyncTransportContract):
    waits = False

    def make_transport(self, peer: Peer) -> SyncTransport:
        return MockTransport(peer)


class TestClientThatShips(Served, HttpClientContract):
    def make_client(self, peer: HttpPeer) -> tuple[HttpClient, str]:
        return HttpxClient(), self.serve(peer)

    def nowhere(self) -> str:
        return f"http://127.0.0.1:{self.servers.enter_context(closed_port())}"


class TestLoopbackClient(HttpClientContract):
    has_network = False

    def make_client(self, peer: HttpPeer) -> tuple[HttpClient, str]:
        return LoopbackClient(InProcess(peer)), "http://localhost"
