"""``admin``: the commands that look, and change nothing: at the whole server, devices, what
happened lately, entities, quotas and images.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import click

from entidb.cli import admin_views as views
from entidb.cli.admin_desk import DATABASE, LIMIT, NAME, Desk, Result, at, command, given
from entidb.cli.exits import UsageError
from entidb.cli.finding import condition_of


@command("overview")
def overview_command(desk: Desk) -> Result:
    """Show how the server is doing: devices, memory, disk, backups, tasks."""
    return desk.ask("GET", "overview"), views.overview


_SORTS: Final = ("behind", "seen", "name", "conflicts", "rejected")


@command("devices", click.argument("name", required=False), LIMIT,
         click.option("--search", metavar="WORDS",
                      help="Those whose names, ids, programs or errors have all the words."),
         click.option("--sort", type=click.Choice(_SORTS),
                      help="By what; else those seen last first."))  # fmt: skip
def devices_command(
    desk: Desk, name: str | None, limit: int, search: str | None, sort: str | None
) -> Result:
    """List the devices of a database, or of all: who, when, how far behind."""
    if name is not None and search is None and sort is None:
        return desk.ask("GET", at("databases", name, "devices"), limit=limit), views.devices
    asked = given(database=name, search=search)
    return desk.ask("GET", "devices", limit=limit, sort=sort or "seen", **asked), views.fleet


def _digits(text: str, of: str) -> str:
    digits = text.lower().replace("-", "")
    if re.fullmatch("[0-9a-f]{32}", digits) is None:
        raise UsageError(f"{text!r} is no id of {of}: one has 32 hexadecimal digits")
    return digits


@command("device", NAME, click.argument("identity", metavar="DEVICE"))
def device_command(desk: Desk, name: str, identity: str) -> Result:
    """Show a device of a database, and what happened to it lately."""
    return desk.ask(
        "GET", at("databases", name, "devices", _digits(identity, "a device"))
    ), views.device


_WHAT: Final = ("pushed", "conflict", "rejected", "refused")


@command("happened", DATABASE, LIMIT,
         click.option("--what", type=click.Choice(_WHAT), multiple=True,
                      help="Only these; repeat it."))  # fmt: skip
def happened_command(desk: Desk, database: str | None, limit: int, what: tuple[str, ...]) -> Result:
    """List the latest pushes and refusals: who, and why.

    The server keeps the last thousand of each in memory, if it shows the console.
    """
    asked = given(database=database, what=",".join(what))
    return desk.ask("GET", "happened", limit=limit, **asked), views.happened


@command("collections", NAME)
def collections_command(desk: Desk, name: str) -> Result:
    """List the collections of a database."""
    return desk.ask("GET", at("databases", name, "collections")), views.collections


_COLLECTION: Final = click.argument("collection")


@command("entities", NAME, _COLLECTION,
         click.option("--where", "conditions", multiple=True, metavar="CONDITION",
                      help="Only those: kind=tea, 'price>3'; repeat it."),
         click.option("--order", "orders", multiple=True, metavar="FIELD",
                      help="Sorted by this field; -FIELD: largest first."),
         click.option("--after", metavar="ID", default="", help="Go on behind this entity."),
         click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True,
                      help="How many at most."))  # fmt: skip
def entities_command(
    desk: Desk,
    name: str,
    collection: str,
    conditions: tuple[str, ...],
    orders: tuple[str, ...],
    after: str,
    limit: int,
) -> Result:
    """List entities of a collection, long texts cut.

    In a collection of more than 10,000 entities only an index answers --where and --order.
    """
    asked: dict[str, Any] = given(
        order=",".join(orders), after=after and _digits(after, "an entity")
    )
    if conditions:
        asked["where"] = _text({"&": [condition_of(each) for each in conditions]})
    page = desk.ask(
        "GET", at("databases", name, "entities"), collection=collection, limit=limit, **asked
    )
    return page, views.entities


def _text(condition: dict[str, Any]) -> str:
    try:
        return json.dumps(condition, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # bytes, and what is no number
        raise UsageError(
            "--where is sent as JSON, which has no form for bytes, infinity and NaN: look beside "
            "the database, with `entidb list`"
        ) from error


@command("entity", NAME, _COLLECTION, click.argument("identity", metavar="ID"))
def entity_command(desk: Desk, name: str, collection: str, identity: str) -> Result:
    """Show one entity: its value, version, device and time."""
    path = at("databases", name, "entities", _digits(identity, "an entity"))
    return desk.ask("GET", path, collection=collection), views.entity


@command("quotas", DATABASE, LIMIT)
def quotas_command(desk: Desk, database: str | None, limit: int) -> Result:
    """List what databases and devices use of what they may, the fullest first."""
    return desk.ask("GET", "quotas", limit=limit, **given(database=database)), views.quotas


@command("images", DATABASE)
def images_command(desk: Desk, database: str | None) -> Result:
    """List the images of databases, with which devices begin: how old, how large."""
    return desk.ask("GET", "images", **given(database=database)), views.images


LOOKING: Final = (
    overview_command,
    devices_command,
    device_command,
    happened_command,
    collections_command,
    entities_command,
    entity_command,
    quotas_command,
    images_command,
)
