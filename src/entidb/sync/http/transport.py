"""What goes into a request, and what its answer is for the engine: tokens, packing, sizes.

``HttpTransport`` does not move bytes (``client``), nor put what went wrong into words (``answers``,
``failures``); other rooms retry, and decide what an error means for the outbox.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Final
from urllib.parse import quote

from entidb import packing
from entidb.errors import (
    AuthenticationError,
    ConfigError,
    ProtocolError,
    SyncCodecError,
    SyncError,
    TransportError,
)
from entidb.protocol import (
    CONTENT_TYPE,
    DATABASE_HEADER,
    PATHS,
    ErrorResponse,
    HandshakeRequest,
    HandshakeResponse,
    PullRequest,
    SyncRequest,
    SyncResponse,
    decode,
    decode_response,
    encode,
)
from entidb.sync.config import HttpConfig
from entidb.sync.http.address import TOKEN, check_token, check_url, is_loopback
from entidb.sync.http.ahead import Ahead, Carrier
from entidb.sync.http.answers import (
    is_cbor,
    request_id,
    spoken_error,
    status_error,
    unreadable,
)
from entidb.sync.http.client import HttpxClient, ready_client
from entidb.sync.http.failures import FOREIGN, too_large, translated
from entidb.sync.http.news import HttpNews
from entidb.sync.http.segments import Downloads
from entidb.sync.http.streaming import StreamingClient
from entidb.sync.http.subject import subject_of
from entidb.sync.interrupt import Interrupts, Watch
from entidb.sync.segment_files import Fetch
from entidb.sync.transport import (
    BaseTransport,
    HttpClient,
    HttpResponse,
    Sink,
    printable,
)
from entidb.types import Clock, Entropy, check_clock, system_entropy
from entidb.version import VERSION

#: A bearer token, or what gives one: called with False before every request, so it should answer
#: from memory, and with True when the server refused the last one.
Token = str | Callable[[bool], str]
_UNSUPPORTED_MEDIA_TYPE: Final = 415


class HttpTransport(BaseTransport):
    """A ``SyncTransport`` that posts canonical CBOR to ``url``.

    ``url`` is the address of the server's app, with a path if it is mounted under one
    (``https://example.org/sync``). ``token`` is sent as ``Authorization: Bearer``; see ``Token``.
    On 401 the transport asks a function once for a fresh one and sends the request once more.
    ``client`` moves the bytes, an ``HttpxClient`` by default, and is closed with the transport.
    ``config`` may be a ``SyncConfig``.

    Raises ``ConfigError`` for a URL or a token that cannot work, with code ``insecure_token`` for a
    token that would cross a network in the clear.
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
        self._clock = check_clock(clock)
        base, host = check_url(url)
        check_token(token, base, host, self._config)
        self._token = token
        self._token_lock = threading.Lock()
        #: Of the newest handshake; and what was asked for already for the next request.
        self._handshake_token: str | None = None
        self._asked_token: str | None = None
        self._base = base
        self._urls: dict[type, str] = {kind: base + path for path, kind in PATHS.items()}
        self._client = client or ready_client(self._config, self._clock, base)
        #: Encodings this side can undo, best first, and the one it packs requests with.
        self._encodings = _encodings(self._config.compression, is_loopback(host))
        self._request_encoding: str | None = None
        #: The newest pull that was asked for, and how it is encoded.
        self._asked: tuple[SyncRequest, bytes] | None = None
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
        self._carrier = Carrier(self._clock, tells)
        self._interrupts = Interrupts()
        self._interrupt_client: Callable[[], None] | None
        self._interrupt_client = getattr(self._client, "interrupt", None)
        self._downloads = Downloads(
            self._get,
            self._fetch_error,
            self._interrupts,
            streams=getattr(self._client, "takes_sink", False),
        )

    # -- sending ------------------------------------------------------------------------------

    def begin_cycle(self) -> bool:
        """A cycle begins: whether the connection of before still is one, and is the same person's
        (R36)."""
        self._asked_token = None
        known = self._handshake_token
        if not self._connected or known is None or self._token is known:
            return self._connected
        try:
            token = self._asked_token = self._ask_token(refresh=False)
        except SyncError:
            return True  # the first request asks again, and fails as ever
        return token == known or subject_of(token) == subject_of(known)

    def _exchange(self, request: SyncRequest) -> SyncResponse:
        if isinstance(request, HandshakeRequest):
            self._headers[DATABASE_HEADER] = quote(request.db_id, safe="")
        ahead = self._carrier.take(request)
        if ahead is not None:
            response = ahead.result(self._interrupts)
        else:
            response = self._carry(request, *self._packed(self._encoded(request)))
        if response.status == _UNSUPPORTED_MEDIA_TYPE and self._request_encoding is not None:
            # The server takes packed bodies, but something on the way to it does not.
            self._packs, self._request_encoding = False, None
            response = self._carry(request, *self._packed(encode(request)))
        answer = self._read(request, response)
        if isinstance(answer, HandshakeResponse) and self._packs:
            self._request_encoding = _first_of(self._encodings, answer.features)
        return answer

    def _encoded(self, request: SyncRequest) -> bytes:
        """A device that stays as it is asks for the same again and again."""
        asked = self._asked
        if asked is not None and asked[0] is request:
            return asked[1]
        body = encode(request)
        if isinstance(request, PullRequest):
            self._asked = (request, body)
        return body

    def _carry(
        self,
        request: SyncRequest,
        headers: dict[str, str],
        body: bytes,
        on_sent: Callable[[], None] | None = None,
    ) -> HttpResponse:
        url, telling = self._urls[type(request)], {} if on_sent is None else {"on_sent": on_sent}
        response = self._request("POST", url, headers, body, False, telling)
        if response.status == 401 and callable(self._token):
            response = self._request("POST", url, headers, body, True, {})
        return response

    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes,
        refresh: bool,
        telling: Mapping[str, Callable[..., None]],
    ) -> HttpResponse:
        headers["X-Request-Id"] = f"{self._request_id_prefix}-{next(self._request_ids)}"
        if self._token is not None:
            token, self._asked_token = self._asked_token, None
            if token is None or refresh:
                token = self._ask_token(refresh=refresh)
            headers["Authorization"] = "Bearer " + token
            if url == self._urls[HandshakeRequest]:
                self._handshake_token = token
        timeout_s = self._config.total_timeout_s
        client = self._client
        try:
            if self._interrupt_client is not None:
                return client.request(method, url, headers, body, timeout_s, **telling)
            return self._interrupts.call(
                lambda _: client.request(method, url, headers, body, timeout_s, **telling),
                "entidb-request",
            )
        except SyncError as error:
            error.request_id = headers["X-Request-Id"]
            raise
        except FOREIGN as error:
            failure = translated(error, url)
            failure.request_id = headers["X-Request-Id"]
            raise failure from error

    def _packed(self, body: bytes) -> tuple[dict[str, str], bytes]:
        """Headers of a new request and the body, packed where that is agreed on and pays."""
        headers = dict(self._headers)
        encoding = self._request_encoding
        if encoding is None or len(body) < self._config.compression_min_bytes:
            return headers, body
        packed = packing.compress(encoding, body)
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
        if not isinstance(token, str) or TOKEN.fullmatch(token) is None:
            raise AuthenticationError(
                "the token provider returned no token: it has to be visible ASCII text"
            )
        return token

    # -- reading ------------------------------------------------------------------------------

    def _read(self, request: SyncRequest, response: HttpResponse) -> SyncResponse:
        if response.status != 200 or not is_cbor(response):
            raise self._error(self._urls[type(request)], response)
        try:
            return decode_response(request, self._unpacked(response))
        except SyncError as error:
            error.request_id = request_id(response)
            error.args = (unreadable(self._urls[type(request)], error),)
            raise

    def _unpacked(self, response: HttpResponse) -> bytes:
        limit = self._config.response_bytes_max
        if len(response.body) > limit:
            raise too_large(limit)
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("identity", ""):
            return response.body
        if encoding not in packing.ENCODINGS:
            named = printable(encoding[:40])
            raise SyncCodecError(f"the answer is packed as {named!r}, which was not asked for")
        return packing.decompress(encoding, response.body, limit, "the answer", too_large)

    def _error(self, url: str, response: HttpResponse) -> SyncError:
        """The error that the answer reports: in the protocol's words if it has them, else by its
        status."""
        try:
            body = self._unpacked(response)
            if is_cbor(response):
                return spoken_error(response, decode(ErrorResponse, body), self._clock)
        except ProtocolError:
            # Not one of our servers, or a broken one: its status still means something, and decides
            # about retrying.
            body = b""
        return status_error(url, response, body, self._clock)

    # -- segments -----------------------------------------------------------------------------

    def fetch(self, fetch: Fetch) -> None:
        """Bring the first of the segments into its file, the next at the same time; see
        ``SyncTransport``."""
        self._check_open()
        self._downloads.fetch(fetch)

    @property
    def fetches(self) -> bool:
        """Whether the client takes part: see ``HttpClient``."""
        return bool(getattr(self._client, "gets", True))

    def _get(self, path: str, wanted: dict[str, str], sink: Sink | None) -> HttpResponse:
        headers = {"User-Agent": self._headers["User-Agent"], "Accept-Encoding": "identity"}
        if DATABASE_HEADER in self._headers:
            headers[DATABASE_HEADER] = self._headers[DATABASE_HEADER]
        headers |= wanted
        url = self._base + path
        more = {} if sink is None else {"sink": sink}
        try:
            response = self._request("GET", url, headers, b"", False, more)
            if response.status == 401 and callable(self._token):
                response = self._request("GET", url, headers, b"", True, more)
        except (SyncError, OSError):
            raise
        except Exception as error:
            raise ProtocolError(f"the client cannot ask for {url}: {error!r}") from error
        return response

    def _fetch_error(self, path: str, response: HttpResponse) -> SyncError:
        return self._error(self._base + path, response)

    # -- waiting for news ---------------------------------------------------------------------

    def news(self, db_id: str, device_id: bytes) -> HttpNews | None:
        """Where this device learns that there is something new in ``db_id``; None where the client
        is not ours and has no way to read an answer as it comes."""
        if not isinstance(self._client, HttpxClient):
            return None
        return HttpNews(
            self._client.twin(StreamingClient),
            self._base,
            db_id=db_id,
            device_id=device_id,
            user_agent=self._headers["User-Agent"],
            request_id_prefix=f"{self._request_id_prefix}-news",
            token=None if self._token is None else self._fresh_token,
            clock=self._clock,
        )

    def _fresh_token(self, refresh: bool) -> str:
        return self._ask_token(refresh=refresh)

    # -- ahead of time ------------------------------------------------------------------------

    def send_ahead(self, request: SyncRequest) -> None:
        """Start ``request`` on a thread of its own, or have it follow what is there already; see
        ``SyncTransport.send_ahead``. It ignores the hint while that thread is busy with what was
        dropped, or while two are waiting already."""
        if self._closed:
            return
        headers, body = self._packed(encode(request))
        self._carrier.add(Ahead(request, functools.partial(self._carry, request, headers, body)))

    def forget_ahead(self) -> None:
        self._carrier.drop()
        if self._downloads.begun:
            self._downloads.forget()
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
        self._downloads.forget()
        self._carrier.join()
        self._downloads.join()


def _encodings(mode: str, loopback: bool) -> tuple[str, ...]:
    """The encodings that this side asks for, best first."""
    if mode == "none" or (mode == "auto" and loopback):
        return ()
    if mode == "zstd" and "zstd" not in packing.ENCODINGS:
        raise ConfigError('compression="zstd" needs a package: pip install "entidb[zstd]"')
    return packing.ENCODINGS if mode == "auto" else (mode,)


def _first_of(wanted: Iterable[str], offered: Iterable[str]) -> str | None:
    have = frozenset(offered)
    return next((name for name in wanted if name in have), None)
