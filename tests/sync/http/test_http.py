"""The HTTP transport against a server of raw bytes, which can do everything a server should not."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import importlib
import ipaddress
import itertools
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from entidb import packing
from entidb.errors import (
    ERROR_TABLE,
    REFUSALS,
    AuthenticationError,
    ConfigError,
    PermissionDeniedError,
    ProtocolError,
    ServerBusyError,
    ServerError,
    SyncCodecError,
    SyncError,
    SyncStateError,
    SyncTimeoutError,
    TlsError,
    TransportError,
)
from entidb.protocol import (
    ErrorResponse,
    HandshakeResponse,
    PullCommit,
    PullOperation,
    PullRequest,
    PullResponse,
    PushOperation,
    PushRequest,
    PushTransaction,
    decode,
    encode,
)
from entidb.sync.config import HttpConfig
from entidb.sync.http import HttpResponse, HttpTransport, HttpxClient
from entidb.sync.http.failures import too_large
from tests.sync.messages import HANDSHAKE, ID, LIMITS, PAGE, PULL
from tests.tools import closed_port

try:
    zstd: Any = importlib.import_module("compression.zstd")
except ImportError:
    zstd = importlib.import_module("backports.zstd")

BIG_PAGE = PullResponse(
    collections=["notes"],
    commits=[PullCommit(4, ID, 1, [PullOperation(0, ID, b"\xa0" * 5000)])],
    cursor=4,
    has_more=False,
    head=4,
    floor=0,
    time=1,
)
BIG_PUSH = PushRequest(
    db_id="d",
    device_id=ID,
    history=ID,
    cursor=3,
    collections=["notes"],
    transactions=[PushTransaction(ID, 1, [PushOperation(0, ID, 0, b"\xa0" * 5000)])],
)
#: Of every wait that must not happen; far above what any of these tests needs.
PATIENCE_S = 20.0


def welcome(*features: str) -> HandshakeResponse:
    return HandshakeResponse(
        major=1, minor=0, history=ID, head=3, floor=0, limits=LIMITS, features=[*features], time=1
    )


# -- a server of raw bytes --------------------------------------------------------------------


@dataclass(frozen=True)
class Received:
    connection: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


#: One thing to do with an answer: send bytes, wait until the test is over, or hang up.
STALL = "stall"
HANG_UP = "hang up"
Step = bytes | str


def reply(
    body: bytes = b"",
    status: str = "200 OK",
    content_type: str | None = "application/cbor",
    **headers: str,
) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if content_type is not None:
        named["Content-Type"] = content_type
    named.setdefault("Content-Length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def refusal(code: str, status: str, **headers: str) -> bytes:
    said = ErrorResponse(code=code, message=f"said {code}", retryable=False)
    return reply(encode(said), status, **headers)


class RawServer:
    """Answers each request with the next steps of its script, the last of them for ever."""

    def __init__(self, *script: bytes | list[Step], tls: ssl.SSLContext | None = None) -> None:
        self._script: list[list[Step]] = [
            [step] if isinstance(step, bytes) else step for step in script
        ]
        self._tls = tls
        self.received: list[Received] = []
        self.reached = threading.Event()
        self.over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.over.set()
        # A listener that is only closed would leave the thread in accept().
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for each in (self._listener, *self._sockets):
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                client, _ = self._listener.accept()
                self._sockets.append(client)
                thread = threading.Thread(target=self._serve, args=(number, client))
                self._threads.append(thread)
                thread.start()

    def _serve(self, number: int, plain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client = plain
            if self._tls is not None:
                client = self._tls.wrap_socket(plain, server_side=True)
                self._sockets.append(client)
            with client.makefile("rb") as stream:
                while (request := self._read(number, stream)) is not None:
                    steps = self._script[min(len(self.received), len(self._script) - 1)]
                    self.received.append(request)
                    self.reached.set()
                    if not self._play(client, steps):
                        break
            client.shutdown(socket.SHUT_RDWR)

    def _read(self, number: int, stream: Any) -> Received | None:
        first = stream.readline().decode().split()
        if len(first) != 3:
            return None
        lines = iter(lambda: stream.readline().decode().strip(), "")
        headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        body = stream.read(int(headers["content-length"]))
        return Received(number, first[0], first[1], headers, body)

    def _play(self, client: socket.socket, steps: list[Step]) -> bool:
        for step in steps:
            if step == STALL:
                self.over.wait(PATIENCE_S)
            elif isinstance(step, bytes):
                client.sendall(step)
            else:
                return False
        return True


def pull_from(server: RawServer, **settings: Any) -> Any:
    with HttpTransport(server.url, config=HttpConfig(**settings)) as transport:
        return transport.pull(PULL)


def error_of(*script: bytes | list[Step], **settings: Any) -> SyncError:
    with RawServer(*script) as server, pytest.raises(SyncError) as caught:
        pull_from(server, **settings)
    return caught.value


# -- what is sent -----------------------------------------------------------------------------


def test_a_request_is_a_post_of_cbor_and_its_answer_is_decoded():
    with RawServer(reply(encode(PAGE))) as server, HttpTransport(server.url) as transport:
        assert transport.pull(PULL) == PAGE
        assert transport.connected
    sent = server.received[0]
    assert (sent.method, sent.path, sent.body) == ("POST", "/v1/pull", encode(PULL))
    assert sent.headers["content-type"] == "application/cbor"
    assert sent.headers["host"] == server.url.removeprefix("http://")
    assert sent.headers["user-agent"].startswith("entidb/")
    assert "authorization" not in sent.headers
    assert "cookie" not in sent.headers


@pytest.mark.parametrize("base", ["/sync", "/sync/", "/a/b/"])
def test_a_server_can_be_mounted_under_a_path(base: str):
    with RawServer(reply(encode(PAGE))) as server, HttpTransport(server.url + base) as transport:
        transport.pull(PULL)
    assert server.received[0].path == base.rstrip("/") + "/v1/pull"


def test_a_connection_is_kept_for_the_next_request():
    with RawServer(reply(encode(PAGE))) as server, HttpTransport(server.url) as transport:
        for _ in range(5):
            transport.pull(PULL)
    assert [sent.connection for sent in server.received] == [0] * 5


def test_a_connection_the_server_has_closed_is_replaced():
    with (
        RawServer([reply(encode(PAGE)), HANG_UP], reply(encode(PAGE))) as server,
        HttpTransport(server.url) as transport,
    ):
        transport.pull(PULL)
        # Only the end of the connection's thread says that it is closed for certain.
        server._threads[1].join(PATIENCE_S)
        assert transport.pull(PULL) == PAGE
    assert [sent.connection for sent in server.received] == [0, 1]


def test_every_request_has_an_id_of_its_own():
    with RawServer(reply(encode(PAGE))) as server:
        for _ in range(2):
            with HttpTransport(server.url) as transport:
                transport.pull(PULL)
                transport.pull(PULL)
    assert len({sent.headers["x-request-id"] for sent in server.received}) == 4


def test_an_error_names_the_request_as_the_log_of_the_server_has_it():
    error = error_of(refusal("forbidden", "403 No", x_request_id="behind-7"))
    assert error.request_id == "behind-7"
    assert str(error) == "said forbidden (request behind-7)"
    error = error_of(reply(b"<p>no</p>", "502 Bad", content_type="text/html", x_request_id="b-8"))
    assert error.request_id == "b-8"
    error = error_of(reply(b"\xff", "200 OK", x_request_id="b-9"))
    assert error.code == "codec_error"
    assert error.request_id == "b-9"


def test_an_id_is_said_once_and_only_if_it_is_one():
    said = ErrorResponse(code="server_error", message="the log has it as b-1", retryable=True)
    error = error_of(reply(encode(said), "500 No", x_request_id="b-1"))
    assert str(error) == said.message
    error = error_of(refusal("forbidden", "403 No", x_request_id="b" * 65))
    assert error.request_id is None
    assert str(error) == "said forbidden"
    long = ErrorResponse(code="forbidden", message="x" * 5000, retryable=False)
    error = error_of(reply(encode(long), "403 No", x_request_id="b-2"))
    assert str(error).endswith("x (request b-2)")


def test_without_an_answer_the_error_has_the_id_that_was_sent():
    with RawServer([HANG_UP]) as server, pytest.raises(TransportError) as caught:
        pull_from(server)
    assert caught.value.request_id == server.received[-1].headers["x-request-id"]


# -- tokens -----------------------------------------------------------------------------------


class Tokens:
    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, refresh: bool) -> str:
        self.asked.append(refresh)
        return "fresh" if refresh else "stale"


def test_a_refused_token_is_renewed_once_and_the_request_sent_again():
    tokens = Tokens()
    with (
        RawServer(refusal("unauthorized", "401 No"), reply(encode(PAGE))) as server,
        HttpTransport(server.url, token=tokens) as transport,
    ):
        assert transport.pull(PULL) == PAGE
    assert tokens.asked == [False, True]
    assert [sent.headers["authorization"] for sent in server.received] == [
        "Bearer stale",
        "Bearer fresh",
    ]
    assert server.received[0].body == server.received[1].body


def test_a_fresh_token_that_is_refused_too_is_an_authentication_error():
    with (
        RawServer(refusal("unauthorized", "401 No")) as server,
        HttpTransport(server.url, token=Tokens()) as transport,
        pytest.raises(AuthenticationError, match="said unauthorized"),
    ):
        transport.pull(PULL)
    assert len(server.received) == 2


def test_a_fixed_token_is_not_tried_twice():
    with (
        RawServer(refusal("unauthorized", "401 No")) as server,
        HttpTransport(server.url, token="fixed") as transport,
        pytest.raises(AuthenticationError),
    ):
        transport.pull(PULL)
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (ConnectionError("offline"), TransportError),
        (KeyError("keychain"), AuthenticationError),
        (SyncTimeoutError("slow"), SyncTimeoutError),
    ],
)
def test_a_provider_that_fails_is_a_sync_error(failure: Exception, error: type[SyncError]):
    def provide(refresh: bool) -> str:
        raise failure

    transport = HttpTransport("http://127.0.0.1:9", token=provide, client=NoClient())
    with pytest.raises(error):
        transport.pull(PULL)


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX-Evil: 1", "é", None, b"x"])
def test_a_provider_must_return_a_token(token: Any):
    transport = HttpTransport("http://127.0.0.1:9", token=lambda _: token, client=NoClient())
    with pytest.raises(AuthenticationError, match="returned no token"):
        transport.pull(PULL)


def test_a_provider_that_does_not_take_what_it_is_given_is_refused_at_once():
    provider: Any = lambda: "token"  # noqa: E731
    with pytest.raises(ConfigError, match="token is called with whether the server refused"):
        HttpTransport("http://127.0.0.1:9", token=provider, client=NoClient())


class NoClient:
    """A client that must not be used."""

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        raise AssertionError("a request was sent")

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("url", "insecure_allowed", "accepted"),
    [
        ("https://example.org", False, True),
        ("http://localhost:8080", False, True),
        ("http://LOCALHOST", False, True),
        ("http://127.0.0.1", False, True),
        ("http://127.3.2.1:99/sync", False, True),
        ("http://[::1]:8080", False, True),
        ("http://example.org", False, False),
        ("http://example.org", True, True),
        ("http://192.168.1.10", False, False),
        ("http://0.0.0.0", False, False),
        ("http://localhost.example.org", False, False),
        ("http://evil.localhost", False, False),
        ("http://127.0.0.1.example.org", False, False),
        ("http://[::2]", False, False),
    ],
)
def test_a_token_goes_over_plain_http_only_to_this_machine(
    url: str, insecure_allowed: bool, accepted: bool
):
    config = HttpConfig(allow_insecure_token=insecure_allowed)
    HttpTransport(url, client=NoClient(), config=config)  # without a token all are fine
    if accepted:
        HttpTransport(url, token="secret", client=NoClient(), config=config)
        return
    with pytest.raises(ConfigError, match="https://") as caught:
        HttpTransport(url, token="secret", client=NoClient(), config=config)
    assert caught.value.code == "insecure_token"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("token", ["", "a b", "tab\t", "a\r\nX: 1", "é", 7, b"bytes"])
def test_a_token_that_no_header_can_carry_is_refused(token: Any):
    with pytest.raises(ConfigError, match="token must be"):
        HttpTransport("https://example.org", token=token, client=NoClient())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "ftp://example.org",
        "http://",
        "https:///v1",
        "https://example.org:0",
        "https://example.org:99999",
        "https://example.org:x",
        "https://user:pass@example.org",
        "https://example.org/?a=1",
        "https://example.org/#top",
        "https://exa mple.org",
        "https://example.org/\r\nX: 1",
        "https://[::1",
        "https://example.org\\@evil.org",
        None,
        b"https://example.org",
    ],
)
def test_a_url_that_cannot_work_is_refused(url: Any):
    with pytest.raises(ConfigError, match="url"):
        HttpTransport(url, client=NoClient())


def test_a_password_in_a_url_is_not_repeated_in_the_error():
    with pytest.raises(ConfigError) as caught:
        HttpTransport("https://me:hunter2@example.org", client=NoClient())
    assert "hunter2" not in str(caught.value)


# -- answers that are not what they should be -------------------------------------------------


def test_a_login_page_is_retryable_and_quoted():
    page = b"<html>\x1b[31m\n<h1>Welcome to Hotel Wi-Fi</h1>" + b"x" * 5000
    error = error_of(reply(page, content_type="text/html; charset=utf-8"))
    assert (error.code, error.retryable) == ("unexpected_answer", True)
    assert "<h1>Welcome to Hotel Wi-Fi</h1>" in error.message
    assert "\x1b" not in error.message
    assert len(error.message) < 600


def test_an_answer_without_a_content_type_is_not_decoded():
    assert error_of(reply(encode(PAGE), content_type=None)).code == "unexpected_answer"


def test_a_content_type_with_a_parameter_is_still_cbor():
    with RawServer(reply(encode(PAGE), content_type="Application/CBOR; v=1")) as server:
        assert pull_from(server) == PAGE


@pytest.mark.parametrize(
    ("status", "kind", "code", "retryable"),
    [
        (400, ProtocolError, "invalid_message", False),
        (401, AuthenticationError, "unauthorized", False),
        (403, PermissionDeniedError, "forbidden", False),
        (404, ProtocolError, "not_found", False),
        (405, ProtocolError, "method_not_allowed", False),
        (408, SyncTimeoutError, "timeout", True),
        (413, ProtocolError, "too_large", False),
        (418, ProtocolError, "invalid_message", False),
        (429, ServerBusyError, "rate_limited", True),
        (500, ServerError, "server_error", True),
        (502, ServerError, "server_error", True),
        (503, ServerBusyError, "busy", True),
        (504, SyncTimeoutError, "timeout", True),
        (511, TransportError, "unexpected_answer", True),
        (204, TransportError, "unexpected_answer", True),
    ],
)
def test_a_proxys_page_means_what_its_status_says(
    status: int, kind: type[SyncError], code: str, retryable: bool
):
    body = b"" if status == 204 else b"<h1>nginx</h1>"
    error = error_of(reply(body, f"{status} X", content_type="text/html"))
    assert (type(error), error.code, error.retryable) == (kind, code, retryable)
    assert str(status) in error.message
    assert ("nginx" in error.message) == bool(body)


def test_a_proxy_that_wants_credentials_says_where_they_go():
    error = error_of(reply(b"", "407 Proxy Authentication Required"))
    assert "wants a name and a password" in error.message and "HTTP_PROXY" in error.message


@pytest.mark.parametrize(
    "status", [400, 402, 403, 404, 405, 406, 410, 411, 413, 414, 415, 416, 417, 418, 422, 431, 451]
)
def test_a_status_that_proves_that_nothing_was_decided_says_so(status: int):
    error = error_of(reply(b"<h1>nginx</h1>", f"{status} X", content_type="text/html"))
    assert (error.refused_by, error.retryable) == ("path", False)


@pytest.mark.parametrize(
    "status",
    [200, 204, 302, 401, 407, 408, 409, 421, 423, 425, 429, 499, 500, 501, 502, 503, 504, 507, 511],
)
def test_a_status_that_leaves_it_open_whether_the_server_acted_says_nothing(status: int):
    body = b"" if status == 204 else b"<h1>nginx</h1>"
    assert error_of(reply(body, f"{status} X", content_type="text/html")).refused_by is None


@pytest.mark.parametrize("code", sorted(ERROR_TABLE))
def test_the_servers_own_words_say_whether_anything_was_decided(code: str):
    error = error_of(refusal(code, f"{ERROR_TABLE[code].status} X"))
    assert error.refused_by == ("server" if code in REFUSALS else None)
    assert not (error.refused_by and error.retryable)


def test_what_the_device_finds_wrong_with_an_answer_proves_nothing():
    for error in (
        error_of(reply(b"\xff")),
        error_of(reply(encode(HANDSHAKE))),
        error_of(reply(encode(BIG_PAGE)), response_bytes_max=1024),
    ):
        assert isinstance(error, ProtocolError)
        assert error.refused_by is None


@pytest.mark.parametrize(
    ("status", "retryable", "kind", "refused_by"),
    [
        (413, False, ProtocolError, "server"),
        (422, False, ProtocolError, "server"),
        (422, True, ServerError, None),
        (429, False, ServerError, None),
        (500, False, ServerError, None),
    ],
)
def test_a_code_of_a_newer_server_is_a_refusal_if_its_status_is_one(
    status: int, retryable: bool, kind: type[SyncError], refused_by: str | None
):
    said = ErrorResponse(code="limit_exceeded", message="tomorrow's", retryable=retryable)
    error = error_of(reply(encode(said), f"{status} X"))
    assert (type(error), error.code) == (kind, "limit_exceeded")
    assert error.refused_by == refused_by


@pytest.mark.parametrize("ahead", [False, True])
def test_a_packed_body_that_is_refused_for_being_packed_is_sent_unpacked(ahead: bool):
    no = reply(b"no", "415 X", content_type="text/plain")
    yes = reply(encode(PAGE))
    with RawServer(reply(encode(welcome("gzip"))), no, yes) as server:
        transport = HttpTransport(server.url, config=HttpConfig(compression="gzip"))
        with transport:
            transport.handshake(HANDSHAKE)
            if ahead:
                transport.send_ahead(BIG_PUSH)
            with pytest.raises(ProtocolError, match="PushResponse"):
                transport.push(BIG_PUSH)
    packed, plain = server.received[1:]
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert plain.body == encode(BIG_PUSH)


@pytest.mark.parametrize(
    ("status", "retryable"), [(301, False), (302, True), (303, True), (307, True), (308, False)]
)
def test_no_redirect_is_followed(status: int, retryable: bool):
    with RawServer(reply(b"stolen")) as other:
        error = error_of(reply(status=f"{status} Moved", Location=other.url + "/v1/pull"))
    assert (error.code, error.retryable) == ("redirected", retryable)
    assert other.url in error.message
    assert other.received == []


def test_an_error_in_our_words_is_raised_with_all_it_says():
    said = ErrorResponse(
        code="rate_limited", message="slow down", retryable=True, retry_after=9.5, details={"n": 1}
    )
    error = error_of(reply(encode(said), "429 Slow", Retry_After="77"))
    assert (type(error), error.message) == (ServerBusyError, "slow down")
    assert (error.retry_after, error.details) == (9.5, {"n": 1})


def test_a_negative_wait_is_no_wait():
    said = ErrorResponse(code="busy", message="x", retryable=True, retry_after=-5.0)
    error = error_of(reply(encode(said), "503 X"))
    assert (type(error), error.retry_after or 0.0) == (ServerBusyError, 0.0)


class StoppedClock:
    """A wall clock that stands; waiting is real."""

    now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)

    def now_ms(self) -> int:
        return int(self.now.timestamp() * 1000)

    def monotonic(self) -> float:
        return 0.0

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


IN_TWO_MINUTES = format_datetime(StoppedClock.now + datetime.timedelta(minutes=2), usegmt=True)
AN_HOUR_AGO = format_datetime(StoppedClock.now - datetime.timedelta(hours=1), usegmt=True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("30", 30.0),
        (" 0 ", 0.0),
        (IN_TWO_MINUTES, 120.0),
        (AN_HOUR_AGO, 0.0),
        ("soon", None),
        ("-3", None),
        ("1.5", None),
        ("9" * 400, None),
        ("Fri, 99 Foo 2030", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("spoken", [True, False])
def test_retry_after_is_read_in_both_forms(header: str, seconds: float | None, spoken: bool):
    answer = (
        refusal("busy", "503 Busy", Retry_After=header)
        if spoken
        else reply(b"down", "503 Busy", "text/plain", Retry_After=header)
    )
    with (
        RawServer(answer) as server,
        HttpTransport(server.url, clock=StoppedClock()) as transport,
        pytest.raises(ServerBusyError) as caught,
    ):
        transport.pull(PULL)
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        ("Mon, 30 Nov 2076 12:00:00 GMT", 90.0),  # the device's clock stands at 2030
        ("Mon, 30 Nov 2076 12:02:00 GMT", 0.0),
        ("yesterday", None),
        ("", None),
    ],
)
def test_a_time_to_come_again_is_told_by_the_clock_that_named_it(date: str, seconds: float | None):
    header = "Mon, 30 Nov 2076 12:01:30 GMT"
    answer = refusal("busy", "503 Busy", Retry_After=header, Date=date)
    with (
        RawServer(answer) as server,
        HttpTransport(server.url, clock=StoppedClock()) as transport,
        pytest.raises(ServerBusyError) as caught,
    ):
        transport.pull(PULL)
    if seconds is None:  # nobody says what time it is there
        seconds = parsedate_to_datetime(header).timestamp() - StoppedClock().now_ms() / 1000
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", SyncCodecError),
        (b"\xff\xff", SyncCodecError),
        (encode(PAGE)[:-1], SyncCodecError),
        (encode(PAGE) + b"\x00", SyncCodecError),
        (encode(HANDSHAKE), ProtocolError),
        (b"\x80", ProtocolError),
    ],
)
def test_a_body_that_is_no_answer_is_a_protocol_error(body: bytes, kind: type[SyncError]):
    error = error_of(reply(body))
    assert (type(error), error.retryable) == (kind, False)
    assert "/v1/pull" in error.message and "on the way" in error.message


@pytest.mark.parametrize("status", [400, 401, 403, 406, 411, 414, 415, 418, 426, 429, 431, 451, 500,
                                    501, 502, 503, 504, 507, 520, 530])  # fmt: skip
def test_what_the_server_never_said_is_not_laid_at_its_door(status: int):
    """A web page of 403 is no right that is missing, and one of 503 no server that is busy."""
    error = error_of(reply(b"<h1>no</h1>", f"{status} X", content_type="text/html"))
    assert "something in front of the server" in error.message
    spoken = error_of(refusal("forbidden", "403 X"))
    assert "in front" not in spoken.message


def test_an_error_that_cannot_be_read_is_decided_by_its_status():
    error = error_of(reply(b"\xff\xff", "503 Busy"))
    assert (type(error), error.code) == (ServerBusyError, "busy")


# -- connections that fail --------------------------------------------------------------------


def test_half_a_body_is_a_transport_error():
    body = encode(PAGE)
    error = error_of([reply(body)[:-4], HANG_UP])
    assert (type(error), error.retryable) == (TransportError, True)


def test_no_answer_at_all_is_a_transport_error():
    assert type(error_of([HANG_UP])) is TransportError


def test_something_that_is_not_http_is_a_transport_error():
    assert type(error_of([b"SSH-2.0-OpenSSH_9.2\r\n\r\n", HANG_UP])) is TransportError


def test_an_answer_that_ends_by_hanging_up_is_not_trusted():
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/cbor\r\n\r\n"
    error = error_of([head + encode(PAGE), HANG_UP])
    assert type(error) is TransportError
    assert "without a length" in error.message


def test_a_chunked_answer_is_put_together():
    body = encode(PAGE)
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/cbor\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with RawServer(head + chunks) as server:
        assert pull_from(server) == PAGE


def test_a_port_nobody_listens_on_is_a_transport_error():
    with closed_port() as port, HttpTransport(f"http://127.0.0.1:{port}") as transport:
        with pytest.raises(TransportError, match=r"127\.0\.0\.1") as caught:
            transport.pull(PULL)
        assert type(caught.value) is TransportError
        assert not transport.connected


def test_a_server_that_falls_silent_is_a_timeout():
    error = error_of([STALL], read_timeout_s=0.05)
    assert (type(error), error.retryable) == (SyncTimeoutError, True)


def test_a_server_that_falls_silent_within_the_body_is_a_timeout():
    assert (
        type(error_of([reply(encode(PAGE))[:-4], STALL], read_timeout_s=0.05)) is SyncTimeoutError
    )


@contextlib.contextmanager
def dripping(start: bytes, drop: bytes) -> Iterator[str]:
    """A server that sends ``drop`` again and again, never silent and never done."""
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            client.sendall(start)
            while not over.wait(0.01):
                client.sendall(drop)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        thread.join(PATIENCE_S)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/cbor\r\n"


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (HEAD + b"X-Slow: ", b"x"),
        (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", b"x"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 503 No\r\n\r\n", b"x"),
    ],
)
def test_a_server_that_drips_is_cut_off_at_the_total_timeout(start: bytes, drop: bytes):
    config = HttpConfig(total_timeout_s=0.3, read_timeout_s=PATIENCE_S)
    with (
        dripping(start, drop) as url,
        HttpTransport(url, config=config) as transport,
        pytest.raises(SyncTimeoutError),
    ):
        transport.pull(PULL)


def test_a_short_timeout_counts_also_after_a_long_one():
    client = HttpxClient()
    with RawServer(reply(b"x")) as server, dripping(b"", b"HTTP/1.1 103 X\r\n\r\n") as url:
        client.request("POST", server.url, {}, b"", 600.0)
        with pytest.raises(SyncTimeoutError):
            client.request("POST", url, {}, b"", 0.3)
        client.close()


def test_a_request_works_after_one_that_timed_out():
    client = HttpxClient(HttpConfig(read_timeout_s=0.05))
    with (
        RawServer([STALL], reply(encode(PAGE))) as server,
        HttpTransport(server.url, client=client) as transport,
    ):
        with pytest.raises(SyncTimeoutError):
            transport.pull(PULL)
        client._config = HttpConfig(read_timeout_s=PATIENCE_S)  # a busy machine answers when it can
        assert transport.pull(PULL) == PAGE


@pytest.mark.parametrize("status", ["200 OK", "503 Busy"])
def test_an_answer_over_the_limit_is_not_read_to_its_end(status: str):
    # The server never finishes: only a client that stops reading at the limit gets past it.
    steps: list[Step] = [reply(b"x" * 5000, status, Content_Length="999999999"), STALL]
    error = error_of(steps, response_bytes_max=4096, read_timeout_s=PATIENCE_S)
    assert (type(error), error.code) == (ProtocolError, "too_large")


# -- compression ------------------------------------------------------------------------------

ZEROES = bytes(50_000_000)
PACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstd.compress}


def unpacked(encoding: str, body: bytes, limit: int) -> bytes:
    return packing.decompress(encoding, body, limit, "the answer", too_large)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_packed_answer_is_unpacked(encoding: str):
    packed = PACK[encoding](encode(BIG_PAGE))
    with RawServer(reply(packed, Content_Encoding=encoding)) as server:
        assert pull_from(server, compression=encoding) == BIG_PAGE
    assert server.received[0].headers["accept-encoding"] == encoding


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_bomb_goes_off_at_the_limit(encoding: str):
    packed = PACK[encoding](ZEROES)
    error = error_of(reply(packed, Content_Encoding=encoding), response_bytes_max=100_000)
    assert (type(error), error.code) == (ProtocolError, "too_large")


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_unpacking_holds_no_more_than_the_limit(encoding: str):
    with pytest.raises(ProtocolError, match="larger than"):
        unpacked(encoding, PACK[encoding](ZEROES), 1000)
    assert unpacked(encoding, PACK[encoding](bytes(1000)), 1000) == bytes(1000)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda packed: packed[:-3],
        lambda packed: packed + packed,
        lambda packed: packed + b"x",
        lambda packed: b"x" + packed,
        lambda packed: b"",
    ],
)
def test_a_broken_packing_is_a_codec_error(encoding: str, spoil: Callable[[bytes], bytes]):
    packed = spoil(PACK[encoding](encode(PAGE)))
    assert type(error_of(reply(packed, Content_Encoding=encoding))) is SyncCodecError


def test_a_zstd_window_beyond_8_mib_is_refused():
    options = {zstd.CompressionParameter.window_log: 24, zstd.CompressionParameter.checksum_flag: 1}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(bytes(range(256)) * 100_000) + compressor.flush()
    with pytest.raises(SyncCodecError, match="not the zstd that its header names"):
        unpacked("zstd", packed, 10**9)


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "x\x1bx"])
def test_a_packing_nobody_asked_for_is_a_codec_error(encoding: str):
    error = http_error(HttpResponse(200, cbor_headers(encoding), zlib.compress(encode(PAGE))))
    assert type(error) is SyncCodecError
    assert "\x1b" not in error.message


def cbor_headers(encoding: str) -> dict[str, str]:
    return {"content-type": "application/cbor", "content-encoding": encoding}


@dataclass
class Canned:
    """A client that answers from a list, and says what it was asked."""

    answers: list[HttpResponse | Exception]
    sent: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    closed: bool = False

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        self.sent.append((url, dict(headers), body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.closed = True


def canned(*messages: Any) -> Canned:
    return Canned(
        [HttpResponse(200, {"content-type": "application/cbor"}, encode(m)) for m in messages]
    )


def http_error(answer: HttpResponse | Exception) -> SyncError:
    with pytest.raises(SyncError) as caught:
        HttpTransport("http://localhost", client=Canned([answer])).pull(PULL)
    return caught.value


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (TimeoutError("slow"), SyncTimeoutError),
        (ConnectionResetError("reset"), TransportError),
        (OSError(), TransportError),
        (ProtocolError("mine"), ProtocolError),
    ],
)
def test_errors_of_another_client_become_ours(failure: Exception, kind: type[SyncError]):
    assert type(http_error(failure)) is kind


@pytest.mark.parametrize(
    ("url", "mode", "accepted"),
    [
        ("http://localhost", "auto", "identity"),
        ("http://127.0.0.1", "auto", "identity"),
        ("http://localhost", "gzip", "gzip"),
        ("https://example.org", "auto", "zstd, gzip"),
        ("https://example.org", "gzip", "gzip"),
        ("https://example.org", "zstd", "zstd"),
        ("https://example.org", "none", "identity"),
    ],
)
def test_encodings_are_offered_as_the_settings_say(url: str, mode: Any, accepted: str):
    client = canned(PAGE)
    HttpTransport(url, client=client, config=HttpConfig(compression=mode)).pull(PULL)
    assert client.sent[0][1]["Accept-Encoding"] == accepted


def test_without_the_zstd_package_gzip_is_offered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "ENCODINGS", ("gzip",))
    client = canned(PAGE)
    HttpTransport("https://example.org", client=client).pull(PULL)
    assert client.sent[0][1]["Accept-Encoding"] == "gzip"
    with pytest.raises(ConfigError, match=r'pip install "entidb\[zstd\]"'):
        HttpTransport("https://example.org", config=HttpConfig(compression="zstd"))


@pytest.mark.parametrize(
    ("features", "used"),
    [
        (["zstd", "gzip"], "zstd"),
        (["gzip", "zstd", "unheard-of"], "zstd"),
        (["gzip"], "gzip"),
        ([], None),
        (["br"], None),
    ],
)
def test_a_request_is_packed_only_as_the_server_said_it_can_read(
    features: list[str], used: str | None
):
    client = canned(PAGE, welcome(*features), PAGE)
    transport = HttpTransport("https://example.org", client=client)
    with pytest.raises(SyncError):  # before the handshake; the canned answer does not fit
        transport.push(BIG_PUSH)
    transport.handshake(HANDSHAKE)
    with pytest.raises(SyncError):
        transport.push(BIG_PUSH)
    assert "Content-Encoding" not in client.sent[0][1]
    assert client.sent[2][1].get("Content-Encoding") == used
    body = client.sent[2][2]
    plain = unpacked(used, body, 10**6) if used else body
    assert decode(PushRequest, plain) == BIG_PUSH
    assert len(body) < 1000 or used is None


def test_small_requests_are_not_packed():
    client = canned(welcome("gzip", "zstd"), PAGE)
    transport = HttpTransport("https://example.org", client=client)
    transport.handshake(HANDSHAKE)
    transport.pull(PULL)
    assert "Content-Encoding" not in client.sent[1][1]


def test_a_request_that_does_not_shrink_goes_as_it_is():
    client = canned(welcome("gzip"), PAGE)
    config = HttpConfig(compression="gzip", compression_min_bytes=0)
    transport = HttpTransport("https://example.org", client=client, config=config)
    transport.handshake(HANDSHAKE)
    tiny = PullRequest(db_id="d", device_id=ID, history=ID, cursor=0, limit=1, bytes_max=1)
    transport.pull(tiny)
    _, headers, body = client.sent[1]
    assert len(body) <= len(encode(tiny))
    assert ("Content-Encoding" in headers) == (body != encode(tiny))


# -- ahead of time ----------------------------------------------------------------------------


def test_an_answer_fetched_ahead_is_picked_up_once():
    with RawServer(reply(encode(PAGE))) as server, HttpTransport(server.url) as transport:
        transport.send_ahead(PULL)
        assert server.reached.wait(PATIENCE_S)
        assert transport.pull(PULL) == PAGE
        assert len(server.received) == 1
        assert transport.pull(PULL) == PAGE
        assert len(server.received) == 2


def test_an_error_ahead_of_time_comes_out_at_the_pick_up():
    with (
        RawServer(refusal("busy", "503 Busy"), reply(encode(PAGE))) as server,
        HttpTransport(server.url) as transport,
    ):
        transport.send_ahead(PULL)
        assert server.reached.wait(PATIENCE_S)
        with pytest.raises(ServerBusyError):
            transport.pull(PULL)
        assert transport.pull(PULL) == PAGE


def test_another_request_drops_what_was_fetched_ahead():
    client = canned(PAGE, welcome(), PAGE)
    transport = HttpTransport("http://localhost", client=client)
    ahead(transport)
    transport.handshake(HANDSHAKE)
    transport.pull(PULL)
    assert len(client.sent) == 3


def test_a_new_cycle_can_forget_what_was_fetched_ahead():
    client = canned(PAGE, PAGE)
    transport = HttpTransport("http://localhost", client=client)
    ahead(transport)
    transport.forget_ahead()
    transport.pull(PULL)
    assert len(client.sent) == 2


def ahead(transport: HttpTransport) -> None:
    transport.send_ahead(PULL)
    for thread in carriers():
        thread.join(PATIENCE_S)


def carriers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "entidb-send-ahead"]


NEXT_PULL = PullRequest(db_id="d", device_id=ID, history=ID, cursor=9, limit=10, bytes_max=1000)


def test_what_is_hinted_at_second_does_not_leave_before_the_first_is_answered():
    with RawServer([STALL]) as server, HttpTransport(server.url) as transport:
        transport.send_ahead(PULL)
        assert server.reached.wait(PATIENCE_S)
        transport.send_ahead(NEXT_PULL)
        transport.close()
    assert len(server.received) == 1


def test_what_is_hinted_at_second_leaves_by_itself_when_the_first_is_answered():
    with (
        RawServer(reply(encode(PAGE)), reply(encode(PAGE))) as server,
        HttpTransport(server.url) as transport,
    ):
        transport.send_ahead(PULL)
        transport.send_ahead(NEXT_PULL)
        for thread in carriers():
            thread.join(PATIENCE_S)
        assert len(server.received) == 2
        assert [transport.pull(PULL), transport.pull(NEXT_PULL)] == [PAGE, PAGE]
        assert len(server.received) == 2


@pytest.mark.parametrize("client", ["ours", "another"])
def test_after_a_refusal_nothing_more_leaves_by_itself(client: str):
    with RawServer(refusal("busy", "503 Busy"), reply(encode(PAGE))) as server:
        config = HttpConfig()
        inner = HttpxClient(config)
        with HttpTransport(
            server.url, client=inner if client == "ours" else PlainClient(inner), config=config
        ) as transport:
            transport.send_ahead(PULL)
            transport.send_ahead(NEXT_PULL)
            for thread in carriers():
                thread.join(PATIENCE_S)
            assert len(server.received) == 1
            with pytest.raises(ServerBusyError):
                transport.pull(PULL)
            assert transport.pull(NEXT_PULL) == PAGE


class PlainClient:
    """A client that knows nothing of ``on_sent``."""

    def __init__(self, inner: HttpxClient) -> None:
        self._inner = inner

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        return self._inner.request(method, url, headers, body, timeout_s)

    def close(self) -> None:
        self._inner.close()


def test_what_was_dropped_does_not_leave_when_its_time_comes():
    with RawServer(reply(encode(PAGE)), reply(encode(PAGE))) as server:
        held = threading.Event()

        class Slow(PlainClient):
            def request(self, *args: Any) -> HttpResponse:
                answer = super().request(*args)
                assert held.wait(PATIENCE_S)
                return answer

        transport = HttpTransport(server.url, client=Slow(HttpxClient()))
        transport.send_ahead(PULL)
        transport.send_ahead(NEXT_PULL)
        transport.forget_ahead()
        held.set()
        transport.close()
    assert len(server.received) <= 1


# -- the end ----------------------------------------------------------------------------------


def test_closing_ends_a_request_that_is_under_way_and_joins_the_thread():
    with RawServer([STALL]) as server:
        transport = HttpTransport(server.url, config=HttpConfig(read_timeout_s=PATIENCE_S))
        transport.send_ahead(PULL)
        assert server.reached.wait(PATIENCE_S)
        transport.close()
        assert not server.over.is_set()
        assert not carriers()


def test_a_request_interrupted_by_close_is_a_state_error():
    caught: list[BaseException] = []

    def pull(transport: HttpTransport) -> None:
        try:
            transport.pull(PULL)
        except SyncError as error:
            caught.append(error)

    with RawServer([STALL]) as server:
        transport = HttpTransport(server.url, config=HttpConfig(read_timeout_s=PATIENCE_S))
        thread = threading.Thread(target=pull, args=(transport,))
        thread.start()
        assert server.reached.wait(PATIENCE_S)
        transport.close()
        thread.join(PATIENCE_S)
    assert [type(error) for error in caught] == [SyncStateError]
    assert not transport.connected


def test_closing_closes_the_client_and_nothing_is_sent_afterwards():
    client = canned(PAGE)
    transport = HttpTransport("http://localhost", client=client)
    transport.close()
    transport.close()
    assert client.closed
    with pytest.raises(SyncStateError):
        transport.pull(PULL)
    transport.send_ahead(PULL)
    assert client.sent == []


def test_a_closed_client_says_so():
    client = HttpxClient()
    client.close()
    client.close()
    with pytest.raises(SyncStateError):
        client.request("POST", "http://127.0.0.1:9/", {}, b"", 1.0)


def test_no_thread_outlives_its_transport():
    before = set(threading.enumerate())
    with RawServer(reply(encode(PAGE))) as server, HttpTransport(server.url) as transport:
        transport.send_ahead(PULL)
        transport.pull(PULL)
    assert set(threading.enumerate()) <= before


def test_this_machine_is_never_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch):
    with RawServer(reply(b"stolen")) as proxy, RawServer(reply(encode(PAGE))) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("all_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert pull_from(server) == PAGE
    assert proxy.received == []


def test_another_machine_is_reached_through_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with RawServer(reply(encode(PAGE))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with HttpTransport("http://entidb.invalid/sync") as transport:
            assert transport.pull(PULL) == PAGE
    assert proxy.received[0].path == "http://entidb.invalid/sync/v1/pull"


# -- TLS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key, as one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_certificate_nobody_vouches_for_is_refused_for_good(server_tls: ssl.SSLContext):
    with (
        RawServer(reply(encode(PAGE)), tls=server_tls) as server,
        HttpTransport(server.url, token="secret") as transport,
        pytest.raises(TlsError, match="certificate") as caught,
    ):
        transport.pull(PULL)
    assert (caught.value.code, caught.value.retryable) == ("tls_error", False)
    assert "clock" in caught.value.message
    assert server.received == []


def test_a_certificate_of_ones_own_authority_is_accepted(
    server_tls: ssl.SSLContext, certificate: Path
):
    context = ssl.create_default_context(cafile=certificate)
    with RawServer(reply(encode(PAGE)), tls=server_tls) as server:
        client = HttpxClient(ssl_context=context)
        with HttpTransport(server.url, token="secret", client=client) as transport:
            assert [transport.pull(PULL) for _ in range(2)] == [PAGE, PAGE]
    assert [sent.connection for sent in server.received] == [0, 0]


def test_closing_ends_a_request_over_tls_too(server_tls: ssl.SSLContext, certificate: Path):
    context = ssl.create_default_context(cafile=certificate)
    with RawServer([STALL], tls=server_tls) as server:
        transport = HttpTransport(server.url, client=HttpxClient(ssl_context=context))
        transport.send_ahead(PULL)
        assert server.reached.wait(PATIENCE_S)
        transport.close()
        assert not carriers()


def test_plain_http_on_a_tls_port_is_retryable_and_no_certificate_error():
    with (
        dripping(b"HTTP/1.1 400 Bad Request\r\n\r\n", b"x") as url,
        HttpTransport(url.replace("http:", "https:")) as transport,
        pytest.raises(TransportError) as caught,
    ):
        transport.pull(PULL)
    assert type(caught.value) is TransportError


@pytest.mark.parametrize("sent", [False, True])
def test_a_connection_cut_before_all_was_sent_proves_that_nothing_arrived(sent: bool) -> None:
    body = b"x" * (10 if sent else 64 << 20)  # far above what the system's buffers take
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def cut() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                if sent:
                    connection.settimeout(1)
                    with contextlib.suppress(TimeoutError):
                        connection.recv(65536)

        thread = threading.Thread(target=cut)
        thread.start()
        client = HttpxClient()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/push"
        with pytest.raises(TransportError) as caught:
            client.request("POST", url, {}, body, 30.0)
        thread.join()
        client.close()
    assert caught.value.refused_by == (None if sent else "path")
