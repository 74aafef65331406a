"""What every ``SyncTransport`` and every ``HttpClient`` must do: the promises of both as tests.

Use one by inheriting: ``class TestMine(SyncTransportContract)`` with ``make_transport``; pytest
collects the tests. The peer is a function that the test gives, so that only the transport or the
client is under test. One without a network, whose requests take no time, says so with a flag.
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

from entidb.errors import (
    ProtocolError,
    ServerBusyError,
    SyncCancelledError,
    SyncError,
    TransportError,
)
from entidb.protocol import (
    LIMITS,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    SyncRequest,
    SyncResponse,
)
from entidb.sync.transport import HttpClient, HttpResponse, SyncTransport
from entidb.testing.contracts import STUCK_SECONDS, raises

#: What a test puts in the place of the server; it may raise ``TransportError``, which stands for
#: a connection that is lost before the answer.
Peer = Callable[[SyncRequest], SyncResponse]

_HISTORY = b"h" * 16
_DEVICE = b"d" * 16
#: Seconds within which an end counts as prompt: more than the 100 ms that are promised, for busy
#: machines.
_PROMPT_S = 5.0


def a_handshake() -> HandshakeRequest:
    return HandshakeRequest(
        major=1, minor=0, db_id="contract", device_id=_DEVICE, history=None, cursor=0
    )


def a_pull(cursor: int = 0) -> PullRequest:
    return PullRequest(
        db_id="contract",
        device_id=_DEVICE,
        history=_HISTORY,
        cursor=cursor,
        limit=100,
        bytes_max=1 << 20,
    )


def a_push() -> PushRequest:
    return PushRequest(
        db_id="contract",
        device_id=_DEVICE,
        history=_HISTORY,
        cursor=0,
        collections=[],
        transactions=[],
    )


def an_answer(request: SyncRequest, head: int = 7) -> SyncResponse:
    """One that fits ``request``, with ``head`` to know it by."""
    if isinstance(request, HandshakeRequest):
        return HandshakeResponse(
            major=1,
            minor=0,
            history=_HISTORY,
            head=head,
            floor=0,
            limits=LIMITS,
            features=[],
            time=1,
        )
    if isinstance(request, PullRequest):
        return PullResponse(
            collections=[],
            commits=[],
            cursor=request.cursor,
            has_more=False,
            head=head,
            floor=0,
            time=1,
        )
    return PushResponse(results=[], collections=[], head=head, time=1)


def is_connected(transport: SyncTransport) -> bool:
    return transport.connected


class SyncTransportContract:
    """The promises of ``SyncTransport``."""

    #: False: an answer is there when ``send`` returns to itself, so nothing is ever under way.
    waits = True

    def make_transport(self, peer: Peer) -> SyncTransport:
        """A transport to a server that answers with ``peer``; ``fresh`` closes it."""
        raise NotImplementedError("a contract needs make_transport")

    @contextlib.contextmanager
    def fresh(self, peer: Peer = an_answer) -> Iterator[SyncTransport]:
        transport = self.make_transport(peer)
        try:
            yield transport
        finally:
            transport.close()

    # ---- answers

    def test_each_method_returns_the_answer_that_belongs_to_it(self) -> None:
        with self.fresh() as transport:
            assert transport.handshake(a_handshake()).history == _HISTORY
            assert transport.pull(a_pull(3)).cursor == 3
            assert transport.push(a_push()).head == 7

    def test_send_returns_the_answer_to_any_request(self) -> None:
        with self.fresh() as transport:
            for request in (a_handshake(), a_pull(5), a_push(), a_pull(6)):
                assert transport.send(request) == an_answer(request)

    def test_a_request_arrives_as_it_was_sent(self) -> None:
        seen: list[SyncRequest] = []

        def peer(request: SyncRequest) -> SyncResponse:
            seen.append(request)
            return an_answer(request)

        with self.fresh(peer) as transport:
            for request in (a_handshake(), a_pull(5), a_push()):
                transport.send(request)
        assert seen == [a_handshake(), a_pull(5), a_push()]

    def test_an_error_response_is_raised_as_the_class_of_its_code(self) -> None:
        def peer(request: SyncRequest) -> SyncResponse:
            return ErrorResponse(
                code="busy", message="later", retryable=True, retry_after=3.0, details={"n": 1}
            )

        with self.fresh(peer) as transport, raises(ServerBusyError) as raised:
            transport.send(a_pull())
        error = raised.error
        assert isinstance(error, ServerBusyError)
        assert (error.code, error.message, error.retry_after) == ("busy", "later", 3.0)
        assert error.details == {"n": 1}
        assert error.retryable

    def test_an_answer_of_another_kind_is_an_error(self) -> None:
        def peer(request: SyncRequest) -> SyncResponse:
            return an_answer(a_push())

        with self.fresh(peer) as transport, raises(ProtocolError):
            transport.send(a_handshake())

    # ---- connected

    def test_it_is_connected_from_the_first_answer_on(self) -> None:
        with self.fresh() as transport:
            assert not is_connected(transport)
            transport.send(a_pull())
            assert is_connected(transport)
            transport.send(a_push())
            assert is_connected(transport)

    def test_a_refusal_leaves_the_connection_as_it_was(self) -> None:
        refuses = [True]

        def peer(request: SyncRequest) -> SyncResponse:
            if refuses[0]:
                return ErrorResponse(code="forbidden", message="no", retryable=False)
            return an_answer(request)

        with self.fresh(peer) as transport:
            with raises(SyncError):
                transport.send(a_pull())
            assert not is_connected(transport)
            refuses[0] = False
            transport.send(a_pull())
            refuses[0] = True
            with raises(SyncError):
                transport.send(a_pull())
            assert is_connected(transport)

    def test_a_lost_connection_is_a_transport_error_and_the_request_can_be_sent_again(self) -> None:
        lost = [False]

        def peer(request: SyncRequest) -> SyncResponse:
            if lost[0]:
                raise TransportError("the connection is lost")
            return an_answer(request)

        with self.fresh(peer) as transport:
            transport.send(a_pull())
            lost[0] = True
            with raises(TransportError) as raised:
                transport.send(a_pull())
            assert isinstance(raised.error, TransportError) and raised.error.retryable
            assert not is_connected(transport)
            lost[0] = False
            assert transport.send(a_pull()) == an_answer(a_pull())
            assert is_connected(transport)

    # ---- ahead of time

    def test_what_was_hinted_at_is_answered_by_the_send_of_an_equal_request(self) -> None:
        with self.fresh() as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            transport.send_ahead(a_pull(3))
            assert transport.send(a_pull(2)) == an_answer(a_pull(2))
            assert transport.send(a_pull(3)) == an_answer(a_pull(3))
            assert transport.send(a_pull(4)) == an_answer(a_pull(4))

    def test_no_answer_from_before_forget_ahead_is_taken_for_a_fresh_one(self) -> None:
        heads = iter(range(10, 1000))

        def peer(request: SyncRequest) -> SyncResponse:
            return an_answer(request, next(heads))

        with self.fresh(peer) as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            transport.forget_ahead()
            mark = next(heads)
            assert transport.pull(a_pull(2)).head > mark

    def test_another_send_drops_what_was_hinted_at(self) -> None:
        heads = iter(range(10, 1000))

        def peer(request: SyncRequest) -> SyncResponse:
            return an_answer(request, next(heads))

        with self.fresh(peer) as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            assert transport.pull(a_pull(9)).cursor == 9
            mark = next(heads)
            assert transport.pull(a_pull(2)).head > mark

    def test_an_error_of_what_was_hinted_at_comes_out_of_its_send(self) -> None:
        def peer(request: SyncRequest) -> SyncResponse:
            if request == a_pull(2):
                return ErrorResponse(code="busy", message="later", retryable=True)
            return an_answer(request)

        with self.fresh(peer) as transport:
            transport.send(a_pull(1))
            transport.send_ahead(a_pull(2))
            with raises(ServerBusyError):
                transport.send(a_pull(2))
            assert transport.send(a_pull(3)) == an_answer(a_pull(3))

    # ---- the end

    def test_a_closed_transport_refuses_and_is_not_connected(self) -> None:
        transport = self.make_transport(an_answer)
        transport.send(a_pull())
        transport.close()
        transport.close()
        assert not is_connected(transport)
        with raises(SyncError):
            transport.send(a_pull())

    def test_close_ends_a_request_that_is_under_way(self) -> None:
        if self.waits:
            self._check_ended(lambda transport: transport.close(), SyncError)

    def test_interrupt_ends_a_request_that_is_under_way(self) -> None:
        if self.waits:
            self._check_ended(lambda transport: getattr(transport, "interrupt", _nothing)(), None)

    def _check_ended(
        self, end: Callable[[SyncTransport], None], kind: type[SyncError] | None
    ) -> None:
        """``kind`` None: what ``interrupt`` promises, of a transport that has it."""
        begun, over = threading.Event(), threading.Event()

        def peer(request: SyncRequest) -> SyncResponse:
            begun.set()
            over.wait(STUCK_SECONDS)
            return an_answer(request)

        transport = self.make_transport(peer)
        try:
            if kind is None and not hasattr(transport, "interrupt"):
                return
            with ThreadPoolExecutor(1) as pool:
                sending = pool.submit(transport.send, a_pull())
                assert begun.wait(STUCK_SECONDS)
                began = time.monotonic()
                end(transport)
                error = sending.exception(STUCK_SECONDS)
                assert time.monotonic() - began < _PROMPT_S
            assert isinstance(error, kind or SyncCancelledError), error
            assert not is_connected(transport)
            if kind is None:
                with raises(SyncCancelledError):
                    transport.send(a_pull())  # until the next ``forget_ahead``
                over.set()
                transport.forget_ahead()
                assert transport.send(a_pull()) == an_answer(a_pull())
        finally:
            over.set()
            transport.close()


def _nothing() -> None:
    return None


# ---------------------------------------------------------------- HTTP


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


__all__ = ["HttpClientContract", "Received", "SyncTransportContract", "an_answer"]
