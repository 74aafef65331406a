"""How administration is asked and answers, whatever it is asked for: routes, bodies, refusals.

Not here: what can be asked (``routes``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

from msgspec import Struct, ValidationError, convert, json

from entidb.errors import (
    ERROR_TABLE,
    DatabaseLockedError,
    EntiDBError,
    LocalError,
    ProtocolError,
    StorageError,
    StorageFullError,
    SyncError,
)
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.chores import log_failure
from entidb.storage.disk_errors import disk_error

PREFIX: Final = "/v1/admin/"
#: Bytes of a body: no request is longer than a name and a reason.
BODY_BYTES_MAX: Final = 64 * 1024
_LIMIT_MAX: Final = 10_000


class Nothing(Struct):
    """No body."""


class Changed(Struct):
    """Whether anything was changed."""

    changed: bool


class ErrorAnswer(Struct):
    """What every refusal looks like."""

    code: str
    message: str


class AdminRequest(Struct, frozen=True):
    """One request: ``names`` come from the address, ``query`` from what follows it."""

    names: Mapping[str, str]
    query: Mapping[str, str]
    body: Any

    @property
    def limit(self) -> int:
        text = self.query.get("limit", "1000")
        if re.fullmatch("[0-9]{1,6}", text) is None or not 0 < int(text) <= _LIMIT_MAX:
            raise ProtocolError(f"limit is a number from 1 to {_LIMIT_MAX}")
        return int(text)


Do = Callable[[Office, Caller, AdminRequest], Any]


class Route(Struct, frozen=True):
    """``path`` is below ``PREFIX``; ``{name}`` in it is any one part of an address."""

    method: str
    path: str
    says: str
    do: Do
    gives: Any
    takes: type[Struct] = Nothing
    #: Names of numbers that may follow a question mark, and of texts.
    query: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


# ---------------------------------------------------------------- asked and answered


def answer_from(
    routes: Sequence[Route],
    office: Office,
    caller: Caller,
    method: str,
    path: str,
    query: Mapping[str, str],
    body: bytes,
) -> tuple[int, bytes]:
    """Status and JSON of the answer to one request; ``path`` is the whole of it, with names that
    are percent-encoded. Never raises but for what ends the process."""
    try:
        route, names = _find(routes, method, path)
        unknown = query.keys() - {*route.query, *route.texts}
        if unknown:
            # As a member of the body: it would be a mistake of the client.
            raise ProtocolError(f"this address takes no parameter {min(unknown)[:100]!r}")
        return 200, json.encode(
            route.do(office, caller, AdminRequest(names, query, _body(route.takes, body)))
        )
    except Exception as error:
        return refusal(error)


def _find(routes: Sequence[Route], method: str, path: str) -> tuple[Route, dict[str, str]]:
    parts = path.removeprefix(PREFIX).split("/")
    others = False
    for route in routes:
        names = _match(route.path.split("/"), parts)
        if names is not None:
            if route.method == method:
                return route, names
            others = True
    if others:
        raise ProtocolError("this address is asked in another way", code="method_not_allowed")
    raise ProtocolError("there is nothing at this address", code="not_found")


def _match(pattern: list[str], parts: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(parts):
        return None
    names = {}
    for wanted, given in zip(pattern, parts, strict=True):
        if wanted.startswith("{"):
            names[wanted[1:-1]] = unquote(given)
        elif wanted != given:
            return None
    return names


def _body(kind: type[Struct], body: bytes) -> Any:
    if not body:
        body = b"{}"
    try:
        given = json.decode(body)
        if not isinstance(given, dict):
            raise ProtocolError("the body is a JSON object")
        # A member that the server ignores would be a mistake of the client.
        unknown = given.keys() - set(kind.__struct_fields__)
        if unknown:
            raise ProtocolError(f"the body has a member that is not known: {min(unknown)[:100]!r}")
        return convert(given, kind)
    except (ValidationError, ValueError, RecursionError) as error:
        raise ProtocolError(f"the body cannot be read: {error}") from error


def refusal(error: Exception) -> tuple[int, bytes]:
    """Status and JSON of a refusal."""
    status, code, message = 500, "internal", "the server failed; its log says how"
    if isinstance(error, SyncError) and error.code in ERROR_TABLE:
        status, code, message = ERROR_TABLE[error.code].status, error.code, error.message
    elif isinstance(error, DatabaseLockedError):
        status, code, message = 409, error.code, error.message
    elif isinstance(error, LocalError):
        status, code, message = _LOCAL.get(error.code, 400), error.code, error.message
    elif isinstance(error, StorageError):
        full = isinstance(error, StorageFullError)
        status, code, message = 507 if full else 500, error.code, error.message
    elif isinstance(error, EntiDBError):
        status, code, message = 400, error.code, error.message
    elif isinstance(error, OSError) and error.errno is not None:
        doing = "the server's directory" if error.filename is None else os.fsdecode(error.filename)
        log_failure(error, "a request to administration failed")
        return refusal(disk_error(error.errno, doing))
    else:
        log_failure(error, "a request to administration failed")
    return status, json.encode(ErrorAnswer(code, message))


_LOCAL: Final = {"exists": 409}
