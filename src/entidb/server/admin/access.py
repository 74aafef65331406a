"""Who may come: devices, revocations, and the keys of tokens."""

from __future__ import annotations

import re

from msgspec import Struct

from entidb.errors import ConfigError, EntiDBError
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.auth import JwtAuthenticator
from entidb.server.config import check_db_id
from entidb.server.control import Kind, Revoked
from entidb.server.registry import DeviceRecord

_NAME_CHARS_MAX = 500


class DeviceRow(Struct, omit_defaults=True):
    """A device in a database. ``behind``: commits that it was not given yet; None where the head
    of the database is not known."""

    device: DeviceRecord
    behind: int | None = None
    revoked: bool = False


class KeyRow(Struct, omit_defaults=True):
    """A key of tokens, without the key. Times are seconds since 1970."""

    kid: str | None
    algorithm: str
    begins: float | None = None
    ends: float | None = None


def devices(office: Office, caller: Caller, db_id: str, limit: int = 1000) -> list[DeviceRow]:
    """Those seen last first."""
    caller.check(db_id)
    check_db_id(db_id)
    about = office.registry.about(db_id)
    head = None if about is None else about.head
    with office.stores.looking(db_id) as store:
        if store is not None:
            head = store.database.read_head().sequence
    revoked = {each.key for each in office.control.revoked()}
    return [
        DeviceRow(
            device=each,
            behind=None if head is None else max(0, head - each.cursor),
            revoked=any(
                key in revoked
                for place in (None, db_id)
                for key in (
                    ("device", each.device_id, place),
                    ("subject", each.subject, place),
                    ("token", each.token or "", place),
                )
            ),
        )
        for each in office.registry.devices(db_id)[: max(0, limit)]
    ]


def revoked(office: Office, caller: Caller) -> list[Revoked]:
    """Newest first; who administers some databases sees what holds in those."""
    found = office.control.revoked()
    seen = [each for each in found if caller.databases is None or caller.sees(each.db_id)]
    return sorted(seen, key=lambda each: -each.since_ms)


def revoke(
    office: Office,
    caller: Caller,
    kind: Kind,
    name: str,
    database: str | None = None,
    reason: str = "",
    until_ms: int | None = None,
) -> Revoked:
    """Lock a device, a subject or a token out (R32); in ``database`` only, or in all. From
    ``until_ms`` on it is forgotten: the token has expired by then. Raises
    ``PermissionDeniedError`` (unknown_database): a name that is no database would lock out
    nobody."""
    _check(caller, kind, name, database)
    if database is not None:
        office.require(database)
    entry = Revoked(
        kind=kind,
        name=name,
        since_ms=office.clock.now_ms(),
        by=caller.who,
        db_id=database,
        reason=reason,
        until_ms=until_ms,
    )
    with office.change(caller, "revoke", database, kind=kind, name=name, reason=reason):
        office.control.revoke(entry)
    return entry


def allow(
    office: Office, caller: Caller, kind: Kind, name: str, database: str | None = None
) -> bool:
    """Take a revocation back; whether there was one."""
    _check(caller, kind, name, database)
    with office.change(caller, "allow", database, kind=kind, name=name):
        return office.control.allow(kind, name, database)


def _check(caller: Caller, kind: Kind, name: str, database: str | None) -> None:
    if database is None:
        caller.check_all()
    else:
        caller.check(database)
        check_db_id(database)
    if kind == "device" and re.fullmatch(r"[0-9a-f]{32}", name) is None:
        raise ConfigError("a device id is 32 hexadecimal digits, in lower case")
    if not 0 < len(name) <= _NAME_CHARS_MAX:
        raise ConfigError(
            f"name a subject or the jti of a token: up to {_NAME_CHARS_MAX} characters"
        )


def keys(office: Office, caller: Caller) -> list[KeyRow]:
    """The keys in force; none where the server knows tokens in another way."""
    caller.check_all()
    known = office.server.authenticator
    if not isinstance(known, JwtAuthenticator):
        return []
    return [KeyRow(each.kid, each.algorithm, each.begins, each.ends) for each in known.keys.keys]


def reload(office: Office, caller: Caller) -> list[KeyRow]:
    """Read the keys again now. Raises ``ConfigError``; those in force stay then."""
    caller.check_all()
    with office.change(caller, "reload"):
        try:
            office.server.reload()
        except EntiDBError as error:
            raise ConfigError(f"the keys stay as they were: {error}") from error
        office.others.reload()
    return keys(office, caller)
