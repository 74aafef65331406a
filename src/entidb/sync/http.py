"""Sync messages over HTTP: addresses, tokens, compression, sizes, and every way it can go wrong.

``HttpTransport`` says what goes into a request and what an answer means; ``HttpxClient`` moves it
over sockets, and is the only code that knows the client library. Retrying, and what an error
means for the outbox, live elsewhere. The normative text is ``docs/protocol.md``, "HTTP".

A server may be hostile, or not be one of ours at all (a hotel's login page, a proxy's error
page): an answer costs at most ``response_bytes_max`` bytes on the wire, the same again unpacked,
and ``total_timeout_s``; no redirect is followed, so a token goes to the URL's host and to no
other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import ipaddress
import itertools
import os
import re
import socket
import ssl
import threading
import urllib.request
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import httpx2

from entidb.db.listeners import check_plain
from entidb.errors import (
    ERROR_TABLE,
    AuthenticationError,
    ConfigError,
    ProtocolError,
    SyncCancelledError,
    SyncCodecError,
    SyncError,
    SyncStateError,
    SyncTimeoutError,
    TlsError,
    TransportError,
)
from entidb.protocol import (
    CONTENT_TYPE,
    PATHS,
    ErrorResponse,
    HandshakeResponse,
    SyncRequest,
    SyncResponse,
    decode,
    decode_response,
    encode,
)
from entidb.sync.config import HttpConfig
from entidb.sync.interrupt import Interrupts, Watch
from entidb.sync.transport import (
    BaseTransport,
    HttpClient,
    HttpResponse,
    error_from_response,
    printable,
)
from entidb.types import Clock, Entropy, SystemClock, system_entropy
from entidb.version import VERSION

__all__ = ["HttpClient", "HttpResponse", "HttpTransport", "HttpxClient", "Token"]

#: A bearer token, or what gives one: called with False before every request, so it should answer
#: from memory, and with True when the server refused the last one.
Token = str | Callable[[bool], str]

#: Foreign exceptions and ours, first match wins. The message is theirs, the class decides.
_EXCEPTIONS: Final[tuple[tuple[type[Exception], type[SyncError]], ...]] = (
    (httpx2.TimeoutException, SyncTimeoutError),
    (httpx2.UnsupportedProtocol, ProtocolError),
    (httpx2.LocalProtocolError, ProtocolError),
    (httpx2.TransportError, TransportError),
    (httpx2.InvalidURL, ProtocolError),
    (UnicodeError, ProtocolError),
    (TimeoutError, SyncTimeoutError),
    (OSError, TransportError),
)
_FOREIGN: Final = tuple(foreign for foreign, _ in _EXCEPTIONS)

#: What happened, by what stands in the chain of causes; first match wins.
_CAUSES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (httpx2.ConnectTimeout, "no connection within connect_timeout_s"),
    (httpx2.ReadTimeout, "no answer within read_timeout_s"),
    (httpx2.WriteTimeout, "the request could not be sent within read_timeout_s"),
    (httpx2.PoolTimeout, "no connection was free within connect_timeout_s"),
    (socket.gaierror, "the name of the host is not known: check the URL, and the network"),
    (ConnectionRefusedError, "nothing listens there: check the URL, and whether the server runs"),
    (ConnectionResetError, "the connection was cut"),
    (BrokenPipeError, "the connection was cut"),
    (UnicodeError, "the name of the host cannot be one: check the URL"),
)
#: How OpenSSL says that what it read is no TLS.
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE",
                   "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")  # fmt: skip
#: What the library says of a TLS alert that it takes for a status line: the second, when the first
#: byte is none that a line can begin with.
_TLS_RECORDS: Final = (r"\x15\x03", "illegal request line")
#: How servers of TLS answer a request in the clear, in words.
_WANTS_TLS: Final = re.compile(rb"HTTPS (port|server)", re.IGNORECASE)
#: Variables that name other certificate authorities, in the order in which they count.
_AUTHORITIES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")

#: What a status means when the body does not say it in our words. Anything else of 5xx may pass
#: (a proxy whose server restarts), anything else of 4xx will not.
_STATUS_CODES: Final[dict[int, str]] = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "unsupported_media_type",
    429: "rate_limited",
    503: "busy",
    504: "timeout",
    507: "storage_full",
}
#: Statuses of 4xx that say nothing for good: who asks, how often, and what passes by itself.
_PASSING: Final = frozenset((401, 407, 408, 409, 421, 423, 425, 429, 499))
_UNSUPPORTED_MEDIA_TYPE: Final = 415
#: A login page redirects for the moment; these two say that the URL is wrong for good.
_MOVED_FOR_GOOD: Final = (301, 308)
_NETWORK_LOGIN_REQUIRED: Final = 511  # RFC 6585, section 6

_SNIPPET_MAX: Final = 200
_GZIP_LEVEL: Final = 1  # level 6 packs a tenth better at a third of the speed
_ZSTD_LEVEL: Final = 3
_ZSTD_WINDOW_LOG_MAX: Final = 23  # 8 MiB, what RFC 9659 lets a content encoding ask for
_GZIP_WBITS: Final = 16 + zlib.MAX_WBITS
_JOIN_S: Final = 5.0
#: Requests known ahead of time: the one under way and the one after it.
_AHEAD_MAX: Final = 2
#: Seconds that whoever sends ahead lets the request get on its way before going on with other
#: work: enough for a local network, little for one on which sending itself takes long.
_SENDING_S: Final = 0.05
_FRAMED: Final = frozenset(("content-length", "transfer-encoding"))
_BAD_URL: Final = re.compile(r"[\x00-\x20\x7f\\]")
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")


class HttpTransport(BaseTransport):
    """A ``SyncTransport`` that posts canonical CBOR to ``url``.

    ``url`` is the address the server's app stands at, with a path if it is mounted under one
    (``https://example.org/sync``). ``token`` is sent as ``Authorization: Bearer``; see ``Token``.
    On 401 a function is asked once for a fresh one and the request sent once more. ``client``
    moves the bytes, an ``HttpxClient`` by default, and is closed with the transport. ``config``
    may be a ``SyncConfig``.

    Raises ``ConfigError`` for a URL or a token that cannot work, with code ``insecure_token`` for
    a token that would cross a network readable by anybody on the way.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token | None = None,
        client: HttpClient | None = None,
        config: HttpConfig | None = None,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
    ) -> None:
        super().__init__()
        self._config = config or HttpConfig()
        self._clock = clock or SystemClock()
        base, host = _check_url(url)
        _check_token(token, base, host, self._config)
        self._token = token
        self._token_lock = threading.Lock()
        self._urls: dict[type, str] = {kind: base + path for path, kind in PATHS.items()}
        self._client = client or _ready_client(self._config, self._clock, base)
        #: Encodings this side can undo, best first, and the one it packs requests with.
        self._encodings = _encodings(self._config.compression, _is_loopback(host))
        self._request_encoding: str | None = None
        #: False once a packed request was refused for being packed.
        self._packs = True
        self._headers = {
            "Content-Type": CONTENT_TYPE,
            "Accept": CONTENT_TYPE,
            "Accept-Encoding": ", ".join(self._encodings) or "identity",
            "User-Agent": f"entidb/{VERSION}",
        }
        self._request_ids = itertools.count(1)
        self._request_id_prefix = entropy(8).hex()
        tells = getattr(self._client, "tells_when_sent", False)
        self._carrier = _Carrier(self._clock, tells)
        self._interrupts = Interrupts()
        self._interrupt_client: Callable[[], None] | None
        self._interrupt_client = getattr(self._client, "interrupt", None)

    # -- sending ------------------------------------------------------------------------------

    def _exchange(self, request: SyncRequest) -> SyncResponse:
        ahead = self._carrier.take(request)
        if ahead is not None:
            response = ahead.result(self._interrupts)
        else:
            response = self._carry(request, *self._packed(encode(request)))
        if response.status == _UNSUPPORTED_MEDIA_TYPE and self._request_encoding is not None:
            # The server takes packed bodies, but something before it does not.
            self._packs, self._request_encoding = False, None
            response = self._carry(request, *self._packed(encode(request)))
        return self._understood(request, response)

    def _understood(self, request: SyncRequest, response: HttpResponse) -> SyncResponse:
        answer = self._read(request, response)
        if isinstance(answer, HandshakeResponse) and self._packs:
            self._request_encoding = _first_of(self._encodings, answer.features)
        return answer

    def _carry(
        self,
        request: SyncRequest,
        headers: dict[str, str],
        body: bytes,
        on_sent: Callable[[], None] | None = None,
    ) -> HttpResponse:
        response = self._post(request, headers, body, refresh=False, on_sent=on_sent)
        if response.status == 401 and callable(self._token):
            response = self._post(request, headers, body, refresh=True)
        return response

    def _post(
        self,
        request: SyncRequest,
        headers: dict[str, str],
        body: bytes,
        *,
        refresh: bool,
        on_sent: Callable[[], None] | None = None,
    ) -> HttpResponse:
        headers["X-Request-Id"] = f"{self._request_id_prefix}-{next(self._request_ids)}"
        if self._token is not None:
            headers["Authorization"] = "Bearer " + self._ask_token(refresh=refresh)
        url = self._urls[type(request)]
        telling = {} if on_sent is None else {"on_sent": on_sent}
        timeout_s = self._config.total_timeout_s
        client = self._client
        try:
            if self._interrupt_client is not None:
                return client.request("POST", url, headers, body, timeout_s, **telling)
            return self._interrupts.call(
                lambda _: client.request("POST", url, headers, body, timeout_s, **telling),
                "entidb-request",
            )
        except _FOREIGN as error:
            raise _translated(error, url) from error

    def _packed(self, body: bytes) -> tuple[dict[str, str], bytes]:
        """Headers of a new request and the body, packed where that is agreed on and pays."""
        headers = dict(self._headers)
        encoding = self._request_encoding
        if encoding is None or len(body) < self._config.compression_min_bytes:
            return headers, body
        packed = _compress(encoding, body)
        if len(packed) >= len(body):
            return headers, body
        headers["Content-Encoding"] = encoding
        return headers, packed

    def _ask_token(self, *, refresh: bool) -> str:
        if isinstance(self._token, str):
            return self._token
        provide = self._token
        assert provide is not None

        def ask(watch: Watch) -> object:
            with self._token_lock:  # two requests at once ask one after the other
                watch.check()
                return provide(refresh)

        try:
            token = self._interrupts.call(ask, "entidb-token")
        except SyncError:
            raise
        except OSError as error:  # no network for the token either; that passes
            raise TransportError(f"the token provider failed: {error}") from error
        except Exception as error:
            raise AuthenticationError(f"the token provider failed: {error!r}") from error
        if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
            raise AuthenticationError(
                "the token provider returned no token: it has to be visible ASCII text"
            )
        return token

    # -- reading ------------------------------------------------------------------------------

    def _read(self, request: SyncRequest, response: HttpResponse) -> SyncResponse:
        if response.status != 200 or not _is_cbor(response):
            raise self._error(request, response)
        return decode_response(request, self._unpacked(response))

    def _unpacked(self, response: HttpResponse) -> bytes:
        limit = self._config.response_bytes_max
        if len(response.body) > limit:
            raise _too_large(limit)
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("identity", ""):
            return response.body
        return _decompress(encoding, response.body, limit)

    def _error(self, request: SyncRequest, response: HttpResponse) -> SyncError:
        """What the answer says went wrong: in our words if it has them, else by its status."""
        url = self._urls[type(request)]
        try:
            body = self._unpacked(response)
            if _is_cbor(response):
                return self._spoken_error(response, decode(ErrorResponse, body))
        except ProtocolError:
            # Not one of our servers, or a broken one: its status still says something, and is
            # what decides about retrying.
            body = b""
        return self._status_error(url, response, body)

    def _spoken_error(self, response: HttpResponse, answer: ErrorResponse) -> SyncError:
        error = error_from_response(answer)
        if answer.code not in ERROR_TABLE and _refuses(response.status) and not answer.retryable:
            # A newer server has a reason that this device does not know; it is one all the same.
            error = ProtocolError(error.message, code=error.code, details=error.details)
            error.refused_by = "server"
        if error.retry_after is None:
            error.retry_after = self._retry_after(response)
        return error

    def _status_error(self, url: str, response: HttpResponse, body: bytes) -> SyncError:
        status = response.status
        said = f"{url} answered {status}{_content_type_note(response)}{_snippet(body)}"
        if 300 <= status < 400:
            return _redirect_error(said, response)
        if status < 300 or status == _NETWORK_LOGIN_REQUIRED:
            # Retryable, because it is mostly the login page of a network one has just joined.
            return TransportError(
                f"{said}; no EntiDB server answers there: check the URL, or log in to the network",
                code="unexpected_answer",
            )
        code = _STATUS_CODES.get(status, "server_error" if status >= 500 else "invalid_message")
        kind = ERROR_TABLE[code].error
        if url.startswith("http:") and _WANTS_TLS.search(body[: 2 * _SNIPPET_MAX]):
            said += "; TLS is spoken there: write https://"
        elif code == "not_found":
            said += "; check the path of the URL"
        error = kind(said, code=code, retry_after=self._retry_after(response))
        if _refuses(status):
            error.refused_by = "path"
        return error

    def _retry_after(self, response: HttpResponse) -> float | None:
        """Seconds, from either form of the header (RFC 9110, section 10.2.3)."""
        value = response.headers.get("retry-after", "").strip()
        if re.fullmatch(r"[0-9]{1,9}", value):
            return float(value)
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, IndexError):
            return None
        return max(0.0, date.timestamp() - self._clock.now_ms() / 1000)

    # -- ahead of time ------------------------------------------------------------------------

    def send_ahead(self, request: SyncRequest) -> None:
        """Start ``request`` on a thread of its own, or have it follow what is there already; see
        ``SyncTransport.send_ahead``. While that thread is busy with what was dropped, or two are
        waiting already, the hint is ignored."""
        if self._closed:
            return
        headers, body = self._packed(encode(request))
        self._carrier.add(_Ahead(request, functools.partial(self._carry, request, headers, body)))

    def forget_ahead(self) -> None:
        self._carrier.drop()
        self._interrupts.clear()
        if self._interrupt_client is not None:
            self._client.resume()  # type: ignore[attr-defined]

    def interrupt(self) -> None:
        """End what is under way and what is sent until ``forget_ahead``; see ``SyncTransport``."""
        self._interrupts.interrupt()
        if self._interrupt_client is not None:
            self._interrupt_client()

    def close(self) -> None:
        """Close the client, which ends what is under way, and wait for the thread to see it."""
        super().close()
        self._carrier.drop()
        self._client.close()
        self._interrupts.interrupt()
        self._carrier.join()


