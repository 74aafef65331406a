"""What a connection answers to what is no request that it takes: why, in the form of every error of
the server, and that this is its last answer.

Not here: when it is answered (``connections``), and what a request that is one is refused for
(``wire``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from entidb.errors import ERROR_TABLE
from entidb.protocol import ErrorResponse
from entidb.server import wire

NO_ADDRESS: Final = "the address in the first line of the request is none"
#: By status; any other one is an ``invalid_message``.
_CODES: Final = {408: "timeout", 431: "too_large"}


class RefusedError(Exception):
    """Raised inside the parser of a connection: the request is answered with ``status`` and
    ``words``."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words
        self.code: Final = _CODES.get(status, "invalid_message")


def refusal_of(error: httptools.HttpParserError) -> RefusedError:
    """What is answered to what the parser cannot read."""
    if isinstance(error.__context__, RefusedError):
        return error.__context__
    said = str(error)
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        return RefusedError(400, "this is no request of HTTP/1.1: it begins with no known method")
    if "HTTP version" in said or "PRI" in said:
        return RefusedError(505, "this server speaks HTTP/1.1, and HTTP/1.0")
    if isinstance(error, httptools.HttpParserInvalidURLError):
        return RefusedError(400, NO_ADDRESS)
    if isinstance(error, httptools.HttpParserCallbackError):
        return RefusedError(400, "this is no proper request of HTTP/1.1")
    return RefusedError(400, f"this is no proper request of HTTP/1.1: {said}")


def check_line(version: str, url: bytes, headers: Iterable[tuple[bytes, bytes]]) -> str:
    """``version`` itself. Raises ``RefusedError`` for one that the server does not speak, although
    the parser does; where HTTP/1.1 comes without Host (RFC 9112, section 3.2); and for an address
    with a host that is not the one in Host: what is in front of the server could go by the other
    one (RFC 9112, section 3.2.2)."""
    if version not in ("1.0", "1.1"):
        raise RefusedError(505, "this server speaks HTTP/1.1, and HTTP/1.0")
    hosts = [value.lower() for name, value in headers if name.lower() == b"host"]
    if version == "1.1" and not hosts:
        raise RefusedError(400, "a request of HTTP/1.1 needs the header Host")
    scheme, named, rest = url.partition(b"://")
    if named and b"/" not in scheme:
        authority = rest.partition(b"/")[0].partition(b"?")[0].lower()
        if [authority] != hosts:
            raise RefusedError(400, "the address in the first line names another host than Host")
    return version


def too_long(most: int) -> RefusedError:
    return RefusedError(
        431, f"the head of a request, or what is behind its body, has {most} bytes at most here"
    )


def answer_of(refused: RefusedError) -> bytes:
    """Head and body."""
    code = refused.code
    response = wire.error_response(
        ErrorResponse(code=code, message=refused.words, retryable=ERROR_TABLE[code].retryable)
    )
    headers = response.headers | {
        "content-length": str(len(response.body)),
        "connection": "close",
    }
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = STATUS_LINE[refused.status] + "".join(lines).encode("latin-1")
    return head + b"\r\n" + response.body


__all__ = [
    "NO_ADDRESS",
    "RefusedError",
    "answer_of",
    "check_line",
    "refusal_of",
    "too_long",
]
