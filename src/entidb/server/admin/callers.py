"""Who asks for something, from where, and for which databases he may."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from entidb.errors import PermissionDeniedError
from entidb.server.auth import Grants

#: The claim of a token: true, or a list of databases.
ADMIN_CLAIM: Final = "admin"


class Caller(Struct, frozen=True):
    """``databases`` None means the whole server."""

    who: str
    where: str
    databases: frozenset[str] | None = None

    def check_all(self) -> None:
        """Raises ``PermissionDeniedError`` unless he administers the whole server."""
        if self.databases is not None:
            raise PermissionDeniedError("only an administrator of the whole server may do this")

    def check(self, db_id: str) -> None:
        """Raises ``PermissionDeniedError``, with the same words whether or not there is such a
        database."""
        if not self.sees(db_id):
            raise PermissionDeniedError("the token does not allow administering this database")

    def sees(self, db_id: str | None) -> bool:
        return self.databases is None or db_id in self.databases


def caller_of(grants: Grants, where: str, *, open_to_all: bool) -> Caller:
    """Who asks with a token. On a server without authentication every caller is an administrator.
    Raises ``PermissionDeniedError``."""
    claim = grants.claims.get(ADMIN_CLAIM)
    if claim is True or open_to_all:
        return Caller(grants.subject, where)
    if isinstance(claim, list) and claim and all(isinstance(each, str) for each in claim):
        return Caller(grants.subject, where, frozenset(claim))
    raise PermissionDeniedError(
        "the token does not allow administering this server: it needs the claim `admin`"
    )
