"""The seam between the cycle and the network, and the transports that need no network.

    cycle ── SyncRequest ──▶ SyncTransport ──┬── HttpTransport ──▶ HttpClient ──┬── HttpxClient
          ◀─ SyncResponse ──                 │     (http)                       └── LoopbackClient
                                             └── MockTransport                        │
                                                                         LoopbackServer, in process

A transport moves messages and turns everything that can go wrong into a ``SyncError``. It never
decides what to do about one: retrying, backoff and the meaning of an answer belong to the cycle and
its driver. HTTP itself, bytes and compression are the subject of ``http``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar
from urllib.parse import urlsplit

from entidb.errors import (
    ConfigError,
    ProtocolError,
    SyncCancelledError,
    SyncError,
    SyncStateError,
    TransportError,
    error_from_code,
)
from entidb.protocol import (
    DigestResponse,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    Manifest,
    PullRequest,
    PullResponse,
    PushRequest,
    PushResponse,
    RoundResponse,
    SyncRequest,
    SyncResponse,
    response_type,
)

#: What a transport hands out: an ``ErrorResponse`` has become an exception on the way.
Answer = HandshakeResponse | PullResponse | PushResponse | RoundResponse | DigestResponse | Manifest

_A = TypeVar("_A", HandshakeResponse, PullResponse, PushResponse)


class SyncTransport(Protocol):
    """Carries the messages of one device to one server.

    - ``send`` and the three named methods return the answer that belongs to the request, or
      raise a ``SyncError``; an ``ErrorResponse`` of the server is raised as the class its code
      has in ``entidb.errors.ERROR_TABLE``, with its ``retry_after`` and ``details``.
    - An exception says nothing about whether the server got the request. Every request can be
      sent again (R14).
    - ``connected`` is true from an exchange that brought its answer until a ``TransportError`` or
      ``close``; a refusal does not change it. While it is false a handshake is due (R10).
    - One request at a time, from one thread at a time; ``close`` may come from any thread, ends
      a request that is under way with a ``SyncError``, and may be called again.
    - A transport that has a method ``interrupt()`` promises: it may come from any thread and from a
      signal handler, returns at once, and makes the ``send`` that is under way, and every one until
      the next ``forget_ahead``, raise ``SyncCancelledError`` within 100 ms. Its connection is
      closed. The engine calls ``send`` of a transport without it on a thread of its own, which it
      leaves to itself when the program stops it; no other ``send`` begins before that one ends.
    - A transport that has ``interrupt()`` and a method ``fetch(Fetch)`` brings segments (R35): when
      ``fetch`` returns, the first of them is in the files that it was given, as long as it was
      said to be; what it holds the caller finds out. It raises a ``SyncError``, or an ``OSError``
      of the files, and keeps what came; ``interrupt`` ends it as it ends ``send``. Over a transport
      without it, or with an attribute ``fetches`` that is false, a first sync comes in pages.
    - One that has a method ``begin_cycle()`` is asked by it where a cycle begins, in the place of
      ``connected``: it is false, too, where the token is another person's than before (R36).
    """

    @property
    def connected(self) -> bool: ...

    def send(self, request: SyncRequest) -> Answer: ...

    def handshake(self, request: HandshakeRequest) -> HandshakeResponse: ...

    def pull(self, request: PullRequest) -> PullResponse: ...

    def push(self, request: PushRequest) -> PushResponse: ...

    def send_ahead(self, request: SyncRequest) -> None:
        """A hint: ``request`` will be what is sent next, or after what was hinted at before. A
        transport may start on it as soon as that one has been answered, never earlier; its answer
        or error comes out of the next ``send`` of an equal request. Any other ``send``, and
        ``forget_ahead``, drop it. Raises nothing."""
        ...

    def forget_ahead(self) -> None:
        """Drop what ``send_ahead`` started: call it where a cycle begins, so that no older answer
        is mistaken for a fresh one."""
        ...

    def close(self) -> None: ...


class BaseTransport(ABC):
    """A ``SyncTransport`` without ``_exchange``: bookkeeping and the checks that all transports
    share."""

    def __init__(self) -> None:
        self._connected = False
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._connected

    def handshake(self, request: HandshakeRequest) -> HandshakeResponse:
        return _expect(HandshakeResponse, self.send(request))

    def pull(self, request: PullRequest) -> PullResponse:
        return _expect(PullResponse, self.send(request))

    def push(self, request: PushRequest) -> PushResponse:
        return _expect(PushResponse, self.send(request))

    def send(self, request: SyncRequest) -> Answer:
        self._check_open()
        try:
            answer = check_response(request, self._exchange(request))
        except (TransportError, SyncCancelledError):
            self._connected = False
            raise
        self._connected = not self._closed
        return answer

    @abstractmethod
    def _exchange(self, request: SyncRequest) -> SyncResponse:
        """One request, one answer; ``TransportError`` if no answer of the server came back."""

    # Only a hint, so doing nothing about it is a complete answer.
    def send_ahead(self, request: SyncRequest) -> None:
        return None

    def forget_ahead(self) -> None:
        return None

    def close(self) -> None:
        self._closed = True
        self._connected = False

    def _check_open(self) -> None:
        if self._closed:
            raise SyncStateError("the transport is closed: make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_response(request: SyncRequest, response: SyncResponse) -> Answer:
    """The answer if it is one to ``request``; raises the error that an ``ErrorResponse``
    reports."""
    if isinstance(response, ErrorResponse):
        raise error_from_response(response)
    if not isinstance(response, response_type(request)):
        raise ProtocolError(
            f"the answer to a {type(request).__name__} was a {type(response).__name__}"
        )
    return response


#: Characters that a device keeps of a server's message: enough for every honest one.
CODE_CHARS_MAX = 64
MESSAGE_CHARS_MAX = 1000


def printable(text: str) -> str:
    """Without what could steer a terminal or forge a line of a log."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def error_from_response(response: ErrorResponse) -> SyncError:
    """The exception for a server's error, cut to a length and to characters that can be shown: a
    terminal will show it, and the server may be a stranger's."""
    return error_from_code(
        printable(response.code[:CODE_CHARS_MAX]).replace(" ", "_") or "server_error",
        printable(response.message[:MESSAGE_CHARS_MAX]),
        # A negative time would be a wait that has no end in some schedulers.
        retry_after=None if response.retry_after is None else max(response.retry_after, 0.0),
        details=dict(response.details),
    )


