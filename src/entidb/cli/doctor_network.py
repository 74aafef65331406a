"""What the doctor tries from afar: as a device would, by requests that change nothing.

It speaks plain HTTP/1.1 by the standard library, one connection for each try, through no proxy of
the environment: what is looked for is what stands in front of the server. The large bodies go to
an address below that of pushes, where the server has nothing; it reads and forgets them.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from itertools import zip_longest
from typing import Any, Final
from urllib.parse import urlencode

from entidb import cbor
from entidb.cli.doctor_findings import Finding, ok, problem, skipped, warning
from entidb.cli.output import size_text
from entidb.errors import CodecError, ConfigError
from entidb.protocol import CONTENT_TYPE
from entidb.sync.http.address import check_url, is_loopback
from entidb.types import SystemClock

_TIMEOUT_S: Final = 30.0
#: Bytes to which a body limit is found out.
_LIMIT_STEP: Final = 1024
#: Bytes that a large body is made of.
_PIECE: Final = 16 * 1024
#: Bytes of a body limit below which small batches make syncing slow.
_LIMIT_SLOW: Final = 256 * 1024
_BODY_DEFAULT: Final = 20 * 1024 * 1024
#: More than any server takes: what says so is not believed.
_BODY_MOST: Final = 1100 * 1024 * 1024
_ANSWER_MAX: Final = 1024 * 1024
#: Seconds by which clocks may differ.
_CLOCK_S: Final = 10.0
_CLOCK_WRONG_S: Final = 60.0
_DAY_S: Final = 86_400
_RENEW_DAYS: Final = 21
#: Seconds after which the first event of a stream has been held up: it is sent at once.
_HELD_UP_S: Final = 5.0
#: Seconds between two signs of life in a stream, and a poll's longest time.
_BEAT_S: Final = 15.0
_POLL_S: Final = 25.0
#: Polls that are asked at most, where others commit meanwhile; and seconds that prove nothing.
_POLLS_MAX: Final = 50
_BRIEF_S: Final = 0.4

_BODY = (
    "nginx: client_max_body_size {}; haproxy: no limit of its own, look at WAF rules; "
    "Caddy: request_body max_size"
)
_STREAM = (
    "nginx: proxy_buffering off, and no proxy_ignore_headers X-Accel-Buffering; "
    "haproxy: no option http-buffer-request and no compression for text/event-stream; "
    "Caddy: flush_interval -1"
)
_IDLE = (
    "nginx: proxy_read_timeout 120s; haproxy: timeout server 120s and timeout client 120s; "
    "Caddy: read_timeout 0 in its transport"
)


@dataclass(frozen=True)
class Visit:
    """What is visited and with which right, and for how many seconds a connection is kept idle."""

    url: str
    token: str | None = None
    db_id: str | None = None
    ca_file: str | None = None
    wait_s: float = 30.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    version: int

    def document(self) -> dict[str, Any]:
        """The JSON or CBOR map that a server of ours answers with, else an empty one."""
        try:
            if self.headers.get("content-type", "").startswith(CONTENT_TYPE):
                found = cbor.decode(self.body)
            else:
                found = json.loads(self.body)
        except (CodecError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def code(self) -> str | None:
        """The code of an error that the server itself has answered; a proxy's page has none."""
        ours = self.headers.get("content-type", "").startswith(CONTENT_TYPE)
        found = self.document().get("code") if ours else None
        return found if isinstance(found, str) else None


class NetworkPath:
    """Connections to one server. Raises what sockets, TLS and ``http.client`` raise."""

    def __init__(self, visit: Visit) -> None:
        """Raises ``ConfigError`` for what is no URL, and for authorities that cannot be read."""
        url, self.host = check_url(visit.url)
        scheme, _, rest = url.partition("://")
        netloc, slash, path = rest.partition("/")
        self.secure = scheme == "https"
        self.prefix = slash + path if path else ""
        port = netloc.rpartition("]")[2].rpartition(":")[2]
        self.port = int(port) if port.isdigit() else 443 if self.secure else 80
        try:
            self.context = ssl.create_default_context(cafile=visit.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"cannot read --ca-file {visit.ca_file}: {_said(error)}") from error

    def connect(self, timeout_s: float = _TIMEOUT_S) -> http.client.HTTPConnection:
        if self.secure:
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=timeout_s, context=self.context
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)

    def ask(
        self,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> Answer:
        with contextlib.closing(self.connect(timeout_s)) as connection:
            method = "GET" if body is None else "POST"
            connection.request(method, self.prefix + path, body=body, headers=dict(headers or {}))
            answer = connection.getresponse()
            given = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, given, answer.read(_ANSWER_MAX), answer.version)


