"""The client that ships: bytes over sockets, by the library ``httpx2``.

``transport`` knows what the bytes are; this room knows connections, deadlines, and how to end what
is under way.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import httpx2

from entidb.errors import SyncCancelledError, SyncStateError, TransportError
from entidb.sync.config import HttpConfig
from entidb.sync.http.address import is_loopback
from entidb.sync.http.failures import (
    FOREIGN,
    client_closed,
    cut_short,
    overdue,
    too_large,
    translated,
)
from entidb.sync.http.steps import NewConnectionError, Steps
from entidb.sync.http.surroundings import (
    authorities_error,
    check_authorities,
    proxy_before,
    proxy_to,
)
from entidb.sync.http.watchdog import Watchdog
from entidb.sync.interrupt import Interrupts, Watch
from entidb.sync.transport import SINKS, HttpResponse, Sink
from entidb.types import Clock, check_clock

Client = TypeVar("Client", bound="HttpxClient")
_FRAMED: Final = frozenset(("content-length", "transfer-encoding"))


@dataclass(frozen=True)
class _Route:
    """What is known about a URL after it was used once."""

    url: httpx2.URL
    host: str
    transport: httpx2.HTTPTransport


@dataclass(frozen=True)
class _Exchange:
    """What is asked of ``HttpxClient``."""

    url: str
    route: _Route
    method: str
    headers: Mapping[str, str]
    body: bytes
    timeout_s: float
    on_sent: Callable[[], None] | None
    sink: Sink | None = None


class HttpxClient:
    """The ``HttpClient`` that ships: HTTP/1.1 over kept connections, certificates verified.

    It goes below the library's ``Client``, which would add cookies, redirects and unpacking without
    a bound, none of which is wanted here. It takes proxies from the environment as the standard
    library does, but never for this machine itself: the exemption that lets a token go to
    ``http://localhost`` would not hold if a proxy on another machine came between. ``ssl_context``
    replaces the system's certificate authorities. Thread-safe.
    """

    #: ``request`` takes ``on_sent``: see ``HttpClient``.
    tells_when_sent: Final = True
    #: And ``sink``.
    takes_sink: Final = True

    def __init__(
        self,
        config: HttpConfig | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config or HttpConfig()
        self._ssl_context = ssl_context
        self._clock = check_clock(clock)
        # Re-entrant for signal handlers that close or interrupt.
        self._lock = threading.RLock()
        self._routes: dict[str, _Route] = {}
        self._transports: dict[str, httpx2.HTTPTransport] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._interrupts = Interrupts()
        self._watchdog = Watchdog(self._clock, self._cut_all)
        self._closed = False

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        timeout_s: float,
        *,
        on_sent: Callable[[], None] | None = None,
        sink: Sink | None = None,
    ) -> HttpResponse:
        """See ``HttpClient``. Raises ``TransportError``, ``SyncTimeoutError``, ``TlsError`` (not
        retryable), or ``ProtocolError`` ``too_large`` for a body over ``response_bytes_max``."""
        if self._closed:
            raise client_closed()
        watch = self._interrupts.begin()
        try:
            watch.check()
            route = self._routes.get(url) or self._open_route(url)
            exchange = _Exchange(url, route, method, headers, body, timeout_s, on_sent, sink)
            try:
                steps = Steps(self.remember, watch, on_sent, connects=False)
                return self._attempt(exchange, steps)
            except NewConnectionError:
                return self._connect_apart(exchange)
        except Exception:
            raise
        except BaseException:  # Ctrl-C
            self._begin_anew()
            raise
        finally:
            self._interrupts.end(watch)

    def _begin_anew(self) -> None:
        """Let go of all connections: what ended in the middle of the library may have left a lock
        of its pool behind, for which every later request would wait for ever."""
        with self._lock:
            self._routes.clear()
            self._transports.clear()
            sockets = list(self._sockets)
        self._cut_all()
        for each in sockets:  # nobody else closes them
            with contextlib.suppress(OSError):
                each.close()

    def twin(self, kind: type[Client]) -> Client:
        """A client of that kind with the same settings, and connections of its own."""
        return kind(self._config, ssl_context=self._ssl_context, clock=self._clock)

    def _connect_apart(self, exchange: _Exchange) -> HttpResponse:
        """A request that needs a new connection, on a thread of its own: nothing can interrupt
        looking up the name, connecting and the TLS handshake, so ``stop`` leaves that thread to
        itself. The thread then closes what it has connected."""

        def work(watch: Watch) -> HttpResponse:
            steps = Steps(self.remember, watch, exchange.on_sent, connects=True)
            return self._attempt(exchange, steps)

        try:
            return self._interrupts.call(work, "entidb-connect")
        except SyncCancelledError:
            self._check_not_closed()
            raise

    def _attempt(self, exchange: _Exchange, steps: Steps) -> HttpResponse:
        url, timeout_s = exchange.url, exchange.timeout_s
        ticket = self._watchdog.watch(timeout_s)
        try:
            response = self._send(exchange, steps)
        except FOREIGN as error:
            self._check_not_closed(error)
            steps.watch.check()
            if self._watchdog.struck(ticket):
                raise overdue(url, timeout_s) from error
            if steps.cut_short and isinstance(
                error, httpx2.NetworkError | httpx2.RemoteProtocolError
            ):
                raise cut_short(url) from error
            raise translated(error, url, proxy_before(url)) from error
        finally:
            steps.end()
            late = self._watchdog.done(ticket)
        steps.watch.check()  # what was cut can look complete
        if late:
            raise overdue(url, timeout_s)
        return response

    def _check_not_closed(self, cause: Exception | None = None) -> None:
        if self._closed:
            raise SyncStateError("the client was closed during the request") from cause

    def interrupt(self) -> None:
        """End all requests with ``SyncCancelledError``, also those that begin before ``resume``;
        their connections are closed."""
        self._interrupts.interrupt()
        self._cut_all()

    def resume(self) -> None:
        """After ``interrupt``: what begins from now on is carried out."""
        self._interrupts.clear()

    def open(self, url: str) -> None:
        """Make ready for requests to ``url``; nothing is sent, and no connection made."""
        self._open_route(url)

    def _send(self, exchange: _Exchange, steps: Steps) -> HttpResponse:
        route, body = exchange.route, exchange.body
        length = ("Content-Length", str(len(body)))
        request = httpx2.Request(
            exchange.method,
            route.url,
            headers=[("Host", route.host), *exchange.headers.items(), length],
            stream=httpx2.ByteStream(body),
            extensions={"timeout": self._timeouts(exchange.timeout_s), "trace": steps},
        )
        response = route.transport.handle_request(request)
        try:
            names = {
                name.decode("latin-1").lower(): value.decode("latin-1")
                for name, value in response.headers.raw
            }
            if response.status_code == 200 and not _FRAMED & names.keys():
                raise TransportError(
                    f"{route.url} answered without a length, so a cut would look like its end"
                )
            head = HttpResponse(response.status_code, names)
            if exchange.sink is not None and response.status_code in SINKS:
                assert isinstance(response.stream, httpx2.SyncByteStream)
                for part in response.stream:
                    exchange.sink(head, part)
                return head
            return HttpResponse(response.status_code, names, self._read(response))
        finally:
            response.close()

    def _read(self, response: httpx2.Response) -> bytes:
        limit = self._config.response_bytes_max
        assert isinstance(response.stream, httpx2.SyncByteStream)
        parts: list[bytes] = []
        size = 0
        for part in response.stream:
            size += len(part)
            if size > limit:
                raise too_large(limit)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _timeouts(self, total_s: float) -> dict[str, float]:
        read_s = min(self._config.read_timeout_s, total_s)
        connect_s = min(self._config.connect_timeout_s, total_s)
        return {"connect": connect_s, "read": read_s, "write": read_s, "pool": connect_s}

    # -- routes -------------------------------------------------------------------------------

    def _open_route(self, url: str) -> _Route:
        with self._lock:
            if self._closed:
                raise client_closed()
            target = httpx2.URL(url)
            origin = f"{target.scheme}://{target.netloc.decode('ascii')}"
            transport = self._transports.get(origin)
            if transport is None:
                transport = self._transports[origin] = self._open_transport(target)
            if len(self._routes) >= 256:  # one server has three
                self._routes.clear()
            route = _Route(target, target.netloc.decode("ascii"), transport)
            self._routes[url] = route
            return route

    def _open_transport(self, url: httpx2.URL) -> httpx2.HTTPTransport:
        proxy = None if is_loopback(url.host) else proxy_to(url.scheme, url.host)
        verify: ssl.SSLContext | bool = self._ssl_context or True
        if url.scheme == "http" and (proxy is None or not proxy.startswith("https:")):
            # No TLS here, so reading the authorities (tens of milliseconds) would be wasted.
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        elif verify is True:
            check_authorities()
        try:
            transport = httpx2.HTTPTransport(verify=verify, proxy=proxy)
        except OSError as error:  # ssl.SSLError too
            raise authorities_error(error) from error
        from entidb.sync.http.joined import join_writes  # loads what a first connection needs

        join_writes(transport)
        return transport

    # -- ending what is under way -------------------------------------------------------------

    def remember(self, connection: socket.socket) -> None:
        """Know a new connection, to be cut. Raises ``SyncStateError`` when closed meanwhile."""
        with self._lock:
            self._sockets.add(connection)
        self._check_not_closed()

    def _cut_all(self) -> None:
        """Wake every thread that waits for a socket. Closing one would not: on Linux a poll goes
        on when another thread closes what it polls."""
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            with contextlib.suppress(OSError):  # already gone
                # Not SSLSocket's own, which first takes the TLS state away from the reader.
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            transports = list(self._transports.values())
            self._transports.clear()
            self._routes.clear()
        self.interrupt()
        self._watchdog.close()
        for transport in transports:
            transport.close()


def ready_client(config: HttpConfig, clock: Clock, url: str) -> HttpxClient:
    """The default client, with everything loaded that it needs for ``url``: the library loads
    most of itself with the first connection, which would be in the middle of the first sync."""
    client = HttpxClient(config, clock=clock)
    client.open(url)
    return client
