"""Requests that got no answer: the exceptions of the client library and of the system as
``SyncError``, in words for a person who knows neither.

Answers that report an error are the subject of ``answers``.
"""

from __future__ import annotations

import socket
import ssl
from typing import Final, TypeVar

import httpx2

from entidb.errors import (
    ProtocolError,
    SyncError,
    SyncStateError,
    SyncTimeoutError,
    TlsError,
    TransportError,
)
from entidb.sync.transport import printable

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
FOREIGN: Final = tuple(foreign for foreign, _ in _EXCEPTIONS)
#: What happened, by the exceptions in the chain of causes; first match wins.
_CAUSES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (httpx2.ConnectTimeout, "no connection within connect_timeout_s"),
    (httpx2.ReadTimeout, "no answer within read_timeout_s"),
    (httpx2.WriteTimeout, "the request could not be sent within read_timeout_s"),
    (httpx2.PoolTimeout, "no connection was free within connect_timeout_s"),
    (socket.gaierror, "the name of the host cannot be found: check the URL, and the network"),
    (ConnectionRefusedError, "nothing listens there: check the URL, and whether the server runs"),
    (ConnectionResetError, "the connection was cut"),
    (BrokenPipeError, "the connection was cut"),
    (UnicodeError, "the name of the host cannot be one: check the URL"),
)
#: OpenSSL's reasons for bytes that are no TLS.
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE",
                   "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")  # fmt: skip
#: The library's words for a TLS alert that it mistakes for a status line: the second, when no line
#: can begin with the first byte.
_TLS_RECORDS: Final = (r"\x15\x03", "illegal request line")
SNIPPET_MAX: Final = 200


def translated(error: Exception, url: str, proxy: str = "") -> SyncError:
    """One of our errors for one of the client library's or the system's; ``proxy`` is what the
    request went through."""
    failure = _in_chain(error, ssl.SSLCertVerificationError)
    if failure is not None:
        return TlsError(
            f"the certificate of {url} was not accepted ({failure.verify_message}): check the "
            "URL, this device's clock, and its certificate authorities"
        )
    kind = next(ours for foreign, ours in _EXCEPTIONS if isinstance(error, foreign))
    if proxy and any(_in_chain(error, each) for each in (socket.gaierror, ConnectionRefusedError)):
        # The name and the port were those of the proxy, and nobody has asked for the server's.
        return kind(
            f"{url}: the proxy of the environment, {proxy}, cannot be reached: check the network, "
            "correct HTTP_PROXY or HTTPS_PROXY, or name the host of the server in NO_PROXY"
        )
    return kind(f"{url}: {_cause(error, url)}")


def _cause(error: Exception, url: str) -> str:
    """What happened, and what to do about it, for a person who knows neither our library nor the
    numbers of a system."""
    hint = _tls_hint(url)
    for foreign, known in _CAUSES:
        if _in_chain(error, foreign) is not None:
            return known + (hint if foreign is ConnectionResetError else "")
    tls = _in_chain(error, ssl.SSLError)
    if tls is not None:
        if tls.reason in _NOT_TLS:
            return "the server there does not speak TLS: the port may be one for http://"
        named = (tls.reason or "").replace("_", " ").lower()
        return f"TLS failed{f' ({named})' if named else ''}: check the URL and the server's TLS"
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy refused the request: {printable(str(error))[:SNIPPET_MAX]}"
    if isinstance(error, httpx2.RemoteProtocolError):
        said = str(error)
        if url.startswith("http:") and any(each in said for each in _TLS_RECORDS):
            return "the server there speaks TLS: write https://"
        if "without sending" in said:
            return f"the server hung up without an answer{hint}"
        return f"what answers there is not HTTP, or was cut: check the URL{hint}"
    system = _in_chain(error, OSError)
    if system is not None and system.strerror:
        return printable(system.strerror[:SNIPPET_MAX]).lower()
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and str(error):
        return printable(str(error)[:SNIPPET_MAX])  # of a client that is not ours
    return "the connection failed"


def _tls_hint(url: str) -> str:
    return "; if the server speaks TLS, write https://" if url.startswith("http:") else ""


_E = TypeVar("_E", bound=BaseException)


def _in_chain(error: BaseException | None, kind: type[_E]) -> _E | None:
    for _ in range(10):  # a chain of causes has no bound of its own
        if error is None or isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def too_large(limit: int) -> ProtocolError:
    return ProtocolError(
        f"the answer is larger than response_bytes_max ({limit} bytes)", code="too_large"
    )


def cut_short(url: str) -> TransportError:
    """Only a part of the request left this device, so nothing of it can have been decided."""
    error = TransportError(
        f"{url}: the connection was cut while the request was being sent; if this goes on, "
        f"something on the way to the server may refuse requests of this size{_tls_hint(url)}"
    )
    error.refused_by = "path"
    return error


def client_closed() -> SyncStateError:
    return SyncStateError("the client is closed: make a new one")


def overdue(url: str, timeout_s: float) -> SyncTimeoutError:
    return SyncTimeoutError(f"{url} did not finish its answer within {timeout_s:g} s")