def _expect(kind: type[_A], answer: Answer) -> _A:
    assert isinstance(answer, kind), answer  # ``send`` has checked it
    return answer


#: One step of a script: what to answer, what to raise, or a function that does either.
MockStep = SyncResponse | BaseException | Callable[[SyncRequest], SyncResponse]


class MockTransport(BaseTransport):
    """A transport for tests, with a script or a function in the place of the server.

    ``script`` is either a list of steps, one per request: an answer (an ``ErrorResponse`` is
    raised as over any transport), an exception to raise, or a function of the request; or one
    function that answers every request. ``requests`` holds what was sent, in order. A request
    beyond the end of the script is an ``AssertionError``, so is ``assert_done`` while steps are
    left: both are mistakes of a test and not of a network, and no retry may swallow them.
    """

    def __init__(self, script: Iterable[MockStep] | Callable[[SyncRequest], SyncResponse]) -> None:
        super().__init__()
        self.requests: list[SyncRequest] = []
        given: object = script
        if not callable(given) and not isinstance(given, Iterable):
            kind = type(given).__name__
            raise ConfigError(f"script is a list of steps or a function of requests, not {kind}")
        self._function = script if callable(script) else None
        self._steps = [] if callable(script) else list(script)

    @property
    def closed(self) -> bool:
        return self._closed

    def _exchange(self, request: SyncRequest) -> SyncResponse:
        self.requests.append(request)
        step: MockStep = self._function if self._function is not None else self._next(request)
        if isinstance(step, BaseException):
            raise step
        return step(request) if callable(step) else step

    def _next(self, request: SyncRequest) -> MockStep:
        if not self._steps:
            raise AssertionError(
                f"request {len(self.requests)} is beyond the end of the script: {request!r}"
            )
        return self._steps.pop(0)

    def assert_done(self) -> None:
        """Raise ``AssertionError`` unless every step of the script was used."""
        if self._steps:
            raise AssertionError(f"{len(self._steps)} steps left, the next is {self._steps[0]!r}")


