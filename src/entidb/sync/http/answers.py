"""Answers that report an error, as a ``SyncError``: an error in the protocol's words, or else the
status that came from that address.

A request that got no answer at all is the subject of ``failures``.
"""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from typing import Final

from msgspec.structs import replace

from entidb.errors import ERROR_TABLE, ProtocolError, SyncError, TransportError
from entidb.protocol import CONTENT_TYPE, ErrorResponse
from entidb.sync.http.failures import SNIPPET_MAX
from entidb.sync.transport import (
    MESSAGE_CHARS_MAX,
    HttpResponse,
    error_from_response,
    printable,
)
from entidb.types import Clock

#: The words in which servers that expect TLS answer a request in the clear.
_WANTS_TLS: Final = re.compile(rb"HTTPS (port|server)", re.IGNORECASE)
#: What a status means when the body is none of our messages. Any other 5xx may pass (a proxy whose
#: server restarts), any other 4xx will not.
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
#: What to do about what is in front of a server, where the status says more than that it is there.
_FRONT: Final[dict[int, str]] = {
    401: "it wants a login of its own, which EntiDB's token is not: let these paths pass it",
    413: "raise its limit for bodies",
    429: "wait, or raise its limit for requests",
    502: "see whether the server runs behind it",
    503: "see whether the server runs behind it",
    504: "see whether the server runs behind it",
}
#: Statuses of 4xx that refuse nothing for good: they are about who asks, how often, and what passes
#: by itself.
_PASSING: Final = frozenset((401, 407, 408, 409, 421, 423, 425, 429, 499))
#: An id that is fit for a line of text, as servers take them too.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: A login page redirects for the moment; these two say that the URL is wrong for good.
_MOVED_FOR_GOOD: Final = (301, 308)
_PROXY_LOGIN_REQUIRED: Final = 407
_NETWORK_LOGIN_REQUIRED: Final = 511  # RFC 6585, section 6


def is_cbor(response: HttpResponse) -> bool:
    kind = response.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower() == CONTENT_TYPE


def request_id(response: HttpResponse) -> str | None:
    """The id that the server's access log has this request under, if it was said."""
    said = response.headers.get("x-request-id", "")
    return said if _REQUEST_ID.fullmatch(said) else None


def spoken_error(response: HttpResponse, answer: ErrorResponse, clock: Clock) -> SyncError:
    """The error that ``answer`` reports, in the protocol's words and with the request's id, by
    which whoever runs the server finds the line in the log."""
    known = request_id(response)
    if known is not None and known not in answer.message:
        message = answer.message[: MESSAGE_CHARS_MAX - len(known) - 20]
        answer = replace(answer, message=f"{message} (request {known})")
    error = error_from_response(answer)
    if answer.code not in ERROR_TABLE and _refuses(response.status) and not answer.retryable:
        # A newer server has a reason that this device does not know; it is one all the same.
        error = ProtocolError(error.message, code=error.code, details=error.details)
        error.refused_by = "server"
    error.request_id = known
    if error.retry_after is None:
        error.retry_after = _retry_after(response, clock)
    return error


def status_error(url: str, response: HttpResponse, body: bytes, clock: Clock) -> SyncError:
    """The error for the status of an answer whose body is none of the protocol's messages."""
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
    if url.startswith("http:") and _WANTS_TLS.search(body[: 2 * SNIPPET_MAX]):
        said += "; the server there expects TLS: write https://"
    elif status == _PROXY_LOGIN_REQUIRED:
        said += "; a proxy on the way wants a name and a password: write them into HTTP_PROXY"
    elif code == "not_found":
        said += "; no EntiDB server is at this path: check the path of the URL"
    else:
        # A server of ours says everything in CBOR.
        said += "; something in front of the server says so, or another server at this URL: "
        said += _FRONT.get(status, "look at the proxy or firewall there, and check the URL")
    error = kind(said, code=code, retry_after=_retry_after(response, clock))
    error.request_id = request_id(response)
    if _refuses(status):
        error.refused_by = "path"
    return error


def unreadable(url: str, error: SyncError) -> str:
    """What is said of an answer that arrived, and is none; ``error`` says what is wrong with it."""
    said = f"the answer of {url} cannot be used: {error.message}"
    if error.code == "too_large":  # names the setting
        return said
    return f"{said}; something on the way may have cut or changed it, or the server is another one"


def _retry_after(response: HttpResponse, clock: Clock) -> float | None:
    """Seconds, from either form of the header (RFC 9110, section 10.2.3)."""
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    date = _date(value)
    if date is None:
        return None
    # By the clock that has named it, where that says what time it is: this one may be wrong.
    there = _date(response.headers.get("date", ""))
    return max(0.0, date - (clock.now_ms() / 1000 if there is None else there))


def _date(value: str) -> float | None:
    """Seconds since 1970."""
    try:
        return parsedate_to_datetime(value).timestamp()
    except (ValueError, IndexError, OverflowError):
        return None


def _refuses(status: int) -> bool:
    """Whether a status proves that the request was not acted on (R5)."""
    return 400 <= status < 500 and status not in _PASSING


def _content_type_note(response: HttpResponse) -> str:
    kind = response.headers.get("content-type", "").partition(";")[0].strip()
    if kind.lower() in ("text/html", "application/xhtml+xml"):
        return f" with a web page ({kind})"
    return f" with {printable(kind[:80])}" if kind else " without a content type"


def _snippet(body: bytes) -> str:
    text = " ".join(printable(body[: 2 * SNIPPET_MAX].decode("utf-8", "replace")).split())
    return f': "{text[:SNIPPET_MAX]}"' if text else ""


def _redirect_error(said: str, response: HttpResponse) -> SyncError:
    target = printable(response.headers.get("location", "")[:SNIPPET_MAX])
    message = f"{said}, which points to {target!r}; redirects are not followed: correct the URL"
    if response.status in _MOVED_FOR_GOOD:
        return ProtocolError(message, code="redirected")
    return TransportError(message + ", or log in to the network", code="redirected")
