"""Everything that can be asked of administration, as one table: address, what it takes, what it
answers, and the function that does it. Both faces go through ``answer``, and the OpenAPI document
is made from the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from entidb.errors import EntiDBError, ProtocolError
from entidb.server.admin import access, backups, care, databases, erase
from entidb.server.admin.asking import PREFIX, AdminRequest, Changed, Route, answer_from, refusal
from entidb.server.admin.audit import Entry
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import NodeRow, Office
from entidb.server.admin.tasks import Task
from entidb.server.admin.watching import WATCHING
from entidb.server.control import Kind, Revoked
from entidb.server.place import Aside


class Name(Struct):
    """The name of a database."""

    name: str


class Reason(Struct):
    """Why, for the audit log and for later questions."""

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


class Restore(Struct):
    """Which backup, and the name of the database once more."""

    backup: str
    confirm: str


class Purge(Struct):
    """Deletions older than so many days; without it, as the server's retention says."""

    days: float | None = None


class ErasePreview(Struct):
    """Conditions on entities, by the names of collections."""

    collections: dict[str, dict[str, Any]]


class Erase(ErasePreview):
    """The same conditions, what the preview said to confirm them by, and whether the backups go
    that have one of the entities."""

    confirm: str
    backups: bool = False


def _number(text: str) -> int:
    if re.fullmatch("[0-9]{1,15}", text) is None:
        raise ProtocolError("a task has a number", code="not_found")
    return int(text)


def _tasks(office: Office, caller: Caller, asked: AdminRequest) -> list[Task]:
    return [each for each in office.tasks.all() if caller.sees(each.database)]


def _task(office: Office, caller: Caller, asked: AdminRequest) -> Task:
    found = office.tasks.find(_number(asked.names["id"]))
    if found is None or not caller.sees(found.database):
        raise ProtocolError("there is no such task", code="not_found")
    return found


def _cancel(office: Office, caller: Caller, asked: AdminRequest) -> Changed:
    found = _task(office, caller, asked)
    with office.change(caller, "cancel", found.database, task=str(found.id)):
        return Changed(office.tasks.cancel(found.id))


def _nodes(office: Office, caller: Caller, asked: AdminRequest) -> list[NodeRow]:
    caller.check_all()
    return office.nodes()


def _audit(office: Office, caller: Caller, asked: AdminRequest) -> list[Entry]:
    found = office.audit.newest(asked.limit)
    return [each for each in found if caller.databases is None or caller.sees(each.database)]


ROUTES: Final[list[Route]] = [
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
        Aside,
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
        list[Aside],
    ),
    Route(
        "POST",
        "deleted/{id}/undelete",
        "Take a deleted database back.",
        lambda office, caller, asked: databases.take_back(office, caller, asked.names["id"]),
        databases.DatabaseRow,
    ),
    Route(
        "POST",
        "databases/{name}/backup",
        "Make a backup of a database, and verify it.",
        lambda office, caller, asked: backups.backup(office, caller, asked.names["name"]),
        Task,
    ),
    Route(
        "POST",
        "databases/{name}/restore",
        "Put a backup in the place of a database.",
        lambda office, caller, asked: backups.restore(
            office, caller, asked.names["name"], asked.body.backup, asked.body.confirm
        ),
        Task,
        Restore,
    ),
    Route(
        "POST",
        "databases/{name}/verify",
        "Check every record of a database.",
        lambda office, caller, asked: care.verify(office, caller, asked.names["name"]),
        Task,
    ),
    Route(
        "POST",
        "databases/{name}/compact",
        "Give unused room of a database back to the file system.",
        lambda office, caller, asked: care.compact(office, caller, asked.names["name"]),
        Task,
    ),
    Route(
        "POST",
        "databases/{name}/purge",
        "Forget old deletions of a database.",
        lambda office, caller, asked: care.purge(
            office, caller, asked.names["name"], asked.body.days
        ),
        Task,
        Purge,
    ),
    Route(
        "POST",
        "databases/{name}/erase/preview",
        "Count what would be erased.",
        lambda office, caller, asked: erase.preview(
            office, caller, asked.names["name"], asked.body.collections
        ),
        erase.Erasable,
        ErasePreview,
    ),
    Route(
        "POST",
        "databases/{name}/erase",
        "Erase what was looked at, from the bytes of the files too.",
        lambda office, caller, asked: erase.erase(
            office,
            caller,
            asked.names["name"],
            asked.body.collections,
            asked.body.confirm,
            with_backups=asked.body.backups,
        ),
        Task,
        Erase,
    ),
    Route(
        "GET",
        "backups",
        "List the backups, newest first.",
        lambda office, caller, asked: backups.rows(office, caller),
        list[backups.BackupRow],
    ),
    Route(
        "POST",
        "backups",
        "Make a backup of every database, and verify them.",
        lambda office, caller, asked: backups.backup_all(office, caller),
        list[Task],
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
    Route(
        "GET",
        "nodes",
        "List the processes of the server, and which is on duty.",
        _nodes,
        list[NodeRow],
    ),
    Route("GET", "tasks", "List the tasks, newest first.", _tasks, list[Task]),
    Route("GET", "tasks/{id}", "Show a task.", _task, Task),
    Route("POST", "tasks/{id}/cancel", "Cancel a task.", _cancel, Changed),
    *WATCHING,
]


#: Says nothing of devices, and is asked again and again until something is done.
_ASKED_OFTEN: Final = PREFIX + "tasks"


def answer(
    office: Office,
    caller: Caller,
    method: str,
    path: str,
    query: Mapping[str, str],
    body: bytes,
) -> tuple[int, bytes]:
    """Status and JSON of the answer to one request; ``path`` is the whole of it. Of several
    processes that are one server the one on duty gives it."""
    try:
        elsewhere = office.others.forward(caller, method, path, query, body)
        if elsewhere is not None:
            return elsewhere
        if not path.startswith(_ASKED_OFTEN):
            office.others.gather()
    except EntiDBError as error:
        return refusal(error)
    return answer_from(ROUTES, office, caller, method, path, query, body)
