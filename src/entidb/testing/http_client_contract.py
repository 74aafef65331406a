"""What every ``HttpClient`` must do: its promises as tests.

Use it by inheriting: ``class TestMine(HttpClientContract)`` with ``make_client``; pytest collects
the tests. The server is a function that the test gives. A client without a network says so with a
flag.
"""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from entidb.errors import SyncCancelledError, SyncError
from entidb.sync.transport import HttpClient, HttpResponse
from entidb.testing.contracts import STUCK_SECONDS, raises

#: Seconds within which an end counts as prompt: more than the 100 ms that are promised, for busy
#: machines.
_PROMPT_S = 5.0


@dataclass
class Received:
    """One request as it arrived; header names are lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


#: What a test puts in the place of an HTTP server.
HttpPeer = Callable[[Received], HttpResponse]


@dataclass
class _Recorder:
    """Answers everything alike, and keeps what came."""

    answer: HttpResponse = field(default_factory=lambda: HttpResponse(200, {}, b"an answer"))
    received: list[Received] = field(default_factory=list)

    def __call__(self, received: Received) -> HttpResponse:
        self.received.append(received)
        return self.answer


class HttpClientContract:
    """The promises of ``HttpClient``."""

    #: False: the server is called on the thread of the request, and cannot be out of reach.
    has_network = True
    #: False: it says of itself that it sends no ``GET`` (``HttpClient``).
    gets = True

    def make_client(self, peer: HttpPeer) -> tuple[HttpClient, str]:
        """A client, and the URL of a server that answers with ``peer``. ``fresh`` closes the
        client."""
        raise NotImplementedError("a contract needs make_client")

    def nowhere(self) -> str:
        """A URL at which nothing listens."""
        raise NotImplementedError("has_network needs nowhere")

    @contextlib.contextmanager
    def fresh(self, peer: HttpPeer) -> Iterator[tuple[HttpClient, str]]:
        client, url = self.make_client(peer)
        try:
            yield client, url
        finally:
            client.close()

    # ---- requests

    def test_method_path_headers_and_body_arrive_as_they_were_given(self) -> None:
        peer = _Recorder()
        given = {"Content-Type": "application/cbor", "X-Something": "else", "Accept": "*/*"}
        with self.fresh(peer) as (client, url):
            client.request("POST", f"{url}/v1/pull", given, b"\x00\xffbody", STUCK_SECONDS)
        (received,) = peer.received
        assert (received.method, received.path) == ("POST", "/v1/pull")
        assert received.body == b"\x00\xffbody"
        for name, value in given.items():
            assert received.headers[name.lower()] == value

    def test_no_header_is_added_but_what_a_message_needs(self) -> None:
        peer = _Recorder()
        with self.fresh(peer) as (client, url):
            client.request("POST", f"{url}/", {"Accept": "a/b"}, b"x", STUCK_SECONDS)
            client.request("POST", f"{url}/", {"Accept": "a/b"}, b"x", STUCK_SECONDS)
        for received in peer.received:
            assert set(received.headers) <= {"accept", "host", "content-length", "connection"}

    def test_empty_and_large_bodies_pass_in_both_directions(self) -> None:
        peer = _Recorder()
        with self.fresh(peer) as (client, url):
            for size in (0, 1, 3_000_000):
                body = bytes(size)
                peer.answer = HttpResponse(200, {}, body)
                answer = client.request("POST", f"{url}/", {}, body, STUCK_SECONDS)
                assert answer.body == body == peer.received[-1].body

    def test_a_get_with_a_range_and_a_query_brings_what_it_asks_for(self) -> None:
        part = HttpResponse(206, {"content-range": "bytes 2-4/9"}, b"cde")
        peer = _Recorder(part)
        with self.fresh(peer) as (client, url):
            assert getattr(client, "gets", True) is self.gets
            if not self.gets:
                return
            asked = {"Range": "bytes=2-4", "Accept-Encoding": "identity"}
            where = f"{url}/v1/segments/ab?db_id=a%20b"
            answer = client.request("GET", where, asked, b"", STUCK_SECONDS)
        assert (answer.status, answer.body) == (206, b"cde")
        assert answer.headers["content-range"] == "bytes 2-4/9"
        (received,) = peer.received
        assert (received.method, received.body) == ("GET", b"")
        assert received.path == "/v1/segments/ab?db_id=a%20b"
        assert received.headers["range"] == "bytes=2-4"

    # ---- answers

    def test_every_status_is_an_answer(self) -> None:
        peer = _Recorder()
        with self.fresh(peer) as (client, url):
            for status in (200, 400, 401, 403, 404, 413, 429, 500, 503):
                peer.answer = HttpResponse(status, {"x-status": str(status)}, b"said")
                answer = client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)
                assert (answer.status, answer.body) == (status, b"said")
                assert answer.headers["x-status"] == str(status)

    def test_no_redirect_is_followed(self) -> None:
        peer = _Recorder(HttpResponse(307, {"location": "/elsewhere"}, b""))
        with self.fresh(peer) as (client, url):
            answer = client.request("POST", f"{url}/here", {}, b"", STUCK_SECONDS)
        assert answer.status == 307
        assert [received.path for received in peer.received] == ["/here"]

    def test_names_of_headers_are_lower_case(self) -> None:
        peer = _Recorder(HttpResponse(200, {"Retry-After": "3"}, b""))
        with self.fresh(peer) as (client, url):
            answer = client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)
        assert answer.headers["retry-after"] == "3"
        assert all(name == name.lower() for name in answer.headers)

    def test_a_packed_body_stays_packed_or_is_not_called_so(self) -> None:
        packed = gzip.compress(b"what it says")
        peer = _Recorder(HttpResponse(200, {"content-encoding": "gzip"}, packed))
        with self.fresh(peer) as (client, url):
            answer = client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)
        says = answer.headers.get("content-encoding") == "gzip"
        assert answer.body == (packed if says else b"what it says")

    def test_no_cookie_comes_back(self) -> None:
        peer = _Recorder(HttpResponse(200, {"set-cookie": "who=me"}, b""))
        with self.fresh(peer) as (client, url):
            for _ in range(2):
                client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)
        assert not any("cookie" in received.headers for received in peer.received)

    def test_two_requests_at_once_get_their_own_answers(self) -> None:
        both = threading.Barrier(2, timeout=STUCK_SECONDS)

        def peer(received: Received) -> HttpResponse:
            both.wait()
            return HttpResponse(200, {}, received.body)

        with self.fresh(peer) as (client, url), ThreadPoolExecutor(2) as pool:
            bodies = [b"one", b"other"]
            asked = [
                pool.submit(client.request, "POST", f"{url}/", {}, body, STUCK_SECONDS)
                for body in bodies
            ]
            assert [each.result(STUCK_SECONDS).body for each in asked] == bodies

    def test_on_sent_is_called_once_for_each_request(self) -> None:
        sent: list[int] = []
        with self.fresh(_Recorder()) as (client, url):
            if not getattr(client, "tells_when_sent", False):
                return
            telling: dict[str, Any] = {"on_sent": lambda: sent.append(1)}
            for number in (1, 2):
                client.request("POST", f"{url}/", {}, b"x", STUCK_SECONDS, **telling)
                assert len(sent) == number

    # ---- no answer, and the end

    def test_where_nothing_listens_it_is_an_error_of_the_network(self) -> None:
        if not self.has_network:
            return
        with self.fresh(_Recorder()) as (client, url):
            with raises((SyncError, OSError)):
                client.request("POST", f"{self.nowhere()}/", {}, b"", STUCK_SECONDS)
            assert client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS).status == 200

    def test_the_time_bounds_the_whole_exchange(self) -> None:
        if not self.has_network:
            return
        over = threading.Event()

        def peer(received: Received) -> HttpResponse:
            over.wait(STUCK_SECONDS)
            return HttpResponse(200, {}, b"")

        try:
            with self.fresh(peer) as (client, url):
                began = time.monotonic()
                with raises((SyncError, TimeoutError)):
                    client.request("POST", f"{url}/", {}, b"", 0.2)
                assert time.monotonic() - began < _PROMPT_S
        finally:
            over.set()

    def test_a_closed_client_refuses(self) -> None:
        client, url = self.make_client(_Recorder())
        client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)
        client.close()
        client.close()
        with raises(SyncError):
            client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)

    def test_close_ends_what_is_under_way(self) -> None:
        self._check_ended(lambda client: client.close(), again=False)

    def test_interrupt_ends_what_is_under_way_and_what_begins_before_resume(self) -> None:
        self._check_ended(lambda client: getattr(client, "interrupt", _nothing)(), again=True)

    def _check_ended(self, end: Callable[[HttpClient], None], *, again: bool) -> None:
        if not self.has_network:
            return
        begun, over = threading.Event(), threading.Event()

        def peer(received: Received) -> HttpResponse:
            begun.set()
            over.wait(STUCK_SECONDS)
            return HttpResponse(200, {}, b"late")

        client, url = self.make_client(peer)
        try:
            if again and not hasattr(client, "interrupt"):
                return
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(client.request, "POST", f"{url}/", {}, b"", STUCK_SECONDS)
                assert begun.wait(STUCK_SECONDS)
                began = time.monotonic()
                end(client)
                error = asked.exception(STUCK_SECONDS)
                assert time.monotonic() - began < _PROMPT_S
            assert isinstance(error, SyncCancelledError if again else (SyncError, OSError)), error
            if again:
                with raises(SyncCancelledError):
                    client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS)
                over.set()
                resume: Callable[[], None] = getattr(client, "resume", _nothing)
                resume()
                assert client.request("POST", f"{url}/", {}, b"", STUCK_SECONDS).body == b"late"
        finally:
            over.set()
            client.close()


def _nothing() -> None:
    return None


__all__ = ["HttpClientContract", "HttpPeer", "Received"]