_FAILURES: Final = (OSError, http.client.HTTPException)


def _said(error: Exception) -> str:
    """What went wrong, without a number of the system, also where the error itself says nothing."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def examine(visit: Visit) -> list[Finding]:
    """Everything that can be tried, in the order in which a person would mend it. Raises
    ``ConfigError`` for a URL that is none."""
    way = NetworkPath(visit)
    found = list(_tls(way))
    try:
        info = way.ask("/v1/info", headers={"Accept-Encoding": "identity"})
    except _FAILURES as error:
        if not any(each.check == "tls" and each.change for each in found):
            says = f"{visit.url} does not answer: {_said(error)}"
            found.append(problem("server", says, "start the server, and look at name and port"))
        return found
    found.append(_server(info, visit.url))
    if info.document().get("name") != "entidb":
        return found
    found += [_http(info), _clock(info), _unasked(info)]
    found += _ready(way)
    found += _public_metrics(way)
    found += _body_limit(way, info)
    found += _with_token(way, visit)
    return found


# ---------------------------------------------------------------- certificate and server


def _tls(way: NetworkPath) -> Iterator[Finding]:
    if not way.secure:
        if is_loopback(way.host):
            yield skipped("tls", "none on this machine itself; devices elsewhere need https://")
        else:
            says = "everyone on the way can read tokens and data"
            yield problem("tls", says, "use https://: docs/server.md, TLS and reverse proxies")
        return
    try:
        with (
            socket.create_connection((way.host, way.port), _TIMEOUT_S) as raw,
            way.context.wrap_socket(raw, server_hostname=way.host) as secured,
        ):
            certificate, version = secured.getpeercert() or {}, secured.version()
    except ssl.SSLCertVerificationError as error:
        says = f"the certificate was not accepted: {error.verify_message}"
        change = "renew it, with this host's name in it and with the chain; or give --ca-file"
        yield problem("tls", says, change)
        return
    except ssl.SSLError as error:
        says = f"no TLS at this port: {error.reason or error}"
        yield problem("tls", says, "give a certificate (tls_cert, ssl_certificate), or the port")
        return
    except OSError:
        return  # asking for the server says so
    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = (ends - SystemClock().now_ms() / 1000) / _DAY_S
    says = f"{version}, the certificate is good for {days:,.0f} days"
    if days < _RENEW_DAYS:
        yield warning("tls", says, "renew it; serve and SIGHUP read it again without a restart")
    else:
        yield ok("tls", says)


def _server(info: Answer, url: str) -> Finding:
    document = info.document()
    if document.get("name") == "entidb":
        return ok("server", f"EntiDB {document.get('version')} at {url}")
    if info.status in (301, 302, 307, 308):
        to = info.headers.get("location", "another address")
        return problem("server", f"{url} sends to {to}", "give devices that address")
    says = f"{url} answers {info.status}, and not as EntiDB does"
    return problem("server", says, "look at the path that the proxy strips, and at its upstream")


def _http(info: Answer) -> Finding:
    if info.version >= 11:
        return ok("http", "HTTP/1.1, with connections that are kept")
    change = "let the proxy speak HTTP/1.1 to devices: every request connects anew otherwise"
    return problem("http", "it answers with HTTP/1.0", change)


def _clock(info: Answer) -> Finding:
    try:
        there = parsedate_to_datetime(info.headers.get("date", "")).timestamp()
    except (TypeError, ValueError):
        return skipped("clock", "the answer has no Date")
    off = SystemClock().now_ms() / 1000 - there
    says = f"this machine's is {abs(off):,.0f} s {'ahead of' if off > 0 else 'behind'} the server's"
    change = "set the one that is wrong, and keep both with NTP: tokens end by it"
    if abs(off) > _CLOCK_WRONG_S:
        return problem("clock", says, change)
    if abs(off) > _CLOCK_S:
        return warning("clock", says, change)
    return ok("clock", "it is that of the server")


def _unasked(info: Answer) -> Finding:
    encoding = info.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return ok("compression", "what was asked for plainly comes plainly")
    change = "nginx: gzip off for this location; the server packs by itself"
    return problem("compression", f"answers are packed as {encoding} without being asked", change)


def _ready(way: NetworkPath) -> Iterator[Finding]:
    try:
        answer = way.ask("/readyz")
    except _FAILURES as error:
        change = "let it through, or have the proxy answer it by itself"
        yield problem("ready", f"/readyz is not answered: {_said(error)}", change)
        return
    reasons = answer.document().get("reasons")
    if answer.status == 200:
        yield ok("ready", "the server says that it is")
    elif isinstance(reasons, list):
        to_do = answer.document().get("to_do")  # a server before 0.8 does not say it
        told = to_do if isinstance(to_do, list) else []
        for reason, what in zip_longest(reasons, told[: len(reasons)]):
            change = str(what or "docs/server.md, Watching it, says what that means")
            yield problem("ready", f"the server is not: {reason}", change)
    else:
        yield skipped("ready", "/readyz is not to be seen from here")


def _public_metrics(way: NetworkPath) -> Iterator[Finding]:
    try:
        answer = way.ask("/metrics")
    except _FAILURES:
        return  # nobody can read it from here
    if answer.status == 200 and b"entidb_" in answer.body and not is_loopback(way.host):
        change = "nginx: location = /metrics { deny all; }; haproxy: http-request deny"
        yield warning("metrics", "everyone can read /metrics", change)


# ---------------------------------------------------------------- bodies


def _body_limit(way: NetworkPath, info: Answer) -> Iterator[Finding]:
    limits = info.document().get("limits")
    wanted = limits.get("message_bytes_max") if isinstance(limits, dict) else None
    if type(wanted) is not int or not 0 < wanted <= _BODY_MOST:
        wanted = _BODY_DEFAULT
    refused = _refused(way, wanted)
    if refused is None:
        yield ok("body", f"bodies of {size_text(wanted)} arrive")
        return
    passes, stopped = 0, wanted
    while stopped - passes > _LIMIT_STEP:
        middle = (passes + stopped) // 2
        if _refused(way, middle) is None:
            passes = middle
        else:
            stopped = middle
    says = (
        f"bodies above about {size_text(stopped)} are refused on the way ({refused}), "
        f"and the server takes {size_text(wanted)}"
    )
    change = _BODY.format(f"{-(-wanted // (1024 * 1024))}m")
    if passes < _LIMIT_SLOW:
        yield problem("body", says, change)
    else:
        yield warning("body", f"{says}; devices send smaller batches instead", change)


def _refused(way: NetworkPath, size: int) -> str | None:
    """How a body of that size is kept from the server; None if it arrives."""
    body = secrets.token_bytes(_PIECE) * (size // _PIECE + 1)
    try:
        answer = way.ask(
            "/v1/push/doctor", body=body[:size], headers={"Content-Type": CONTENT_TYPE}
        )
    except _FAILURES as error:
        return f"the connection was cut: {type(error).__name__}"
    return None if answer.code() == "not_found" else f"status {answer.status}"


# ---------------------------------------------------------------- with a token


def _with_token(way: NetworkPath, visit: Visit) -> Iterator[Finding]:
    if visit.db_id is None:
        says = "not tried: give --db NAME and --token-file FILE"
        yield from (skipped(each, says) for each in ("token", "stream", "idle"))
        return
    headers = {} if visit.token is None else {"Authorization": f"Bearer {visit.token}"}
    refusal = _token_refused(way, visit, headers)
    if refusal is not None:
        yield refusal
        return
    yield ok("token", f"it opens {visit.db_id}")
    yield _packed_requests(way, headers)
    with ThreadPoolExecutor(2) as threads:
        poll = threads.submit(_poll, way, visit, headers)
        stream = threads.submit(_stream, way, visit, headers)
        yield from stream.result()
        yield poll.result()


def _live_path(visit: Visit, **more: str) -> str:
    return "/v1/live?" + urlencode({"db_id": visit.db_id, **more})


def _token_refused(way: NetworkPath, visit: Visit, headers: Mapping[str, str]) -> Finding | None:
    try:
        answer = way.ask(_live_path(visit), headers={**headers, "Accept": CONTENT_TYPE})
    except _FAILURES as error:
        says = f"/v1/live is not answered: {_said(error)}"
        return problem("token", says, "let everything below /v1/ through the proxy")
    if answer.status == 200:
        return None
    code = answer.code()
    if code is None:
        says = f"/v1/live is answered with {answer.status} on the way"
        return problem("token", says, "let everything below /v1/ through the proxy")
    if code == "unauthorized":
        change = (
            "make a new token; if it works past the proxy, this drops the header: "
            "nginx: proxy_set_header Authorization $http_authorization"
        )
        return problem("token", "the server does not accept it, or does not get it", change)
    says = f"the server answers {code}: {answer.document().get('message')}"
    return problem("token", says, "docs/errors.md says what to do")


def _packed_requests(way: NetworkPath, headers: Mapping[str, str]) -> Finding:
    """A packed body that is no message: the server says so only if it could unpack it."""
    check = "packed requests"
    given = {**headers, "Content-Type": CONTENT_TYPE, "Content-Encoding": "x-doctor"}
    try:
        named = way.ask("/v1/pull", body=gzip.compress(b"doctor"), headers=given)
        sent = way.ask(
            "/v1/pull", body=gzip.compress(b"doctor"), headers={**given, "Content-Encoding": "gzip"}
        )
    except _FAILURES as error:
        change = "let requests with Content-Encoding through"
        return problem(check, f"the connection was cut: {_said(error)}", change)
    if sent.code() is None or named.code() is None:
        change = "let requests with Content-Encoding through; devices send them plainly instead"
        return warning(check, f"they are refused on the way ({sent.status})", change)
    if named.code() != "unsupported_media_type":
        change = "leave Content-Encoding of requests as it is"
        return problem(check, "Content-Encoding does not arrive", change)
    return ok(check, "they arrive as they were sent")


@dataclass
class _Heard:
    """What came of a stream, with seconds since it was asked for."""

    first_s: float | None = None
    cut_s: float | None = None
    goodbye: bool = False
    text: bytearray = field(default_factory=bytearray)


def _stream(way: NetworkPath, visit: Visit, headers: Mapping[str, str]) -> Iterator[Finding]:
    heard = _Heard()
    try:
        answer = _listen(way, visit, headers, heard)
    except _FAILURES as error:
        yield problem("stream", f"it cannot be opened: {_said(error)}", _STREAM)
        return
    if answer is not None:
        yield problem("stream", f"it is answered with {answer} on the way", _STREAM)
        return
    limit = min(_HELD_UP_S, visit.wait_s)
    if heard.first_s is None or heard.first_s > limit:
        when = (
            "nothing"
            if heard.first_s is None
            else f"the first event only after {heard.first_s:.1f} s"
        )
        yield problem("stream", f"news is gathered on the way: {when} came", _STREAM)
    else:
        yield ok("stream", f"news comes at once ({heard.first_s * 1000:.0f} ms)")
    if heard.cut_s is not None and not heard.goodbye:
        says = f"a stream that says nothing is cut after {heard.cut_s:.0f} s"
        if heard.cut_s < _BEAT_S:
            says += f"; the server shows that it lives every {_BEAT_S:.0f} s"
        yield problem("idle", says, _IDLE)
    else:
        yield ok("idle", f"a stream stays open for {visit.wait_s:g} s at least")


def _listen(
    way: NetworkPath, visit: Visit, headers: Mapping[str, str], heard: _Heard
) -> int | None:
    """Read until ``wait_s`` are over or somebody ends it; the status where it is not 200."""
    clock: Callable[[], float] = time.monotonic
    began = clock()
    with contextlib.closing(way.connect(visit.wait_s)) as connection:
        wanted = {**headers, "Accept": "text/event-stream", "Accept-Encoding": "gzip"}
        connection.request("GET", way.prefix + _live_path(visit), headers=wanted)
        try:
            answer = connection.getresponse()
        except TimeoutError:
            return None
        if answer.status != 200:
            return answer.status
        sock = connection.sock
        while (left := began + visit.wait_s - clock()) > 0:
            if sock is not None:
                sock.settimeout(left)
            try:
                part = answer.read1(65536)
            except TimeoutError:
                break
            except _FAILURES:
                part = b""
            if not part:
                heard.cut_s = clock() - began
                break
            if heard.first_s is None:
                heard.first_s = clock() - began
            heard.text += part
    heard.goodbye = b"event: bye" in heard.text
    return None


def _poll(way: NetworkPath, visit: Visit, headers: Mapping[str, str]) -> Finding:
    """Ask for news where there are none, which takes the server ``_POLL_S``. What others commit
    meanwhile ends a request early; then another one waits for what follows."""
    check, news = "idle poll", {**headers, "Accept": CONTENT_TYPE}
    began, longest_s, cursor = time.monotonic(), 0.0, ""
    for _ in range(_POLLS_MAX):
        asked = time.monotonic()
        path = _live_path(visit, cursor=cursor) if cursor else _live_path(visit)
        try:
            answer = way.ask(path, headers=news, timeout_s=visit.wait_s)
        except TimeoutError:
            return ok(check, f"a request may take {visit.wait_s:g} s at least")
        except _FAILURES:
            answer = None
        took_s = time.monotonic() - asked
        head = None if answer is None else answer.document().get("head")
        if answer is None or head is None:
            how = "cut" if answer is None else f"answered with {answer.status} on the way"
            says = f"a request that takes long is {how} after {took_s:.0f} s"
            return problem(check, says, _IDLE)
        longest_s = max(longest_s, took_s)
        before, cursor = cursor, str(head)
        if cursor == before or time.monotonic() - began >= visit.wait_s:
            break
    if longest_s < _BRIEF_S:
        return skipped(check, "others commit all the time, so no request had to wait")
    return ok(check, f"a request may take {longest_s:.0f} s")
