"""The entities of a database, for a person who looks: collections, a page of one, and one entity.

A page is filtered and sorted as queries are. In a large collection only an index answers that, so
that a question of a person does not hold up devices.
"""

from __future__ import annotations

import re
import uuid
from typing import Any, Final

from msgspec import Struct, json

from entidb.db import Database, Query, inspect
from entidb.db.collection import ReadCollection
from entidb.db.scans import SCANNED_MAX
from entidb.errors import ProtocolError, QueryError
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.admin.plain_values import as_json, cut
from entidb.server.config import check_db_id
from entidb.types import check_name

#: Entities of a page, at most.
PAGE_MAX: Final = 200
#: Bytes of an entity's value that is answered whole.
_WHOLE_BYTES_MAX: Final = 1024 * 1024


class CollectionRow(Struct):
    """``synced``: devices get it."""

    name: str
    entities: int
    synced: bool


class BrowsedEntity(Struct, omit_defaults=True):
    """``value`` is JSON that loses nothing (``{"$bytes": …}``); where it is not ``whole``, long
    texts and what is inside lists and maps are left out. ``version`` is the commit that wrote it,
    ``changed_ms`` in milliseconds since 1970 when its device says it did, ``bytes`` of the value
    as it is stored."""

    id: str
    value: Any
    whole: bool
    version: int
    device_id: str
    changed_ms: int
    bytes: int


class EntityPage(Struct):
    """``after`` is what to ask for the next page with; None: there is none. ``entities``: so many
    are in the collection."""

    rows: list[BrowsedEntity]
    entities: int
    after: str | None = None


def collections(office: Office, caller: Caller, db_id: str) -> list[CollectionRow]:
    """In order of names. Raises ``PermissionDeniedError``."""
    _check(caller, db_id)
    with office.stores.lasting(db_id) as store:
        found = inspect(store.database)["collections"]
    return [CollectionRow(name, each["entities"], each["synced"]) for name, each in found.items()]


def entities(
    office: Office,
    caller: Caller,
    db_id: str,
    collection: str,
    *,
    where: str = "",
    order: str = "",
    after: str = "",
    limit: int = 50,
) -> EntityPage:
    """A page. ``where`` is a condition as JSON (``Where.from_dict``), ``order`` fields with
    commas between. Raises ``QueryError``; its code is ``no_index`` where no index answers it in a
    collection of more than 10,000 entities; ``ProtocolError``."""
    _check(caller, db_id)
    with office.stores.lasting(db_id) as store:
        found = _collection(store.database, collection)
        query = _query(found, where, order, after)
        limit = min(max(1, limit), PAGE_MAX)
        pairs = list(query.limit(limit + 1))
        rows = [_row(found, key, value, short=True) for key, value in pairs[:limit]]
        more = str(pairs[limit - 1][0]) if len(pairs) > limit else None
        return EntityPage(rows, len(found), more)


def entity(
    office: Office, caller: Caller, db_id: str, collection: str, identity: str
) -> BrowsedEntity:
    """One entity. Raises ``ProtocolError`` (not_found)."""
    _check(caller, db_id)
    key = _id(identity)
    with office.stores.lasting(db_id) as store:
        found = _collection(store.database, collection)
        try:
            return _row(found, key, found[key], short=False)
        except KeyError:
            raise ProtocolError(
                "there is no such entity: it was deleted, or never here", code="not_found"
            ) from None


def _check(caller: Caller, db_id: str) -> None:
    caller.check(db_id)
    check_db_id(db_id)


def _collection(database: Database, name: str) -> ReadCollection[Any]:
    check_name(name)
    if name not in inspect(database)["collections"]:
        raise ProtocolError("this database has no such collection", code="not_found")
    return database.collection(name)


def _id(text: str) -> uuid.UUID:
    if re.fullmatch("[0-9a-f]{32}", text.lower().replace("-", "")) is None:
        raise ProtocolError("the id of an entity is 32 hexadecimal digits")
    return uuid.UUID(text)


def _query(found: ReadCollection[Any], where: str, order: str, after: str) -> Query[Any]:
    query = found.where()
    if where:
        try:
            given = json.decode(where)
        except ValueError as error:
            raise ProtocolError(f"where cannot be read: {error}") from error
        query = query.where.from_dict(given)
    if order:
        query = query.order_by(*(name.strip() for name in order.split(",")))
    if after:
        key = _id(after)
        last = found.get(key)
        if last is None and order:
            raise QueryError("the entity that this page follows is gone: begin at the first page")
        query = query.after((key, last))
    if (where or order) and len(found) > SCANNED_MAX:
        query = query.scan(False)
    return query


def _row(found: ReadCollection[Any], key: uuid.UUID, value: Any, *, short: bool) -> BrowsedEntity:
    about = found.info(key)
    if short or about.payload_bytes > _WHOLE_BYTES_MAX:
        shown, whole = cut(value)
    else:
        shown, whole = as_json(value), True
    return BrowsedEntity(
        id=str(key),
        value=shown,
        whole=whole,
        version=about.version,
        device_id=about.device_id.hex(),
        changed_ms=round(about.changed_at.timestamp() * 1000),
        bytes=about.payload_bytes,
    )
