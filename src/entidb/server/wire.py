"""HTTP without a socket: what a request must look like, and how messages and errors become answers.

Shared by the ASGI app and the server that is called in process. Sizes, statuses and headers
live here; how a body is packed is for ``packing``, reading from a connection for ``app``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

from entidb import packing
from entidb.errors import (
    ERROR_TABLE,
    REASONS,
    DatabaseClosedError,
    DatabaseLockedError,
    ProtocolError,
    StorageError,
    StorageFullError,
    SyncError,
    TransactionError,
)
from entidb.protocol import CONTENT_TYPE, PATHS, ErrorResponse, encode
from entidb.server.away import full_retry_after_s, is_away, retry_after_s

JSON_TYPE: Final = "application/json"
_SERVER_ERROR: Final = "server_error"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class ServerResponse:
    """An answer: ``headers`` by lower-case name, ``body`` in whatever encoding they name."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


# ---------------------------------------------------------------- requests


def check_route(method: str, path: str) -> None:
    """Raises ``ProtocolError`` unless ``path`` is one of the protocol's and posted to."""
    if path not in PATHS:
        raise ProtocolError("there is nothing at this address", code="not_found")
    if method != "POST":
        raise ProtocolError("send this with POST", code="method_not_allowed")


def check_content_type(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != CONTENT_TYPE:
        raise ProtocolError(
            f"the body has to be {CONTENT_TYPE}, and say so in Content-Type",
            code="unsupported_media_type",
        )


def content_encoding(headers: Mapping[str, str]) -> str | None:
    """How the request's body is packed, None if it is not. Raises ``ProtocolError``."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in packing.ENCODINGS:
        raise ProtocolError(
            "this server unpacks " + ", ".join(packing.ENCODINGS), code="unsupported_media_type"
        )
    return encoding


def content_length(headers: Mapping[str, str], limit: int) -> int | None:
    """The length the request says its body has. Raises ``ProtocolError`` (too_large) over
    ``limit``, and for what is no length."""
    text = headers.get("content-length")
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,18}", text) is None:
        raise ProtocolError("Content-Length is not a number")
    length = int(text)
    if length > limit:
        raise too_large(limit)
    return length


def too_large(limit: int) -> ProtocolError:
    return ProtocolError(f"the body is over this server's limit of {limit} bytes", code="too_large")


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """The token of ``Authorization: Bearer <token>`` (RFC 6750), None if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def request_id(headers: Mapping[str, str]) -> str | None:
    """The client's own id for the request, if it is fit for a log."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else None


def query_of(query: bytes) -> dict[str, str]:
    """What follows the question mark of an address. Raises ``ProtocolError``."""
    try:
        fields = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=20
        )
    except (UnicodeDecodeError, ValueError) as error:
        raise ProtocolError("the query of this address cannot be read") from error
    given = dict(fields)
    if len(given) < len(fields):
        # What is in front of the server may have looked at another one of them.
        raise ProtocolError("the query of this address names a parameter twice")
    return given


# ---------------------------------------------------------------- packing


def decompress(encoding: str, body: bytes, limit: int) -> bytes:
    """The unpacked body. Raises ``ProtocolError`` (too_large) for one over ``limit`` bytes, and
    ``SyncCodecError`` for one that is not packed as its headers say; see ``packing``."""
    return packing.decompress(encoding, body, limit, "the body", too_large)


def accepted_encoding(headers: Mapping[str, str]) -> str | None:
    """The best encoding this server can make that the client takes (RFC 9110, 12.5.3)."""
    given = headers.get("accept-encoding")
    if not given:
        return None
    taken: dict[str, bool] = {}
    for part in given[:1000].lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        taken[name] = not any(re.fullmatch(r"q=0(\.0*)?", piece) for piece in parameters)
    others = taken.get("*", False)
    return next((name for name in packing.ENCODINGS if taken.get(name, others)), None)


# ---------------------------------------------------------------- answers


def message_response(body: bytes, encoding: str | None = None) -> ServerResponse:
    """A message, already encoded, as the answer; packed with ``encoding`` if that is shorter."""
    headers = {"content-type": CONTENT_TYPE}
    if encoding is not None:
        packed = packing.compress(encoding, body)
        if len(packed) < len(body):
            headers["content-encoding"] = encoding
            body = packed
    return ServerResponse(200, headers, body)


def failure(error: BaseException, rid: str) -> ErrorResponse:
    """What a client gets of ``error``: our own words for our own errors, and nothing of the inside
    for any other; ``rid`` finds it in the server's log."""
    if isinstance(error, SyncError) and error.code in ERROR_TABLE:
        return ErrorResponse(
            code=error.code,
            message=error.message,
            retryable=ERROR_TABLE[error.code].retryable,
            retry_after=error.retry_after,
            details=error.details,
        )
    code, message, retry_after = _said(error)
    row = ERROR_TABLE[code]
    return ErrorResponse(
        code=code,
        message=f"{message}; the server's log has it as request {rid}",
        retryable=row.retryable,
        retry_after=retry_after,
    )


def _said(error: BaseException) -> tuple[str, str, float | None]:
    if is_away(error):
        return "busy", "the database cannot be reached at the moment", retry_after_s()
    if isinstance(error, StorageFullError):
        return "storage_full", "the server's disk is full", full_retry_after_s()
    if isinstance(error, StorageError):
        return "storage_error", "the server's storage failed", None
    # Between closing after an error and opening again, or held by a program on the server.
    if isinstance(error, DatabaseClosedError | DatabaseLockedError | TransactionError):
        return "busy", "the database is not free at the moment", 1.0
    return _SERVER_ERROR, "the server failed", None


def said_code(answer: ErrorResponse) -> str:
    """The code that a device has for ``answer``: a reason that it knows, before the code."""
    reason = answer.details.get("reason")
    return (
        REASONS.get((answer.code, reason), answer.code) if isinstance(reason, str) else answer.code
    )


def is_internal(error: BaseException) -> bool:
    """Whether the server's log has to say more about ``error`` than the answer to its client."""
    return not isinstance(error, SyncError) or error.code not in ERROR_TABLE


def error_response(answer: ErrorResponse) -> ServerResponse:
    headers = {"content-type": CONTENT_TYPE}
    if answer.code == "unauthorized":
        headers["www-authenticate"] = 'Bearer realm="entidb"'
    if answer.code == "method_not_allowed":
        headers["allow"] = "POST"
    if answer.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(answer.retry_after)))
    return ServerResponse(ERROR_TABLE[answer.code].status, headers, encode(answer))
