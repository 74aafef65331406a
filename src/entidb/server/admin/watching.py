"""The part of the table of administration that is for looking: the whole server at a glance, all
devices, what happened lately, and entities. Nothing here changes anything.
"""

from __future__ import annotations

import re
from typing import Final

from entidb.errors import ProtocolError
from entidb.server.admin import browse, fleet, happened, holding
from entidb.server.admin.asking import AdminRequest, Route
from entidb.server.admin.callers import Caller
from entidb.server.admin.office import Office
from entidb.server.admin.overview import Overview, overview


def _number(asked: AdminRequest, name: str) -> int:
    text = asked.query.get(name, "0")
    if re.fullmatch("[0-9]{1,15}", text) is None:
        raise ProtocolError(f"{name} is a number")
    return int(text)


def _collection(asked: AdminRequest) -> str:
    name = asked.query.get("collection", "")
    if not name:
        raise ProtocolError("which collection? name it behind the question mark")
    return name


def _overview(office: Office, caller: Caller, asked: AdminRequest) -> Overview:
    return overview(office, caller, fleet.summary(office, caller), _number(asked, "since"))


def _devices(office: Office, caller: Caller, asked: AdminRequest) -> fleet.FleetPage:
    return fleet.devices(
        office,
        caller,
        database=asked.query.get("database") or None,
        search=asked.query.get("search", ""),
        sort=asked.query.get("sort", "behind"),
        offset=_number(asked, "offset"),
        limit=asked.limit,
    )


def _happened(office: Office, caller: Caller, asked: AdminRequest) -> list[happened.HappenedRow]:
    database = asked.query.get("database") or None
    what = asked.query.get("what", "")
    return happened.rows_of(office, caller, database, what=what, limit=asked.limit)


def _entities(office: Office, caller: Caller, asked: AdminRequest) -> browse.EntityPage:
    return browse.entities(
        office,
        caller,
        asked.names["name"],
        _collection(asked),
        where=asked.query.get("where", ""),
        order=asked.query.get("order", ""),
        after=asked.query.get("after", ""),
        limit=asked.limit,
    )


def _quotas(office: Office, caller: Caller, asked: AdminRequest) -> holding.QuotaPage:
    return holding.quotas(
        office,
        caller,
        database=asked.query.get("database") or None,
        offset=_number(asked, "offset"),
        limit=asked.limit,
    )


def _images(office: Office, caller: Caller, asked: AdminRequest) -> list[holding.ImageShown]:
    return holding.images(office, caller, database=asked.query.get("database") or None)


WATCHING: Final[list[Route]] = [
    Route(
        "GET",
        "overview",
        "Show how the server is doing; `since` leaves out what was before.",
        _overview,
        Overview,
        query=("since",),
    ),
    Route(
        "GET",
        "devices",
        "Find devices of all databases; `sort` by behind, seen, name, conflicts or rejected.",
        _devices,
        fleet.FleetPage,
        query=("offset", "limit"),
        texts=("database", "search", "sort"),
    ),
    Route(
        "GET",
        "quotas",
        "Show what databases and devices use of what they may, the fullest first.",
        _quotas,
        holding.QuotaPage,
        query=("offset", "limit"),
        texts=("database",),
    ),
    Route(
        "GET",
        "images",
        "List the images that are kept of databases, for the first sync of devices.",
        _images,
        list[holding.ImageShown],
        texts=("database",),
    ),
    Route(
        "GET",
        "databases/{name}/devices/{id}",
        "Show a device and what happened to it lately.",
        lambda office, caller, asked: fleet.story(
            office, caller, asked.names["name"], asked.names["id"]
        ),
        fleet.DeviceStory,
    ),
    Route(
        "GET",
        "happened",
        "List pushes and refusals, newest first; `what` is pushed, conflict, rejected, refused.",
        _happened,
        list[happened.HappenedRow],
        query=("limit",),
        texts=("database", "what"),
    ),
    Route(
        "GET",
        "databases/{name}/collections",
        "List the collections of a database.",
        lambda office, caller, asked: browse.collections(office, caller, asked.names["name"]),
        list[browse.CollectionRow],
    ),
    Route(
        "GET",
        "databases/{name}/entities",
        "Read a page of a collection, filtered and sorted as queries are.",
        _entities,
        browse.EntityPage,
        query=("limit",),
        texts=("collection", "where", "order", "after"),
    ),
    Route(
        "GET",
        "databases/{name}/entities/{id}",
        "Read one entity of a collection.",
        lambda office, caller, asked: browse.entity(
            office, caller, asked.names["name"], _collection(asked), asked.names["id"]
        ),
        browse.BrowsedEntity,
        texts=("collection",),
    ),
]