@dataclass(frozen=True)
class HttpResponse:
    """An answer as it came: ``headers`` by lower-case name, ``body`` still in whatever
    ``content-encoding`` they name."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


#: Takes an answer as it comes: what is known before its body, without it, and each part of that.
Sink = Callable[[HttpResponse, bytes], None]
#: The statuses of answers that go into a ``Sink``.
SINKS: Final = (200, 206)


class HttpClient(Protocol):
    """The little of HTTP that ``HttpTransport`` needs; any client library can be wrapped in it.

    - ``request`` sends exactly these headers (and Host and Content-Length), follows no redirect,
      and returns any status as an answer. ``timeout_s`` bounds the whole exchange.
    - The body is returned as it was on the wire. A client that unpacks it by itself has to bound
      that by itself, and to leave ``content-encoding`` out of the headers it returns.
    - If no answer comes, it raises a ``SyncError``, ``TimeoutError`` or another ``OSError``.
    - ``request`` can be called from two threads at once. ``close`` ends both with an error.
    - A client whose ``tells_when_sent`` is true takes one more argument, the keyword ``on_sent``:
      called without arguments, on the thread that sends, when the whole request has been handed to
      the system. It must not raise.
    - A client with a method ``interrupt()`` ends with ``SyncCancelledError``, within 100 ms, every
      request that is under way and every one that begins before its method ``resume()`` is called;
      the connections of those are closed. Both return at once and may come from any thread.
      Requests of a client without them run on threads of their own, and the engine leaves those to
      themselves when the program stops it.
    - A part of a segment (R35) is asked for with the method ``GET``, an empty body, a query in the
      URL and the header ``Range``; any error that is none of those above means that this client
      cannot. One that says so first, with an attribute ``gets`` that is false, is not asked: a
      first sync comes in pages then.
    - A client whose ``takes_sink`` is true takes the keyword ``sink``: called with the head and
      each part of an answer of a status in ``SINKS``, on the thread that asks, which returns the
      answer without a body then. What it raises ends the request. It can be called from three
      threads at once.
    """

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse: ...

    def close(self) -> None: ...


class HttpAnswer(Protocol):
    """What a ``LoopbackServer`` answers with: anything with these three, because the server's
    package does not know the device's."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def body(self) -> bytes: ...


class LoopbackServer(Protocol):
    """What a server in the same process must offer: HTTP without the wire.

    ``path`` is the path of the URL ("/v1/pull"), with its query if it has one, ``headers`` have
    lower-case names, ``body`` is as the client sent it, compressed or not. Every refusal is an
    answer; an exception is a bug of the server, and passes through the client unchanged. Called
    from any thread.
    """

    def handle_http(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> HttpAnswer: ...


class LoopbackClient:
    """An ``HttpClient`` that calls straight into a server in this process.

    Everything above the socket is real: messages, headers, tokens, compression, errors.
    Use it with a loopback URL: ``HttpTransport("http://localhost", client=LoopbackClient(s))``.
    """

    def __init__(self, server: LoopbackServer) -> None:
        self._server = server
        self._closed = False

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> HttpResponse:
        if self._closed:
            raise SyncStateError("the client is closed: make a new one")
        parts = urlsplit(url)
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        lower = dict(zip(map(str.lower, headers), headers.values(), strict=True))
        answer = self._server.handle_http(method, path, lower, body)
        names = dict(zip(map(str.lower, answer.headers), answer.headers.values(), strict=True))
        return HttpResponse(answer.status, names, answer.body)

    def close(self) -> None:
        """Closes this client. The server does not belong to it, and stays open."""
        self._closed = True