def _ready_client(config: HttpConfig, clock: Clock, url: str) -> HttpxClient:
    """The default client, with everything loaded that it needs for ``url``: the library loads
    most of itself with the first connection, which would be in the middle of the first sync."""
    client = HttpxClient(config, clock=clock)
    client.open(url)
    return client


class _Ahead:
    """A request on its way, and what came of it. ``sent`` and ``done`` are set in any case."""

    def __init__(self, request: SyncRequest, send: Callable[..., HttpResponse]) -> None:
        self.request = request
        self.good = False
        self.sent = threading.Event()
        self.done = threading.Event()
        self._send = send
        self._response: HttpResponse | None = None
        self._error: BaseException | None = None

    def carry(self, on_sent: Callable[[], None] | None) -> bool:
        """Whether the answer is one after which the next request may go out."""
        try:
            self._response = self._send(on_sent)
        except BaseException as error:  # raised where it is picked up
            self._error = error
        self.good = self._response is not None and self._response.status == 200
        return self.good

    def result(self, interrupts: Interrupts) -> HttpResponse:
        # Bounded by the request's own timeout.
        interrupts.wait(self.done)
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response


class _Carrier:
    """The thread that carries requests ahead of time, one after the other and in order: the next
    one leaves when the one before it is answered, and only if that answer is a good one."""

    def __init__(self, clock: Clock, tells_when_sent: bool) -> None:
        self._clock = clock
        self._tells_when_sent = tells_when_sent
        self._lock = threading.Lock()
        #: What was asked for and not taken yet, in order; the first ``_started`` are under way
        #: or answered.
        self._queue: list[_Ahead] = []
        self._started = 0
        self._thread: threading.Thread | None = None
        #: Moves when everything is dropped: a thread of an older age carries nothing more.
        self._age = 0
        self._thread_age = 0
        #: A hint was ignored: so are those after it, which must not leave before it, until the
        #: next request is asked for.
        self._ignoring = False

    def add(self, ahead: _Ahead) -> None:
        with self._lock:
            busy = self._thread is not None
            refused = not busy and self._queue and not self._queue[-1].good
            full = len(self._queue) >= _AHEAD_MAX
            if refused or full or (busy and self._thread_age != self._age):
                self._ignoring = True
            if self._ignoring:
                return
            if busy:
                self._queue.append(ahead)
                return
            self._queue.append(ahead)
            self._started = len(self._queue)
            self._thread_age = self._age
            self._thread = threading.Thread(
                target=self._run, args=(ahead, self._age), name="entidb-send-ahead", daemon=True
            )
            self._thread.start()
        if self._tells_when_sent:
            # Two threads that both have work to do hand the interpreter over every few
            # milliseconds, and sending takes several turns: the server would wait for them.
            self._clock.wait(ahead.sent, _SENDING_S)

    def take(self, request: SyncRequest) -> _Ahead | None:
        """What was started for ``request``; for any other request, everything is dropped."""
        with self._lock:
            self._ignoring = False
            if self._started:
                ahead = self._queue[0]
                if ahead.request is request or ahead.request == request:
                    self._started -= 1
                    return self._queue.pop(0)
            self._forget()
            return None

    def drop(self) -> None:
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._queue.clear()
        self._started = 0
        self._age += 1
        self._ignoring = False

    def join(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            # A client of somebody else's may not let go of its socket at once; the thread is a
            # daemon, and its answer goes nowhere.
            thread.join(_JOIN_S)

    def _run(self, ahead: _Ahead | None, age: int) -> None:
        answered: _Ahead | None = None
        while ahead is not None:
            good = self._carry(ahead, answered)
            answered = ahead
            with self._lock:
                ahead = None
                if good and age == self._age and self._started < len(self._queue):
                    ahead = self._queue[self._started]
                    self._started += 1
                else:
                    self._thread = None
        if answered is not None:
            answered.done.set()

    def _carry(self, ahead: _Ahead, before: _Ahead | None) -> bool:
        def on_sent() -> None:
            # Who waits for the answer before this request has work to do with it, and gets it
            # when this request has left.
            ahead.sent.set()
            if before is not None:
                before.done.set()

        if self._tells_when_sent:
            good = ahead.carry(on_sent)
        else:
            on_sent()
            good = ahead.carry(None)
        on_sent()
        return good


# -- addresses and tokens ---------------------------------------------------------------------


def _check_url(url: object) -> tuple[str, str]:
    """The URL without a trailing slash, and its host; ``ConfigError`` if it cannot work."""
    example = "write https://host[:port][/path]"
    if not isinstance(url, str) or _BAD_URL.search(url):
        raise ConfigError(f"url {_shown(url)} is not a URL: {example}")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname
        httpx2.URL(url)
        if host is not None:
            host.encode("idna")  # as looking it up does
    except (ValueError, httpx2.InvalidURL) as error:
        raise ConfigError(f"url {_shown(url)} is not a URL: {example}") from error
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ConfigError(f"url {_shown(url)} needs http or https and a host: {example}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError("url holds a user or a password: give the credential as token=")
    if "?" in url or "#" in url:
        raise ConfigError(f"url {_shown(url)} has a query or a fragment: {example}")
    # Schemes may be written in capitals; what compares them here does not expect it.
    return parts.scheme + url[len(parts.scheme) :].rstrip("/"), host


def _shown(url: object) -> str:
    """``url`` for a message: short, and without a password."""
    if isinstance(url, str):
        url = re.sub(r"//[^/@]*@", "//…@", url[:_SNIPPET_MAX])
    return repr(url)[: _SNIPPET_MAX + 40]


def _check_token(token: object, url: str, host: str, config: HttpConfig) -> None:
    if token is None:
        return
    if callable(token):
        check_plain(token, "token")
    if not callable(token) and (not isinstance(token, str) or _TOKEN.fullmatch(token) is None):
        raise ConfigError("token must be visible ASCII text, or a function that returns some")
    if url.startswith("https:") or _is_loopback(host) or config.allow_insecure_token:
        return
    raise ConfigError(
        f"the token would travel readable over {url}: use https://, or set "
        "allow_insecure_token=True if that network is encrypted below HTTP",
        code="insecure_token",
    )


def _is_loopback(host: str) -> bool:
    """Whether the bytes stay on this machine. Names other than ``localhost`` are not trusted:
    what ``x.localhost`` resolves to is up to the network's name server on some systems."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# -- reading an answer ------------------------------------------------------------------------


def _is_cbor(response: HttpResponse) -> bool:
    kind = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower() == CONTENT_TYPE


def _refuses(status: int) -> bool:
    """Whether a status proves that the request was not acted on (R5)."""
    return 400 <= status < 500 and status not in _PASSING


def _content_type_note(response: HttpResponse) -> str:
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() in ("text/html", "application/xhtml+xml"):
        return f" with a web page ({kind})"
    return f" with {printable(kind[:80])}" if kind else " without a content type"


def _snippet(body: bytes) -> str:
    text = " ".join(printable(body[: 2 * _SNIPPET_MAX].decode("utf-8", "replace")).split())
    return f': "{text[:_SNIPPET_MAX]}"' if text else ""


def _redirect_error(said: str, response: HttpResponse) -> SyncError:
    target = printable(response.headers.get("location", "")[:_SNIPPET_MAX])
    message = f"{said}, which points to {target!r}; redirects are not followed: correct the URL"
    if response.status in _MOVED_FOR_GOOD:
        return ProtocolError(message, code="redirected")
    return TransportError(message + ", or log in to the network", code="redirected")


def _translated(error: Exception, url: str) -> SyncError:
    """One of our errors for one of the client library's or the system's."""
    failure = _in_chain(error, ssl.SSLCertVerificationError)
    if failure is not None:
        return TlsError(
            f"the certificate of {url} was not accepted ({failure.verify_message}): check the "
            "URL, this device's clock, and its certificate authorities"
        )
    kind = next(ours for foreign, ours in _EXCEPTIONS if isinstance(error, foreign))
    return kind(f"{url}: {_cause(error, url)}")


def _cause(error: Exception, url: str) -> str:
    """What happened, and what to do about it, for a person who knows neither our library nor the
    numbers of a system."""
    hint = "; if the server speaks TLS, write https://" if url.startswith("http:") else ""
    for foreign, known in _CAUSES:
        if _in_chain(error, foreign) is not None:
            return known + (hint if foreign is ConnectionResetError else "")
    tls = _in_chain(error, ssl.SSLError)
    if tls is not None:
        if tls.reason in _NOT_TLS:
            return "no TLS is spoken there: the port may be one for http://"
        named = (tls.reason or "").replace("_", " ").lower()
        return f"TLS failed{f' ({named})' if named else ''}: check the URL and the server's TLS"
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy refused: {printable(str(error))[:_SNIPPET_MAX]}"
    if isinstance(error, httpx2.RemoteProtocolError):
        said = str(error)
        if url.startswith("http:") and any(each in said for each in _TLS_RECORDS):
            return "no HTTP is spoken there, but TLS: write https://"
        if "without sending" in said:
            return f"the server hung up without an answer{hint}"
        return f"what answers there is not HTTP, or was cut: check the URL{hint}"
    system = _in_chain(error, OSError)
    if system is not None and system.strerror:
        return printable(system.strerror[:_SNIPPET_MAX]).lower()
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and str(error):
        return printable(str(error)[:_SNIPPET_MAX])  # of a client of somebody else's
    return "the connection failed"


_E = TypeVar("_E", bound=BaseException)


def _in_chain(error: BaseException | None, kind: type[_E]) -> _E | None:
    for _ in range(10):  # a chain of causes has no bound of its own
        if error is None or isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def _too_large(limit: int) -> ProtocolError:
    return ProtocolError(
        f"the answer is larger than response_bytes_max ({limit} bytes)", code="too_large"
    )


# -- compression ------------------------------------------------------------------------------


def _load_zstd() -> ModuleType | None:
    for name in ("compression.zstd", "backports.zstd"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    return None


_zstd: Final[Any] = _load_zstd()
_UNPACK_ERRORS: Final[tuple[type[Exception], ...]] = (
    (zlib.error,) if _zstd is None else (zlib.error, _zstd.ZstdError)
)


def _encodings(mode: str, loopback: bool) -> tuple[str, ...]:
    if mode == "none" or (mode == "auto" and loopback):
        return ()
    if mode == "zstd" and _zstd is None:
        raise ConfigError('compression="zstd" needs a package: pip install "entidb[zstd]"')
    if mode != "auto":
        return (mode,)
    return ("gzip",) if _zstd is None else ("zstd", "gzip")


def _first_of(wanted: Iterable[str], offered: Iterable[str]) -> str | None:
    have = frozenset(offered)
    return next((name for name in wanted if name in have), None)


def _compress(encoding: str, body: bytes) -> bytes:
    if encoding == "zstd":
        packed: bytes = _zstd.compress(body, _ZSTD_LEVEL)
        return packed
    return zlib.compress(body, _GZIP_LEVEL, _GZIP_WBITS)


def _decompress(encoding: str, body: bytes, limit: int) -> bytes:
    """The unpacked body, never more than ``limit`` bytes of it in memory; ``ProtocolError``
    (too_large) beyond, ``SyncCodecError`` if it is not one complete stream of that encoding."""
    if encoding == "gzip":
        # One member only: skipping millions of empty ones copies the rest each time.
        stream = zlib.decompressobj(_GZIP_WBITS)
        unpack = functools.partial(stream.decompress, body, limit + 1)
    elif encoding == "zstd" and _zstd is not None:
        options = {_zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX}
        stream = _zstd.ZstdDecompressor(options=options)
        unpack = functools.partial(stream.decompress, body, max_length=limit + 1)
    else:
        named = printable(encoding[:40])
        raise SyncCodecError(f"the answer is packed as {named!r}, which was not asked for")
    try:
        data: bytes = unpack()
    except _UNPACK_ERRORS as error:
        raise SyncCodecError(f"the answer is not the {encoding} it says it is: {error}") from error
    if len(data) > limit:
        raise _too_large(limit)
    if not stream.eof or stream.unused_data:
        raise SyncCodecError(f"the answer's {encoding} is cut off, or something follows it")
    return data


# -- the default client -----------------------------------------------------------------------


class HttpxClient:
    """The ``HttpClient`` that ships: HTTP/1.1 over kept connections, certificates verified.

    It goes below the library's ``Client``, which would add cookies, redirects and unpacking
    without a bound, none of which is wanted here. Proxies are taken from the environment as the
    standard library does, but never for this machine itself: the exemption that lets a token go
    to ``http://localhost`` would not hold if somebody else's proxy came between.
    ``ssl_context`` replaces the system's certificate authorities. Thread-safe.
    """

    #: ``request`` takes ``on_sent``: see ``HttpClient``.
    tells_when_sent: Final = True

    def __init__(
        self,
        config: HttpConfig | None = None,
        *,
        ssl_context: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config or HttpConfig()
        self._ssl_context = ssl_context
        self._clock = clock or SystemClock()
        # Re-entrant for signal handlers that close or interrupt.
        self._lock = threading.RLock()
        self._routes: dict[str, _Route] = {}
        self._transports: dict[str, httpx2.HTTPTransport] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._interrupts = Interrupts()
        self._watchdog = _Watchdog(self._clock, self._cut_all)
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
    ) -> HttpResponse:
        """See ``HttpClient``. Raises ``TransportError``, ``SyncTimeoutError``, ``TlsError`` (not
        retryable), or ``ProtocolError`` ``too_large`` for a body over ``response_bytes_max``."""
        if self._closed:
            raise _closed()
        watch = self._interrupts.begin()
        try:
            watch.check()
            route = self._routes.get(url) or self._open_route(url)
            exchange = _Exchange(url, route, method, headers, body, timeout_s, on_sent)
            try:
                return self._attempt(exchange, _Steps(self, watch, on_sent, connects=False))
            except _NewConnectionError:
                return self._connect_apart(exchange)
        finally:
            self._interrupts.end(watch)

    def _connect_apart(self, exchange: _Exchange) -> HttpResponse:
        """A request that needs a new connection, on a thread of its own: looking up the name,
        connecting and the TLS handshake hear of nothing, so they are left to themselves when
        somebody says stop. What was connected until then is closed there."""

        def work(watch: Watch) -> HttpResponse:
            return self._attempt(exchange, _Steps(self, watch, exchange.on_sent, connects=True))

        try:
            return self._interrupts.call(work, "entidb-connect")
        except SyncCancelledError:
            self._check_not_closed()
            raise

    def _attempt(self, exchange: _Exchange, steps: _Steps) -> HttpResponse:
        url, timeout_s = exchange.url, exchange.timeout_s
        ticket = self._watchdog.watch(timeout_s)
        try:
            response = self._send(exchange, steps)
        except _FOREIGN as error:
            self._check_not_closed(error)
            steps.watch.check()
            if self._watchdog.struck(ticket):
                raise _overdue(url, timeout_s) from error
            raise _translated(error, url) from error
        finally:
            steps.end()
            late = self._watchdog.done(ticket)
        steps.watch.check()  # what was cut can look complete
        if late:
            raise _overdue(url, timeout_s)
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

    def _send(self, exchange: _Exchange, steps: _Steps) -> HttpResponse:
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
                    f"{route.url} answered without a length: the end cannot be told from a cut"
                )
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
                raise _too_large(limit)
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
                raise _closed()
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
        proxy = None if _is_loopback(url.host) else _proxy(url.scheme, url.host)
        verify: ssl.SSLContext | bool = self._ssl_context or True
        if url.scheme == "http" and (proxy is None or not proxy.startswith("https:")):
            # No TLS here, so reading the authorities (tens of milliseconds) would be for nothing.
            verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        elif verify is True:
            _check_authorities()
        try:
            return httpx2.HTTPTransport(verify=verify, proxy=proxy)
        except OSError as error:  # ssl.SSLError too
            raise _authorities_error(error) from error

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


class _NewConnectionError(Exception):
    """No kept connection is left, and this thread is not one that may be left to itself."""


class _Steps:
    """Told by the library of every step of one exchange (its ``trace`` extension)."""

    def __init__(
        self,
        client: HttpxClient,
        watch: Watch,
        on_sent: Callable[[], None] | None,
        *,
        connects: bool,
    ) -> None:
        self.watch = watch
        self._client = client
        self._on_sent = on_sent
        self._connects = connects
        self._connection: socket.socket | None = None
        self._during_handshake: socket.socket | None = None

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith("send_request_body.complete"):
            if self._on_sent is not None:
                self._on_sent()
        elif event.endswith("connect_tcp.started"):
            if not self._connects:
                raise _NewConnectionError
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connected(info["return_value"])
        elif event.endswith("start_tls.started"):
            self._shake_hands()

    def _connected(self, stream: Any) -> None:
        self.end()
        self._connection = stream.get_extra_info("socket")
        assert self._connection is not None
        try:
            self._client.remember(self._connection)
            self.watch.check()
        except SyncError:
            stream.close()
            raise

    def _shake_hands(self) -> None:
        """Wrapping a socket in TLS takes it away from its object, and the new one is not known
        before the handshake is over: a duplicate can be cut meanwhile."""
        if isinstance(self._connection, ssl.SSLSocket):
            return  # to a proxy over TLS; that one stays what it is
        assert self._connection is not None
        self._during_handshake = self._connection.dup()
        self._client.remember(self._during_handshake)
        self.watch.check()

    def end(self) -> None:
        """The handshake is over, or there was none. A duplicate would keep a connection open."""
        if self._during_handshake is not None:
            self._during_handshake.close()
            self._during_handshake = None


def _proxy(scheme: str, host: str) -> str | None:
    """The URL of the proxy to ``host`` that the environment (or the system) names; None if there
    is none. Raises ``ConfigError`` for one that cannot work."""
    proxies = urllib.request.getproxies()
    name = next((name for name in (scheme, "all") if proxies.get(name)), None)
    if name is None or urllib.request.proxy_bypass(host):
        return None
    given = proxies[name].strip()
    # Without a scheme, as curl and others take it.
    proxy = given if "://" in given else "http://" + given.removeprefix("//")
    try:
        parts = urlsplit(proxy)
        works = bool(parts.hostname) and parts.port != 0 and not _BAD_URL.search(proxy)
        httpx2.URL(proxy)
    except (ValueError, httpx2.InvalidURL):
        works = False
    where = f"the proxy of the environment ({name.upper()}_PROXY)"
    without = f"correct it, or name {host} in NO_PROXY"
    if not works:
        raise ConfigError(f"{where} is not a URL like http://host:port: {without}")
    if parts.scheme not in ("http", "https", "socks5", "socks5h"):
        shown = printable(parts.scheme[:40])
        raise ConfigError(f"{where} is of a kind that is not known, {shown!r}: {without}")
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(f"{where} speaks SOCKS, which needs a package: pip install socksio")
    return proxy


def _check_authorities() -> None:
    """OpenSSL takes directories that are not there without a word, and then trusts nobody."""
    if os.environ.get("SSL_CERT_FILE"):
        return
    named = os.environ.get("SSL_CERT_DIR")
    if named and not any(os.path.isdir(each) for each in named.split(os.pathsep)):
        raise ConfigError(
            f"SSL_CERT_DIR is {named!r}, and that is no directory: correct it, or unset it to use "
            "the certificate authorities of the system"
        )


def _authorities_error(error: OSError) -> ConfigError:
    name = next((each for each in _AUTHORITIES if os.environ.get(each)), None)
    if name is None:
        return ConfigError("the certificate authorities of this system cannot be read")
    if isinstance(error, ssl.SSLError):
        why = "holds no certificates in PEM form"
    else:
        why = f"cannot be read ({error.strerror or 'input/output error'})"
    return ConfigError(
        f"{name} is {os.environ[name]!r}, which {why}: correct it, or unset it to use the "
        "certificate authorities of the system"
    )


def _closed() -> SyncStateError:
    return SyncStateError("the client is closed: make a new one")


def _overdue(url: str, timeout_s: float) -> SyncTimeoutError:
    return SyncTimeoutError(f"{url} did not finish its answer within {timeout_s:g} s")


class _Watchdog:
    """Strikes when a request is not done by its deadline.

    The library only bounds the silence between two reads, so a server that sends a byte now and
    then would hold a device for ever. One thread for all requests, asleep until the earliest
    deadline it knew when it looked last: a request that ends in time neither starts nor wakes it.
    """

    #: Seconds until it strikes again: a connection may come up just after.
    AGAIN_S: Final = 1.0

    def __init__(self, clock: Clock, strike: Callable[[], None]) -> None:
        self._clock = clock
        self._strike = strike
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._deadlines: dict[int, float] = {}
        self._struck: set[int] = set()
        self._tickets = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._looks_at = 0.0

    def watch(self, timeout_s: float) -> int:
        deadline = self._clock.monotonic() + timeout_s
        with self._lock:
            ticket = next(self._tickets)
            self._deadlines[ticket] = deadline
            if self._thread is None and not self._closed:
                self._looks_at = deadline
                self._thread = threading.Thread(
                    target=self._run, name="entidb-http-watchdog", daemon=True
                )
                self._thread.start()
            elif deadline < self._looks_at:
                self._wake.set()
        return ticket

    def struck(self, ticket: int) -> bool:
        with self._lock:
            return ticket in self._struck

    def done(self, ticket: int) -> bool:
        """The request is over; returns whether it was struck."""
        with self._lock:
            del self._deadlines[ticket]
            struck = ticket in self._struck
            self._struck.discard(ticket)
            return struck

    def _run(self) -> None:
        while True:
            pause = self._look()
            if pause is None:
                return
            self._clock.wait(self._wake, pause)
            self._wake.clear()

    def _look(self) -> float | None:
        """Strike if somebody is late; seconds to the next look, None if there is no need."""
        with self._lock:
            if self._closed or not self._deadlines:
                self._thread = None
                return None
            now = self._clock.monotonic()
            late = [ticket for ticket, at in self._deadlines.items() if at <= now]
            for ticket in late:
                self._struck.add(ticket)
                self._deadlines[ticket] = now + self.AGAIN_S
            self._looks_at = min(self._deadlines.values())
            pause = self._looks_at - now
        if late:
            self._strike()
        return pause

    def close(self) -> None:
        with self._lock:
            self._closed = True
            thread = self._thread
            self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)
