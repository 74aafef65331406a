"""The seam itself, the scripted transport, and the client that calls a server in process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from entidb.errors import (
    ERROR_TABLE,
    ConfigError,
    HistoryChangedError,
    ProtocolError,
    ServerBusyError,
    ServerError,
    SyncStateError,
    TransportError,
)
from entidb.protocol import (
    ErrorResponse,
    HandshakeResponse,
    PullRequest,
    PushRequest,
    PushResponse,
    SyncRequest,
    SyncResponse,
    encode,
)
from entidb.sync.http import HttpTransport
from entidb.sync.transport import (
    HttpClient,
    LoopbackClient,
    LoopbackServer,
    MockTransport,
    SyncTransport,
    check_response,
)
from tests.sync.messages import HANDSHAKE, ID, LIMITS, PAGE, PULL

WELCOME = HandshakeResponse(
    major=1, minor=0, history=ID, head=3, floor=0, limits=LIMITS, features=[], time=1
)
PUSH = PushRequest(db_id="d", device_id=ID, history=ID, cursor=3, collections=[], transactions=[])
VERDICTS = PushResponse(results=[], collections=[], head=3, time=1)


def test_a_script_answers_in_order_and_keeps_what_was_asked() -> None:
    transport: SyncTransport = (mock := MockTransport([WELCOME, PAGE, VERDICTS]))
    assert transport.handshake(HANDSHAKE) == WELCOME
    assert transport.pull(PULL) == PAGE
    assert transport.push(PUSH) == VERDICTS
    assert mock.requests == [HANDSHAKE, PULL, PUSH]
    mock.assert_done()


def test_a_function_answers_every_request() -> None:
    def answer(request: SyncRequest) -> SyncResponse:
        return PAGE if isinstance(request, PullRequest) else VERDICTS

    mock = MockTransport(answer)
    assert [mock.send(PULL), mock.send(PUSH), mock.send(PULL)] == [PAGE, VERDICTS, PAGE]
    mock.assert_done()


def test_a_script_can_raise_and_ask_a_function() -> None:
    mock = MockTransport([TransportError("cable"), lambda request: PAGE])
    with pytest.raises(TransportError, match="cable"):
        mock.pull(PULL)
    assert mock.pull(PULL) == PAGE


@pytest.mark.parametrize("script", [None, 7])
def test_a_mock_of_nothing_is_refused(script: Any) -> None:
    with pytest.raises(ConfigError, match="a list of steps or a function"):
        MockTransport(script)


def test_steps_left_over_are_a_mistake() -> None:
    mock = MockTransport([PAGE, PAGE])
    mock.pull(PULL)
    with pytest.raises(AssertionError, match="1 steps left"):
        mock.assert_done()


def test_a_request_beyond_the_script_is_a_mistake() -> None:
    mock = MockTransport([])
    with pytest.raises(AssertionError, match="beyond the end"):
        mock.pull(PULL)


def test_an_answer_connects_and_a_transport_error_disconnects() -> None:
    busy = ErrorResponse(code="busy", message="later", retryable=True)
    mock = MockTransport([busy, PAGE, busy, TransportError("cable")])
    seen = [mock.connected]
    for _ in range(4):
        with contextlib.suppress(ServerError, TransportError):
            mock.pull(PULL)
        seen.append(mock.connected)
    assert seen == [False, False, True, True, False]


def test_nothing_is_sent_after_close() -> None:
    with MockTransport([PAGE]) as mock:
        mock.pull(PULL)
    assert mock.closed
    assert not mock.connected
    mock.close()
    with pytest.raises(SyncStateError):
        mock.pull(PULL)
    assert mock.requests == [PULL]


@pytest.mark.parametrize("code", sorted(ERROR_TABLE))
def test_every_code_of_the_table_is_raised_as_its_class(code: str) -> None:
    said = ErrorResponse(
        code=code, message="why", retryable=False, retry_after=4.0, details={"a": 1}
    )
    with pytest.raises(ERROR_TABLE[code].error) as caught:
        MockTransport([said]).pull(PULL)
    assert type(caught.value) is ERROR_TABLE[code].error
    assert (caught.value.code, caught.value.message) == (code, "why")
    assert (caught.value.retry_after, caught.value.details) == (4.0, {"a": 1})


def test_a_code_from_the_future_is_a_server_error() -> None:
    said = ErrorResponse(code="moon_phase", message="wait", retryable=False)
    with pytest.raises(ServerError) as caught:
        MockTransport([said]).pull(PULL)
    assert caught.value.code == "moon_phase"


@pytest.mark.parametrize(
    ("request_", "response"), [(PULL, VERDICTS), (PUSH, PAGE), (HANDSHAKE, PAGE), (PULL, WELCOME)]
)
def test_an_answer_to_another_question_is_refused(
    request_: SyncRequest, response: SyncResponse
) -> None:
    with pytest.raises(ProtocolError, match="was a"):
        check_response(request_, response)


def test_a_hint_changes_nothing_where_it_is_not_used() -> None:
    mock = MockTransport([PAGE])
    mock.send_ahead(PULL)
    mock.forget_ahead()
    assert mock.requests == []


@dataclass(frozen=True)
class Said:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass
class EchoServer:
    """Answers every pull with one page, and keeps what it was asked."""

    answer: Said
    asked: list[tuple[str, str, Mapping[str, str], bytes]] = field(default_factory=list)

    def handle_http(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Said:
        self.asked.append((method, path, headers, body))
        return self.answer


def echo(status: int = 200, message: SyncResponse = PAGE) -> EchoServer:
    return EchoServer(Said(status, {"Content-Type": "application/cbor"}, encode(message)))


def test_a_loopback_client_calls_straight_into_the_server() -> None:
    server = echo()
    offered: LoopbackServer = server
    client: HttpClient = LoopbackClient(offered)
    with HttpTransport("http://localhost/sync", token="t", client=client) as transport:
        assert transport.pull(PULL) == PAGE
    method, path, headers, body = server.asked[0]
    assert (method, path, body) == ("POST", "/sync/v1/pull", encode(PULL))
    assert headers["authorization"] == "Bearer t"
    assert headers["content-type"] == "application/cbor"


def test_a_refusal_over_loopback_is_raised_like_over_a_wire() -> None:
    refused = ErrorResponse(code="history_changed", message="restored", retryable=False)
    transport = HttpTransport("http://localhost", client=LoopbackClient(echo(409, refused)))
    with pytest.raises(HistoryChangedError, match="restored"):
        transport.pull(PULL)


def test_a_busy_server_over_loopback_says_when_to_come_back() -> None:
    busy = ErrorResponse(code="busy", message="later", retryable=True, retry_after=2.5)
    transport = HttpTransport("http://localhost", client=LoopbackClient(echo(503, busy)))
    with pytest.raises(ServerBusyError) as caught:
        transport.pull(PULL)
    assert caught.value.retry_after == 2.5


def test_a_closed_loopback_client_does_not_reach_the_server() -> None:
    server = echo()
    client = LoopbackClient(server)
    client.close()
    with pytest.raises(SyncStateError):
        client.request("POST", "http://localhost/v1/pull", {}, b"", 1)
    assert server.asked == []
