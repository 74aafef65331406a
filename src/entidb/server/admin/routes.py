"""Everything that can be asked of administration, as one table: address, what it takes, what it
answers, and the function that does it. Both faces go through ``answer``, and the OpenAPI document
is made from the table.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
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
from entidb.server.admin import access, databases
from entidb.server.admin.audit import Entry
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.admin.tasks import Task
from entidb.server.control import Kind, Revoked

logger = logging.getLogger("entidb.server")

PREFIX: Final = "/v1/admin/"
#: Bytes of a body: no request is longer than a name and a reason.
BODY_BYTES_MAX: Final = 64 * 1024
_LIMIT_MAX: Final = 10_000


class Nothing(Struct):
    """No body."""


class Name(Struct):
    """The name of a database."""

    name: str


class Reason(Struct):
    """Why, for the audit log and whoever asks later."""

    reason: str = ""


class NewName(Struct):
    """The new name of a database."""

    to: str


class Confirm(Struct):
    """The name of the database once more."""

    confirm: str


class Who(Struct):
    """A device id in hexadecimal digits, a subject, or the ``jti`` of a token; in one database, or
    in all."""

    kind: Kind
    name: str
    database: str | None = None


class Revoke(Who):
    """Whom to lock out, and why. From ``until_ms`` on, in milliseconds since 1970, it is
    forgotten."""

    reason: str = ""
    until_ms: int | None = None


class Changed(Struct):
    """Whether anything was changed."""

    changed: bool


class ErrorAnswer(Struct):
    """What every refusal looks like."""

    code: str
    message: str


class Asked(Struct, frozen=True):
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


Do = Callable[[Office, Caller, Asked], Any]


class Route(Struct, frozen=True):
    """``path`` is below ``PREFIX``; ``{name}`` in it stands for one part of an address."""

    method: str
    path: str
    says: str
    do: Do
    gives: Any
    takes: type[Struct] = Nothing
    #: Names that may follow a question mark.
    query: tuple[str, ...] = ()


def _number(text: str) -> int:
    if re.fullmatch("[0-9]{1,15}", text) is None:
        raise ProtocolError("a task has a number", code="not_found")
    return int(text)


def _tasks(office: Office, caller: Caller, asked: Asked) -> list[Task]:
    return [each for each in office.tasks.all() if caller.sees(each.database)]


def _task(office: Office, caller: Caller, asked: Asked) -> Task:
    found = office.tasks.find(_number(asked.names["id"]))
    if found is None or not caller.sees(found.database):
        raise ProtocolError("there is no such task", code="not_found")
    return found


def _cancel(office: Office, caller: Caller, asked: Asked) -> Changed:
    found = _task(office, caller, asked)
    with office.change(caller, "cancel", found.database, task=str(found.id)):
        return Changed(office.tasks.cancel(found.id))


def _audit(office: Office, caller: Caller, asked: Asked) -> list[Entry]:
    found = office.audit.newest(asked.limit)
    return [each for each in found if caller.databases is None or caller.sees(each.database)]


ROUTES: list[Route] = [
    Route(
        "GET",
        "databases",
        "List the databases.",
        lambda office, caller, asked: databases.rows(office, caller),
        list[databases.DatabaseRow],
    ),
    Route(
        "POST",
        "databases",
        "Make a database.",
        lambda office, caller, asked: databases.create(office, caller, asked.body.name),
        databases.DatabaseRow,
        Name,
    ),
    Route(
        "GET",
        "databases/{name}",
        "Show a database with its present figures.",
        lambda office, caller, asked: databases.row(office, caller, asked.names["name"]),
        databases.DatabaseRow,
    ),
    Route(
        "DELETE",
        "databases/{name}",
        "Delete a database; it can be taken back for a day.",
        lambda office, caller, asked: databases.delete(
            office, caller, asked.names["name"], asked.body.confirm
        ),
        databases.Aside,
        Confirm,
    ),
    Route(
        "POST",
        "databases/{name}/freeze",
        "Let a database be read only.",
        lambda office, caller, asked: databases.freeze(
            office, caller, asked.names["name"], asked.body.reason
        ),
        databases.DatabaseRow,
        Reason,
    ),
    Route(
        "POST",
        "databases/{name}/thaw",
        "Let a frozen database be written to again.",
        lambda office, caller, asked: databases.thaw(office, caller, asked.names["name"]),
        databases.DatabaseRow,
    ),
    Route(
        "POST",
        "databases/{name}/rename",
        "Give a database another name.",
        lambda office, caller, asked: databases.rename(
            office, caller, asked.names["name"], asked.body.to
        ),
        databases.DatabaseRow,
        NewName,
    ),
    Route(
        "GET",
        "databases/{name}/devices",
        "List the devices of a database, those seen last first.",
        lambda office, caller, asked: access.devices(
            office, caller, asked.names["name"], asked.limit
        ),
        list[access.DeviceRow],
        query=("limit",),
    ),
    Route(
        "GET",
        "deleted",
        "List the databases that can be taken back.",
        lambda office, caller, asked: databases.all_aside(office, caller),
        list[databases.Aside],
    ),
    Route(
        "POST",
        "deleted/{id}/undelete",
        "Take a deleted database back.",
        lambda office, caller, asked: databases.take_back(office, caller, asked.names["id"]),
        databases.DatabaseRow,
    ),
    Route(
        "GET",
        "revoked",
        "List who is locked out.",
        lambda office, caller, asked: access.revoked(office, caller),
        list[Revoked],
    ),
    Route(
        "POST",
        "revoked",
        "Lock a device, a subject or a token out.",
        lambda office, caller, asked: access.revoke(
            office,
            caller,
            asked.body.kind,
            asked.body.name,
            asked.body.database,
            asked.body.reason,
            asked.body.until_ms,
        ),
        Revoked,
        Revoke,
    ),
    Route(
        "DELETE",
        "revoked",
        "Let a device, a subject or a token in again.",
        lambda office, caller, asked: Changed(
            access.allow(office, caller, asked.body.kind, asked.body.name, asked.body.database)
        ),
        Changed,
        Who,
    ),
    Route(
        "GET",
        "keys",
        "List the keys that tokens are signed with.",
        lambda office, caller, asked: access.keys(office, caller),
        list[access.KeyRow],
    ),
    Route(
        "POST",
        "keys/reload",
        "Read the keys again.",
        lambda office, caller, asked: access.reload(office, caller),
        list[access.KeyRow],
    ),
    Route(
        "GET",
        "audit",
        "Read the audit log, newest first.",
        _audit,
        list[Entry],
        query=("limit",),
    ),
    Route("GET", "tasks", "List the tasks, newest first.", _tasks, list[Task]),
    Route("GET", "tasks/{id}", "Show a task.", _task, Task),
    Route("POST", "tasks/{id}/cancel", "Cancel a task.", _cancel, Changed),
]


# ---------------------------------------------------------------- asked and answered


def answer(
    office: Office,
    caller: Caller,
    method: str,
    path: str,
    query: Mapping[str, str],
    body: bytes,
) -> tuple[int, bytes]:
    """Status and JSON of the answer to one request; ``path`` is the whole of it. Never raises but
    for what ends the process."""
    try:
        route, names = _find(method, path)
        return 200, json.encode(
            route.do(office, caller, Asked(names, query, _body(route.takes, body)))
        )
    except Exception as error:
        return refusal(error)


def _find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    parts = path.removeprefix(PREFIX).split("/")
    others = False
    for route in ROUTES:
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
        # What nobody reads was meant to say something.
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
    else:
        logger.error("a request to administration failed", exc_info=error)
    return status, json.encode(ErrorAnswer(code, message))


_LOCAL: Final = {"exists": 409}
